"""MACs and parameters: the published table, the FLOP counter, numel, batches, gradients, budgets as text."""
import json
from pathlib import Path

import pytest
import timm
import torch
from support.flops import counted_macs

import timm_shiftnas as tsn
from timm_shiftnas.space import MACS
from timm_shiftnas.utils import format_count, parse_count

TABLE = json.loads((Path(__file__).parents[1] / 'support' / 'data' / 'autoformer_table.json').read_text())['spaces']
NAMES = {'T': 'shiftformer_tiny_supernet', 'S': 'shiftformer_small_supernet', 'B': 'shiftformer_base_supernet'}
TINY = tsn.shiftformer_space(embed_dim=(24, 40), depth=(1, 3), num_heads=(1, 2), mlp_ratio=(1.0, 1.7, 3.0))
VARIATIONS = {
    'default': {},
    'plain': dict(relative_position=False),
    'no_class_token': dict(class_token=False),
    'plain_no_class_token': dict(relative_position=False, class_token=False),
    'no_embed_class': dict(no_embed_class=True),
    'no_positions': dict(pos_embed='none'),
    'wide': dict(img_size=(32, 80)),
    'tall': dict(img_size=(96, 16), relative_position=False),
    'not_a_multiple': dict(img_size=(55, 41)),
    'grey': dict(in_chans=1),
    'no_head': dict(num_classes=0),
    'unpooled': dict(global_pool=''),
    'token': dict(global_pool='token'),
    'fc_norm': dict(fc_norm=True),
    'no_final_norm': dict(final_norm=False),
    'no_biases': dict(qkv_bias=False, proj_bias=False),
    'patches_of_8': dict(patch_size=8),
    'oblong_patches': dict(patch_size=(8, 16)),
    'far': dict(max_relative_position=9),
}


def create(**kwargs):
    return timm.create_model('shiftformer_supernet', **dict(
        dict(space=TINY, img_size=48, max_relative_position=2, num_classes=7), **kwargs))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counted(model, size) -> int:
    """MACs of the convolutions and matrix products that run for one image."""
    return counted_macs(model, torch.zeros(1, *size, device=next(model.parameters()).device))


@pytest.fixture(scope='module')
def spaces():
    return {name: timm.create_model(model, device='meta').space for name, model in NAMES.items()}


# -- the published table -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_every_row_of_the_table(spaces, name):
    space, rows = spaces[name], TABLE[name]['archs']
    fields = ('embed_dim', 'depth', 'num_heads', 'mlp_ratio')
    # two rows of T and one of B lie outside the space: a wider one holds all of them
    widened = {
        field: sorted({*space.values(field), *(v for row in rows for v in (
            row[field] if isinstance(row[field], list) else [row[field]]))}) for field in fields}
    wide = tsn.shiftformer_space(**widened).bind(**space.geometry)
    inside = 0
    for row in rows:
        arch = wide.arch(**{field: row[field] for field in fields})
        assert tsn.params(wide, arch) == row['params'], row['name']
        assert tsn.macs(wide, arch, convention='reference') == row['macs'], row['name']
        try:
            arch = space.arch(**{field: row[field] for field in fields})
        except ValueError:
            continue
        inside += 1
        assert tsn.params(space, arch) == row['params']
        assert tsn.macs(space, arch, convention='reference') == row['macs']
        assert tsn.macs(space, arch) == tsn.macs(wide, arch)  # a property of the subnet, not of its space
    assert (len(rows), inside) == (26, {'T': 24, 'S': 26, 'B': 25}[name])


def test_known_figures(spaces):
    plain = timm.create_model(NAMES['T'], relative_position=False, device='meta').space
    assert [format_count(macs) for macs in MACS.range(plain)] == ['1.167G', '2.263G']
    assert tsn.params(spaces['T'], spaces['T'].smallest) == 5_366_056
    assert tsn.params(spaces['B'], spaces['B'].largest) == 76_882_264
    assert MACS.range(spaces['T']) == (1_281_241_344, tsn.macs(spaces['T'], spaces['T'].largest))
    # the count of the fused form by hand: 197 tokens, heads of 64 + 14 + 14 + 1 -> 96 channels
    head = 2 * 197 ** 2 * 96 + 2 * 196 * 64 * 28
    layer = 3 * 192 * 192 * 197 + 3 * head + 192 * 192 * 197 + 2 * 197 * 192 * 672
    assert tsn.macs(spaces['T'], spaces['T'].smallest) == 196 * 768 * 192 + 12 * layer + 1000 * 192


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_published_spaces_against_the_counter(name):
    net = timm.create_model(NAMES[name], device='meta')
    arch = net.space.sample(rng(3))
    sub = tsn.extract(net, arch)
    assert net.params(arch) == sum(weight.numel() for weight in sub.parameters())
    assert net.macs(arch) == counted(sub, (3, 224, 224))


# -- the counter, on every geometry ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('name', VARIATIONS)
def test_counts_are_exact(name):
    net = create(**VARIATIONS[name])
    size = (net.in_chans, *net.patch_embed.img_size)
    space = net.space
    for arch in [space.smallest, space.largest, *(space.sample(generator) for generator in [rng()] for _ in range(4))]:
        sub = tsn.extract(net, arch)
        assert net.params(arch) == tsn.params(space, arch) == sum(weight.numel() for weight in sub.parameters())
        assert net.macs(arch) == tsn.macs(space, arch) == counted(sub, size)
        assert net.macs(arch) == counted(tsn.Subnet(net, arch), size)


def test_counts_follow_the_network():
    """`reset_classifier` and `set_input_size` rebind the space."""
    net, arch = create(), TINY.arch(embed_dim=40, depth=3, num_heads=(1, 2, 2), mlp_ratio=1.7)
    before = net.macs(arch)
    net.reset_classifier(20)
    assert net.macs(arch) == before + 13 * 40 and net.space.geometry['num_classes'] == 20
    net.set_input_size((64, 80))
    assert net.macs(arch) == counted(tsn.extract(net, arch), (3, 64, 80))
    net.set_input_size(patch_size=8)
    assert net.macs(arch) == counted(tsn.extract(net, arch), (3, 64, 80))
    assert net.params(arch) == sum(weight.numel() for weight in tsn.extract(net, arch).parameters())
    net.reset_classifier(0, '')
    assert net.macs(arch) == counted(tsn.extract(net, arch), (3, 64, 80))
    assert net.params(arch) == sum(weight.numel() for weight in tsn.extract(net, arch).parameters())


def test_counting_changes_nothing():
    net = create()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    space, state = net.space, torch.get_rng_state()
    assert isinstance(net.macs(space.smallest), int) and isinstance(net.params(space.smallest), int)
    assert net.space == space and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# -- batches and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('function', [
    tsn.macs, tsn.params, lambda space, archs: tsn.macs(space, archs, convention='reference')])
def test_batches_equal_single_archs(spaces, function):
    space, generator = spaces['T'], rng()
    archs = [space.sample(generator) for _ in range(50)]
    batch = function(space, archs)
    assert batch.dtype == torch.int64 and batch.tolist() == [function(space, arch) for arch in archs]
    assert function(space, tuple(archs)).tolist() == batch.tolist()
    one_hots = function(space, space.one_hot(archs))
    assert one_hots.dtype == torch.float64 and one_hots.tolist() == batch.tolist()
    assert function(space, space.one_hot(archs[0])).item() == batch[0]
    assert function(space, []).shape == (0,)


def test_ten_thousand_archs(spaces):
    space, generator = spaces['T'], rng()
    archs = [space.sample(generator) for _ in range(500)] * 20
    batch = tsn.macs(space, archs)
    assert batch.shape == (10_000,)
    low, high = MACS.range(space)
    assert low <= batch.min() and batch.max() <= high


@pytest.mark.parametrize('function', [tsn.macs, tsn.params])
def test_gradients_are_those_of_the_polynomial(function):
    """Against central differences, exact for a polynomial that has at most degree two in every single entry."""
    space = create().space
    one_hots = space.one_hot([space.sample(rng(seed)) for seed in range(3)])
    # away from 0 and 1, so that every product contributes
    soft = [(one_hot + .1 * torch.rand(one_hot.shape, dtype=torch.float64, generator=rng(9))).requires_grad_()
            for one_hot in one_hots]
    value = function(space, soft)
    gradients = torch.autograd.grad(value.sum(), soft)
    checked = 0
    for i, gradient in enumerate(gradients):
        for entry in range(gradient.shape[-1]):
            step = torch.zeros_like(gradient)
            step[:, entry] = .5

            def moved(sign, i=i, step=step):
                return function(space, [s.detach() + sign * step if j == i else s.detach() for j, s in enumerate(soft)])

            torch.testing.assert_close(moved(1) - moved(-1), gradient[:, entry], rtol=1e-9, atol=1e-3)
            checked += 1
    assert checked == 2 + 2 + 3 * (2 + 3)


def test_gradient_of_depth_is_the_cost_of_a_layer(spaces):
    """Without a cost of absent layers, the generator could not learn to grow."""
    space = spaces['T']
    one_hots = [one_hot.requires_grad_() for one_hot in space.one_hot(space.smallest)]
    by_depth = torch.autograd.grad(tsn.macs(space, one_hots), one_hots[1])[0]
    deeper = space.arch(embed_dim=192, depth=13, num_heads=3, mlp_ratio=3.5)
    assert (by_depth[1] - by_depth[0]).item() == tsn.macs(space, deeper) - tsn.macs(space, space.smallest) > 0


# -- errors ------------------------------------------------------------------------------------------------------------


def test_unbound_spaces_and_unknown_conventions():
    for function in (tsn.macs, tsn.params):
        with pytest.raises(ValueError, match='not bound'):
            function(TINY, TINY.largest)
    net = create(device='meta')
    with pytest.raises(ValueError, match="'reference'"):
        net.macs(TINY.largest, convention='flops')
    with pytest.raises(ValueError, match='embed_dim=192'):
        net.macs(timm.create_model('shiftformer_subnet', device='meta').arch)


# -- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('text, value', [
    (1.4e9, 1.4e9), (7, 7.), ('1.4G', 1.4e9), ('1400M', 1.4e9), ('1400m', 1.4e9), (' 1.4 g ', 1.4e9), ('1.4e9', 1.4e9),
    ('1400000000', 1.4e9), ('5k', 5e3), ('2T', 2e12), ('1e15', 1e15), ('.5M', 5e5),
])
def test_budgets_as_text(text, value):
    assert parse_count(text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize('text', [
    0, -1, '0', '-1G', 'abc', '', 'G', '1.4GB', '1.2.3', '1,4G', float('nan'), float('inf'), 'nan', '1e999', None, True,
    [1],
])
def test_texts_that_are_not_budgets(text):
    with pytest.raises(ValueError, match='params=.*1.4G'):
        parse_count(text, 'params')


@pytest.mark.parametrize('value, text', [
    (1281241344, '1.281G'), (5366056, '5.366M'), (1500, '1.5k'), (12, '12'), (0.5, '0.5'), (1e15, '1e+06G')])
def test_counts_as_text(value, text):
    assert format_count(value) == text
    assert parse_count(text) == pytest.approx(value, rel=1e-3)
