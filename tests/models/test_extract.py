"""Extraction: equal to the supernet, with its own weights, loadable, exportable; and the view that shares weights."""
import copy
import io
import json
import pickle

import pytest
import timm
import torch
from support.flops import counted_macs
from timm.layers import Attention, LayerNorm, Mlp, PatchEmbed
from timm.utils import unwrap_model
from torch import nn

import timm_shiftnas as tsn
from timm_shiftnas import layers
from timm_shiftnas.models.shiftformer import ShiftFormer

SPACE = tsn.shiftformer_space(embed_dim=(24, 40), depth=(1, 2, 3), num_heads=(1, 2), mlp_ratio=(1.0, 1.7, 3.0))
ARCHS = [
    SPACE.smallest, SPACE.largest, SPACE.arch(embed_dim=24, depth=3, num_heads=(2, 1, 1), mlp_ratio=(3.0, 1.0, 1.7)),
    SPACE.arch(embed_dim=40, depth=2, num_heads=(1, 2), mlp_ratio=(1.7, 3.0))]
MIDDLE = ARCHS[2]
OPTIONS = {
    'default': {}, 'plain': dict(relative_position=False), 'joint': dict(qkv_bias_slicing='joint'),
    'no_class_token': dict(class_token=False), 'no_embed_class': dict(no_embed_class=True),
    'no_positions': dict(pos_embed='none'), 'fc_norm': dict(fc_norm=True), 'no_norm': dict(final_norm=False),
    'token': dict(global_pool='token'), 'unpooled': dict(global_pool=''), 'features': dict(num_classes=0),
    'no_biases': dict(qkv_bias=False, proj_bias=False), 'grey': dict(in_chans=1), 'eps': dict(norm_eps=.1),
    'relu': dict(act_layer='relu'), 'oblong_patches': dict(patch_size=(4, 8)), 'double': dict(dtype=torch.float64),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def create(**kwargs):
    net = timm.create_model('shiftformer_supernet', **{
        **dict(space=SPACE, img_size=(16, 24), patch_size=8, max_relative_position=1, num_classes=5), **kwargs})
    with torch.no_grad():
        for weight in net.parameters():
            weight += .1 * torch.randn_like(weight)
    return net.eval()


def images(net, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, net.in_chans, *net.patch_embed.img_size, dtype=next(net.parameters()).dtype)


# -- equality ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', OPTIONS)
def test_equal_to_the_supernet(name):
    net = create(**OPTIONS[name])
    x = images(net)
    for arch in ARCHS:
        sub = tsn.extract(net, arch)
        torch.testing.assert_close(sub(x), net(x, arch), rtol=0, atol=1e-5)
        assert sub.arch == arch and sub.num_classes == net.num_classes
        assert next(sub.parameters()).dtype == next(net.parameters()).dtype


@pytest.mark.slow
def test_equal_on_the_published_space():
    net = timm.create_model('shiftformer_tiny_supernet', num_classes=10).eval()
    x = torch.randn(1, 3, 224, 224)
    arch = net.space.sample(torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(tsn.extract(net, arch)(x), net(x, arch), rtol=0, atol=1e-5)


def test_equal_gradients():
    net = create(dtype=torch.float64)
    sub, x = tsn.extract(net, MIDDLE).train(), images(net)
    net.train()(x, MIDDLE).square().sum().backward()
    sub(x).square().sum().backward()
    # the gradient of a slice is the slice of the gradient: extract it like weights
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    sliced = tsn.extract(net, MIDDLE)
    for name, weight in sub.named_parameters():
        torch.testing.assert_close(weight.grad, sliced.get_parameter(name).data, rtol=1e-9, atol=1e-12)


# -- its own weights ---------------------------------------------------------------------------------------------------


def test_no_storage_is_shared():
    net = create()
    shared = {weight.untyped_storage().data_ptr() for weight in net.state_dict().values()}
    for arch in ARCHS:
        sub = tsn.extract(net, arch)
        own = [weight.untyped_storage() for weight in sub.state_dict().values()]
        assert not shared & {storage.data_ptr() for storage in own}
        assert len({storage.data_ptr() for storage in own}) == len(own)
        # storages hold no more than the slices
        assert all(weight.untyped_storage().nbytes() == weight.nbytes for weight in sub.state_dict().values())
        assert all(weight.is_contiguous() and weight.requires_grad and weight.is_leaf for weight in sub.parameters())
    before = sub(images(net, 1).zero_())
    with torch.no_grad():
        for weight in net.parameters():
            weight.zero_()
    assert torch.equal(sub(images(net, 1).zero_()), before)


def test_extraction_leaves_the_supernet_alone():
    net = create().train()
    net.requires_grad_(False)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    sub = tsn.extract(net, MIDDLE)
    assert sub.training and net.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(weight, before[name]) for name, weight in net.state_dict().items())
    assert not any(weight.requires_grad for weight in net.parameters())
    assert not tsn.extract(net.eval(), MIDDLE).training
    assert tsn.extract(create(device='meta'), MIDDLE).cls_token.is_meta


def test_the_module_is_static_and_made_of_timm_layers():
    sub = tsn.extract(create(), MIDDLE)
    assert type(sub) is ShiftFormer and isinstance(sub.patch_embed, PatchEmbed)
    elastic = tuple(getattr(layers, name) for name in layers.__all__ if name.startswith('Elastic'))
    assert not any(isinstance(module, elastic) for module in sub.modules())
    for block, heads, ratio in zip(sub.blocks, MIDDLE.num_heads, MIDDLE.mlp_ratio, strict=True):
        assert isinstance(block.attn, Attention) and type(block.mlp) is Mlp and type(block.norm1) is LayerNorm
        assert type(block.attn.qkv) is nn.Linear and block.attn.qkv.weight.shape == (3 * 64 * heads, 24)
        assert block.mlp.fc1.weight.shape == (int(24 * ratio), 24) and block.attn.num_heads == heads
    with pytest.raises(TypeError):
        sub(torch.zeros(1, 3, 16, 24), arch=MIDDLE)


def test_copies():
    net = create()
    x = images(net)
    sub = tsn.extract(net, MIDDLE)
    for other in (copy.deepcopy(sub), pickle.loads(pickle.dumps(sub))):
        assert torch.equal(other(x), sub(x)) and other.arch == MIDDLE
    file = io.BytesIO()
    torch.save(sub, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), sub(x))


@pytest.mark.slow
@pytest.mark.parametrize('name', OPTIONS)
def test_loads_into_a_created_network(name):
    """`model_args` and the arch of a subnet, as JSON, are enough to create it again."""
    net = create(**OPTIONS[name])
    sub, x = tsn.extract(net, MIDDLE), images(net)
    arguments = json.loads(json.dumps(dict(sub.model_args, arch=sub.arch.to_dict())))
    other = timm.create_model('shiftformer_subnet', **arguments).to(next(net.parameters()).dtype).eval()
    other.load_state_dict(sub.state_dict())
    assert torch.equal(other(x), sub(x)) and other.arch == MIDDLE


def test_wrapped_supernets():
    net = create()
    x = images(net)
    expected = net(x, MIDDLE)
    for wrapped in (tsn.Subnet(net, SPACE.largest), torch.compile(net, backend='eager'), nn.DataParallel(net)):
        torch.testing.assert_close(tsn.extract(wrapped, MIDDLE)(x), expected, rtol=0, atol=1e-5)


def test_errors():
    net = create()
    with pytest.raises(ValueError, match='not in the space'):
        tsn.extract(net, tsn.shiftformer_space((32,), (1,), (1,), (1.0,)).smallest)
    with pytest.raises(ValueError, match='embed_dim'):
        tsn.extract(net, MIDDLE.to_dict())
    for model in (tsn.extract(net, MIDDLE), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match='not a supernet'):
            tsn.extract(model, MIDDLE)


# -- export ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def exportable():
    torch.manual_seed(0)
    net = timm.create_model('test_shiftformer_supernet', num_classes=10).eval()
    arch = net.space.arch(embed_dim=48, depth=4, num_heads=(1, 2, 3, 2), mlp_ratio=(1, 2, 3, 2))
    return tsn.extract(net, arch), torch.randn(2, 3, 32, 32)


@pytest.mark.slow
def test_torch_export(exportable):
    sub, x = exportable
    program = torch.export.export(sub, (x,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    for batch in (x, torch.randn(5, 3, 32, 32)):
        torch.testing.assert_close(program.module()(batch), sub(batch), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_compiles_as_one_graph(exportable):
    sub, x = exportable
    compiled = torch.compile(sub, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(x), sub(x), rtol=0, atol=1e-5)


# -- the view ----------------------------------------------------------------------------------------------------------


def test_view():
    net = create()
    x = images(net)
    view = tsn.Subnet(net, MIDDLE)
    assert torch.equal(view(x), net(x, MIDDLE))
    assert unwrap_model(view) is net and view.arch == MIDDLE
    assert {weight.data_ptr() for weight in view.parameters()} == {weight.data_ptr() for weight in net.parameters()}
    assert counted_macs(view, x[:1]) == net.macs(MIDDLE)
    clone = copy.deepcopy(view)
    with torch.no_grad():
        net.head.bias += 1
    torch.testing.assert_close(view(x), clone(x) + 1)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize('name', ['test_shiftformer_supernet', 'test_shiftmobilenet_supernet'])
def test_static_subnets_can_be_scripted(name):
    net = timm.create_model(name, num_classes=3).eval()
    subnet, x = tsn.extract(net, net.space.smallest), torch.randn(1, *net.pretrained_cfg['input_size'])
    torch.testing.assert_close(torch.jit.script(subnet)(x), subnet(x))
