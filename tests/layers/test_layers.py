"""Elastic layers against plain slices, masks against widths, relative position against its definition, CNN blocks."""
import math

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual, SqueezeExcite
from torch import nn

from timm_shiftnas.layers import (
    BlockWidths,
    ConvWidths,
    ElasticAttention,
    ElasticBlock,
    ElasticLayerNorm,
    ElasticLinear,
    ElasticMlp,
    ElasticPatchEmbed,
    ElasticQKV,
    Projection,
    RelativeAttention,
    RelativePosition2d,
    WidthShortcut,
    elastic_kernel,
    extend_table,
    make_elastic,
    masked,
)

F64 = dict(dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def noise(module: nn.Module) -> nn.Module:
    """Random values for every parameter, norms and biases included."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(std=.3)
    return module


def ones(count: int, width: int) -> torch.Tensor:
    return (torch.arange(width) < count).double()


# -- slices ------------------------------------------------------------------------------------------------------------


def test_linear():
    layer, x = noise(ElasticLinear(8, 12, **F64)), torch.randn(3, 5, **F64)
    torch.testing.assert_close(layer(x, out=7), x @ layer.weight[:7, :5].T + layer.bias[:7])
    torch.testing.assert_close(layer(x), x @ layer.weight[:, :5].T + layer.bias)
    assert layer(torch.randn(2, 8, **F64)).shape == (2, 12)
    assert ElasticLinear(8, 12, bias=False, **F64)(x, out=7).shape == (3, 7)


def test_qkv_slices_the_first_heads_of_each_role():
    layer, x = noise(ElasticQKV(8, 3, **F64)), torch.randn(2, 5, **F64)
    for heads in (1, 2, 3):
        q, k, v = layer(x, heads=heads).chunk(3, dim=-1)
        for role, out in enumerate((q, k, v)):
            rows = slice(role * 192, role * 192 + 64 * heads)
            torch.testing.assert_close(out, x @ layer.weight[rows, :5].T + layer.bias[rows])
    assert torch.equal(layer(x), layer(x, heads=3))


def test_qkv_joint_bias_is_autoformers_prefix():
    layer, x = noise(ElasticQKV(8, 3, bias_slicing='joint', **F64)), torch.randn(2, 8, **F64)
    for heads in (1, 2, 3):
        out = layer(x, heads=heads) - _without_bias(layer)(x, heads=heads)
        torch.testing.assert_close(out, layer.bias[:3 * 64 * heads].expand_as(out))


def _without_bias(layer: ElasticQKV) -> ElasticQKV:
    other = ElasticQKV(8, 3, bias=False, **F64)
    other.weight = layer.weight
    return other


def test_layer_norm():
    layer, x = noise(ElasticLayerNorm(8, eps=1e-5, **F64)), torch.randn(3, 5, **F64)
    torch.testing.assert_close(layer(x, width=5), F.layer_norm(x, (5,), layer.weight[:5], layer.bias[:5], 1e-5))


def test_patch_embed():
    layer = noise(ElasticPatchEmbed(img_size=(8, 12), patch_size=4, in_chans=2, embed_dim=6, **F64))
    x = torch.randn(3, 2, 8, 12, **F64)
    full = nn.functional.conv2d(x, layer.proj.weight, layer.proj.bias, stride=4).flatten(2).transpose(1, 2)
    assert layer(x).shape == (3, 6, 6)
    torch.testing.assert_close(layer(x), full)
    torch.testing.assert_close(layer(x, out=4), full[..., :4])
    with pytest.raises(ValueError, match=r'\(8, 8\).*\(8, 12\).*set_input_size'):
        layer(x[..., :8])


def test_mlp():
    layer, x = noise(ElasticMlp(8, 16, **F64)), torch.randn(3, 5, **F64)
    hidden = F.gelu(x @ layer.fc1.weight[:9, :5].T + layer.fc1.bias[:9])
    torch.testing.assert_close(layer(x, hidden=9, out=5), hidden @ layer.fc2.weight[:5, :9].T + layer.fc2.bias[:5])


def test_slices_share_memory_and_gradients_fill_only_them():
    layer = noise(ElasticLinear(8, 12, **F64))
    layer(torch.randn(3, 5, **F64), out=7).sum().backward()
    used = torch.zeros(12, 8, dtype=torch.bool)
    used[:7, :5] = True
    assert torch.equal(layer.weight.grad != 0, used)


# -- masks -------------------------------------------------------------------------------------------------------------


def test_masked_norm_equals_sliced():
    layer, x = noise(ElasticLayerNorm(8, eps=1e-5, **F64)), torch.randn(3, 8, **F64)
    masked = layer(x, width=ones(5, 8))
    torch.testing.assert_close(masked[:, :5], layer(x[:, :5], width=5))
    assert (masked[:, 5:] == 0).all()


def test_masked_mlp_equals_sliced():
    layer, x = noise(ElasticMlp(8, 16, **F64)), torch.randn(3, 8, **F64)
    torch.testing.assert_close(layer(x, hidden=ones(9, 16)), layer(x, hidden=9))
    assert layer.fc2(torch.randn(3, 16, **F64), out=5).shape == (3, 5)


@pytest.mark.parametrize('bias_slicing', ['role', 'joint'])
@pytest.mark.parametrize('relative', [True, False])
def test_masked_attention_equals_sliced(bias_slicing, relative):
    layer = noise(ElasticAttention(8, 3, qkv_bias=True, **F64))
    layer.qkv.bias_slicing = bias_slicing
    if relative:
        layer.rel_pos = noise(RelativePosition2d((2, 3), 1, 1, **F64))
    x = torch.randn(2, 7, 8, **F64)
    for heads in (1, 2, 3):
        torch.testing.assert_close(layer(x, heads=ones(heads, 3)), layer(x, heads=heads))


def test_masked_block_equals_sliced():
    block = noise(ElasticBlock(
        8, 3, mlp_ratio=2., qkv_bias=True, mlp_layer=ElasticMlp, attn_layer=ElasticAttention,
        norm_layer=ElasticLayerNorm, **F64))
    x = torch.randn(2, 4, 8, **F64)
    sliced = block(x[..., :5], widths=BlockWidths(5, 2, 9))
    masks = BlockWidths(ones(5, 8), ones(2, 3), ones(9, 16), torch.ones((), **F64))
    torch.testing.assert_close(block(x, widths=masks)[..., :5], sliced)
    torch.testing.assert_close(block(x, widths=masks._replace(active=torch.zeros((), **F64))), x)
    torch.testing.assert_close(block(x), block(x, widths=BlockWidths(8, 3, 16)))


# -- relative position -------------------------------------------------------------------------------------------------


def by_definition(q, k, v, rel_pos):
    """AutoFormer's attention, token pair by token pair."""
    cols, limit = rel_pos.grid_size[1], rel_pos.max_distance
    prefix = q.shape[2] - math.prod(rel_pos.grid_size)

    def entry(row_table, col_table, query, key):
        if query < prefix or key < prefix:
            return row_table[0] + col_table[0]
        distances = [
            (key - prefix) // cols - (query - prefix) // cols, (key - prefix) % cols - (query - prefix) % cols]
        row, col = (max(-limit, min(limit, distance)) + limit + 1 for distance in distances)
        return row_table[row] + col_table[col]

    outputs = []
    for query in range(q.shape[2]):
        keys = torch.stack([entry(rel_pos.k_rows, rel_pos.k_cols, query, key) for key in range(k.shape[2])])
        values = torch.stack([entry(rel_pos.v_rows, rel_pos.v_cols, query, key) for key in range(k.shape[2])])
        logits = (q[:, :, query, None] * (k + keys)).sum(-1) / 8
        outputs.append((logits.softmax(-1)[..., None] * (v + values)).sum(-2))
    return torch.stack(outputs, dim=2)


@pytest.mark.parametrize('grid, prefix, limit', [((3, 3), 1, 1), ((2, 4), 1, 2), ((4, 1), 1, 9), ((2, 3), 0, 1)])
def test_relative_attention_by_definition(grid, prefix, limit):
    rel_pos = noise(RelativePosition2d(grid, prefix, limit, **F64))
    q, k, v = (torch.randn(2, 3, prefix + math.prod(grid), 64, requires_grad=True, **F64) for _ in range(3))
    inputs, cotangent = [q, k, v, *rel_pos.parameters()], torch.randn(*q.shape, **F64)
    expected = by_definition(q, k, v, rel_pos)
    gradients = torch.autograd.grad((expected * cotangent).sum(), inputs)
    for attend in (rel_pos.attend, rel_pos.attend_plainly):
        out = attend(q, k, v, rel_pos.index(q))
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        for gradient, reference in zip(torch.autograd.grad((out * cotangent).sum(), inputs), gradients):
            torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-9)


def test_fused_attention_is_precise_in_fp32():
    rel_pos = RelativePosition2d((14, 14), 1, 14)
    q, k, v = torch.randn(3, 1, 2, 197, 64)
    index = rel_pos.index(q)
    torch.testing.assert_close(
        rel_pos.attend(q, k, v, index), rel_pos.attend_plainly(q, k, v, index), rtol=0, atol=5e-6)


@pytest.mark.parametrize('relative', [True, False])
@pytest.mark.parametrize('mask', ['bool', 'float', 'causal'])
def test_attention_masks_on_both_paths(relative, mask):
    layer = noise(RelativeAttention(8, 2, **F64))
    layer.rel_pos = noise(RelativePosition2d((2, 2), 1, 1, **F64)) if relative else None
    x, seen = torch.randn(3, 5, 8, **F64), torch.ones(5, 5, dtype=torch.bool).tril()
    arguments = dict(
        bool=dict(attn_mask=seen), float=dict(attn_mask=torch.zeros(5, 5, **F64).masked_fill(~seen, -math.inf)),
        causal=dict(is_causal=True))[mask]
    outputs = []
    for fused in (True, False):
        layer.fused_attn = fused
        outputs.append(layer(x, **arguments))
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(outputs[0], layer(x))
    # tokens that are masked out do not change an output
    x[:, 4] += 1
    torch.testing.assert_close(layer(x, **arguments)[:, :4], outputs[0][:, :4])


def test_attention_dropout():
    """Dropout acts on the attention as a whole: with p = 1 the output is zero."""
    rel_pos = noise(RelativePosition2d((3, 3), 1, 2, **F64))
    q, k, v = torch.randn(3, 400, 1, 10, 64, **F64)
    index = rel_pos.index(q)
    for attend in (rel_pos.attend, rel_pos.attend_plainly):
        torch.testing.assert_close(attend(q, k, v, index, 1.), torch.zeros_like(q))
        mean = attend(q[:1].expand(400, -1, -1, -1), k[:1], v[:1], index, .3).mean(0)
        torch.testing.assert_close(mean, attend(q[:1], k[:1], v[:1], index)[0], rtol=0, atol=.4)


def test_extend_table():
    table = torch.arange(12.)[:, None].expand(12, 64)  # distances -5 .. 5 in rows 1 .. 11
    assert extend_table(table, 9, 5)[:, 0].tolist() == list(range(12))
    assert extend_table(table, 3, 5)[:, 0].tolist() == [0, 3, 3, 3, 4, 5, 6, 7, 8, 9, 9, 9]
    assert extend_table(table, 9, 7)[:, 0].tolist() == [0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 11, 11]
    assert extend_table(table, 9, 2)[:, 0].tolist() == [0, 4, 5, 6, 7, 8]


# -- convolutions ------------------------------------------------------------------------------------------------------


def conv_block(kind, width_in: int, width_out: int, stride: int, shortcut: nn.Module | None = None) -> nn.Module:
    """An elastic block of timm's with elastic kernels, in evaluation."""
    block = kind(width_in, width_out, stride=stride, norm_layer=BatchNormAct2d, se_layer=SqueezeExcite)
    make_elastic(block)
    elastic_kernel(block.conv_dw, (3,), transform=False)
    if shortcut is not None:
        make_elastic(shortcut)
        block.projection = shortcut
    return noise(block.double()).eval()


@pytest.mark.parametrize('kind', [DepthwiseSeparableConv, InvertedResidual])
@pytest.mark.parametrize('name, width_in, width_out, stride, narrow', [
    ('identity', 8, 8, 1, (8, 8)), ('none', 8, 12, 2, (4, 6)),
    ('where widths are equal', 8, 12, 1, (6, 6)), ('where widths are equal', 8, 12, 1, (4, 6)),
    ('projection', 8, 12, 2, (4, 6)), ('projection', 8, 12, 2, (6, 6)), ('pooling', 8, 8, 2, (8, 8)),
])
def test_masked_blocks_equal_sliced(kind, name, width_in, width_out, stride, narrow):
    """With every kind of shortcut; the stream is full-width, with noise beyond the narrow width."""
    shortcut = {
        'where widths are equal': WidthShortcut(), 'projection': Projection(width_in, width_out, stride, True),
        'pooling': Projection(width_in, width_out, stride, False)}.get(name)
    block = conv_block(kind, width_in, width_out, stride, shortcut)
    full = block.conv_dw.weight.shape[0]
    hidden = narrow[0] if kind is DepthwiseSeparableConv else full // 2
    se = block.se.conv_reduce.out_channels
    x = torch.randn(2, width_in, 5, 5, **F64)
    sliced = block(x[:, :narrow[0]], widths=ConvWidths(hidden, narrow[1], 3, se))
    masks = ConvWidths(
        ones(hidden, full), None, ones(1, 1), ones(se, se), width_in=ones(narrow[0], width_in),
        equal=torch.tensor(float(narrow[0] == narrow[1]), **F64), active=torch.tensor(1., **F64))
    torch.testing.assert_close(block(x, widths=masks)[:, :narrow[1]], sliced)


def test_masked():
    x = torch.randn(2, 3, 4, 5, **F64)
    assert masked(x, 3) is x and masked(x, None) is x
    assert torch.equal(masked(x, ones(2, 3)), torch.cat([x[:, :2], 0 * x[:, 2:]], 1))
    assert torch.equal(masked(x, ones(2, 5), -1), torch.cat([x[..., :2], 0 * x[..., 2:]], -1))
    assert torch.equal(masked(x, torch.tensor(0., **F64)), 0 * x)
