"""Elastic pretrained CNNs: timm's `EfficientNet` and `MobileNetV3` as supernets, and their static subnets.

The supernet is the base network itself, made elastic in place: names, shapes and weights are timm's, and the largest
arch is the base. A subnet is the base with smaller layers: an object of the same class of timm.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import BatchNormAct2d, BlurPool2d, Conv2dSame, ConvNormAct, LayerScale2d
from timm.models._efficientnet_blocks import (
    ConvBnAct,
    DepthwiseSeparableConv,
    EdgeResidual,
    InvertedResidual,
    SqueezeExcite,
    UniversalInvertedResidual,
)
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from torch import Tensor, nn

from ..layers.conv import Bypass, ConvWidths, centre, elastic_kernel, make_elastic
from ..layers.widths import leading
from ..space.core import Arch, SearchSpace
from ..space.elastic_cnn import (
    CnnBlock,
    CnnMasks,
    CnnStructure,
    cnn_table,
    elastic_cnn_space,
    elastic_cnn_space_of,
    kept_blocks,
    output_side,
)
from ..space.matrix_mapping import arch_masks
from ._elastic_cnn import POOLS, ElasticCnn, EndWidths
from ._elastic_family import ElasticFamily
from ._sortable import SortableSupernet, UnitAxis
from ._supernet import plain_state_dict

__all__ = [
    'ELASTIC_CNNS', 'ElasticEfficientNet', 'ElasticMobileNetV3', 'ElasticPretrainedCnn', 'default_cnn_space',
    'make_cnn_elastic', 'make_cnn_static', 'why_cnn_is_not_elastic',
]

WIDTHS, MIDS = (.5, .625, .75, .875, 1.), (.5, .75, 1.)  # shares of the base
DEPTHS, RESOLUTIONS = (1 / 2, 2 / 3, 5 / 6, 1.), (4 / 7, 5 / 7, 6 / 7, 1.)
KERNELS = (3, 5, 7, 9)


# -- the base ----------------------------------------------------------------------------------------------------------


_KINDS: dict[type[nn.Module], str] = {
    InvertedResidual: 'ir', DepthwiseSeparableConv: 'ds', EdgeResidual: 'er', ConvBnAct: 'cn',
    UniversalInvertedResidual: 'uir'}
_POOLINGS: dict[type[nn.Module], str] = {nn.Identity: '', type(None): '', nn.AvgPool2d: 'avg', BlurPool2d: 'blur'}


def _kind_of(block: nn.Module) -> str:
    """The kind of a block of timm's, or of the elastic class that derives from it."""
    return next(kind for cls, kind in _KINDS.items() if isinstance(block, cls))


def _spatial_of(block: nn.Module) -> nn.Conv2d | None:
    """The convolution whose kernel size is elastic, if there is one."""
    kind = _kind_of(block)
    if kind == 'uir':
        holder = block.dw_start if isinstance(block.dw_mid, nn.Identity) else block.dw_mid
        return getattr(holder, 'conv', None)
    return getattr(block, dict(ir='conv_dw', ds='conv_dw', er='conv_exp', cn='conv')[kind])


def _last_of(block: nn.Module) -> nn.Conv2d:
    """The convolution from the inner channels to those of the output."""
    kind = _kind_of(block)
    return block.pw_proj.conv if kind == 'uir' else getattr(
        block, dict(ir='conv_pwl', ds='conv_pw', er='conv_pwl', cn='conv')[kind])


def _pooling_of(block: nn.Module) -> nn.Module | None:
    """The module that may reduce the size after the spatial convolution, in its place."""
    return getattr(block.dw_mid, 'aa', None) if _kind_of(block) == 'uir' else block.aa


def why_cnn_is_not_elastic(net: nn.Module) -> str | None:
    """The first part of a CNN that is not elastic, or `None` if there is none."""
    if type(net) not in (EfficientNet, MobileNetV3):
        return f'its class is {type(net).__name__} and not EfficientNet or MobileNetV3'
    if net.global_pool.pool_type not in POOLS and (net.global_pool.pool_type or net.num_classes):
        return f'its global_pool is {net.global_pool.pool_type!r} and not one of {POOLS}'
    parts = [('conv_stem', net.conv_stem, 0), ('bn1', net.bn1, BatchNormAct2d)]
    if isinstance(net, MobileNetV3):
        parts += [('conv_head', net.conv_head, 1), ('norm_head', net.norm_head, (nn.Identity, BatchNormAct2d))]
    elif not isinstance(net.conv_head, nn.Identity):
        parts += [('conv_head', net.conv_head, 1), ('bn2', net.bn2, BatchNormAct2d)]
    for stage, blocks in enumerate(net.blocks):
        for position, block in enumerate(blocks):
            prefix = f'blocks.{stage}.{position}'
            if type(block) not in _KINDS:
                known = ', '.join(cls.__name__ for cls in _KINDS)
                return f'its {prefix} is of the class {type(block).__name__} and not one of {known}'
            parts += [(f'{prefix}.{name}', module, expected) for name, module, expected in _parts_of(block)]
    for name, module, expected in parts:
        if isinstance(expected, int):
            if reason := _why_not_a_plain_convolution(module, name, expected):
                return f'its {name} {reason}'
        elif type(module) not in (expected if isinstance(expected, tuple) else (expected,)):
            wanted = expected[0] if isinstance(expected, tuple) else expected
            return f'its {name} is of the class {type(module).__name__} and not {wanted.__name__}'
    return None


def _parts_of(block: nn.Module) -> list[tuple[str, nn.Module | None, Any]]:
    """Parts of a block with their names and what they must be: classes, or the kernel size of a convolution; 0: any."""
    kind, pools = _kind_of(block), (nn.Identity, nn.AvgPool2d, BlurPool2d)
    parts: list[tuple[str, nn.Module | None, Any]] = []
    if kind == 'uir':
        for name in ('dw_start', 'pw_exp', 'dw_mid', 'pw_proj', 'dw_end'):
            module = getattr(block, name)
            if name.startswith('pw') or not isinstance(module, nn.Identity):
                parts.append((name, module, ConvNormAct))
                parts += [(f'{name}.conv', getattr(module, 'conv', None), int(name.startswith('pw'))),
                          (f'{name}.bn', getattr(module, 'bn', None), BatchNormAct2d)]
                wanted = (type(None), *pools) if name == 'dw_mid' else type(None)
                parts.append((f'{name}.aa', getattr(module, 'aa', None), wanted))
        parts.append(('layer_scale', block.layer_scale, (nn.Identity, LayerScale2d)))
    else:
        norms, pointwise = dict(
            ir=(('bn1', 'bn2', 'bn3'), ('conv_pw', 'conv_pwl')), ds=(('bn1', 'bn2'), ('conv_pw',)),
            er=(('bn1', 'bn2'), ('conv_pwl',)), cn=(('bn1',), ()))[kind]
        parts += [('conv_s2d', getattr(block, 'conv_s2d', None), type(None)),
                  ('aa', block.aa, pools if kind in ('ir', 'er') else nn.Identity)]
        parts += [(name, getattr(block, name), BatchNormAct2d) for name in norms]
        parts += [(name, getattr(block, name), 1) for name in pointwise]
        parts.append((dict(ir='conv_dw', ds='conv_dw', er='conv_exp', cn='conv')[kind], _spatial_of(block), 0))
    if kind != 'cn':
        parts.append(('se', block.se, (SqueezeExcite, nn.Identity)))
    return parts


def _why_not_a_plain_convolution(conv: nn.Module, name: str, kernel: int) -> str | None:
    """The property of a convolution that elastic ones do not have, or `None`; `kernel` is the required size, or 0."""
    if type(conv) not in (nn.Conv2d, Conv2dSame):
        return f'is of the class {type(conv).__name__} and not Conv2d or Conv2dSame'
    size = conv.kernel_size[0]
    if conv.kernel_size != (size, size) or size % 2 == 0 or kernel not in (0, size):
        return f'has kernels of {conv.kernel_size}'
    if conv.dilation != (1, 1):
        return 'is dilated (output_stride)'
    if type(conv) is nn.Conv2d and conv.padding not in (size // 2, (size // 2, size // 2)):
        return f'has the padding {conv.padding}'
    if name.rpartition('.')[2] == 'conv_dw' or '.dw_' in name:
        if conv.groups != conv.in_channels or conv.out_channels != conv.in_channels:
            return f'has {conv.groups} groups of channels'
    elif conv.groups > 1 and not name.endswith('conv_exp'):
        return f'has {conv.groups} groups of channels'
    if conv.bias is not None and name != 'conv_head':
        return 'has a bias'
    return None


def _structure_of(net: nn.Module) -> tuple[CnnStructure, list[int]]:
    """The fixed properties of a base, and the channels of its groups."""
    channels, rows = [net.conv_stem.out_channels], []
    for stage, blocks in enumerate(net.blocks):
        for position, block in enumerate(blocks):
            kind, spatial, width = _kind_of(block), _spatial_of(block), _last_of(block).out_channels
            pool = _POOLINGS[type(_pooling_of(block))]
            stride = 2 if pool else 1 if spatial is None else spatial.stride[0]
            # outputs that a shortcut adds up have one width, and a block can be left out if it keeps the width
            tied = block.has_skip or (position > 0 and stride == 1 and width == channels[-1])
            if not tied:
                channels.append(width)
            se = getattr(block, 'se', None)
            reduced = se.conv_reduce.out_channels if isinstance(se, SqueezeExcite) else 0
            inner = se.conv_reduce.in_channels if reduced else 0
            row = CnnBlock(stage, kind, stride, len(channels) - 1, reduced, inner, pool)
            if kind == 'er':
                row = row._replace(groups=spatial.groups)
            elif kind == 'uir':
                start, end = (
                    0 if isinstance(module, nn.Identity) else module.conv.kernel_size[0]
                    for module in (block.dw_start, block.dw_end))
                row = row._replace(
                    start=start, end=end, middle=not isinstance(block.dw_mid, nn.Identity),
                    scale=isinstance(block.layer_scale, LayerScale2d))
            rows.append(row)
    convolution = None if isinstance(net.conv_head, nn.Identity) else net.conv_head
    head = 'none' if convolution is None else 'plain'
    if isinstance(net, MobileNetV3):
        head = 'efficient' if isinstance(net.norm_head, nn.Identity) else 'efficient_norm'
    bias = convolution is not None and convolution.bias is not None
    structure = CnnStructure(tuple(rows), net.conv_stem.kernel_size[0], head, bias, ())
    return structure, channels if convolution is None else [*channels, convolution.out_channels]


def _steps(size: int, shares: Sequence[float], multiple: int = 1) -> list[int]:
    """The given shares of a size, rounded up to multiples; the last is the size itself."""
    rounded = (math.ceil(size * share / multiple - 1e-6) * multiple for share in shares[:-1])
    return sorted({*(step for step in rounded if step < size), size})


def default_cnn_space(net: nn.Module, resolution: int) -> SearchSpace:
    """The default space of a base: every size in steps down from that of the base.

    Args:
        net: The base.
        resolution: The largest one.
    """
    structure, channels = _structure_of(net)
    blocks = [block for stage in net.blocks for block in stage]
    multiple = 32 if resolution >= 128 else 8
    resolutions = {max(round(resolution * share / multiple), 1) * multiple for share in RESOLUTIONS[:-1]}
    spatial = [_spatial_of(block) for block in blocks]
    kernels = [1 if conv is None else conv.kernel_size[0] for conv in spatial]
    expanding = [(row, _last_of(block)) for block, row in zip(blocks, structure.blocks, strict=True) if row.expands]
    depth = [
        [value for value in _steps(len(stage), DEPTHS) if value >= len(fixed)]
        for stage, fixed in zip(structure.stages, structure.fixed, strict=True)]
    # channels of several groups are not elastic
    grouped = {width for row, width in zip(structure.blocks, structure.inputs, strict=True) if row.groups > 1}
    return elastic_cnn_space(
        resolution=sorted({*(each for each in resolutions if each < resolution), resolution}),
        width=[[width] if group in grouped else _steps(width, WIDTHS, 8) for group, width in enumerate(channels)],
        depth=depth, kernel_size=[[size for size in KERNELS if size < kernel] + [kernel] for kernel in kernels],
        mid_width=[
            [last.in_channels] if row.groups > 1 else _steps(last.in_channels, MIDS, 8) for row, last in expanding],
        **dict(structure, layer_order=None))


# -- supernets ---------------------------------------------------------------------------------------------------------


class ElasticPretrainedCnn(SortableSupernet, ElasticCnn):
    """A pretrained CNN whose resolution, widths, depths and kernel sizes are chosen per call: `net(x, arch)`.

    Create it with `elastic`. A smaller width is a prefix of a larger one, a smaller kernel the centre of it. An arch
    keeps the first blocks of every stage's `layer_order`: `sort_by_importance` makes these the most important ones.

    BatchNorm: see `ShiftMobileNetSupernet`.
    """

    def make_elastic(self, space: SearchSpace, model_args: dict[str, Any]) -> ElasticPretrainedCnn:
        """Complete a network whose class has just been changed to this one."""
        structure, kernels = space.structure, space.values('kernel_size')
        make_elastic(self)
        for (stage, position), sizes in zip(structure.places, kernels, strict=True):
            block = self.blocks[stage][position]
            spatial = _spatial_of(block)
            if spatial is not None:
                elastic_kernel(spatial, sizes)
            if not block.has_skip and position not in structure.fixed[stage]:
                block.projection = Bypass()
        _create_filters(self)
        self.unbound_space = space.unbind()
        self.model_args = model_args
        return self

    def block_widths(self, arch: Arch | CnnMasks, like: Tensor) -> list[tuple[nn.Module, ConvWidths]]:
        space = self.unbound_space
        table, structure = cnn_table(space), space.structure
        if isinstance(arch, CnnMasks):
            masks = arch.to(like).masks
            widths = [
                ConvWidths(
                    hidden=None if inner is None else masks[inner], kernel_size=masks.get(f'kernel.{number}'),
                    se=masks.get(f'se.{number}'), width_in=masks[f'width.{incoming}'], active=masks[f'active.{number}'])
                for number, (inner, incoming) in enumerate(zip(table.inner, structure.inputs, strict=True))]
            places = structure.places
        else:
            sizes, kept = table.at(space, arch), kept_blocks(space, arch)
            widths = [
                ConvWidths(
                    hidden=None if table.inner[number] is None else sizes[table.inner[number]],
                    width_out=sizes[f'width.{structure.blocks[number].width}'], kernel_size=sizes[f'kernel.{number}'],
                    se=sizes.get(f'se.{number}'))
                for number in kept]
            places = [structure.places[number] for number in kept]
        return [
            (self.blocks[stage][position], each) for (stage, position), each in zip(places, widths, strict=True)
            if stage < len(self.blocks)]  # a backbone has no stages after its last feature map

    def stage_mask(self, masks: CnnMasks, stage: int) -> Tensor:
        group = self.unbound_space.structure.stages[stage - 1][-1].width if stage else 0
        return masks.masks[f'width.{group}']

    def end_widths(self, arch: Arch | CnnMasks, like: Tensor) -> EndWidths:
        stage, last = self.unbound_space.structure.blocks[-1].width, len(self.unbound_space.values('width')) - 1
        if isinstance(arch, CnnMasks):
            widths: list[Any] = [mask.to(like) for mask in (arch.masks[f'width.{stage}'], arch.masks[f'width.{last}'])]
        else:
            widths = [arch.width[stage], arch.width[last]]
        if stage == last:
            widths[1] = None  # no convolution follows, and masks multiply once
        return EndWidths(None if isinstance(arch, CnnMasks) else arch.width[0], *widths)

    def output_side(self, resolution: int) -> int:
        return output_side(self.unbound_space, resolution)

    # -- sorting -------------------------------------------------------------------------------------------------------

    def unit_axes(self, name: str) -> tuple[UnitAxis | None, ...]:
        owner, _, leaf = name.rpartition('.')
        weight = self._entry_of(owner)
        labels: tuple[str | None, ...] = (weight.rows,)
        if leaf == 'num_batches_tracked':
            labels = ()
        elif leaf in ('weight', 'filt') and weight.matrix:
            labels = (weight.rows, weight.columns, None, None)
        return tuple(UnitAxis(label) if self._are_units(label) else None for label in labels)

    def _entry_of(self, owner: str) -> Any:
        """The entry of a layer in the table of the space.

        Raises:
            ValueError: If the network had no such layer when it was created.
        """
        for weight in cnn_table(self.unbound_space).weights:
            if weight.name == owner:
                return weight
        raise ValueError(f'{owner} is no layer of the network as it was created; sort it before layers are replaced')

    def _are_units(self, label: str | None) -> bool:
        """Whether the entries of a size may be permuted."""
        return (label or '').partition('.')[0] in ('width', 'mid', 'se') and (
            label not in cnn_table(self.unbound_space).frozen)

    def layer_of(self, name: str) -> str | None:
        block = self._entry_of(name.rpartition('.')[0]).block
        return None if block is None else f'active.{block}'

    def split_masks(self, masks: CnnMasks) -> dict[str, Tensor]:
        frozen = cnn_table(self.unbound_space).frozen
        return {
            label: mask for label, mask in masks.masks.items()
            if not label.startswith('kernel.') and label not in frozen}

    def join_masks(self, masks: Mapping[str, Tensor]) -> CnnMasks:
        full = arch_masks(self.space, self.space.one_hot(self.space.largest))
        return CnnMasks(full.resolution, full.masks | dict(masks))

    def with_layer_order(self, scores: Mapping[str, Tensor]) -> SearchSpace:
        space, structure = self.unbound_space, self.unbound_space.structure
        ranked: list[list[int]] = [list(fixed) for fixed in structure.fixed]
        numbers = range(len(structure.blocks))
        for number in sorted(numbers, key=lambda number: -scores[f'active.{number}'].item()):
            stage, position = structure.places[number]
            if position not in structure.fixed[stage]:
                ranked[stage].append(position)
        return elastic_cnn_space(**dict(space.fields), **dict(structure, layer_order=ranked))

    # -- extraction ----------------------------------------------------------------------------------------------------

    def subnet_args(self, arch: Arch) -> dict[str, Any]:
        args = {name: value for name, value in self.model_args.items() if name != 'img_size'}
        return dict(args, layer_order=[list(order) for order in self.unbound_space.structure.layer_order])

    def subnet_state_dict(self, arch: Arch, subnet: nn.Module) -> dict[str, Tensor]:
        """The shared weights of an arch: leading slices and inner kernels of the kept blocks."""
        shared, structure = plain_state_dict(self), self.unbound_space.structure
        kept: list[list[int]] = [[] for _ in structure.stages]
        for number in kept_blocks(self.unbound_space, arch):
            stage, position = structure.places[number]
            kept[stage].append(position)
        return {
            name: cut(shared[_renumbered(name, kept)], weight.shape) for name, weight in subnet.state_dict().items()}


class ElasticEfficientNet(ElasticPretrainedCnn, EfficientNet):
    __doc__ = ElasticPretrainedCnn.__doc__


class ElasticMobileNetV3(ElasticPretrainedCnn, MobileNetV3):
    __doc__ = ElasticPretrainedCnn.__doc__


def make_cnn_elastic(net: nn.Module, space: SearchSpace, model_args: dict[str, Any]) -> nn.Module:
    """Turn a base into a supernet, in place."""
    net.__class__ = ElasticMobileNetV3 if isinstance(net, MobileNetV3) else ElasticEfficientNet
    return net.make_elastic(space, model_args)


def _renumbered(name: str, kept: Sequence[Sequence[int]]) -> str:
    """The name in the supernet of a weight of a subnet that consists of these positions of the stages."""
    parts = name.split('.')
    if parts[0] == 'blocks':
        parts[2] = str(kept[int(parts[1])][int(parts[2])])
    return '.'.join(parts)


def cut(weight: Tensor, shape: torch.Size) -> Tensor:
    """The first rows and columns of a weight, and the inner kernel."""
    weight = leading(weight, *shape[:2])
    return centre(weight, shape[-1]) if weight.dim() == 4 else weight


# -- static networks ---------------------------------------------------------------------------------------------------


def shrink(net: nn.Module, space: SearchSpace, arch: Arch) -> None:
    """Reduce a base to an arch, in place: to the blocks that it keeps, and their first channels.

    Args:
        net: The base.
        space: A space of the base that the arch is in.
        arch: The arch.
    """
    table, structure, kept = cnn_table(space), space.structure, kept_blocks(space, arch)
    sizes = table.at(space, arch)
    for weight in table.weights:
        module = net.get_submodule(weight.name)
        if isinstance(module, nn.Identity) or (weight.block is not None and weight.block not in kept):
            continue
        kernel = None if weight.kernel is None else sizes[weight.kernel]
        _resize(module, sizes.get(weight.rows), sizes.get(weight.columns or ''), kernel)
    for stage, blocks in enumerate(net.blocks):
        positions = [structure.places[number][1] for number in kept if structure.places[number][0] == stage]
        net.blocks[stage] = nn.Sequential(*(blocks[position] for position in positions))
    ends = [net.conv_stem.out_channels, *(stage[-1].feature_info('bottleneck')['num_chs'] for stage in net.blocks)]
    net.head_hidden_size = ends[-1] if isinstance(net.conv_head, nn.Identity) else net.conv_head.out_channels
    net.num_features = ends[-1] if isinstance(net, MobileNetV3) else net.head_hidden_size
    net.feature_info = [dict(info, num_chs=ends[info['stage']]) for info in net.feature_info]


def _resize(module: nn.Module, rows: int | None, columns: int | None, kernel: int | None) -> None:
    """Keep the first rows and columns and the inner kernel of a layer, in place; `None` keeps all."""
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for name, old in tensors:
        if not old.dim():
            continue
        shape = [rows or old.shape[0]]
        if old.dim() > 1:
            shape.append(columns or old.shape[1])
        if old.dim() == 4:
            shape += [kernel or old.shape[2]] * 2
        new = cut(old.detach(), torch.Size(shape)).clone()
        setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    weight = getattr(module, 'weight', None)
    if isinstance(module, nn.Conv2d):
        if module.groups == module.in_channels > 1:
            module.groups = rows or module.groups
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
        module.kernel_size = tuple(weight.shape[2:])
        if not isinstance(module, Conv2dSame):
            module.padding = tuple(size // 2 for size in module.kernel_size)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, BatchNormAct2d):
        module.num_features = len(weight)
    elif isinstance(module, BlurPool2d):
        module.channels = len(module.filt)


def make_cnn_static(
        arch: Arch | Mapping[str, Any] | None, net: nn.Module, model_args: dict[str, Any],
        layer_order: Sequence[Sequence[int]] | None = None) -> nn.Module:
    """Turn a base into the static network of an arch, in place; without an arch, of the largest one.

    Args:
        arch: An `Arch` or its dict.
        net: The base.
        model_args: Arguments that create the network again, `arch` aside.
        layer_order: Which blocks an arch of less than full depth has, as in `elastic_cnn_space`.

    Raises:
        ValueError: If the arch is not one of this base.
    """
    size = model_args.pop('img_size', None) or getattr(net, 'pretrained_cfg', dict(input_size=[224]))['input_size'][-1]
    own = default_cnn_space(net, size)
    arch = arch or own.largest
    order = own.structure.layer_order if layer_order is None else layer_order
    full = elastic_cnn_space(**dict(own.fields), **dict(own.structure, layer_order=order))
    static_space, arch = elastic_cnn_space_of(arch, full.structure)
    shrink(net, _space_with(full, arch), arch)
    _create_filters(net)
    net.arch, net.static_space, net.model_args = arch, static_space, dict(model_args, layer_order=layer_order)
    return net


def _create_filters(net: nn.Module) -> None:
    """Give poolings on the meta device their filters: these are constants, which no state_dict holds."""
    for module in net.modules():
        if isinstance(module, BlurPool2d) and module.filt.is_meta:
            module.filt = torch.empty_like(module.filt, device='cpu')
            module.init_non_persistent_buffers()


def _space_with(own: SearchSpace, arch: Arch) -> SearchSpace:
    """A space of a base that contains an arch.

    Raises:
        ValueError: If the arch has more than the base.
    """
    structure = own.structure
    values: dict[str, Any] = dict(own.fields)
    kept = kept_blocks(own, arch)
    expanding = [number for number, block in enumerate(structure.blocks) if block.expands]
    given = dict(
        width=dict(enumerate(arch.width)), depth=dict(enumerate(arch.depth)),
        kernel_size=dict(zip(kept, arch.kernel_size, strict=True)),
        mid_width=dict(zip([expanding.index(number) for number in kept if number in expanding],
                           arch.to_dict().get('mid_width', []), strict=True)))
    for name, chosen in given.items():
        most = [options[-1] for options in values[name]]
        if wrong := [value for i, value in chosen.items() if value > most[i]]:
            raise ValueError(f'{name}={wrong[0]} of the arch is more than the base has: {most}')
        values[name] = [sorted({chosen.get(i, value), value}) for i, value in enumerate(most)]
    values['resolution'] = [arch.resolution]
    return elastic_cnn_space(**values, **dict(structure))


ELASTIC_CNNS = ElasticFamily(
    bases=(EfficientNet, MobileNetV3), modules=('efficientnet', 'mobilenetv3', 'hardcorenas'),
    why_not=why_cnn_is_not_elastic, space=default_cnn_space, make_elastic=make_cnn_elastic, sized=True,
    levels=(0, 1, 2, 3, 4))
