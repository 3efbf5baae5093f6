"""Folders and tars as people have them: formats, ranges, orientation, nested folders, splits, litter."""
import io
import json
import logging
import os
import tarfile

import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image
from support.compare import assert_identical
from timm.data.readers.img_extensions import get_img_extensions

from timm_shiftnas import extract
from timm_shiftnas.cli.images import Expected, batches, open_images
from timm_shiftnas.data import BrokenImageError, class_names, create_dataset
from timm_shiftnas.hub.load import SavedModel
from timm_shiftnas.hub.save import save_pretrained
from timm_shiftnas.models import describe_images
from timm_shiftnas.training.data import create_calibration_loader, create_loaders, open_data
from timm_shiftnas.training.flags import parse_args
from timm_shiftnas_cli import build_parser, main

Transpose = Image.Transpose
STORED = {  # orientation, and how upright pixels are turned before they are stored with it
    1: None, 2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_90, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_270}


@pytest.fixture
def grey():
    """Grey levels of an 8-bit image, with black and white among them."""
    levels = np.random.default_rng(0).integers(0, 256, (12, 16)).astype(np.uint8)
    levels[0, :2] = 0, 255
    return levels


def write(path, image=None, **options):
    """Save an image; make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new('RGB', (16, 12), (len(path.name), 90, 30)) if image is None else image
    image.save(path, **options)
    return path


def make(root, *names):
    """Images of these names in a folder."""
    for name in names:
        write(root / name)
    return root


def pack(tar, folder):
    """A tar of what is in a folder."""
    with tarfile.open(tar, 'w') as archive:
        archive.add(folder, '.')
    return tar


def levels(dataset, index=0):
    return np.asarray(dataset[index][0])


def names(dataset):
    """Class and file name of every image."""
    labels = class_names(dataset)
    return [(labels[target], os.path.basename(path)) for path, target in dataset.reader.samples]


# -- ranges of grey levels ---------------------------------------------------------------------------------------------


DEEP = {  # how grey levels 0..255 are stored, and in which file
    '16 bits': (lambda x: (x * 257).astype(np.uint16), 'png'),
    '12 bits': (lambda x: np.round(x * (4095 / 255)).astype(np.uint16), 'png'),
    '10 bits': (lambda x: np.round(x * (1023 / 255)).astype(np.uint16), 'png'),
    '8 bits in 16': (lambda x: x.astype(np.uint16), 'png'),
    '16 bits, TIFF': (lambda x: (x * 257).astype(np.uint16), 'tif'),
    '16 bits, big-endian': (lambda x: (x * 257).astype('>u2'), 'tif'),
    'mode I': (lambda x: (x * 257).astype(np.int32), 'tif'),
    'mode I, PGM': (lambda x: (x * 257).astype(np.int32), 'pgm'),
    'mode F, 0 to 1': (lambda x: (x / 255).astype(np.float32), 'tif'),
    'mode F, 0 to 255': (lambda x: x.astype(np.float32), 'tif'),
    'mode F, PFM': (lambda x: (x / 255).astype(np.float32), 'pfm'),
}


@pytest.mark.parametrize('mode', ['L', 'RGB'])
@pytest.mark.parametrize('kind', DEEP)
def test_more_than_8_bits_become_the_8_bits_of_the_same_image(tmp_path, grey, kind, mode):
    """timm reads 16 bits as white wherever they are above 255."""
    store, extension = DEEP[kind]
    for label in 'ab':
        write(tmp_path / label / f'x.{extension}', Image.fromarray(store(grey.astype(float))))
    dataset = create_dataset('', tmp_path, '', input_img_mode=mode)
    assert dataset[0][0].mode == mode
    assert np.array_equal(levels(dataset), np.asarray(Image.fromarray(grey).convert(mode)))


def test_all_images_of_a_dataset_have_the_same_range(tmp_path):
    """A dark image of 16 bits stays dark; one that exceeds the range is not clipped."""
    for number in range(64):
        level = 300 if number == 9 else 65535 if number == 40 else 4095
        write(tmp_path / 'ab'[number % 2] / f'{number}.png', Image.fromarray(np.full((8, 8), level, np.uint16)))
    dataset = create_dataset('', tmp_path, '', input_img_mode='L')
    dataset.decoder.ranges = {False: (0, 4095)}
    read = {name: levels(dataset, index)[0, 0] for index, (_, name) in enumerate(names(dataset))}
    assert (read['9.png'], read['40.png'], read['1.png']) == (19, 255, 255)
    assert create_dataset('', tmp_path, '').decoder.ranges in ({False: (0, 4095)}, {False: (0, 65535)})


def test_validation_images_have_the_range_of_training_images(tmp_path):
    for split, white in (('train', 60_000), ('validation', 4000)):
        for label in 'ab':
            write(tmp_path / split / label / 'x.png', Image.fromarray(np.full((8, 8), white, np.uint16)))
    data = open_data(parse_args(['--shift', 'none', '--data-dir', str(tmp_path), '-b', '1']))
    assert levels(data.train)[0, 0, 0] == 233 and levels(data.validation)[0, 0, 0] == 16


def test_negative_and_missing_levels(tmp_path):
    signed = np.array([[-1024, 0], [1024, 3071]], np.int32)
    broken = np.array([[np.nan, np.inf], [0.5, 1]], np.float32)
    for label in 'ab':
        write(tmp_path / 'signed' / label / 'x.tif', Image.fromarray(signed))
        write(tmp_path / 'nan' / label / 'x.tif', Image.fromarray(broken))
    read = levels(create_dataset('', tmp_path / 'signed', '', input_img_mode='L'))
    assert np.array_equal(read, [[96, 128], [159, 223]])  # -4095 is black, 4095 is white
    read = levels(create_dataset('', tmp_path / 'nan', '', input_img_mode='L'))
    assert np.array_equal(read, [[0, 0], [128, 255]])


# -- formats -----------------------------------------------------------------------------------------------------------


LOSSLESS = dict(webp=dict(lossless=True), jp2={}, tif={}, tiff={}, bmp={}, gif={}, ppm={}, tga={}, pcx={}, png={})


@pytest.mark.parametrize('extension', [*LOSSLESS, 'BMP', 'jfif', 'avif'])
def test_every_format_of_pillow_is_read(tmp_path, grey, extension):
    for label in 'ab':
        write(tmp_path / label / f'x.{extension}', Image.fromarray(grey), **LOSSLESS.get(extension, {}))
    dataset = create_dataset('', tmp_path, '', input_img_mode='L')
    assert names(dataset) == [('a', f'x.{extension}'), ('b', f'x.{extension}')]
    difference = np.abs(levels(dataset).astype(int) - grey)
    assert difference.max() == 0 or extension in ('jfif', 'avif') and difference.mean() < 10
    assert get_img_extensions() == ('.png', '.jpg', '.jpeg')  # timm's own readers are as before


def test_files_that_are_passed_over_are_named(tmp_path, caplog):
    make(tmp_path, 'a/0.png', 'b/0.png', 'loose.png')
    for name in ('a/1.heic', 'a/2.heic', 'a/labels', 'c/0.h5'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b'?')
    (tmp_path / 'empty').mkdir()
    assert names(create_dataset('', tmp_path, '')) == [('a', '0.png'), ('b', '0.png')]
    message, = caplog.messages
    for part in (
            "2 x .heic file (such as 'a/1.heic')", "1 x file without extension (such as 'a/labels')", "'loose.png'",
            "1 x .h5 file (such as 'c/0.h5')", '2 x folder without images'):
        assert part in message
    caplog.clear()
    create_dataset('', make(tmp_path / 'clean', 'a/0.png', 'b/0.png'), '')
    assert not caplog.messages


def test_files_that_only_other_programs_can_draw_are_not_opened(tmp_path):
    """Pillow would start Ghostscript for PostScript, whatever the extension."""
    make(tmp_path, 'a/0.png', 'b/0.png')
    (tmp_path / 'a' / '1.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n')
    with pytest.raises(BrokenImageError, match='1.png.*not a known image format'):
        create_dataset('', tmp_path, '')[1]


# -- classes -----------------------------------------------------------------------------------------------------------


def test_the_class_of_an_image_is_the_top_folder(tmp_path, caplog):
    """timm trains the classes 'day' and 'night'."""
    make(tmp_path, *(f'{label}/{part}/{part}.png' for label in ('cat', 'dog') for part in ('day', 'night')))
    expected = [('cat', 'day.png'), ('cat', 'night.png'), ('dog', 'day.png'), ('dog', 'night.png')]
    assert names(create_dataset('', tmp_path, '')) == expected
    message, = caplog.messages
    assert "'cat/day/day.png', whose class is 'cat'" in message
    assert names(create_dataset('', pack(tmp_path / 'x.tar', tmp_path), '')) == expected


def test_a_class_map_names_the_folders_that_are_classes(tmp_path, caplog):
    make(tmp_path, 'animals/cat/0.png', 'animals/dog/0.png', 'cars/bus/0.png', 'cars/new/tram/0.png')
    file = tmp_path / 'classes.txt'
    file.write_text('tram\ndog\ncat\n')
    dataset = create_dataset('', tmp_path, '', class_map=str(file))
    assert [(os.path.basename(os.path.dirname(path)), target) for path, target in dataset.reader.samples] == [
        ('cat', 2), ('dog', 1), ('tram', 0)]
    assert "1 x image of a class that the class map lacks (such as 'cars/bus/0.png')" in caplog.text
    assert len(create_dataset('', tmp_path, '', class_map={'animals': 0, 'cars': 1})) == 4


def test_classes_have_the_order_of_timm(tmp_path):
    make(tmp_path, *(f'{label}/{image}.png' for label in ('10', '9', 'b', 'B', 'a') for image in ('10', '9')))
    ours = create_dataset('', tmp_path, '').reader
    theirs = timm.data.create_dataset('', str(tmp_path), '').reader
    assert list(ours.class_to_idx) == ['9', '10', 'a', 'B', 'b']  # timm leaves the order of b and B to chance
    assert [path for path, _ in ours.samples if '/b/' not in path.lower()] == [
        path for path, _ in theirs.samples if '/b/' not in path.lower()]
    folder = create_dataset('torch/image_folder', tmp_path, '').reader
    assert list(folder.class_to_idx) == ['10', '9', 'B', 'a', 'b']  # that of torchvision


def test_links_that_lead_back_are_not_followed(tmp_path):
    make(tmp_path, 'a/0.png', 'b/0.png')
    (tmp_path / 'a' / 'loop').symlink_to(tmp_path)
    (tmp_path / 'c').symlink_to(make(tmp_path.parent / 'elsewhere', '0.png'))
    assert names(create_dataset('', tmp_path, '')) == [('a', '0.png'), ('b', '0.png'), ('c', '0.png')]


def test_images_that_need_no_class_may_lie_anywhere(tmp_path, caplog):
    """Those for BatchNorm statistics, for example."""
    make(tmp_path, '2.png', 'a/1.png', 'a/deep/0.png', '.ipynb_checkpoints/0.png')
    (tmp_path / 'empty').mkdir()
    for root in (tmp_path, pack(tmp_path.parent / 'x.tar', tmp_path)):
        dataset = create_dataset('', root, '', min_classes=0)
        assert sorted(name for _, name in names(dataset)) == ['0.png', '1.png', '2.png'] and not caplog.messages
    refused(make(tmp_path / 'b', '0.png'), '', '0 images')


def test_names_of_classes(tmp_path):
    assert class_names(create_dataset('sklearn/digits', None, 'train'))[7] == '7'
    assert class_names(create_dataset('', make(tmp_path, 'cat/0.png', 'dog/0.png'), '')) == {0: 'cat', 1: 'dog'}
    assert class_names(torch.utils.data.TensorDataset()) == {}


# -- splits ------------------------------------------------------------------------------------------------------------


FILES = [f'{split}/{label}/{split}.png' for split in ('train', 'val') for label in 'ab']


def refused(root, split, *parts):
    """Assert that a split is refused in one line that holds these parts."""
    with pytest.raises(ValueError) as caught:
        create_dataset('', root, split)
    assert all(part in str(caught.value) for part in parts) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize('wrapper', ['.', 'wrapper/deep'])
def test_splits_in_a_tar(tmp_path, wrapper):
    """timm takes all of a tar for any split."""
    make(tmp_path / 'data' / wrapper, *FILES)
    tar = pack(tmp_path / 'data.tar', tmp_path / 'data')
    assert names(create_dataset('', tar, 'train')) == [('a', 'train.png'), ('b', 'train.png')]
    assert names(create_dataset('', tar, 'validation')) == [('a', 'val.png'), ('b', 'val.png')]
    refused(tar, 'nonsense', "'nonsense'", 'train, val', "''")
    refused(tar, 'test', "'test'")
    refused(tar, '', 'train, val')


def test_two_tars(tmp_path):
    for split in ('train', 'val'):
        pack(tmp_path / f'{split}.tar', make(tmp_path / f'{split}-files', f'a/{split}.png', f'b/{split}.png'))
    folder = tmp_path / 'tars'
    folder.mkdir()
    for split in ('train', 'val'):
        os.rename(tmp_path / f'{split}.tar', folder / f'{split}.tar')
    assert names(create_dataset('', folder, 'training')) == [('a', 'train.png'), ('b', 'train.png')]
    assert names(create_dataset('', folder, 'validation')) == [('a', 'val.png'), ('b', 'val.png')]
    assert names(create_dataset('', folder, 'val.tar')) == names(create_dataset('', folder, 'val'))
    assert len(create_dataset('', folder / 'val.tar', 'validation')) == 2  # its name says which split it is
    refused(folder / 'val.tar', 'train', "'train'", 'a, b', 'train.tar')
    refused(folder, 'nonsense', "'nonsense'", 'train.tar, val.tar')
    data = open_data(parse_args(['--shift', 'none', '--data-dir', str(folder), '-b', '1']))
    assert (len(data.train), len(data.validation)) == (2, 2)


def test_tars_in_a_tar_are_folders(tmp_path):
    """As ImageNet comes. Offsets in an inner tar count from its beginning."""
    source = make(tmp_path / 'source', 'n1/0.png', 'n1/1.png', 'n2/0.png')
    write(source / 'n2' / '0.png', Image.new('RGB', (3, 4), (1, 2, 3)))
    inner = tmp_path / 'inner'
    inner.mkdir()
    for label in ('n1', 'n2'):
        pack(inner / f'{label}.tar', source / label)
    dataset = create_dataset('', pack(tmp_path / 'ILSVRC2012_img_train.tar', inner), '')
    assert names(dataset) == [('n1', '0.png'), ('n1', '1.png'), ('n2', '0.png')]
    assert dataset[2][0].size == (3, 4) and dataset[2][0].getpixel((0, 0)) == (1, 2, 3)


def test_odd_members_of_a_tar(tmp_path, caplog):
    make(tmp_path / 'x', 'a/0.png', 'b/0.png', 'b/._0.png', '__MACOSX/b/0.png', '.hidden/0.png', '.hidden/1.png')
    (tmp_path / 'x' / 'a' / 'link.png').symlink_to('0.png')
    os.link(tmp_path / 'x' / 'a' / '0.png', tmp_path / 'x' / 'a' / '1.png')
    dataset = create_dataset('', pack(tmp_path / 'x.tar', tmp_path / 'x'), '')
    assert len(dataset) == 2 and class_names(dataset) == {0: 'a', 1: 'b'}
    message, = caplog.messages
    assert "2 x link (such as 'a/" in message and "1 x hidden file or folder (such as '.hidden')" in message
    with open(tmp_path / 'x.tar', 'r+b') as file:  # a copy that was interrupted
        file.truncate(os.path.getsize(tmp_path / 'x.tar') // 2)
    refused(tmp_path / 'x.tar', '', 'x.tar', 'unexpected end of data')


def test_splits_of_folders(tmp_path):
    make(tmp_path, *FILES)
    refused(tmp_path, '', 'train, val')  # timm trains on all splits together
    refused(tmp_path, 'train[:10%]', 'train[:10%]')  # timm reads all of it
    make(tmp_path / 'vehicles', 'bus/0.png', 'train/0.png')
    assert len(create_dataset('', tmp_path / 'vehicles', '')) == 2  # a class called train
    for name in ('x.tar.gz', 'x.zip'):
        (tmp_path / name).write_bytes(b'?')
        refused(tmp_path / name, 'train', name, 'unpack')


def test_training_on_the_validation_images_is_said(tmp_path, caplog):
    flags = ['--data-dir', str(make(tmp_path, *FILES)), '-b', '1', '--held-out', '0.5', '--val-split']
    open_data(parse_args(['--shift', 'none', *flags, 'val']))
    assert not caplog.messages
    open_data(parse_args(['--shift', 'none', *flags, 'train']))
    assert 'the same images' in caplog.text


# -- orientation -------------------------------------------------------------------------------------------------------


def with_orientation(image, orientation):
    """Pixels as a camera stores them, and the options that save their orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    method = STORED[orientation]
    return (image if method is None else image.transpose(method)), dict(exif=exif)


@pytest.mark.parametrize('extension', ['png', 'jpg', 'webp', 'tif'])
@pytest.mark.parametrize('orientation', STORED)
def test_photographs_are_turned_upright(tmp_path, orientation, extension):
    blocks = np.kron(np.arange(6).reshape(2, 3) * 40, np.ones((8, 8))).astype(np.uint8)
    image, options = with_orientation(Image.fromarray(blocks).convert('RGB'), orientation)
    for label in 'ab':
        write(tmp_path / label / f'x.{extension}', image, **options)
    read = levels(create_dataset('', tmp_path, '', input_img_mode='L')).astype(int)
    assert read.shape == blocks.shape and np.abs(read - blocks).max() < 12
    as_stored = create_dataset('', tmp_path, '', upright=False)
    assert np.array_equal(levels(as_stored), np.asarray(Image.open(tmp_path / 'a' / f'x.{extension}').convert('RGB')))


def test_16_bits_are_turned_upright(tmp_path, grey):
    image, options = with_orientation(Image.fromarray(grey.astype(np.uint16) * 257), 6)
    for label in 'ab':
        write(tmp_path / label / 'x.png', image, **options)
    assert np.array_equal(levels(create_dataset('', tmp_path, '', input_img_mode='L')), grey)


@pytest.mark.filterwarnings('ignore:Corrupt EXIF data')
@pytest.mark.parametrize('exif', [b'II*\0\xff\xff\xff\xff', b'no TIFF', b'MM\0*\0\0\0\x08\0\x01\x01\x12'])
def test_images_with_damaged_exif_data_are_read(tmp_path, exif):
    for label in 'ab':
        write(tmp_path / label / 'x.jpg', exif=b'Exif\0\0' + exif)
    assert create_dataset('', tmp_path, '')[0][0].size == (16, 12)


# -- litter ------------------------------------------------------------------------------------------------------------


def test_litter_is_skipped_at_every_level(tmp_path, caplog):
    clean = [f'{split}/{label}/0.png' for split in ('train', 'validation') for label in 'ab']
    make(tmp_path, *clean, 'train/.ipynb_checkpoints/0.png', 'train/a/.ipynb_checkpoints/0.png', 'train/a/._0.png',
         'train/__MACOSX/a/0.png', 'train/@eaDir/0.png', '.ipynb_checkpoints/a/0.png', '__MACOSX/train/a/0.png')
    for name in ('.DS_Store', 'train/.DS_Store', 'train/a/.DS_Store', 'train/b/Thumbs.db', 'train/b/desktop.ini'):
        (tmp_path / name).write_bytes(b'?')
    data = open_data(parse_args(['--shift', 'none', '--data-dir', str(tmp_path), '-b', '1']))
    assert data.num_classes == 2 and (len(data.train), len(data.validation)) == (2, 2)
    assert not caplog.messages
    refused(tmp_path, 'nonsense', 'but: train, validation;')
    tar = pack(tmp_path.parent / 'litter.tar', tmp_path)
    assert names(create_dataset('', tar, 'train')) == names(create_dataset('', tmp_path, 'train'))


def test_other_hidden_files_are_skipped_and_named(tmp_path, caplog):
    make(tmp_path, 'a/0.png', 'b/0.png', '.net/0.png', 'b/.1.png')
    assert names(create_dataset('', tmp_path, '')) == [('a', '0.png'), ('b', '0.png')]
    assert "2 x hidden file or folder (such as '.net')" in caplog.text


# -- all places that read images ---------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def plain_and_odd(tmp_path_factory):
    """The same images twice: as timm reads them, and as a camera and a person store them."""
    root, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for split in ('train', 'validation'):
        for number in range(24):
            label, image = 'ab'[number % 2], rng.integers(0, 256, (24, 24)).astype(np.uint8)
            image[0, :2] = 0, 255
            write(root / 'plain' / split / label / f'{number}.png', Image.fromarray(image))
            stored, options = with_orientation(Image.fromarray(image.astype(np.uint16) * 257), 1 + number % 8)
            write(root / 'odd' / split / label / 'session' / f'{number}.png', stored, **options)
            write(root / 'odd' / split / label / '.ipynb_checkpoints' / f'{number}.png', stored)
    pack(root / 'odd.tar', root / 'odd')
    return root


@pytest.mark.parametrize('odd', ['odd', 'odd.tar'])
def test_training_validation_shift_and_calibration_read_images_alike(plain_and_odd, odd):
    def batches(name):
        args = parse_args([
            '--data-dir', str(plain_and_odd / name), '-b', '8', '-j', '0', '--shift', 'hypergradient', '--held-out',
            '.3', '--shift-batch-size', '4', '--num-classes', '2'])
        data = open_data(args)
        config = timm.data.resolve_data_config({}, model=timm.create_model('test_shiftformer_supernet'))
        device = torch.device('cpu')
        loaders = create_loaders(args, data, config, device)
        calibration = create_calibration_loader(args, data, config, device)
        return [*loaders.train.epoch(0), *loaders.validation, *loaders.shift(0), *calibration]

    assert_identical(batches('plain'), batches(odd))


@pytest.mark.slow
@pytest.mark.parametrize('odd', ['odd', 'odd.tar'])
def test_evaluate_and_extract_read_images_as_training_does(plain_and_odd, tmp_path, capsys, odd):
    torch.manual_seed(0)
    save_pretrained(tmp_path / 'model', timm.create_model('test_shiftmobilenet_supernet', num_classes=2).eval())
    arch = timm.create_model('test_shiftmobilenet_supernet').space.smallest.to_dict()
    budget, printed, weights, read = ['--arch', json.dumps(arch)], [], [], []
    expected = Expected.by(SavedModel(tmp_path / 'model'))
    for name in ('plain', odd):
        images = ['--data-dir', str(plain_and_odd / name)]
        assert main(['evaluate', str(tmp_path / 'model'), *budget, *images]) == 0
        printed.append(capsys.readouterr().out.splitlines()[-1])
        assert main(['extract', str(tmp_path / 'model'), *budget, *images, '--output', str(tmp_path / name)]) == 0
        weights.append((tmp_path / name / 'model.safetensors').read_bytes())
        args = build_parser().parse_args(['evaluate', str(tmp_path / 'model'), *images])
        read.append([*batches(expected, open_images(expected, args, 'validation'), args)])
    assert_identical(*read)
    assert printed[0] == printed[1] and weights[0] == weights[1]


def test_photographs_are_left_as_stored_if_asked_for(tmp_path):
    """By every command."""
    image, options = with_orientation(Image.new('RGB', (16, 12)), 6)
    for split in ('train', 'validation'):
        for label in 'ab':
            write(tmp_path / split / label / 'x.jpg', image, **options)
    save_pretrained(tmp_path / 'model', timm.create_model('test_shiftformer_supernet', num_classes=2))
    saved = SavedModel(tmp_path / 'model')
    for flag, size in (([], (16, 12)), (['--ignore-exif-orientation'], (12, 16))):
        data = open_data(parse_args(['--data-dir', str(tmp_path), '-b', '1', '--held-out', '.5', *flag]))
        sizes = {part[0][0].size for part in (data.train, data.held_out, data.validation, data.calibration)}
        args = build_parser().parse_args(['evaluate', str(tmp_path / 'model'), '--data-dir', str(tmp_path), *flag])
        sizes.add(open_images(Expected.by(saved), args, 'validation')[0][0].size)
        assert sizes == {size}


@pytest.mark.slow
def test_a_saved_model_remembers_the_orientation_of_its_images(tmp_path):
    image, options = with_orientation(Image.new('RGB', (16, 12)), 6)
    for label in 'ab':
        write(tmp_path / 'validation' / label / 'x.jpg', image, **options)
    for upright, size in ((True, (16, 12)), (False, (12, 16))):
        net = timm.create_model('test_shiftformer_supernet', num_classes=2)
        describe_images(net, ['a', 'b'], 'RGB', upright)
        save_pretrained(tmp_path / 'supernet', net)
        save_pretrained(tmp_path / 'subnet', extract(SavedModel(tmp_path / 'supernet').network(), net.space.smallest))
        for model in (tmp_path / 'supernet', tmp_path / 'subnet'):
            args = build_parser().parse_args(['evaluate', str(model), '--data-dir', str(tmp_path)])
            assert open_images(Expected.by(SavedModel(model)), args, 'validation')[0][0].size == size


def test_streams_have_the_decoder(tmp_path, grey):
    """A shard of webdataset with a photograph of 16 bits."""
    image, options = with_orientation(Image.fromarray(grey.astype(np.uint16) * 257), 8)
    png = io.BytesIO()
    image.save(png, 'png', **options)
    with tarfile.open(tmp_path / 'train-0.tar', 'w') as tar:
        for suffix, content in (('png', png.getvalue()), ('cls', b'1')):
            member = tarfile.TarInfo(f'0.{suffix}')
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    stream = create_dataset('wds/x', str(tmp_path), 'train-0.tar', num_samples=1, input_img_mode='L', batch_size=1)
    (read, target), = stream
    assert target == 1 and np.array_equal(np.asarray(read), grey)


def test_the_range_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for label in 'ab':
        write(tmp_path / label / 'x.png', Image.fromarray(np.full((2, 2), 4000, np.uint16)))
    create_dataset('', tmp_path, '')
    assert 'grey levels 0 to 4095' in caplog.text
