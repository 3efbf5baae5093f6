"""`ShiftNASTask` on the test supernet, with images of digits."""
import math
import random

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3, unwrap_model

import timm_shiftnas
from timm_shiftnas.data import StepBatches, create_dataset, split_held_out
from timm_shiftnas.method import ArchitectureGenerator, BudgetGroups
from timm_shiftnas.method.config import ShiftNASConfig
from timm_shiftnas.method.distillation import Teacher
from timm_shiftnas.method.task import ShiftNASTask
from timm_shiftnas.space import arch_masks
from timm_shiftnas.training.checkpoints import check_checkpoint
from timm_shiftnas.utils import stream

STATS = dict(mean=(.485, .456, .406), std=(.229, .224, .225), interpolation='bilinear')


def supernet(num_classes=10, size=16):
    return timm.create_model('test_shiftformer_supernet', num_classes=num_classes, img_size=size)


def digits(size):
    train, held_out = split_held_out(create_dataset('sklearn/digits', None, 'train'), .2)
    train, held_out = (StepBatches(images, 64, seed, input_size=(3, size, size), **STATS)
                       for seed, images in ((1, train), (2, held_out)))
    return lambda n: (train.batch(n), held_out.batch(n))


@pytest.fixture(scope='module')
def shift_batches():
    return digits(16)


@pytest.fixture(scope='module')
def fitted():
    """State of a generator that meets budgets roughly."""
    net = supernet()
    return ArchitectureGenerator(net.space).fit(steps=60, progress=False).state_dict()


def make_task(fitted, shift_batches, groups=3, dtype=torch.float32, size=16, **config):
    torch.manual_seed(0)
    net = supernet(size=size).to(dtype)
    generator = ArchitectureGenerator(net.space)
    generator.load_state_dict(fitted)
    defaults = dict(shift='hypergradient', total_updates=100, generator_interval=4, shift_interval=3)
    config = ShiftNASConfig(**dict(defaults, **config))
    return ShiftNASTask(
        net, config=config, generator=generator, groups=BudgetGroups.of_space(net.space, count=groups),
        shift_batches=shift_batches, dtype=dtype, verbose=False)


def train(task, shift_batches, updates, lr=1e-3, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(task.get_trainable_module().parameters(), lr=lr)
    archs = []
    for number in range(updates):
        result = task(*shift_batches(number)[0])
        result['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
        archs += result['archs']
    return archs


def step_of(task, images=None, targets=None):
    """What the sampler of a task sees of a micro-batch."""
    return task._step(images, targets)


# -- the signal --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('epsilon, tolerance', [(1e-5, 1e-4), (1e-3, 2e-2)])
def test_scores_are_exact_inner_products(fitted, shift_batches, epsilon, tolerance):
    def double(n):
        return tuple((images.double(), targets) for images, targets in shift_batches(n))

    task = make_task(fitted, double, dtype=torch.float64, shift_epsilon=epsilon)
    train(task, double, 2, lr=.1)
    net = task.get_trainable_module()
    archs = task.generator.propose_many(task.groups.budgets)
    train_batch, held_out = double(task.update // task.config.shift_interval)

    def flat(arch, batch):
        loss = F.cross_entropy(net(batch[0], arch), batch[1])
        gradients = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
        return torch.cat([torch.zeros(p.numel(), dtype=p.dtype) if g is None else g.flatten()
                          for p, g in zip(net.parameters(), gradients)])

    parts = [tuple(tensor[k::3] for tensor in held_out) for k in range(3)]  # each group sees a third of the images
    g = sum(flat(arch, part) for arch, part in zip(archs, parts)) / len(archs)
    exact = torch.stack([g @ flat(arch, train_batch) for arch in archs])
    torch.testing.assert_close(task.sampler.shift_scores(step_of(task)), exact, rtol=tolerance, atol=0)


@pytest.mark.slow
def test_more_groups_than_held_out_images(fitted, shift_batches):
    task = make_task(fitted, lambda n: tuple((x[:3], y[:3]) for x, y in shift_batches(n)), groups=5)
    assert bool(task.sampler.shift_scores(step_of(task)).isfinite().all())


@pytest.mark.slow
@pytest.mark.parametrize('signal', ['hypergradient', 'grad_norm', 'variation'])
def test_a_shift_update_restores_everything(fitted, shift_batches, signal):
    task = make_task(fitted, shift_batches, shift=signal)
    train(task, shift_batches, 2)
    net = task.get_trainable_module()
    task(*shift_batches(9)[0])['loss'].backward()  # there are gradients, as during gradient accumulation
    weights = [p.detach().clone() for p in net.parameters()]
    gradients = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        scores = task.sampler.shift_scores(step_of(task))
    task.sampler.update_shift(step_of(task))
    assert all(torch.equal(p, w) for p, w in zip(net.parameters(), weights))
    for p, g in zip(net.parameters(), gradients):
        assert p.grad is None if g is None else torch.equal(p.grad, g)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert all(module.training for module in net.modules())
    if signal == 'variation':  # the images are the same, and the network has not changed
        assert bool(scores.isnan().all())
        assert float(task.sampler.shift_scores(step_of(task)).max()) < 1e-5
    else:
        again = task.sampler.shift_scores(step_of(task))
        torch.testing.assert_close(scores, again, rtol=2e-2, atol=1e-3)  # float32, also under autocast


@pytest.mark.exhaustive
@pytest.mark.slow
def test_p_rises_for_an_untrained_group(fitted, shift_batches):
    """Train only the subnets of the middle and the last group; the first group gains the most from training."""
    task = make_task(fitted, shift_batches, shift_lr=.3)
    batches = [shift_batches(number)[0] for number in range(18)]  # one pass over the images
    net = task.get_trainable_module()
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    archs = task.generator.propose_many(task.groups.budgets)
    for number in range(120):
        images, targets = batches[number % 18]
        F.cross_entropy(net(images, archs[1 + number % 2]), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    for number in range(5):
        task._update = number * task.config.shift_interval  # different images each time
        task.sampler.update_shift(step_of(task))
    p = task.shift.probabilities
    assert int(p.argmax()) == 0 and float(p[0]) > .5, p


# -- drawing -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_archs_are_a_function_of_seed_and_step(fitted, shift_batches):
    first = train(make_task(fitted, shift_batches), shift_batches, 8)
    torch.manual_seed(123)
    assert first == train(make_task(fitted, shift_batches), shift_batches, 8)
    assert first != train(make_task(fitted, shift_batches, seed=1), shift_batches, 8)
    assert len(set(first)) > 4


def test_the_uniform_sampler_is_that_of_the_space(fitted, shift_batches):
    task = make_task(fitted, None, sampler='uniform', seed=5)
    archs = train(task, shift_batches, 3)
    assert archs == [task.space.sample(stream(5, 'arch', step)) for step in range(3)]
    assert task.history == [(0, [1 / 3] * 3)]


def test_budgets_follow_p(fitted, shift_batches):
    task = make_task(fitted, shift_batches, shift='none', generator_interval=50, seed=4)
    task.shift.theta = torch.tensor([0., 0., 6.], dtype=torch.float64)
    noise = stream(4, 'arch', 0)
    budgets = task.groups.draw(torch.tensor([.0687, .0687, .8627]), 50, noise)  # 0.8 * softmax + 0.2 / 3
    torch.testing.assert_close(
        task.shift.probabilities, torch.tensor([.0687, .0687, .8627], dtype=torch.float64), rtol=0, atol=1e-4)
    drawn = [arch for _ in range(50) for arch in task._draw_archs(step_of(task))]
    assert drawn == task.generator.sample(budgets, noise)
    assert float((budgets > task.groups.edges[2]).double().mean()) > .7


@pytest.mark.slow
def test_the_sandwich_rule_trains_both_ends_and_others(fitted, shift_batches):
    """Loss and gradient are means over the largest, the smallest and sampled archs."""
    task = make_task(fitted, None, sampler='uniform', shift='none', archs_per_step=4, sandwich=True, seed=6)
    net, (images, targets) = task.get_trainable_module(), shift_batches(0)[0]
    noise = stream(6, 'arch', 0)
    expected = (net.space.largest, net.space.smallest, net.space.sample(noise), net.space.sample(noise))
    result = task(images, targets)
    assert result['archs'] == expected
    torch.testing.assert_close(result['output'], net(images, net.space.largest))
    result['loss'].backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    losses = [F.cross_entropy(net(images, arch), targets) for arch in expected]
    for loss in losses:
        (loss / 4).backward()
    torch.testing.assert_close(result['loss'], torch.stack(losses).mean())
    for p, gradient in zip(net.parameters(), gradients):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)


def kl(student, teacher, temperature=1.):
    """KL divergence from teacher to student at a temperature, times its square; mean over the images."""
    p, q = (torch.softmax(logits.double() / temperature, -1) for logits in (teacher, student))
    return (p * (p.log() - q.log())).sum(-1).mean() * temperature ** 2


def test_inplace_distillation_begins_after_the_warmup(fitted, shift_batches):
    task = make_task(fitted, None, sampler='uniform', shift='none', archs_per_step=3, sandwich=True,
                     inplace_distillation=True, warmup_updates=1)
    images, targets = shift_batches(0)[0]
    for distilled in (False, True):
        result = task(images, targets)
        outputs = [task.get_trainable_module()(images, arch) for arch in result['archs']]
        losses = [F.cross_entropy(output, targets) for output in outputs]
        if distilled:
            losses[1:] = [kl(output, outputs[0], 1.) for output in outputs[1:]]
        assert result['loss'].item() == pytest.approx(sum(losses).item() / 3, rel=1e-5)


@pytest.mark.parametrize('groups, interval', [(3, 100), (12, 120)])
def test_the_interval_of_shifts_grows_with_the_groups(fitted, shift_batches, groups, interval):
    sampler = make_task(fitted, shift_batches, groups, shift_interval=None).sampler
    assert [update for update in range(300) if sampler.shift_is_due(update)] == [*range(interval, 300, interval)]


@pytest.mark.parametrize('with_teacher', [False, True])
def test_inplace_distillation_and_a_teacher(fitted, shift_batches, with_teacher):
    """The largest arch learns from targets and teacher; the others learn from the largest, which gets no gradient."""
    logits = torch.randn(64, 10, generator=torch.Generator().manual_seed(1))
    task = make_task(fitted, None, sampler='uniform', shift='none', archs_per_step=4, sandwich=True, seed=6,
                     inplace_distillation=True, task_loss_weight=.3, distill_loss_weight=.6, temperature=2.)
    task._teacher = (lambda images: logits) if with_teacher else None
    net, (images, targets) = task.get_trainable_module(), shift_batches(0)[0]
    result = task(images, targets)
    result['loss'].backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    outputs = [net(images, arch) for arch in result['archs']]
    first = F.cross_entropy(outputs[0], targets)
    if with_teacher:
        first = .3 * first + .6 * kl(outputs[0], logits, 2.)
    loss = (first + sum(kl(output, outputs[0].detach()) for output in outputs[1:])) / 4
    loss.backward()
    torch.testing.assert_close(result['loss'].double(), loss.double(), rtol=1e-5, atol=0)
    for p, gradient in zip(net.parameters(), gradients):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-6)


def test_the_teacher_gets_images_in_its_own_normalisation():
    net = timm.create_model('test_shiftformer_supernet', num_classes=10)
    teacher = Teacher(timm.create_model('test_vit', num_classes=10, img_size=32), net, mean=(.1, .2, .3), std=(.5,) * 3)
    images = torch.rand(2, 3, 32, 32)
    own = teacher.teacher.model.pretrained_cfg

    def normalised(mean, std):
        return (images - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)

    with torch.no_grad():
        expected = teacher.teacher.model(normalised(own['mean'], own['std']))
    torch.testing.assert_close(teacher(normalised((.1, .2, .3), (.5, .5, .5))), expected, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in teacher.teacher.parameters())


@pytest.mark.slow
def test_inplace_distillation_needs_the_sandwich_rule(fitted):
    with pytest.raises(ValueError, match='sandwich=True'):
        make_task(fitted, None, shift='none', archs_per_step=2, inplace_distillation=True)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_compilation_gives_one_graph_for_each_depth():
    """One graph serves all archs of a depth, unless a choice has the value 1, which torch treats as a constant."""
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    space = timm_shiftnas.shiftformer_space(
        embed_dim=(24, 32, 40), depth=(1, 2), num_heads=(2, 3), mlp_ratio=(1., 1.7, 3.))
    net = timm.create_model('test_shiftformer_supernet', num_classes=10, space=space)
    task = ShiftNASTask(
        net, config=ShiftNASConfig(sampler='uniform', shift='none'), generator=ArchitectureGenerator(net.space),
        groups=BudgetGroups.of_space(net.space, count=2), verbose=False)
    images = torch.randn(4, 3, 32, 32)
    noise = torch.Generator().manual_seed(1)
    archs = [net.space.smallest, net.space.largest, *(net.space.sample(noise) for _ in range(10))]
    expected = [net(images, arch).detach() for arch in archs]
    task.compile(backend=count)
    for arch, logits in zip(archs, expected):
        torch.testing.assert_close(task.get_trainable_module()(images, arch), logits, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2 and len(set(archs)) >= 10
    assert set(task.get_checkpoint_state()['state_dict']) == set(net.state_dict())
    cnn = timm.create_model('test_shiftmobilenet_supernet', num_classes=10)
    task = ShiftNASTask(
        cnn, config=ShiftNASConfig(), generator=ArchitectureGenerator(cnn.space),
        groups=BudgetGroups.of_space(cnn.space, count=2), verbose=False)
    with pytest.raises(ValueError, match='--torchcompile'):
        task.compile(backend=count)


def test_a_step_can_train_several_archs_of_the_generator(fitted, shift_batches):
    task = make_task(fitted, None, shift='none', archs_per_step=3, generator_interval=5, seed=8)
    noise = stream(8, 'arch', 0)
    drawn = task.generator.sample(task.groups.draw(task.shift.probabilities, 15, noise), noise)
    assert [arch for _ in range(5) for arch in task._draw_archs(step_of(task))] == drawn


def test_group_weights_fix_p(fitted):
    task = make_task(fitted, None, shift='none', group_weights=(1., 0., 3.))
    assert task.shift.probabilities.tolist() == [.25, 0., .75] == task.history[0][1]
    for wrong in ((1., 2.), (0., 0., 0.), (1., -1., 1.), (1., math.nan, 1.)):
        with pytest.raises(ValueError, match='weights'):
            make_task(fitted, None, shift='none', group_weights=wrong)


@pytest.mark.slow
def test_the_generator_stays_as_fitted_with_interval_0(fitted, shift_batches):
    task = make_task(fitted, None, shift='none', generator_interval=0)
    before = {name: value.clone() for name, value in task.generator.state_dict().items()}
    archs = train(task, shift_batches, 12)
    assert all(torch.equal(value, before[name]) for name, value in task.generator.state_dict().items())
    assert len(set(archs)) > 3


@pytest.mark.slow
def test_warmup_keeps_p_uniform_and_measures_the_noise(fitted, shift_batches):
    task = make_task(fitted, shift_batches, warmup_updates=9, warmup_sampler='uniform', seed=2)
    archs = train(task, shift_batches, 9)
    assert archs == [task.space.sample(stream(2, 'arch', step)) for step in range(9)]
    assert torch.equal(task.shift.theta, torch.zeros(3, dtype=torch.float64))
    assert task.shift._count == 2 and [step for step, _ in task.history] == [0, 3, 6]
    train(task, shift_batches, 1)
    assert not torch.equal(task.shift.theta, torch.zeros(3, dtype=torch.float64))


def test_micro_batches_share_an_update(fitted, shift_batches):
    task = make_task(fitted, shift_batches, accum_steps=2, generator_interval=1, shift='none')
    states = []
    for number in range(4):
        task(*shift_batches(number)[0])
        states.append(torch.cat([p.flatten() for p in task.generator.parameters()]))
    assert torch.equal(states[0], states[1]) and torch.equal(states[2], states[3])
    assert not torch.equal(states[1], states[2])
    assert task.update == 2
    task(*shift_batches(4)[0])
    task.end_update()
    assert task.update == 3


# -- the generator's step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('given, used', [(None, 8), (7, 7), (1, 2)])
def test_the_generator_step_has_the_gradient_of_both_terms(fitted, shift_batches, given, used):
    task = make_task(fitted, shift_batches, seed=3, resource_batch=8, resource_weight=10., generator_images=given)
    net, images, targets = task.get_trainable_module(), *shift_batches(0)[0]
    noise = stream(3, 'generator', 0)
    low, high = task.groups.edges[0], task.groups.edges[-1]
    spread = low + (high - low) * torch.rand(8, generator=noise, dtype=torch.float64)
    spread[0], spread[-1] = low, high
    budgets = torch.cat([task.groups.draw(task.shift.probabilities, 1, noise), spread])
    rollout = task.generator(budgets, noise=noise, tau=1.)
    masks = arch_masks(net.space, [one_hot[0] for one_hot in rollout.one_hots])
    task_loss = F.cross_entropy(net(images[:used], masks), targets[:used])
    loss = task_loss + 10 * task.generator.resource_loss(budgets, rollout.one_hots)
    expected = torch.autograd.grad(loss, list(task.generator.parameters()), retain_graph=True)
    without = torch.autograd.grad(task_loss, list(task.generator.parameters()))
    assert sum(float(g.norm()) for g in without) > 0  # the images matter
    taken = []
    hook = task.sampler.optimizer.register_step_pre_hook(
        lambda optimizer, *_: taken.extend(p.grad.clone() for p in task.generator.parameters()))
    task.sampler.update_generator(step_of(task, images, targets))
    hook.remove()
    norm = float(torch.cat([g.flatten() for g in expected]).norm())
    for a, b in zip(taken, expected, strict=True):
        torch.testing.assert_close(a, b * min(1, 1 / (norm + 1e-6)), rtol=1e-4, atol=1e-6)  # clipped to a norm of 1
    assert all(p.grad is None for p in net.parameters())


# -- the contract of timm's task ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_state_saves_and_restores(fitted, shift_batches, tmp_path):
    whole = make_task(fitted, shift_batches)
    optimizer = torch.optim.SGD(whole.get_trainable_module().parameters(), lr=1e-2)
    train(whole, shift_batches, 6, optimizer=optimizer)
    torch.save(whole.get_checkpoint_state(), tmp_path / 'state.pt')
    after = train(whole, shift_batches, 6, optimizer=optimizer)

    resumed = make_task(fitted, shift_batches)
    state = torch.load(tmp_path / 'state.pt', weights_only=True)
    resumed.load_checkpoint_state(state['state_dict'], state['task_state'])
    assert resumed.update == 6
    assert train(resumed, shift_batches, 6, lr=1e-2) == after
    assert resumed.history == whole.history and len(whole.history) == 4
    for a, b in zip(resumed.get_trainable_module().parameters(), whole.get_trainable_module().parameters()):
        assert torch.equal(a, b)
    for a, b in zip(resumed.generator.parameters(), whole.generator.parameters()):
        assert torch.equal(a, b)


def test_the_state_of_another_run_raises(fitted, shift_batches, tmp_path):
    task = make_task(fitted, shift_batches)
    state = task.get_task_state()
    with pytest.raises(ValueError, match='budget groups'):
        make_task(fitted, shift_batches, groups=4).load_task_state(state)
    with pytest.raises(ValueError, match='grad_norm'):
        make_task(fitted, shift_batches, shift='grad_norm').load_task_state(state)
    other = supernet(num_classes=7).space
    torch.save(dict(task_state=state, state_dict={}), tmp_path / 'a.pt')
    check_checkpoint(tmp_path / 'a.pt', task.space)
    with pytest.raises(ValueError, match='num_classes is 10, here it is 7'):
        check_checkpoint(tmp_path / 'a.pt', other)
    (tmp_path / 'b.pt').write_bytes(b'not a checkpoint')
    torch.save(dict(state_dict={}), tmp_path / 'c.pt')
    for name, message in (('b.pt', 'cannot be read'), ('c.pt', '--initial-checkpoint'), ('d.pt', 'does not exist')):
        with pytest.raises(ValueError, match=message):
            check_checkpoint(tmp_path / name, task.space)


def test_the_contract_of_timms_tasks(fitted, shift_batches):
    task = make_task(fitted, shift_batches)
    net = task.get_trainable_module()
    assert unwrap_model(net) is task.get_eval_model() and task.get_task_state(ema=True) == {}
    names = {name for name, _ in task.named_parameters()}
    assert names == {f'trainable_module.{name}' for name, _ in net.named_parameters()}  # without the generator
    assert isinstance(task.setup_ema(decay=.5), ModelEmaV3)
    before = task.get_trainable_module(ema=True).module.head.weight.clone()
    train(task, shift_batches, 1, lr=.1)
    task.update_ema(step=5)
    torch.testing.assert_close(
        task.get_trainable_module(ema=True).module.head.weight, (before + net.head.weight.detach()) / 2)


def test_parts_that_do_not_fit_raise(fitted, shift_batches):
    task = make_task(fitted, shift_batches)
    other = supernet(num_classes=3)
    with pytest.raises(ValueError, match='another search space'):
        ShiftNASTask(other, config=task.config, generator=task.generator, groups=task.groups,
                     shift_batches=shift_batches)
    with pytest.raises(ValueError, match='shift_batches'):
        ShiftNASTask(task.get_trainable_module(), config=task.config, generator=task.generator, groups=task.groups)
    for wrong in (dict(sampler='x'), dict(warmup_sampler='x'), dict(shift_interval=0), dict(accum_steps=0),
                  dict(archs_per_step=0), dict(archs_per_step=2, sandwich=True), dict(generator_interval=-1),
                  dict(group_weights=(1.,), shift='variation'), dict(group_weights=(1.,), sampler='uniform'),
                  dict(sampler='focusformer', generator_interval=0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ShiftNASConfig(**wrong)
