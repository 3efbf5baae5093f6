"""Any network around an elastic backbone as a supernet: detectors, segmenters and others that read feature maps."""
from __future__ import annotations

import copy
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..layers.heads import elastic_inputs, input_channels, keep_inputs
from ..space import SearchSpace, Supernet
from ..space.core import Arch
from ..space.families import Masks, family_of
from ..space.heads import HeadCounts, resolutions
from .backbone import ElasticBackbone, StaticBackbone
from .subnet import Subnet

__all__ = ['ElasticModel', 'backbone_of', 'static_model', 'with_backbone']


class ElasticModel(Supernet, nn.Module):
    """A network that contains an `ElasticBackbone`, as a supernet: `model(images, arch)`.

    The network calls `self.backbone(x)` and knows nothing of archs. At an arch it runs as a view that shares all of
    its weights, in which the backbone is a `Subnet`. The layers that read feature maps take any prefix of their input
    channels (`layers.make_inputs_elastic`); everything behind them is plain torch.

    `extract` returns the network itself with a static backbone. It has the attributes `arch` and `static_space`.

    Args:
        network: `network(images)` is a function of the images alone, in training as well: the user's loss compares its
            output with the targets. It runs once for every resolution when this object is created, so that MACs of the
            head are known.

    Attributes:
        network: The network.
        reads: The feature map that each elastic layer of the head reads, by the name of the layer.

    Raises:
        ValueError: If there is not exactly one elastic backbone in the network, or if a layer that reads a feature map
            takes a fixed number of channels.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._path, _ = _find(network, ElasticBackbone)
        self._head, self.reads = _measure(network, self._path)

    @property
    def backbone(self) -> ElasticBackbone:
        return self.network.get_submodule(self._path)  # type: ignore[return-value]

    @property
    def space(self) -> SearchSpace:
        """The search space of the backbone, bound to the geometry of the whole network, head included."""
        space = self.backbone.space
        return space.bind(**space.geometry, **self._head._asdict())

    @property
    def unbound_space(self) -> SearchSpace:
        return self.backbone.unbound_space

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        return self.backbone.pretrained_cfg

    @property
    def model_args(self) -> dict[str, Any]:
        """Arguments of timm that create the supernet of the backbone, `space` aside."""
        return self.backbone.model_args

    def forward(self, x: Tensor, arch: Arch | Masks | None = None) -> Any:
        """The output of the network for images [B, in_chans, H, W].

        Args:
            x: Images. With the arch of a CNN, its backbone resizes them to its resolution.
            arch: The subnet; `None` is the largest one, on images as they are. Masks compute the same at full width,
                differentiably.
        """
        if arch is None:
            return self.network(x)
        return with_backbone(self.network, self._path, Subnet(self.backbone, arch))(x)

    def build_subnet(self, arch: Arch, **kwargs: Any) -> nn.Module:
        """The static network of an arch, with its own weights; users call `timm_shiftnas.extract`."""
        backbone = self.backbone.build_subnet(arch, **kwargs)
        network: Any = copy.deepcopy(self.network, {id(self.backbone): backbone})
        channels = self.backbone.channels(arch)
        for name, layer in list(elastic_inputs(network)):
            if not name.startswith(f'{self._path}.'):
                keep_inputs(layer, channels[self.reads[name]] if name in self.reads else None)
        return _described(network, backbone, _at_resolution(self._head, self.space, arch))

    def subnet_state_dict(self, arch: Arch, subnet: nn.Module) -> dict[str, Tensor]:
        """The shared weights of an arch: those of the backbone, and of the head the first input channels."""
        prefix, shared = f'{self._path}.' if self._path else '', self.network.state_dict()
        backbone = self.backbone.subnet_state_dict(arch, subnet.get_submodule(self._path))
        state = {f'{prefix}{name}': weight for name, weight in backbone.items()}
        return state | {
            name: shared[name][tuple(map(slice, weight.shape))] for name, weight in subnet.state_dict().items()
            if name not in state}


def backbone_of(network: nn.Module) -> tuple[str, ElasticBackbone | StaticBackbone | None]:
    """The name of the elastic or static backbone in a network, and the backbone; '' and `None` if there is none."""
    found = ((name, each) for name, each in network.named_modules()
             if isinstance(each, (ElasticBackbone, StaticBackbone)))
    return next(found, ('', None))


def static_model(network: nn.Module) -> nn.Module:
    """Complete a network that was built around a `StaticBackbone`, in place: as if it had been extracted.

    Its elastic layers become plain ones, and it gets the attributes `arch` and `static_space`.
    """
    path, backbone = _find(network, StaticBackbone)
    for name, layer in list(elastic_inputs(network)):
        if not name.startswith(f'{path}.'):
            keep_inputs(layer, None)
    return _described(network, backbone, _measure(network, path)[0])


def _described(network: Any, backbone: StaticBackbone, head: HeadCounts) -> nn.Module:
    space = backbone.static_space
    network.arch, network.static_space = backbone.arch, space.bind(**space.geometry, **head._asdict())
    return network


def with_backbone(network: nn.Module, path: str, backbone: nn.Module) -> nn.Module:
    """A view of a network with another submodule at `path`; all else, weights included, is shared."""
    if not path:
        return backbone
    first, _, rest = path.partition('.')
    view = object.__new__(type(network))
    view.__dict__ = {**network.__dict__, '_modules': dict(network._modules)}
    view._modules[first] = with_backbone(network.get_submodule(first), rest, backbone)
    return view


def _find(network: nn.Module, cls: type[nn.Module]) -> tuple[str, Any]:
    """The name of the one submodule of a class, and the submodule.

    Raises:
        ValueError: If there is not exactly one.
    """
    found = [(name, module) for name, module in network.named_modules() if isinstance(module, cls)]
    if len(found) != 1:
        raise ValueError(
            f'{type(network).__name__} contains {len(found)} elastic backbones and needs one; build it around '
            'tsn.ElasticBackbone(net) or timm.create_model(NAME, features_only=True)')
    return found[0]


# -- counts of a head --------------------------------------------------------------------------------------------------


class _Maps(nn.Module):
    """Stand-in for a backbone that returns given feature maps."""

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.maps


@torch.no_grad()
def _measure(network: nn.Module, path: str) -> tuple[HeadCounts, dict[str, int]]:
    """The counts of the head of a network, and which feature map each of its elastic layers reads.

    The network runs once for every resolution on maps of 1, 2, 4, ... channels. So the number of channels that arrive
    at a layer tells which map it reads. Around a static backbone, maps have its channels, and all counts are constant.
    """
    backbone: Any = network.get_submodule(path)
    elastic, weight = isinstance(backbone, ElasticBackbone), next(backbone.parameters())
    space = backbone.space if elastic else backbone.static_space
    sizes, total = resolutions(space), sum(each.numel() for each in network.parameters())
    side = backbone.model.patch_embed.img_size if sizes[-1] is None else (sizes[-1], sizes[-1])
    images = torch.zeros(1, backbone.model.in_chans, *side, device=weight.device, dtype=weight.dtype)
    modes = [(module, module.training) for module in network.modules()]
    counts: list[int] = []
    reads: dict[str, int] = {}
    try:
        network.eval()
        for size in sizes:
            arch = space.smallest if size is None else space.arch(**{**space.smallest.to_dict(), 'resolution': size})
            maps = backbone(images, arch) if elastic else backbone(images)
            if elastic:
                maps = [each.new_zeros(1, 2 ** i, *each.shape[2:]) for i, each in enumerate(maps)]
            row, reads = _count(with_backbone(network, path, _Maps(maps)), images, len(maps) if elastic else 0)
            counts += row + [0] * (1 + len(maps) - len(row))
    finally:
        for module, training in modes:
            module.training = training
    params = [total - sum(each.numel() for each in backbone.parameters()), *[0] * len(maps)]
    for name, level in reads.items():
        layer: Any = network.get_submodule(name)
        params[0] -= layer.weight.numel()
        params[1 + level] += layer.weight.numel() // input_channels(layer)
    return HeadCounts(tuple(counts), tuple(params), _sizes(network, backbone, reads)), reads


def _sizes(network: nn.Module, backbone: nn.Module, reads: Container[str]) -> tuple[int, int, int, int]:
    """The `head_sizes` of `HeadCounts`.

    Args:
        network: The network.
        backbone: Its backbone.
        reads: Names of the layers that read feature maps.
    """
    inside = {*backbone.modules()}
    layers: dict[str, Any] = {
        name: module for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and module not in inside}
    entries = sum(layer.weight.numel() for name, layer in layers.items() if name not in reads)
    rows = sum(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels for layer in layers.values())

    def saved(module: nn.Module) -> tuple[int, int]:
        """Floating-point numbers of the buffers in a file, and bytes of the others."""
        weights = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        buffers = [each for name, each in module.state_dict().items() if name not in weights]
        return (sum(each.numel() for each in buffers if each.is_floating_point()),
                sum(each.nbytes for each in buffers if not each.is_floating_point()))

    numbers, others = (whole - own for whole, own in zip(saved(network), saved(backbone), strict=True))
    return entries, rows, numbers, others


def _count(network: nn.Module, images: Tensor, levels: int) -> tuple[list[int], dict[str, int]]:
    """MACs (a, b_1, ..., b_L) of a network whose L maps have 1, 2, 4, ... channels, and which layers read them.

    Raises:
        ValueError: If a layer cannot read these channels, or reads more than one map.
    """
    linear, reads, started = [0] * levels, dict[str, int](), dict[nn.Module, int]()

    def watch(name: str, layer: nn.Module) -> list[Any]:
        dim = -1 if isinstance(layer, nn.Linear) else 1

        def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            started[layer] = counter.get_total_flops()

        def after(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            width = inputs[0].shape[dim]
            if width == input_channels(layer):
                return  # it reads something else
            level = width.bit_length() - 1
            if 2 ** level != width or level >= levels or reads.setdefault(name, level) != level:
                raise ValueError(
                    f'{name} reads {width} of {input_channels(layer)} channels, or several feature maps; give each map '
                    'a separate layer')
            linear[level] += (counter.get_total_flops() - started[layer]) // (2 * width)

        return [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]

    handles = [handle for name, layer in elastic_inputs(network) for handle in watch(name, layer)]
    # attention runs as plain matrix products, because the counter does not see the fused kernel of the CPU
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            network(images)
    except RuntimeError as error:
        raise ValueError(
            f'the layers of {type(network).__name__} cannot read feature maps of any number of channels '
            f'({error}); pass those that read them to timm_shiftnas.layers.make_inputs_elastic') from error
    finally:
        for handle in handles:
            handle.remove()
    total = counter.get_total_flops() // 2
    return [total - sum(share * 2 ** i for i, share in enumerate(linear)), *linear], reads


def _at_resolution(head: HeadCounts, space: SearchSpace, arch: Arch) -> HeadCounts:
    """The counts of a head for the one resolution of an arch."""
    sizes, length = resolutions(space), len(head.head_params)
    row = sizes.index(family_of(space).resolution(arch))
    return head._replace(head_macs=head.head_macs[row * length:(row + 1) * length])
