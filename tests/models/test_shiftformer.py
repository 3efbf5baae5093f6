"""The elastic ViT: stock timm, masks against widths, timm's model contract, checkpoints, copies, compilation."""
import copy
import math
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from timm.layers import Attention, LayerNorm, resample_abs_pos_embed, resample_patch_embed
from timm.models import FeatureInfo
from timm.models._input import get_model_input_config
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

import timm_shiftnas as tsn
from timm_shiftnas.layers import extend_table
from timm_shiftnas.models.shiftformer import ShiftFormer, ShiftFormerSupernet, checkpoint_filter_fn
from timm_shiftnas.space import ShiftFormerMasks, arch_masks

NAMES = [
    'shiftformer_base_supernet', 'shiftformer_small_supernet', 'shiftformer_subnet', 'shiftformer_supernet',
    'shiftformer_tiny_supernet', 'test_shiftformer_supernet']
SPACE = tsn.shiftformer_space(embed_dim=(24, 40), depth=(1, 2, 3), num_heads=(1, 2), mlp_ratio=(1.0, 1.7, 3.0))
ARCHS = [
    SPACE.smallest, SPACE.largest, SPACE.arch(embed_dim=24, depth=3, num_heads=(2, 1, 1), mlp_ratio=(3.0, 1.0, 1.7)),
    SPACE.arch(embed_dim=40, depth=2, num_heads=(1, 2), mlp_ratio=(1.7, 3.0))]
MIDDLE = ARCHS[2]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def create(name: str = 'shiftformer_supernet', **kwargs):
    own = dict(arch=ARCHS[3].to_dict()) if name == 'shiftformer_subnet' else dict(space=SPACE)
    return timm.create_model(name, **{
        **own, **dict(img_size=(16, 24), patch_size=8, max_relative_position=1, num_classes=5), **kwargs})


def noise(model, std: float = .2):
    """Move every parameter off its initial value, norms and biases included."""
    with torch.no_grad():
        for weight in model.parameters():
            weight += std * torch.randn_like(weight)
    return model


def images(model, batch: int = 2) -> torch.Tensor:
    weight = next(model.parameters())
    return torch.randn(batch, model.in_chans, *model.patch_embed.img_size, dtype=weight.dtype)


def masks_of(arch, **kwargs) -> ShiftFormerMasks:
    return arch_masks(SPACE, [one_hot.to(**kwargs) for one_hot in SPACE.one_hot(arch)])


# -- stock timm --------------------------------------------------------------------------------------------------------


class Heads64(Attention):
    """timm's attention with heads of 64 channels."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, attn_head_dim=64, **kwargs)


def stock(arch, **kwargs) -> VisionTransformer:
    """A plain timm ViT of an arch with the same heads and MLP ratio in every layer."""
    (heads,), (ratio,) = set(arch.num_heads), set(arch.mlp_ratio)
    return VisionTransformer(**{
        **dict(img_size=(16, 24), patch_size=8, num_classes=5, embed_dim=arch.embed_dim, depth=arch.depth,
               num_heads=heads, mlp_ratio=ratio, norm_layer=partial(LayerNorm, eps=1e-5), attn_layer=Heads64,
               global_pool='avg', fc_norm=False), **kwargs})


STOCK_OPTIONS = {
    'default': {}, 'token': dict(global_pool='token'), 'max': dict(global_pool='max'),
    'avgmax': dict(global_pool='avgmax'), 'unpooled': dict(global_pool=''), 'fc_norm': dict(fc_norm=True),
    'no_norm': dict(final_norm=False), 'no_class_token': dict(class_token=False), 'no_qkv_bias': dict(qkv_bias=False),
    'no_proj_bias': dict(proj_bias=False), 'no_embed_class': dict(no_embed_class=True),
    'no_positions': dict(pos_embed='none'), 'prefix_in_pool': dict(pool_include_prefix=True),
    'features': dict(num_classes=0), 'grey': dict(in_chans=1), 'relu': dict(act_layer='relu'),
}


@pytest.mark.parametrize('name', STOCK_OPTIONS)
def test_without_relative_position_it_is_stock_timm(name):
    options = STOCK_OPTIONS[name]
    plain = noise(stock(SPACE.largest, **options)).eval()
    net = create(relative_position=False, **options).eval()
    shapes = [{name: weight.shape for name, weight in model.state_dict().items()} for model in (plain, net)]
    assert shapes[0] == shapes[1]
    net.load_state_dict(plain.state_dict())
    x = images(net)
    torch.testing.assert_close(net(x), plain(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(net.forward_features(x), plain.forward_features(x), rtol=0, atol=1e-6)
    # and so is every uniform subnet
    arch = SPACE.arch(embed_dim=24, depth=2, num_heads=1, mlp_ratio=1.7)
    small = stock(arch, **options).eval()
    small.load_state_dict(tsn.extract(net, arch).state_dict())
    torch.testing.assert_close(net(x, arch), small(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize('eps', [1e-6, 1e-2])
def test_norm_eps(eps):
    plain = stock(SPACE.largest, norm_layer=partial(LayerNorm, eps=eps)).eval()
    net = create(relative_position=False, norm_eps=eps).eval()
    net.load_state_dict(plain.state_dict())
    x = images(net) * 1e-2
    torch.testing.assert_close(net(x), plain(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(tsn.extract(net, MIDDLE)(x), net(x, MIDDLE), rtol=0, atol=1e-6)


def test_a_plain_vit_seeds_a_supernet(tmp_path):
    plain = noise(stock(SPACE.largest)).eval()
    save_file(plain.state_dict(), tmp_path / 'vit.safetensors')
    net = create(relative_position=False, pretrained=True, pretrained_cfg_overlay=dict(
        file=str(tmp_path / 'vit.safetensors'), num_classes=5)).eval()
    x = images(net)
    torch.testing.assert_close(net(x), plain(x), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match='blocks.0.attn.rel_pos'):
        create(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'vit.safetensors'), num_classes=5))


def test_initial_values():
    """Linears, tables, class token, positions: truncated normal of 0.02; biases 0; norms 1; convolution as torch's."""
    net = timm.create_model('shiftformer_tiny_supernet', num_classes=10)
    for name, weight in net.named_parameters():
        if name.startswith('patch_embed'):
            bound = 1 / math.sqrt(3 * 16 * 16)
            assert weight.abs().max() <= bound and abs(weight.std() - bound / math.sqrt(3)) < .1 * bound, name
        elif 'norm' in name and name.endswith('weight'):
            assert (weight == 1).all(), name
        elif name.endswith('bias'):
            assert (weight == 0).all(), name
        else:
            assert abs(weight.std() - .02) < .0025 and abs(weight.mean()) < .0025, name


# -- masks, through the whole network ----------------------------------------------------------------------------------


def reference(net, x, masks: ShiftFormerMasks) -> torch.Tensor:
    """The masked network in plain float64 arithmetic, written from AutoFormer's definition."""
    w = {name: weight.detach().double() for name, weight in net.state_dict().items()}
    embed, depth, heads, hidden = masks
    (rows, cols), limit = net.patch_embed.grid_size, net.model_args['max_relative_position']

    def norm(stream, name):
        mean = (stream * embed).sum(-1, keepdim=True) / embed.sum()
        variance = (((stream - mean) ** 2) * embed).sum(-1, keepdim=True) / embed.sum()
        return ((stream - mean) / (variance + 1e-5).sqrt() * w[f'{name}.weight'] + w[f'{name}.bias']) * embed

    def pairs(row_table, col_table):  # [query, key, 64]
        def entry(query, key):
            if query == 0 or key == 0:
                return row_table[0] + col_table[0]
            steps = ((key - 1) // cols - (query - 1) // cols, (key - 1) % cols - (query - 1) % cols)
            row, col = (min(max(step, -limit), limit) + limit + 1 for step in steps)
            return row_table[row] + col_table[col]
        return torch.stack([torch.stack([entry(q, k) for k in range(tokens)]) for q in range(tokens)])

    patches = [x[:, :, 8 * i:8 * i + 8, 8 * j:8 * j + 8].flatten(1) for i in range(rows) for j in range(cols)]
    stream = torch.stack(patches, 1).double() @ w['patch_embed.proj.weight'].flatten(1).T + w['patch_embed.proj.bias']
    stream = torch.cat([w['cls_token'].expand(len(x), -1, -1), stream], 1) + w['pos_embed']
    tokens, largest = stream.shape[1], heads.shape[1]
    for layer in range(len(depth)):
        name = f'blocks.{layer}'
        bias = w[f'{name}.attn.qkv.bias']
        if net.model_args['qkv_bias_slicing'] == 'joint':
            used = 64 * int(heads[layer].sum().round())
            bias = torch.cat([torch.cat([
                bias[role * used:(role + 1) * used], bias[64 * largest * role + used:64 * largest * (role + 1)],
            ]) for role in range(3)])
        qkv = norm(stream, f'{name}.norm1') @ w[f'{name}.attn.qkv.weight'].T + bias
        branch = 0
        for head in range(largest):
            q, k, v = (qkv[..., 64 * (largest * role + head):][..., :64] for role in range(3))
            logits, value = q @ k.transpose(1, 2), v[:, None].expand(-1, tokens, -1, -1)
            if f'{name}.attn.rel_pos.k_rows' in w:
                tables = {part: w[f'{name}.attn.rel_pos.{part}'] for part in ('k_rows', 'k_cols', 'v_rows', 'v_cols')}
                logits = logits + (q[:, :, None] * pairs(tables['k_rows'], tables['k_cols'])).sum(-1)
                value = value + pairs(tables['v_rows'], tables['v_cols'])
            out = ((logits / 8).softmax(-1)[..., None] * value).sum(2) * heads[layer, head]
            branch = branch + out @ w[f'{name}.attn.proj.weight'][:, 64 * head:64 * head + 64].T
        stream = stream + (branch + w[f'{name}.attn.proj.bias']) * depth[layer]
        inner = norm(stream, f'{name}.norm2') @ w[f'{name}.mlp.fc1.weight'].T + w[f'{name}.mlp.fc1.bias']
        inner = inner * .5 * (1 + torch.erf(inner / math.sqrt(2))) * hidden[layer]
        stream = stream + (inner @ w[f'{name}.mlp.fc2.weight'].T + w[f'{name}.mlp.fc2.bias']) * depth[layer]
    return norm(stream, 'norm')[:, 1:].mean(1) @ w['head.weight'].T + w['head.bias']


@pytest.mark.parametrize('options', [
    {}, dict(relative_position=False), dict(qkv_bias_slicing='joint'), dict(fc_norm=True), dict(final_norm=False),
    dict(final_norm=False, fc_norm=True), dict(global_pool='token'), dict(global_pool='avgmax'), dict(num_classes=0),
    dict(class_token=False), dict(qkv_bias=False), dict(no_embed_class=True),
], ids=str)
def test_mask_equals_slice(options):
    net = noise(create(**options)).double().eval()
    x = images(net)
    for arch in ARCHS:
        out, expected = net(x, masks_of(arch)), net(x, arch)
        if not options.get('num_classes', 1):  # features stay full-width, and zero where they are inactive
            assert (out[:, arch.embed_dim:] == 0).all()
            out = out[:, :arch.embed_dim]
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_mask_equals_slice_in_fp32():
    net = noise(create(), .05).eval()
    x = images(net)
    for arch in ARCHS:
        torch.testing.assert_close(net(x, masks_of(arch, dtype=torch.float32)), net(x, arch), rtol=0, atol=1e-5)
        # masks are cast to the dtype of the network
        torch.testing.assert_close(net(x, masks_of(arch)), net(x, arch), rtol=0, atol=1e-5)
    with torch.no_grad():
        assert net.bfloat16()(x.bfloat16(), masks_of(MIDDLE)).dtype == torch.bfloat16


@pytest.mark.parametrize('relative', [True, False])
@pytest.mark.parametrize('bias_slicing', ['role', 'joint'])
@pytest.mark.parametrize('fused', [True, False])
def test_gradients_of_masks(relative, bias_slicing, fused):
    """Equal to the plain reference, and non-zero for all inactive entries of existing layers and of the depth."""
    net = noise(create(relative_position=relative, qkv_bias_slicing=bias_slicing)).double().eval()
    for block in net.blocks:
        block.attn.fused_attn = fused
    x = images(net)
    cotangent = torch.randn(2, 5, dtype=torch.float64)
    for arch in (SPACE.smallest, MIDDLE, ARCHS[3]):
        leaves = ShiftFormerMasks(*(mask.requires_grad_() for mask in masks_of(arch)))
        out, expected = net(x, leaves), reference(net, x, leaves)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        gradients = ShiftFormerMasks(*torch.autograd.grad((out * cotangent).sum(), leaves))
        references = torch.autograd.grad((expected * cotangent).sum(), leaves)
        for gradient, other in zip(gradients, references):
            torch.testing.assert_close(gradient, other, rtol=1e-7, atol=1e-9)
        assert (gradients.embed_dim[arch.embed_dim:] != 0).all()
        assert (gradients.depth[arch.depth:] != 0).all()
        for layer in range(arch.depth):
            assert (gradients.num_heads[layer, arch.num_heads[layer]:] != 0).all()
            assert (gradients.hidden[layer, int(arch.embed_dim * arch.mlp_ratio[layer]):] != 0).all()


def test_masks_off_the_corners():
    """The reference and the network are the same function of continuous masks, not only of 0 and 1."""
    net = noise(create()).double().eval()
    masks = ShiftFormerMasks(*(.2 + .8 * torch.rand_like(mask) for mask in masks_of(MIDDLE)))
    x = images(net)
    torch.testing.assert_close(net(x, masks), reference(net, x, masks), rtol=1e-9, atol=1e-9)


def test_masked_gradients_of_weights_equal_sliced():
    net = noise(create()).double()
    x = images(net)
    net(x, MIDDLE).square().sum().backward()
    sliced = {name: weight.grad for name, weight in net.named_parameters()}
    net.zero_grad(set_to_none=True)
    net(x, masks_of(MIDDLE)).square().sum().backward()
    for name, weight in net.named_parameters():
        if sliced[name] is not None:
            torch.testing.assert_close(weight.grad, sliced[name], rtol=1e-9, atol=1e-9)


# -- timm's model contract ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_registered_names():
    assert timm.list_models('*shiftformer*') == NAMES == timm.list_models(module='shiftformer')
    assert timm.list_models('*shiftformer*', pretrained=True) == []  # no weights are published under these names
    for name in NAMES:
        net = timm.create_model(name, device='meta')
        assert isinstance(net, ShiftFormer) and isinstance(net, VisionTransformer)
        assert isinstance(net, ShiftFormerSupernet) == name.endswith('supernet')
        assert net.pretrained_cfg['architecture'] == name
        assert (net.pretrained_cfg['first_conv'], net.pretrained_cfg['classifier']) == ('patch_embed.proj', 'head')


@pytest.mark.parametrize('name', ['shiftformer_supernet', 'shiftformer_subnet'])
@pytest.mark.parametrize('options, shape', [
    (dict(num_classes=3), (2, 3)), (dict(in_chans=4), (2, 5)), (dict(img_size=40), (2, 5)),
    (dict(img_size=(8, 40)), (2, 5)), (dict(global_pool='token'), (2, 5)), (dict(global_pool='max'), (2, 5)),
    (dict(global_pool=''), (2, 7, 5)), (dict(num_classes=0), (2, 40)),
    (dict(num_classes=0, global_pool=''), (2, 7, 40)),
], ids=str)
def test_output_shapes(name, options, shape):
    net = create(name, **options).eval()
    x = images(net)
    assert net(x).shape == shape
    torch.testing.assert_close(net.forward_head(net.forward_features(x)), net(x))
    assert net.forward_head(net.forward_features(x), pre_logits=True).shape == (*shape[:-1], 40)
    if name == 'shiftformer_supernet':
        assert net(x, SPACE.smallest).shape == ((*shape[:-1], 24) if shape[-1] == 40 else shape)


@pytest.mark.parametrize('name', ['shiftformer_supernet', 'shiftformer_subnet'])
def test_device_and_dtype(name):
    net = create(name, device='meta', dtype=torch.float64)
    assert {(weight.device.type, weight.dtype) for weight in net.parameters()} == {('meta', torch.float64)}
    assert not list(net.buffers())
    net = net.to_empty(device='cpu').eval()
    with torch.no_grad():
        for weight in net.parameters():
            weight.fill_(math.nan)
    net.init_weights()
    assert all(weight.isfinite().all() for weight in net.parameters())
    assert net(images(net)).isfinite().all()
    net.reset_classifier(3)
    assert net.head.weight.dtype == torch.float64 and net(images(net)).shape == (2, 3)
    assert create(name, dtype=torch.bfloat16)(images(net).bfloat16()).dtype == torch.bfloat16


def test_drop_rates():
    net = create(drop_rate=.1, drop_path_rate=.2, attn_drop_rate=.3, proj_drop_rate=.4, pos_drop_rate=.5)
    assert (net.head_drop.p, net.pos_drop.p) == (.1, .5)
    assert [getattr(block.drop_path1, 'drop_prob', 0.) for block in net.blocks] == pytest.approx([0, .1, .2])
    assert all(block.attn.attn_drop.p == .3 and block.attn.proj_drop.p == .4 for block in net.blocks)
    assert all(block.mlp.drop1.p == block.mlp.drop2.p == .4 for block in net.blocks)
    x = images(net)
    for arch in (MIDDLE, masks_of(MIDDLE)):
        net.train()
        assert not torch.equal(net(x, arch), net(x, arch))
        net.eval()
        assert torch.equal(net(x, arch), net(x, arch))
    sub = tsn.extract(net, MIDDLE)
    rates = [sub.head_drop.p, sub.blocks[2].drop_path1.drop_prob, sub.blocks[0].attn.attn_drop.p]
    assert rates == pytest.approx([.1, .2, .3])


def test_training_drops_whole_branches():
    """With a drop-path rate near 1, the deepest branch contributes nothing to most samples."""
    net = noise(create(drop_path_rate=.999)).train()
    x, kept = images(net, 64), net.forward_features(images(net, 64)[:1])
    index = net.relative_index(kept)
    tokens = torch.randn(64, 7, 40)
    assert torch.equal(net.blocks[2](tokens, index=index), tokens)
    assert not torch.equal(net.blocks[0](tokens, index=index), tokens)  # rate 0
    assert net(x, MIDDLE).isfinite().all()


def test_input_config_follows_the_network():
    """timm keeps the present size apart from the configuration of the pretrained weights."""
    net = create(img_size=(16, 24), in_chans=1)
    assert get_model_input_config(net)['input_size'] == (1, 16, 24)
    net.set_input_size((32, 32))
    assert get_model_input_config(net)['input_size'] == (1, 32, 32)
    # an extracted network carries its present configuration
    sub = tsn.extract(net, MIDDLE)
    assert resolve_model_data_config(sub)['input_size'] == get_model_input_config(sub)['input_size'] == (1, 32, 32)
    assert sub.pretrained_cfg['num_classes'] == 5 and sub.pretrained_cfg['architecture'] == 'shiftformer_subnet'
    assert timm.create_model('test_shiftformer_supernet', device='meta').pretrained_cfg['input_size'] == (3, 32, 32)


@pytest.mark.parametrize('name', ['shiftformer_supernet', 'shiftformer_subnet'])
def test_reset_classifier(name):
    net = noise(create(name)).eval()
    x = images(net)
    features = net.forward_head(net.forward_features(x), pre_logits=True)
    assert net.get_classifier() is net.head
    net.head.requires_grad_(False)
    net.train().reset_classifier(9)
    assert net.head.training and net.num_classes == 9 and net.eval()(x).shape == (2, 9)
    torch.testing.assert_close(net(x), F.linear(features, net.head.weight, net.head.bias))
    net.reset_classifier(0)
    torch.testing.assert_close(net(x), features)
    net.reset_classifier(4, 'token')
    assert not any(module.training for module in net.modules())
    torch.testing.assert_close(
        net(x), F.linear(net.forward_features(x)[:, 0], net.head.weight, net.head.bias))
    for pool in ('map', 'prr', 'nonsense'):
        with pytest.raises(ValueError, match='global_pool'):
            net.reset_classifier(4, pool)
    if name == 'shiftformer_supernet':
        assert net(x, SPACE.smallest).shape == (2, 4) and net.space.geometry['num_classes'] == 4
        torch.testing.assert_close(tsn.extract(net, MIDDLE)(x), net(x, MIDDLE), rtol=0, atol=1e-5)


@pytest.mark.parametrize('name', ['shiftformer_supernet', 'shiftformer_subnet'])
def test_set_input_size(name):
    net = noise(create(name, max_relative_position=6)).eval()
    before = copy.deepcopy(net.state_dict())
    net.set_input_size()  # no change
    assert all(torch.equal(weight, before[key]) for key, weight in net.state_dict().items())
    net.set_input_size((24, 56))  # from 2 x 3 patches to 3 x 7
    after = net.state_dict()
    assert net.patch_embed.grid_size == (3, 7)
    torch.testing.assert_close(
        after['pos_embed'], resample_abs_pos_embed(before['pos_embed'], (3, 7), (2, 3), num_prefix_tokens=1))
    for key in after:
        if '.rel_pos.' in key:  # distances up to 1 (rows) and 2 (columns) were trained; the rest was noise
            reach = 2 if key.endswith('cols') else 1
            rows = [0] + [7 + max(-reach, min(reach, step)) for step in range(-6, 7)]
            assert torch.equal(after[key], before[key][rows]), key
        elif key != 'pos_embed':
            assert torch.equal(after[key], before[key])
    # untrained rows have no influence
    other = create(name, max_relative_position=6).eval()
    state = {k: torch.where(
        torch.tensor([[row in (0, 5, 6, 7, 8, 9)] for row in range(14)]), v, torch.randn_like(v))
        if k.endswith('cols') else v for k, v in before.items()}
    other.load_state_dict(state)
    other.set_input_size((24, 56))
    x = images(net)
    torch.testing.assert_close(net(x), other(x))
    net.set_input_size((16, 24))  # smaller again: the tables stay
    assert all(torch.equal(net.state_dict()[key], after[key]) for key in after if '.rel_pos.' in key)
    assert net(images(net)).isfinite().all()
    # gradients, device and requires_grad survive
    net.requires_grad_(False)
    net.set_input_size(img_size=40)
    assert not any(weight.requires_grad for weight in net.parameters())


def test_set_input_size_rebinds_and_extracts():
    net = noise(create(max_relative_position=4)).eval()
    net.set_input_size((40, 24))
    x = images(net)
    for arch in ARCHS:
        torch.testing.assert_close(tsn.extract(net, arch)(x), net(x, arch), rtol=0, atol=1e-5)
    assert net.space.geometry['img_size'] == (40, 24)
    weight = net.patch_embed.proj.weight.detach()
    net.set_input_size(patch_size=4)
    torch.testing.assert_close(net.patch_embed.proj.weight.detach(), resample_patch_embed(weight, (4, 4)))
    assert net.space.geometry['patch_size'] == (4, 4) and net.model_args['patch_size'] == (4, 4)
    torch.testing.assert_close(tsn.extract(net, MIDDLE)(x), net(x, MIDDLE), rtol=0, atol=1e-5)


@pytest.mark.parametrize('name', ['shiftformer_supernet', 'shiftformer_subnet'])
def test_wrong_input_size(name):
    # timm's own message for the static network
    with pytest.raises((ValueError, AssertionError), match='24.*16'):
        create(name)(torch.randn(1, 3, 24, 24))


def test_gradient_checkpointing():
    net = noise(create()).double().train()
    x = images(net)
    gradients = []
    for arch in (MIDDLE, ARCHS[3]):
        net.zero_grad(set_to_none=True)
        net(x, arch).square().sum().backward()
        gradients.append({name: weight.grad for name, weight in net.named_parameters() if weight.grad is not None})
    net.zero_grad(set_to_none=True)
    net.set_grad_checkpointing()
    assert net.grad_checkpointing
    # two archs in one backward: the recomputation must see the arch of its own forward
    (net(x, MIDDLE).square().sum() + net(x, ARCHS[3]).square().sum()).backward()
    for name, weight in net.named_parameters():
        expected = sum(gradient[name] for gradient in gradients if name in gradient)
        torch.testing.assert_close(weight.grad, expected, rtol=1e-10, atol=1e-10)
    masks = ShiftFormerMasks(*(mask.requires_grad_() for mask in masks_of(MIDDLE)))
    checkpointed = torch.autograd.grad(net(x, masks).sum(), masks)
    net.set_grad_checkpointing(False)
    for gradient, expected in zip(checkpointed, torch.autograd.grad(net(x, masks).sum(), masks)):
        torch.testing.assert_close(gradient, expected)


def test_gradients_reach_exactly_the_arch():
    net = noise(create())
    net(images(net), MIDDLE).square().sum().backward()
    reached = {name: weight.grad != 0 for name, weight in net.named_parameters() if weight.grad is not None}
    assert reached['patch_embed.proj.bias'].tolist() == [True] * 24 + [False] * 16
    proj = reached['blocks.1.attn.proj.weight']  # one head of 64
    assert proj[:24, :64].all() and not proj[24:].any() and not proj[:, 64:].any()
    assert not reached['blocks.2.mlp.fc1.weight'][40:].any()  # int(24 * 1.7)
    net.zero_grad(set_to_none=True)
    net(images(net), SPACE.smallest).sum().backward()
    deeper = [weight.grad for name, weight in net.named_parameters() if name.startswith(('blocks.1', 'blocks.2'))]
    assert deeper and all(gradient is None for gradient in deeper)


def test_optimizer_groups():
    net = create()
    skipped = net.no_weight_decay()
    tables = {name for name, _ in net.named_parameters() if '.rel_pos.' in name}
    assert len(tables) == 12 and tables | {'cls_token', 'pos_embed'} <= skipped
    optimizer = create_optimizer_v2(net, opt='adamw', weight_decay=.1)
    groups = [group['params'] for group in optimizer.param_groups if group['weight_decay'] > 0]
    decayed = {id(weight) for group in groups for weight in group}
    for name, weight in net.named_parameters():
        assert (id(weight) in decayed) == (weight.ndim > 1 and name not in tables | {'cls_token', 'pos_embed'}), name
    optimizer = create_optimizer_v2(net, opt='adamw', layer_decay=.5)
    scales = {id(weight): group['lr_scale'] for group in optimizer.param_groups for weight in group['params']}
    by_layer = [scales[id(net.blocks[layer].attn.rel_pos.k_rows)] for layer in range(3)]
    assert by_layer == sorted(by_layer) and len(set(by_layer)) == 3  # tables go with their block
    assert scales[id(net.pos_embed)] == min(scales.values()) and scales[id(net.head.weight)] == max(scales.values())


@pytest.mark.parametrize('name', ['shiftformer_supernet', 'shiftformer_subnet'])
def test_intermediate_features(name):
    net = noise(create(name)).eval()
    x = images(net)
    final, features = net.forward_intermediates(x)
    torch.testing.assert_close(final, net.forward_features(x))
    assert len(features) == len(net.blocks) and all(feature.shape == (2, 40, 2, 3) for feature in features)
    last = net.forward_intermediates(x, indices=1, norm=True, output_fmt='NLC', intermediates_only=True)[0]
    torch.testing.assert_close(last, final[:, 1:])
    backbone = create(name, features_only=True, out_indices=(0, 1)).eval()
    assert backbone.feature_info.channels() == [40, 40] and backbone.feature_info.reduction() == [8, 8]
    assert [feature.shape for feature in backbone(x)] == [(2, 40, 2, 3)] * 2
    assert FeatureInfo(net.feature_info, (0,)).channels() == [40]


def test_extracted_networks_are_backbones():
    net = noise(create()).eval()
    sub = tsn.extract(net, MIDDLE)
    features = sub.forward_intermediates(images(net), intermediates_only=True)
    assert [feature.shape for feature in features] == [(2, 24, 2, 3)] * 3


# -- copies ------------------------------------------------------------------------------------------------------------


def test_copies_and_averages():
    net = noise(create()).train()
    x = images(net)
    net(x, MIDDLE).sum().backward()  # a forward leaves no state behind
    ema = ModelEmaV3(net, decay=.5)
    clone = copy.deepcopy(net)
    noise(net)
    ema.update(net)
    for name, average in ema.module.state_dict().items():
        torch.testing.assert_close(average, (clone.state_dict()[name] + net.state_dict()[name]) / 2)
    assert ema.module.space == net.space and ema.module.macs(MIDDLE) == net.macs(MIDDLE)
    ema.module.eval()
    torch.testing.assert_close(tsn.extract(ema, MIDDLE)(x), ema.module(x, MIDDLE), rtol=0, atol=1e-5)
    clone.reset_classifier(2)
    assert net.space.geometry['num_classes'] == 5  # no state is shared


def test_nothing_about_an_arch_is_stored():
    net = noise(create()).eval()

    def attributes():
        return {name: dict(module.__dict__) for name, module in net.named_modules()}

    x, before = images(net), attributes()
    first = net(x, MIDDLE)
    net(x, SPACE.smallest), net(x), net(x, masks_of(MIDDLE))
    after = attributes()
    assert before.keys() == after.keys() and all(before[name].keys() == after[name].keys() for name in before)
    assert torch.equal(net(x, MIDDLE), first)


def test_other_values_than_archs():
    net = create()
    for arch in (dict(depth=1), 'largest', timm.create_model('shiftformer_subnet', device='meta').arch):
        with pytest.raises(ValueError):
            net(images(net), arch)


# -- refused options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['shiftformer_supernet', 'shiftformer_subnet'])
@pytest.mark.parametrize('options', [
    dict(patch_drop_rate=.1), dict(reg_tokens=4), dict(qk_norm=True), dict(init_values=1e-5), dict(global_pool='map'),
    dict(global_pool='prr'), dict(dynamic_img_size=True), dict(pre_norm=True), dict(scale_attn_norm=True),
    dict(scale_mlp_norm=True), dict(embed_dim=64), dict(depth=2), dict(num_heads=2), dict(mlp_ratio=2.),
    dict(norm_layer='layernorm'), dict(block_fn=torch.nn.Identity), dict(class_token=False, global_pool='token'),
], ids=str)
def test_refused_options(name, options):
    with pytest.raises(ValueError, match='|'.join(options)) as error:
        create(name, **options)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['shiftformer_supernet', 'shiftformer_subnet'])
def test_unknown_options(name):
    with pytest.raises(TypeError, match='colour'):
        create(name, colour='red')


@pytest.mark.parametrize('options', [
    dict(space=None), dict(space=dict(family='shiftformer')), dict(space='tiny'), dict(qkv_bias_slicing='both'),
    dict(space=dict(SPACE.to_dict(), depth=[])),
], ids=str)
def test_bad_supernet_arguments(options):
    with pytest.raises(ValueError):
        ShiftFormerSupernet(**dict(dict(space=SPACE, img_size=16, patch_size=8), **options))


@pytest.mark.parametrize('arch', [
    None, 'tiny', {}, dict(embed_dim=24, depth=2, num_heads=1),
    dict(embed_dim=24, depth=2, num_heads=[1], mlp_ratio=1.), dict(embed_dim=-1, depth=2, num_heads=1, mlp_ratio=1.),
    dict(embed_dim=24, depth=2, num_heads=[1, None], mlp_ratio=1.),
], ids=str)
def test_bad_subnet_arguments(arch):
    with pytest.raises(ValueError):
        ShiftFormer(arch)


def test_space_as_a_dict():
    assert create(space=SPACE.to_dict()).space == create().space
    assert create(space=create(img_size=32).space.to_dict()).space == create().space  # bound to its own geometry


# -- checkpoints -------------------------------------------------------------------------------------------------------


def saved(net, path, key=None) -> dict:
    """Save a network's weights; return the overlay with which timm loads them."""
    if key is None:
        save_file(net.state_dict(), path / 'model.safetensors')
        path = path / 'model.safetensors'
    else:
        torch.save({key: {f'module.{name}': weight for name, weight in net.state_dict().items()}}, path / 'model.pth')
        path = path / 'model.pth'
    return dict(file=str(path), num_classes=net.num_classes, input_size=(net.in_chans, *net.patch_embed.img_size))


@pytest.mark.parametrize('name', ['shiftformer_supernet', 'shiftformer_subnet'])
@pytest.mark.parametrize('key', [None, 'state_dict'])
def test_load_a_checkpoint(name, key, tmp_path):
    net = noise(create(name)).eval()
    other = create(name, pretrained=True, pretrained_cfg_overlay=saved(net, tmp_path, key)).eval()
    assert all(torch.equal(weight, net.state_dict()[name]) for name, weight in other.state_dict().items())


@pytest.mark.parametrize('name', ['shiftformer_supernet', 'shiftformer_subnet'])
def test_fine_tune(name, tmp_path):
    """Other classes, another image size and other channels, from one checkpoint."""
    net = noise(create(name, max_relative_position=4)).eval()
    overlay = saved(net, tmp_path)
    create_other = partial(create, name, max_relative_position=4, pretrained=True, pretrained_cfg_overlay=overlay)
    trunk = {key: weight for key, weight in net.state_dict().items() if not key.startswith('head.')}

    classes = create_other(num_classes=3)
    assert classes.head.weight.shape == (3, 40)
    assert all(torch.equal(classes.state_dict()[key], weight) for key, weight in trunk.items())
    assert create_other(num_classes=0).state_dict().keys() == trunk.keys()

    grey = create_other(in_chans=1)
    torch.testing.assert_close(
        grey.patch_embed.proj.weight, net.patch_embed.proj.weight.sum(1, keepdim=True))

    larger = create_other(img_size=(40, 32)).state_dict()
    resized = copy.deepcopy(net)
    resized.set_input_size((40, 32))
    for key, weight in resized.state_dict().items():
        torch.testing.assert_close(larger[key], weight, msg=key)
    assert not torch.equal(larger['blocks.0.attn.rel_pos.k_cols'], net.state_dict()['blocks.0.attn.rel_pos.k_cols'])

    finer = create_other(patch_size=4).state_dict()
    resized = copy.deepcopy(net)
    resized.set_input_size(patch_size=4)
    for key, weight in resized.state_dict().items():
        torch.testing.assert_close(finer[key], weight, msg=key)

    further = create_other(max_relative_position=6).state_dict()['blocks.0.attn.rel_pos.k_cols']
    torch.testing.assert_close(further, extend_table(net.blocks[0].attn.rel_pos.k_cols.detach(), 2, 6))

    both = create_other(num_classes=7, in_chans=1, img_size=64)
    assert both(torch.randn(1, 1, 64, 64)).isfinite().all()


def test_the_old_grid_is_read_off_the_positions():
    """Without metadata a square number of positions means a square grid, as in timm."""
    net = noise(create(img_size=16, max_relative_position=4))
    larger = create(img_size=40, max_relative_position=4)
    state = checkpoint_filter_fn(net.state_dict(), larger)
    for part in ('k_rows', 'k_cols'):
        table = net.state_dict()[f'blocks.0.attn.rel_pos.{part}']
        torch.testing.assert_close(state[f'blocks.0.attn.rel_pos.{part}'], extend_table(table, 1, 4))
    larger.load_state_dict(state)
    # without positions and image size, the grid is assumed to be the same
    net, other = (create(img_size=size, max_relative_position=4, pos_embed='none') for size in (16, 40))
    state = checkpoint_filter_fn(net.state_dict(), other)
    assert all(torch.equal(weight, net.state_dict()[name]) for name, weight in state.items())
    other.pretrained_model_args = dict(img_size=16)
    state = checkpoint_filter_fn(net.state_dict(), other)
    table = net.state_dict()['blocks.2.attn.rel_pos.v_rows']
    torch.testing.assert_close(state['blocks.2.attn.rel_pos.v_rows'], extend_table(table, 1, 4))


@pytest.mark.parametrize('name', ['shiftformer_supernet', 'shiftformer_subnet'])
@pytest.mark.parametrize('change', [
    dict(embed_dim=(24, 48)), dict(depth=(1, 2, 4)), dict(depth=(1, 1 + 1)), dict(num_heads=(1, 3)),
    dict(mlp_ratio=(1.0, 2.0)),
], ids=str)
def test_a_checkpoint_of_another_space(name, change, tmp_path):
    other = tsn.shiftformer_space(**{**dict(SPACE.fields), **change})
    net = create(space=other)
    if name == 'shiftformer_subnet':
        net = tsn.extract(net, other.largest)
        arguments = dict(arch=SPACE.largest.to_dict())
    else:
        arguments = {}
    with pytest.raises(ValueError, match='another network.*space=') as error:
        create(name, pretrained=True, pretrained_cfg_overlay=saved(net, tmp_path), **arguments)
    assert '\n' not in str(error.value) and len(str(error.value)) < 300


def test_a_checkpoint_of_other_classes(tmp_path):
    net = create(num_classes=5)
    overlay = saved(net, tmp_path)
    with pytest.raises(ValueError, match='num_classes=5'):
        create(num_classes=9, pretrained=True, pretrained_cfg_overlay=dict(overlay, num_classes=9))


def test_files_that_are_not_checkpoints(tmp_path):
    save_file({'weight': torch.zeros(3)}, tmp_path / 'model.safetensors')
    with pytest.raises(ValueError, match='another network'):
        create(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'model.safetensors')))
    with pytest.raises(RuntimeError, match='No pretrained weights exist'):
        create(pretrained=True)


# -- precision, compilation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('relative', [True, False])
def test_half_precision(relative):
    net = create(relative_position=relative).eval()
    x = images(net)
    with torch.no_grad():
        for arch in (MIDDLE, masks_of(MIDDLE)):
            exact = net(x, arch)
            with torch.autocast('cpu', dtype=torch.bfloat16):
                mixed = net(x, arch)
            low = copy.deepcopy(net).bfloat16()(x.bfloat16(), arch)
            assert low.dtype == torch.bfloat16
            for out in (mixed, low):
                assert (out - exact).abs().max() < .05 * exact.abs().max()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        net.train()(x, MIDDLE).float().sum().backward()
    assert all(weight.grad.dtype == torch.float32 for weight in net.parameters() if weight.grad is not None)


def test_plain_attention_gives_the_same_network():
    """`exportable=True` (timm's switch) turns fused attention off."""
    net = noise(create()).eval()
    plain = create(exportable=True).eval()
    assert net.blocks[0].attn.fused_attn and not plain.blocks[0].attn.fused_attn
    plain.load_state_dict(net.state_dict())
    x = images(net)
    for arch in (None, *ARCHS, masks_of(MIDDLE)):
        torch.testing.assert_close(plain(x, arch), net(x, arch), rtol=1e-4, atol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_compiled_training():
    net = noise(create()).train()
    torch._dynamo.reset()
    compiled, x = torch.compile(net, backend='aot_eager'), images(net)
    gradients = []
    for call in (net, compiled):
        net.zero_grad(set_to_none=True)
        call(x, SPACE.smallest).square().sum().backward()
        gradients.append({name: weight.grad for name, weight in net.named_parameters()})
    for name, gradient in gradients[0].items():
        if gradient is None:
            assert gradients[1][name] is None, name
        else:
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
