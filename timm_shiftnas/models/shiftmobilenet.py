"""ShiftMobileNet: elastic MobileNets and their static subnets, on timm's `EfficientNet` and `MobileNetV3`.

One network for the weight-entangled CNN supernets of the field; which of them it is, is data in its space:

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

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, get_act_layer, make_divisible
from timm.models import build_model_with_cfg, checkpoint, create_model, generate_default_cfgs, register_model
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
    elastic_kernel,
    make_elastic,
    resize,
)
from ..space import Supernet
from ..space.core import Arch, SearchSpace, shiftmobilenet_space, space_from_dict
from ..space.matrix_mapping import MobileNetMasks
from ..space.shiftmobilenet import HEAD_RATIO, block_choices, block_shapes, output_side
from ._checkpoint import check_fits

__all__ = [
    'ElasticEfficientNet', 'ElasticMobileNetV3', 'arch_space', 'checkpoint_filter_fn', 'ofa_space', 'stock_blocks',
]

_FIELDS = ('resolution', 'width', 'depth', 'kernel_size', 'expand_ratio')
_POOLS = ('avg', 'max', 'avgmax')
_PARTS = {'inverted_bottleneck', 'depth_conv', 'point_linear', 'shortcut'}  # of a block, as published code calls them
_ACTS = {'relu': 're', 'relu6': 'r6', 'hard_swish': 'hs', 'swish': 'sw'}  # as timm's block strings call them


# -- static networks ---------------------------------------------------------------------------------------------------


def stock_blocks(space: SearchSpace, arch: Arch) -> dict[str, Any]:
    """The network of an arch, projected shortcuts aside, in the terms of timm's `EfficientNet` and `MobileNetV3`.

    Returns:
        JSON-able `blocks` (strings for timm's `decode_arch_def`), `stem_size`, `num_features` and `act`.
    """
    fixed, shapes = dict(space.structure), block_shapes(space, arch)
    efficient = fixed['head'] == 'efficient'
    stages: list[list[str]] = [[] for _ in range(shapes[-1].stage + 1)]
    for shape in shapes:
        ratio = shape.hidden / shape.width_in
        # MobileNetV3 takes the SE ratio of the hidden width, EfficientNet of the incoming one
        se = f'_se{0.25 if efficient else 0.25 * ratio!r}' if shape.se else ''
        stages[shape.stage].append(
            f'{"ir" if shape.expands else "ds"}_r1_k{shape.kernel_size}_s{shape.stride}_e{ratio!r}_c{shape.width_out}'
            f'{se}_n{_ACTS[shape.act]}')
    act = fixed['act'][-1]
    if efficient:
        stages.append([f'cn_r1_k1_s1_c{HEAD_RATIO * arch.width[-2]}_n{_ACTS[act]}'])
    return dict(blocks=stages, stem_size=arch.width[0], num_features=arch.width[-1], act=act)


def _stock_args(space: SearchSpace, arch: Arch) -> dict[str, Any]:
    """Arguments of timm's class for the network of an arch."""
    stock = stock_blocks(space, arch)
    args = dict(head_bias=False) if _stock_class(space) is MobileNetV3 else {}
    return dict(
        args, block_args=decode_arch_def(stock['blocks']), stem_size=stock['stem_size'],
        num_features=stock['num_features'], act_layer=get_act_layer(stock['act']), se_layer=partial(
            SqueezeExcite, gate_layer='hard_sigmoid', force_act_layer=nn.ReLU, rd_round_fn=round_channels))


def _stock_class(space: SearchSpace) -> type:
    return MobileNetV3 if dict(space.structure)['head'] == 'efficient' else EfficientNet


def arch_space(arch: Arch | Mapping[str, Any], structure: Mapping[str, Any]) -> tuple[SearchSpace, Arch]:
    """The space of the values of an arch that comes without one, and the arch in it."""
    fields = arch.to_dict() if isinstance(arch, Arch) else dict(arch) if isinstance(arch, Mapping) else {}
    if sorted(fields) != sorted(_FIELDS):
        raise ValueError(f'arch={arch!r} is not a ShiftMobileNet arch; give a dict of {", ".join(_FIELDS)}')
    if not isinstance(structure, Mapping):
        raise ValueError(f'structure={structure!r} must be a dict such as dict(net.space.structure)')
    for name in _FIELDS[1:]:
        if not isinstance(fields[name], (list, tuple)):
            raise ValueError(f'arch field {name}={fields[name]!r} must be a list')

    def per_stage(name: str) -> list:
        values, found = list(fields[name]), []
        if not structure.get('per_block'):
            return [[value] for value in values]
        for depth in fields['depth']:
            found.append(sorted(set(values[:depth])))
            values = values[depth:]
        return found

    try:
        space = shiftmobilenet_space(
            resolution=[fields['resolution']], width=[[value] for value in fields['width']],
            depth=[[value] for value in fields['depth']], kernel_size=per_stage('kernel_size'),
            expand_ratio=per_stage('expand_ratio'), **structure)
    except TypeError as error:
        raise ValueError(f'arch={arch!r} with structure={structure!r} describes no network: {error}') from None
    return space, space.arch(**fields)


def _check_pool(global_pool: str, num_classes: int) -> None:
    if global_pool not in _POOLS and (global_pool or num_classes):
        raise ValueError(f"global_pool={global_pool!r} is not supported; choose one of {_POOLS}, or '' without classes")


def _make_subnet(
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
        structure: What is fixed in the networks of its space, as in `SearchSpace.structure`.
        num_classes, in_chans, global_pool, drop_rate, drop_path_rate: As for timm's networks.

    Raises:
        ValueError: If arch and structure describe no network.
    """
    _check_pool(global_pool, num_classes)
    space, arch = arch_space(arch, structure)
    shapes = block_shapes(space, arch)
    net = _stock_class(space)(
        num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate,
        device=device, dtype=dtype, **_stock_args(space, arch))
    projected = {
        DepthwiseSeparableConv: ProjectedDepthwiseSeparableConv, InvertedResidual: ProjectedInvertedResidual}
    for shape in shapes if dict(space.structure)['shortcut'] == 'projection' else ():
        changes = shape.width_in != shape.width_out
        if shape.position == 0 and (changes or shape.stride > 1):
            block = net.blocks[shape.stage][0]
            block.__class__ = projected[type(block)]
            block.projection = _projection(shape.width_in, shape.width_out, shape.stride, changes, device, dtype)
    _set_drop_path([net.blocks[shape.stage][shape.position] for shape in shapes], [shape.stage for shape in shapes],
                   drop_path_rate)
    net.arch = arch
    # what reconstructs this network: extraction and saving read it
    net.model_args = dict(
        structure=_plain_structure(space), num_classes=num_classes, in_chans=in_chans, global_pool=global_pool,
        drop_rate=drop_rate, drop_path_rate=drop_path_rate)
    return net


def _set_drop_path(blocks: Sequence[nn.Module], stages: Sequence[int], rate: float) -> None:
    """Drop path as AttentiveNAS has it: past blocks of the last two stages that keep width and size, rising."""
    for number, (block, stage) in enumerate(zip(blocks, stages)):
        if rate and stage > stages[-1] - 2 and block.has_skip and getattr(block, 'projection', None) is None:
            block.drop_path = DropPath(rate * number / len(blocks))


def _projection(width_in: int, width_out: int, stride: int, convolution: bool, device, dtype) -> Projection:
    projection = Projection(width_in, width_out, stride, convolution, device=device, dtype=dtype)
    if convolution:
        nn.init.normal_(projection.conv.weight, 0, (2 / width_out) ** .5)  # as timm's other convolutions here
    return projection


def _plain_structure(space: SearchSpace) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in space.structure}


# -- supernets ---------------------------------------------------------------------------------------------------------


class ShiftMobileNetSupernet(Supernet):
    """A MobileNet whose resolution, widths, depths and kernel sizes are chosen per call: `net(x, arch)`.

    The network owns the weights of every arch of its space; a smaller width or depth is a prefix of a larger one, a
    smaller kernel the centre of it. The arch is an argument of `forward` and is stored nowhere.

    BatchNorm: `net(x, arch)` in training uses the statistics of the batch and never writes running ones; `net(x)`, the
    full network, updates them as in timm. In evaluation both read the shared running statistics, of which a subnet's
    are a prefix: to be accurate, `extract` it and call `calibrate_bn`.

    Args:
        space: The search space (`timm.create_model` takes the dict of its `to_dict` as well).
        num_classes, in_chans, global_pool, drop_rate: As for timm's networks.
        drop_path_rate: Of the blocks of the last two stages that keep width and size, rising with the block's number.
        drop_archs: 'largest': dropout and drop path apply to the largest subnet only (BigNAS, AttentiveNAS); 'all'.
        zero_init_last: Start every block with a shortcut as that shortcut (BigNAS): zero the weight of its last
            BatchNorm.
    """

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
        _check_pool(global_pool, num_classes)
        if drop_archs not in ('largest', 'all'):
            raise ValueError(f"drop_archs={drop_archs!r} is unknown; choose 'largest' or 'all'")
        super().__init__(
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, device=device,
            dtype=dtype, **_stock_args(space, space.largest))
        self._unbound_space = space.unbind()
        self._largest = space.largest
        self._block_choices = block_choices(space)
        self._efficient_head = dict(space.structure)['head'] == 'efficient'
        self._drops = drop_archs == 'all'
        self.model_args: dict[str, Any] = dict(
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate,
            drop_path_rate=drop_path_rate, drop_archs=drop_archs)
        make_elastic(self)
        self._elastic_blocks(space, zero_init_last, device, dtype)
        _set_drop_path([self.blocks[block.stage][block.position] for block in self._block_choices],
                       [block.stage for block in self._block_choices], drop_path_rate)

    def _elastic_blocks(self, space: SearchSpace, zero_init_last: bool, device, dtype) -> None:
        fixed, choices = dict(space.structure), space.choices
        for block in self._block_choices:
            module = self.blocks[block.stage][block.position]
            module.may_skip = fixed['shortcut'] == 'identity' and block.position == 0 and block.stride == 1
            if block.kernel_size is not None:
                elastic_kernel(module.conv_dw, choices[block.kernel_size].values, fixed['kernel'] == 'transform')
            incoming, leaving = choices[block.width_in].values, choices[block.width_out].values
            changes = len({*incoming, *leaving}) > 1
            if fixed['shortcut'] == 'projection' and block.position == 0 and (changes or block.stride > 1):
                module.projection = _projection(incoming[-1], leaving[-1], block.stride, changes, device, dtype)
                make_elastic(module.projection)
            if zero_init_last and (module.has_skip or module.projection is not None):
                nn.init.zeros_((module.bn3 if block.expands else module.bn2).weight)

    # -- arch, MACs and parameters -------------------------------------------------------------------------------------

    @property
    def space(self) -> SearchSpace:
        """The search space, bound to the present geometry of the network."""
        return self._unbound_space.bind(
            in_chans=self.in_chans, num_classes=self.num_classes, global_pool=self.global_pool.pool_type)

    def _widths(self, arch: Arch | MobileNetMasks) -> list[tuple[nn.Module, ConvWidths]]:
        """The blocks of an arch, first to last, and what each is to compute."""
        drop = self._drops or arch == self._largest
        if isinstance(arch, MobileNetMasks):
            return [
                (self.blocks[block.stage][block.position], ConvWidths(
                    masks.hidden, None, masks.kernel_size, masks.se, masks.width_in, masks.equal, masks.active, drop))
                for block, masks in zip(self._block_choices, arch.blocks)]
        return [
            (self.blocks[shape.stage][shape.position], ConvWidths(
                shape.hidden, shape.width_out, shape.kernel_size, shape.se, drop=drop))
            for shape in block_shapes(self._unbound_space, arch, self._block_choices)]

    # -- forward -------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, arch: Arch | MobileNetMasks | None = None) -> Tensor:
        """Logits [B, num_classes] for images [B, in_chans, H, W].

        Args:
            x: Images; given an arch, they are resized to its resolution.
            arch: The subnet; `None` is the full network on images as they are. `MobileNetMasks` compute the same at
                full width, differentiably.
        """
        return self.forward_head(self.forward_features(x, arch), arch=arch)

    def forward_features(self, x: Tensor, arch: Arch | MobileNetMasks | None = None) -> Tensor:
        if arch is None:
            return super().forward_features(x)
        masked = isinstance(arch, MobileNetMasks)
        arch = arch.to(x) if masked else arch
        widths = self._widths(arch)
        x = resize(x, arch.resolution)
        x = self.bn1(self.conv_stem(x, None if masked else arch.width[0]), elastic=True)
        for block, width in widths:
            run = partial(block, widths=width)
            x = checkpoint(run, x) if self.grad_checkpointing else run(x)
        if masked:
            x = x * arch.stage[:, None, None]
        if self._efficient_head:
            out = None if masked else HEAD_RATIO * arch.width[-2]
            x = self.blocks[-1][0](x, out, elastic=True)
            return x * arch.expanded[:, None, None] if masked else x
        return self.bn2(self.conv_head(x, None if masked else arch.width[-1]), elastic=True)

    def forward_head(
            self, x: Tensor, pre_logits: bool = False, arch: Arch | MobileNetMasks | None = None) -> Tensor:
        if arch is None:
            return super().forward_head(x, pre_logits)
        masked = isinstance(arch, MobileNetMasks)
        x = self.global_pool(x)
        if self._efficient_head:
            x = self.act2(self.conv_head(x, None if masked else arch.width[-1]))
        if masked:
            x = x * arch.last.to(x).view(-1, *[1] * (x.dim() - 2))
        if self.global_pool.pool_type:
            x = x.flatten(1)
        if self.drop_rate > 0 and (self._drops or arch == self._largest):
            x = F.dropout(x, self.drop_rate, self.training)
        if pre_logits or isinstance(self.classifier, nn.Identity):
            return x
        return F.linear(x, self.classifier.weight[:, :x.shape[1]], self.classifier.bias)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            _check_pool(global_pool, num_classes)
        super().reset_classifier(num_classes, global_pool)
        self.model_args.update(num_classes=num_classes, global_pool=self.global_pool.pool_type)

    # -- extraction ----------------------------------------------------------------------------------------------------

    def build_subnet(self, arch: Arch, **kwargs) -> nn.Module:
        """The static network of an arch, with weights of its own; callers want `timm_shiftnas.extract`."""
        self._unbound_space.validate(arch)
        args = {name: value for name, value in self.model_args.items() if name != 'drop_archs'}
        if not self._drops and arch != self._largest:
            args.update(drop_rate=0., drop_path_rate=0.)
        args.update(kwargs)
        return create_model(
            'shiftmobilenet_subnet', arch=arch.to_dict(), structure=_plain_structure(self._unbound_space),
            pretrained_cfg=self._subnet_cfg(arch), **args)

    def subnet_state_dict(self, arch: Arch, subnet: nn.Module) -> dict[str, Tensor]:
        """The shared weights of an arch under the names and in the shapes of its static network; kernels are folded."""
        shared, state = self.state_dict(), {}
        for name, weight in subnet.state_dict().items():
            owner = self.get_submodule(name.rpartition('.')[0])
            if isinstance(owner, ElasticDepthwiseConv2d):
                state[name] = owner.kernel(weight.shape[-1], weight.shape[0])
            else:
                state[name] = shared[name][tuple(slice(size) for size in weight.shape)]
        return state

    def _subnet_cfg(self, arch: Arch) -> dict[str, Any]:
        cfg = dict(getattr(self, 'pretrained_cfg', None) or _cfg())
        for source in ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'test_input_size'):
            cfg.pop(source, None)
        return dict(cfg, architecture='shiftmobilenet_subnet', num_classes=self.num_classes,
                    input_size=(self.in_chans, arch.resolution, arch.resolution),
                    pool_size=(output_side(self._unbound_space, arch.resolution),) * 2)


class ElasticEfficientNet(ShiftMobileNetSupernet, EfficientNet):
    __doc__ = ShiftMobileNetSupernet.__doc__


class ElasticMobileNetV3(ShiftMobileNetSupernet, MobileNetV3):
    __doc__ = ShiftMobileNetSupernet.__doc__


# -- checkpoints -------------------------------------------------------------------------------------------------------


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Adapt a checkpoint to `model`: published AttentiveNAS, AlphaNet and OFA supernets, or weights under own names.

    Raises:
        ValueError: If the checkpoint belongs to another search space, arch or number of classes.
    """
    for key in ('state_dict', 'model'):
        state_dict = state_dict.get(key, state_dict)
    state_dict = {name.removeprefix('module.'): weight for name, weight in state_dict.items()}
    if any(name.startswith('first_conv.') for name in state_dict):
        state_dict = _convert_published(state_dict, model)
    check_fits(state_dict, model, first_conv='conv_stem', classifier='classifier')
    return state_dict


def _convert_published(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of the published code; drop shortcuts that no arch uses, and statistics for tracking."""
    blocks = [(f'blocks.{s}.{i}', block) for s, stage in enumerate(model.blocks) for i, block in enumerate(stage)]
    own, converted = model.state_dict(), {}
    for name, weight in state_dict.items():
        tokens = name.split('.')
        if 'bn_tracking' in tokens:
            continue
        norm, leaf = 'bn' in tokens, tokens[-1]
        if tokens[0] == 'first_conv':
            new = f'{"bn1" if norm else "conv_stem"}.{leaf}'
        elif 'final_expand_layer' in tokens:
            new = f'{blocks[-1][0]}.{"bn1" if norm else "conv"}.{leaf}'
        elif tokens[0] == 'classifier':
            new = f'classifier.{leaf}'
        elif tokens[0] in ('last_conv', 'feature_mix_layer'):
            new = f'{"bn2" if norm else "conv_head"}.{leaf}'
        elif tokens[0] == 'blocks' and tokens[1].isdecimal() and int(tokens[1]) < len(blocks) and _PARTS & set(tokens):
            prefix, block = blocks[int(tokens[1])]
            new = f'{prefix}.{_published_part(tokens, isinstance(block, InvertedResidual))}'
            if 'shortcut' in tokens and new not in own:
                continue
        else:
            new = name  # what check_fits will name
        converted[new] = weight
    return converted


def _published_part(tokens: list[str], expands: bool) -> str:
    """timm's name, inside its block, of what the published code calls by these tokens."""
    leaf = tokens[-1]
    if 'shortcut' in tokens:
        return f'projection.conv.{leaf}'
    if 'se' in tokens:
        return f'se.{"conv_reduce" if "reduce" in tokens else "conv_expand"}.{leaf}'
    if leaf.endswith('_matrix'):
        return f'conv_dw.matrices.{leaf.removesuffix("_matrix")}'
    number = next(i for i, part in enumerate(('inverted_bottleneck', 'depth_conv', 'point_linear')) if part in tokens)
    if 'bn' in tokens:
        return f'bn{number + expands}.{leaf}'
    return f'{("conv_pw", "conv_dw", "conv_pwl" if expands else "conv_pw")[number]}.{leaf}'


# -- registered models -------------------------------------------------------------------------------------------------


def _cfg(**kwargs) -> dict[str, Any]:
    return dict(
        num_classes=1000, input_size=(3, 224, 224), pool_size=(7, 7), crop_pct=.875, interpolation='bicubic',
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, first_conv='conv_stem', classifier='classifier',
        license='apache-2.0') | kwargs


default_cfgs = generate_default_cfgs({
    'shiftmobilenet_supernet.untrained': _cfg(input_size=(3, 320, 320), pool_size=(10, 10)),
    'attentivenas_supernet.untrained': _cfg(input_size=(3, 288, 288), pool_size=(9, 9)),
    'ofa_mobilenetv3_supernet.untrained': _cfg(input_size=(3, 260, 260), pool_size=(9, 9)),
    'ofa_mobilenetv3_w12_supernet.untrained': _cfg(input_size=(3, 260, 260), pool_size=(9, 9)),
    'test_shiftmobilenet_supernet.untrained': _cfg(input_size=(3, 32, 32), pool_size=(4, 4), crop_pct=1.0),
    'shiftmobilenet_subnet.untrained': _cfg(input_size=(3, 192, 192), pool_size=(6, 6)),
})


def _create(factory: Callable, variant: str, pretrained: bool, stride: Sequence[int], **kwargs) -> nn.Module:
    levels = tuple(range(1 + list(stride).count(2)))  # a feature map before every stride
    return build_model_with_cfg(
        factory, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop('out_indices', levels), feature_cls='getter'), **kwargs)


def _create_supernet(variant: str, pretrained: bool, space: SearchSpace | Mapping[str, Any], img_size: Any = None,
                     **kwargs) -> nn.Module:
    """`img_size`, which timm's scripts may give, changes nothing: these networks take images of any size."""
    space = space if isinstance(space, SearchSpace) else space_from_dict(space)
    if space.family != 'shiftmobilenet':
        raise ValueError(f'a ShiftMobileNet needs a shiftmobilenet space, got family={space.family!r}')
    cls = ElasticMobileNetV3 if _stock_class(space) is MobileNetV3 else ElasticEfficientNet
    return _create(cls, variant, pretrained, dict(space.structure)['stride'], space=space, **kwargs)


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

    The ranges are those on which two independent implementations of BigNAS agree. They differ on three points. Widths
    of the last stage: all multiples of 8 from 320 to 352 are taken (one has the two ends only, a part of this). SE and
    swish in all stages are taken from the one that has both, for it was built to reproduce the paper's training.
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
    """A small space for tests and the quickstart: 24 to 32 px, runs in milliseconds."""
    space = shiftmobilenet_space(
        resolution=(24, 28, 32), width=((8, 16), (8, 16), (16, 24, 32), (24, 32, 48), (32, 48, 64), (64, 96, 128)),
        depth=((1, 2), (1, 2, 3), (1, 2, 3), (1, 2)), kernel_size=((3,), (3, 5), (3, 5), (3, 5)),
        expand_ratio=((1,), (2, 3, 4), (2, 3, 4), (2, 3, 4)), stride=(1, 2, 2, 1))
    return _create_supernet('test_shiftmobilenet_supernet', pretrained, **dict(dict(space=space), **kwargs))


@register_model
def shiftmobilenet_subnet(pretrained: bool = False, **kwargs) -> nn.Module:
    """A static MobileNet of any arch; without `arch=`, the smallest one of the BigNAS space."""
    space = _bignas()
    args = dict(arch=space.smallest.to_dict(), structure=_plain_structure(space))
    args.update(kwargs)
    args.pop('img_size', None)  # it takes images of any size
    stride = args['structure'].get('stride', ()) if isinstance(args['structure'], Mapping) else ()
    return _create(_make_subnet, 'shiftmobilenet_subnet', pretrained, stride, **args)
