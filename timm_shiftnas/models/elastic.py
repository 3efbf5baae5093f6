"""Elastic networks from pretrained ones: `elastic('vit_small_patch16_224.augreg_in21k_ft_in1k', pretrained=True)`.

The largest arch of such a supernet is its base: the same outputs, the same names of weights, the same MACs.
"""
from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from timm.models import build_model_with_cfg, create_model, get_pretrained_cfg, is_model, list_models, register_model
from timm.models.vision_transformer import checkpoint_filter_fn
from timm.utils import unwrap_model
from torch import nn

from ..space.core import Arch, SearchSpace
from ..space.families import space_of_family
from .elastic_vit import ElasticVisionTransformer, default_vit_space, make_static, why_vit_is_not_elastic

__all__ = ['build_from_base', 'elastic', 'make_elastic']

Make = Callable[[nn.Module, dict[str, Any]], nn.Module]


def elastic(
        base: str | nn.Module,
        *,
        pretrained: bool = False,
        space: SearchSpace | Mapping[str, Any] | None = None,
        **kwargs: Any,
) -> nn.Module:
    """Turn a network of timm into a supernet whose largest arch it is.

    Args:
        base: A name of timm, such as 'vit_small_patch16_224.augreg_in21k_ft_in1k', or a network that timm created,
            which stays as it is: the supernet gets copies of its weights.
        pretrained: Load the published weights of a base that is given by name.
        space: The search space, or the dict of its `to_dict`; nothing in it may be larger than in the base. Default:
            derived from the base.
        **kwargs: Further arguments of the base: `num_classes`, `img_size`, `in_chans`, `drop_path_rate`, ...

    Returns:
        A supernet, with the preprocessing of the base in its `pretrained_cfg`.

    Raises:
        ValueError: If the base is unknown or not elastic, or the space is larger than it.
    """
    if isinstance(base, str):
        return create_model('elastic_supernet', pretrained=pretrained, base=base, space=space, **kwargs)
    net = copy.deepcopy(unwrap_model(base))
    cfg = getattr(net, 'pretrained_cfg', {})
    if pretrained or kwargs or not cfg.get('architecture'):
        raise ValueError(
            f'this {type(net).__name__} was not created by timm, or comes with arguments that only a name takes; give '
            'a network of timm.create_model and space= alone, or the name of the base')
    args = dict(getattr(net, '_model_args', {}), base=cfg['architecture'], num_classes=net.num_classes)
    net = make_elastic(space, net, args)
    net.pretrained_cfg = net.default_cfg = _config_of_base(cfg, 'elastic_supernet')
    return net


def make_elastic(
        space: SearchSpace | Mapping[str, Any] | None, net: nn.Module, model_args: dict[str, Any]) -> nn.Module:
    """Make a network of timm elastic, in place.

    Args:
        space: As in `elastic`.
        net: The base.
        model_args: Arguments that create the supernet again, `space` aside.

    Raises:
        ValueError: As in `elastic`.
    """
    if reason := why_vit_is_not_elastic(net):
        raise ValueError(f'base={model_args["base"]!r} is not elastic: {reason}')
    own = default_vit_space(net)
    space = own if space is None else space_of_family(space, own.family)
    for name, values in own.fields:
        if space.values(name)[-1] != values[-1]:
            raise ValueError(
                f'{name}={space.values(name)} of the space must end with {values[-1]}, which is what '
                f'{model_args["base"]} has: the largest arch is the base')
    net.__class__ = ElasticVisionTransformer
    return net.make_elastic(space, model_args)


def build_from_base(make: Make, variant: str, pretrained: bool, base: str, pretrained_cfg: Any,
                    kwargs: dict[str, Any]) -> nn.Module:
    """Create a network that is made of a base, as timm's entry points create theirs.

    Args:
        make: `make(net, model_args)` turns the base into it.
        variant: Its name in timm's registry.
        pretrained: Load its own weights, if there is a `pretrained_cfg` with a source; else those of the base.
        base: Name of the base.
        pretrained_cfg: Of a saved network; timm passes it for 'local-dir:' and 'hf-hub:'.
        kwargs: Arguments of the base and of timm's builder.

    Raises:
        ValueError: If timm does not know the base.
    """
    if not is_model(base):
        near = difflib.get_close_matches(base.partition('.')[0], list_models(), 3) or ['vit_small_patch16_224']
        raise ValueError(f'base={base!r} is not a model of this timm; did you mean {", ".join(near)}?')
    own_weights = pretrained_cfg is not None or (kwargs.get('pretrained_cfg_overlay') or {}).get('file') is not None
    cfg = pretrained_cfg or _config_of_base(get_pretrained_cfg(base).to_dict(), variant)

    def create(**args: Any) -> nn.Module:
        net = create_model(base, pretrained=pretrained and not own_weights, **args)
        given = {name: value for name, value in args.items() if name not in ('device', 'dtype')}
        return make(net, dict(given, base=base))

    return build_model_with_cfg(
        create, variant, pretrained and own_weights, pretrained_cfg=cfg, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter'), **kwargs)


def _config_of_base(cfg: Mapping[str, Any], variant: str) -> dict[str, Any]:
    """timm's configuration of the base, for a network with another name and without a source of weights."""
    sources = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'custom_load', 'tag')
    return dict({name: value for name, value in cfg.items() if name not in sources}, architecture=variant)


@register_model
def elastic_supernet(
        pretrained: bool = False,
        base: str = 'test_vit',
        space: SearchSpace | Mapping[str, Any] | None = None,
        pretrained_cfg: Any = None,
        **kwargs,
) -> nn.Module:
    """The supernet of any elastic network of timm: `base='vit_small_patch16_224.augreg_in21k_ft_in1k'`."""
    return build_from_base(
        lambda net, args: make_elastic(space, net, args), 'elastic_supernet', pretrained, base, pretrained_cfg, kwargs)


@register_model
def elastic_vit_subnet(
        pretrained: bool = False,
        base: str = 'test_vit',
        arch: Arch | Mapping[str, Any] | None = None,
        pretrained_cfg: Any = None,
        **kwargs,
) -> nn.Module:
    """A static ViT of an arch: a base of timm with smaller layers. Without `arch=`, the base itself."""
    return build_from_base(
        lambda net, args: make_static(arch, net, args), 'elastic_vit_subnet', pretrained, base, pretrained_cfg, kwargs)
