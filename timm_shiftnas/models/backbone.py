"""Elastic backbones: supernets that return feature maps, as timm's `features_only=True`."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models._features import FeatureGetterNet
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..layers.conv import resize
from ..space import SearchSpace, Supernet, family_of, space_from_dict
from ..space.core import Arch
from ..space.families import Masks
from ._supernet import TimmSupernet

__all__ = ['ElasticBackbone', 'StaticBackbone']


class ElasticBackbone(Supernet, FeatureGetterNet):
    """The feature maps of a supernet at an arch: `backbone(images, arch)` is a list of maps [B, C, H, W].

    It is what `timm.create_model(NAME, features_only=True, out_indices=...)` returns for a supernet: timm's
    `FeatureGetterNet`, with an arch. The head of the network is removed. Channels follow the arch.

    Its own `space` counts the MACs and parameters of the backbone alone. `ElasticModel` adds those of a head.

    Args:
        model: A supernet that timm created, changed in place.
        out_indices: Feature maps, as in timm: the last n, or their numbers. A CNN has one for every stride. In a ViT
            they are layers; MACs are defined if the last layer, -1, is among them.
        norm: Apply the final norm of a ViT.
        img_size: The one size of images, in place of the resolutions of the space.
        output_fmt: 'NCHW', or 'NLC' for a ViT.

    Raises:
        ValueError: If `model` is not such a supernet, or its family has no feature maps.
    """

    def __init__(
            self,
            model: nn.Module,
            out_indices: int | Sequence[int] = 1,
            *,
            norm: bool = False,
            img_size: int | None = None,
            output_fmt: str = 'NCHW',
    ) -> None:
        net: Any = unwrap_model(model)
        if not isinstance(net, TimmSupernet) or not hasattr(net, 'keep_features'):
            raise ValueError(
                f'{type(net).__name__} has no elastic feature maps; give a supernet such as '
                "timm.create_model('shiftmobilenet_supernet') or tsn.elastic(NAME)")
        if img_size is not None:
            _set_image_size(net, img_size)
        kept = net.keep_features(list(out_indices) if isinstance(out_indices, Sequence) else out_indices, norm)
        super().__init__(net, kept, norm=norm, output_fmt=output_fmt, prune=False)
        self.pretrained_cfg = self.default_cfg = getattr(net, 'pretrained_cfg', {})

    @property
    def space(self) -> SearchSpace:
        """The search space, bound to the geometry of the backbone."""
        return _bound(self.model.unbound_space, self.model, self.out_indices)

    @property
    def unbound_space(self) -> SearchSpace:
        return self.model.unbound_space

    @property
    def model_args(self) -> dict[str, Any]:
        """Arguments of timm that create the supernet inside, `space` aside."""
        return self.model.model_args

    def forward(self, x: Tensor, arch: Arch | Masks | None = None) -> list[Tensor]:
        """Feature maps of one subnet for images [B, in_chans, H, W].

        Args:
            x: Images. With the arch of a CNN, they are resized to its resolution.
            arch: The subnet; `None` is the largest one, on images as they are. With masks, maps have the full width
                and are zero in the inactive channels.
        """
        return self.model.forward_intermediates(
            x, indices=self.out_indices, norm=self.norm, output_fmt=self.output_fmt, stop_early=True,
            intermediates_only=True, arch=arch)

    def channels(self, arch: Arch) -> list[int]:
        """Channels of every feature map at an arch; `feature_info.channels()` are those of the largest."""
        space, indices = self.unbound_space, self.unbound_space.encode(arch)
        return [family_of(space).channels(space, stage).at(indices)  # type: ignore[misc]
                for stage in _stages(self.model, self.out_indices)]

    def build_subnet(self, arch: Arch, **kwargs: Any) -> StaticBackbone:
        """The static backbone of an arch, with its own weights; users call `timm_shiftnas.extract`."""
        return StaticBackbone(
            self.model.build_subnet(arch, **kwargs), self.out_indices, norm=self.norm, output_fmt=self.output_fmt)

    def subnet_state_dict(self, arch: Arch, subnet: StaticBackbone) -> dict[str, Tensor]:
        state = self.model.subnet_state_dict(arch, subnet.model)
        return {f'model.{name}': weight for name, weight in state.items()}


class StaticBackbone(FeatureGetterNet):
    """timm's `FeatureGetterNet` of an extracted subnet; images are resized to the resolution of its arch.

    Args:
        model: A static subnet, changed in place: its head is removed.
        out_indices, norm, output_fmt: As for `ElasticBackbone`; those of a ViT count from its last layer.

    Attributes:
        arch: The arch.
        static_space: The space of the arch's own values, bound to the geometry.
    """

    def __init__(
            self, model: Any, out_indices: Sequence[int], *, norm: bool = False, output_fmt: str = 'NCHW') -> None:
        super().__init__(model, list(out_indices), norm=norm, output_fmt=output_fmt)
        self.arch = model.arch
        self.static_space = _bound(model.static_space, model, out_indices)
        self.pretrained_cfg = self.default_cfg = getattr(model, 'pretrained_cfg', {})

    @property
    def model_args(self) -> dict[str, Any]:
        """Arguments of timm that create the network inside, `arch` aside."""
        return self.model.model_args

    def forward(self, x: Tensor) -> list[Tensor]:
        resolution = family_of(self.static_space).resolution(self.arch)
        return super().forward(x if resolution is None else resize(x, resolution))


def _stages(net: Any, indices: Sequence[int]) -> tuple[int, ...]:
    """The stages of the space after which feature maps are taken.

    In a CNN, they are counted as in timm: 0 is the stem. In a ViT, they are layers counted from the last one.
    """
    return tuple(net.stage_ends[i] for i in indices) if hasattr(net, 'stage_ends') else tuple(indices)


def _bound(space: SearchSpace, net: Any, indices: Sequence[int]) -> SearchSpace:
    """A space bound to the geometry of a backbone.

    Raises:
        ValueError: If the maps of a ViT end before its last layer.
    """
    stages = _stages(net, indices)
    if stages[-1] < -1:
        raise ValueError(
            f'out_indices={stages} of a ViT end before its last layer, so its MACs are undefined at a smaller depth; '
            'give out_indices=(-1,), or the number of last layers')
    return space.bind(**family_of(space).geometry(net), features=stages)


def _set_image_size(net: Any, size: int) -> None:
    """Give a network one image size for all archs, in place."""
    cfg = {name: value for name, value in net.pretrained_cfg.items() if name not in ('pool_size', 'test_input_size')}
    net.pretrained_cfg = net.default_cfg = dict(cfg, input_size=(net.in_chans, size, size))
    data = net.unbound_space.to_dict()
    if 'resolution' not in data:
        net.set_input_size(size)
        return
    net.unbound_space = space_from_dict(dict(data, resolution=[size]))
    if 'base' in net.model_args:
        net.model_args['img_size'] = size
