"""Elastic pretrained ViTs against their bases, extracted networks and counters, for every option that they have."""
import copy

import pytest
import timm
import torch
from support.flops import counted_macs
from support.networks import rng

import timm_shiftnas as tsn
from timm_shiftnas.models.elastic import make_elastic
from timm_shiftnas.models.elastic_vit import kept_layers, why_vit_is_not_elastic
from timm_shiftnas.models.importance import magnitude_scores, sort_by_importance, taylor_scores
from timm_shiftnas.space import arch_masks

OPTIONS = {
    'plain': {}, 'layer_scale': dict(init_values=.5), 'registers': dict(reg_tokens=2, no_embed_class=True),
    'pre_norm': dict(pre_norm=True), 'qk_norm': dict(qk_norm=True), 'no_qkv_bias': dict(qkv_bias=False),
    'mean_pooling': dict(global_pool='avg', class_token=False), 'fc_norm': dict(global_pool='avg', fc_norm=True),
    'attention_pooling': dict(global_pool='map', class_token=False),
    'attention_pooling_of_patches': dict(global_pool='map', reg_tokens=2, final_norm=False),
    'attention_pooling_of_all': dict(global_pool='map', pool_include_prefix=True),
    'attention_pooling_fc_norm': dict(global_pool='map', class_token=False, fc_norm=True),
    'unpooled': dict(global_pool=''),
    'no_positions': dict(pos_embed='none'), 'no_final_norm': dict(final_norm=False), 'narrow_heads': dict(num_heads=4),
    'no_proj_bias': dict(proj_bias=False), 'quick_gelu': dict(act_layer='quick_gelu'),
}


def create_base(**kwargs):
    """A small ViT of timm with random weights everywhere, in float64."""
    torch.manual_seed(0)
    base = timm.create_model('test_vit', **dict(dict(img_size=32, patch_size=8, num_classes=7), **kwargs)).double()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter) * .2)
    return base.eval()


def images(count=2):
    return torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=rng())


@pytest.fixture(scope='module', params=[
    pytest.param(name, marks=pytest.mark.exhaustive) if name in ('no_qkv_bias', 'fc_norm', 'no_proj_bias', 'quick_gelu')
    else name for name in OPTIONS])
def pair(request):
    """A base and its elastic network, whose layers are kept in another order than that of the network."""
    base = create_base(**OPTIONS[request.param])
    net = tsn.elastic(base).eval()
    space = dict(net.space.unbind().to_dict(), layer_order=[5, 0, 3, 4, 2, 1])
    return base, tsn.elastic(base, space=space).eval()


def archs_of(net):
    generator = rng(1)
    return [net.space.smallest, net.space.largest, *(net.space.sample(generator) for _ in range(3))]


@pytest.mark.slow
def test_the_largest_arch_is_the_base(pair):
    base, net = pair
    x = images()
    torch.testing.assert_close(net(x), base(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(net(x, net.space.largest), base(x), rtol=0, atol=1e-12)
    assert list(net.state_dict()) == list(base.state_dict())
    assert net.params(net.space.largest) == sum(weight.numel() for weight in base.parameters())
    assert net.pretrained_cfg['mean'] == base.pretrained_cfg['mean']
    assert net.macs(net.space.largest) > 4 * net.macs(net.space.smallest)


@pytest.mark.slow
def test_a_subnet_is_a_smaller_timm_network(pair):
    base, net = pair
    for arch in archs_of(net):
        sub = tsn.extract(net, arch).eval().requires_grad_(False)
        assert type(sub) is type(base) and len(sub.blocks) == arch.depth
        torch.testing.assert_close(net(images(), arch), sub(images()), rtol=0, atol=1e-12)
        assert net.params(arch) == sum(weight.numel() for weight in sub.parameters())
        assert net.macs(arch) == counted_macs(sub, images(1))


def test_masks_compute_what_slices_do(pair):
    _, net = pair
    for arch in archs_of(net):
        masks = arch_masks(net.space, net.space.one_hot(arch))
        torch.testing.assert_close(net(images(), masks), net(images(), arch), rtol=0, atol=1e-11)


def test_inactive_entries_have_gradients(pair):
    _, net = pair
    masks = arch_masks(net.space, net.space.one_hot(net.space.smallest))
    leaves = type(masks)(*(mask.clone().requires_grad_() for mask in masks))
    net(images(), leaves).square().sum().backward()
    for mask, leaf in zip(masks, leaves, strict=True):
        # in layers that do not exist, only the layer itself has a gradient
        rows = masks.depth.bool() if mask.dim() == 2 else slice(None)
        assert (leaf.grad[rows] != 0).all()


def test_depth_follows_the_layer_order():
    base = create_base()
    space = dict(tsn.elastic(base).space.unbind().to_dict(), layer_order=[2, 5, 0, 1, 4, 3])
    net = tsn.elastic(base, space=space).eval()
    full = net.space.largest.to_dict()
    arch = net.space.arch(embed_dim=64, depth=4, num_heads=2, mlp_ratio=full['mlp_ratio'][0])
    assert kept_layers(net.space, 4) == [0, 1, 2, 5]
    shorter = copy.deepcopy(base)
    shorter.blocks = torch.nn.Sequential(*(base.blocks[layer] for layer in (0, 1, 2, 5)))
    torch.testing.assert_close(net(images(), arch), shorter(images()), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize('by', ['taylor', 'magnitude'])
def test_sorting_changes_no_output(pair, by):
    base, net = pair
    net = copy.deepcopy(net)
    if net.global_pool == '' and by == 'taylor':
        pytest.skip('a network without pooling has no class scores')
    loader = None if by == 'magnitude' else [(images(8), torch.arange(8) % 7)]
    before = net.blocks[0].mlp.fc1.weight.clone()
    sort_by_importance(net, loader, progress=False)
    assert not torch.equal(before, net.blocks[0].mlp.fc1.weight)
    torch.testing.assert_close(net(images()), base(images()), rtol=0, atol=1e-12)
    scores = magnitude_scores(net) if by == 'magnitude' else taylor_scores(net, loader)
    assert (scores.embed_dim.diff() <= 1e-9).all() and (scores.hidden.diff(dim=1) <= 1e-9).all()
    assert (scores.num_heads.diff(dim=1) <= 1e-9).all()
    assert (scores.depth[list(dict(net.unbound_space.structure)['layer_order'])].diff() <= 1e-9).all()


def test_the_score_of_a_unit_is_the_change_of_the_loss():
    """First order: scaling a hidden unit by 1 - e changes the loss by e times its (signed) score."""
    net, e = tsn.elastic(create_base()).eval(), 1e-6
    x, y = images(8), torch.arange(8) % 7
    scores = taylor_scores(net, [(x, y)])
    loss = torch.nn.functional.cross_entropy(net(x), y)
    with torch.no_grad():
        net.blocks[3].mlp.fc2.weight[:, 5] *= 1 - e
        changed = torch.nn.functional.cross_entropy(net(x), y)
    torch.testing.assert_close((changed - loss).abs() / e, scores.hidden[3, 5], rtol=1e-3, atol=1e-9)


@pytest.mark.slow
def test_by_name_and_back(tmp_path):
    net = timm.create_model('elastic_supernet', base='test_vit', img_size=32, patch_size=8, num_classes=5)
    generator = tsn.ArchitectureGenerator(net.space).fit(steps=20, progress=False)
    tsn.save_pretrained(tmp_path / 'model', net, generator)
    again = timm.create_model(f'local-dir:{tmp_path}/model', pretrained=True)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(net.eval()(x), again.eval()(x))
    sub = tsn.from_pretrained(tmp_path / 'model', flops=.5 * net.macs(net.space.largest))
    torch.testing.assert_close(sub(x), net(x, sub.arch))
    tsn.save_pretrained(tmp_path / 'sub', sub)
    torch.testing.assert_close(tsn.from_pretrained(tmp_path / 'sub')(x), sub(x))


def test_bases_that_are_not_elastic():
    with pytest.raises(ValueError, match="'resnet18'.*ResNet"):
        tsn.elastic('resnet18')
    with pytest.raises(ValueError, match="base='vit_smal_patch16_224'.*vit_small_patch16_224"):
        tsn.elastic('vit_smal_patch16_224')
    base = create_base()
    space = tsn.elastic(base).space.unbind().to_dict()
    with pytest.raises(ValueError, match='embed_dim'):
        tsn.elastic(base, space=dict(space, embed_dim=[32, 128]))
    with pytest.raises(ValueError, match='depth'):
        tsn.elastic(base, space=dict(space, depth=[4, 7]))
    for wrong in (5, 'hf-hub:owner/name'):
        with pytest.raises(ValueError, match=repr(wrong)):
            timm.create_model('elastic_supernet', base=wrong)


def test_networks_and_batches_that_cannot_be_sorted():
    net, x, y = tsn.elastic(create_base()), images(4), torch.arange(4)
    before = copy.deepcopy(net.state_dict())
    for batch, named in (
            (dict(image=x), 'dict'), ((x, y, y), 'tuple'), ((x * float('nan'), y), 'nan'), ((x, y + 7), 'from 7'),
            ((x[:0], y[:0]), 'no batches')):
        with pytest.raises(ValueError, match=named):
            sort_by_importance(net, [batch], progress=False)
    with pytest.raises(ValueError, match='num_batches=-1'):
        sort_by_importance(net, [(x, y)], num_batches=-1)
    assert all(torch.equal(net.state_dict()[name], weight) for name, weight in before.items())
    for changed, named in (
            (timm.create_model('resnet18'), 'ResNet'), (tsn.elastic(create_base(num_classes=0)), 'classifier'),
            (tsn.elastic(create_base(global_pool='')), 'pooling'),
            (timm.layers.convert_splitbn_model(tsn.elastic('test_efficientnet').double(), 2), 'aux_bn')):
        with pytest.raises(ValueError, match=named):
            sort_by_importance(changed, [(x, y)], progress=False)


def test_scoring_leaves_the_mode_of_every_module():
    net = tsn.elastic(create_base()).train()
    net.blocks[0].eval()
    modes = [module.training for module in net.modules()]
    sort_by_importance(net, [(images(4), torch.arange(4, dtype=torch.int32))], progress=False)
    assert [module.training for module in net.modules()] == modes


@pytest.mark.exhaustive
@pytest.mark.slow
def test_vits_of_timm_at_full_depth():
    """Every twelfth name; the test of the table goes over all of them with two layers."""
    elastic = []
    for name in [*timm.list_models(module='vision_transformer'), *timm.list_models(module='deit')][::12]:
        base = timm.create_model(name, device='meta')
        if why_vit_is_not_elastic(base) is None:
            keys, count = list(base.state_dict()), sum(weight.numel() for weight in base.parameters())
            net = make_elastic(None, base, dict(base=name))
            assert list(net.state_dict()) == keys and net.params(net.space.largest) == count, name
            assert net.macs(net.space.largest) > 4 * net.macs(net.space.smallest), name
            elastic.append(name)
    assert len(elastic) >= 10


@pytest.mark.slow
def test_the_largest_arch_is_the_base_for_all_combinations_of_options_in_timm():
    """Of every elastic name, a network with its options and tiny sizes; equal ones are compared once."""
    found = {}
    for name in [*timm.list_models(module='vision_transformer'), *timm.list_models(module='deit')]:
        try:
            base = timm.create_model(
                name, depth=2, embed_dim=32, num_heads=2, patch_size=4, img_size=8, num_classes=3).double().eval()
        except (AssertionError, TypeError):  # names that are not elastic fix some of these
            continue
        if why_vit_is_not_elastic(base) is None:
            options = base.global_pool, base.no_embed_class, base.pool_include_prefix
            found.setdefault((repr(base), *options), (name, base))
    assert len(found) > 25
    for name, base in found.values():
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=rng()) * .3)
        net, x = tsn.elastic(base).eval(), torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=rng())
        torch.testing.assert_close(net(x), base(x), rtol=0, atol=1e-12, msg=name)
        for arch, network in ((net.space.largest, base), (net.space.smallest, tsn.extract(net, net.space.smallest))):
            assert net.macs(arch) == counted_macs(network.requires_grad_(False), x), name
            assert net.params(arch) == sum(weight.numel() for weight in network.parameters()), name
            masks = arch_masks(net.space, net.space.one_hot(arch))
            torch.testing.assert_close(net(x, masks), network(x), rtol=0, atol=1e-11, msg=name)
