"""The command line, in this process and, where it matters, in its own."""
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import torch
from support import stock_script
from support.processes import Job, call, run_module

from timm_shiftnas import ElasticBackbone, cli, extract
from timm_shiftnas.hub.load import SavedModel, from_pretrained, load_supernet
from timm_shiftnas.hub.save import save_pretrained
from timm_shiftnas.method import ArchitectureGenerator
from timm_shiftnas.utils import format_count
from timm_shiftnas_cli import main

ARCH = dict(depth=4, embed_dim=48, num_heads=[1, 2, 3, 1], mlp_ratio=[1.0, 2.0, 3.0, 1.0])


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    return timm.create_model('test_shiftformer_supernet', num_classes=10).eval()


@pytest.fixture(scope='module')
def generator(net):
    return ArchitectureGenerator(net.space).fit(steps=20, progress=False)


@pytest.fixture(scope='module')
def saved(tmp_path_factory, net, generator):
    folder = tmp_path_factory.mktemp('saved') / 'supernet'
    arch = net.space.smallest
    results = [dict(name='smallest', budget=None, macs=net.macs(arch), params=net.params(arch), top1=91.5, top5=99.25,
                    arch=arch.to_dict())]
    save_pretrained(
        folder, net, generator, groups=[1e6, 2e6, 3.5e6], probabilities=[.25, .75], results=results)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / 'model')


def run(capsys, *argv):
    """Run a command; return exit code, stdout and stderr."""
    code = main([str(arg) for arg in argv])
    return code, *capsys.readouterr()


def refused(capsys, message, *argv):
    """Assert that a command ends with exit code 2 and one line on stderr."""
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, '')
    assert err.startswith('timm-shiftnas: error: ') and err.count('\n') == 1 and err.endswith('\n')
    assert message in err


# -- info --------------------------------------------------------------------------------------------------------------


def test_info_of_a_supernet(capsys, saved, net):
    code, out, err = run(capsys, 'info', saved)
    assert (code, err) == (0, '')
    low, high = net.space.smallest, net.space.largest
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == [f'{saved}:', 'supernet', 'test_shiftformer_supernet']
    for expected in (
            'input 3 x 32 x 32, 10 classes',
            f'MACs {format_count(net.macs(low))} to {format_count(net.macs(high))}',
            f'params {format_count(net.params(low))} to {format_count(net.params(high))}',
            f'space {net.space.size:,} archs', 'embed_dim 32 48 64', 'mlp_ratio 1 2 3',
            'groups 2, of MACs', '1M to 2M: P = 0.2500', '2M to 3.5M: P = 0.7500',
            f'smallest - {format_count(net.macs(low))} {format_count(net.params(low))} 91.50 99.25'):
        assert expected.split() in lines
    assert 'model.safetensors' in out and 'generator.safetensors' in out


def test_info_as_json(capsys, saved, net):
    code, out, _ = run(capsys, 'info', saved, '--json')
    data = json.loads(out)
    low, high = net.space.smallest, net.space.largest
    assert code == 0 and data['kind'] == 'supernet' and data['architecture'] == 'test_shiftformer_supernet'
    assert data['input_size'] == [3, 32, 32] and data['num_classes'] == 10
    assert data['space'] == net.space.unbind().to_dict() and data['size'] == net.space.size
    assert data['macs'] == [net.macs(low), net.macs(high)] and data['params'] == [net.params(low), net.params(high)]
    assert data['groups'] == [1e6, 2e6, 3.5e6] and data['probabilities'] == [.25, .75]
    assert data['results'][0]['arch'] == low.to_dict()
    assert data['files']['model.safetensors']['size'] == (saved / 'model.safetensors').stat().st_size


def test_a_backbone_is_described_and_neither_evaluated_nor_measured(capsys, tmp_path):
    backbone = ElasticBackbone(timm.create_model('test_shiftformer_supernet'), 1)
    save_pretrained(tmp_path, backbone)
    space = backbone.space
    data = json.loads(run(capsys, 'info', tmp_path, '--json')[1])
    assert data['macs'] == [backbone.macs(arch) for arch in (space.smallest, space.largest)]
    for command in ('search', 'evaluate'):
        refused(capsys, 'not an image classifier', command, tmp_path, '--dataset', 'sklearn/digits')
    refused(capsys, 'latency of a backbone', 'measure', tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {'config.json', 'model.safetensors'}


def test_info_without_measurements(capsys, tmp_path, net):
    save_pretrained(tmp_path, net)
    code, out, _ = run(capsys, 'info', tmp_path)
    assert code == 0 and 'groups' not in out and 'results' not in out and 'generator' not in out
    save_pretrained(tmp_path, net, groups=[1e6, 2e6])
    assert '1M to 2M\n' in run(capsys, 'info', tmp_path)[1]


def test_info_of_a_subnet(capsys, tmp_path, net):
    arch = net.space.from_dict(ARCH)
    save_pretrained(tmp_path, extract(net, arch))
    code, out, _ = run(capsys, 'info', tmp_path)
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and lines[0][1:] == ['subnet', 'shiftformer_subnet']
    for expected in (f'MACs {format_count(net.macs(arch))}', f'params {format_count(net.params(arch))}',
                     'embed_dim 48', 'depth 4', 'num_heads 1 2 3 1', 'mlp_ratio 1 2 3 1'):
        assert expected.split() in lines
    data = json.loads(run(capsys, 'info', tmp_path, '--json')[1])
    assert data['arch'] == arch.to_dict() and (data['macs'], data['params']) == (net.macs(arch), net.params(arch))


@pytest.mark.parametrize('name', ['model.safetensors', 'generator.safetensors'])
def test_info_checks_the_files(capsys, folder, name):
    (folder / name).write_bytes(b'x')
    refused(capsys, f'{name} is not the file that was saved', 'info', folder)


# -- extract -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('option, value', [
    ('--flops', '2M'), pytest.param('--params', '100k', marks=pytest.mark.slow), ('--arch', json.dumps(ARCH))])
def test_extract(capsys, saved, net, generator, tmp_path, option, value):
    code, out, err = run(capsys, 'extract', saved, option, value, '--output', tmp_path / 'new' / 'sub')
    assert (code, err) == (0, '')
    first, second = out.splitlines()
    arch = net.space.from_dict(json.loads(second))
    assert first == f'{tmp_path}/new/sub: {format_count(net.macs(arch))} MACs, {format_count(net.params(arch))} params'
    if option == '--flops':
        assert arch == generator.propose(value)
    elif option == '--params':
        assert 50_000 < net.params(arch) <= 100_000
    else:
        assert arch.to_dict() == ARCH
    x = torch.randn(2, 3, 32, 32)
    for loaded in (from_pretrained(tmp_path / 'new' / 'sub'),
                   timm.create_model(f'local-dir:{tmp_path}/new/sub', pretrained=True).eval()):
        assert loaded.arch == arch
        torch.testing.assert_close(loaded(x), net(x, arch), rtol=0, atol=1e-5)


def test_the_tilde_is_the_home_directory(saved, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, tmp_path / 'net')
    assert main(['extract', '~/net', '--flops', '3M', '--output=~/subnet']) == 0
    assert SavedModel(tmp_path / 'subnet').kind == 'subnet' and not (tmp_path / '~').exists()


def test_extract_writes_over_nothing_but_models(capsys, saved, folder, tmp_path):
    def contents():
        return {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}

    (tmp_path / 'empty').mkdir()
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'thesis.tex').write_text('years')
    (tmp_path / 'file').write_text('x')
    (tmp_path / 'link').symlink_to(folder)
    args = 'extract', folder, '--flops', '2M', '--output'
    before = contents()
    for overwrite in ((), ('--overwrite',)):
        refused(capsys, 'is not empty and holds no model', *args, tmp_path / 'full', *overwrite)
        refused(capsys, 'is a file', *args, tmp_path / 'file', *overwrite)
        refused(capsys, 'is the supernet itself', *args, folder, *overwrite)
        refused(capsys, 'is the supernet itself', *args, tmp_path / 'link', *overwrite)
    assert contents() == before
    assert run(capsys, *args, tmp_path / 'empty')[0] == 0
    before = contents()
    refused(capsys, 'holds a model already; add --overwrite', *args, tmp_path / 'empty')
    assert contents() == before
    args = 'extract', folder, '--arch', json.dumps(ARCH), '--output', tmp_path / 'empty', '--overwrite'
    assert run(capsys, *args)[0] == 0 and from_pretrained(tmp_path / 'empty').arch.to_dict() == ARCH


def test_extract_from_a_subnet(capsys, net, tmp_path):
    save_pretrained(tmp_path / 'a', extract(net, net.space.smallest))
    refused(capsys, 'holds a subnet already', 'extract', tmp_path / 'a', '--flops', '9M', '--output', tmp_path / 'b')
    assert not (tmp_path / 'b').exists()


# -- convert -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A checkpoint of timm's script, with averaged weights."""
    folder = tmp_path_factory.mktemp('script')
    argv = ['--device-modules', 'timm_shiftnas.patch', '--model', 'test_shiftformer_supernet', '--batches', '4',
            '--model-ema', '--output', str(folder)]
    environment = dict(SHIFTNAS_GENERATOR_FIT_STEPS='20', SHIFTNAS_NUM_GROUPS='2')
    code, _, err = call(stock_script.main, argv, folder=folder, environment=environment)
    assert code == 0, err
    return folder / 'last.pth.tar'


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize('flags, key', [([], 'state_dict_ema'), (['--no-ema'], 'state_dict')])
def test_convert(capsys, checkpoint, tmp_path, flags, key):
    code, out, err = run(capsys, 'convert', checkpoint, tmp_path / 'model', *flags)
    net = timm.create_model('test_shiftformer_supernet', num_classes=2, img_size=32).eval()
    low, high = (net.macs(arch) for arch in (net.space.smallest, net.space.largest))
    assert (code, err) == (0, '')
    assert out == f'{tmp_path}/model: {format_count(low)} to {format_count(high)} MACs, after 4 updates\n'
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(checkpoint, weights_only=True)
    assert not torch.equal(state['state_dict']['head.weight'], state['state_dict_ema']['head.weight'])
    net.load_state_dict(state[key])
    generator = ArchitectureGenerator(net.space)
    generator.load_state_dict(state['task_state']['generator'])
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for flops in ('1.5M', '4M'):
        sub = from_pretrained(tmp_path / 'model', flops=flops)
        assert sub.arch == generator.propose(flops)
        torch.testing.assert_close(sub(x), net(x, sub.arch), rtol=0, atol=1e-5)
    saved = SavedModel(tmp_path / 'model').record
    assert saved.probabilities == [.5, .5] and saved.groups == [low, (low + high) / 2, high]

    refused(capsys, f'OUT {tmp_path}/model holds a model already; add --overwrite', 'convert', checkpoint,
            tmp_path / 'model')
    assert run(capsys, 'convert', checkpoint, tmp_path / 'model', '--overwrite')[0] == 0


@pytest.mark.process
def test_convert_refuses_other_files(capsys, checkpoint, saved, tmp_path):
    def convert(path, message):
        refused(capsys, message, 'convert', path, tmp_path / 'out')

    content = checkpoint.read_bytes()
    (tmp_path / 'text').write_text('years')
    (tmp_path / 'half').write_bytes(content[:len(content) // 2])
    middle = len(content) // 2
    (tmp_path / 'bit').write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:])
    torch.save(dict(state_dict={}, epoch=3), tmp_path / 'other')
    torch.save([1, 2], tmp_path / 'list')
    convert(tmp_path / 'none', "none' does not exist")
    convert(tmp_path, f"'{tmp_path}' is a directory")
    convert(tmp_path / 'text', "text' cannot be read")
    convert(tmp_path / 'half', "half' is corrupt")
    convert(tmp_path / 'bit', "bit' is corrupt")
    convert(tmp_path / 'other', "other' is not a checkpoint of ShiftNAS")
    convert(tmp_path / 'list', "list' is not a checkpoint of ShiftNAS")
    assert not (tmp_path / 'out').exists()
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'thesis.tex').write_text('years')
    refused(capsys, 'is not empty and holds no model', 'convert', checkpoint, tmp_path / 'full', '--overwrite')
    assert (tmp_path / 'full' / 'thesis.tex').read_text() == 'years'


@pytest.mark.slow
@pytest.mark.process
def test_convert_says_what_a_file_is(capsys, checkpoint, saved, tmp_path):
    """Intact files of another kind, and checkpoints of other programs: one line each."""
    net = torch.nn.Linear(2, 2)
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(checkpoint, weights_only=True)

    def changed(**values):
        return dict(state, task_state=dict(state['task_state'], **values))

    def without(name):
        return dict(state, task_state={key: value for key, value in state['task_state'].items() if key != name})

    torch.save(net, tmp_path / 'object')
    torch.save(dict(net=np.float64(1)), tmp_path / 'numpy')
    torch.save(net.state_dict(), tmp_path / 'old', _use_new_zipfile_serialization=False)
    np.savez(tmp_path / 'arrays.npz', a=np.ones(2))
    (tmp_path / 'json').write_text('{}')
    (tmp_path / 'empty').write_bytes(b'')
    for name, content in dict(
            foreign=dict(state_dict=timm.create_model('resnet18').state_dict(), arch='resnet18'),
            resnet=changed(network=dict(architecture='resnet18', model_args={})), nothing=without('network'),
            unknown=changed(network=dict(architecture='of_a_plugin', model_args={})),
            size=changed(network=dict(state['task_state']['network'], model_args=dict(num_classes=7, img_size=32))),
            history=changed(history=[]), shape=changed(edges='x'), generator=changed(generator=dict(a=torch.ones(1))),
            weights={**state, 'state_dict': 3}, escape=changed(update='\x1b[2J')).items():
        torch.save(content, tmp_path / name)
    for path, message in {
            saved / 'model.safetensors': 'is a safetensors file', tmp_path / 'object': 'torch.nn.modules.linear.Linear',
            tmp_path / 'numpy': 'numpy.dtype', tmp_path / 'old': "torch's old format",
            tmp_path / 'arrays.npz': 'cannot be read', tmp_path / 'json': 'cannot be read',
            tmp_path / 'empty': 'cannot be read', saved: 'is a directory', tmp_path / 'foreign': 'not a checkpoint',
            tmp_path / 'resnet': "'resnet18'", tmp_path / 'nothing': 'not a checkpoint',
            tmp_path / 'unknown': "unknown architecture 'of_a_plugin'", tmp_path / 'size': 'head.weight',
            tmp_path / 'history': 'not a checkpoint', tmp_path / 'shape': 'not a checkpoint',
            tmp_path / 'generator': 'does not belong', tmp_path / 'weights': 'not a checkpoint',
            tmp_path / 'escape': 'not a checkpoint'}.items():
        refused(capsys, message, 'convert', path, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('argv, message', [
    ([], 'the following arguments are required: COMMAND'),
    (['inform'], "invalid choice: 'inform'"),
    (['info'], 'the following arguments are required: DIR'),
    (['info', '/nowhere'], '/nowhere is not a directory'),
    (['info', 'owner/name'], 'owner/name is not a directory'),
    (['info', '.'], 'config.json is missing'),
    (['extract', 'SAVED', '--output', 'OUT'], 'choose a subnet with --flops 1.4G'),
    (['extract', 'SAVED', '--flops', '2M'], 'the following arguments are required: --output'),
    (['extract', 'SAVED', '--flops', '2M', '--arch', '{}', '--output', 'OUT'], 'budgets or an arch, not flops'),
    (['extract', 'SAVED', '--flops', '2M', '--output', 'OUT', '--bn-images', '0'], "'0' must be a whole number"),
    (['extract', 'SAVED', '--flops', 'abc', '--output', 'OUT'], "--flops: 'abc' is not a budget"),
    (['extract', 'SAVED', '--latency', '5apples', '--output', 'OUT'], "latency='5apples' is not a budget"),
    (['evaluate', 'SAVED', '--flops', '2M'], '--data-dir'), (['search', 'SAVED'], '--data-dir'),
    (['push', 'SAVED', 'name'], "'name' is not a repository"),
    (['extract', 'SAVED', '--flops', '2M', '--output', 'OUT', '--push', 'a b/c'], "'a b/c' is not a repository"),
    (['extract', 'SAVED', '--flops', '0', '--output', 'OUT'], "flops='0' is not a budget"),
    (['extract', 'SAVED', '--flops', '1k', '--output', 'OUT'], 'too small a budget'),
    (['extract', 'SAVED', '--arch', '{', '--output', 'OUT'], "'{' is not JSON"),
    (['extract', 'SAVED', '--arch', '{"depth": 9}', '--output', 'OUT'], "field 'embed_dim' is missing"),
    (['extract', 'SAVED', '--arch', json.dumps(dict(ARCH, depth=9)), '--output', 'OUT'], 'depth=9 is not in the space'),
    (['extract', '/nowhere', '--flops', '2M', '--output', 'OUT'], '/nowhere is not a directory'),
    (['extract', 'SAVED', '--flops', '2M', '--output', '/dev/null/x'], 'Not a directory'),
])
def test_mistakes_end_in_one_line(capsys, saved, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    places = dict(SAVED=saved, OUT=tmp_path / 'out')
    refused(capsys, message, *(places.get(arg, arg) for arg in argv))
    assert os.listdir(tmp_path) == []


def test_broken_models_end_in_one_line(capsys, folder, tmp_path):
    args = 'extract', folder, '--flops', '2M', '--output', tmp_path / 'out'
    config = json.loads((folder / 'config.json').read_text())
    for change, message in (
            (dict(model_args=dict(config['model_args'], space=dict(config['model_args']['space'], depth=[10 ** 12]))),
             'asks for depth=1000000000000'),
            (dict(timm_shiftnas=dict(config['timm_shiftnas'], format=2)), 'upgrade it')):
        (folder / 'config.json').write_text(json.dumps(dict(config, **change)))
        refused(capsys, message, *args)
        refused(capsys, message, 'info', folder)
    (folder / 'config.json').write_text('{')
    refused(capsys, 'config.json is not JSON', *args)
    assert not (tmp_path / 'out').exists()


def test_traceback_on_demand(capsys, tmp_path):
    code, _, err = run(capsys, 'info', tmp_path, '--traceback')
    assert code == 2 and err.startswith('Traceback') and 'hub' in err
    assert err.splitlines()[-1].startswith('timm-shiftnas: error: ')


def test_help_and_version(capsys):
    for argv, expected in ((['--help'], 'extract'), (['info', '--help'], '--json'), (['--version'], 'timm-shiftnas')):
        with pytest.raises(SystemExit) as done:
            main(argv)
        assert done.value.code == 0 and expected in capsys.readouterr().out


def test_any_exception_is_one_line(capsys, folder, monkeypatch):
    def fail(args):
        raise KeyError('a\n\x1b[31mb')

    monkeypatch.setitem(cli.COMMANDS, 'info', fail)
    refused(capsys, r"error: KeyError (--traceback shows where): 'a\n\x1b[31mb'", 'info', folder)


def test_terminal_escapes_of_a_config_are_not_printed(capsys, folder):
    escape = '\x1b]0;owned\x07\x9b31m\u202e\nspace    1 archs'
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    config['timm_shiftnas']['results'][0]['name'] = escape
    path.write_text(json.dumps(config))
    code, out, _ = run(capsys, 'info', folder)
    assert code == 0 and r'\x1b]0;owned\x07\x9b31m\u202e\nspace    1 archs' in out
    assert all(character.isprintable() or character == '\n' for character in out)
    assert json.loads(run(capsys, 'info', folder, '--json')[1])['results'][0]['name'] == escape
    config['model_args'][escape] = 1
    path.write_text(json.dumps(config))
    _, _, err = run(capsys, 'info', folder)
    assert '\x1b' not in err and err.count('\n') == 1


# -- real processes ----------------------------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize('argv, code', [
    (['--help'], 0), (['--version'], 0), (['extract', '--help'], 0), (['inform'], 2), (['info', '/nowhere'], 2),
    (['extract', '.', '--flops', '2M'], 2), (['evaluate', '.', '--data-dir', '.', '--bn-images', 'x'], 2),
    (['push', '.'], 2), (['convert'], 2), (['extract', '.', '--flops', 'abc', '--output', 'x'], 2),
    (['evaluate', '.', '--flops', '2M'], 2), (['search', '.'], 2), (['push', '.', 'name'], 2),
    (['extract', '.', '--flops', '2M', '--output', 'x', '--int8'], 2)])
def test_the_parser_answers_without_torch(argv, code):
    program = f'''
import sys
from timm_shiftnas_cli import main
try:
    code = main({argv!r})
except SystemExit as end:
    code = end.code
assert not {{'torch', 'timm', 'timm_shiftnas', 'numpy', 'yaml'}} & set(sys.modules)
sys.exit(code)
'''
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.returncode == code and 'Traceback' not in done.stderr, done.stderr


def test_train_is_the_training_script(capsys):
    with pytest.raises(SystemExit) as end:
        main(['train', '--help'])
    assert end.value.code == 0 and '--grad-accum-steps' in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(['train', '--epochs', '0'])
    assert end.value.code == 2 and 'timm-shiftnas train: error: argument --epochs' in capsys.readouterr().err
    assert main(['train', '--dataset', 'sklearn/none']) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith('timm-shiftnas train: error: ')


def console_script():
    return shutil.which('timm-shiftnas', path=os.path.dirname(sys.executable))


@pytest.mark.process
@pytest.mark.slow
def test_console_script(saved, tmp_path):
    done = subprocess.run(
        [console_script(), 'extract', saved, '--flops', '2M', '--output', tmp_path / 'sub'], capture_output=True,
        text=True)
    assert (done.returncode, done.stderr) == (0, '') and 'MACs' in done.stdout
    assert from_pretrained(tmp_path / 'sub', flops='2M')


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize('argv, unbuffered', [
    (['--version'], '1'), pytest.param(['info', 'SAVED'], '', marks=pytest.mark.exhaustive)])
def test_a_reader_that_ends_early_is_no_error(saved, argv, unbuffered):
    """`timm-shiftnas info DIR | head -0`, with a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    argv = [str(saved) if arg == 'SAVED' else arg for arg in argv]
    done = subprocess.run(
        [console_script(), *argv], stdout=writer, stderr=subprocess.PIPE, text=True,
        env=dict(os.environ, PYTHONUNBUFFERED=unbuffered))
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, '')


@pytest.mark.process
@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='only Linux has a device that is always full')
def test_output_to_a_full_disk_is_one_line():
    with open('/dev/full', 'w') as full:
        done = subprocess.run(
            [sys.executable, '-c', 'import timm_shiftnas_cli; exit(timm_shiftnas_cli.main(["--version"]))'],
            stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'No space left' in done.stderr


def open_for_reader(fifo, child):
    """Open a FIFO for writing, once the process has opened it for reading."""
    while True:
        assert child.alive, child.wait()
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(.01)


@pytest.mark.process
@pytest.mark.slow
def test_ctrl_c(folder, tmp_path):
    """The process waits while it reads config.json, which is a FIFO; its output directory does not appear."""
    (folder / 'config.json').unlink()
    os.mkfifo(folder / 'config.json')
    argv = ['extract', str(folder), '--flops', '2M', '--output', str(tmp_path / 'out')]
    child = Job(run_module, 'timm_shiftnas', *argv, out=tmp_path / 'out.txt', err=tmp_path / 'err.txt')
    pipe = open_for_reader(folder / 'config.json', child)
    time.sleep(.5)  # a signal between opening and reading would be handled only after the read
    os.kill(child.pid, signal.SIGINT)
    code, err = child.wait()
    os.close(pipe)
    assert (code, (tmp_path / 'out.txt').read_text(), err) == (130, '', 'timm-shiftnas: interrupted\n')
    assert not (tmp_path / 'out').exists()


def test_extract_does_not_change_the_supernet(capsys, folder, tmp_path, net):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run(capsys, 'extract', folder, '--flops', '2M', '--output', tmp_path / 'out')[0] == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert load_supernet(folder)[0].space == net.space
