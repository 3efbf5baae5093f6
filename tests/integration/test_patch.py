"""`timm_shiftnas.patch` under a script that knows nothing of it, and in loops of one's own."""
import argparse
import copy
import gc
import pickle
from pathlib import Path

import pytest
import timm
import torch
from support import stock_script
from support.processes import Job, call, ranks, run_code
from timm.data import Mixup
from timm.loss import JsdCrossEntropy, LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, LogitDistillationTask, MultiLabelClassificationTask
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import _global_optimizer_post_hooks

import timm_shiftnas
from timm_shiftnas.method import ArchitectureGenerator, BudgetGroups
from timm_shiftnas.method.config import ShiftNASConfig
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
    """Runs the script in a process of its own; returns its exit code and all that it printed."""
    folder = tmp_path_factory.mktemp('logs')

    def run(*argv, **environment):
        log = folder / f'{len(list(folder.iterdir()))}.txt'
        argv = [str(arg) for arg in argv]
        return Job(stock_script.main, argv, out=log, environment=ENVIRONMENT | environment).wait()

    return run


def done(result, ranks=1):
    """The lines of a run that went well."""
    code, text = result
    assert code == 0 and text.count('StockTask rank') == ranks, text
    return [line for line in text.splitlines() if line.startswith('epoch')]


def load(path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def same(a, b):
    """Equal in every bit, tensors and plain values alike."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def steps(checkpoint):
    """Steps that the script's optimizer (AdamW) has taken."""
    return max(int(state['step']) for state in checkpoint['optimizer']['state'].values())


# -- the script --------------------------------------------------------------------------------------------------------


def test_other_models_train_as_without_the_patch(script):
    argv = '--model test_vit --epochs 2 --batches 4 --grad-accum-steps 2 --model-ema --mixup .5'.split()
    without, patched = script(*argv), script(*PATCH, *argv)
    assert without == patched and without[0] == 0
    assert without[1].splitlines()[-1] == 'ClassificationTask rank 0 done' and without[1].count('\nepoch') == 1


# an epoch ends with archs in store, between two steps of the generator
EVERY_THIRD = dict(SHIFTNAS_GENERATOR_INTERVAL='3')
EVERYTHING = [
    *'--epochs 3 --batches 9 --grad-accum-steps 2 --amp --amp-dtype bfloat16'.split(),
    *'--model-ema --mixup .5 --opt adamw'.split()]


@pytest.fixture(scope='module')
def everything(script, tmp_path_factory):
    """Lines and folder of a run with all that the script can do."""
    folder = tmp_path_factory.mktemp('everything')
    return done(script(*SUPERNET, *EVERYTHING, '--output', folder, **EVERY_THIRD)), folder


def test_a_supernet_trains_with_everything_on(everything):
    lines, folder = everything
    assert [line.split()[1] for line in lines] == ['0', '1', '2']
    first, last = (load(folder / f'checkpoint-{epoch}.pth.tar') for epoch in (0, 2))
    before, after = first['task_state'], last['task_state']
    assert (before['update'], after['update']) == (5, 15) == (steps(first), steps(last))
    assert after['micro_step'] == 27  # two micro-batches each, but for the last of an epoch
    # P is uniform as long as the noise is unknown, and moves with each shift then
    assert [update for update, _ in after['history']] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert after['history'][0][1] == after['history'][1][1] == [.25] * 4
    assert len({tuple(p) for _, p in after['history'][1:]}) == 7
    for part in ('generator', 'shift'):
        assert not same(before[part], after[part])
    optimizer = after['generator_optimizer']['state']
    assert {int(state['step']) for state in optimizer.values()} == {5} and before['archs']
    assert not same(last['state_dict'], last['state_dict_ema']) and 'task_state_ema' not in last


def test_a_resumed_run_ends_alike_bit_for_bit(script, everything, tmp_path):
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
    """What a run in one process comes to, and its lines."""
    folder = tmp_path_factory.mktemp('alone')
    lines = done(script(*SUPERNET, *ALONE, '--dump', folder))
    return load(folder / 'rank-0.pt'), lines


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
    # the scores are differences of losses, and P is steep in them
    for name, tolerance in (('mean', 2e-4), ('theta', 2e-3)):
        assert torch.allclose(state['shift'][name], expected['shift'][name], rtol=0, atol=tolerance), name
        assert expected['shift'][name].abs().max() > .01


def test_a_compiled_supernet_trains_alike(script, tmp_path):
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


def test_a_cnn_trains_with_a_scaler_that_leaves_steps_out(script, tmp_path):
    done(script(
        *PATCH, '--model', 'test_shiftmobilenet_supernet', '--amp', '--grad-accum-steps', '2', '--opt', 'adamw',
        '--output', tmp_path))
    checkpoint = load(tmp_path / 'last.pth.tar')
    # the first scale is too large for float16
    assert checkpoint['amp_scaler']['scale'] < 65536 and checkpoint['task_state']['micro_step'] == 8
    assert checkpoint['task_state']['update'] == steps(checkpoint) == 3


def test_distillation_and_multi_label_are_refused(script):
    for flags in (['--kd-model', 'test_vit'], ['--multi-label']):
        code, text = script(*SUPERNET, *flags)
        assert code == 1 and 'ValueError: ' in text.splitlines()[-1] and 'does not train supernets' in text


def test_a_timm_that_is_not_known_is_refused(tmp_path):
    """Broken before the patch comes, in one process for all; the patch can be asked again when it is mended."""
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
importlib.reload(timm_shiftnas.patch)  # which knows itself
"""
    code, out, err = call(run_code, program, folder=tmp_path)
    assert (code, err) == (0, '')
    lines = out.splitlines()
    known = f'timm_shiftnas.patch does not know timm {timm.__version__}'
    assert len(lines) == 4 and all(line.startswith(known) and line.endswith('with timm 1.0.31') for line in lines)
    assert 'ClassificationTask.forward takes (self input target weight) and not (self input target)' in lines[0]
    assert 'TrainingTask.no_sync takes (it is gone)' in lines[1]
    assert all('__new__' in line for line in lines[2:])


# -- what becomes of which task ----------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def patch():
    """The module; in this process it tells timm for good, which no other test depends on."""
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


def test_only_a_supernet_to_train_makes_a_difference(patch):
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
    task = LogitDistillationTask(plain, supernet(), verbose=False)  # a supernet may teach
    assert type(task) is LogitDistillationTask and task(*batch(0))['loss'].isfinite()
    for wrong in (lambda: LogitDistillationTask(net, plain), lambda: MultiLabelClassificationTask(model=net),
                  lambda: LogitDistillationTask(teacher_model=plain, student_model=net), lambda: Mine(net)):
        with pytest.raises(ValueError, match='does not train supernets: leave out the flags'):
            wrong()


def test_what_cannot_be_trained_is_refused(patch):
    with pytest.raises(ValueError, match='^VisionTransformer is not a supernet; make one'):
        patch.create_task(timm.create_model('test_vit'))
    with pytest.raises(ValueError, match="^shift='hypergradient' measures small differences.* or shift='none'$"):
        patch.create_task(supernet(torch.bfloat16), shift='hypergradient')
    with pytest.raises(ValueError, match='leave out --jsd-loss or --loss jsd'):
        patch.create_task(supernet(), JsdCrossEntropy())
    task = make(patch, shift_images=10, shift_interval=1)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=.1)
    task(*batch(0, 19))['loss'].backward()
    optimizer.step()
    with pytest.raises(ValueError, match='a batch of 19 images is too small.* set SHIFTNAS_SHIFT_IMAGES=9 or less'):
        task(*batch(1, 19))
    for size in (1, 2):
        with pytest.raises(ValueError, match=f'a batch of {size} images is too small.*; make batches larger'):
            task(*batch(1, size))
    with pytest.raises(ValueError, match='not of dict; leave out --naflex-loader'):
        task(dict(patches=torch.zeros(2, 4, 3)), torch.zeros(2))


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_of_environment_and_file(patch, tmp_path):
    path = tmp_path / 'shiftnas.yaml'
    path.write_text('shift: grad_norm\nseed: 3\ntotal_updates: 2_000\ngroup_width: 0.1G\ntau: [1, 0.5]\n')
    settings = patch.Settings.of_environment({
        'SHIFTNAS_CONFIG': str(path), 'SHIFTNAS_SHIFT': 'none', 'SHIFTNAS_SHIFT_LR': '1e-3', 'SHIFTNAS_SANDWICH': 'yes',
        'SHIFTNAS_ARCHS_PER_STEP': '4', 'SHIFTNAS_GROUP_WEIGHTS': '[1, 2.5]', 'SHIFTNAS_NUM_GROUPS': 'null',
        'SHIFTNAS_SHIFT_IMAGES': '', 'PATH': '/bin'})
    assert settings == patch.Settings(
        ShiftNASConfig(
            accum_steps=None, shift='none', seed=3, total_updates=2000, warmup_updates=200, tau=(1., .5), shift_lr=.001,
            sandwich=True, archs_per_step=4, group_weights=(1., 2.5)),
        group_width='0.1G', num_groups=None, shift_images=32)
    path.write_text('# all as it is\n')
    plain = patch.Settings(ShiftNASConfig(accum_steps=None, tau=(1., 1.)))
    assert plain == patch.Settings.of({}) == patch.Settings.of_environment({'SHIFTNAS_CONFIG': str(path)})
    # without an end, the temperature stays where it begins
    assert patch.Settings.of(dict(tau=[.7, .2], group_width=100_000)).config.tau == (.7, .7)


@pytest.mark.parametrize('environment, message', [
    (dict(SHIFTNAS_SHIFTS='none'), r"no setting 'shifts' \(SHIFTNAS_SHIFTS in the environment\); choose from "),
    (dict(SHIFTNAS_TEMPERATURE='2'), "no setting 'temperature'"),  # there is no teacher
    (dict(SHIFTNAS_ACCUM_STEPS='2'), "no setting 'accum_steps'"),
    (dict(SHIFTNAS_SHIFT='off'), 'shift=False must be text; the default is none'),
    (dict(SHIFTNAS_SHIFT='null'), 'shift=None must be text'),
    (dict(SHIFTNAS_SHIFT='[1]'), r'shift=\[1\] must be text'),
    (dict(SHIFTNAS_SAMPLER='random'), "sampler='random' must be one of"),
    (dict(SHIFTNAS_TAU='0.5'), 'tau=0.5 must be two numbers in brackets; the default is '),
    (dict(SHIFTNAS_TAU='[1, 0.5, 0]'), 'must be two numbers in brackets'),
    (dict(SHIFTNAS_TAU='[1, x]'), 'must be two numbers in brackets'),
    (dict(SHIFTNAS_TAU='[1, 0.5'), "SHIFTNAS_TAU='.1, 0.5' cannot be read; give one value"),
    (dict(SHIFTNAS_GROUP_WEIGHTS='3'), 'group_weights=3 must be numbers in brackets or null'),
    (dict(SHIFTNAS_TOTAL_UPDATES='1e5'), "total_updates='1e5' must be a whole number"),
    (dict(SHIFTNAS_TOTAL_UPDATES='true'), 'total_updates=True must be a whole number'),
    (dict(SHIFTNAS_NUM_GROUPS='8.5'), 'num_groups=8.5 must be a whole number or null'),
    (dict(SHIFTNAS_SANDWICH='1'), 'sandwich=1 must be true or false'),
    (dict(SHIFTNAS_SHIFT_LR='fast'), "shift_lr='fast' must be a number"),
    (dict(SHIFTNAS_SHIFT_IMAGES='0'), 'shift_images=0 must be'),
    (dict(SHIFTNAS_SHIFT_INTERVAL='0'), 'shift_interval=0 must be'),
    (dict(SHIFTNAS_CONFIG='no/such.yaml'), "SHIFTNAS_CONFIG: cannot read 'no/such.yaml'"),
])
def test_wrong_settings(patch, environment, message):
    with pytest.raises(ValueError, match=message) as error:
        patch.Settings.of_environment(environment)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('content, message', [
    (b'shift none', 'must hold "name: value" lines'), (b'false', 'must hold "name: value" lines'),
    (b'- shift: none', 'must hold "name: value" lines'), (b'shift: [', 'cannot read'), (b'\xff\xfe\x00', 'cannot read'),
    (b'1: 2', 'no setting 1 '), (b'cls: 2', "no setting 'cls'"), (b'config: {}', "no setting 'config'"),
])
def test_wrong_files(patch, tmp_path, content, message):
    (tmp_path / 'settings.yaml').write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        patch.Settings.of_environment({'SHIFTNAS_CONFIG': str(tmp_path / 'settings.yaml')})
    assert '\n' not in str(error.value)


# -- loops of one's own ------------------------------------------------------------------------------------------------


def drive(task, numbers, optimizer, accum_steps=2):
    """Losses and archs of some micro-batches."""
    seen = []
    for number in numbers:
        result = task(*batch(number))
        (result['loss'] / accum_steps).backward()
        if (number + 1) % accum_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
        seen.append((result['loss'].item(), result['archs']))
    return seen


def test_a_loop_of_ones_own_trains_as_the_task_driven_by_hand(patch):
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
        if number > 0 and number % 4 == 0:  # a shift: these are held out
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
def test_what_is_held_out_is_in_no_mixed_image_that_is_trained_on(patch, mode, size, held_out):
    """Every image is a position of its own; of a mixed one, both sources can be seen."""
    task = make(patch, shift_images=8, shift_interval=1)
    images = torch.eye(size).view(size, 1, 1, size).repeat(1, 1, size, 1)
    if size % 2 == 0:  # timm mixes pairs
        images, _ = Mixup(mixup_alpha=1., cutmix_alpha=0., mode=mode, num_classes=2)(images, torch.zeros(size).long())
        assert max(len(sources(image[None])) for image in images) == 2
    trained, _ = task._hold_out(images, torch.zeros(size))
    (scored, _), (kept, _) = task._shift_batches.batches
    assert len(kept) == held_out and len(scored) == 8 and len(trained) == size - held_out
    assert sources(kept) == set(range(size)) - sources(trained) and sources(scored) <= sources(trained)


def sources(images):
    return set(images.sum((0, 1, 2)).nonzero().flatten().tolist())


def test_updates_are_the_steps_of_optimizers_of_these_weights(patch):
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
    # two optimizers that share the weights step once each: one update
    halves = [torch.optim.SGD(part, lr=.1) for part in (parameters[::2], parameters[1::2])]
    assert micro_batch(halves[0]) == (2, 1)
    halves[1].step()
    assert task.update == 2
    # weights that came after the task count too
    task.get_trainable_module().reset_classifier(5)
    assert micro_batch(torch.optim.SGD(task.get_trainable_module().head.parameters(), lr=.1)) == (3, 1)


def test_a_task_that_is_gone_leaves_nothing_behind(patch):
    gc.collect()
    before = len(_global_optimizer_post_hooks)
    task = make(patch)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=.1)
    task(*batch(0))['loss'].backward()
    assert len(_global_optimizer_post_hooks) == before + 1
    del task
    assert len(_global_optimizer_post_hooks) == before  # at once: there is no cycle to be collected
    optimizer.step()


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda task: pickle.loads(pickle.dumps(task))])
def test_a_copy_goes_on_by_itself(patch, duplicate):
    task = make(patch)
    seen = drive(task, range(6), torch.optim.SGD(task.get_trainable_module().parameters(), lr=.05))
    twin = duplicate(task)
    assert (type(twin), twin.update, len(seen)) == (patch.StockTask, 3, 6)
    results = [drive(each, range(6, 14), torch.optim.SGD(each.get_trainable_module().parameters(), lr=.05))
               for each in (task, twin)]
    assert results[0] == results[1] and same(task.get_task_state(), twin.get_task_state()) and twin.update == 7


def test_a_step_that_was_left_out_is_resumed_from(patch):
    """A checkpoint between the first try of an update and the next: what was learned for it is not learned again."""
    task, again = make(patch), make(patch)
    drive(task, range(4), torch.optim.SGD(task.get_trainable_module().parameters(), lr=.05))
    task(*batch(4))  # whose step a scaler leaves out
    state = pickle.loads(pickle.dumps(task.get_checkpoint_state()))
    again.load_checkpoint_state(state['state_dict'], state['task_state'])
    results = [drive(each, range(5, 12), torch.optim.SGD(each.get_trainable_module().parameters(), lr=.05))
               for each in (task, again)]
    assert results[0] == results[1] and same(task.get_task_state(), again.get_task_state())
    # a state from before the first batch has a generator that must be fitted still
    fresh, loaded = make(patch), make(patch)
    state = fresh.get_checkpoint_state()
    loaded.load_checkpoint_state(state['state_dict'], state['task_state'])
    assert fresh(*batch(0))['archs'] == loaded(*batch(0))['archs']
    assert same(fresh.get_task_state(), loaded.get_task_state())


def test_the_loop_of_the_docs(patch, tmp_path):
    """As it stands there, but with a shorter fit of the generator; the file that it saves is a checkpoint."""
    text = (Path(__file__).parents[2] / 'docs' / 'research.md').read_text()
    code = text.split('## A training loop of your own')[1].split('```python')[1].split('```')[0]
    assert 'create_task(net, ' in code
    names = dict(tsn=timm_shiftnas, torch=torch, net=supernet(), loader=[batch(n, 64) for n in range(4)])
    path = tmp_path / 'last.pth.tar'
    code = code.replace('(net, ', '(net, generator_fit_steps=10, ').replace("'last.pth.tar'", repr(str(path)))
    exec(code, names)
    assert names['task'].update == 4
    net, generator, state = load_checkpoint(path)
    assert state['update'] == 4 and same(net.state_dict(), names['net'].state_dict())
    assert same(generator.state_dict(), names['task'].generator.state_dict())
