"""`timm-shiftnas search`: the best archs of a saved supernet."""
from __future__ import annotations

import argparse
from contextlib import suppress

from torch.utils.data import Dataset

from ..data.image_reader import standard_split
from ..data.views import default_share, split_held_out
from ..evaluation.plots import plot_front
from ..evaluation.search import COSTS, search
from ..evaluation.tables import format_table, write_budgets_csv
from ..hub.load import SavedModel
from ..hub.save import save_searched
from ..method import BudgetGroups
from ..models.calibration import has_batch_norm
from ..utils.files import FolderLock
from ..utils.run_files import FRONT, SEARCH
from .evaluate import refuse_backbone
from .images import Expected, batches, first_images, labelled_images, open_images
from .shared import autocast_of, open_device, warn

__all__ = ['run_search']


def run_search(args: argparse.Namespace) -> None:
    """Search for the best archs of a supernet, and store them in its directory."""
    saved, device = SavedModel(args.directory), open_device(args.device)
    if saved.kind != 'supernet':
        raise ValueError(f'{saved} holds a subnet; search needs a supernet')
    refuse_backbone(saved)
    saved.check()  # what could not be stored in the end is refused now
    net = saved.network().to(device).eval()
    generator, edges = saved.generator(net.space), saved.record.groups
    images, train_images, which = search_images(saved, net.num_classes, args)
    expected = Expected.by(saved)
    output = args.output or args.directory / SEARCH
    output.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(output)
    try:
        print(f'searching on {which}')
        found = search(
            net, batches(expected, images, args), generator=generator, strategy=args.strategy, flops=args.flops,
            params=args.params, cost=args.cost, evaluations=args.evaluations, population=args.population,
            groups=BudgetGroups(tuple(edges), generator.resource) if generator and edges else None,
            train_loader=batches(expected, train_images, args) if has_batch_norm(net) else None,
            bn_images=args.bn_images, seed=args.seed, autocast=autocast_of(args, device),
            file=output / 'evaluations.jsonl')
        write_budgets_csv(output / FRONT, found.front)
        plot_front(output / 'front.png', found.front, found.rows, COSTS[args.cost])
        save_searched(saved, found.archs, found.bn_stats, found.limits)
    finally:
        lock.release()
        lock.path.unlink(missing_ok=True)
        with suppress(OSError):
            output.rmdir()  # nothing was measured
    if len(found.rows) < args.evaluations:
        where = ' within its limits' if args.flops or args.params else ''
        warn(f'only {len(found.rows)} of {args.evaluations} archs were measured: the search has found no others{where}')
    print(format_table(found.front))
    print(f'{len(found.rows)} archs measured; the {len(found.front)} of the front are stored in {saved}, the table in '
          f'{output / "front.csv"}')


def search_images(saved: SavedModel, num_classes: int, args: argparse.Namespace) -> tuple[Dataset, Dataset, str]:
    """The images that archs are compared on, training images for BatchNorm, and a description of the former.

    Without --split, they are the part of the training images that the run has held out, or else the default part.

    Raises:
        ValueError: If there is no training split, or as for `labelled_images` and `split_held_out`.
    """
    train_split = args.train_split or ('train' if args.dataset else standard_split(args.data_dir))
    if args.split is not None:
        images, part = labelled_images(saved, num_classes, args, args.split)
        train_images = open_images(Expected.by(saved), args, train_split, min_classes=0)
        return images, first_images(train_images, args.bn_images), f'{len(images)} images{part} of {args.split!r}'
    if train_split in ('validation', 'test') and not args.train_split:
        raise ValueError(
            f'{args.data_dir} has no training images to hold some out of; give --split NAME, of images '
            'that no accuracy is reported on')
    images, part = labelled_images(saved, num_classes, args, train_split)
    known = saved.record.training.get('held_out')
    share, seed = (known['share'], known['seed']) if known else (default_share(images), 0)
    if args.held_out is not None:
        share = args.held_out
    train_images, held_out = split_held_out(images, share, seed)
    same = known and known.get('images', len(images)) == len(images)  # else the same seed holds out other images
    if not same or len(held_out) > round(known['share'] * len(images)):
        warn('the supernet was trained on images that archs are compared on, which favours large ones; give --split '
             'NAME of images that were not trained on and are not the test images')
    return (held_out, first_images(train_images, args.bn_images),
            f'{len(held_out)} images{part}, held out of {train_split or "all"!r} ({share:.1%}, seed {seed})')
