"""`timm-shiftnas elastic`: an elastic network from a trained network of timm."""
from __future__ import annotations

import argparse

from timm.data import resolve_data_config

from ..hub.save import save_pretrained
from ..method import ArchitectureGenerator
from ..models import sort_by_importance
from ..training.elastic import images_of, open_base
from ..training.timm_flags import literal
from ..utils.units import format_count
from .images import Expected, training_batches
from .shared import warn
from .subnets import check_output

__all__ = ['run_elastic']


def run_elastic(args: argparse.Namespace) -> None:
    """Save a network of timm as a supernet; with images, its units are sorted by importance."""
    check_output(args.output, None, args.overwrite)
    model_args = dict(img_size=args.img_size, in_chans=args.in_chans) | {
        name: literal(value) for name, value in args.model_kwargs}
    base = open_base(
        args.base, {name: value for name, value in model_args.items() if value is not None},
        num_classes=args.num_classes, file=args.pretrained_path)
    expected = Expected(base.net.subnet_cfg(base.net.space.largest))
    # the predictions of the base stand for the labels: a folder of images may have others, or none
    if args.dataset or args.data_dir:
        sort_by_importance(base.net, images_of(training_batches(expected, args)))
    else:
        warn('without images (--data-dir, --dataset) the units of the base keep their order')
    net = base.replace_head()
    generator = ArchitectureGenerator(net.space)
    generator.fit(args.generator_fit_steps)
    save_pretrained(args.output, net, generator, data_config=resolve_data_config(pretrained_cfg=expected.config))
    low, high = (format_count(net.macs(arch)) for arch in (net.space.smallest, net.space.largest))
    print(f'{args.output}: {net.space.size:,} subnets of {low} to {high} MACs; train them with '
          f'--model local-dir:{args.output}')
