"""The elastic MobileNets: spaces, masks and slices, BatchNorm, resolution, extraction, and timm's model contract.

What the reference implementations computed is in test_mobilenet_oracles.py.
"""
import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from support.flops import counted_macs
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3

import timm_shiftnas as tsn
from timm_shiftnas.models import ResizedInput
from timm_shiftnas.space import BlockMasks, ShiftMobileNetMasks, arch_masks, block_table, space_from_dict

NAMES = (
    'shiftmobilenet_supernet', 'attentivenas_supernet', 'ofa_mobilenetv3_supernet', 'ofa_mobilenetv3_w12_supernet',
    'test_shiftmobilenet_supernet')
STAGEWISE = tsn.shiftmobilenet_space(
    resolution=(16, 20, 24), width=((8, 16), (8, 16), (16, 24), (24, 32)), depth=((1, 2), (1, 2, 3)),
    kernel_size=((3,), (3, 5, 7)), expand_ratio=((1,), (2, 3)), stride=(1, 2))
PER_BLOCK = tsn.shiftmobilenet_space(
    resolution=(16, 24), width=((8,), (8,), (16, 24), (24, 32), (32, 40)), depth=((1, 2), (1, 2, 3)),
    kernel_size=(3, 5, 7), expand_ratio=(2, 3), stride=(2, 1), per_block=True, stem_block=True, se=(False, True),
    act=('hard_swish', 'relu', 'relu', 'hard_swish', 'hard_swish'), head='efficient', kernel='transform')
IDENTITY = tsn.shiftmobilenet_space(
    resolution=(16,), width=((8,), (8,), (16,), (16,)), depth=((1, 2), (1, 2)), kernel_size=(3, 5),
    expand_ratio=(2, 3), stride=(1, 2), shortcut='identity', head='efficient', per_block=True, kernel='transform')
SKIPS = tsn.shiftmobilenet_space(  # identity shortcuts into stages exist at some widths only
    resolution=(16,), width=((8, 16), (8, 16), (16, 24), (32,)), depth=((1, 2), (1, 2)), kernel_size=(3, 5),
    expand_ratio=(2, 3), stride=(1, 1), shortcut='identity')
SPACES = dict(stagewise=STAGEWISE, per_block=PER_BLOCK, identity=IDENTITY, skips=SKIPS)


def create(space=STAGEWISE, **kwargs):
    torch.manual_seed(0)
    net = timm.create_model('shiftmobilenet_supernet', space=space, **dict(dict(num_classes=5), **kwargs))
    with torch.no_grad():  # statistics, scales and matrices unlike those of a new network
        for name, tensor in net.state_dict().items():
            if 'running_mean' in name or name.endswith('.bias') or 'matrices' in name:
                tensor.add_(.2 * torch.randn_like(tensor))
            elif 'running_var' in name or ('bn' in name and name.endswith('.weight')):
                tensor.mul_(.5 + torch.rand_like(tensor))
    return net


def archs_of(space, count=4):
    noise = torch.Generator().manual_seed(1)
    return [space.smallest, space.largest, *(space.sample(noise) for _ in range(count))]


def images(size=24, batch=3):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# -- spaces ------------------------------------------------------------------------------------------------------------


def test_archs_per_stage():
    arch = STAGEWISE.arch(resolution=20, width=[8, 16, 24, 24], depth=[2, 3], kernel_size=[3, 5], expand_ratio=[1, 2])
    assert (arch.resolution, arch.width, arch.depth, arch.kernel_size) == (20, (8, 16, 24, 24), (2, 3), (3, 5))
    assert STAGEWISE.from_dict(arch.to_dict()) == arch
    assert STAGEWISE.decode(STAGEWISE.encode(arch)) == arch
    assert STAGEWISE.size == 3 * 2 ** 4 * 2 * 3 * 3 * 2
    assert space_from_dict(STAGEWISE.to_dict()) == STAGEWISE
    assert STAGEWISE.smallest.to_dict() == dict(
        resolution=16, width=[8, 8, 16, 24], depth=[1, 1], kernel_size=[3, 3], expand_ratio=[1.0, 2.0])


def test_archs_per_block():
    full = dict(resolution=16, width=(8, 8, 16, 24, 32), depth=(1, 2))
    short = PER_BLOCK.arch(**full, kernel_size=[3, 5, 7], expand_ratio=[2, 2, 3])
    long = PER_BLOCK.arch(**full, kernel_size=[3, None, 5, 7, None], expand_ratio=[2, 3, 2, 3, 3])
    assert short == long and hash(short) == hash(long)  # values that no block reads do not count
    assert short.kernel_size == (3, 5, 7)
    assert PER_BLOCK.arch(**full, kernel_size=3, expand_ratio=2).kernel_size == (3, 3, 3)
    blocks = 6  # kernel sizes x ratios
    assert PER_BLOCK.size == 2 * 8 * (blocks + blocks ** 2) * (blocks + blocks ** 2 + blocks ** 3)
    assert space_from_dict(PER_BLOCK.to_dict()) == PER_BLOCK
    with pytest.raises(ValueError, match='kernel_size.* 4 .* 3 '):
        PER_BLOCK.arch(**full, kernel_size=[3, 3, 3, 3], expand_ratio=2)
    noise = torch.Generator().manual_seed(0)
    for _ in range(50):
        arch = PER_BLOCK.sample(noise)
        assert PER_BLOCK.decode(PER_BLOCK.encode(arch)) == arch and len(arch.kernel_size) == sum(arch.depth)


def test_a_field_without_a_choice_may_be_left_out():
    arch = IDENTITY.arch(depth=[1, 1], kernel_size=3, expand_ratio=2)
    assert arch.resolution == 16 and arch.width == (8, 8, 16, 16)
    with pytest.raises(ValueError, match="'depth'"):
        IDENTITY.arch(kernel_size=3, expand_ratio=2)


@pytest.mark.parametrize('change,message', [
    (dict(resolution=(18,)), 'resolution=18 .* multiple of 4'),
    (dict(resolution=(2,)), 'resolution=2 '),
    (dict(width=((8, 12), (8,), (16,), (16,))), 'width=12 .* 8'),
    (dict(width=(8, 8, 16, 16)), 'width=.*8, 8, 16, 16'),
    (dict(kernel_size=(3, 4)), 'kernel_size=4 '),
    (dict(depth=((1, 2),)), r'depth=.* for each of 2 stages'),
    (dict(expand_ratio=((1, 2), (2,))), 'expand_ratio=.*1.0, 2.0'),
    (dict(expand_ratio=((2, 2.1), (2,))), 'expand_ratio=.*2.0, 2.1'),
    (dict(stride=(1, 3)), r'stride=\(1, 3\) must be 2 of \(1, 2\)'),
    (dict(stride=(1, 2, 2)), r'stride=\(1, 2, 2\)'),
    (dict(act='tanh'), "act=.*'tanh'.* must be 4 of"),
    (dict(act=('relu', 'relu', 'relu', 'swish')), "act=.*'swish'"),
    (dict(head='v3'), 'head='), (dict(kernel='learned'), 'kernel='), (dict(shortcut=True), 'shortcut='),
    (dict(resolution=(24, 16)), r'\(16, 24\)'), (dict(resolution=(16, 8000)), '8000.* at most 4096'),
    (dict(depth=((1, 200), (100,))), '300 blocks.* at most 256'), (dict(stem_block='yes'), 'stem_block='),
    (dict(width=[16., 24., 32., 64.]), r'width=\[16.0, 24'),
])
def test_bad_spaces(change, message):
    good = dict(resolution=(16, 24), width=((8,), (8, 16), (16,), (16,)), depth=((1, 2), (1,)), kernel_size=(3, 5),
                expand_ratio=(2, 3), stride=(1, 2))
    tsn.shiftmobilenet_space(**good)
    with pytest.raises(ValueError, match=message):
        tsn.shiftmobilenet_space(**{**good, **change})


def test_images_that_are_not_square_are_refused_instead_of_squashed():
    net = create().eval()
    arch = net.space.smallest
    side = arch.resolution
    x = torch.randn(2, 3, side, 2 * side)
    assert net(x).shape[0] == 2  # the network itself takes any shape
    subnet = tsn.extract(net, arch)
    for run in (lambda: net(x, arch), lambda: tsn.calibrate_bn(subnet, [x]), lambda: ResizedInput(subnet)(x)):
        with pytest.raises(ValueError, match=f'{side} x {2 * side}'):
            run()


def test_the_total_stride_is_limited():
    with pytest.raises(ValueError, match='64.* at most 32'):
        tsn.shiftmobilenet_space((64,), [[8]] * 7, [[1]] * 5, (3,), (2,), stride=(2,) * 5)


# -- MACs and parameters -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('name', SPACES)
@pytest.mark.parametrize('options', [{}, dict(in_chans=1, num_classes=0), dict(num_classes=0, global_pool='')], ids=str)
def test_macs_and_params_are_those_of_the_extracted_network(name, options):
    net = create(SPACES[name], **options)
    space = net.space
    for arch in archs_of(space):
        sub = tsn.extract(net, arch).eval()
        assert counted_macs(sub, torch.zeros(1, net.in_chans, arch.resolution, arch.resolution)) == net.macs(arch)
        assert sum(weight.numel() for weight in sub.parameters()) == net.params(arch)


def test_macs_have_gradients():
    net = create(PER_BLOCK)
    one_hots = [one_hot.requires_grad_() for one_hot in net.space.one_hot(net.space.largest)]
    macs = tsn.macs(net.space, one_hots)
    gradients = torch.autograd.grad(macs, one_hots)
    assert macs.item() == net.macs(net.space.largest)
    for choice, gradient in zip(net.space.choices, gradients):
        assert len(choice.values) == 1 or gradient.abs().sum() > 0, choice.label
    # linear in every choice: the gradient predicts a single change of a kernel size exactly
    i = next(i for i, choice in enumerate(net.space.choices) if choice.name == 'kernel_size')
    indices = net.space.encode(net.space.largest)
    indices[i] = 0
    step = gradients[i][0] - gradients[i][-1]
    assert round((macs + step).item()) == net.macs(net.space.decode(indices))


# -- masks, through the whole network ----------------------------------------------------------------------------------


def reference(net, x, masks: ShiftMobileNetMasks, train: bool = False) -> torch.Tensor:
    """The masked network in plain arithmetic, written from the definitions of the reference networks."""
    w, fixed = net.state_dict(), dict(net.space.structure)
    acts = dict(relu=F.relu, hard_swish=F.hardswish, swish=F.silu)

    def norm(x, name):
        mean, var = w[f'{name}.running_mean'], w[f'{name}.running_var']
        if train:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        return x * w[f'{name}.weight'][:, None, None] + w[f'{name}.bias'][:, None, None]

    def pointwise(x, name):
        return torch.einsum('oi,bihw->bohw', w[f'{name}.weight'][:, :, 0, 0], x)

    def kernel(name, sizes, mask):
        """Entry k of the mask adds what size k has over size k - 1."""
        weight, kernels = w[f'{name}.weight'][:, 0], {}
        for larger, size in zip([None, *sizes[::-1]], sizes[::-1]):
            if larger is not None:
                edge = (larger - size) // 2
                weight = weight[:, edge:edge + size, edge:edge + size]
                matrix = w.get(f'{name}.matrices.{larger}to{size}')
                if matrix is not None:
                    weight = (weight.flatten(1) @ matrix.T).view(-1, size, size)
            kernels[size] = F.pad(weight, [(sizes[-1] - size) // 2] * 4)
        total = 0
        for k, size in enumerate(sizes):
            total = total + mask[k] * (kernels[size] - (kernels[sizes[k - 1]] if k else 0))
        return total[:, None]

    def wide(mask):
        return mask[:, None, None]

    if x.shape[-1] != masks.resolution:
        x = F.interpolate(x, (masks.resolution, masks.resolution), mode='bicubic', align_corners=False)
    act = acts[fixed['act'][0]]
    x = act(norm(F.conv2d(x, w['conv_stem.weight'], stride=2, padding=1), 'bn1'))
    for block, mask in zip(block_table(net.space).blocks, masks.blocks):
        name, act = f'blocks.{block.stage}.{block.position}', acts[block.act]
        numbers = (2, 3) if block.expands else (1, 2)
        y = x
        if block.expands:
            y = act(norm(pointwise(x * wide(mask.width_in), f'{name}.conv_pw'), f'{name}.bn1'))
        sizes = block.kernel_size.values
        weight = kernel(f'{name}.conv_dw', sizes, mask.kernel_size)
        y = F.conv2d(y, weight, stride=block.stride, padding=sizes[-1] // 2, groups=y.shape[1])
        y = act(norm(y, f'{name}.bn{numbers[0]}')) * wide(mask.hidden)
        if any(block.se.values):
            gate = F.relu(pointwise(y.mean((2, 3), keepdim=True), f'{name}.se.conv_reduce')
                          + wide(w[f'{name}.se.conv_reduce.bias'])) * wide(mask.se)
            gate = pointwise(gate, f'{name}.se.conv_expand') + wide(w[f'{name}.se.conv_expand.bias'])
            y = y * ((gate + 3).clamp(0, 6) / 6)
        y = norm(pointwise(y, f'{name}.conv_pwl' if block.expands else f'{name}.conv_pw'), f'{name}.bn{numbers[1]}')
        y = y * mask.active
        if block.position:
            x = y + x
            continue
        if fixed['shortcut'] == 'identity':
            through = F.pad(x[:, :y.shape[1]], [0, 0, 0, 0, 0, max(y.shape[1] - x.shape[1], 0)])
            x = y + mask.equal * through if block.stride == 1 else y
            continue
        odd = x.shape[-1] % 2
        if block.stride == 2:
            x = F.avg_pool2d(F.pad(x, [odd] * 4), 2)
        through = x[:, :y.shape[1]]
        through = F.pad(through, [0, 0, 0, 0, 0, y.shape[1] - through.shape[1]])
        projection = f'{name}.projection.conv'
        if f'{projection}.weight' in w:
            through = mask.equal * through + (1 - mask.equal) * pointwise(x * wide(mask.width_in), projection)
        x = y + through
    act, last = acts[fixed['act'][-1]], len(net.blocks) - 1
    x = x * wide(masks.stage)
    if fixed['head'] == 'plain':
        x = act(norm(pointwise(x, 'conv_head'), 'bn2')).mean((2, 3))
    else:
        x = act(norm(pointwise(x, f'blocks.{last}.0.conv'), f'blocks.{last}.0.bn1')) * wide(masks.expanded)
        x = act(x.mean((2, 3)) @ w['conv_head.weight'][:, :, 0, 0].T)
    return (x * masks.last) @ w['classifier.weight'].T + w['classifier.bias']


@pytest.mark.slow
@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('name', SPACES)
def test_mask_equals_slice(name, train):
    net = create(SPACES[name]).double().train(train)
    for arch in archs_of(SPACES[name]):
        masks = arch_masks(net.space, net.space.one_hot(arch))
        torch.testing.assert_close(net(images(), masks), net(images(), arch), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(net(images(), masks), reference(net, images(), masks, train), rtol=1e-9, atol=1e-9)


def leaves_of(masks: ShiftMobileNetMasks, change=lambda mask: mask) -> tuple[ShiftMobileNetMasks, list[torch.Tensor]]:
    leaves = []

    def leaf(mask):
        leaves.append(change(mask.detach()).clone().requires_grad_())
        return leaves[-1]

    blocks = tuple(BlockMasks(*map(leaf, block)) for block in masks.blocks)
    ends = leaf(masks.stage), leaf(masks.expanded), leaf(masks.last)
    return ShiftMobileNetMasks(masks.resolution, blocks, *ends), leaves


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('name', SPACES)
def test_gradients_of_masks(name, train):
    """Equal to the plain reference, and non-zero for the inactive entries that the network could grow into."""
    net = create(SPACES[name]).double().train(train)
    space, cotangent = net.space, torch.randn(3, 5, dtype=torch.float64)
    for arch in (space.smallest, archs_of(space)[2]):
        masks, leaves = leaves_of(arch_masks(space, space.one_hot(arch)))
        out, expected = net(images(), masks), reference(net, images(), masks, train)
        gradients = torch.autograd.grad((out * cotangent).sum(), leaves, allow_unused=True)
        references = torch.autograd.grad((expected * cotangent).sum(), leaves, allow_unused=True)
        found = dict(zip(map(id, leaves), gradients))
        for gradient, other in zip(gradients, references):
            assert (gradient is None) == (other is None)
            if gradient is not None:
                torch.testing.assert_close(gradient, other, rtol=1e-6, atol=1e-7)
        for block, mask in zip(block_table(space).blocks, masks.blocks):
            if mask.active == 0:
                assert found[id(mask.active)] != 0
                continue
            for field in ('hidden', 'kernel_size', 'se', 'width_in'):
                inactive = getattr(mask, field) == 0
                gradient = found[id(getattr(mask, field))]
                if inactive.any() and not (
                        field == 'width_in' and not block.expands):
                    # the gate of SE is flat where it saturates, and ReLU where it is off
                    share = (gradient[inactive] != 0).double().mean()
                    assert share == 1 if field in ('kernel_size', 'width_in') else share > .3, field
        for mask in (masks.stage, masks.last):
            assert (found[id(mask)][mask == 0] != 0).all()


def test_masks_off_the_corners():
    for space in (STAGEWISE, PER_BLOCK):
        net = create(space).double().eval()
        masks, _ = leaves_of(
            arch_masks(net.space, net.space.one_hot(space.largest)), lambda mask: .2 + .8 * torch.rand_like(mask))
        torch.testing.assert_close(
            net(images(), masks), reference(net, images(), masks), rtol=1e-9, atol=1e-9)


def test_masks_reach_the_generator():
    net = create(STAGEWISE)
    generator = tsn.ArchitectureGenerator(net.space, seed=0)
    rollout = generator(torch.tensor([generator.budget_max / 3]), noise=torch.Generator().manual_seed(0))
    masks = arch_masks(net.space, [one_hot[0] for one_hot in rollout.one_hots])
    loss = net(images().float(), masks).square().sum()
    gradients = torch.autograd.grad(loss, list(generator.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    heads = dict(zip([name for name, _ in generator.named_parameters()], gradients))['head_bias']
    # the resolution has no mask: its gradient comes through the decisions after it
    for choice, row in zip(net.space.choices, heads):
        assert (row.abs().sum() > 0) == (len(choice.values) > 1), choice.label


# -- BatchNorm ---------------------------------------------------------------------------------------------------------


def test_only_the_full_network_updates_running_statistics():
    net = create().train()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    for arch in archs_of(net.space):
        net(images().float(), arch).sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    stock = timm_copy(net)
    net(images().float()), stock(images().float())
    after = dict(net.named_buffers())
    assert all(torch.equal(buffer, after[name]) for name, buffer in stock.named_buffers())
    assert not torch.equal(after['bn1.running_mean'], before['bn1.running_mean'])


def timm_copy(net):
    """timm's own network of the largest arch with the same weights."""
    return tsn.extract(net, net.space.largest)


def test_the_full_network_equals_timms():
    for space in SPACES.values():
        net = create(space)
        stock = timm_copy(net)
        assert set(stock.state_dict()) <= set(net.state_dict())
        for train in (False, True):
            x = images().float()
            torch.testing.assert_close(net.train(train)(x), stock.train(train)(x), rtol=0, atol=1e-6)
    names = set(create(IDENTITY).state_dict()) - set(timm_copy(create(IDENTITY)).state_dict())
    assert names == {f'blocks.{s}.{i}.conv_dw.matrices.5to3' for s in (0, 1) for i in (0, 1)}


@pytest.mark.parametrize('recipe', ['attentivenas', 'ofa'])
def test_calibration_is_the_mean_of_batches(recipe):
    """In closed form for the first layer, whose input depends on no statistics. Nothing else changes."""
    net = create().eval()
    sub = tsn.extract(net, net.space.largest)
    batches = [images(24, 5).float(), images(24, 2).float() * 2]
    before = copy.deepcopy(sub.state_dict())
    tsn.calibrate_bn(sub, iter(batches), 7, recipe=recipe, progress=False)
    maps = [F.conv2d(batch, sub.conv_stem.weight, stride=2, padding=1) for batch in batches]
    shares = torch.tensor([5 / 7, 2 / 7] if recipe == 'ofa' else [.5, .5])
    correction = 0 if recipe == 'ofa' else 1
    mean = sum(share * m.mean((0, 2, 3)) for share, m in zip(shares, maps))
    var = sum(share * m.var((0, 2, 3), correction=correction) for share, m in zip(shares, maps))
    torch.testing.assert_close(sub.bn1.running_mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sub.bn1.running_var, var, rtol=1e-5, atol=1e-6)
    for name, tensor in sub.state_dict().items():
        assert 'running' in name or 'tracked' in name or torch.equal(tensor, before[name])
    assert all(module.momentum == .1 for module in sub.modules() if hasattr(module, 'momentum'))
    assert not any(module._forward_pre_hooks for module in sub.modules())


def test_calibration_uses_the_given_number_of_images():
    net = create()
    batches = [(images(24, 4).float() * (i + 1), None) for i in range(5)]
    results = []
    for given, count in ((batches, 8), (batches[:2], 100), (batches, 5)):
        sub = tsn.extract(net, net.space.smallest)
        tsn.calibrate_bn(sub, given, count, progress=False)
        assert sub.training
        results.append(sub.bn1.running_var)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_calibration_changes_nothing_when_it_fails():
    net = create()
    sub = tsn.extract(net, net.space.smallest)
    before = copy.deepcopy(sub.state_dict())

    def broken():
        yield images(24, 4).float()
        raise OSError('disk on fire')

    for loader, error in ((broken(), 'disk on fire'), ([], 'no images')):
        with pytest.raises((OSError, ValueError), match=error):
            tsn.calibrate_bn(sub, loader, 8, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sub.state_dict().items()) and sub.training
    for bad, message in (((net, []), 'extract'), ((sub, [], 0), 'num_images=0')):
        with pytest.raises(ValueError, match=message):
            tsn.calibrate_bn(*bad)
    with pytest.raises(ValueError, match="recipe='bignas'"):
        tsn.calibrate_bn(sub, [], recipe='bignas')


@pytest.mark.parametrize('batch,message', [
    (torch.zeros(2, 3, 24, 24, dtype=torch.uint8), 'torch.uint8'), (dict(image=1), 'dict'),
    (torch.zeros(3, 24, 24), r'\[3, 24, 24\]'),
    (torch.full((2, 3, 24, 24), torch.nan), 'not finite'),
])
def test_bad_images_for_calibration(batch, message):
    net = create()
    sub = tsn.extract(net, net.space.smallest)
    before = copy.deepcopy(sub.state_dict())
    with pytest.raises(ValueError, match=message):
        tsn.calibrate_bn(sub, [batch], progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sub.state_dict().items())


def test_a_last_image_alone_does_not_count():
    net = create()
    results = []
    for batches in ([images(24, 4).float()], [images(24, 4).float(), images(24, 1).float()]):
        results.append(tsn.calibrate_bn(tsn.extract(net, net.space.smallest), batches, progress=False).bn1.running_mean)
    assert torch.equal(*results)


def test_calibration_of_a_network_without_batch_norm():
    net = timm.create_model('test_shiftformer_supernet')
    sub = tsn.extract(net, net.space.smallest)
    assert tsn.calibrate_bn(sub, []) is sub


# -- resolution --------------------------------------------------------------------------------------------------------


def test_resolution():
    net = create().double().eval()
    arch = net.space.arch(**{**net.space.largest.to_dict(), 'resolution': 16})
    x = images(24)
    small = F.interpolate(x, (16, 16), mode='bicubic', align_corners=False)
    torch.testing.assert_close(net(x, arch), net(small))
    torch.testing.assert_close(net(x, arch), net(small, arch))
    assert (net(x) - net(small)).abs().max() > 1e-3  # without an arch, nothing is resized
    assert net.macs(arch) < net.macs(net.space.largest) and net.params(arch) == net.params(net.space.largest)
    sub = tsn.extract(net, arch)
    assert sub.pretrained_cfg['input_size'] == (3, 16, 16) and sub.pretrained_cfg['pool_size'] == (4, 4)
    torch.testing.assert_close(sub(small), net(x, arch))


# -- extraction --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('name', SPACES)
def test_extracted_equals_supernet(name):
    net = create(SPACES[name]).eval()
    exact = copy.deepcopy(net).double()
    for arch in archs_of(SPACES[name]):
        x = images(arch.resolution)
        sub = tsn.extract(net, arch)
        torch.testing.assert_close(sub(x.float()), net(x.float(), arch), rtol=0, atol=5e-5)
        torch.testing.assert_close(tsn.extract(exact, arch)(x), exact(x, arch), rtol=0, atol=1e-9)
        assert sub.arch == arch and isinstance(sub, EfficientNet if name in ('stagewise', 'skips') else MobileNetV3)
        for weight in sub.parameters():  # its own copy
            weight.data.zero_()
    torch.testing.assert_close(net.double()(images(), SPACES[name].largest), exact(images(), SPACES[name].largest))


@pytest.mark.slow
def test_torch_export():
    for space in (STAGEWISE, IDENTITY):
        net = create(space).eval()
        arch = archs_of(space)[2]
        sub, x = tsn.extract(net, arch), images(arch.resolution).float()
        program = torch.export.export(sub, (x,))
        torch.testing.assert_close(program.module()(x), sub(x), rtol=0, atol=1e-6)


# -- timm's model contract ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_registered_names(name):
    net = timm.create_model(name, device='meta')
    low, high = net.space.smallest, net.space.largest
    assert net.macs(low) < net.macs(high) and net.space.size > 400
    size = net.pretrained_cfg['input_size'][-1]
    assert name.startswith('ofa') or size == high.resolution
    assert net(torch.empty(2, 3, size, size, device='meta')).shape == (2, 1000)
    sampled = net.space.sample(torch.Generator().manual_seed(0))
    assert net(torch.empty(2, 3, size, size, device='meta'), sampled).shape == (2, 1000)


def test_the_test_space_is_wide():
    net = timm.create_model('test_shiftmobilenet_supernet', device='meta')
    noise = torch.Generator().manual_seed(0)
    archs = [net.space.sample(noise) for _ in range(600)]
    assert len(set(tsn.macs(net.space, archs).tolist())) >= 400
    assert net.macs(net.space.largest) >= 5 * net.macs(net.space.smallest)


def test_features():
    for space in (STAGEWISE, IDENTITY):
        net = create(space).eval()
        getter = timm.create_model('shiftmobilenet_supernet', space=space, features_only=True)
        x = images().float()
        shapes = [tuple(feature.shape[1:]) for feature in getter(x)]
        assert shapes == [(info['num_chs'], 24 // info['reduction'], 24 // info['reduction'])
                          for info in getter.feature_info]
        arch = archs_of(space)[2]
        sub = tsn.extract(net, arch)
        features = sub.forward_intermediates(images(arch.resolution).float(), intermediates_only=True)
        assert [feature.shape[1] for feature in features] == [info['num_chs'] for info in sub.feature_info]
        args = dict(arch=arch.to_dict(), structure=sub.model_args['structure'], features_only=True)
        static = timm.create_model('shiftmobilenet_subnet', **args)
        assert len(static(images(arch.resolution).float())) == len(features)


def test_reset_classifier():
    for space in (STAGEWISE, PER_BLOCK):
        net = create(space).eval()
        net.reset_classifier(7)
        arch = net.space.smallest
        assert net.space.geometry['num_classes'] == 7 and net(images().float(), arch).shape == (3, 7)
        assert tsn.extract(net, arch)(images(arch.resolution).float()).shape == (3, 7)
        net.reset_classifier(0)
        assert net(images().float(), arch).shape == (3, arch.width[-1])
        with pytest.raises(ValueError, match="global_pool='catavgmax'"):
            net.reset_classifier(5, 'catavgmax')


def test_gradient_checkpointing():
    net, arch = create(PER_BLOCK).double().train(), archs_of(PER_BLOCK)[2]
    gradients = []
    for enable in (False, True):
        net.set_grad_checkpointing(enable)
        net.zero_grad()
        (net(images(), arch).square().sum() + net(images(), PER_BLOCK.smallest).sum()).backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in net.parameters()])
    for a, b in zip(*gradients):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_copies():
    net = create(PER_BLOCK).eval()
    arch, x = archs_of(PER_BLOCK)[2], images().float()
    net(x, arch)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x, arch), net(x, arch)) and twin.space == net.space
    assert tsn.Subnet(net, arch)(x).equal(net(x, arch))


def test_drop_rules():
    """Drop path past identity shortcuts of the last two stages, and dropout: of the largest subnet only, or of all."""
    net = create(STAGEWISE, drop_path_rate=.5, drop_rate=.5).train()
    blocks = [(s, i, block) for s, stage in enumerate(net.blocks) for i, block in enumerate(stage)]
    rates = {(s, i): getattr(block.drop_path, 'drop_prob', 0) for s, i, block in blocks}
    assert rates == {(0, 0): 0, (0, 1): .5 / 5, (1, 0): 0, (1, 1): .5 * 3 / 5, (1, 2): .5 * 4 / 5}
    x, other = images().float(), archs_of(STAGEWISE)[2]

    def varies(net, *arch):
        return not torch.equal(net(x, *arch), net(x, *arch))

    assert varies(net, STAGEWISE.largest) and varies(net) and not varies(net, other)
    assert varies(create(STAGEWISE, drop_rate=.5, drop_archs='all').train(), other)
    assert not varies(net.eval(), STAGEWISE.largest)
    # extracted networks have the drop rates of the supernet
    sub = tsn.extract(net.train(), STAGEWISE.largest)
    assert {(s, i): getattr(block.drop_path, 'drop_prob', 0) for s, stage in enumerate(sub.blocks)
            for i, block in enumerate(stage)} == rates and sub.drop_rate == .5
    assert not varies(tsn.extract(net, other)) and varies(sub)
    with pytest.raises(ValueError, match="drop_archs='some'"):
        create(drop_archs='some')


def test_zero_init_last():
    net = timm.create_model('shiftmobilenet_supernet', space=STAGEWISE, zero_init_last=True)
    lasts = [block.bn3 if hasattr(block, 'bn3') else block.bn2 for stage in net.blocks for block in stage]
    assert all((norm.weight == 0).all() for norm in lasts) and len(lasts) == 5
    assert (net.bn1.weight == 1).all()


@pytest.mark.parametrize('fields', [
    dict(resolution=32), dict(width=(8, 8, 16, 40)), dict(depth=(1, 4)), dict(kernel_size=(5, 3)),
])
def test_archs_outside_the_space(fields):
    net = create()
    arch = tsn.Arch(**{**vars(net.space.smallest), **fields})
    for call in (lambda: net(images().float(), arch), lambda: tsn.extract(net, arch), lambda: net.macs(arch)):
        with pytest.raises(ValueError, match=f'{next(iter(fields))}.*choose one of'):
            call()


@pytest.mark.parametrize('args,message', [
    (dict(space=STAGEWISE, global_pool='token'), "global_pool='token'"),
    (dict(space=timm.create_model('test_shiftformer_supernet', device='meta').space), "family='shiftformer'"),
    (dict(space=dict(family='shiftmobilenet')), 'shiftmobilenet'),
])
def test_bad_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('shiftmobilenet_supernet', **args)


@pytest.mark.parametrize('args,message', [
    (dict(arch=dict(depth=[1])), 'depth.*resolution'),
    (dict(arch={**STAGEWISE.smallest.to_dict(), 'width': 8}), 'width=8'),
    (dict(structure=dict(stride=[1, 2], colour='red')), 'colour'),
    (dict(structure=dict(stride=[1])), 'stride='),
])
def test_bad_subnet_arguments(args, message):
    good = dict(arch=STAGEWISE.smallest.to_dict(), structure=STAGEWISE.to_dict())
    good['structure'] = dict(STAGEWISE.structure)
    timm.create_model('shiftmobilenet_subnet', **good)
    with pytest.raises(ValueError, match=message):
        timm.create_model('shiftmobilenet_subnet', **{**good, **args})


@pytest.mark.slow
def test_generator_uses_the_budget():
    space = timm.create_model('test_shiftmobilenet_supernet', device='meta').space
    generator = tsn.ArchitectureGenerator(space).fit(steps=150, progress=False)
    budgets = torch.linspace(generator.budget_min, generator.budget_max, 25, dtype=torch.float64).tolist()
    used = [tsn.macs(space, arch) / budget for arch, budget in zip(generator.propose_many(budgets), budgets)]
    assert max(used) <= 1 and min(used) >= .97 and math.fsum(used) / len(used) >= .985
