"""`train.py --elastic BASE`: make a pretrained network elastic and train its subnets."""
from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import timm
import torch
from timm.data import resolve_input_data_config
from timm.models import load_state_dict
from torch import Tensor, nn

from ..models import elastic, sort_by_importance
from ..models._meta import create_on_meta
from ..models.elastic import NoWeights
from ..space.families import space_from_dict
from ..utils.distributed import Ranks
from ..utils.text import one_line
from .checkpoints import read_checkpoint, report_head
from .data import Data, create_calibration_loader
from .timm_flags import BASE

__all__ = ['elastic_network', 'open_base']

_logger = logging.getLogger('train')


class Base:
    """A pretrained network as a supernet, before its head is replaced and its units are sorted.

    Args:
        net: The supernet, with the classes of its weights.
        num_classes: Number of classes to train; `None` keeps those of the weights.

    Attributes:
        knows_classes: Whether the classes of its head are those to train.
    """

    def __init__(self, net: nn.Module, num_classes: int | None) -> None:
        self.net, self.num_classes = net, num_classes or net.num_classes
        self.knows_classes = net.num_classes == self.num_classes

    def teacher(self) -> nn.Module:
        """A frozen copy, whose logits do not depend on the order of its units.

        Raises:
            ValueError: If its head has other classes.
        """
        if not self.knows_classes:
            raise ValueError(
                f'--kd-model {BASE}: the base has {self.net.num_classes} classes and the data '
                f'{self.num_classes}; leave it out, or train the base on this data first and give its weights with '
                '--pretrained-path')
        return copy.deepcopy(self.net).eval().requires_grad_(False)

    def replace_head(self) -> nn.Module:
        """The supernet with a head for the classes to train."""
        if report_head('the base', self.net.num_classes, self.num_classes):
            self.net.reset_classifier(self.num_classes)
        return self.net


def open_base(
        name: str,
        model_args: dict[str, Any],
        *,
        num_classes: int | None = None,
        file: str | None = None,
        device: torch.device | None = None,
) -> Base:
    """Make a network of timm elastic.

    Args:
        name: Its name in timm.
        model_args: Its arguments, without the number of classes, and those of `elastic_supernet`.
        num_classes: Number of classes to train; `None` keeps those of the weights.
        file: Its weights (default: the published ones).
        device: Device of the network.

    Raises:
        ValueError: If it is not elastic, or its weights cannot be loaded or do not fit.
    """
    if 'num_classes' in model_args:
        raise ValueError(f'--model-kwargs num_classes={model_args["num_classes"]}: give --num-classes')
    if file:
        classes = classes_of_weights(file, name)
        model_args = dict(
            model_args, num_classes=classes,
            pretrained_cfg_overlay=dict(file=file, source='', num_classes=classes))
    try:
        net = elastic(name, pretrained=True, **model_args)
    except Exception as error:  # unknown names and arguments, weights of another network, no connection, ...
        hint = '; --pretrained-path FILE takes weights from a file' if isinstance(error, NoWeights) else ''
        raise ValueError(f'cannot make {name} elastic: {one_line(error, 500)}{hint}') from error
    return Base(net.to(device), num_classes)


def classes_of_weights(file: str, base: str) -> int:
    """Number of classes of the head in a file of weights; 0 without a head.

    Raises:
        ValueError: If it holds no weights.
    """
    try:
        weights = load_state_dict(file)
    except Exception as error:  # a file may hold anything
        raise ValueError(f'{file} holds no weights ({type(error).__name__}: {one_line(error, 200)})') from error
    if ':' in base:  # a repository or a folder says itself which network it is
        cfg = create_on_meta(base).pretrained_cfg
    else:
        cfg = timm.get_pretrained_cfg(base).to_dict() if timm.is_model(base) else {}
    return len(weights.get(f'{cfg.get("classifier") or "head"}.bias', ()))


def sort_units(
        args: argparse.Namespace, base: Base, data: Data, device: torch.device, ranks: Ranks) -> None:
    """Put the most important units of a base first, scored as --elastic-sort says.

    Training images are not augmented. Where the head has other classes than the data, its predictions are the labels.
    """
    if args.elastic_sort == 'none':
        return
    loader: Iterable[Any] | None = None
    if args.elastic_sort == 'taylor':
        config = resolve_input_data_config(base.net, vars(args))
        loader = create_calibration_loader(args, data, config, device)
        loader = loader if base.knows_classes else images_of(loader)
    _logger.info(f'sorting the units of {args.elastic} by their importance for training images')
    sort_by_importance(base.net, loader, progress=ranks.primary)
    # machines may round differently and disagree about the order: that of the first process counts
    base.net.unbound_space = space_from_dict(ranks.gather(base.net.unbound_space.to_dict())[0])
    weights = [weight for weight in base.net.state_dict().values() if weight.is_floating_point()]
    if not ranks.primary:
        torch._foreach_zero_(weights)
    ranks.sum_(weights)


def images_of(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    for images, _ in batches:
        yield images


def elastic_network(
        args: argparse.Namespace,
        model_args: dict[str, Any],
        data: Data,
        device: torch.device,
        ranks: Ranks,
) -> tuple[nn.Module, nn.Module | None, bool]:
    """The supernet of --elastic at the start of its training.

    Returns:
        The network, the teacher of --kd-model base, and whether its head has been trained for these classes.

    Raises:
        ValueError: As `open_base` and `Base.teacher` do.
    """
    classes = model_args.pop('num_classes', None)
    model_args = model_args | args.model_kwargs
    if args.resume:  # the order of the layers is a part of it
        model_args['space'] = read_checkpoint(args.resume)['task_state']['network']['model_args'].get('space')
        if args.kd_model != BASE:  # and so are the weights
            return elastic(args.elastic, num_classes=classes, **model_args).to(device), None, False
    base = open_base(
        args.elastic, model_args, num_classes=classes, file=args.pretrained_path or args.initial_checkpoint,
        device=device)
    teacher = base.teacher() if args.kd_model == BASE else None
    if not args.resume:
        sort_units(args, base, data, device, ranks)
    return base.replace_head(), teacher, base.knows_classes
