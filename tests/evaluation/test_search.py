"""`search` on a toy whose best archs are known, found by comparing all pairs of all archs."""
import json
import math
import sys
from contextlib import contextmanager

import pytest
import torch
from support.networks import tiny_supernet
from support.toy_supernet import IMAGES, Toy, all_archs, numbered_images, toy_space, true_front

import timm_shiftnas as tsn
from timm_shiftnas.evaluation.search import pareto_front, search
from timm_shiftnas.layers.conv import resize
from timm_shiftnas.models.calibration import bn_statistics
from timm_shiftnas.space import macs, params


@pytest.fixture(scope='module')
def net():
    return Toy()


@pytest.fixture(scope='module')
def generator(net):
    return tsn.ArchitectureGenerator(net.space).fit(40, progress=False)


class Images(list):
    """Batches that count how often they are read, and fail at one time."""
    reads, fails_at = 0, math.inf

    def __iter__(self):
        self.reads += 1
        if self.reads == self.fails_at:
            raise KeyboardInterrupt
        return super().__iter__()


@contextmanager
def counted(net):
    """A list that grows by one with every forward pass."""
    forwards = []
    handle = net.register_forward_hook(lambda *_: forwards.append(None))
    yield forwards
    handle.remove()


def points(result, cost='macs'):
    return [(row[cost], row['top1']) for row in result.front]


def regret(result, truth):
    """By how many points the front is below the true one, on average over the budgets of the latter."""
    front = points(result)
    return sum(top1 - max(y for x, y in front if x <= budget) for budget, top1 in truth) / len(truth)


def test_the_pareto_front_of_points():
    assert pareto_front([(2, 5.), (1, 3.), (2, 4.), (3, 5.), (1, 3.), (4, 6.)]) == [1, 0, 5]


@pytest.mark.parametrize('strategy', ['generator', 'evolutionary', 'random'])
def test_a_search_of_the_whole_space_finds_the_true_front(net, generator, strategy):
    space = toy_space(depth=(1,))  # 27 archs
    small = Toy(space)
    own = tsn.ArchitectureGenerator(space) if strategy == 'generator' else None
    found = tsn.search(small, numbered_images(), generator=own, strategy=strategy, evaluations=27, population=8)
    assert points(found) == true_front(small) and len(found.rows) == 27
    assert {space.from_dict(row['arch']) for row in found.rows} == set(all_archs(space))
    assert [space.from_dict(row['arch']) for row in found.front] == found.archs and found.bn_stats == {}


@pytest.mark.slow
def test_evolution_comes_closer_to_the_true_front_than_random_archs(net):
    truth = true_front(net)
    assert net.space.size == 3 * (9 + 81) and len(truth) == 9
    by = {strategy: [regret(search(net, numbered_images(), strategy=strategy, evaluations=70, population=16, seed=seed),
                            truth) for seed in range(3)]
          for strategy in ('evolutionary', 'random')}
    assert 0 <= sum(by['evolutionary']) < sum(by['random']) / 2


def test_a_search_is_a_function_of_its_seed_and_archs_are_measured_once(net, generator):
    torch.manual_seed(1)
    first = search(net, numbered_images(), generator=generator, evaluations=30, population=8, seed=3)
    torch.manual_seed(2)
    loader = Images(numbered_images())
    with counted(net) as forwards:
        again = search(net, loader, generator=generator, evaluations=30, population=8, seed=3)
    assert first.rows == again.rows and len(again.rows) == 30 and loader.reads == 4  # once for each generation
    assert len(forwards) == 30 * len(loader)
    assert first.rows != search(net, loader, generator=generator, evaluations=30, population=8, seed=4).rows
    for row in first.rows:
        arch = net.space.from_dict(row['arch'])
        assert row['top1'] == pytest.approx(100 * net.quality(arch) / IMAGES)
        assert (row['macs'], row['params']) == (macs(net.space, arch), params(net.space, arch))


def test_the_generators_proposals_are_in_the_first_generation(net, generator):
    groups = tsn.method.BudgetGroups.of_space(net.space, count=4)
    found = search(net, numbered_images(), generator=generator, groups=groups, evaluations=20, population=20)
    archs = [net.space.from_dict(row['arch']) for row in found.rows]
    assert {net.space.smallest, *generator.propose_many(groups.budgets)} <= set(archs)


def test_a_generation_holds_no_arch_twice_and_inactive_choices_make_no_difference(net):
    from timm_shiftnas.evaluation.nsga2 import evolve
    noise = torch.Generator().manual_seed(0)
    first = list(dict.fromkeys(net.space.sample(noise) for _ in range(12)))
    generations = evolve(net.space, first, 12, lambda arch: ((-net.quality(arch), macs(net.space, arch)), ()), seed=0)
    for archs, _ in zip(generations, range(12)):
        assert len(set(archs)) == len(archs) > 1


@pytest.mark.slow
@pytest.mark.parametrize('strategy', ['generator', 'evolutionary', 'random'])
def test_all_limits_hold_for_every_measured_arch(net, generator, strategy):
    space = net.space
    low, high = (macs(space, arch) for arch in (space.smallest, space.largest))
    flops, most = (2 * low + high) // 3, params(space, space.largest) // 2
    found = search(net, numbered_images(), generator=generator, strategy=strategy, flops=flops, params=str(most),
                   cost='params', evaluations=40, population=10)
    assert all(row['macs'] <= flops and row['params'] <= most for row in found.rows) and len(found.rows) == 40
    assert found.limits == dict(flops=flops, params=most)
    if strategy != 'random':  # the limits leave 92 archs
        truth = true_front(net, lambda arch: macs(space, arch) <= flops and params(space, arch) <= most, params)
        assert points(found, 'params')[-1][1] >= truth[-1][1] - 5


def test_an_interrupted_search_continues_and_measures_no_arch_twice(net, generator, tmp_path):
    settings = dict(generator=generator, evaluations=30, population=8, seed=1)
    whole = search(net, numbered_images(), **settings)
    first = Images(numbered_images())
    first.fails_at = 1 + 3  # the fingerprint reads once, then each generation
    with pytest.raises(KeyboardInterrupt):
        search(net, first, file=tmp_path / 'a.jsonl', **settings)
    lines = (tmp_path / 'a.jsonl').read_text().splitlines()
    assert len(lines) == 1 + 16 and json.loads(lines[-1])['arch'] == whole.rows[15]['arch']
    with open(tmp_path / 'a.jsonl', 'a') as file:
        file.write(lines[-1][:20])  # a kill may come in the middle of a line
    second = Images(numbered_images())
    with counted(net) as forwards:
        resumed = search(net, second, file=tmp_path / 'a.jsonl', **settings)
    assert resumed.rows == whole.rows and second.reads == 1 + 2 and len(forwards) == (30 - 16) * len(second)
    assert [json.loads(line)['arch'] for line in (tmp_path / 'a.jsonl').read_text().splitlines()[1:]] == [
        row['arch'] for row in whole.rows]
    # another strategy takes what it needs from the same file
    with counted(net) as forwards:
        other = search(net, numbered_images(), file=tmp_path / 'a.jsonl', strategy='random', evaluations=30)
    archs = [json.loads(line)['arch'] for line in (tmp_path / 'a.jsonl').read_text().splitlines()[1:]]
    assert archs == [row['arch'] for row in whole.rows] + [
        row['arch'] for row in other.rows if row['arch'] not in archs[:30]]
    assert len(forwards) == (len(archs) - 30) * len(second)


def test_a_file_of_other_weights_or_images_is_refused(tmp_path):
    net, images = Toy(), numbered_images()
    search(net, images, strategy='random', evaluations=2, file=tmp_path / 'a.jsonl')
    before = (tmp_path / 'a.jsonl').read_bytes()
    with pytest.raises(ValueError, match='images'):
        search(net, images[1:], strategy='random', evaluations=2, file=tmp_path / 'a.jsonl')
    with pytest.raises(ValueError, match='missing'):
        search(net, images, strategy='random', evaluations=2, file=tmp_path / 'missing' / 'a.jsonl')
    batches = [(x[i:i + 4], y[i:i + 4]) for x, y in images for i in range(0, len(x), 4)]  # the same in other batches
    assert len(batches) > len(images)
    assert len(search(net, batches, strategy='random', evaluations=2, file=tmp_path / 'a.jsonl').rows) == 2
    with torch.no_grad():
        net.scale.add_(1)
    with pytest.raises(ValueError, match='weights'):
        search(net, images, strategy='random', evaluations=2, file=tmp_path / 'a.jsonl')
    for text in ('some text\n', 'text without a line end'):
        (tmp_path / 'b.jsonl').write_text(text)
        with pytest.raises(ValueError, match='b.jsonl'):
            search(net, images, strategy='random', evaluations=2, file=tmp_path / 'b.jsonl')
        assert (tmp_path / 'b.jsonl').read_text() == text
    assert (tmp_path / 'a.jsonl').read_bytes() == before


@pytest.mark.parametrize('wrong, match', [
    (dict(flops=1000), 'flops=1000'), (dict(params='1'), 'params=1'), (dict(flops='x'), 'flops'),
    (dict(strategy='generator'), 'generator'), (dict(strategy='best'), 'best'), (dict(cost='top1'), 'top1'),
    (dict(evaluations=0), 'evaluations=0'), (dict(population=1), 'population=1'),
    (dict(evaluations=30.), r'evaluations=30\.0')])
def test_wrong_arguments_raise(net, wrong, match):
    with pytest.raises(ValueError, match=match):
        search(net, numbered_images(), **wrong)


def test_images_that_can_be_read_once_are_refused_and_so_is_a_network_that_is_no_supernet(net):
    for images in ([], (batch for batch in numbered_images())):
        with pytest.raises(ValueError, match='no images'):
            search(net, images, strategy='evolutionary', evaluations=20, population=4)
    with pytest.raises(ValueError, match='Linear'):
        search(torch.nn.Linear(2, 2), numbered_images())


def test_a_limit_that_leaves_one_arch_ends_the_search(net):
    """Draws are counted a thousand at a time: 20,000 one after the other would take a minute."""
    smallest = net.space.smallest
    found = search(
        net, numbered_images(), strategy='random', flops=macs(net.space, smallest), evaluations=200)
    assert [row['arch'] for row in found.rows] == [smallest.to_dict()]


def test_without_pymoo_an_error_says_what_to_install(net, monkeypatch):
    monkeypatch.delitem(sys.modules, 'timm_shiftnas.evaluation.nsga2', raising=False)
    monkeypatch.setitem(sys.modules, 'pymoo.algorithms.moo.nsga2', None)
    with pytest.raises(ImportError, match=r'timm_shiftnas\[search\]'):
        search(net, numbered_images())
    assert len(search(net, numbered_images(), strategy='random', evaluations=3).rows) == 3


@pytest.mark.slow
def test_subnets_with_batchnorm_are_calibrated_and_those_of_the_front_keep_their_statistics():
    net = tiny_supernet('test_shiftmobilenet_supernet')
    generator = torch.Generator().manual_seed(0)
    images = [(torch.randn(40, 3, 32, 32, generator=generator), torch.randint(10, (40,), generator=generator))]
    with pytest.raises(ValueError, match='train_loader'):
        search(net, images, strategy='random')
    found = search(net, images, strategy='random', evaluations=4, train_loader=images, bn_images=40)
    assert set(found.bn_stats) == set(found.archs)
    for arch, row in zip(found.archs, found.front, strict=True):
        subnet = tsn.calibrate_bn(tsn.extract(net, arch), images, 40, progress=False)
        torch.testing.assert_close(bn_statistics(subnet), dict(found.bn_stats[arch]))
        with torch.no_grad():
            right = subnet(resize(images[0][0], arch.resolution)).argmax(1) == images[0][1]
        assert row['top1'] == pytest.approx(100 * float(right.float().mean()))
