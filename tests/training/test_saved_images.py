"""What is saved of the images of a training: names of the classes, and their mode; from train.py to a subnet."""
import json
import pickle
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support.small_runs import FAST, load, train

import timm_shiftnas as tsn
from timm_shiftnas.hub.load import SavedModel
from timm_shiftnas.models import describe_images
from timm_shiftnas_cli import main as cli

INDICES = dict(zebra=0, ant=2, bee=5)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run in mode HSV, whose class map has gaps; its flags, its folder and its data."""
    place, rng = tmp_path_factory.mktemp('run'), np.random.default_rng(0)
    for split in ('train', 'validation'):
        for name in INDICES:
            (place / 'data' / split / name).mkdir(parents=True)
            for i in range(8):
                pixels = rng.integers(256, size=(4, 4, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((32, 32)).save(place / 'data' / split / name / f'{i}.png')
    (place / 'map.pkl').write_bytes(pickle.dumps(INDICES))
    flags = [*FAST, '--dataset', '', '--data-dir', str(place / 'data'), '--class-map', str(place / 'map.pkl'),
             '--input-img-mode', 'HSV', '-b', '8', '--shift', 'none', '--epochs', '1', '--output', str(place)]
    assert train.main([*flags, '--experiment', 'run']) == 0
    return flags, place / 'run', place / 'data'


def facts(directory):
    config = json.loads((directory / 'config.json').read_text())
    assert 'label_names' not in config['pretrained_cfg']  # beside it, where the Hub reads them
    return config['num_classes'], config['label_names'], config['timm_shiftnas']['image_mode']


@pytest.mark.slow
def test_every_way_to_a_model_keeps_classes_and_mode(run, tmp_path):
    _, output, data = run
    assert cli(['convert', str(output / 'last.pth.tar'), str(tmp_path / 'converted')]) == 0
    assert cli(['extract', str(output / 'model'), '--flops', '2M', '--output', str(tmp_path / 'subnet')]) == 0
    for directory in (output / 'model', tmp_path / 'converted', tmp_path / 'subnet'):
        assert facts(directory) == (6, {'0': 'zebra', '2': 'ant', '5': 'bee'}, 'HSV')
        net = timm.create_model(f'local-dir:{directory}', pretrained=True)  # plain timm reads the names
        assert net.pretrained_cfg['label_names'] == {'0': 'zebra', '2': 'ant', '5': 'bee'} and net.num_classes == 6


@pytest.mark.slow
def test_evaluate_gives_the_accuracy_of_the_run(run, capsys):
    _, output, data = run
    for row in SavedModel(output / 'model').record.results:
        arch = json.dumps(row['arch'])
        assert cli(['evaluate', str(output / 'model'), '--arch', arch, '--data-dir', str(data)]) == 0
        assert capsys.readouterr() == (f'24 images: top-1 {row["top1"]:.2f}%, top-5 {row["top5"]:.2f}%\n', '')


@pytest.mark.slow
def test_a_run_does_not_resume_on_other_classes(run, tmp_path, capsys):
    flags, output, data = run
    shutil.copytree(data, tmp_path / 'data')
    for split in ('train', 'validation'):
        (tmp_path / 'data' / split / 'bee').rename(tmp_path / 'data' / split / 'wasp')
    (tmp_path / 'map.txt').write_text('zebra\n-\nant\n--\n---\nwasp\n')
    other = ['--data-dir', str(tmp_path / 'data'), '--class-map', str(tmp_path / 'map.txt'), '--epochs', '2']
    assert train.launch([*flags, *other, '--resume', str(output / 'last.pth.tar')]) == 2
    assert "'bee'" in capsys.readouterr().err


@pytest.mark.slow
def test_checkpoints_without_names_get_those_of_a_class_map(run, tmp_path):
    checkpoint = load(run[1] / 'last.pth.tar')
    del checkpoint['task_state']['network']['label_names']
    torch.save(checkpoint, tmp_path / 'old.pth.tar')
    (tmp_path / 'map.txt').write_text('\n'.join('abcdef'))
    old = str(tmp_path / 'old.pth.tar')
    assert cli(['convert', old, str(tmp_path / 'without')]) == 0
    assert 'label_names' not in json.loads((tmp_path / 'without' / 'config.json').read_text())
    assert cli(['convert', old, str(tmp_path / 'with'), '--class-map', str(tmp_path / 'map.txt')]) == 0
    assert facts(tmp_path / 'with') == (6, list('abcdef'), 'HSV')


def test_names_of_other_classes_are_not_saved(tmp_path):
    """More names than config.json may have numbers of a kind, and a new head."""
    net = timm.create_model('test_shiftformer_supernet', num_classes=1001)
    describe_images(net, {index: f'class {index}' for index in range(1001)})
    tsn.save_pretrained(tmp_path, net)
    assert tsn.load_supernet(tmp_path)[0].pretrained_cfg['label_names'][1000] == 'class 1000'
    arch = net.space.smallest
    assert tsn.from_pretrained(tmp_path, arch=arch).pretrained_cfg['label_names'][1000] == 'class 1000'
    other = tsn.from_pretrained(tmp_path, arch=arch, num_classes=3)
    assert not other.pretrained_cfg.get('label_names')
    tsn.save_pretrained(tmp_path, other)
    assert 'label_names' not in json.loads((tmp_path / 'config.json').read_text())
