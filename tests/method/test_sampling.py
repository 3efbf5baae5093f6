"""Budget groups, random streams, the update of P, and signals against autograd."""
import math
import random

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from timm_shiftnas.method import (
    BudgetGroups,
    ProbabilityShift,
    create_signal,
    frozen,
    grad_norm,
    held_out_losses,
    hypergradient,
)
from timm_shiftnas.space import macs
from timm_shiftnas.utils import stream


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    return timm.create_model('test_shiftformer_supernet', num_classes=10)


# -- groups and streams ------------------------------------------------------------------------------------------------


def test_groups_cover_the_range_in_equal_parts(net):
    low, high = macs(net.space, net.space.smallest), macs(net.space, net.space.largest)
    groups = BudgetGroups.of_space(net.space, count=5)
    assert groups.edges[0] == low and groups.edges[-1] == high and groups.budgets == groups.edges[1:]
    assert len(groups) == 5
    widths = [b - a for a, b in zip(groups.edges, groups.edges[1:])]
    assert max(widths) - min(widths) < 1e-6 * high
    assert len(BudgetGroups.of_space(net.space)) == 8  # a width of 0.1 GMACs would give less than one group
    assert len(BudgetGroups.of_space(net.space, width=(high - low) / 3.2)) == 3


def test_groups_have_the_width_of_the_paper():
    space = timm.create_model('shiftformer_tiny_supernet', device='meta').space
    groups = BudgetGroups.of_space(space)
    assert len(groups) == 12  # 1.281 to 2.442 GMACs in steps of 0.1


@pytest.mark.parametrize('kwargs', [dict(count=0), dict(count=2000), dict(width=1e15), dict(width=10, count=3)])
def test_wrong_groups_raise(net, kwargs):
    with pytest.raises(ValueError, match='group'):
        BudgetGroups.of_space(net.space, **kwargs)


def test_budgets_are_drawn_with_the_probabilities():
    groups = BudgetGroups((0., 10., 20., 30.))
    p = torch.tensor([.6, .1, .3])
    budgets = groups.draw(p, 20_000, stream(0, 'test', 0))
    share = torch.histc(budgets, 3, 0, 30) / len(budgets)
    # 4 standard errors of a binomial share
    assert (share - p).abs().max() < 4 * math.sqrt(.25 / len(budgets))
    inside = budgets[budgets < 10]
    assert abs(float(inside.mean()) - 5) < 4 * 10 / math.sqrt(12 * len(inside))


def test_streams_are_functions_of_their_arguments():
    draw = [torch.rand(3, generator=stream(*key)).tolist() for key in
            [(1, 'a', 2), (1, 'a', 2), (1, 'a', 3), (2, 'a', 2), (1, 'b', 2), (2, 'a', 1)]]
    assert draw[0] == draw[1]
    assert len({tuple(values) for values in draw}) == 5


# -- the update of P ---------------------------------------------------------------------------------------------------


def test_probabilities_are_a_softmax_above_a_floor():
    shift = ProbabilityShift(4, floor=.2)
    assert torch.equal(shift.probabilities, torch.full((4,), .25, dtype=torch.float64))
    shift.theta = torch.tensor([100., 0., 0., 0.], dtype=torch.float64)
    torch.testing.assert_close(shift.probabilities, torch.tensor([.85, .05, .05, .05], dtype=torch.float64))


def test_first_hypergradient_update_by_hand():
    """Two scores determine the noise; the third moves theta towards the advantage in units of the noise."""
    beta, lr = .5, .1
    scores = torch.tensor([[1., 2., 6.], [2., 1., 5.], [2., 2., 9.]], dtype=torch.float64)
    shift = ProbabilityShift(3, momentum=beta, lr=lr)
    for row in scores[:2]:
        assert shift.observe(row)
    shift.update(scores[2])
    centred = scores - scores.mean(1, keepdim=True)
    changes = [float((b - a).square().mean()) / 2 for a, b in zip(centred, centred[1:])]
    memory = beta ** .25
    sigma = math.sqrt((changes[0] * memory + changes[1]) / (memory + 1))
    expected = lr * ((scores[2] - scores[2].mean()) / sigma).clamp(-3, 3)
    torch.testing.assert_close(shift.theta, expected)
    assert float(expected.max()) == pytest.approx(.3)  # clamped
    assert float(expected.min()) > -.3  # not clamped


@pytest.mark.parametrize('groups', [2, 8, 30, 72])
def test_noise_alone_does_not_move_p(groups):
    generator = torch.Generator().manual_seed(groups)
    shift = ProbabilityShift(groups)
    for number in range(1010):
        scores = torch.randn(groups, generator=generator) * 1e-3 + torch.randn(1, generator=generator)
        (shift.observe if number < 10 else shift.update)(scores)
    p = shift.probabilities
    assert float(p.max() / p.min()) < 1.5


def test_p_rises_for_a_group_with_higher_scores(net):
    generator = torch.Generator().manual_seed(0)
    shift = ProbabilityShift(8)
    for _ in range(200):
        scores = torch.randn(8, generator=generator)
        scores[2] += 2
        shift.update(scores + 5 * torch.randn(1, generator=generator))  # easy and hard batches
    p = shift.probabilities
    assert int(p.argmax()) == 2 and float(p[2]) > 2 / 8
    assert float(p.min()) >= .2 / 8


@pytest.mark.parametrize('signal', ['grad_norm', 'variation'])
def test_size_signals_are_proportional(signal):
    shift = ProbabilityShift(3, signal, floor=0.)
    for _ in range(200):
        shift.update(torch.tensor([1., 2., 5.]))
    torch.testing.assert_close(shift.probabilities, torch.tensor([1., 2., 5.], dtype=torch.float64) / 8)


def test_none_stays_uniform_and_scores_that_are_not_finite_are_ignored():
    shift = ProbabilityShift(3, 'none')
    for _ in range(10):
        shift.update(torch.tensor([1., 2., 5.]))
    assert torch.equal(shift.theta, torch.zeros(3, dtype=torch.float64))
    shift = ProbabilityShift(2)
    for scores in ([1., 2.], [1., math.nan], [2., math.inf], [1.1, 2.2]):
        shift.update(torch.tensor(scores))
    assert bool(shift.probabilities.isfinite().all())


def test_state_saves_and_restores(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 4, generator=generator)
    whole, first = ProbabilityShift(4), ProbabilityShift(4)
    for row in rows[:10]:
        whole.update(row + torch.arange(4)), first.update(row + torch.arange(4))
    torch.save(first.state_dict(), tmp_path / 'state.pt')
    second = ProbabilityShift(4)
    second.load_state_dict(torch.load(tmp_path / 'state.pt', weights_only=True))
    for row in rows[10:]:
        whole.update(row + torch.arange(4)), second.update(row + torch.arange(4))
    assert torch.equal(whole.probabilities, second.probabilities)
    assert not torch.equal(whole.probabilities, first.probabilities)
    with pytest.raises(ValueError, match='5 and'):
        ProbabilityShift(5).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match='grad_norm'):
        ProbabilityShift(4, 'grad_norm').load_state_dict(first.state_dict())


@pytest.mark.parametrize('kwargs', [dict(signal='nope'), dict(lr=0.), dict(momentum=1.), dict(floor=1.5)])
def test_wrong_arguments_of_the_shift_raise(kwargs):
    with pytest.raises(ValueError):
        ProbabilityShift(3, **kwargs)


# -- signals -----------------------------------------------------------------------------------------------------------


def _batches(dtype):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 3, 32, 32, generator=generator, dtype=dtype), torch.randint(10, (8,), generator=generator))
            for _ in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize('epsilon, tolerance', [(1e-5, 1e-4), (1e-3, 2e-2)])
def test_hypergradient_is_the_inner_product_of_gradients(net, epsilon, tolerance):
    """Against autograd's exact <g, grad L_train>, in float64."""
    net = timm.create_model('test_shiftformer_supernet', num_classes=10).double()
    net.load_state_dict(timm.create_model('test_shiftformer_supernet', num_classes=10).state_dict())
    train, held_out = _batches(torch.float64)
    generator = torch.Generator().manual_seed(0)
    archs = [net.space.smallest, net.space.sample(generator), net.space.largest]

    def loss(arch, batch):
        return F.cross_entropy(net(batch[0], arch), batch[1])

    def flat(value):
        gradients = torch.autograd.grad(value, list(net.parameters()), allow_unused=True)
        return torch.cat([torch.zeros(p.numel(), dtype=p.dtype) if g is None else g.flatten()
                          for p, g in zip(net.parameters(), gradients)])

    g = sum(flat(loss(arch, held_out)) for arch in archs) / len(archs)
    exact = torch.stack([g @ flat(loss(arch, train)) for arch in archs])
    scores = hypergradient(net, loss, archs, train, held_out, epsilon=epsilon)
    same = hypergradient(net, loss, archs, train, [held_out] * len(archs), epsilon=epsilon)
    assert torch.equal(scores, same)  # a batch for each group
    torch.testing.assert_close(scores, exact, rtol=tolerance, atol=0)
    # what one step on a group saves, by definition: L_val(w) - L_val(w - eta * grad)
    eta, state = 1e-6, {k: v.clone() for k, v in net.state_dict().items()}
    before = sum(float(loss(arch, held_out).detach()) for arch in archs) / len(archs)
    step = flat(loss(archs[0], train))
    with torch.no_grad():
        for p, change in zip(net.parameters(), step.split([p.numel() for p in net.parameters()])):
            p.sub_(eta * change.view_as(p))
        after = sum(float(loss(arch, held_out).detach()) for arch in archs) / len(archs)
    net.load_state_dict(state)
    assert (before - after) / eta == pytest.approx(float(scores[0]), rel=3e-2)


def test_grad_norm_and_held_out_losses_by_definition(net):
    _, held_out = _batches(torch.float32)
    arch = net.space.smallest

    def loss(arch, batch):
        return F.cross_entropy(net(batch[0], arch), batch[1])

    net.zero_grad()
    loss(arch, held_out).backward()
    gradients = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    expected = float(gradients.norm()) / math.sqrt(int((gradients != 0).sum()))
    net.zero_grad()
    assert float(grad_norm(net, loss, [arch], held_out)) == pytest.approx(expected, rel=1e-5)
    losses = held_out_losses(loss, [arch, net.space.largest], held_out)
    torch.testing.assert_close(losses[0], loss(arch, held_out).detach().double())


class _WithBatchNorm(nn.Module):
    """A network with all that a score must not change: BatchNorm, dropout, frozen weights."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.5), nn.Flatten(),
                                    nn.LazyLinear(10))

    def forward(self, x, arch):
        return self.layers(x) * arch


@pytest.mark.parametrize('name', ['hypergradient', 'grad_norm', 'variation'])
def test_signals_restore_everything(name):
    torch.manual_seed(0)
    net = _WithBatchNorm()
    train, held_out = _batches(torch.float32)
    net(train[0], 1.)
    net.layers[0].weight.requires_grad_(False)
    net.layers[3].eval()  # modules have different modes
    net.layers[5].weight.grad = torch.ones_like(net.layers[5].weight)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())

    def loss(arch, batch):
        return F.cross_entropy(net(batch[0], arch), batch[1])

    with frozen(net):
        assert net.layers[1].training and not net.layers[5].training
        signal = create_signal(name)
        first = signal(net, loss, [.5, 1., 2.], train, held_out)
        assert bool(first.isnan().all()) == (name == 'variation')  # nothing has changed before the second call
        scores, again = (signal(net, loss, [.5, 1., 2.], train, held_out) for _ in range(2))
    assert torch.equal(scores, again)  # without dropout, on batch statistics
    assert scores.dtype == torch.float64 and scores.shape == (3,)
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert modes == [m.training for m in net.modules()]
    assert torch.equal(net.layers[5].weight.grad, torch.ones_like(net.layers[5].weight))
    assert net.layers[5].bias.grad is None
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


@pytest.mark.parametrize('images, groups, parts', [
    (6, 2, [[0, 2, 4], [1, 3, 5]]), (5, 3, [[0, 3], [1, 4], [2, 3]]), (3, 3, [[0, 1], [1, 2], [2, 0]]),
    (2, 3, [[0, 1], [1, 0], [0, 1]])])
def test_every_group_sees_its_part_of_the_held_out_images(images, groups, parts):
    """At least two of them: BatchNorm has no statistics of one value."""
    net, seen = nn.Linear(1, 2), []

    def loss(arch, batch):
        if batch[0].flatten().tolist() != [9.]:
            seen.append(batch[0].flatten().tolist())
        return F.cross_entropy(net(batch[0]), batch[1])

    train = torch.tensor([[9.]]), torch.tensor([0])
    held_out = torch.arange(float(images))[:, None], torch.ones(images, dtype=torch.long)
    create_signal('hypergradient')(net, loss, list(range(groups)), train, held_out)
    assert seen == parts


def test_variation_resumes_with_its_losses_and_images():
    net = nn.Linear(1, 1)
    first, resumed = create_signal('variation'), create_signal('variation')
    first(net, lambda arch, batch: torch.tensor(arch * batch), [1., 2.], None, 4.)
    resumed.load_state_dict(first.state_dict())
    scores = resumed(net, lambda arch, batch: torch.tensor(arch * batch + 4.), [1., 2.], None, 100.)
    assert scores.tolist() == [4 / 8, 4 / 12]  # on the first batch, 4., with a loss that is higher by 4
