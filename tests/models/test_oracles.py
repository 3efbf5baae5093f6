"""AutoFormer's published format: a small supernet whose outputs the reference implementation computed.

`data/autoformer_micro*` hold random weights under AutoFormer's names (embed 128, 3 layers, 64 px), and for six archs
the reference's logits, features, a trace of tokens, and summaries of gradients.
"""
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models._input import get_model_args

import timm_shiftnas as tsn
from timm_shiftnas.models.shiftformer import checkpoint_filter_fn
from timm_shiftnas.space import arch_masks

DATA = Path(__file__).parents[1] / 'support' / 'data'
FILE = DATA / 'autoformer_micro.safetensors'
META = json.loads((DATA / 'autoformer_micro.json').read_text())
IO = load_file(DATA / 'autoformer_micro_io.safetensors')
SPACE = tsn.shiftformer_space(
    embed_dim=(96, 112, 128), depth=(1, 2, 3), num_heads=(1, 2), mlp_ratio=(1.0, 1.5, 2.0))
ARCHS = [
    SPACE.arch(embed_dim=row['arch']['embed_dim'][0], depth=row['arch']['layer_num'],
               num_heads=row['arch']['num_heads'], mlp_ratio=row['arch']['mlp_ratio']) for row in META['archs']]
OPTIONS = dict(img_size=64, max_relative_position=2, num_classes=10)


def load(name: str = 'shiftformer_supernet', file: Path = FILE, **kwargs):
    own = {} if name == 'shiftformer_subnet' else dict(space=SPACE)
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(file), num_classes=10), **{
        **own, **OPTIONS, **kwargs}).eval()


@pytest.fixture(scope='module')
def net():
    return load()


@pytest.fixture(scope='module')
def exact():
    return load().double()


# -- every arch, by every way ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('index', range(len(ARCHS)))
def test_logits(net, exact, index, tmp_path):
    arch, x = ARCHS[index], IO['input']
    reference, reference64 = IO[f'logits.{index}'], IO[f'logits64.{index}']
    with torch.no_grad():
        torch.testing.assert_close(net(x, arch), reference, rtol=0, atol=1e-5)
        torch.testing.assert_close(exact(x.double(), arch), reference64, rtol=0, atol=1e-12)
        masks = arch_masks(SPACE, SPACE.one_hot(arch))
        torch.testing.assert_close(net(x, masks), reference, rtol=0, atol=1e-5)
        torch.testing.assert_close(exact(x.double(), masks), reference64, rtol=0, atol=1e-12)
        torch.testing.assert_close(tsn.extract(net, arch)(x), reference, rtol=0, atol=1e-5)
        torch.testing.assert_close(tsn.extract(exact, arch)(x.double()), reference64, rtol=0, atol=1e-12)
        # the published supernet also loads straight into the static network of an arch
        static = load('shiftformer_subnet', arch=arch.to_dict())
        torch.testing.assert_close(static(x), reference, rtol=0, atol=1e-5)
        features = net.forward_head(net.forward_features(x, arch), pre_logits=True, arch=arch)
        torch.testing.assert_close(features, IO[f'features.{index}'], rtol=0, atol=1e-5)


def test_logits_by_plain_attention(exact):
    plain = load(exportable=True).double()
    for index, arch in enumerate(ARCHS):
        assert not plain.blocks[0].attn.fused_attn
        torch.testing.assert_close(plain(IO['input'].double(), arch), IO[f'logits64.{index}'], rtol=0, atol=1e-12)


def test_tokens_layer_by_layer(net):
    arch, seen = ARCHS[3], {}

    def record(name):
        return lambda module, args, output: seen.update({name: output})

    hooks = [block.register_forward_hook(record(f'block{layer}')) for layer, block in enumerate(net.blocks)]
    hooks += [net.norm.register_forward_hook(record('norm')), net.pos_drop.register_forward_hook(record('embed'))]
    with torch.no_grad():
        net(IO['input'], arch)
    for hook in hooks:
        hook.remove()
    assert sorted(seen) == ['block0', 'block1', 'block2', 'embed', 'norm']
    for name, tokens in seen.items():
        torch.testing.assert_close(tokens, IO[f'trace.3.{name}'], rtol=1e-5, atol=1e-5)


def reference_name(name: str) -> str:
    """AutoFormer's name for one of our parameters."""
    for ours, theirs in {
        'patch_embed.': 'patch_embed_super.', 'norm1.': 'attn_layer_norm.', 'norm2.': 'ffn_layer_norm.',
        'mlp.fc1.': 'fc1.', 'mlp.fc2.': 'fc2.', 'rel_pos.k_rows': 'rel_pos_embed_k.embeddings_table_v',
        'rel_pos.k_cols': 'rel_pos_embed_k.embeddings_table_h', 'rel_pos.v_rows': 'rel_pos_embed_v.embeddings_table_v',
        'rel_pos.v_cols': 'rel_pos_embed_v.embeddings_table_h',
    }.items():
        name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize('index', range(len(ARCHS)))
@pytest.mark.parametrize('way', ['slices', 'masks', 'checkpointing'])
def test_gradients(net, index, way):
    arch, row = ARCHS[index], META['archs'][index]
    net.zero_grad(set_to_none=True)
    net.set_grad_checkpointing(way == 'checkpointing')
    logits = net(IO['input'], arch_masks(SPACE, SPACE.one_hot(arch)) if way == 'masks' else arch)
    (logits * IO['grad_logits']).sum().backward()
    net.set_grad_checkpointing(False)
    seen = set()
    for name, weight in net.named_parameters():
        name = reference_name(name)
        if name in row['params_without_grad']:
            assert weight.grad is None or (way == 'masks' and (weight.grad == 0).all()), name
            continue
        summary, gradient = row['grads'][name], weight.grad.double()
        assert abs(gradient.norm() - summary['l2']) <= 1e-4 * summary['l2'], name
        # a sum may cancel: the norm is the scale of its terms
        assert abs(gradient.sum() - summary['sum']) <= 1e-4 * max(abs(summary['sum']), summary['l2']), name
        if not name.endswith('qkv.bias'):  # the bias of the keys has no effect: its gradient is rounding
            assert gradient.count_nonzero() == summary['nonzero'], name
        seen.add(name)
    assert seen == row['grads'].keys()


@pytest.mark.parametrize('variant, options', [
    ('gp_false', dict(global_pool='token')), ('abs_pos_false', dict(pos_embed='none')),
    ('relative_position_false', dict(relative_position=False)),
])
def test_variants(variant, options, tmp_path):
    details = META['variants'][variant]
    state = {name: weight for name, weight in load_file(FILE).items() if name not in details['keys_absent']}
    save_file(state, tmp_path / 'variant.safetensors')
    other, arch = load(file=tmp_path / 'variant.safetensors', **options), ARCHS[details['arch_index']]
    for model in (tsn.Subnet(other, arch), tsn.extract(other, arch)):
        torch.testing.assert_close(model(IO['input']), IO[f'variant.{variant}'], rtol=0, atol=1e-5)


def test_counts(net):
    for arch, row in zip(ARCHS, META['archs']):
        assert net.params(arch) == row['params']
        assert net.macs(arch, convention='reference') == row['macs_measured']


# -- the format --------------------------------------------------------------------------------------------------------


def test_as_published(net, tmp_path):
    """A .pth file with the weights under the key `model`, as AutoFormer publishes them."""
    torch.save({'model': load_file(FILE)}, tmp_path / 'supernet.pth')
    other = load(file=tmp_path / 'supernet.pth')
    assert all(torch.equal(weight, net.state_dict()[name]) for name, weight in other.state_dict().items())
    assert other.model_args == net.model_args


@pytest.mark.parametrize('direct', [True, False])
def test_the_bias_rule_survives(net, direct, tmp_path):
    """Converted, saved and loaded again: from `model_args`, or from timm's record of the arguments."""
    assert net.model_args['qkv_bias_slicing'] == net._model_args['qkv_bias_slicing'] == 'joint'
    save_file(net.state_dict(), tmp_path / 'model.safetensors')
    arguments = net.model_args if direct else get_model_args(net, dict(space=SPACE.to_dict()))
    arguments = json.loads(json.dumps(dict(arguments, space=SPACE.to_dict())))
    other = timm.create_model('shiftformer_supernet', pretrained=True, pretrained_cfg_overlay=dict(
        file=str(tmp_path / 'model.safetensors'), num_classes=10), **arguments).eval()
    assert other.model_args['qkv_bias_slicing'] == 'joint'
    for index, arch in enumerate(ARCHS):
        for model in (tsn.Subnet(other, arch), tsn.extract(other, arch)):
            torch.testing.assert_close(model(IO['input']), IO[f'logits.{index}'], rtol=0, atol=1e-5)
    # the rule matters for fewer heads
    other.set_qkv_bias_slicing('role')
    assert other.model_args['qkv_bias_slicing'] == other._model_args['qkv_bias_slicing'] == 'role'
    assert (other(IO['input'], ARCHS[1]) - IO['logits.1']).abs().max() > 1e-3
    torch.testing.assert_close(other(IO['input'], ARCHS[0]), IO['logits.0'], rtol=0, atol=1e-5)


def widened(state: dict, depth: int = 3) -> dict:
    """A supernet that is wider and deeper, of which the micro supernet is a prefix."""
    generator = torch.Generator().manual_seed(0)
    # embed 128 -> 160, 2 heads -> 3, hidden 256 -> 400; classes, patches, positions and distances stay
    wider = {128: 160, 256: 400, 384: 576}
    wide = {}
    for name, weight in state.items():
        shape = [wider.get(size, size) for size in weight.shape]
        if name.endswith('attn.proj.weight'):
            shape[1] = 3 * 64
        wide[name] = torch.randn(shape, generator=generator)
        wide[name][tuple(slice(size) for size in weight.shape)] = weight
    for name in list(wide):
        if name.startswith('blocks.2.'):
            for layer in range(3, depth):
                wide[name.replace('blocks.2.', f'blocks.{layer}.')] = torch.randn(wide[name].shape, generator=generator)
    return wide


@pytest.mark.parametrize('depth', [3, 5])
def test_a_published_supernet_wider_than_the_space(net, depth, tmp_path):
    """As T, published 256 wide for archs of up to 240: channels that no arch reaches are left out."""
    wide = widened(load_file(FILE), depth)
    assert wide['blocks.0.attn.qkv.weight'].shape == (576, 160)
    save_file(wide, tmp_path / 'wide.safetensors')
    other = load(file=tmp_path / 'wide.safetensors')
    assert all(torch.equal(weight, net.state_dict()[name]) for name, weight in other.state_dict().items())
    for index, arch in enumerate(ARCHS):
        torch.testing.assert_close(other(IO['input'], arch), IO[f'logits.{index}'], rtol=0, atol=1e-5)


def test_the_published_shape_of_tiny():
    """Compared with direct slices: embed 256 for 240, with 4 heads, hidden 1024 for 960, 14 layers."""
    net = timm.create_model('shiftformer_tiny_supernet', num_classes=20, device='meta')
    generator = torch.Generator().manual_seed(0)
    published, wider = {}, {240: 256, 960: 1024}
    for name, weight in net.state_dict().items():
        shape = [wider.get(size, size) for size in weight.shape]
        published[reference_name(name)] = torch.randn(shape, generator=generator)
    state = checkpoint_filter_fn({'model': published}, net)
    assert {name: weight.shape for name, weight in state.items()} == {
        name: weight.shape for name, weight in net.state_dict().items()}
    for layer in (0, 13):
        ours, theirs = f'blocks.{layer}.attn.qkv', published[f'blocks.{layer}.attn.qkv.weight']
        for role in range(3):
            assert torch.equal(state[f'{ours}.weight'][256 * role:256 * role + 256], theirs[role::3][:, :240])
        assert torch.equal(state[f'{ours}.bias'], published[f'{ours}.bias'])
        assert torch.equal(state[f'blocks.{layer}.mlp.fc2.weight'], published[f'blocks.{layer}.fc2.weight'][:240, :960])
        proj = f'blocks.{layer}.attn.proj.weight'
        assert torch.equal(state[proj], published[proj][:240])
    assert torch.equal(state['pos_embed'], published['pos_embed'][..., :240])
    assert torch.equal(state['head.weight'], published['head.weight'][:, :240])
    assert torch.equal(state['patch_embed.proj.weight'], published['patch_embed_super.proj.weight'][:240])
    assert net.model_args['qkv_bias_slicing'] == 'joint'


@pytest.mark.parametrize('change', [
    dict(embed_dim=(96, 144)), dict(num_heads=(1, 3)), dict(mlp_ratio=(1., 3.)), dict(depth=(1, 4))], ids=str)
def test_a_published_supernet_smaller_than_the_space(change):
    with pytest.raises(ValueError, match='another network'):
        load(space=tsn.shiftformer_space(**{**dict(SPACE.fields), **change}))


def test_fine_tuning_a_published_supernet(net):
    """Other classes and a larger image: the head is new, tables and positions are extended."""
    other = load(num_classes=7, img_size=96, max_relative_position=4)
    table = net.blocks[1].attn.rel_pos.v_cols
    assert torch.equal(other.blocks[1].attn.rel_pos.v_cols[3:8], table[1:])
    assert torch.equal(other.blocks[1].attn.rel_pos.v_cols[[1, 2, 8, 9]], table[[1, 1, 5, 5]])
    assert torch.equal(other.blocks[2].mlp.fc1.weight, net.blocks[2].mlp.fc1.weight)
    assert other(torch.randn(1, 3, 96, 96), ARCHS[4]).shape == (1, 7)
