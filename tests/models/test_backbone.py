"""Feature maps of supernets against timm's of extracted subnets, and networks around a backbone against a counter."""
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from support.flops import counted_macs
from support.memory import weight_bytes
from support.networks import perturb, rng
from torch import nn

import timm_shiftnas as tsn
from timm_shiftnas.layers import FeatureSum, SimpleFeaturePyramid, make_inputs_elastic, resize
from timm_shiftnas.models import static_counts
from timm_shiftnas.space import MACS, MEMORY, PARAMS, arch_masks, macs, params
from timm_shiftnas.space.latency import operator_features
from timm_shiftnas.space.resources import SIZES

OFA = dict(space=tsn.ofa_space(.5, (32, 64), (1, 2), (3, 5), (3, 4)))
FORMER = tsn.shiftformer_space((32, 64), (3, 4), (1, 2), (1, 2))
NETWORKS = {  # how a supernet is created, size of its images, feature maps
    'shiftformer': (lambda: timm.create_model('test_shiftformer_supernet', space=FORMER), 32, [-3, -1]),
    'elastic_vit': (lambda: tsn.elastic('test_vit', img_size=64), 64, [-1]),
    'shiftmobilenet': (lambda: timm.create_model('test_shiftmobilenet_supernet'), 32, [0, 1]),
    'ofa': (lambda: timm.create_model('ofa_mobilenetv3_supernet', **OFA), 64, [1, 3, 4]),
    'elastic_cnn': (lambda: tsn.elastic('test_efficientnet', img_size=64), 64, [1, 3]),
}


def create(name):
    torch.manual_seed(0)
    net = perturb(NETWORKS[name][0]().eval().double(), .03)
    return net, [net.space.smallest, net.space.sample(rng())]


def images(name, arch=None, batch=2):
    """Random images, at the resolution of an arch if it has one."""
    x = torch.randn(batch, 3, NETWORKS[name][1], NETWORKS[name][1], generator=rng(1), dtype=torch.float64)
    return resize(x, arch.resolution) if hasattr(arch, 'resolution') else x


def assert_equal_maps(maps, expected, tolerance):
    assert [each.shape for each in maps] == [each.shape for each in expected]
    torch.testing.assert_close(maps, expected, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize('name', NETWORKS)
def test_intermediates_are_those_of_timm(name):
    net, archs = create(name)
    for arch in archs:
        sub, x = tsn.extract(net, arch), images(name, arch)
        final, maps = sub.forward_intermediates(x)
        assert [each.shape[1] for each in maps] == [info['num_chs'] for info in sub.feature_info]
        own, own_maps = net.forward_intermediates(x, arch=arch)
        assert_equal_maps([own, *own_maps], [final, *maps], 1e-12)
        args = dict(indices=[0, -2], norm=True, stop_early=True, intermediates_only=True)
        assert_equal_maps(net.forward_intermediates(x, **args, arch=arch), sub.forward_intermediates(x, **args), 1e-12)
    net, sub, x = net.float(), sub.float(), x.float()
    assert_equal_maps(net.forward_intermediates(x, arch=arch)[1], sub.forward_intermediates(x)[1], 1e-5)


@pytest.mark.parametrize('name', ['shiftformer', 'elastic_vit'])
def test_all_output_formats_of_vits(name):
    net, (_, arch) = create(name)
    sub, x = tsn.extract(net, arch), images(name)
    causal = {} if name == 'shiftformer' else dict(is_causal=True)  # relative position takes no causal mask
    for options in (dict(return_prefix_tokens=True, output_fmt='NLC', indices=2),
                    dict(output_dict=True, return_prefix_tokens=True),
                    dict(output_dict=True, intermediates_only=True), dict(indices=[0], norm=True, **causal)):
        torch.testing.assert_close(
            net.forward_intermediates(x, **options, arch=arch), sub.forward_intermediates(x, **options),
            rtol=0, atol=1e-12)


@pytest.mark.parametrize('name', NETWORKS)
def test_maps_of_masks_are_those_of_slices_and_zero_beyond(name):
    net, archs = create(name)
    for arch in archs:
        masks, x = arch_masks(net.space, net.space.one_hot(arch)), images(name, arch)
        final, maps = net.forward_intermediates(x, arch=masks)
        expected, slices = net.forward_intermediates(x, arch=arch)
        for full, part in zip(maps, slices, strict=True):
            channels = part.shape[1]
            torch.testing.assert_close(full[:, :channels], part, rtol=0, atol=1e-10)
            assert (full[:, channels:] == 0).all()
        inner = tuple(map(slice, expected.shape))  # what the classifier reads is masked after pooling
        torch.testing.assert_close(final[inner], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize('name', NETWORKS)
def test_a_generator_learns_to_grow_through_a_map(name):
    """The derivative with respect to the masks of inactive channels and layers is not 0 at the smallest arch."""
    net, (arch, *_) = create(name)
    one_hots = [one_hot.requires_grad_() for one_hot in net.space.one_hot(arch)]
    masks = arch_masks(net.space, one_hots)
    last = net.forward_intermediates(images(name, arch), arch=masks, intermediates_only=True)[-1]
    weights = torch.randn(last.shape[1:], generator=rng(2), dtype=torch.float64)
    gradients = torch.autograd.grad((last * weights).sum(), one_hots, allow_unused=True)
    choices = net.space.choices
    for choice, gradient in zip(choices, gradients, strict=True):
        skipped = choice.gate is not None and choices[choice.gate].values[0] < choice.min_depth  # with its whole layer
        last = choice.name == 'width' and choice.layer == len(net.space.values('width')) - 1  # of the last convolution
        if choice.name != 'resolution' and len(choice.values) > 1 and not skipped and not last:
            assert (gradient[1:] != 0).all(), choice.label


@pytest.mark.slow
@pytest.mark.parametrize('name', NETWORKS)
def test_backbones_equal_timms_and_counts_are_exact(name):
    full, archs = create(name)
    _, _, indices = NETWORKS[name]
    backbone = tsn.ElasticBackbone(NETWORKS[name][0](), indices, norm=True).double().eval()
    backbone.model.load_state_dict(full.state_dict(), strict=False)
    assert max(backbone.feature_info.reduction()) <= 32
    for arch in archs:
        x, sub, stock = images(name), tsn.extract(backbone, arch), tsn.extract(full, arch)
        maps = backbone(x, arch)
        assert_equal_maps(sub(x), maps, 1e-12)
        args = dict(indices=indices, norm=True, intermediates_only=True)
        assert_equal_maps(stock.forward_intermediates(images(name, arch), **args), maps, 1e-12)
        assert [each.shape[1] for each in maps] == backbone.channels(arch) == sub.feature_info.channels()
        assert backbone.macs(arch) == counted_macs(sub, x[:1])
        assert backbone.params(arch) == sum(weight.numel() for weight in sub.parameters())
        assert {name: size.count(backbone.space, arch) for name, size in SIZES.items()} == weight_bytes(sub)


def test_features_only_gives_an_elastic_backbone():
    for name, args in [('test_shiftformer_supernet', {}), ('test_shiftmobilenet_supernet', dict(out_indices=(1, 2))),
                       ('elastic_supernet', dict(base='test_efficientnet', out_indices=(2, 3)))]:
        backbone = timm.create_model(name, features_only=True, **args).eval()
        assert isinstance(backbone, tsn.ElasticBackbone)
        x = torch.randn(1, 3, *backbone.pretrained_cfg['input_size'][1:])
        assert [each.shape[1] for each in backbone(x)] == backbone.feature_info.channels()
        arch = backbone.space.smallest
        assert [each.shape[1] for each in backbone(x, arch)] == backbone.channels(arch)


def test_wrong_backbones_are_named():
    with pytest.raises(ValueError, match='resnet|ResNet'):
        tsn.ElasticBackbone(timm.create_model('resnet10t'))
    backbone = tsn.ElasticBackbone(timm.create_model('test_shiftformer_supernet'), [0, 1])
    with pytest.raises(ValueError, match='out_indices'):
        backbone.macs(backbone.unbound_space.smallest)


# -- networks around a backbone ----------------------------------------------------------------------------------------


class Sum(nn.Module):
    """A segmenter whose classifier is the sum of maps."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.neck = backbone, FeatureSum(backbone.feature_info.channels(), 12)
        self.head = nn.Sequential(nn.GroupNorm(3, 12), nn.ReLU(), nn.Conv2d(12, 5, 3), nn.BatchNorm2d(5))

    def forward(self, x):
        return F.interpolate(self.head(self.neck(self.backbone(x))), size=x.shape[-2:])


class Pyramid(nn.Module):
    """Means of a simple feature pyramid; its backbone is deep inside."""

    def __init__(self, backbone):
        super().__init__()
        channels, = backbone.feature_info.channels()
        self.body = nn.Sequential(nn.Sequential(backbone), SimpleFeaturePyramid(channels, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return torch.stack([self.head(each.mean((2, 3))) for each in self.body(x)])


class Fpn(nn.Module):
    """torchvision's feature pyramid network."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.fpn = torchvision.ops.FeaturePyramidNetwork(backbone.feature_info.channels(), 8)
        make_inputs_elastic(*(block[0] for block in self.fpn.inner_blocks))

    def forward(self, x):
        return list(self.fpn(dict(enumerate(self.backbone(x)))).values())


WHOLE = {  # resolutions are elastic unless there is an img_size
    'sum of a ViT': ('shiftformer', Sum, dict(norm=True)),
    'sum of a CNN': ('shiftmobilenet', Sum, {}),
    'pyramid of a ViT': ('elastic_vit', Pyramid, {}),
    'pyramid of a larger ViT': ('shiftformer', Pyramid, dict(out_indices=[-1], img_size=64)),
    'FPN of a CNN': ('elastic_cnn', Fpn, {}),
    'FPN of one size': ('shiftmobilenet', Fpn, dict(img_size=48)),
}


def whole(name):
    family, network, args = WHOLE[name]
    make, size, indices = NETWORKS[family]
    torch.manual_seed(0)
    model = tsn.ElasticModel(network(tsn.ElasticBackbone(make(), **dict(dict(out_indices=indices), **args))))
    side = args.get('img_size', size)
    return model.double().eval(), torch.randn(2, 3, side, side, generator=rng(1), dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize('name', WHOLE)
def test_whole_networks_equal_extracted_ones_and_counts_are_exact(name):
    model, x = whole(name)
    for arch in (model.space.smallest, model.space.sample(rng())):
        sub, output = tsn.extract(model, arch), model(x, arch)
        assert type(sub) is type(model.network) and sub.arch == arch
        torch.testing.assert_close(sub(x), output, rtol=0, atol=1e-12)
        masks = arch_masks(model.space, model.space.one_hot(arch))
        torch.testing.assert_close(model(x, masks), output, rtol=0, atol=1e-10)
        counts = counted_macs(sub, x[:1]), sum(weight.numel() for weight in sub.parameters())
        assert (model.macs(arch), model.params(arch)) == counts == static_counts(sub)
        assert (macs(sub.static_space, arch), params(sub.static_space, arch)) == counts
        assert (MACS.count(model.space, arch), PARAMS.count(model.space, arch)) == counts
        for space in (model.space, sub.static_space):
            assert {name: size.count(space, arch) for name, size in SIZES.items()} == weight_bytes(sub)
        plain = {type(each) for each in sub.modules() if 'timm_shiftnas.layers.heads' in type(each).__module__}
        assert plain <= {FeatureSum, SimpleFeaturePyramid}


def test_the_polynomial_is_differentiable_and_counts_batches():
    model, _ = whole('sum of a CNN')
    archs = [model.space.smallest, model.space.sample(rng())]
    assert macs(model.space, archs).tolist() == [model.macs(arch) for arch in archs]
    one_hots = [one_hot.requires_grad_() for one_hot in model.space.one_hot(archs[0])]
    backbone = [each.detach().requires_grad_() for each in one_hots]
    macs(model.space, one_hots).backward()
    macs(model.backbone.space, backbone).backward()
    width = model.space.choices.index(next(each for each in model.space.choices if each.label == 'width[1]'))
    pixels = 12 * 12  # the first map, of 24 px images, has stride 2: 12 outputs per channel
    first = (one_hots[width].grad - backbone[width].grad)
    assert (first / torch.tensor(model.space.choices[width].values)).tolist() == [12 * pixels] * 2


def test_what_only_the_operators_of_classifiers_tell_is_refused():
    """MACs, parameters and sizes are those of the whole network; memory and latency would be those of another one."""
    model, _ = whole('FPN of one size')
    for space in (model.space, model.backbone.space):
        with pytest.raises(ValueError, match='memory of a backbone.*macs, params or size'):
            tsn.ArchitectureGenerator(space, resource=MEMORY)
        with pytest.raises(ValueError, match='latency of a backbone'):
            operator_features(space, space.one_hot(space.smallest))
    generator = tsn.ArchitectureGenerator(model.space)
    with pytest.raises(ValueError, match='memory of a backbone'):
        generator.propose_within({MEMORY: '1MB'})
    for resource in (PARAMS, *SIZES.values()):
        least, most = resource.range(model.space)
        generator = tsn.ArchitectureGenerator(model.space, resource=resource)
        assert generator.budget_max == most
        assert least <= resource.count(model.space, generator.propose((least + most) / 2)) <= (least + most) / 2


def test_nothing_is_stored_by_a_forward():
    model, x = whole('FPN of one size')
    before = {name: id(module) for name, module in model.named_modules()}
    first = model(x, model.space.smallest)
    model(x, model.space.largest)
    torch.testing.assert_close(model(x, model.space.smallest), first, rtol=0, atol=0)
    assert before == {name: id(module) for name, module in model.named_modules()}


def test_one_shared_weight_gets_the_gradients_of_all_archs():
    model, x = whole('sum of a CNN')
    weight = model.network.neck.inputs[0].weight
    gradients = [torch.autograd.grad(model(x, arch).square().mean(), weight)[0]
                 for arch in (model.space.smallest, model.space.largest)]
    sum(model(x, arch).square().mean() for arch in (model.space.smallest, model.space.largest)).backward()
    torch.testing.assert_close(weight.grad, sum(gradients))
    assert (gradients[0][:, model.backbone.channels(model.space.smallest)[0]:] == 0).all()


def test_heads_of_fixed_channels_are_named():
    class Fixed(Fpn):
        def __init__(self, backbone):
            super().__init__(backbone)
            self.fpn = torchvision.ops.FeaturePyramidNetwork(backbone.feature_info.channels(), 8)

    backbone = tsn.ElasticBackbone(NETWORKS['shiftmobilenet'][0](), [0, 1])
    with pytest.raises(ValueError, match='make_inputs_elastic'):
        tsn.ElasticModel(Fixed(backbone))
    class Concatenating(Sum):
        def __init__(self, backbone):
            super().__init__(backbone)
            self.neck = nn.Conv2d(sum(backbone.feature_info.channels()), 12, 1)
            make_inputs_elastic(self.neck)

        def forward(self, x):
            large, small = self.backbone(x)
            return self.neck(torch.cat([large, F.interpolate(small, size=large.shape[-2:])], dim=1))

    with pytest.raises(ValueError, match='neck reads 3 of 48 channels'):
        tsn.ElasticModel(Concatenating(backbone))
    with pytest.raises(ValueError, match='0 elastic backbones'):
        tsn.ElasticModel(nn.Linear(2, 2))
    with pytest.raises(ValueError, match='BatchNorm2d'):
        make_inputs_elastic(nn.BatchNorm2d(3))
