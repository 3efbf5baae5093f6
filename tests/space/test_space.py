"""Search spaces and archs: counting, sampling, validation, encodings, JSON."""
import copy
import itertools
import json
import math
import pickle
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import timm
import torch

import timm_shiftnas as tsn
from timm_shiftnas.space import Arch, Size, arch_masks, space_from_dict

TABLE = json.loads((Path(__file__).parents[1] / 'support' / 'data' / 'autoformer_table.json').read_text())['spaces']
NAMES = {'T': 'shiftformer_tiny_supernet', 'S': 'shiftformer_small_supernet', 'B': 'shiftformer_base_supernet'}
SMALL = dict(embed_dim=(32, 48), depth=(1, 2, 3), num_heads=(1, 2), mlp_ratio=(1.0, 1.5, 2.0))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def all_archs(space):
    """Every arch of a small space, without `decode`."""
    for dim, depth in itertools.product(space.values('embed_dim'), space.values('depth')):
        for heads in itertools.product(space.values('num_heads'), repeat=depth):
            for ratios in itertools.product(space.values('mlp_ratio'), repeat=depth):
                yield space.arch(embed_dim=dim, depth=depth, num_heads=heads, mlp_ratio=ratios)


@pytest.fixture
def space():
    return tsn.shiftformer_space(**SMALL)


# -- spaces ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_published_spaces(name):
    space, row = timm.create_model(NAMES[name], device='meta').space, TABLE[name]
    assert space.size == row['size']
    for field, values in row['choices'].items():
        assert space.values(field) == tuple(values)
    ends = {arch.pop('name'): arch for arch in copy.deepcopy(row['archs'])}
    for end in ('smallest', 'largest'):
        fields = {k: ends[end][k] for k in ('embed_dim', 'depth', 'num_heads', 'mlp_ratio')}
        assert getattr(space, end) == space.arch(**fields)
    assert space == timm.create_model(NAMES[name], device='meta').space  # plain data, equal by value


def test_the_family_name_is_tiny():
    spaces = [timm.create_model(name, device='meta').space for name in ('shiftformer_supernet', NAMES['T'])]
    assert spaces[0] == spaces[1]


def test_size_counts_distinct_archs(space):
    archs = list(all_archs(space))
    assert len(set(archs)) == len(archs) == space.size == 2 * sum((2 * 3) ** depth for depth in (1, 2, 3))


def test_the_test_space_is_as_documented():
    net = timm.create_model('test_shiftformer_supernet', num_classes=10)
    space = net.space
    per_layer = Counter(choice.name for choice in space.choices if choice.layer is not None)
    assert all(count >= 6 and len(space.values(name)) == 3 for name, count in per_layer.items())
    # MACs depend on the sums over layers alone, so these archs have all possible MACs
    def spread(total, depth):
        return [1 + (total - depth) // depth + (layer < (total - depth) % depth) for layer in range(depth)]

    archs = [
        space.arch(embed_dim=dim, depth=depth, num_heads=spread(heads, depth), mlp_ratio=spread(ratios, depth))
        for dim in space.values('embed_dim') for depth in space.values('depth')
        for heads in range(depth, 3 * depth + 1) for ratios in range(depth, 3 * depth + 1)]
    assert len(set(tsn.macs(space, archs).tolist())) >= 400
    assert net.macs(space.largest) >= 5 * net.macs(space.smallest)


@pytest.mark.parametrize('change', [
    dict(embed_dim=()), dict(embed_dim=(48, 32)), dict(embed_dim=(32, 32)), dict(embed_dim=(0, 32)),
    dict(embed_dim=(32.5,)), dict(depth='3'), dict(depth=(-1, 2)), dict(num_heads=(True, 2)), dict(num_heads=(1, None)),
    dict(mlp_ratio=(math.inf,)), dict(mlp_ratio=(1.0, 1.01)), dict(mlp_ratio=(0.001, 1.0)),
])
def test_bad_spaces(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        tsn.shiftformer_space(**dict(SMALL, **change))


def test_space_to_json_and_back(space):
    bound = timm.create_model('test_shiftformer_supernet', device='meta').space
    for original in (space, bound):
        data = json.loads(json.dumps(original.to_dict()))
        restored = space_from_dict(data)
        assert restored == original and hash(restored) == hash(original)
    assert space_from_dict(bound.to_dict()).geometry == bound.geometry
    assert bound.unbind() == space_from_dict({k: v for k, v in bound.to_dict().items() if k != 'geometry'})
    assert pickle.loads(pickle.dumps(bound)) == copy.deepcopy(bound) == bound


@pytest.mark.parametrize('data', [
    None, 'shiftformer', {}, dict(family='resnet'), dict(family=['shiftformer']), dict(family='shiftformer'),
    dict(SMALL, family='shiftformer', extra=1), dict(SMALL, family='shiftformer', depth=(2, 1)),
    dict(SMALL, family='shiftformer', geometry=[1]),
])
def test_dicts_that_are_not_spaces(data):
    with pytest.raises(ValueError):
        space_from_dict(data)


def test_binding(space):
    assert not space.is_bound
    with pytest.raises(ValueError, match='create_model'):
        _ = space.geometry
    bound = space.bind(img_size=[64, 32], num_classes=10)
    assert bound.is_bound and bound.geometry == dict(img_size=(64, 32), num_classes=10)
    assert bound.bind(num_classes=5).geometry == dict(num_classes=5)  # replaced, not merged
    assert bound.unbind() == space and bound != space


# -- archs -------------------------------------------------------------------------------------------------------------


def test_scalars_go_to_every_layer(space):
    arch = space.arch(embed_dim=48, depth=2, num_heads=1, mlp_ratio=2)
    assert arch == space.arch(embed_dim=48, depth=2, num_heads=(1, 1), mlp_ratio=[2.0, 2.0])
    assert (arch.embed_dim, arch.depth, arch.num_heads, arch.mlp_ratio) == (48, 2, (1, 1), (2.0, 2.0))
    assert isinstance(arch.mlp_ratio[0], float)  # converted to the type of the space


def test_layers_beyond_the_depth_carry_no_choice(space):
    archs = [
        space.arch(embed_dim=32, depth=2, num_heads=(1, 2, tail), mlp_ratio=(1.0, 1.5, 2.0)) for tail in (1, 2)]
    archs.append(space.arch(embed_dim=32, depth=2, num_heads=(1, 2), mlp_ratio=(1.0, 1.5)))
    assert len(set(archs)) == 1 and archs[0] == archs[1] == archs[2]
    assert archs[0] != space.arch(embed_dim=32, depth=2, num_heads=(2, 1), mlp_ratio=(1.0, 1.5))


def test_archs_are_immutable_values(space):
    arch = space.largest
    with pytest.raises(AttributeError, match='immutable'):
        arch.depth = 1
    with pytest.raises(AttributeError, match='immutable'):
        del arch.depth
    assert arch == space.largest and arch is not space.largest and hash(arch) == hash(space.largest)
    assert arch != arch.to_dict() and arch != space.smallest
    assert eval(repr(arch), {'Arch': Arch}) == arch
    for other in (copy.copy(arch), copy.deepcopy(arch), pickle.loads(pickle.dumps(arch))):
        assert other == arch and hash(other) == hash(arch)
    # the order of the fields does not matter
    fields = arch.to_dict()
    assert space.from_dict(dict(reversed(fields.items()))) == arch
    mirrored = Arch(**dict(reversed(arch.__dict__.items())))
    assert mirrored == arch and hash(mirrored) == hash(arch)


def test_arch_to_json_and_back(space):
    for arch in all_archs(space):
        assert space.from_dict(json.loads(json.dumps(arch.to_dict()))) == arch


@pytest.mark.parametrize('fields, message', [
    (dict(embed_dim=40), r'embed_dim=40 is not in the space; choose one of \(32, 48\)'),
    (dict(depth=4), 'depth=4'), (dict(depth='2'), 'depth'), (dict(num_heads=3), r'num_heads\[0\]=3'),
    (dict(num_heads=(1, 3)), r'num_heads\[1\]=3'), (dict(num_heads=(1,)), 'num_heads.* 1 .* 2 '),
    (dict(num_heads=True), 'num_heads'), (dict(mlp_ratio=None), 'mlp_ratio'), (dict(mlp_ratio=()), 'mlp_ratio.* 0 '),
    (dict(mlp_ratio='1.0'), 'mlp_ratio'), (dict(width=2), "'width'"),
])
def test_bad_archs_name_the_field(space, fields, message):
    with pytest.raises(ValueError, match=message):
        space.arch(**dict(dict(embed_dim=32, depth=2, num_heads=1, mlp_ratio=1.0), **fields))


def test_missing_fields_are_named(space):
    with pytest.raises(ValueError, match="'mlp_ratio'"):
        space.arch(embed_dim=32, depth=2, num_heads=1)
    with pytest.raises(ValueError, match=r'\[1, 2\]'):
        space.from_dict([1, 2])


@pytest.mark.parametrize('arch', [
    None, 'abc', dict(embed_dim=32, depth=1, num_heads=(1,), mlp_ratio=(1.0,)), Arch(), Arch(embed_dim=32),
    Arch(embed_dim=33, depth=1, num_heads=(1,), mlp_ratio=(1.0,)),
    Arch(embed_dim=32, depth=1, num_heads=(3,), mlp_ratio=(1.0,)),
    Arch(embed_dim=32, depth=1, num_heads=1, mlp_ratio=1.0),
    Arch(embed_dim=32, depth=1, num_heads=[1], mlp_ratio=[1.0]),
    Arch(embed_dim=32, depth=1, num_heads=(1, 2), mlp_ratio=(1.0, 1.0)),
    Arch(embed_dim=32, depth=1, num_heads=(1,), mlp_ratio=(1.0,), extra=1),
    Arch(embed_dim=32, depth=2, num_heads=(1,), mlp_ratio=(1.0, 1.0)),
])
def test_archs_of_other_spaces(space, arch):
    bound = timm.create_model(
        'shiftformer_supernet', space=space, img_size=32, max_relative_position=2, device='meta').space
    for refuse in (space.validate, space.encode, partial(tsn.macs, bound), partial(tsn.params, bound)):
        with pytest.raises(ValueError) as error:
            refuse(arch)
        assert '\n' not in str(error.value) and 'tuple.index' not in str(error.value)


# -- encodings ---------------------------------------------------------------------------------------------------------


def test_encode_decode(space):
    seen = set()
    for arch in all_archs(space):
        indices = space.encode(arch)
        assert space.decode(indices) == arch
        assert all(0 <= index < len(choice.values) for index, choice in zip(indices, space.choices, strict=True))
        # an inactive choice reads 0, and is ignored by decode
        inactive = [i for i, c in enumerate(space.choices) if c.layer is not None and c.layer >= arch.depth]
        assert all(indices[i] == 0 for i in inactive)
        assert space.decode([1 if i in inactive else index for i, index in enumerate(indices)]) == arch
        seen.add(tuple(indices))
    assert len(seen) == space.size


def test_choices_come_in_order(space):
    labels = [choice.label for choice in space.choices]
    assert labels == ['embed_dim', 'depth'] + [f'{n}[{i}]' for i in range(3) for n in ('num_heads', 'mlp_ratio')]


def test_one_hots(space):
    archs = [space.smallest, space.largest, space.sample(rng())]
    batch = space.one_hot(archs)
    for n, arch in enumerate(archs):
        columns = zip(space.one_hot(arch), batch, space.choices, space.encode(arch), strict=True)
        for one_hot, row, choice, index in columns:
            assert one_hot.tolist() == [float(i == index) for i in range(len(choice.values))]
            assert torch.equal(row[n], one_hot)
    assert [tuple(one_hot.shape) for one_hot in space.one_hot([])] == [(0, len(c.values)) for c in space.choices]


def test_matrix_mapping(space):
    """One-hots become nested masks: the second of (1, 2, 3) heads is (1, 1, 0)."""
    wide = tsn.shiftformer_space(embed_dim=(3, 5), depth=(1, 2), num_heads=(1, 2, 3), mlp_ratio=(1.0, 1.5, 2.0))
    arch = wide.arch(embed_dim=3, depth=1, num_heads=2, mlp_ratio=1.5)
    masks = arch_masks(wide, wide.one_hot(arch))
    assert masks.embed_dim.tolist() == [1, 1, 1, 0, 0]
    assert masks.depth.tolist() == [1, 0]
    assert masks.num_heads[0].tolist() == [1, 1, 0]
    assert masks.hidden[0].tolist() == [1] * 4 + [0] * 6  # int(3 * 1.5) of int(5 * 2)
    for arch in all_archs(space):
        masks = arch_masks(space, space.one_hot(arch))
        assert masks.embed_dim.sum() == arch.embed_dim and masks.depth.sum() == arch.depth
        for layer in range(arch.depth):
            assert masks.num_heads[layer].sum() == arch.num_heads[layer]
            assert masks.hidden[layer].sum() == int(arch.embed_dim * arch.mlp_ratio[layer])
        for mask in masks:  # ones first
            assert (mask.diff(dim=-1) <= 0).all()


def test_matrix_mapping_is_linear_in_each_choice(space):
    """The derivative of a mask with respect to a one-hot entry is the mask of that value."""
    one_hots = [one_hot.requires_grad_() for one_hot in space.one_hot(space.smallest)]
    masks = arch_masks(space, one_hots)
    grad = torch.autograd.grad(masks.num_heads[0].sum(), one_hots[2], retain_graph=True)[0]
    assert grad.tolist() == [1, 2]
    # the hidden width depends on the embed_dim and on the layer's ratio, at the present value of the other
    by_dim, by_ratio = torch.autograd.grad(masks.hidden[0].sum(), [one_hots[0], one_hots[3]])
    assert by_dim.tolist() == [32, 48] and by_ratio.tolist() == [32, 48, 64]


def test_a_size_is_a_table_over_choices(space):
    """One table is read at indices, as a number, and as a mask; two choices are read through their outer product."""
    hidden = Size.of(space, lambda dim, ratio: int(dim * ratio), 0, 3)
    constant = Size.of(space, lambda: 3)
    for arch in all_archs(space):
        indices, one_hots = space.encode(arch), space.one_hot(arch)
        width = int(arch.embed_dim * arch.mlp_ratio[0])
        assert hidden.at(indices) == hidden.value(one_hots) == hidden.mask(one_hots).sum() == width
        assert constant.at(indices) == constant.value(one_hots) == 3 and constant.mask(one_hots).tolist() == [1, 1, 1]
    batch = space.one_hot(list(all_archs(space)))
    assert hidden.value(batch).shape == constant.value(batch).shape == (space.size,)
    depth = Size.of(space, int, 1)
    assert depth.rank_mask(space.one_hot(space.smallest)).tolist() == [1, 0, 0]


def test_constants_of_a_size_can_be_created_in_inference_mode(space):
    """They are cached, and gradients pass through them later."""
    size, one_hots = Size.of(space, int, 0), space.one_hot(space.smallest)
    with torch.inference_mode():
        size.value(one_hots)
    one_hots[0].requires_grad_()
    assert torch.autograd.grad(size.value(one_hots), one_hots[0])[0].tolist() == [32, 48]


# -- sampling ----------------------------------------------------------------------------------------------------------


def chi_square(counts, expected) -> float:
    return sum((counts[key] - count) ** 2 / count for key, count in expected.items())


@pytest.mark.slow
def test_sampling_is_depth_first_then_independent():
    space = tsn.shiftformer_space(embed_dim=(32, 48), depth=(1, 2), num_heads=(1, 2), mlp_ratio=(1.0, 2.0))
    draws, generator = 20_000, rng(1)
    counts = Counter(space.sample(generator) for _ in range(draws))
    # P(arch) = 1/2 (width) * 1/2 (depth) * (1/4)^depth: the 8 archs of one layer take half of the draws, not 8 of 40
    expected = {arch: draws / 4 / 4 ** arch.depth for arch in all_archs(space)}
    assert counts.keys() == expected.keys() and len(expected) == 40
    # chi-square with 39 degrees of freedom: mean 39, standard deviation 8.8; uniform over archs would give thousands
    assert chi_square(counts, expected) < 39 + 4 * math.sqrt(2 * 39)


@pytest.mark.slow
def test_sampling_choices_of_the_tiny_space():
    space = timm.create_model('shiftformer_tiny_supernet', device='meta').space
    generator = rng(2)
    archs = [space.sample(generator) for _ in range(3_000)]
    for values in ([arch.depth for arch in archs], [arch.embed_dim for arch in archs]):
        assert chi_square(Counter(values), dict.fromkeys(set(values), 1_000)) < 20  # two degrees of freedom
    for layer in range(14):
        active = [arch.num_heads[layer] for arch in archs if arch.depth > layer]
        assert abs(active.count(3) / len(active) - .5) < 4 * .5 / math.sqrt(len(active))


def test_sampling_is_a_function_of_the_generator(space):
    first, second = rng(5), rng(5)
    state = torch.get_rng_state()
    assert [space.sample(first) for _ in range(20)] == [space.sample(second) for _ in range(20)]
    assert torch.equal(state, torch.get_rng_state())  # the global generator is not touched
    for given in (None, 0, 'cpu'):
        with pytest.raises(ValueError, match='torch.Generator'):
            space.sample(given)
