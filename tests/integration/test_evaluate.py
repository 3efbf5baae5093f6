"""`timm-shiftnas evaluate` and `extract` on images whose right answers are known.

A network of random weights classifies random images here, in a few lines of torch. Every image is put into the folder
of its class, so that the accuracy is 100% if the command reads the images, the mode and the classes as it should.
"""
import json
import math
import pickle
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_shiftnas as tsn
from timm_shiftnas.data.modes import MODES
from timm_shiftnas.models import describe_images
from timm_shiftnas_cli import main

NAMES = ['cat', 'dog', 'eel', 'fox', 'hen']  # not in the order of any folder names below


def run(capsys, *argv):
    """Run a command; return exit code, stdout and stderr."""
    code = main([str(arg) for arg in argv])
    return code, *capsys.readouterr()


def refused(capsys, *argv):
    """The one line on stderr with which a command ends."""
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, '') and err.count('\n') == 1, err
    return err


def colors(count=60):
    """Smooth images with transparency, uint8 [count, 32, 32, 4]."""
    coarse = torch.rand(count, 4, 4, 4, generator=torch.Generator().manual_seed(0)) * 255
    return torch.nn.functional.interpolate(coarse, 32).permute(0, 2, 3, 1).byte().numpy()


def tensors(images, mode):
    """Images in a mode, normalised with mean and standard deviation of 0.5."""
    arrays = [np.asarray(image.convert(mode), dtype=np.float32).reshape(32, 32, -1) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255 * 2 - 1


def make_model(folder, images, mode='RGB', names=NAMES, name='test_shiftformer_supernet', num_classes=5):
    """Save a supernet in `folder`/model and images, each in the folder of its class, in `folder`/data/validation."""
    torch.manual_seed(0)
    channels = dict(mean=(.5,) * MODES[mode], std=(.5,) * MODES[mode])
    net = timm.create_model(name, num_classes=num_classes, in_chans=MODES[mode]).eval()
    arch, x = net.space.smallest, tensors(images, mode)
    with torch.no_grad():
        net.head.weight.normal_()
        logits = net(x, arch)
        net.head.bias.copy_(-logits.mean(0) / logits.std(0))
        net.head.weight.div_(logits.std(0)[:, None])
        classes = net(x, arch).argmax(1).tolist()
    describe_images(net, names, mode)
    tsn.save_pretrained(folder / 'model', net, data_config=channels)
    for number, (image, label) in enumerate(zip(images, classes, strict=True)):
        path = folder / 'data' / 'validation' / NAMES[label]
        path.mkdir(parents=True, exist_ok=True)
        image.save(path / f'{number}.png')
    return json.dumps(arch.to_dict())


@pytest.fixture(scope='module')
def pictures():
    return [Image.fromarray(array, 'RGBA') for array in colors()]


@pytest.fixture(scope='module')
def made(tmp_path_factory, pictures):
    folder = tmp_path_factory.mktemp('made')
    arch = make_model(folder, pictures)
    return folder, arch


@pytest.fixture
def place(made, tmp_path):
    """A copy of the folder, and the first words of the command."""
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    words = ['evaluate', tmp_path / 'model', '--arch', made[1], '--data-dir', tmp_path / 'data']
    return tmp_path / 'data' / 'validation', words


# -- classes -----------------------------------------------------------------------------------------------------------


def test_all_classes(capsys, place):
    code, out, err = run(capsys, *place[1])
    assert (code, err) == (0, '') and out.startswith('60 images: top-1 100.00%')
    assert len(list(place[0].iterdir())) == 5


@pytest.mark.parametrize('kept', [3, 1])
def test_some_of_the_classes(capsys, place, kept):
    folder, words = place
    for name in NAMES[:-kept]:
        shutil.rmtree(folder / name)
    count = len(list(folder.rglob('*.png')))
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, '') and out.startswith(f'{count} images of {kept} of the 5 classes: top-1 100.00%')


@pytest.mark.parametrize('change', ['renamed', 'more'])
def test_an_unknown_folder_is_named(capsys, place, change):
    folder, words = place
    if change == 'renamed':
        (folder / 'cat').rename(folder / 'ant')
    else:
        shutil.copytree(folder / 'cat', folder / 'ant')
    err = refused(capsys, *words)
    assert "'ant'" in err and '--class-map FILE' in err


def test_a_class_map_gives_other_names(capsys, place, tmp_path):
    folder, words = place
    for name in NAMES:
        (folder / name).rename(folder / name[::-1])
    (tmp_path / 'map.txt').write_text('\n'.join(name[::-1] for name in NAMES) + '\n\n')
    assert run(capsys, *words, '--class-map', tmp_path / 'map.txt')[1].startswith('60 images: top-1 100.00%')
    # two names of one class, and a folder that is left out
    (folder / 'god').rename(folder / 'hound')
    shutil.rmtree(folder / 'tac')
    indices = {name[::-1]: index for index, name in enumerate(NAMES)} | dict(hound=1)
    (tmp_path / 'map.pkl').write_bytes(pickle.dumps(indices))
    assert 'of 4 of the 5 classes: top-1 100.00%' in run(capsys, *words, '--class-map', tmp_path / 'map.pkl')[1]
    del indices['hound']
    (tmp_path / 'map.pkl').write_bytes(pickle.dumps(indices))
    code, out, err = run(capsys, *words, '--class-map', tmp_path / 'map.pkl')
    assert 'of 3 of the 5 classes: top-1 100.00%' in out and "'hound'" in err and err.count('\n') == 1


@pytest.mark.parametrize('name, content', [
    ('none.txt', None), ('map.csv', b'cat'), ('map.pkl', b'x'), ('map.pkl', pickle.dumps(dict(cat=5))),
    ('map.pkl', pickle.dumps(dict(cat=-1))), ('map.pkl', pickle.dumps([1]))])
def test_unusable_class_maps(capsys, place, tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in refused(capsys, *place[1], '--class-map', tmp_path / name)


def test_models_without_names(capsys, place, tmp_path):
    folder, words = place
    config = json.loads((tmp_path / 'model' / 'config.json').read_text())
    del config['label_names']
    (tmp_path / 'model' / 'config.json').write_text(json.dumps(config))
    code, out, err = run(capsys, *words)
    assert out.startswith('60 images: top-1 100.00%') and 'without the names' in err and err.count('\n') == 1
    shutil.rmtree(folder / 'cat')
    assert '4 of the 5 classes' in refused(capsys, *words)
    (tmp_path / 'map.txt').write_text('\n'.join(NAMES))
    assert 'of 4 of the 5 classes: top-1 100.00%' in run(capsys, *words, '--class-map', tmp_path / 'map.txt')[1]


@pytest.mark.parametrize('names', [['cat'] * 6, {'x': 'cat'}, [1, 2], 'cats'])
def test_unusable_names_of_a_config(capsys, place, tmp_path, names):
    config = json.loads((tmp_path / 'model' / 'config.json').read_text())
    (tmp_path / 'model' / 'config.json').write_text(json.dumps(dict(config, label_names=names)))
    assert 'config.json' in refused(capsys, *place[1])


def test_other_kinds_of_data(capsys, place, tmp_path):
    import tarfile
    folder, words = place
    with tarfile.open(tmp_path / 'some.tar', 'w') as tar:
        for name in NAMES[2:]:
            tar.add(folder / name, name)
    for data in ((tmp_path / 'some.tar', '--split', ''), (tmp_path / 'data', '--dataset', 'torch/image_folder')):
        code, out, err = run(capsys, *words[:-1], *data)
        assert code == 0 and 'top-1 100.00%' in out and 'warning' not in err
        assert ('of 3 of the 5 classes' in out) == (len(data) == 3 and data[1] == '--split')


# -- modes -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('mode', MODES)
def test_the_mode_of_the_training_is_used(capsys, tmp_path, pictures, mode):
    arch = make_model(tmp_path, pictures, mode)
    words = '--data-dir', tmp_path / 'data'
    assert 'top-1 100.00%' in run(capsys, 'evaluate', tmp_path / 'model', '--arch', arch, *words)[1]
    # the subnet keeps it, here and in Python
    assert run(capsys, 'extract', tmp_path / 'model', '--arch', arch, '--output', tmp_path / 'sub')[0] == 0
    assert 'top-1 100.00%' in run(capsys, 'evaluate', tmp_path / 'sub', *words)[1]
    net = tsn.from_pretrained(tmp_path / 'model', arch=json.loads(arch))
    assert net.image_mode == mode and net.pretrained_cfg['label_names'] == NAMES
    config = json.loads((tmp_path / 'sub' / 'config.json').read_text())
    assert config['label_names'] == NAMES and 'label_names' not in config['pretrained_cfg']
    other = {1: 'L', 2: 'LA', 3: 'YCbCr' if mode != 'YCbCr' else 'RGB', 4: 'CMYK' if mode != 'CMYK' else 'RGBA'}
    code, out, _ = run(
        capsys, 'evaluate', tmp_path / 'sub', *words, '--input-img-mode', other[MODES[mode]])
    assert ('top-1 100.00%' in out) == (other[MODES[mode]] == mode)


def test_a_mode_of_other_channels_is_refused(capsys, place):
    assert 'CMYK have 4' in refused(capsys, *place[1], '--input-img-mode', 'CMYK')
    assert 'L (1)' in refused(capsys, *place[1], '--input-img-mode', 'P')


@pytest.mark.slow
def test_batch_norm_statistics_are_those_of_the_mode(capsys, tmp_path, pictures):
    net = timm.create_model('test_shiftmobilenet_supernet', num_classes=2, in_chans=4).eval()
    describe_images(net, ['a', 'b'], 'RGBA')
    tsn.save_pretrained(tmp_path / 'model', net, data_config=dict(mean=(.5,) * 4, std=(.5,) * 4))
    (tmp_path / 'data' / 'train' / 'any').mkdir(parents=True)
    for number, image in enumerate(pictures[:8]):
        image.save(tmp_path / 'data' / 'train' / 'any' / f'{number}.png')  # one class is enough
    arch = net.space.largest
    assert run(capsys, 'extract', tmp_path / 'model', '--arch', json.dumps(arch.to_dict()), '--output',
               tmp_path / 'sub', '--data-dir', tmp_path / 'data') [2] == ''
    expected = tsn.calibrate_bn(tsn.extract(net, arch), [tensors(pictures[:8], 'RGBA')], progress=False)
    found = tsn.from_pretrained(tmp_path / 'sub')
    torch.testing.assert_close(found.bn1.running_mean, expected.bn1.running_mean)
    torch.testing.assert_close(found.bn1.running_var, expected.bn1.running_var)


# -- data and devices --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_glyphs(capsys, tmp_path):
    net = timm.create_model('test_shiftformer_supernet', num_classes=52)
    tsn.save_pretrained(tmp_path, net)
    words = 'evaluate', tmp_path, '--arch', json.dumps(net.space.smallest.to_dict()), '--dataset', 'glyphs'
    code, out, err = run(capsys, *words, '--glyph-images', '52', '--glyph-pixels', '8', '--glyph-difficulty', '0')
    assert code == 0 and out.startswith(f'{52 * math.ceil(52 / 4 / 52)} images: ') and 'without the names' in err


def test_a_broken_image(capsys, place):
    folder, words = place
    next((folder / 'cat').iterdir()).write_bytes(b'x')
    assert '--skip-broken-images' in refused(capsys, *words)
    assert run(capsys, *words, '--skip-broken-images')[1].startswith('60 images: ')


@pytest.mark.parametrize('flags, message', [
    (['--device', 'nonsense'], '--device nonsense'),
    (['--device', 'cuda:99'], '--device cuda:99'),
    (['--batch-size', '0'], "'0' must be a whole number of 1"),
    (['--workers', '-1'], "'-1' must be a whole number of 0"),
    (['--dataset', 'sklearn/nope'], 'sklearn/digits'),
])
def test_wrong_flags(capsys, place, flags, message):
    assert message in refused(capsys, *place[1], *flags)


def test_images_have_to_be_given(capsys, place):
    err = refused(capsys, *place[1][:-2])
    assert '--data-dir' in err and '--dataset' in err
