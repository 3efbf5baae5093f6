"""The samplers of other methods, each against its definition."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from support.toy_supernet import Toy, all_archs, toy_space

import timm_shiftnas as tsn
from timm_shiftnas.method import ArchitectureGenerator, BudgetGroups
from timm_shiftnas.method.config import ShiftNASConfig
from timm_shiftnas.method.samplers import SAMPLERS, Step
from timm_shiftnas.method.samplers.pre_nas import IMAGES, score_of, selectivity
from timm_shiftnas.method.task import ShiftNASTask
from timm_shiftnas.space import macs
from timm_shiftnas.utils import Ranks, stream

RIVALS = sorted(set(SAMPLERS) - {'shiftnas', 'uniform'})


SMALL = dict(embed_dim=(24, 32), depth=(1, 2), num_heads=(1, 2, 3), mlp_ratio=(1., 2., 3.))


def supernet(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('test_shiftformer_supernet', num_classes=10, img_size=16, drop_rate=.3, **kwargs)


def batch(number=0, size=12):
    noise = torch.Generator().manual_seed(number)
    return torch.randn(size, 3, 16, 16, generator=noise), torch.randint(10, (size,), generator=noise)


def make_sampler(name, net, generator=None, groups=4, **config):
    generator = generator or ArchitectureGenerator(net.space)
    return SAMPLERS[name](
        ShiftNASConfig(sampler=name, **config), generator, BudgetGroups.of_space(net.space, count=groups))


def step_of(net, images, targets, number=0, criterion=F.cross_entropy):
    return Step(update=number, micro_step=number, net=net, criterion=criterion, held_out_loss=F.cross_entropy,
                images=images, targets=targets, device=torch.device('cpu'), ranks=Ranks())


def test_every_name_of_the_setting_has_a_sampler():
    setting = next(each for each in tsn.method.settings_of(ShiftNASConfig) if each.name == 'sampler')
    assert set(setting.choices) == set(SAMPLERS)


# -- AttentiveNAS ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name, choose', [('attentivenas_best_up', min), ('attentivenas_worst_up', max)])
def test_attentivenas_takes_the_best_or_the_worst_of_its_candidates_on_the_batch(name, choose):
    net, (images, targets) = supernet().train(), batch()
    sampler = make_sampler(name, net, sampler_candidates=5, seed=2)
    before = copy.deepcopy(net.state_dict())
    archs = sampler.draw(step_of(net, images, targets, number=7), 2)
    noise, plain = stream(2, 'arch', 7), copy.deepcopy(net).eval()  # dropout is off
    for arch in archs:
        candidates = sampler.candidates(noise)
        with torch.no_grad():
            losses = [float(F.cross_entropy(plain(images, each), targets)) for each in candidates]
        assert len(set(losses)) == 5 and arch == candidates[losses.index(choose(losses))]
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert sampler.searches


@pytest.mark.slow
def test_attentivenas_draws_targets_as_uniform_sampling_does_and_candidates_near_them():
    net = supernet()
    sampler = make_sampler('attentivenas_best_up', net, sampler_candidates=4)
    noise = torch.Generator().manual_seed(5)
    uniform = macs(net.space, [net.space.sample(noise) for _ in range(1500)])
    drawn = [sampler.bins(macs(net.space, sampler.candidates(noise))) for _ in range(400)]
    same = sum(int(len(bins.unique()) == 1) for bins in drawn) / len(drawn)
    assert same > .9  # all candidates in one bin, of 32
    of_uniform, of_targets = (torch.bincount(bins, minlength=32) / len(bins) for bins in (
        sampler.bins(uniform), torch.stack(drawn)[:, 0]))
    assert float((of_uniform - of_targets).abs().sum()) / 2 < .15  # total variation: 0.1 by chance


# -- FocusFormer -------------------------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_samples_and_add_up_to_1():
    space = toy_space(num_heads=(1, 2))
    generator = ArchitectureGenerator(space)
    budgets = torch.full((6,), 5e5, dtype=torch.float64)
    rollout = generator(budgets, noise=torch.Generator().manual_seed(0))
    torch.testing.assert_close(generator.log_prob(budgets, rollout.indices), rollout.log_prob)
    indices = torch.tensor([space.encode(arch) for arch in all_archs(space)])
    total = generator.log_prob(torch.full((len(indices),), 5e5, dtype=torch.float64), indices).exp().sum()
    assert float(total.detach()) == pytest.approx(1, abs=1e-5)


def test_log_probabilities_have_the_gradient_of_finite_differences():
    generator = ArchitectureGenerator(toy_space())
    budgets = torch.full((1,), 6e5, dtype=torch.float64)
    indices = generator(budgets, noise=torch.Generator().manual_seed(0)).indices
    gradient, = torch.autograd.grad(generator.log_prob(budgets, indices).sum(), [generator.step_weight])
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            generator.step_weight.add_(sign * 1e-2 * direction)
            values.append(float(generator.log_prob(budgets, indices)))
            generator.step_weight.sub_(sign * 1e-2 * direction)
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(float((gradient * direction).sum()), rel=2e-2)


def test_focusformer_steps_along_the_policy_gradient():
    net, (images, targets) = supernet(), batch()
    sampler = make_sampler('focusformer', net, sampler_candidates=4, seed=1, resource_weight=0., generator_images=6)
    generator, noise = sampler.generator, stream(1, 'generator', 0)
    budgets = sampler.groups.draw(sampler.shift.probabilities, 1, noise).expand(4)
    indices = generator(budgets, noise=noise).indices
    plain = copy.deepcopy(net).eval()
    with torch.no_grad():
        losses = torch.stack([F.cross_entropy(plain(images[:6], net.space.decode(row)), targets[:6])
                              for row in indices.tolist()]).double()
    advantages = (losses.mean() - losses) / losses.std()
    objective = (advantages * generator.log_prob(budgets, indices)).mean()
    expected = torch.autograd.grad(-objective, list(generator.parameters()))
    taken = []
    hook = sampler.optimizer.register_step_pre_hook(
        lambda *_: taken.extend(p.grad.clone() for p in generator.parameters()))
    sampler.update(step_of(net, images, targets))
    hook.remove()
    norm = float(torch.cat([g.flatten() for g in expected]).norm())
    for a, b in zip(taken, expected, strict=True):
        torch.testing.assert_close(a, b.float() * min(1, 1 / (norm + 1e-6)), rtol=1e-3, atol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_focusformer_learns_which_archs_are_best_at_their_budget():
    net = Toy()
    generator = ArchitectureGenerator(net.space).fit(300, progress=False)
    sampler = make_sampler('focusformer', net, generator, sampler_candidates=6, generator_interval=1,
                           generator_images=200, generator_lr=3e-3)
    images = torch.arange(200).float().view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    targets = torch.zeros(200, dtype=torch.long)
    budgets = torch.linspace(*(sampler.groups.edges[::4]), 200, dtype=torch.float64)

    def drawn():
        archs = generator.sample(budgets, torch.Generator().manual_seed(9))
        off = (macs(net.space, archs) - budgets).abs().mean() / (sampler.groups.edges[-1] - sampler.groups.edges[0])
        return sum(map(net.quality, archs)) / len(archs), float(off)

    before, _ = drawn()
    for number in range(80):
        sampler.update(step_of(net, images, targets, number))
    after, off = drawn()
    assert after > before + 10 and off < .1


# -- PreNAS ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_score_of_an_arch_is_the_sum_of_weight_times_gradient():
    net, (images, _) = supernet().train(), batch()
    before = copy.deepcopy(net.state_dict())
    scores = selectivity(net, images, torch.Generator().manual_seed(3))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()) and net.training
    plain = copy.deepcopy(net).eval()
    plain(torch.randn(IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(3))).sum().backward()
    gradients = copy.deepcopy(net)  # a network whose weights are the gradients, so that subnets have their parts
    with torch.no_grad():
        for weight, own in zip(gradients.parameters(), plain.parameters()):
            weight.copy_(own.grad)
    for arch in (net.space.smallest, net.space.sample(torch.Generator().manual_seed(0)), net.space.largest):
        pairs = zip(tsn.extract(plain, arch).parameters(), tsn.extract(gradients, arch).parameters(), strict=True)
        expected = sum(float((w * g).detach().abs().double().sum()) for w, g in pairs)
        assert score_of(scores, arch) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_prenas_draws_the_candidate_of_highest_score_of_each_group_and_no_other():
    net, (images, targets) = supernet(space=tsn.shiftformer_space(**SMALL)), batch()
    generator = ArchitectureGenerator(net.space).fit(40, progress=False)
    sampler = make_sampler('prenas', net, generator, groups=2, seed=4)
    sampler.update(step_of(net, images, targets))
    scores = selectivity(net, images, stream(4, 'prenas', 0))
    edges = sampler.groups.edges
    for low, high, arch, archs in zip(edges, edges[1:], sampler.preferred, sampler.candidates()):
        assert low < macs(net.space, arch) <= high and len(archs) > 3
        assert score_of(scores, arch) == max(score_of(scores, each) for each in archs)
    first = list(sampler.preferred)
    drawn = [sampler.draw(step_of(net, images, targets, number), 1)[0] for number in range(60)]
    assert set(drawn) == set(first) and min(map(drawn.count, first)) > 15
    with torch.no_grad():
        net.head.weight.mul_(-3)
    sampler.update(step_of(net, images, targets, 1))  # chosen once
    assert sampler.preferred == first == sampler.archs_for_budgets() and not sampler.proposes


# -- all of them -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('name', RIVALS)
def test_a_resumed_training_draws_what_the_whole_one_does(name, tmp_path):
    def make_task():
        net = supernet(space=tsn.shiftformer_space(**SMALL))
        return ShiftNASTask(
            net, config=ShiftNASConfig(sampler=name, generator_interval=2, shift='hypergradient', resource_batch=8),
            generator=ArchitectureGenerator(net.space), groups=BudgetGroups.of_space(net.space, count=3), verbose=False)

    def train(task, numbers):
        optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=1e-2)
        archs = []
        for number in numbers:
            result = task(*batch(number))
            result['loss'].backward()
            optimizer.step()
            optimizer.zero_grad()
            archs += result['archs']
        return archs

    whole = make_task()
    train(whole, range(3))
    torch.save(whole.get_checkpoint_state(), tmp_path / 'state.pt')
    torch.manual_seed(1)
    after = train(whole, range(3, 8))
    resumed = make_task()
    state = torch.load(tmp_path / 'state.pt', weights_only=True)
    resumed.load_checkpoint_state(state['state_dict'], state['task_state'])
    torch.manual_seed(1)  # of dropout
    assert train(resumed, range(3, 8)) == after and len(set(after)) > 1
    for a, b in zip(resumed.generator.parameters(), whole.generator.parameters()):
        assert torch.equal(a, b)
    assert whole.history == [(0, [1 / 3] * 3)]  # no shift, whatever the setting says
