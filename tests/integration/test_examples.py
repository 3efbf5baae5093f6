"""The examples run as their docstrings say, and stay short."""
from pathlib import Path

import pytest
from support.processes import call, run_file

EXAMPLES = Path(__file__).parents[2] / 'examples'


def run(name, *flags, folder):
    code, out, err = call(run_file, EXAMPLES / name, *flags, folder=folder)
    assert code == 0, err
    return out.splitlines()


def test_examples_are_short():
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob('*.py')}
    tasks = {name: lengths.pop(name) for name in ('dense_prediction.py', 'segmentation.py', 'detection.py')}
    assert set(lengths) == {'quickstart.py', 'quickstart_elastic.py', 'own_space.py', 'own_loop.py'}
    assert max(lengths.values()) <= 40 and max(tasks.values()) <= 160


@pytest.mark.process
@pytest.mark.slow
def test_quickstart(tmp_path):
    lines = run('quickstart.py', '--output', tmp_path, '--epochs', '1', '--num-groups', '2', '--generator-fit-steps',
                '20', '--shift', 'none', '--held-out', '0.5', folder=tmp_path)
    assert [line.split(' MACs: top-1')[0] for line in lines[-3:]] == ['2M', '4M', '8M']


@pytest.mark.exhaustive  # .ci/run has it
@pytest.mark.process
@pytest.mark.slow
def test_quickstart_elastic(tmp_path):
    """The rows before training are those of the base's own subnets: the largest is the base."""
    lines = run('quickstart_elastic.py', '--output', tmp_path, '--epochs', '1', '--val-interval', '1', '--glyph-images',
                '520', '--num-groups', '2', '--generator-fit-steps', '20', folder=tmp_path)
    assert lines[-4].startswith('the base: ') and lines[-3].split() == ['MACs', 'before', 'adapted', 'alone']
    rows = [[float(value.replace(',', '')) for value in line.split()] for line in lines[-2:]]
    assert rows[1][1] == float(lines[-4].removeprefix('the base: ')) and rows[0][0] < rows[1][0] == 4599808
    assert (tmp_path / 'quickstart_elastic' / 'accuracy.png').exists()


@pytest.mark.process
def test_own_space(tmp_path):
    lines = run('own_space.py', '--fit-steps', '20', folder=tmp_path)
    assert lines[0].startswith('27,864 networks') and all('Arch(embed_dim=' in line for line in lines[1:])
    assert len(lines) == 4


@pytest.mark.slow
@pytest.mark.process
def test_own_loop(tmp_path):
    lines = run('own_loop.py', '--updates', '11', folder=tmp_path)
    assert lines[0].startswith('update 0: loss ') and lines[-1].startswith('a network of ')


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize('name, picture', [
    ('segmentation', 'masks.png'), pytest.param('detection', 'boxes.png', marks=pytest.mark.exhaustive)])
def test_tasks(name, picture, tmp_path):
    """The loaded network has the accuracy of the extracted one of its budget."""
    lines = run(f'{name}.py', '--images', '32', '--epochs', '1', '--size', '32', '--fit-steps', '10', '--output',
                tmp_path, folder=tmp_path)
    rows = [line.split() for line in lines[-4:-1]]
    assert [row[0] for row in rows] == ['small', 'medium', 'large']
    assert lines[-1] == f'loaded: {rows[1][-1]}'
    assert {path.name for path in tmp_path.glob('*.png')} == {picture, 'accuracy.png'}
