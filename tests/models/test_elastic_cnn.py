"""Elastic pretrained CNNs against their bases, extracted networks, counters and a plain masked forward."""
import copy
import json
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from support.elastic_table import MODULES, created, rows
from support.flops import counted_macs
from support.networks import rng
from timm.layers import get_act_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from torch import nn

import timm_shiftnas as tsn
from timm_shiftnas.models.elastic import make_elastic, why_not_elastic
from timm_shiftnas.models.elastic_cnn import kept_blocks
from timm_shiftnas.models.importance import magnitude_scores, taylor_scores
from timm_shiftnas.space import CnnMasks, arch_masks, space_from_dict

SIDE = 32
default_cfgs = generate_default_cfgs({
    'cnn_of_options.untrained': dict(
        input_size=(3, SIDE, SIDE), num_classes=7, mean=(.1, .2, .3), std=(1, 1, 1), classifier='classifier',
        first_conv='conv_stem')})


@register_model
def cnn_of_options(pretrained=False, blocks=(), efficient=False, act='relu', exact=False, **kwargs):
    """A small network of timm's classes with any blocks."""
    args = dict(
        stem_size=16, num_features=40, round_chs_fn=int if exact else round_channels,
        act_layer=get_act_layer(act), norm_layer=partial(nn.BatchNorm2d, eps=1e-3),
        block_args=decode_arch_def([[block] if isinstance(block, str) else block for block in blocks]))
    return build_model_with_cfg(
        MobileNetV3 if efficient else EfficientNet, 'cnn_of_options', pretrained, **dict(args, **kwargs))


INVERTED = ['ds_r1_k3_s1_e1_c16', 'ir_r3_k5_s2_e3_c24_se0.25', 'ir_r2_k7_s1_e2_c32_noskip']
OPTIONS = {
    'inverted': dict(blocks=INVERTED),
    'same_padding': dict(blocks=INVERTED, pad_type='same', act='swish', in_chans=1),
    'edge': dict(blocks=['cn_r2_k3_s1_e1_c16_skip', 'er_r3_k5_s2_e2_c24_se0.25', 'er_r1_k3_s1_e4_c32']),
    'edge_same': dict(
        blocks=['cn_r1_k5_s2_e1_c24', 'er_r2_k3_s2_e2_c24_noskip', 'ir_r1_k3_s2_e2_c24'], pad_type='same', act='relu6'),
    'separable': dict(
        blocks=['dsa_r1_k5_s2_c24', 'dsa_r3_k5_s1_c24_se0.5', 'ds_r2_k3_s2_c32_noskip'], act='hard_swish'),
    'efficient_head': dict(
        blocks=['ds_r1_k3_s1_e1_c16', 'ir_r2_k5_s2_e3_c24_se0.25_nre', 'cn_r1_k1_s1_c48'], efficient=True,
        act='hard_swish', drop_rate=.1, drop_path_rate=.1),
    'biased_head': dict(
        blocks=['dsa_r2_k3_s2_c24', 'dsa_r2_k5_s2_c32'], efficient=True, head_bias=False, pad_type='same',
        global_pool='max'),
    'no_head': dict(blocks=['dsa_r2_k3_s2_c24', 'ir_r2_k3_s2_e2_c32'], num_features=0),
    'mixed_stage': dict(
        blocks=[['ir_r1_k3_s2_e2_c24', 'ir_r2_k5_s1_e3_c24', 'ir_r2_k3_s1_e2_c32'], ['ir_r2_k3_s2_e2_c40']]),
    'universal': dict(blocks=[
        'uir_r1_a3_k5_s2_e2_c24', ['uir_r1_a5_k3_s1_e3_c24', 'uir_r1_a0_k0_s1_e4_c24', 'uir_r1_a5_k0_s1_e2_c24_se0.25'],
        'uir_r2_a0_k3_s2_e2_c32', 'cn_r1_k1_s1_c40'], efficient=True, head_norm=True, layer_scale_init_value=.5),
    'blurred': dict(blocks=['er_r2_k3_s2_e2_c24', 'ir_r1_k3_s2_e2_c24', 'uir_r1_a3_k3_s2_e2_c32'], aa_layer='blur'),
    'pooled': dict(
        blocks=['er_r2_k5_s2_e2_c24', 'ir_r2_k3_s2_e3_c24'], aa_layer='avg', head_bias=False, efficient=True),
    'grouped': dict(
        blocks=['cn_r1_k3_s1_e1_c16_skip', 'er_r2_k3_s2_e2_c32_gs8', 'ir_r3_k5_s2_e3_c48', 'ir_r1_k3_s1_e3_c64'],
        num_features=200),
    'irregular': dict(blocks=['ds_r1_k3_s1_e1_c12', 'ir_r2_k3_s2_e2.5_c20_se0.3'], exact=True, num_classes=3),
}


@torch.no_grad()
def randomise(net):
    """Statistics, scales and biases unlike those of a new network, in place."""
    for name, tensor in net.state_dict().items():
        if 'running_var' in name or ('bn' in name and name.endswith('weight')):
            tensor.mul_(.5 + torch.rand_like(tensor))
        elif tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor) * (.2 if tensor.dim() == 1 else .02))
        if name.endswith('conv_reduce.bias'):
            tensor.add_(3)  # its ReLU is on
    return net


def create_base(name='cnn_of_options', **kwargs):
    torch.manual_seed(0)
    return randomise(timm.create_model(name, **kwargs)).double().eval()


def images(net, side=SIDE, count=2):
    return torch.randn(count, net.in_chans, side, side, dtype=torch.float64, generator=rng())


def other_order(space):
    """The space with its optional blocks in the opposite order of importance."""
    orders = [
        [*fixed, *(position for position in reversed(order) if position not in fixed)]
        for order, fixed in zip(space.structure.layer_order, space.structure.fixed)]
    return dict(space.unbind().to_dict(), layer_order=orders)


def pair_of(name):
    """A base and its elastic network, whose blocks are kept in another order than that of the network."""
    base = create_base(**OPTIONS[name])
    return base, tsn.elastic(base, space=other_order(tsn.elastic(base).space)).eval()


def those(*names):
    """Parameters: these options, and as exhaustive tests all others."""
    return [*names, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in OPTIONS if name not in names)]


@pytest.fixture(scope='module', params=OPTIONS)
def pair(request):
    return pair_of(request.param)


def archs_of(net, count=3):
    generator = rng(1)
    return [net.space.smallest, net.space.largest, *(net.space.sample(generator) for _ in range(count))]


def resized(x, side):
    return x if x.shape[-1] == side else F.interpolate(x, (side, side), mode='bicubic', align_corners=False)


def test_the_largest_arch_is_the_base(pair):
    base, net = pair
    x = images(net)
    assert torch.equal(net(x), base(x)) and torch.equal(net(x, net.space.largest), base(x))
    assert list(net.state_dict()) == list(base.state_dict())
    assert net.params(net.space.largest) == sum(weight.numel() for weight in base.parameters())
    assert net.macs(net.space.largest) == counted_macs(base, x[:1])
    assert net.pretrained_cfg['mean'] == base.pretrained_cfg['mean']
    assert net.macs(net.space.largest) > 4 * net.macs(net.space.smallest)
    assert space_from_dict(net.space.to_dict()) == net.space


def test_training_updates_the_statistics_of_the_base(pair):
    base, net = (copy.deepcopy(network).train() for network in pair)
    for network in (base, net):
        torch.manual_seed(0)
        network(images(network)).sum().backward()
    for (name, a), (_, b) in zip(base.named_buffers(), net.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    before = copy.deepcopy(net.state_dict())
    net(images(net), net.space.smallest)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))


@pytest.mark.slow
def test_a_subnet_is_a_smaller_timm_network(pair):
    base, net = pair
    for arch in archs_of(net):
        sub = tsn.extract(net, arch).eval().requires_grad_(False)
        x = resized(images(net), arch.resolution)
        assert type(sub) is type(base) and [len(stage) for stage in sub.blocks] == list(arch.depth)
        torch.testing.assert_close(net(images(net), arch), sub(x), rtol=0, atol=1e-12)
        assert net.params(arch) == sum(weight.numel() for weight in sub.parameters())
        assert net.macs(arch) == counted_macs(sub, x[:1])
        assert tsn.models.static_counts(sub) == (net.macs(arch), net.params(arch))
        assert sub.pretrained_cfg['input_size'][1:] == (arch.resolution,) * 2
        maps = sub.forward_intermediates(x, intermediates_only=True)
        assert [each.shape[1] for each in maps] == [info['num_chs'] for info in sub.feature_info]


def reference(net, x, masks):
    """The masked network in plain functions: masks where values are read, and nowhere else."""
    m, table = masks.masks, net.unbound_space.structure
    x = net.bn1(net.conv_stem(resized(x, masks.resolution)))

    def by(mask, x):
        return x * mask[:, None, None]

    def kernel(conv, number):
        """Every size is the centre of the weight; the mask of a size adds the ring around the smaller one."""
        weight, sizes, total = conv.weight, net.unbound_space.values('kernel_size')[number], 0
        for size, share in zip(sizes, m[f'kernel.{number}'], strict=True):
            border, ring = (weight.shape[-1] - size) // 2, torch.zeros_like(weight)
            ring[..., border:border + size, border:border + size] = 1
            for smaller in [other for other in sizes if other < size]:
                border = (weight.shape[-1] - smaller) // 2
                ring[..., border:border + smaller, border:border + smaller] = 0
            total = total + share * ring * weight
        return total

    def convolve(conv, x, number):
        changed = copy.copy(conv)
        changed.__class__ = timm.layers.Conv2dSame if 'Same' in type(conv).__name__ else nn.Conv2d
        weight = kernel(conv, number)
        return torch.func.functional_call(changed, dict(weight=weight), (x,))

    def excite(block, x, number):
        if f'se.{number}' not in m:
            return x
        gate = block.se.act1(block.se.conv_reduce(x.mean((2, 3), keepdim=True)))
        return x * block.se.gate(block.se.conv_expand(by(m[f'se.{number}'], gate)))

    for number, (stage, position) in enumerate(table.places):
        block, row = net.blocks[stage][position], table.blocks[number]
        incoming, y = m[f'width.{table.inputs[number]}'], x
        if row.kind == 'cn':
            y = block.bn1(convolve(block.conv, by(incoming, y), number))
        elif row.kind == 'uir':
            if row.start:
                y = block.dw_start.conv(y) if row.middle else convolve(block.dw_start.conv, y, number)
                y = block.dw_start.bn(y)
            y = block.pw_exp(by(incoming, y))
            if row.middle:
                y = block.dw_mid.bn(convolve(block.dw_mid.conv, y, number))
                y = y if block.dw_mid.aa is None else block.dw_mid.aa(y)
            y = block.pw_proj(excite(block, by(m[f'mid.{number}'], y), number))
            y = block.layer_scale(block.dw_end(y))
        else:
            inner = m[f'mid.{number}'] if row.kind in ('ir', 'er') else incoming
            if row.kind == 'ir':
                y = block.bn2(convolve(block.conv_dw, block.bn1(block.conv_pw(by(incoming, y))), number))
            elif row.kind == 'er':
                y = block.bn1(convolve(block.conv_exp, by(incoming, y), number))
            else:
                y = block.bn1(convolve(block.conv_dw, y, number))
            y = excite(block, by(inner, block.aa(y)), number)
            last = block.conv_pw if row.kind == 'ds' else block.conv_pwl
            y = (block.bn3 if row.kind == 'ir' else block.bn2)(last(y))
        active, optional = m[f'active.{number}'], position not in table.fixed[stage]
        x = active * y + x if block.has_skip else active * y + (1 - active) * x if optional else active * y
    stages = table.blocks[-1].width
    x = by(m[f'width.{stages}'], x)
    if table.head == 'plain':
        x = by(m[f'width.{stages + 1}'], net.bn2(net.conv_head(x)))
    x = net.global_pool(x)
    if table.head.startswith('efficient'):
        x = by(m[f'width.{stages + 1}'], net.act2(net.norm_head(net.conv_head(x))))
    return net.classifier(x.flatten(1))


def test_masks_compute_what_slices_do(pair):
    _, net = pair
    for arch in archs_of(net):
        masks = arch_masks(net.space, net.space.one_hot(arch))
        torch.testing.assert_close(net(images(net), masks), net(images(net), arch), rtol=1e-11, atol=1e-11)


def test_gradients_of_masks(pair):
    """Equal to those of the plain functions, and none is zero where the network could grow."""
    _, net = pair
    for arch in archs_of(net, 1):
        arch = net.space.arch(**dict(arch.to_dict(), resolution=SIDE))  # kernels do not exceed the last maps
        masks = arch_masks(net.space, net.space.one_hot(arch))
        leaves = {label: mask.clone().requires_grad_() for label, mask in masks.masks.items()}
        out, expected = (run(images(net), CnnMasks(arch.resolution, leaves)) for run in (net, partial(reference, net)))
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        found, others = (torch.autograd.grad(y.square().sum(), list(leaves.values())) for y in (out, expected))
        grows = {kind: [] for kind in ('kernel', 'active', 'width', 'mid', 'se')}
        for (label, mask), gradient, other in zip(leaves.items(), found, others, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-7, atol=1e-7)
            kind, _, number = label.partition('.')
            if kind in ('active', 'width') or masks.masks[f'active.{number}']:
                grows[kind] += (gradient[mask == 0] != 0).tolist()
        assert all(grows['active'])
        for kind, entries in grows.items():  # ReLU may be off for a whole batch
            assert sum(entries) >= .3 * len(entries), kind


def test_depth_follows_the_layer_order(pair):
    base, net = pair
    fields = {name: [options[-1] for options in values] for name, values in net.space.fields[1:] if values}
    arch = net.space.arch(**dict(fields, depth=net.space.smallest.depth, resolution=SIDE))
    structure, kept = net.unbound_space.structure, kept_blocks(net.unbound_space, arch)
    shorter = copy.deepcopy(base)
    for stage in range(len(base.blocks)):
        positions = [structure.places[number][1] for number in kept if structure.places[number][0] == stage]
        assert sorted(positions) == sorted(structure.layer_order[stage][:arch.depth[stage]])
        shorter.blocks[stage] = nn.Sequential(*(shorter.blocks[stage][position] for position in positions))
    assert torch.equal(net(images(net), arch), shorter(images(net)))


@pytest.mark.slow
def test_sorting_by_importance_changes_no_output(pair):
    check_sorting(*pair, 'taylor')


@pytest.mark.parametrize('name', those('inverted'))
def test_sorting_by_magnitude_changes_no_output(name):
    check_sorting(*pair_of(name), 'magnitude')


def check_sorting(base, net, by):
    net, x = copy.deepcopy(net), images(net)
    loader = None if by == 'magnitude' else [(images(net, count=8), torch.arange(8) % net.num_classes)]
    tsn.sort_by_importance(net, loader, progress=False)
    assert not torch.equal(net.classifier.weight, base.classifier.weight)
    torch.testing.assert_close(net(x), base(x), rtol=0, atol=1e-12)
    single = copy.deepcopy(net).float()(x.float()).double()
    torch.testing.assert_close(single, base(x), rtol=0, atol=2e-5 * base(x).abs().max().item())
    scores = magnitude_scores(net) if by == 'magnitude' else taylor_scores(net, loader)
    for label, score in net.split_masks(scores).items():
        assert score.dim() == 0 or (score.diff() <= 1e-6 * score.max()).all(), label
    structure = net.unbound_space.structure
    for stage, fixed in enumerate(structure.fixed):
        order = structure.layer_order[stage]
        blocks = [scores.masks[f'active.{structure.places.index((stage, position))}'] for position in order]
        assert sorted(order[:len(fixed)]) == fixed
        assert all(a >= b - 1e-6 for a, b in zip(blocks[len(fixed):], blocks[len(fixed) + 1:], strict=False))
    for arch in (net.space.smallest, net.space.sample(rng(5))):  # a sorted network is as any other
        torch.testing.assert_close(
            net(x, arch), tsn.extract(net, arch)(resized(x, arch.resolution)), rtol=0, atol=1e-12)


def test_sorting_keeps_the_important_channels():
    """Channels that a base does not use come last, so that a subnet without them has its outputs."""
    base = create_base(blocks=['ds_r1_k3_s1_e1_c16', 'ir_r2_k3_s2_e2_c32_se0.25'])
    unused = torch.randperm(32, generator=rng())[:16]
    with torch.no_grad():
        for block in base.blocks[1]:
            block.bn3.weight[unused], block.bn3.bias[unused] = 0, 0
    loader = [(images(base, count=8), torch.arange(8) % 7)]
    net = tsn.sort_by_importance(tsn.elastic(base), loader, progress=False).eval()
    structure = net.space.structure
    fields = dict(net.space.largest.to_dict())
    fields['width'][structure.blocks[-1].width] = 16
    arch = net.space.arch(**fields)
    torch.testing.assert_close(net(images(net), arch), base(images(net)), rtol=0, atol=1e-12)


def test_the_score_of_a_channel_is_the_change_of_the_loss():
    """First order: scaling what reads a channel by 1 - e changes the loss by e times its (signed) score."""
    net, e = tsn.elastic(create_base(blocks=INVERTED, act='swish')).eval(), 1e-6
    x, y = images(net, count=8), torch.arange(8) % 7
    scores = taylor_scores(net, [(x, y)]).masks
    loss = F.cross_entropy(net(x), y)
    block = net.blocks[1][1]
    reads = {
        'mid.2': (block.conv_pwl, block.se.conv_reduce), 'se.2': (block.se.conv_expand,), 'width.3': (net.classifier,)}
    for label, readers in reads.items():
        changed_net = copy.deepcopy(net)
        names = {module: name for name, module in net.named_modules()}
        with torch.no_grad():
            for reader in readers:
                changed_net.get_submodule(names[reader]).weight[:, 1] *= 1 - e
            changed = F.cross_entropy(changed_net(x), y)
        torch.testing.assert_close((changed - loss).abs() / e, scores[label][1], rtol=1e-3, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['test_efficientnet', 'tf_mobilenetv3_small_minimal_100', 'lcnet_035'])
def test_networks_of_timm(name, tmp_path):
    """By name, as a module, saved and loaded; nothing asks for the weights of the base."""
    torch.manual_seed(0)
    net = randomise(timm.create_model('elastic_supernet', base=name, img_size=64, num_classes=5, in_chans=1)).eval()
    x = torch.randn(2, 1, 64, 64)
    base = timm.create_model(name, num_classes=5, in_chans=1).eval()
    base.load_state_dict(net.state_dict())
    torch.testing.assert_close(net(x, net.space.largest), base(x), rtol=0, atol=1e-5)
    assert torch.equal(tsn.elastic(base, img_size=64).eval()(x, net.space.smallest), net(x, net.space.smallest))
    assert net.space.largest.resolution == 64 and net.pretrained_cfg['input_size'] == (1, 64, 64)
    generator = tsn.ArchitectureGenerator(net.space).fit(steps=20, progress=False)
    tsn.save_pretrained(tmp_path / 'model', net, generator)
    again = timm.create_model(f'local-dir:{tmp_path}/model', pretrained=True).eval()
    assert again.space == net.space and torch.equal(net(x), again(x))
    with pytest.warns(UserWarning, match='no BatchNorm statistics'):
        sub = tsn.from_pretrained(tmp_path / 'model', flops=.5 * net.macs(net.space.largest))
    small = resized(x, sub.arch.resolution)
    torch.testing.assert_close(sub(small), net(x, sub.arch))
    tsn.calibrate_bn(sub, [x], 2, progress=False)
    tsn.save_pretrained(tmp_path / 'sub', sub)
    loaded = tsn.from_pretrained(tmp_path / 'sub')
    assert torch.equal(loaded(small), sub(small)) and loaded.arch == sub.arch


def test_the_resolution_of_the_base_is_the_largest():
    net = tsn.elastic('efficientnet_b0', device='meta')
    assert net.space.values('resolution') == (128, 160, 192, 224)
    assert tsn.elastic('efficientnet_b0', device='meta', img_size=32).space.values('resolution') == (16, 24, 32)


def test_shortcuts_tie_widths():
    """The first stage of MobileNetV3 adds its input, the stem's output."""
    structure = tsn.elastic('mobilenetv3_large_100', device='meta').space.structure
    assert structure.blocks[0].width == 0 and structure.blocks[1].width == 1
    assert len(structure.fixed[0]) == 1


@pytest.mark.slow
@pytest.mark.parametrize('module', [
    pytest.param(name, marks=pytest.mark.exhaustive) if name in ('vision_transformer', 'efficientnet') else name
    for name in MODULES])  # .ci/run has all of them
def test_every_name_of_timm(module):
    """Elastic, or refused with the reason that the table of the documentation gives."""
    reasons = {}
    for name in timm.list_models(module=module):
        base = created(name)
        reasons[name] = why_not_elastic(base)
        if reasons[name] is None:
            keys, count = list(base.state_dict()), sum(weight.numel() for weight in base.parameters())
            net = make_elastic(None, base, dict(base=name))
            assert list(net.state_dict()) == keys and net.params(net.space.largest) == count, name
            if module not in ('vision_transformer', 'deit'):  # of these, two layers alone are created
                assert net.macs(net.space.largest) > 4 * net.macs(net.space.smallest), name
    elastic = [name for name, reason in reasons.items() if reason is None]
    assert len(elastic) >= dict(
        vision_transformer=130, deit=12, efficientnet=88, mobilenetv3=27, hardcorenas=6)[module]
    text = (Path(__file__).parents[2] / 'docs' / 'elastic.md').read_text()
    assert '\n'.join(rows(module, reasons)) in text, 'run python -m support.elastic_table'


@pytest.mark.slow
@pytest.mark.parametrize('base, named', [
    ('mixnet_s', 'blocks.1.0.conv_pw.*MixedConv2d.*tinynet'),
    ('test_efficientnet_ln', 'bn1.*LayerNorm.*test_efficientnet'),
    ('vit_base_patch16_rpn_224', 'ResPostBlock.*vit_base_patch16_'), ('resnet18', 'ResNet.*efficientnet_b0'),
    ('efficentnet_b0', 'efficientnet_b0'), ('mobilenetv1_100h.nope', 'nope.*ra4_e3600')])
def test_bases_that_are_not_elastic(base, named):
    with pytest.raises(ValueError, match=f"base='{base}'.*{named}"):
        tsn.elastic(base, device='meta')


@pytest.mark.slow
@pytest.mark.parametrize('arguments, named', [
    (dict(output_stride=8), 'dilated'), (dict(global_pool='catavgmax'), 'catavgmax'), (dict(img_size=(32, 64)), '64'),
    (dict(img_size=48), 'resolution=.*48'), (dict(base='mobilenetv3_small_050'), 'another base'),
    (dict(base='test_vit', img_size=None), 'another base')])
def test_arguments_that_do_not_fit(arguments, named):
    space = tsn.elastic('test_efficientnet', img_size=32, device='meta').space.unbind().to_dict()
    with pytest.raises(ValueError, match=named):
        timm.create_model('elastic_supernet', device='meta', space=space, **dict(
            dict(base='test_efficientnet', img_size=32), **arguments))


@pytest.mark.parametrize('change, named', [
    (dict(width=[[16, 32]]), 'width.*24'), (dict(depth=[3]), 'depth'), (dict(blocks=3), 'blocks'),
    (dict(kernel_size=[[2, 3]]), 'kernel_size=2'), (dict(resolution=[32, 8000]), '8000'),
    (dict(layer_order=[[1, 0]]), 'layer_order'), (dict(head='other'), 'other')])
def test_spaces_that_do_not_fit(change, named):
    space = tsn.elastic('test_efficientnet', img_size=32, device='meta').space.unbind().to_dict()
    for name, value in change.items():
        space[name] = value if name in ('blocks', 'head', 'resolution') else value + space[name][1:]
    with pytest.raises(ValueError, match=named):
        tsn.elastic('test_efficientnet', img_size=32, device='meta', space=space)


def test_archs_that_do_not_fit():
    largest = tsn.elastic('test_efficientnet', img_size=32, device='meta').space.largest.to_dict()
    for arch, named in ((dict(largest, width=[1000] * 7), '1000'), (dict(largest, depth=[9] * 5), 'depth'),
                        (dict(depth=3), 'resolution, width'), (dict(largest, width=[8]), 'width')):
        with pytest.raises(ValueError, match=named):
            timm.create_model('elastic_cnn_subnet', base='test_efficientnet', arch=arch)
    for name, base in (('elastic_cnn_subnet', 'test_vit'), ('elastic_vit_subnet', 'test_efficientnet')):
        with pytest.raises(ValueError, match=f"base='{base}'"):
            timm.create_model(name, base=base)


def test_weights_that_cannot_be_loaded(monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(ValueError, match="^the weights of base='test_efficientnet' cannot be loaded: [^\n]*internet"):
        tsn.elastic('test_efficientnet', pretrained=True)
    with pytest.raises(ValueError, match="no weights of base='efficientnet_b6'"):
        tsn.elastic('efficientnet_b6', pretrained=True)


def test_a_saved_network_whose_base_is_unknown(tmp_path):
    net = timm.create_model('elastic_supernet', base='test_efficientnet', img_size=32)
    tsn.save_pretrained(tmp_path / 'sub', tsn.extract(net, net.space.smallest))
    path = tmp_path / 'sub' / 'config.json'
    config = json.loads(path.read_text())
    config['model_args']['base'] = 'test_efficientnet_of_tomorrow'
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="base='test_efficientnet_of_tomorrow' is not a model of this timm[^\n]*$"):
        tsn.from_pretrained(tmp_path / 'sub')


def test_checkpointing_changes_no_gradient(pair):
    _, net = pair
    arch, gradients = net.space.smallest, []
    for enabled in (False, True):
        changed = copy.deepcopy(net).train()
        changed.set_grad_checkpointing(enabled)
        torch.manual_seed(0)
        changed(images(net), arch).square().sum().backward()
        gradients.append([weight.grad for weight in changed.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.mark.slow
@pytest.mark.parametrize('name', those('inverted', 'efficient_head', 'biased_head', 'no_head', 'universal'))
def test_a_reset_head_is_saved_and_extracted(name, tmp_path):
    net = pair_of(name)[1].float()
    net.reset_classifier(3)
    arch = net.space.smallest
    assert net.params(arch) == sum(weight.numel() for weight in tsn.extract(net, arch).parameters())
    tsn.save_pretrained(tmp_path / 'sub', tsn.extract(net, arch))
    x = resized(images(net).float(), arch.resolution)
    torch.testing.assert_close(tsn.from_pretrained(tmp_path / 'sub')(x), net(x, arch))
    net.reset_classifier(0)
    assert net(x, arch).shape == tsn.extract(net, arch)(x).shape == (2, arch.width[-1])


def test_feature_maps_and_replaced_norms():
    base = create_base(blocks=INVERTED)
    net = timm.layers.convert_sync_batchnorm(tsn.elastic(base)).eval()
    for arch in archs_of(net, 1):
        torch.testing.assert_close(
            net(images(net), arch), tsn.extract(net, arch)(resized(images(net), arch.resolution)), rtol=0, atol=1e-12)
    features = timm.create_model('elastic_supernet', base='test_efficientnet', features_only=True)
    assert [each.shape[-1] for each in features(torch.randn(1, 3, 64, 64))] == [32, 16, 8, 4, 2]


def test_squeeze_and_excitation_keeps_its_share():
    base = create_base(blocks=['dsa_r1_k3_s1_c16_se0.25', 'ir_r1_k3_s2_e3_c24_se0.25'])
    net = tsn.elastic(base)
    fields = dict(net.space.largest.to_dict(), mid_width=[24], width=[8, 16, 24, 40])
    sub = tsn.extract(net, net.space.arch(**fields))
    for stage, inner in ((0, 8), (1, 24)):
        full, small = base.blocks[stage][0].se.conv_reduce, sub.blocks[stage][0].se.conv_reduce
        assert small.in_channels == inner
        assert small.out_channels == max(round(full.out_channels * inner / full.in_channels), 1)


@pytest.mark.parametrize('pool', ['avg', 'blur', None])
def test_macs_at_odd_sizes(pool):
    """Average pooling rounds down, everything else up."""
    base = create_base(blocks=['er_r1_k3_s2_e2_c24', 'ir_r1_k3_s2_e2_c24', 'ir_r1_k3_s2_e2_c32'], aa_layer=pool)
    net = tsn.elastic(base, img_size=44)
    assert net.space.values('resolution') == (24, 32, 40, 44)
    for resolution in (44, 40, 24):
        arch = net.space.arch(**dict(net.space.largest.to_dict(), resolution=resolution))
        assert net.macs(arch) == counted_macs(base, images(net, resolution, 1))
