"""ShiftMobileNet: elastic MobileNets and their static subnets, on timm's `EfficientNet` and `MobileNetV3`.

One network for the weight-entangled CNN supernets of the field; its space says which of them it is:

* BigNAS (Yu et al., ECCV 2020, arXiv 2003.11142), which ShiftNAS (Zhang et al., ICCV 2023) calls ShiftCNN;
* AttentiveNAS (Wang et al., CVPR 2021, arXiv 2011.09011), with the space of AlphaNet;
* Once-for-all MobileNetV3 (Cai et al., ICLR 2020, arXiv 1908.09791).

A supernet is timm's network of the largest arch, made elastic in place, so that names and initial weights are timm's.
Subnets of OFA are objects of timm's `MobileNetV3`; those of the others have one more block type, with a projected
shortcut.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, get_act_layer, make_divisible
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual, SqueezeExcite
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from torch import Tensor, nn

from ..layers.conv import (
    ConvWidths,
    ElasticDepthwiseConv2d,
    ProjectedDepthwiseSeparableConv,
    ProjectedInvertedResidual,
    Projection,
    WidthShortcut,
    elastic_kernel,
    make_elastic,
)
from ..space.core import Arch, SearchSpace
from ..space.families import space_of_family
from ..space.shiftmobilenet import (
    HEAD_RATIO,
    ShiftMobileNetMasks,
    block_shapes,
    block_table,
    output_side,
    shiftmobilenet_space,
    shiftmobilenet_space_of,
    stock_blocks,
)
from ._checkpoint import check_fits, weights_of
from ._elastic_cnn import ElasticCnn, EndWidths, check_pool
from ._published import convert_mobilenet, is_published_mobilenet
from .backbone import ElasticBackbone

__all__ = ['EfficientNetSupernet', 'MobileNetV3Supernet', 'ShiftMobileNetSupernet', 'checkpoint_filter_fn', 'ofa_space']


def _cfg(**kwargs) -> dict[str, Any]:
    return dict(
        num_classes=1000, input_size=(3, 224, 224), pool_size=(7, 7), crop_pct=.875, interpolation='bicubic',
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, first_conv='conv_stem', classifier='classifier',
        license='apache-2.0') | kwargs


# -- static networks ---------------------------------------------------------------------------------------------------


def _stock_class(space: SearchSpace) -> type[EfficientNet] | type[MobileNetV3]:
    return MobileNetV3 if space.structure.has_efficient_head else EfficientNet


def _stock_args(space: SearchSpace, arch: Arch) -> dict[str, Any]:
    """Arguments of timm's class for the network of an arch."""
    stock = stock_blocks(space, arch)
    args = dict(head_bias=False) if _stock_class(space) is MobileNetV3 else {}
    return dict(
        args, block_args=decode_arch_def(stock['blocks']), stem_size=stock['stem_size'],
        num_features=stock['num_features'], act_layer=get_act_layer(stock['act']), se_layer=partial(
            SqueezeExcite, gate_layer='hard_sigmoid', force_act_layer=nn.ReLU, rd_round_fn=round_channels))


def _create_subnet(
        arch: Arch | Mapping[str, Any],
        structure: Mapping[str, Any],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.,
        drop_path_rate: float = 0.,
        device=None,
        dtype=None,
) -> nn.Module:
    """The static network of an arch: an object of timm's `MobileNetV3` or `EfficientNet`.

    Args:
        arch: An `Arch` or its dict.
        structure: What is fixed in its network, as in `Structure.to_dict`.
        num_classes, in_chans, global_pool, drop_rate, drop_path_rate: As for timm's networks.

    Raises:
        ValueError: If arch and structure describe no network.
    """
    check_pool(global_pool, num_classes)
    space, arch = shiftmobilenet_space_of(arch, structure)
    shapes = block_shapes(space, arch)
    net = _stock_class(space)(
        num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate,
        device=device, dtype=dtype, **_stock_args(space, arch))
    blocks = [net.blocks[shape.stage][shape.position] for shape in shapes]
    projected = {
        DepthwiseSeparableConv: ProjectedDepthwiseSeparableConv, InvertedResidual: ProjectedInvertedResidual}
    for block, shape in zip(blocks, shapes, strict=True):
        changes = shape.width_in != shape.width_out
        if space.structure.has_projections and shape.position == 0 and (changes or shape.stride > 1):
            block.__class__ = projected[type(block)]
            block.projection = _projection(shape.width_in, shape.width_out, shape.stride, changes, device, dtype)
    _set_drop_path(blocks, [shape.stage for shape in shapes], drop_path_rate)
    net.arch, net.static_space = arch, space
    # arguments that create this network again: extraction and saving read them
    net.model_args = dict(
        structure=space.structure.to_dict(), num_classes=num_classes, in_chans=in_chans, global_pool=global_pool,
        drop_rate=drop_rate, drop_path_rate=drop_path_rate)
    return net


def _set_drop_path(blocks: Sequence[nn.Module], stages: Sequence[int], rate: float) -> None:
    """Drop path as in AttentiveNAS: past blocks of the last two stages that keep width and size, with rising rates."""
    for number, (block, stage) in enumerate(zip(blocks, stages, strict=True)):
        projected = isinstance(getattr(block, 'projection', None), Projection)
        if rate and stage > stages[-1] - 2 and block.has_skip and not projected:
            block.drop_path = DropPath(rate * number / len(blocks))


def _projection(width_in: int, width_out: int, stride: int, convolution: bool, device, dtype) -> Projection:
    projection = Projection(width_in, width_out, stride, convolution, device=device, dtype=dtype)
    if convolution:
        nn.init.normal_(projection.conv.weight, 0, (2 / width_out) ** .5)  # as timm's other convolutions here
    return projection


# -- supernets ---------------------------------------------------------------------------------------------------------


class ShiftMobileNetSupernet(ElasticCnn):
    """A MobileNet whose resolution, widths, depths and kernel sizes are chosen per call: `net(x, arch)`.

    The network owns the weights of every arch of its space; a smaller width or depth is a prefix of a larger one, a
    smaller kernel the centre of it. The arch is an argument of `forward` and is stored nowhere.

    BatchNorm: `net(x, arch)` in training uses the statistics of the batch and does not update the running ones;
    `net(x)`, the full network, updates them as in timm. In evaluation both read the shared running statistics, a subnet
    a prefix of them. To be accurate, `extract` a subnet and call `calibrate_bn`.

    Args:
        space: The search space (`timm.create_model` takes the dict of its `to_dict` as well).
        num_classes, in_chans, global_pool, drop_rate: As for timm's networks.
        drop_path_rate: For the blocks of the last two stages that keep width and size, rising with the block's number.
        drop_archs: 'largest': dropout and drop path apply to the largest subnet only (BigNAS, AttentiveNAS); 'all'.
        zero_init_last: Zero the weight of the last BatchNorm of every block with a shortcut, so that it starts as that
            shortcut (BigNAS).
    """
    untrained_cfg = _cfg()

    def __init__(
            self,
            space: SearchSpace,
            *,
            num_classes: int = 1000,
            in_chans: int = 3,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            drop_archs: str = 'largest',
            zero_init_last: bool = False,
            device=None,
            dtype=None,
    ) -> None:
        check_pool(global_pool, num_classes)
        if drop_archs not in ('largest', 'all'):
            raise ValueError(f"drop_archs={drop_archs!r} is unknown; choose 'largest' or 'all'")
        super().__init__(
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, device=device,
            dtype=dtype, **_stock_args(space, space.largest))
        self.unbound_space = space.unbind()
        self._largest = space.largest
        self._drop_all_archs = drop_archs == 'all'
        self.model_args = dict(
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate,
            drop_path_rate=drop_path_rate, drop_archs=drop_archs)
        make_elastic(self)
        self._make_blocks_elastic(zero_init_last, device, dtype)
        rows = block_table(self.unbound_space).blocks
        _set_drop_path(
            [self.blocks[row.stage][row.position] for row in rows], [row.stage for row in rows], drop_path_rate)

    def _make_blocks_elastic(self, zero_init_last: bool, device, dtype) -> None:
        """Give every block its kernel sizes, and the shortcut that serves all of its widths."""
        structure = self.unbound_space.structure
        for row in block_table(self.unbound_space).blocks:
            block = self.blocks[row.stage][row.position]
            elastic_kernel(block.conv_dw, row.kernel_size.values, structure.kernel == 'transform')
            incoming, leaving = row.width_in.values, row.width_out.values
            changes = len({*incoming, *leaving}) > 1
            if row.projects and (changes or row.stride > 1):
                block.projection = _projection(incoming[-1], leaving[-1], row.stride, changes, device, dtype)
                make_elastic(block.projection)
            elif row.position == 0 and row.stride == 1 and not structure.has_projections:
                block.projection = WidthShortcut()
            if zero_init_last and (block.has_skip or isinstance(block.projection, Projection)):
                nn.init.zeros_((block.bn3 if row.expands else block.bn2).weight)

    def block_widths(self, arch: Arch | ShiftMobileNetMasks, like: Tensor) -> list[tuple[nn.Module, ConvWidths]]:
        drop, space = self.drops(arch), self.unbound_space
        if isinstance(arch, ShiftMobileNetMasks):
            masks = arch.to(like)
            widths = [
                ConvWidths(
                    hidden=block.hidden, kernel_size=block.kernel_size, se=block.se, width_in=block.width_in,
                    equal=block.equal, active=block.active, drop=drop)
                for block in masks.blocks]
            places = [(row.stage, row.position) for row in block_table(space).blocks]
            expansion = ConvWidths(width_in=masks.stage)
        else:
            shapes = block_shapes(space, arch)
            widths = [
                ConvWidths(
                    hidden=shape.hidden, width_out=shape.width_out, kernel_size=shape.kernel_size, se=shape.se,
                    drop=drop)
                for shape in shapes]
            places = [(shape.stage, shape.position) for shape in shapes]
            expansion = ConvWidths(width_out=HEAD_RATIO * arch.width[-2])
        if space.structure.has_efficient_head:
            places, widths = [*places, (places[-1][0] + 1, 0)], [*widths, expansion]
        return [
            (self.blocks[stage][position], each) for (stage, position), each in zip(places, widths, strict=True)
            if stage < len(self.blocks)]  # a backbone has no stages after its last feature map

    def stage_mask(self, masks: ShiftMobileNetMasks, stage: int) -> Tensor:
        rows = block_table(self.unbound_space).blocks
        readers = [block.width_in for row, block in zip(rows, masks.blocks, strict=True) if row.stage == stage]
        return readers[0] if readers else masks.stage if stage == rows[-1].stage + 1 else masks.expanded

    def end_widths(self, arch: Arch | ShiftMobileNetMasks, like: Tensor) -> EndWidths:
        efficient = self.unbound_space.structure.has_efficient_head
        if isinstance(arch, ShiftMobileNetMasks):
            return EndWidths(None, (arch.expanded if efficient else arch.stage).to(like), arch.last.to(like))
        return EndWidths(arch.width[0], arch.width[-2] * (HEAD_RATIO if efficient else 1), arch.width[-1])

    def drops(self, arch: Arch | ShiftMobileNetMasks) -> bool:
        return self._drop_all_archs or arch == self._largest

    def output_side(self, resolution: int) -> int:
        return output_side(self.unbound_space, resolution)

    # -- extraction ----------------------------------------------------------------------------------------------------

    def subnet_args(self, arch: Arch) -> dict[str, Any]:
        args = {name: value for name, value in self.model_args.items() if name != 'drop_archs'}
        if not self.drops(arch):
            args.update(drop_rate=0., drop_path_rate=0.)
        return dict(args, structure=self.unbound_space.structure.to_dict())

    def subnet_state_dict(self, arch: Arch, subnet: nn.Module) -> dict[str, Tensor]:
        """The shared weights of an arch: leading slices, and kernels of its sizes."""
        state = super().subnet_state_dict(arch, subnet)
        for name, weight in state.items():
            owner = self.get_submodule(name.rpartition('.')[0])
            if isinstance(owner, ElasticDepthwiseConv2d):
                state[name] = owner.kernel(weight.shape[-1], channels=weight.shape[0])
        return state


class EfficientNetSupernet(ShiftMobileNetSupernet, EfficientNet):
    __doc__ = ShiftMobileNetSupernet.__doc__


class MobileNetV3Supernet(ShiftMobileNetSupernet, MobileNetV3):
    __doc__ = ShiftMobileNetSupernet.__doc__


# -- checkpoints -------------------------------------------------------------------------------------------------------


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Adapt a checkpoint to `model`: published AttentiveNAS, AlphaNet and OFA supernets, or weights of this package.

    Raises:
        ValueError: If the checkpoint belongs to another search space, arch or number of classes.
    """
    state_dict = weights_of(state_dict)
    if is_published_mobilenet(state_dict):
        state_dict = convert_mobilenet(state_dict, model)
    check_fits(state_dict, model, first_conv='conv_stem', classifier='classifier')
    return state_dict


# -- registered models -------------------------------------------------------------------------------------------------


default_cfgs = generate_default_cfgs({
    'shiftmobilenet_supernet.untrained': _cfg(input_size=(3, 320, 320), pool_size=(10, 10)),
    'attentivenas_supernet.untrained': _cfg(input_size=(3, 288, 288), pool_size=(9, 9)),
    'ofa_mobilenetv3_supernet.untrained': _cfg(input_size=(3, 260, 260), pool_size=(9, 9)),
    'ofa_mobilenetv3_w12_supernet.untrained': _cfg(input_size=(3, 260, 260), pool_size=(9, 9)),
    'test_shiftmobilenet_supernet.untrained': _cfg(input_size=(3, 32, 32), pool_size=(4, 4), crop_pct=1.0),
    'shiftmobilenet_subnet.untrained': _cfg(input_size=(3, 192, 192), pool_size=(6, 6)),
})


def _create(factory: Callable, variant: str, pretrained: bool, stride: Sequence[int],
            features: str | type = 'getter', **kwargs) -> nn.Module:
    levels = tuple(range(1 + list(stride).count(2)))  # a feature map before every stride
    return build_model_with_cfg(
        factory, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop('out_indices', levels), feature_cls=features), **kwargs)


def _create_supernet(variant: str, pretrained: bool, space: SearchSpace | Mapping[str, Any], img_size: Any = None,
                     **kwargs) -> nn.Module:
    """`img_size`, which timm's scripts may pass, is ignored: these networks take images of any size."""
    space = space_of_family(space, 'shiftmobilenet')
    cls = MobileNetV3Supernet if _stock_class(space) is MobileNetV3 else EfficientNetSupernet
    return _create(cls, variant, pretrained, space.structure.stride, ElasticBackbone, space=space, **kwargs)


def _bignas() -> SearchSpace:
    return shiftmobilenet_space(
        resolution=(192, 224, 288, 320),
        width=((32, 40), (16, 24), (24, 32), (40, 48), (80, 88), (112, 120, 128), (192, 200, 208, 216),
               (320, 328, 336, 344, 352), (1280, 1408)),
        depth=((1, 2), (2, 3), (2, 3), (2, 3, 4), (2, 3, 4, 5, 6), (2, 3, 4, 5, 6), (1, 2)),
        kernel_size=((3,), (3,), *[(3, 5)] * 5),
        expand_ratio=((1,), *[(6,)] * 6))


def _attentivenas() -> SearchSpace:
    return shiftmobilenet_space(
        resolution=(192, 224, 256, 288),
        width=((16, 24), (16, 24), (24, 32), (32, 40), (64, 72), (112, 120, 128), (192, 200, 208, 216), (216, 224),
               (1792, 1984)),
        depth=((1, 2), (3, 4, 5), (3, 4, 5, 6), (3, 4, 5, 6), (3, 4, 5, 6, 7, 8), (3, 4, 5, 6, 7, 8), (1, 2)),
        kernel_size=(3, 5),
        expand_ratio=((1,), *[(4, 5, 6)] * 4, (6,), (6,)),
        se=(False, False, True, False, True, True, True), head='efficient')


def ofa_space(
        multiplier: float = 1.0,
        resolution: tuple[int, ...] = tuple(range(128, 264, 4)),
        depth: tuple[int, ...] = (2, 3, 4),
        kernel_size: tuple[int, ...] = (3, 5, 7),
        expand_ratio: tuple[float, ...] = (3, 4, 6),
) -> SearchSpace:
    """Once-for-all's MobileNetV3 space (Cai et al., ICLR 2020) at a width multiplier.

    The supernets were trained at 128 to 224 px; published specialised networks are tuned at up to 260.
    """
    widths = [make_divisible(width * multiplier, 8) for width in (16, 16, 24, 40, 80, 112, 160, 1280)]
    return shiftmobilenet_space(
        resolution=resolution, width=[[width] for width in widths], depth=depth, kernel_size=kernel_size,
        expand_ratio=expand_ratio, per_block=True, stem_block=True, stride=(2, 2, 2, 1, 2),
        se=(False, True, False, True, True),
        act=('hard_swish', 'relu', 'relu', 'relu', 'hard_swish', 'hard_swish', 'hard_swish', 'hard_swish'),
        head='efficient', shortcut='identity', kernel='transform')


@register_model
def shiftmobilenet_supernet(pretrained: bool = False, **kwargs) -> nn.Module:
    """The BigNAS space, the paper's ShiftCNN: 0.219 to 1.900 GMACs at 192 to 320 px.

    Two independent implementations of BigNAS agree on these ranges except for three points. For the widths of the last
    stage, this space has all multiples of 8 from 320 to 352 (one of them has only the two ends). SE and swish in all
    stages are those of the one that was written to reproduce the paper's training.
    """
    return _create_supernet('shiftmobilenet_supernet', pretrained, **dict(dict(space=_bignas()), **kwargs))


@register_model
def attentivenas_supernet(pretrained: bool = False, **kwargs) -> nn.Module:
    """The space of AttentiveNAS and AlphaNet: 440,301,256,704 archs, 0.203 to 1.939 GMACs at 192 to 288 px."""
    return _create_supernet('attentivenas_supernet', pretrained, **dict(dict(space=_attentivenas()), **kwargs))


@register_model
def ofa_mobilenetv3_supernet(pretrained: bool = False, **kwargs) -> nn.Module:
    """Once-for-all's MobileNetV3 space at width 1.0."""
    args = dict(space=ofa_space(), drop_archs='all')
    return _create_supernet('ofa_mobilenetv3_supernet', pretrained, **dict(args, **kwargs))


@register_model
def ofa_mobilenetv3_w12_supernet(pretrained: bool = False, **kwargs) -> nn.Module:
    """Once-for-all's MobileNetV3 space at width 1.2."""
    args = dict(space=ofa_space(1.2), drop_archs='all')
    return _create_supernet('ofa_mobilenetv3_w12_supernet', pretrained, **dict(args, **kwargs))


@register_model
def test_shiftmobilenet_supernet(pretrained: bool = False, **kwargs) -> nn.Module:
    """A small space for tests and the quickstart: 24 to 32 px; a forward takes milliseconds."""
    space = shiftmobilenet_space(
        resolution=(24, 28, 32), width=((8, 16), (8, 16), (16, 24, 32), (24, 32, 48), (32, 48, 64), (64, 96, 128)),
        depth=((1, 2), (1, 2, 3), (1, 2, 3), (1, 2)), kernel_size=((3,), (3, 5), (3, 5), (3, 5)),
        expand_ratio=((1,), (2, 3, 4), (2, 3, 4), (2, 3, 4)), stride=(1, 2, 2, 1))
    return _create_supernet('test_shiftmobilenet_supernet', pretrained, **dict(dict(space=space), **kwargs))


@register_model
def shiftmobilenet_subnet(pretrained: bool = False, **kwargs) -> nn.Module:
    """A static MobileNet of any arch; without `arch=`, the smallest one of the BigNAS space."""
    space = _bignas()
    args = dict(arch=space.smallest.to_dict(), structure=space.structure.to_dict()) | kwargs
    args.pop('img_size', None)  # these networks take images of any size
    stride = args['structure'].get('stride', ()) if isinstance(args['structure'], Mapping) else ()
    return _create(_create_subnet, 'shiftmobilenet_subnet', pretrained, stride, **args)
