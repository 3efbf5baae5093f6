"""The architecture generator: its rollouts against an explicit LSTM, its proposals against enumeration."""
import copy
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_shiftnas.method import ArchitectureGenerator
from timm_shiftnas.method.proposals import BudgetWarning, enlarge
from timm_shiftnas.space import complexity, shiftformer_space
from timm_shiftnas.utils import format_count, parse_count

GEOMETRY = dict(
    img_size=(32, 32), patch_size=(8, 8), in_chans=3, num_classes=10, relative_position=True, max_relative_position=3,
    class_token=True, no_embed_class=False, pos_embed=True, final_norm=True, qkv_bias=True, proj_bias=True,
    global_pool='avg')

SMALL = shiftformer_space(
    embed_dim=(32, 48, 64), depth=(2, 3, 4, 5, 6), num_heads=(1, 2, 3), mlp_ratio=(1.0, 2.0, 3.0)).bind(**GEOMETRY)
TINY = shiftformer_space(embed_dim=(32, 48, 64), depth=(1, 2), num_heads=(1, 2), mlp_ratio=(1.0, 2.0)).bind(**GEOMETRY)
AUTOFORMER_T = shiftformer_space(
    embed_dim=(192, 216, 240), depth=(12, 13, 14), num_heads=(3, 4), mlp_ratio=(3.5, 4.0),
).bind(**{**GEOMETRY, **dict(img_size=(224, 224), patch_size=(16, 16), num_classes=1000, max_relative_position=14)})


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def spread(gen, count):
    return torch.linspace(gen.budget_min, gen.budget_max, count, dtype=torch.float64)


@pytest.fixture(scope='module')
def fitted():
    return ArchitectureGenerator(SMALL).fit(steps=600)


@pytest.fixture
def fresh():
    return ArchitectureGenerator(SMALL, seed=1)


@pytest.fixture(scope='module')
def tiny():
    """All archs of the tiny space with their MACs."""
    archs = {TINY.decode(indices) for indices in itertools.product(*(range(len(c.values)) for c in TINY.choices))}
    assert len(archs) == TINY.size
    return {arch: complexity.macs(TINY, arch) for arch in archs}


# -- rollouts ----------------------------------------------------------------------------------------------------------


class StraightThrough(torch.autograd.Function):
    """Forward: given hard decisions. Backward: the Jacobian of softmax(x / tau), (diag(p) - p p^T) / tau."""

    @staticmethod
    def forward(ctx, noisy, hard, tau):
        ctx.save_for_backward((noisy / tau).softmax(-1))
        ctx.tau = tau
        return hard.clone()

    @staticmethod
    def backward(ctx, grad):
        p, = ctx.saved_tensors
        jacobian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return torch.einsum('bij,bj->bi', jacobian, grad) / ctx.tau, None, None


def reference(gen, parameters, budgets, indices, gumbel, tau):
    """One-hots and logits for given decisions, computed with torch's LSTM cell and unpadded heads."""
    p, hidden_size = parameters, gen.hidden_size
    low, high = gen.budget_min, gen.budget_max
    position = torch.stack([(budgets - low) / (high - low), (budgets.log() - torch.tensor(low).double().log())
                            / (torch.tensor(high).double().log() - torch.tensor(low).double().log())], 1) * 2 - 1
    i, f, o, g = range(4)  # order of the gates here; torch has i, f, g, o
    order = torch.cat([torch.arange(gate * hidden_size, (gate + 1) * hidden_size) for gate in (i, f, g, o)])
    most = max(len(choice.values) for choice in gen.space.choices)
    weight_ih = torch.cat([p['budget_weight'], p['step_weight'][:most]])[:, order].T
    weight_hh, bias = p['step_weight'][most:][:, order].T, p['bias'][order]
    hidden = cell = torch.zeros(len(budgets), hidden_size, dtype=torch.float64)
    previous, one_hots, all_logits = torch.zeros(len(budgets), most, dtype=torch.float64), [], []
    for step, choice in enumerate(gen.space.choices):
        count = len(choice.values)
        hidden, cell = torch.lstm_cell(
            torch.cat([position, previous], 1), (hidden, cell), weight_ih, weight_hh, bias, torch.zeros_like(bias))
        logits = hidden @ p['head_weight'][step, :, :count] + p['head_bias'][step, :count]
        hard = torch.eye(count, dtype=torch.float64)[indices[:, step]]
        one_hot = StraightThrough.apply(logits + gumbel[:, step, :count], hard, tau)
        one_hots.append(one_hot)
        all_logits.append(logits)
        previous = F.pad(one_hot, (0, most - count))
    return one_hots, all_logits


@pytest.mark.parametrize('noisy, tau', [(True, 1.0), (True, 0.4), (False, 0.7)])
def test_rollout_and_straight_through_gradient(fresh, noisy, tau):
    gen = fresh
    budgets = spread(gen, 7)
    gumbel = gen._gumbel(7, rng(3)) * noisy
    rollout = gen(budgets, noise=rng(3) if noisy else None, tau=tau)
    parameters = {name: value.detach().double().requires_grad_() for name, value in gen.named_parameters()}
    one_hots, logits = reference(gen, parameters, budgets, rollout.indices, gumbel, tau)

    weights = [torch.randn(h.shape, generator=rng(step), dtype=torch.float64) for step, h in enumerate(one_hots)]
    for step, (ours, hard, logit) in enumerate(zip(rollout.one_hots, one_hots, logits)):
        assert set(ours.unique().tolist()) <= {0., 1.} and torch.equal(ours.double(), hard)
        noisy_logits = logit + gumbel[:, step, :logit.shape[1]]
        assert torch.equal(noisy_logits.argmax(-1), rollout.indices[:, step])
    ours = torch.autograd.grad(
        sum((h * w).sum() for h, w in zip(rollout.one_hots, weights)), gen.parameters())
    theirs = torch.autograd.grad(
        sum((h * w).sum() for h, w in zip(one_hots, weights)), list(parameters.values()))
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()


def test_log_prob_covers_active_choices_and_ignores_noise(fresh):
    gen = fresh
    budgets = spread(gen, 40)
    rollout = gen(budgets, noise=rng(3), tau=0.5)
    parameters = {name: value.double() for name, value in gen.state_dict().items()}
    _, logits = reference(gen, parameters, budgets, rollout.indices, gen._gumbel(40, rng(3)), 0.5)
    depths = set()
    for row, indices in enumerate(rollout.indices.tolist()):
        arch = SMALL.decode(indices)
        depths.add(arch.depth)
        expected = 0.
        for step in range(2 + 2 * arch.depth):  # width, depth, and two choices for each active layer
            p = logits[step][row].exp()
            expected += (p[indices[step]] / p.sum()).log()
        assert abs(rollout.log_prob[row] - expected) < 1e-4
    assert len(depths) == 5
    gradients = torch.autograd.grad(rollout.log_prob.sum(), gen.parameters())
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in gradients)


def test_samples_follow_their_probabilities():
    gen = ArchitectureGenerator(TINY, hidden_size=8)
    draws = 20_000
    rollout = gen(torch.full((draws,), 1e6), noise=rng())
    archs = [TINY.decode(indices) for indices in rollout.indices.tolist()]
    probability = dict(zip(archs, rollout.log_prob.exp().tolist()))
    assert len(probability) == TINY.size and abs(sum(probability.values()) - 1) < 1e-4
    for arch, p in probability.items():
        assert abs(archs.count(arch) / draws - p) < 5 * (p * (1 - p) / draws) ** 0.5


def test_task_gradients_reach_every_parameter(fresh):
    rollout = fresh(torch.tensor([3e6]), noise=rng(), tau=0.5)
    loss = sum(one_hot[0] @ torch.arange(1., 1 + one_hot.shape[1]) for one_hot in rollout.one_hots)
    gradients = torch.autograd.grad(loss, fresh.parameters())
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert all((gradient != 0).any(-1).all() for gradient in gradients[-2:])  # the head of every choice


def test_sample_decodes_the_rollout(fresh):
    budgets = spread(fresh, 30)
    archs = fresh.sample(budgets, rng(4))
    assert archs == [SMALL.decode(row) for row in fresh(budgets, noise=rng(4)).indices.tolist()]
    assert archs != fresh.sample(budgets, rng(5))


def test_wrong_arguments_of_rollouts_raise(fresh):
    with pytest.raises(ValueError, match='torch.Generator'):
        fresh.sample(torch.tensor([3e6]), None)
    with pytest.raises(ValueError, match=r'shape \[B\]'):
        fresh(torch.tensor(3e6))
    with pytest.raises(ValueError, match='tau=0'):
        fresh(torch.tensor([3e6]), tau=0)
    with pytest.raises(ValueError, match='not bound'):
        ArchitectureGenerator(SMALL.unbind())


# -- the resource constraint -------------------------------------------------------------------------------------------


def test_resource_loss_is_the_squared_error_relative_to_the_range(fresh):
    archs = [SMALL.smallest, SMALL.largest, SMALL.sample(rng())]
    budgets = torch.tensor([2e6, 8e6, 5e6])
    low, high = complexity.macs(SMALL, SMALL.smallest), complexity.macs(SMALL, SMALL.largest)
    errors = [complexity.macs(SMALL, arch) - budget for arch, budget in zip(archs, budgets.tolist())]
    expected = sum((error / (high - low)) ** 2 for error in errors) / 3
    assert fresh.resource_loss(budgets, SMALL.one_hot(archs)).item() == pytest.approx(expected, rel=1e-12)


def test_resource_loss_gradient_by_finite_differences(fresh):
    generator = rng()
    soft = [
        torch.randn(4, len(c.values), generator=generator, dtype=torch.float64).softmax(-1).requires_grad_()
        for c in SMALL.choices]
    budgets = spread(fresh, 4)
    gradients = torch.autograd.grad(fresh.resource_loss(budgets, soft), soft)
    for step, gradient in enumerate(gradients):
        for row, value in itertools.product(range(4), range(gradient.shape[1])):
            shifted = []
            for sign in (1, -1):
                moved = [tensor.detach().clone() for tensor in soft]
                moved[step][row, value] += sign * 1e-4
                shifted.append(fresh.resource_loss(budgets, moved))
            assert (shifted[0] - shifted[1]) / 2e-4 == pytest.approx(gradient[row, value].item(), rel=1e-5, abs=1e-9)


@pytest.mark.slow
def test_fit_meets_budgets_including_the_ends(fitted):
    def error(budget, draws=200):
        one_hots = fitted(torch.full((draws,), float(budget)), noise=rng()).one_hots
        return ((complexity.macs(SMALL, one_hots) - budget).abs().mean() / budget).item()

    errors = [error(budget) for budget in spread(fitted, 12).tolist()]
    assert sum(errors) / len(errors) < 0.08 and errors[-1] < 0.05  # untrained: 0.87 and 0.68
    assert errors[0] < 0.25  # untrained: 4; the MACs of the next larger arch are 6% higher
    assert len(set(fitted.sample(torch.full((256,), 4.7e6), rng()))) > 25


def test_fit_covers_the_whole_range_and_both_ends(fresh):
    budgets = torch.stack([fresh._fit_budgets(64, generator) for generator in [rng()] for _ in range(50)])
    assert budgets.min() == fresh.budget_min
    assert torch.allclose(budgets.max(1).values, torch.tensor(float(fresh.budget_max)).double(), rtol=1e-12)
    assert (budgets.min(1).values == fresh.budget_min).all()
    shares = torch.histc(budgets, 10, fresh.budget_min, fresh.budget_max) / budgets.numel()
    assert shares.min() > 0.05


def test_fit_is_reproducible_and_has_no_side_effects(capfd):
    first, second = (ArchitectureGenerator(TINY).train(mode).fit(steps=5, seed=3) for mode in (True, False))
    assert first.training and not second.training
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert all(parameter.grad is None for parameter in first.parameters())
    other = ArchitectureGenerator(TINY).fit(steps=5, seed=4)
    assert not torch.equal(first.bias, other.bias) and not torch.equal(first.bias, ArchitectureGenerator(TINY).bias)
    assert capfd.readouterr() == ('', '')  # no progress bar, because this is not a terminal
    with torch.no_grad():
        third = ArchitectureGenerator(TINY).fit(steps=5, seed=3)
    assert torch.equal(first.bias, third.bias)
    with pytest.raises(ValueError, match='batch_size=1'):
        first.fit(batch_size=1)


# -- proposals ---------------------------------------------------------------------------------------------------------


def reachable(space):
    """MACs of all archs of a space. MACs add up over layers, so sums of the layers' costs are enough."""
    total = set()
    kinds = list(itertools.product(space.values('num_heads'), space.values('mlp_ratio')))

    def macs(dim, layers):
        heads, ratios = zip(*layers)
        arch = space.arch(embed_dim=dim, depth=len(layers), num_heads=heads, mlp_ratio=ratios)
        return complexity.macs(space, arch)

    for dim in space.values('embed_dim'):
        two, three = macs(dim, kinds[:1] * 2), macs(dim, kinds[:1] * 3)
        cost = [macs(dim, [kind, kinds[0]]) - two + (three - two) for kind in kinds]
        sums = {two - 2 * (three - two)}
        for depth in range(1, space.values('depth')[-1] + 1):
            sums = {a + b for a in sums for b in cost}
            total |= sums if depth in space.values('depth') else set()
    return torch.tensor(sorted(total), dtype=torch.float64)


@pytest.mark.slow
def test_proposals_use_nearly_as_much_as_the_best_arch(fitted):
    every = reachable(SMALL)
    assert every[0] == fitted.budget_min and every[-1] == fitted.budget_max
    budgets = spread(fitted, 50)
    used = complexity.macs(SMALL, fitted.propose_many(budgets.tolist()))
    best = torch.stack([every[every <= budget].max() for budget in budgets])
    assert (used <= budgets).all()
    assert (used / best).mean() >= 0.99 and (used / best).min() >= 0.97


@pytest.mark.exhaustive
@pytest.mark.slow
def test_proposals_of_autoformer_t():
    gen = ArchitectureGenerator(AUTOFORMER_T).fit(steps=250)
    budgets = spread(gen, 50)
    used = complexity.macs(AUTOFORMER_T, gen.propose_many(budgets.tolist())) / budgets
    assert used.max() <= 1 and used.mean() >= 0.99 and used.min() >= 0.97
    error = (complexity.macs(AUTOFORMER_T, gen.sample(budgets.repeat(4), rng())) / budgets.repeat(4) - 1).abs()
    assert error.mean() < 0.05  # of samples without selection; untrained: 0.14


@pytest.mark.slow
def test_proposals_depend_only_on_weights_and_budget(fitted):
    budgets = [*spread(fitted, 21).tolist(), '3M', 3e6]
    single = [fitted.propose(budget) for budget in budgets]
    assert single[-1] == single[-2]
    torch.manual_seed(5)
    fitted.sample(torch.tensor([4e6]), rng(8))
    assert fitted.propose_many(budgets[::-1])[::-1] == single
    assert fitted.propose_many([]) == []
    again = ArchitectureGenerator(SMALL, seed=9)
    assert again.propose_many(budgets) != single
    again.load_state_dict(fitted.state_dict())
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert again.propose_many(budgets) == single
        narrow = again(spread(again, 9), noise=rng())
    assert torch.equal(narrow.log_prob, fitted(spread(fitted, 9), noise=rng()).log_prob)


@pytest.mark.slow
def test_proposal_is_the_most_probable_close_candidate(fitted, fresh):
    # without these weights the argmax is the same for every budget, and none of the 64 samples equals it
    nn.init.zeros_(fresh.budget_weight)
    greedy = SMALL.decode(fresh(torch.tensor([4e6])).indices[0].tolist())
    ranks, cases = set(), [(fitted, budget) for budget in spread(fitted, 30).tolist()]
    for gen, budget in [*cases, (fresh, complexity.macs(SMALL, greedy))]:
        candidates = []
        for noise, rows in ((None, 1), (rng(0), 64)):
            rollout = gen(torch.full((rows,), budget, dtype=torch.float64), noise=noise)
            candidates += zip(rollout.log_prob.tolist(), (SMALL.decode(row) for row in rollout.indices.tolist()))
        close = [(p, arch) for p, arch in candidates if 0.99 * budget <= complexity.macs(SMALL, arch) <= budget]
        if close:
            p, likeliest = max(close, key=lambda item: item[0])
            assert gen.propose(budget) == likeliest
            ranks.add(sorted({p for p, _ in candidates}, reverse=True).index(p))
    assert len(ranks) > 3  # the most probable candidate is often not close
    assert likeliest == greedy and greedy not in [arch for _, arch in candidates[1:]]


def neighbours(space, arch):
    """Archs that differ in one choice; layers added by a larger depth have the smallest values."""
    here = space.encode(arch)
    active = [c.layer is None or c.layer < arch.depth for c in space.choices]
    for i, choice in enumerate(space.choices):
        for value in range(len(choice.values)) if active[i] else ():
            yield space.decode([*here[:i], value, *here[i + 1:]])


def climb(macs, arch, budget):
    """Repeat the single change with the most MACs within the budget until none adds any; return the MACs."""
    while True:
        fitting = [other for other in neighbours(TINY, arch) if macs[other] <= budget]
        best = max(fitting, key=lambda other: macs[other])
        if macs[best] <= macs[arch]:
            return macs[arch]
        arch = best


@pytest.mark.slow
def test_enlarge_against_brute_force(tiny):
    gen = ArchitectureGenerator(TINY, seed=2)
    below, best = 0, 0
    for budget in spread(gen, 101).tolist():
        arch = gen.propose(budget)
        assert tiny[arch] <= budget
        if tiny[arch] < 0.99 * budget:
            below += 1
            assert max(tiny[other] for other in neighbours(TINY, arch) if tiny[other] <= budget) == tiny[arch]
        best += tiny[arch] >= 0.99 * max(macs for macs in tiny.values() if macs <= budget)
        for start in (TINY.smallest, arch):
            ended = enlarge(gen.choices, torch.tensor(budget), torch.tensor([TINY.encode(start)]))
            assert tiny[TINY.decode(ended.tolist())] == climb(tiny, start, budget)
    assert below > 20 and best > 90


def test_enlarge_returns_the_best_of_several_starts(tiny):
    gen = ArchitectureGenerator(TINY)
    different = 0
    for budget in spread(gen, 60).tolist():
        starts = [arch for arch, macs in sorted(tiny.items(), key=lambda item: item[1]) if macs <= budget][:5]
        ended = enlarge(gen.choices, torch.tensor(budget), torch.tensor([TINY.encode(arch) for arch in starts]))
        reached = [climb(tiny, arch, budget) for arch in starts]
        different += len(set(reached)) > 1
        assert tiny[TINY.decode(ended.tolist())] == max(reached)
    assert different > 5


@pytest.mark.parametrize('steps', [0, 3])
def test_proposals_at_the_ends_of_the_range(steps):
    gen = ArchitectureGenerator(SMALL).fit(steps=steps)
    low, high = gen.budget_min, gen.budget_max
    assert (low, high) == tuple(complexity.macs(SMALL, arch) for arch in (SMALL.smallest, SMALL.largest))
    assert gen.propose(low) == SMALL.smallest
    for budget in (high, high * 1.005, high * 1.01):
        assert 0.99 * high <= complexity.macs(SMALL, gen.propose(budget)) <= high
    for budget in (high * 1.011, '10G'):
        with pytest.warns(BudgetWarning, match='8.845M MACs'):
            assert 0.99 * high <= complexity.macs(SMALL, gen.propose(budget)) <= high
    for budget in (low - 1, f'{low / 2}'):
        with pytest.raises(ValueError) as error:
            gen.propose(budget)
        message = str(error.value)
        assert f'flops={budget}'[:20] in message and '572k' in message and '8.845M' in message
        typed = message.split('give flops=')[1].split()[0]
        gen.propose(typed)  # the value that the message suggests is accepted
    for budget in ('abc', 0, -1e6, float('nan'), None, '3 apples'):
        with pytest.raises(ValueError, match='is not a budget'):
            gen.propose_many([high, budget])


def test_a_space_of_one_arch():
    space = shiftformer_space(embed_dim=[32], depth=[2], num_heads=[1], mlp_ratio=[2.0]).bind(**GEOMETRY)
    gen = ArchitectureGenerator(space).fit(steps=2)
    budgets = torch.tensor([gen.budget_max])
    rollout = gen(budgets, noise=rng())
    assert gen.propose(gen.budget_max) == space.largest and gen.resource_loss(budgets, rollout.one_hots) == 0
    assert rollout.log_prob.tolist() == [0.] and all(p.isfinite().all() for p in gen.parameters())


@pytest.mark.slow
def test_proposals_for_a_number_of_parameters(fitted):
    low, high = complexity.params(SMALL, SMALL.smallest), complexity.params(SMALL, SMALL.largest)
    proposals = {
        arch: (complexity.macs(SMALL, arch), complexity.params(SMALL, arch))
        for arch in fitted.propose_many(spread(fitted, 256).tolist())}

    def best(limit, order=lambda counts: counts):
        return max((counts for counts in proposals.values() if counts[1] <= limit), key=order)

    larger = [  # limits at which the proposal of most MACs is not the one of most parameters
        size for _, size in proposals.values() if best(size) != best(size, order=lambda counts: counts[::-1])]
    for budget in (larger[len(larger) // 2], '0.1M', high - 1):
        proposed, limit = fitted.propose_for_params(budget), parse_count(budget)
        if best(limit)[1] >= 0.99 * limit:
            assert proposals[proposed] == best(limit)
        else:  # enlarged
            assert complexity.params(SMALL, proposed) <= limit and complexity.macs(SMALL, proposed) >= best(limit)[0]
    with pytest.raises(ValueError) as error:
        fitted.propose_for_params(low - 1)
    assert all(format_count(end) in str(error.value) for end in (low, high))
    assert fitted.propose_for_params(str(error.value).split('give params=')[1].split()[0]) == SMALL.smallest
    with pytest.raises(ValueError, match="params='abc'"):
        fitted.propose_for_params('abc')


# -- as a module -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_global_random_state_is_neither_read_nor_written():
    def run(seed):
        torch.manual_seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), random.getstate()
        gen = ArchitectureGenerator(TINY, seed=2).fit(steps=3)
        archs = gen.propose_many(spread(gen, 5).tolist()) + gen.sample(spread(gen, 5), rng())
        archs.append(gen.propose_for_params(complexity.params(TINY, TINY.largest)))
        assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
        return archs, gen.state_dict()

    (archs, state), (others, other_state) = run(0), run(1)
    assert archs == others and all(torch.equal(state[name], other_state[name]) for name in state)
    assert not torch.equal(ArchitectureGenerator(TINY, seed=0).bias, ArchitectureGenerator(TINY, seed=1).bias)


def test_stays_on_the_cpu_in_float32(fresh):
    before = copy.deepcopy(fresh.state_dict())
    owner = nn.ModuleList([fresh, nn.Linear(2, 2)]).to('meta', torch.bfloat16)
    assert owner[1].weight.device.type == 'meta'
    with torch.device('meta'):
        fresh.propose(3e6)
    for name, tensor in fresh.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name])
    assert copy.deepcopy(fresh).propose(3e6) == fresh.propose(3e6)
