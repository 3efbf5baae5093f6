"""Elastic networks from pretrained ones: `elastic('vit_small_patch16_224.augreg_in21k_ft_in1k', pretrained=True)`.

The largest arch of such a supernet is its base: the same outputs, the same names of weights, the same MACs.
"""
from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from timm.layers import to_2tuple
from timm.models import (
    build_model_with_cfg,
    create_model,
    get_model_args,
    get_pretrained_cfg,
    is_model,
    is_model_in_modules,
    list_models,
    register_model,
)
from timm.utils import unwrap_model
from torch import nn

from ..space.core import Arch, SearchSpace
from ..space.families import family_of, space_from_dict
from ..utils.text import one_line
from ._elastic_family import ElasticFamily
from ._meta import create_on_meta
from .backbone import ElasticBackbone
from .elastic_cnn import ELASTIC_CNNS, make_cnn_static
from .elastic_vit import ELASTIC_VITS, make_vit_static

__all__ = ['FAMILIES', 'NoWeights', 'build_from_base', 'elastic', 'make_elastic', 'why_not_elastic']

FAMILIES = (ELASTIC_VITS, ELASTIC_CNNS)
_SOURCES = ('url', 'file', 'state_dict', 'hf_hub_id')  # of weights, in timm's configurations
Make = Callable[[nn.Module, dict[str, Any]], nn.Module]


class NoWeights(ValueError):
    """The published weights of a base cannot be loaded."""


def elastic(
        base: str | nn.Module,
        *,
        pretrained: bool = False,
        space: SearchSpace | Mapping[str, Any] | None = None,
        **kwargs: Any,
) -> nn.Module:
    """Turn a network of timm into a supernet whose largest arch is that network.

    Args:
        base: A name of timm, such as 'vit_small_patch16_224.augreg_in21k_ft_in1k', 'efficientnet_b0' or
            'hf-hub:OWNER/NAME', or a network that timm created, which stays as it is: the supernet gets copies of its
            weights.
        pretrained: Load the published weights of a base that is given by name.
        space: The search space, or the dict of its `to_dict`; nothing in it may be larger than in the base. Default:
            derived from the base.
        **kwargs: Further arguments of the base: `num_classes`, `in_chans`, `drop_path_rate`, ... CNNs also take
            `img_size`, even those that are given as a network: it is the resolution of the largest arch.

    Returns:
        A supernet, with the preprocessing of the base in its `pretrained_cfg`.

    Raises:
        ValueError: If the base is unknown or not elastic, the space is larger than it, or there are no weights.
    """
    if isinstance(base, str) and ':' not in base:
        return create_model('elastic_supernet', pretrained=pretrained, base=base, space=space, **kwargs)
    if isinstance(base, str):  # a repository or a folder says itself which network it is
        try:
            family, size = _family_of(create_on_meta(base)), {}
        except OSError as error:
            raise NoWeights(f'{base} cannot be loaded: {one_line(error, 300)}') from error
        if family is not None and family.sized and 'img_size' in kwargs:
            size['img_size'] = kwargs.pop('img_size')
        return elastic(create_model(base, pretrained=pretrained, **kwargs), space=space, **size)
    net = unwrap_model(base)
    cfg = getattr(net, 'pretrained_cfg', {})
    if not cfg.get('architecture'):
        raise ValueError(
            f'this {type(net).__name__} was not created by timm; give a network of timm.create_model, or its name')
    family = _elastic_family_of(net, cfg['architecture'])
    size = _square(kwargs.pop('img_size', None)) if family.sized else None
    if pretrained or kwargs:
        names = ', '.join([*kwargs, *(['pretrained'] if pretrained else [])])
        raise ValueError(f'{names}: only the name of a base takes these; create the network with them')
    name, args = _created_by(net, cfg['architecture'])
    _check_unchanged(net, name, args)
    args['base'] = name
    if size is None and hasattr(net, 'static_space'):
        size = family_of(net.static_space).resolution(net.arch)
    if size is not None:
        args['img_size'] = size
    net = copy.deepcopy(net)
    for attribute in ('arch', 'static_space'):  # of a subnet of the largest arch
        vars(net).pop(attribute, None)
    net._model_args = dict(args)  # which timm saves
    net = make_elastic(space, net, args)
    net.pretrained_cfg = net.default_cfg = _config_of(_without_source(cfg), 'elastic_supernet', args)
    return net


def _created_by(net: nn.Module, architecture: str) -> tuple[str, dict[str, Any]]:
    """The name and the arguments that create a network of timm as it is now; for an extracted subnet, its base's.

    Raises:
        ValueError: If it is a subnet that has no base.
    """
    if hasattr(net, 'static_space'):
        args = {key: value for key, value in net.model_args.items() if key not in ('arch', 'layer_order')}
        if 'base' not in args:
            raise ValueError(f'this {architecture} is a subnet of another supernet; give a network of timm itself')
        name = args.pop('base')
        if 'fc_norm' in net._model_args:  # timm's reset_classifier keeps it so, whatever the pooling
            args['fc_norm'] = net._model_args['fc_norm']
    else:
        name, args = architecture, dict(getattr(net, '_model_args', {}))
    return name, {**args, **_present_head(net)}


def _present_head(net: nn.Module) -> dict[str, Any]:
    """The classes and the pooling of a network, which `reset_classifier` may have changed."""
    present = get_model_args(net)
    return {key: present[key] for key in ('num_classes', 'global_pool') if key in present}


def _check_unchanged(net: nn.Module, name: str, args: dict[str, Any]) -> None:
    """Raise a `ValueError` unless these arguments, which will be saved, create a network of the same weights."""
    expected = create_on_meta(name, **args).state_dict()
    shapes, others = (
        {key: list(weight.shape) for key, weight in each.items()} for each in (net.state_dict(), expected))
    for key in [*others, *shapes]:
        if shapes.get(key) != others.get(key):
            if hasattr(net, 'static_space'):
                raise ValueError(
                    f'this network is a smaller subnet of {name}, or was changed; give {name}, or the subnet of its '
                    'largest arch as it was created')
            raise ValueError(
                f'this {name} was changed after timm had created it: {key} has the shape {shapes.get(key)}, and '
                f'{others.get(key)} as created; change classes by reset_classifier(N), and the rest by arguments')


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
    family = _elastic_family_of(net, model_args['base'])
    size = model_args.get('img_size') or _square(net.pretrained_cfg['input_size'][1:]) if family.sized else None
    own = family.space(net, size)
    if space is None:
        space = own
    elif not isinstance(space, SearchSpace):
        if isinstance(space, Mapping) and 'layer_order' in space:  # of other layers, it would hide another depth
            _check_space(space_from_dict({**space, 'layer_order': None}), own, model_args['base'])
        space = space_from_dict(space)
    _check_space(space, own, model_args['base'])
    return family.make_elastic(net, space, model_args)


def _check_space(space: SearchSpace, own: SearchSpace, base: str) -> None:
    """Raise a `ValueError` unless the largest arch of a space is the base that has the space `own`."""
    fixed, expected = (
        {name: value for name, value in each.structure if name != 'layer_order'} for each in (space, own))
    if space.family != own.family or fixed != expected:
        raise ValueError(f'this space belongs to another base than {base}; change the values of elastic(...).space')
    for name, values in own.fields:
        if _last(space.values(name)) != _last(values):
            raise ValueError(
                f'{name}={space.values(name)} of the space must end with {_last(values)}, which is what {base} has'
                f'{" for images of this size" if name == "resolution" else ""}: the largest arch is the base')


def _last(values: Sequence[Any]) -> Any:
    """The largest value of a field; if layers have their own values, a list of those."""
    return values[-1] if values and not isinstance(values[0], tuple) else [each[-1] for each in values]


def _square(img_size: Any) -> int | None:
    """The side of square images, given as such or as height and width.

    Raises:
        ValueError: If it is neither.
    """
    sides = {*img_size} if isinstance(img_size, (list, tuple)) else {img_size}
    side = sides.pop() if len(sides) == 1 else 0
    if side is not None and (type(side) is not int or side < 1):
        raise ValueError(f'img_size={img_size!r} must be the side of square images, such as 224')
    return side


# -- which networks are elastic ----------------------------------------------------------------------------------------


def _family_of(net: nn.Module) -> ElasticFamily | None:
    """The family that may make a network elastic."""
    return next((family for family in FAMILIES if type(net) in family.bases), None)


def why_not_elastic(net: nn.Module) -> str | None:
    """The reason why a network of timm is not elastic, or `None` if it is."""
    family = _family_of(net)
    if family is None:
        known = ', '.join(base.__name__ for family in FAMILIES for base in family.bases)
        return f'its class is {type(net).__name__} and not one of {known}'
    return family.why_not(net)


def _elastic_family_of(net: nn.Module, base: str) -> ElasticFamily:
    """The family of a base.

    Raises:
        ValueError: If it is not elastic.
    """
    family, reason = _family_of(net), why_not_elastic(net)
    if family is None or reason:
        near = _elastic_names_near(base)
        hint = f'elastic are {", ".join(near)}'
        if base.partition('.')[0] in near:
            hint = 'without this option it is elastic'
        raise ValueError(f'base={base!r} is not elastic: {reason}; {hint}')
    return family


def _check_is_of(family: ElasticFamily, net: nn.Module, base: str) -> None:
    """Raise a `ValueError` unless a base is elastic, and of a family."""
    if _elastic_family_of(net, base) is not family:
        raise ValueError(f'base={base!r} is not of the class {" or ".join(each.__name__ for each in family.bases)}')


def _elastic_names_near(base: str) -> list[str]:
    """Up to three names of elastic networks that resemble another name, if possible from the same module of timm."""
    name = base.partition('.')[0]
    every = [module for family in FAMILIES for module in family.modules]
    modules = every if not is_model(name) else [module for module in every if is_model_in_modules(name, [module])]
    known = [other for module in modules for other in list_models(module=module)]
    near: list[str] = []
    for other in difflib.get_close_matches(name, known, n=12, cutoff=.5 if is_model(name) else .75):
        if len(near) < 3 and why_not_elastic(create_on_meta(other)) is None:
            near.append(other)
    return near or ['vit_small_patch16_224', 'efficientnet_b0', 'mobilenetv3_large_100']


def _family_of_name(base: str) -> ElasticFamily | None:
    """The family whose modules of timm have a name."""
    return next((family for family in FAMILIES if is_model_in_modules(base.partition('.')[0], family.modules)), None)


# -- timm's registry ---------------------------------------------------------------------------------------------------


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
        ValueError: If timm does not know the base, or its weights cannot be loaded.
    """
    if not isinstance(base, str) or ':' in base:
        raise ValueError(f'base={base!r} is no name of timm; timm_shiftnas.elastic(...) also takes networks and places')
    if not is_model(base):
        hint = f'did you mean {", ".join(_elastic_names_near(base))}?' if pretrained_cfg is None else (
            'the network was saved with another version: pip install --upgrade timm')
        raise ValueError(f'base={base!r} is not a model of this timm; {hint}')
    published = f'{base.partition(".")[0]}.*'
    try:
        base_cfg = get_pretrained_cfg(base)
    except RuntimeError as error:
        raise ValueError(f'base={base!r}: {error} Type one of {list_models(published, include_tags=True)}') from None
    if base_cfg is None:
        raise ValueError(f'base={base!r} is not a network of timm itself; type one such as vit_small_patch16_224')
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    saved = pretrained_cfg is not None  # its weights are those of the elastic network, all others of the base
    if pretrained and not (saved or base_cfg.has_weights or any(overlay.get(name) for name in _SOURCES)):
        known = list_models(published, pretrained=True) or ['pretrained=False']
        raise NoWeights(f'timm has no weights of base={base!r}; type {", ".join(known)}')
    family = _family_of_name(base)
    args_of_images = {name: kwargs.get(name) for name in ('in_chans', 'img_size')}
    size = _square(kwargs.pop('img_size', None)) if family is not None and family.sized else None

    def create(**args: Any) -> nn.Module:
        net = _create_base(base, pretrained and not saved, overlay, args)
        given = {name: value for name, value in args.items() if name not in ('device', 'dtype')}
        return make(net, dict(given, base=base) if size is None else dict(given, base=base, img_size=size))

    levels = kwargs.pop('out_indices', 3 if family is None else family.levels)
    cfg = pretrained_cfg or _config_of(_without_source(base_cfg.to_dict()), variant, args_of_images)
    net = build_model_with_cfg(
        create, variant, pretrained and saved, pretrained_cfg=cfg,
        pretrained_filter_fn=None if family is None else family.filter_fn,
        feature_cfg=dict(
            out_indices=levels, feature_cls=ElasticBackbone if variant == 'elastic_supernet' else 'getter'),
        **kwargs)
    if saved:  # only now: while timm loads weights, the configuration has to say what they were saved with
        for each in {net, getattr(net, 'model', net)}:
            each.pretrained_cfg = each.default_cfg = _config_of(each.pretrained_cfg, variant, args_of_images)
    return net


def _create_base(base: str, pretrained: bool, overlay: Mapping[str, Any], args: dict[str, Any]) -> nn.Module:
    """A base, if `pretrained` with its published weights, or those that an overlay of its configuration names.

    Raises:
        ValueError: If it is not elastic, or its weights cannot be loaded.
    """
    try:
        if pretrained:  # before anything is downloaded
            _elastic_family_of(create_on_meta(base, **args), base)
            args = dict(args, pretrained_cfg_overlay=dict(overlay) or None)
        return create_model(base, pretrained=pretrained, **args)
    except TypeError:  # an argument that it does not have; perhaps it is not elastic anyway
        if _family_of_name(base) is None:
            _elastic_family_of(create_on_meta(base), base)
        raise
    except OSError as error:
        raise NoWeights(
            f'the weights of base={base!r} cannot be loaded: {one_line(error) or overlay.get("file")}; '
            f'connect to the internet, or create the '
            'base from a file: timm.create_model(NAME, checkpoint_path=FILE)') from error


def _without_source(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """timm's configuration of a base without the source of its weights."""
    others = ('hf_hub_filename', 'source', 'custom_load', 'tag')
    return {name: value for name, value in cfg.items() if name not in (*_SOURCES, *others)}


def _config_of(cfg: Mapping[str, Any], variant: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """timm's configuration of a network with these arguments: its name, and the channels and size of its images."""
    channels, *sides = cfg['input_size']
    sides = to_2tuple(args['img_size']) if args.get('img_size') else sides
    config = dict(cfg, architecture=variant, input_size=(args.get('in_chans') or channels, *sides))
    if config['input_size'][1:] != tuple(cfg['input_size'][1:]):  # these hold for the base's own size
        config = {name: value for name, value in config.items() if name not in ('pool_size', 'test_input_size')}
    return config


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

    def make(net: nn.Module, args: dict[str, Any]) -> nn.Module:
        _check_is_of(ELASTIC_VITS, net, base)
        return make_vit_static(arch, net, args)

    return build_from_base(make, 'elastic_vit_subnet', pretrained, base, pretrained_cfg, kwargs)


@register_model
def elastic_cnn_subnet(
        pretrained: bool = False,
        base: str = 'test_efficientnet',
        arch: Arch | Mapping[str, Any] | None = None,
        layer_order: Sequence[Sequence[int]] | None = None,
        pretrained_cfg: Any = None,
        **kwargs,
) -> nn.Module:
    """A static CNN of an arch: a base of timm with smaller layers. Without `arch=`, the base for images of `img_size`.

    `layer_order` says which blocks an arch of less than full depth has; see `elastic_cnn_space`.
    """
    if arch is not None:
        kwargs.pop('img_size', None)  # the arch has the resolution

    def make(net: nn.Module, args: dict[str, Any]) -> nn.Module:
        _check_is_of(ELASTIC_CNNS, net, base)
        return make_cnn_static(arch, net, args, layer_order)

    return build_from_base(make, 'elastic_cnn_subnet', pretrained, base, pretrained_cfg, kwargs)
