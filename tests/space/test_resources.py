"""Resources against what torch allocates, files of weights, finite differences, and each other."""
import dataclasses
import itertools

import pytest
import torch
from support.devices import device_of
from support.memory import allocated_bytes, weight_bytes
from support.networks import rng, tiny_supernet

import timm_shiftnas as tsn
from timm_shiftnas.method import ArchitectureGenerator, BudgetGroups
from timm_shiftnas.method.proposals import BudgetWarning, enlarge
from timm_shiftnas.space import MACS, MEMORY, PARAMS, RESOURCES, SIZES, family_of
from timm_shiftnas.space.latency import find_resource, read_device
from timm_shiftnas.utils.units import format_quantity, parse_quantity

ONCE_FOR_ALL = tsn.shiftmobilenet_space(
    resolution=[32, 40], width=[[8], [8], [16, 24], [24, 32], [64]], depth=[[1, 2], [1, 2]], kernel_size=[3, 5],
    expand_ratio=[3, 4], per_block=True, stem_block=True, stride=[2, 1], se=[False, True], act='hard_swish',
    head='efficient', shortcut='identity', kernel='transform')
NETWORKS = {
    'shiftformer': lambda: tiny_supernet(),
    'plain_shiftformer': lambda: tiny_supernet(relative_position=False, act_layer='quick_gelu'),
    'shiftmobilenet': lambda: tiny_supernet('test_shiftmobilenet_supernet'),
    'once_for_all': lambda: tiny_supernet('shiftmobilenet_supernet', space=ONCE_FOR_ALL),
    'elastic_vit': lambda: tsn.elastic('test_vit', img_size=64),
    'elastic_cnn': lambda: tsn.elastic('test_efficientnet', img_size=64),
}


@pytest.fixture(scope='module', params=NETWORKS)
def net(request):
    return NETWORKS[request.param]()


def archs_of(space, count=4):
    generator = rng(1)
    return [space.smallest, space.largest, *(space.sample(generator) for _ in range(count))]


# -- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_peak_memory_is_what_torch_allocates(net):
    for arch in archs_of(net.space, 2):
        subnet = tsn.extract(net, arch)
        allocated = allocated_bytes(subnet, torch.randn(1, *subnet.pretrained_cfg['input_size']))
        assert MEMORY.count(net.space, arch) == allocated.peak, allocated.at_peak


def test_sizes_are_those_of_the_tensors_of_a_subnet(net):
    for arch in archs_of(net.space, 2):
        expected = weight_bytes(tsn.extract(net, arch))
        assert {name: size.count(net.space, arch) for name, size in SIZES.items()} == expected


def test_the_table_of_operators_agrees_with_macs_and_parameters(net):
    space = net.space
    archs = archs_of(space)
    table = family_of(space).operator_table(space, space.one_hot(archs))
    assert torch.equal(table.column('macs').sum(-1).long(), MACS.count(space, archs))
    assert torch.equal((table.column('matrix') + table.column('vectors')).sum(-1).long(), PARAMS.count(space, archs))


def test_a_batch_gives_what_single_archs_give(net):
    archs = archs_of(net.space)
    for resource in (*RESOURCES.values(), device_of(net.space).resource(net.space)):
        assert resource.count(net.space, archs).tolist() == pytest.approx(
            [resource.count(net.space, arch) for arch in archs], rel=1e-12)


def test_gradients_are_those_of_finite_differences(net):
    """Memory is a maximum: where several operators leave as much, its derivative lies between those of both sides."""
    space, epsilon = net.space, 1e-5
    one_hots = [each.requires_grad_() for each in space.one_hot(space.sample(rng(3)))]
    direction = [torch.rand(each.shape, generator=rng(4), dtype=torch.float64) for each in one_hots]
    for resource in (*RESOURCES.values(), device_of(space).resource(space)):
        here = resource.count(space, one_hots)
        gradients = torch.autograd.grad(here, one_hots, materialize_grads=True)
        slope = sum((gradient * along).sum() for gradient, along in zip(gradients, direction))
        with torch.no_grad():
            ahead, behind = (
                resource.count(space, [each + step * along for each, along in zip(one_hots, direction)])
                for step in (epsilon, -epsilon))
        sides = sorted([((ahead - here) / epsilon).item(), ((here - behind) / epsilon).item()])
        assert slope > 0 and sides[0] - 1e-3 * slope <= slope <= sides[1] + 1e-3 * slope


def test_the_smallest_arch_needs_least_and_the_largest_most(net):
    archs = archs_of(net.space, 6)
    for resource in (*RESOURCES.values(), device_of(net.space).resource(net.space)):
        low, high = resource.range(net.space)
        assert all(low <= resource.count(net.space, arch) <= high for arch in archs)


# -- units -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('text, kind, value', [
    ('8ms', 'seconds', 8e-3), ('0.8 s', 'seconds', .8), ('250us', 'seconds', 250e-6), (.5, 'seconds', .5),
    ('5MB', 'bytes', 5e6), ('64MiB', 'bytes', 64 * 2 ** 20), ('2e3kB', 'bytes', 2e6), ('100', 'bytes', 100),
    ('1.4G', 'count', 1.4e9), ('100m', 'count', 1e8)])
def test_units(text, kind, value):
    assert parse_quantity(text, kind, 'x') == pytest.approx(value, rel=1e-12)
    assert parse_quantity(format_quantity(value, kind), kind, 'x') == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize('text, kind, named', [
    ('8M', 'seconds', '8ms'), ('8MB', 'seconds', '8ms'), ('8ms', 'bytes', '5MB'), ('5M', 'bytes', '5MB'),
    ('5MB', 'count', '1.4G'), ('-1ms', 'seconds', '8ms'), (0, 'bytes', '5MB'), ('ms', 'seconds', '8ms')])
def test_other_units_name_those_that_fit(text, kind, named):
    with pytest.raises(ValueError, match=named):
        parse_quantity(text, kind, 'x')


# -- budgets -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def tiny():
    return tiny_supernet('test_shiftmobilenet_supernet').space


@pytest.fixture(scope='module')
def generator(tiny):
    return ArchitectureGenerator(tiny).fit(steps=60, progress=False)


@pytest.mark.slow
def test_all_of_several_budgets_hold_and_none_leaves_room(tiny, generator):
    latency = device_of(tiny).resource(tiny)
    resources = [MACS, PARAMS, SIZES['int8'], MEMORY, latency]
    noise = rng(2)
    for pair in [*itertools.combinations(resources, 2)][2::5]:
        limits = {}
        for resource in pair:
            low, high = resource.range(tiny)
            limits[resource] = low + (high - low) * (.1 + .6 * torch.rand((), generator=noise).item())
        arch = generator.propose_within(limits)
        used = {resource: resource.count(tiny, arch) / limit for resource, limit in limits.items()}
        assert max(used.values()) <= 1
        if max(used.values()) < .99:  # then no single change adds MACs
            start = torch.tensor([tiny.encode(arch)])
            most = torch.tensor(limits.get(MACS, MACS.range(tiny)[1]), dtype=torch.float64)
            ended = enlarge(generator.choices, most, start, MACS, list(limits.items()))
            assert tiny.decode(ended.tolist()) == arch


def test_the_tightest_of_budgets_that_no_arch_meets_is_named(tiny, generator):
    low = MEMORY.range(tiny)[0]
    limits = {PARAMS: PARAMS.range(tiny)[0], MEMORY: low / 2, MACS: '1G'}
    with pytest.raises(ValueError, match=f'memory={low // 2}.*give memory={low} .*tightest'):
        generator.propose_within(limits)
    assert generator.propose_within({**limits, MEMORY: low}) == tiny.smallest


def test_budgets_above_the_largest_arch_give_it_with_its_macs(tiny, generator):
    with pytest.warns(BudgetWarning, match=MACS.describe(MACS.range(tiny)[1])):
        assert generator.propose_within({MEMORY: '1GB', PARAMS: '1G'}) == tiny.largest


@pytest.mark.slow
@pytest.mark.parametrize('name', ['memory', 'size_int8', 'latency'])
def test_a_generator_of_another_resource_meets_its_budgets(tiny, name):
    resource = device_of(tiny).resource(tiny) if name == 'latency' else RESOURCES[name]
    groups = BudgetGroups.of_space(tiny, count=4, resource=resource)
    assert (groups.edges[0], groups.edges[-1]) == resource.range(tiny)
    generator = ArchitectureGenerator(tiny, resource=resource)
    before = generator.resource_loss(torch.tensor(groups.edges), generator(torch.tensor(groups.edges)).one_hots)
    generator.fit(steps=60, progress=False)
    after = generator.resource_loss(torch.tensor(groups.edges), generator(torch.tensor(groups.edges)).one_hots)
    assert after < before / 2
    for budget, arch in zip(groups.budgets, generator.propose_many(groups.budgets)):
        assert .9 * budget < resource.count(tiny, arch) <= budget


def test_other_resources_have_as_many_groups_as_macs(tiny):
    assert len(BudgetGroups.of_space(tiny, resource=MEMORY)) == len(BudgetGroups.of_space(tiny))


# -- device files ------------------------------------------------------------------------------------------------------


def test_a_device_file_is_written_and_read(tiny, tmp_path):
    device = device_of(tiny, versions=dict(torch='1'), machine='m')
    device.write(tmp_path / 'x.json')
    assert read_device(tmp_path / 'x.json') == device
    assert find_resource('latency', tiny, tmp_path / 'x.json') == device.resource(tiny)
    assert device.resource(tiny) != device_of(tiny, machine='n').resource(tiny)


def test_latency_is_the_sum_of_prices_times_features(tiny):
    largest, smallest = tiny.largest, tiny.smallest
    label = next(choice.label for choice in tiny.choices if choice.name == 'depth' and len(choice.values) == 2)
    value = next(choice.values[1] for choice in tiny.choices if choice.label == label)
    device = device_of(tiny, prices={'constant': 2., f'{label}>={value}': .25, 'head/active': .5})
    assert device.predict(tiny, tiny.one_hot([smallest, largest])).tolist() == [2.5, 2.75]
    # predictions are up to 2% below 95% of the measured times
    assert device.resource(tiny).count(tiny, [smallest, largest]).tolist() == pytest.approx([2.5 / .98, 2.75 / .98])


@pytest.mark.parametrize('content', [
    'x', '[]', '{}', '{"format": 2}', None, 'prices', 'threads', 'error'])
def test_what_is_no_device_file(tiny, tmp_path, content):
    path = tmp_path / 'x.json'
    if content == 'prices':
        content = device_of(tiny, prices={'constant': -1.}).to_json()
    if content == 'threads':
        content = device_of(tiny, threads=0).to_json()
    if content == 'error':
        content = device_of(tiny, error=dict(median=.1, p95=1., spearman=1.)).to_json()
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match='x.json'):
        read_device(path)


def test_device_files_of_other_spaces_and_unknown_resources_are_refused(tiny, tmp_path):
    other = tiny.bind(**dict(tiny.geometry, num_classes=3))
    with pytest.raises(ValueError, match="'toy'.*another search space"):
        device_of(other).resource(tiny)
    with pytest.raises(ValueError, match='wide/macs'):
        device_of(tiny, prices={'wide/macs': 1.}).resource(tiny).count(tiny, tiny.smallest)
    for name, file in (('latency', None), ('memory', 'x.json')):
        with pytest.raises(ValueError, match='--resource-file'):
            find_resource(name, tiny, file)
    with pytest.raises(ValueError, match="'watts'"):
        find_resource('watts', tiny)


def test_a_family_without_operators_says_what_is_missing(tiny):
    family = dataclasses.replace(family_of(tiny), operators=None)
    with pytest.raises(ValueError, match='operators='):
        family.operator_table(tiny, tiny.one_hot(tiny.smallest))
