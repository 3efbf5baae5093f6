"""`timm_shiftnas.patch` in an unmodified script, and `create_task` in own loops."""
import argparse
import copy
import gc
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
from support import stock_script
from support.processes import Job, call, ranks, run_code, run_module
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.loss import JsdCrossEntropy, LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, LogitDistillationTask, MultiLabelClassificationTask
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import _global_optimizer_post_hooks

import timm_shiftnas
from timm_shiftnas.method import ArchitectureGenerator, BudgetGroups
from timm_shiftnas.method.config import RunConfig, ShiftNASConfig
from timm_shiftnas.method.loop import read_environment, read_settings, update_running_statistics
from timm_shiftnas.method.task import ShiftNASTask
from timm_shiftnas.training.checkpoints import load_checkpoint

PATCH = ['--device-modules', 'timm_shiftnas.patch']
SUPERNET = [*PATCH, '--model', 'test_shiftformer_supernet']
SETTINGS = dict(
    shift='hypergradient', shift_lr=1., shift_interval=2, shift_images=8, num_groups=4, generator_interval=2,
    generator_images=8, generator_fit_steps=10, total_updates=12, warmup_updates=1)
ENVIRONMENT = {f'SHIFTNAS_{name.upper()}': str(value) for name, value in SETTINGS.items()}


@pytest.fixture(scope='module')
def script(tmp_path_factory):
    """Run the script in its own process; return its exit code and its output."""
    folder = tmp_path_factory.mktemp('logs')

    def run(*argv, **environment):
        log = folder / f'{len(list(folder.iterdir()))}.txt'
        argv = [str(arg) for arg in argv]
        return Job(stock_script.main, argv, out=log, environment=ENVIRONMENT | environment).wait()

    return run


def done(result, ranks=1):
    """The epoch lines of a successful run."""
    code, text = result
    assert code == 0 and text.count('StockTask rank') == ranks, text
    return [line for line in text.splitlines() if line.startswith('epoch')]


def load(path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def same(a, b):
    """Whether tensors and plain values are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def steps(checkpoint):
    """Number of steps of the script's optimizer (AdamW)."""
    return max(int(state['step']) for state in checkpoint['optimizer']['state'].values())


# -- the script --------------------------------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.slow
def test_other_models_train_as_without_the_hook(script):
    argv = '--model test_vit --epochs 2 --batches 4 --grad-accum-steps 2 --model-ema --mixup .5'.split()
    without, patched = script(*argv), script(*PATCH, *argv)
    assert without == patched and without[0] == 0
    assert without[1].splitlines()[-1] == 'ClassificationTask rank 0 done' and without[1].count('\nepoch') == 1


# an epoch ends between two steps of the generator, with archs drawn ahead
EVERY_THIRD = dict(SHIFTNAS_GENERATOR_INTERVAL='3')
EVERYTHING = [
    *'--epochs 3 --batches 9 --grad-accum-steps 2 --amp --amp-dtype bfloat16'.split(),
    *'--model-ema --mixup .5 --opt adamw'.split()]


@pytest.fixture(scope='module')
def everything(script, tmp_path_factory):
    """Lines and folder of a run with all features of the script."""
    folder = tmp_path_factory.mktemp('everything')
    return done(script(*SUPERNET, *EVERYTHING, '--output', folder, **EVERY_THIRD)), folder


@pytest.mark.process
@pytest.mark.slow
def test_a_supernet_trains_with_everything_on(everything):
    lines, folder = everything
    assert [line.split()[1] for line in lines] == ['0', '1', '2']
    first, last = (load(folder / f'checkpoint-{epoch}.pth.tar') for epoch in (0, 2))
    before, after = first['task_state'], last['task_state']
    assert (before['update'], after['update']) == (5, 15) == (steps(first), steps(last))
    assert after['micro_step'] == 27  # two micro-batches an update, one in the last of an epoch
    # P is uniform until the noise is known, then moves with each shift
    assert [update for update, _ in after['history']] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert after['history'][0][1] == after['history'][1][1] == [.25] * 4
    assert len({tuple(p) for _, p in after['history'][1:]}) == 7
    for part in ('generator', 'shift'):
        assert not same(before[part], after[part])
    optimizer = after['generator_optimizer']['state']
    assert {int(state['step']) for state in optimizer.values()} == {5} and before['archs']
    assert not same(last['state_dict'], last['state_dict_ema']) and 'task_state_ema' not in last


@pytest.mark.process
@pytest.mark.slow
def test_a_resumed_run_ends_bit_for_bit_the_same(script, everything, tmp_path):
    lines, folder = everything
    resumed = done(script(
        *SUPERNET, *EVERYTHING, '--output', tmp_path, '--resume', folder / 'checkpoint-0.pth.tar', **EVERY_THIRD))
    assert resumed == lines[1:]
    whole, again = (load(path / 'last.pth.tar') for path in (folder, tmp_path))
    for part in ('state_dict', 'state_dict_ema', 'optimizer', 'task_state', 'epoch'):
        assert same(whole[part], again[part]), part


ALONE = '--batches 6 --batch-size 32'.split()


@pytest.fixture(scope='module')
def alone(script, tmp_path_factory):
    """Final state and lines of a run in one process."""
    folder = tmp_path_factory.mktemp('alone')
    lines = done(script(*SUPERNET, *ALONE, '--dump', folder))
    return load(folder / 'rank-0.pt'), lines


@pytest.mark.exhaustive
@pytest.mark.process
@pytest.mark.slow
def test_two_processes_train_as_one_with_the_whole_batch(alone, tmp_path):
    argv = [*SUPERNET, '--batches', '6', '--batch-size', '16', '--dump', str(tmp_path)]
    for job in ranks(2, stock_script.main, argv, folder=tmp_path, environment=ENVIRONMENT):
        done(job.wait())
    first, second = (load(tmp_path / f'rank-{rank}.pt') for rank in range(2))
    assert same(first, second)
    one, _ = alone
    for name, value in one['state_dict'].items():
        assert torch.allclose(first['state_dict'][name], value, rtol=0, atol=1e-6), name
    state, expected = first['task_state'], one['task_state']
    assert (state['update'], state['archs']) == (expected['update'], expected['archs'])
    for name, value in expected['generator'].items():
        assert torch.allclose(state['generator'][name], value, rtol=0, atol=1e-6), name
    # scores are small differences of losses, and P depends strongly on them
    for name, tolerance in (('mean', 2e-4), ('theta', 2e-3)):
        assert torch.allclose(state['shift'][name], expected['shift'][name], rtol=0, atol=tolerance), name
        assert expected['shift'][name].abs().max() > .01


@pytest.mark.exhaustive
@pytest.mark.process
@pytest.mark.slow
def test_a_compiled_supernet_trains_the_same(script, tmp_path):
    space = dict(family='shiftformer', depth=[1], embed_dim=[32, 48], num_heads=[2, 3], mlp_ratio=[1., 2.])
    results = []
    for name, flags in (('plain', []), ('compiled', ['--torchcompile', 'eager'])):
        (tmp_path / name).mkdir()
        done(script(*SUPERNET, '--model-kwargs', f'space={space}', '--batches', '4', *flags, '--dump', tmp_path / name))
        results.append(load(tmp_path / name / 'rank-0.pt'))
    plain, compiled = results
    assert plain['state_dict'].keys() == compiled['state_dict'].keys()
    assert all(torch.allclose(compiled['state_dict'][name], value, atol=1e-6)
               for name, value in plain['state_dict'].items())
    assert compiled['task_state']['update'] == 4


@pytest.mark.exhaustive
@pytest.mark.process
@pytest.mark.slow
def test_a_cnn_trains_with_a_scaler_that_skips_steps(script, tmp_path):
    done(script(
        *PATCH, '--model', 'test_shiftmobilenet_supernet', '--amp', '--grad-accum-steps', '2', '--opt', 'adamw',
        '--output', tmp_path))
    checkpoint = load(tmp_path / 'last.pth.tar')
    # the first scale is too large for float16
    assert checkpoint['amp_scaler']['scale'] < 65536 and checkpoint['task_state']['micro_step'] == 8
    assert checkpoint['task_state']['update'] == steps(checkpoint) == 3


@pytest.mark.process
@pytest.mark.slow
def test_validation_of_a_cnn_uses_statistics_of_the_full_network(script):
    """Without them the figure of every epoch is chance, and the best checkpoint is one of the worst."""
    lines = done(script(
        *PATCH, '--model', 'test_shiftmobilenet_supernet', '--epochs', '2', '--batches', '16', '--opt', 'adamw',
        SHIFTNAS_SHIFT='none'))
    assert float(lines[-1].split()[-1]) >= 90


@pytest.mark.process
def test_distillation_and_multi_label_raise(script):
    for flags in (['--kd-model', 'test_vit'], ['--multi-label']):
        code, text = script(*SUPERNET, *flags)
        assert code == 1 and 'ValueError: ' in text.splitlines()[-1] and 'does not train supernets' in text


@pytest.mark.process
def test_an_unknown_timm_raises(tmp_path):
    """Break timm before the hook is imported, case after case in one process; afterwards the import succeeds."""
    program = """
import timm.task
from timm.task import ClassificationTask, TrainingTask

def refused(owner, name, value):
    there, old = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        import timm_shiftnas.patch
    except ImportError as error:
        print(error)
    if there:
        setattr(owner, name, old)
    else:
        delattr(owner, name)

refused(ClassificationTask, 'forward', lambda self, input, target, weight: None)
refused(TrainingTask, 'no_sync', None)
refused(TrainingTask, '__new__', staticmethod(lambda cls, *args, **kwargs: object.__new__(cls)))
refused(ClassificationTask, '__new__', staticmethod(lambda cls, *args, **kwargs: object.__new__(cls)))
assert TrainingTask.__new__ is object.__new__
import importlib, timm_shiftnas.patch
importlib.reload(timm_shiftnas.patch)  # which accepts its own hook
"""
    code, out, err = call(run_code, program, folder=tmp_path)
    assert (code, err) == (0, '')
    lines = out.splitlines()
    known = f'timm_shiftnas.patch does not know timm {timm.__version__}'
    assert len(lines) == 4 and all(line.startswith(known) and line.endswith('with timm 1.0.31') for line in lines)
    assert 'ClassificationTask.forward takes (self input target weight) and not (self input target)' in lines[0]
    assert 'TrainingTask.no_sync takes (it is missing)' in lines[1]
    assert all('__new__' in line for line in lines[2:])


# -- which task a model gets -------------------------------------------------------------------------------------------


@pytest.mark.process
def test_imports_change_nothing(tmp_path):
    program = """
import sys
for name in [name for name in sys.modules if name.startswith('timm.task')]:
    del sys.modules[name]

import timm_shiftnas
assert 'timm.task' not in sys.modules

import timm_shiftnas.method.loop
from timm.task import ClassificationTask, TrainingTask
assert timm_shiftnas.create_task is timm_shiftnas.method.loop.create_task
assert 'timm_shiftnas.patch' not in sys.modules
assert TrainingTask.__new__ is ClassificationTask.__new__ is object.__new__

import timm_shiftnas.patch
assert TrainingTask.__new__ is timm_shiftnas.patch._dispatch
"""
    assert call(run_code, program, folder=tmp_path) == (0, '', '')
    with pytest.raises(AttributeError, match='no_such_name'):
        getattr(timm_shiftnas, 'no_such_name')  # noqa: B009


@pytest.fixture(scope='module')
def patch():
    """The module. Its hook stays in this process; no other test depends on that."""
    from timm_shiftnas import patch
    return patch


def supernet(dtype=torch.float32):
    torch.manual_seed(0)
    return timm.create_model('test_shiftformer_supernet', num_classes=2).to(dtype)


def batch(number, size=32):
    noise = torch.Generator().manual_seed(number)
    target = torch.randint(2, (size,), generator=noise)
    return torch.randn(size, 3, 32, 32, generator=noise) + target[:, None, None, None], target


def make(patch, **settings):
    return patch.create_task(supernet(), **{**SETTINGS, **settings})


def test_only_the_task_of_a_supernet_is_replaced(patch):
    plain, net = timm.create_model('test_vit', num_classes=2), supernet()
    criterion = LabelSmoothingCrossEntropy(.1)
    for task in (ClassificationTask(net, criterion, None, torch.device('cpu'), torch.float32, False),
                 ClassificationTask(criterion=criterion, model=net, verbose=False)):
        assert type(task) is patch.StockTask and task.criterion is criterion and task.trainable_module is net
    task = ClassificationTask(net, None, dict(smoothing=.1), verbose=False)
    assert type(task.criterion) is LabelSmoothingCrossEntropy
    assert type(ClassificationTask(plain, verbose=False)) is ClassificationTask

    class Mine(ClassificationTask):
        pass

    class Ours(patch.StockTask):
        pass

    assert type(Mine(plain, verbose=False)) is Mine and type(Ours(net, verbose=False)) is Ours
    assert type(MultiLabelClassificationTask(plain, verbose=False)) is MultiLabelClassificationTask
    task = LogitDistillationTask(plain, supernet(), verbose=False)  # the teacher may be a supernet
    assert type(task) is LogitDistillationTask and task(*batch(0))['loss'].isfinite()
    for wrong in (lambda: LogitDistillationTask(net, plain), lambda: MultiLabelClassificationTask(model=net),
                  lambda: LogitDistillationTask(teacher_model=plain, student_model=net), lambda: Mine(net)):
        with pytest.raises(ValueError, match='does not train supernets: leave out the flags'):
            wrong()


def test_what_cannot_be_trained_raises(patch):
    with pytest.raises(ValueError, match='VisionTransformer is not a supernet'):
        patch.create_task(timm.create_model('test_vit'))
    with pytest.raises(ValueError, match="shift='hypergradient' .* half precision"):
        patch.create_task(supernet(torch.bfloat16), shift='hypergradient')
    with pytest.raises(ValueError, match='JsdCrossEntropy'):
        patch.create_task(supernet(), JsdCrossEntropy())
    task = make(patch, shift_images=10, shift_interval=1)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=.1)
    task(*batch(0, 19))['loss'].backward()
    optimizer.step()
    with pytest.raises(ValueError, match='a batch of 19 images .* SHIFTNAS_SHIFT_IMAGES=9 or less'):
        task(*batch(1, 19))
    for size in (1, 2):
        with pytest.raises(ValueError, match=f'a batch of {size} images'):
            task(*batch(1, size))
    with pytest.raises(ValueError, match='dict.*--naflex-loader'):
        task(dict(patches=torch.zeros(2, 4, 3)), torch.zeros(2))


# -- BatchNorm ---------------------------------------------------------------------------------------------------------


def cnn():
    torch.manual_seed(0)
    return timm.create_model('test_shiftmobilenet_supernet', num_classes=2, drop_rate=.5, drop_path_rate=.5)


def test_running_statistics_are_those_of_the_full_network(patch):
    """The mean over the first updates, of a quarter of the images of each; the same random state, and modes."""
    net = cnn()
    task = patch.create_task(net, generator_fit_steps=1)
    task.get_trainable_module().train()
    state = torch.get_rng_state()
    expected = []
    for number in range(3):
        with torch.no_grad():
            expected.append(net.conv_stem(batch(number)[0][:8]).mean((0, 2, 3)))
        update_running_statistics(net, batch(number)[0][:8], 1 / (number + 1))
    assert torch.equal(torch.get_rng_state(), state) and all(module.training for module in net.modules())
    torch.testing.assert_close(net.bn1.running_mean, sum(expected) / 3)
    assert net.bn1.momentum == .1 and net.bn1.num_batches_tracked == 3 and not net.bn1.weight.grad

    fresh = cnn()
    patch.create_task(fresh, generator_fit_steps=1)(*batch(0))
    torch.testing.assert_close(fresh.bn1.running_mean, expected[0])


def test_frozen_statistics_stay(patch):
    net = cnn().train()
    for module in (net.bn1, net.bn2):
        module.eval()
    timm.utils.freeze(net, ['blocks.0'])
    before = copy.deepcopy(net.state_dict())
    patch.create_task(net, generator_fit_steps=1)(*batch(0))
    changed = {name.split('.running')[0] for name, value in net.state_dict().items() if not same(value, before[name])}
    assert 'blocks.1.0.bn1' in changed and not changed & {'bn1', 'bn2', 'blocks.0.0.bn1'}


def test_a_synchronised_supernet_trains_the_same_widths_everywhere(patch):
    task = patch.create_task(convert_sync_batchnorm(cnn()), arch_per_rank=True, archs_per_step=1)
    with pytest.raises(ValueError, match='arch_per_rank'):
        task.prepare_distributed()


# -- other programs ----------------------------------------------------------------------------------------------------


PROGRAM = """
import argparse
import sys

import beside_it
from timm.models import create_model
from timm.task import ClassificationTask

parser = argparse.ArgumentParser()
parser.add_argument('--model')
net = create_model(parser.parse_args().model, num_classes=2)
print(__name__, sys.argv, type(net).__name__, type(ClassificationTask(net, verbose=False)).__name__)
sys.exit(3)
"""


@pytest.mark.process
def test_programs_without_device_modules_know_our_models(tmp_path):
    (tmp_path / 'validate.py').write_text(PROGRAM)
    (tmp_path / 'beside_it.py').touch()
    code, out, err = call(run_module, 'timm_shiftnas.run', tmp_path / 'validate.py', '--model',
                          'test_shiftmobilenet_supernet', folder=tmp_path)
    argv = [str(tmp_path / 'validate.py'), '--model', 'test_shiftmobilenet_supernet']
    assert (code, out, err) == (3, f'__main__ {argv} EfficientNetSupernet StockTask\n', '')


@pytest.mark.parametrize('argv', [[], ['no_such_script.py'], ['.']])
def test_a_missing_program_is_one_line(argv, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['run.py', *argv])
    from timm_shiftnas.run import main
    assert main() == 2
    assert (error := capsys.readouterr().err).count('\n') == 1 and 'SCRIPT.py' in error


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_from_environment_and_file(tmp_path):
    path = tmp_path / 'shiftnas.yaml'
    path.write_text('shift: grad_norm\nseed: 3\ntotal_updates: 2_000\ngroup_width: 0.1G\ntau: [1, 0.5]\n')
    settings = read_environment({
        'SHIFTNAS_CONFIG': str(path), 'SHIFTNAS_SHIFT': 'none', 'SHIFTNAS_SHIFT_LR': '1e-3', 'SHIFTNAS_SANDWICH': 'yes',
        'SHIFTNAS_ARCHS_PER_STEP': '4', 'SHIFTNAS_GROUP_WEIGHTS': '[1, 2.5]', 'SHIFTNAS_NUM_GROUPS': 'null',
        'SHIFTNAS_SHIFT_IMAGES': '', 'PATH': '/bin'})
    assert settings == (
        ShiftNASConfig(
            accum_steps=None, shift='none', seed=3, total_updates=2000, warmup_updates=200, tau=(1., .5), shift_lr=.001,
            sandwich=True, archs_per_step=4, group_weights=(1., 2.5)),
        RunConfig(group_width='0.1G', num_groups=None, shift_images=32))
    path.write_text('# nothing but a comment\n')
    plain = ShiftNASConfig(accum_steps=None, tau=(1., 1.)), RunConfig()
    assert plain == read_settings({}) == read_environment({'SHIFTNAS_CONFIG': str(path)})
    # without the number of updates, the temperature stays at its first value
    assert read_settings(dict(tau=[.7, .2], group_width=100_000))[0].tau == (.7, .7)
    assert read_settings(dict(total_updates='1e5'))[0].total_updates == 100_000  # YAML reads 1e5 as a text


@pytest.mark.parametrize('environment, named', [
    (dict(SHIFTNAS_SHIFTS='none'), "'shifts' (SHIFTNAS_SHIFTS in the environment)"),
    (dict(SHIFTNAS_TEMPERATURE='2'), "'temperature'"),  # there is no teacher
    (dict(SHIFTNAS_ACCUM_STEPS='2'), "'accum_steps'"),
    (dict(SHIFTNAS_SHIFT='off'), 'shift=False'),
    (dict(SHIFTNAS_SHIFT='null'), 'shift=None'),
    (dict(SHIFTNAS_SHIFT='[1]'), 'shift=[1]'),
    (dict(SHIFTNAS_SAMPLER='random'), "sampler='random'"),
    (dict(SHIFTNAS_TAU='0.5'), 'tau=0.5 must be two numbers'),
    (dict(SHIFTNAS_TAU='[1, 0.5, 0]'), 'tau=[1, 0.5, 0] must be two numbers'),
    (dict(SHIFTNAS_TAU='[1, x]'), "tau=[1, 'x']"),
    (dict(SHIFTNAS_TAU='[1, 0.5'), "SHIFTNAS_TAU='[1, 0.5'"),
    (dict(SHIFTNAS_GROUP_WEIGHTS='3'), 'group_weights=3'),
    (dict(SHIFTNAS_TOTAL_UPDATES='1.5'), 'total_updates=1.5 must be a whole number'),
    (dict(SHIFTNAS_TOTAL_UPDATES='1e-5'), "total_updates='1e-5' must be a whole number"),
    (dict(SHIFTNAS_TOTAL_UPDATES='true'), 'total_updates=True must be a whole number'),
    (dict(SHIFTNAS_NUM_GROUPS='8.5'), 'num_groups=8.5 must be a whole number'),
    (dict(SHIFTNAS_GROUP_WIDTH='wide'), "group_width='wide' must be a number of MACs"),
    (dict(SHIFTNAS_SANDWICH='1'), 'sandwich=1 must be true or false'),
    (dict(SHIFTNAS_SHIFT_LR='fast'), "shift_lr='fast' must be a number"),
    (dict(SHIFTNAS_SHIFT_IMAGES='0'), 'shift_images=0'),
    (dict(SHIFTNAS_SHIFT_INTERVAL='0'), 'shift_interval=0'),
    (dict(SHIFTNAS_CONFIG='no/such.yaml'), "SHIFTNAS_CONFIG: cannot read 'no/such.yaml'"),
])
def test_wrong_settings_raise(environment, named):
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        read_environment(environment)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('content, named', [
    (b'shift none', 'settings.yaml'), (b'false', 'settings.yaml'), (b'- shift: none', 'settings.yaml'),
    (b'shift: [', 'cannot read'), (b'\xff\xfe\x00', 'cannot read'),
    (b'1: 2', 'no setting 1 '), (b'cls: 2', "no setting 'cls'"), (b'config: {}', "no setting 'config'"),
])
def test_wrong_files_raise(tmp_path, content, named):
    (tmp_path / 'settings.yaml').write_bytes(content)
    with pytest.raises(ValueError, match=named) as error:
        read_environment({'SHIFTNAS_CONFIG': str(tmp_path / 'settings.yaml')})
    assert '\n' not in str(error.value)


# -- own loops ---------------------------------------------------------------------------------------------------------


def drive(task, numbers, optimizer, accum_steps=2):
    """Train on micro-batches; return their losses and archs."""
    seen = []
    for number in numbers:
        result = task(*batch(number))
        (result['loss'] / accum_steps).backward()
        if (number + 1) % accum_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
        seen.append((result['loss'].item(), result['archs']))
    return seen


@pytest.mark.slow
def test_an_own_loop_trains_as_a_task_driven_by_hand(patch):
    task = make(patch)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=.05)
    seen = drive(task, range(16), optimizer)

    net = supernet()
    own = {name: value for name, value in SETTINGS.items() if name in ShiftNASConfig.__dataclass_fields__}
    hand = ShiftNASTask(
        net, config=ShiftNASConfig(**own, accum_steps=None), verbose=False,
        generator=ArchitectureGenerator(net.space, seed=0).fit(steps=10, seed=0, progress=False),
        groups=BudgetGroups.of_space(net.space, count=4),
        shift_batches=lambda n: tuple(
            tuple(part[where] for part in batch(4 * n)) for where in (slice(0, 8), slice(12, 20))))
    optimizer = torch.optim.SGD(net.parameters(), lr=.05)
    for number, (loss, archs) in enumerate(seen):
        images, targets = batch(number)
        if number > 0 and number % 4 == 0:  # images of a shift are held out
            images, targets = (torch.cat([part[:12], part[20:]]) for part in (images, targets))
        result = hand(images, targets)
        assert result['archs'] == archs and result['loss'].item() == loss
        assert loss == cross_entropy(net(images, archs[0]), targets).item()
        (result['loss'] / 2).backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
            hand.end_update()
    assert len({archs for _, archs in seen}) > 10
    mine, theirs = task.get_task_state(), hand.get_task_state()
    assert (mine.pop('micro'), mine.pop('fitted'), task.update) == (0, True, 8)
    assert same(mine, theirs) and mine['shift']['theta'].abs().max() > .1


@pytest.mark.parametrize('size, held_out', [(32, 8), (31, 9)])
@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem'])
def test_held_out_images_are_not_mixed_into_training_images(patch, mode, size, held_out):
    """Each image marks its own position, so that a mixed image shows both of its sources."""
    task = make(patch, shift_images=8, shift_interval=1)
    images = torch.eye(size).view(size, 1, 1, size).repeat(1, 1, size, 1)
    if size % 2 == 0:  # timm mixes pairs
        images, _ = Mixup(mixup_alpha=1., cutmix_alpha=0., mode=mode, num_classes=2)(images, torch.zeros(size).long())
        assert max(len(sources(image[None])) for image in images) == 2
    trained, _ = task._hold_out(images, torch.zeros(size))
    (scored, _), (kept, _) = task.sampler.shift_batches.batches
    assert len(kept) == held_out and len(scored) == 8 and len(trained) == size - held_out
    assert sources(kept) == set(range(size)) - sources(trained) and sources(scored) <= sources(trained)


def sources(images):
    return set(images.sum((0, 1, 2)).nonzero().flatten().tolist())


@pytest.mark.slow
def test_updates_count_the_steps_of_optimizers_of_these_weights(patch):
    task, other = make(patch, shift='none'), make(patch, shift='none', seed=1)

    def micro_batch(optimizer):
        task(*batch(0))['loss'].backward()
        other(*batch(0))['loss'].backward()
        optimizer.step()
        return task.update, other.update

    parameters = list(task.get_trainable_module().parameters())
    assert micro_batch(create_optimizer_v2(other.get_trainable_module(), 'sgd', lr=.1)) == (0, 1)
    assert micro_batch(create_optimizer_v2(supernet(), 'sgd', lr=.1)) == (0, 1)
    assert micro_batch(create_optimizer_v2(task.get_trainable_module(), 'lookahead_sgd', lr=.1)) == (1, 1)
    # one step of each of two optimizers that share the weights is one update
    halves = [torch.optim.SGD(part, lr=.1) for part in (parameters[::2], parameters[1::2])]
    assert micro_batch(halves[0]) == (2, 1)
    halves[1].step()
    assert task.update == 2
    # weights added after the task was created count too
    task.get_trainable_module().reset_classifier(5)
    assert micro_batch(torch.optim.SGD(task.get_trainable_module().head.parameters(), lr=.1)) == (3, 1)


@pytest.mark.slow
def test_a_deleted_task_removes_its_hook(patch):
    gc.collect()
    before = len(_global_optimizer_post_hooks)
    task = make(patch)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=.1)
    task(*batch(0))['loss'].backward()
    assert len(_global_optimizer_post_hooks) == before + 1
    del task
    assert len(_global_optimizer_post_hooks) == before  # at once, because there is no reference cycle
    optimizer.step()


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda task: pickle.loads(pickle.dumps(task))])
def test_a_copy_trains_independently(patch, duplicate):
    task = make(patch)
    seen = drive(task, range(6), torch.optim.SGD(task.get_trainable_module().parameters(), lr=.05))
    twin = duplicate(task)
    assert (type(twin), twin.update, len(seen)) == (patch.StockTask, 3, 6)
    results = [drive(each, range(6, 14), torch.optim.SGD(each.get_trainable_module().parameters(), lr=.05))
               for each in (task, twin)]
    assert results[0] == results[1] and same(task.get_task_state(), twin.get_task_state()) and twin.update == 7


@pytest.mark.slow
def test_a_resumed_run_continues_after_a_skipped_step(patch):
    """After a checkpoint between two attempts at an update, the steps of generator and shift are not repeated."""
    task, again = make(patch), make(patch)
    drive(task, range(4), torch.optim.SGD(task.get_trainable_module().parameters(), lr=.05))
    task(*batch(4))  # a scaler skips this step
    state = pickle.loads(pickle.dumps(task.get_checkpoint_state()))
    again.load_checkpoint_state(state['state_dict'], state['task_state'])
    results = [drive(each, range(5, 12), torch.optim.SGD(each.get_trainable_module().parameters(), lr=.05))
               for each in (task, again)]
    assert results[0] == results[1] and same(task.get_task_state(), again.get_task_state())
    # in a state from before the first batch, the generator is not fitted yet
    fresh, loaded = make(patch), make(patch)
    state = fresh.get_checkpoint_state()
    loaded.load_checkpoint_state(state['state_dict'], state['task_state'])
    assert fresh(*batch(0))['archs'] == loaded(*batch(0))['archs']
    assert same(fresh.get_task_state(), loaded.get_task_state())


@pytest.mark.slow
def test_the_loop_of_the_docs(patch, tmp_path):
    """As it stands there, but with a shorter fit of the generator; the file that it saves is a checkpoint."""
    text = (Path(__file__).parents[2] / 'docs' / 'research.md').read_text()
    code = text.split('## Your own training loop')[1].split('```python')[1].split('```')[0]
    assert 'create_task(net, ' in code
    names = dict(tsn=timm_shiftnas, torch=torch, net=supernet(), loader=[batch(n, 64) for n in range(4)])
    path = tmp_path / 'last.pth.tar'
    code = code.replace('(net, ', '(net, generator_fit_steps=10, ').replace("'last.pth.tar'", repr(str(path)))
    exec(code, names)
    assert names['task'].update == 4
    net, generator, state = load_checkpoint(path)
    assert state['update'] == 4 and same(net.state_dict(), names['net'].state_dict())
    assert same(generator.state_dict(), names['task'].generator.state_dict())
