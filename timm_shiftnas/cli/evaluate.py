"""`timm-shiftnas evaluate`: the accuracy of a saved network."""
from __future__ import annotations

import argparse

from ..evaluation.accuracy import evaluate
from ..hub.load import SavedModel
from ..models.calibration import ResizedInput, has_batch_norm
from .images import Expected, batches, labelled_images
from .shared import autocast_of, open_device
from .subnets import load_subnet

__all__ = ['refuse_backbone', 'run_evaluate']


def run_evaluate(args: argparse.Namespace) -> None:
    """Print the accuracy of a subnet on a folder of images, or on another dataset."""
    saved, device = SavedModel(args.directory), open_device(args.device)
    refuse_backbone(saved)
    net = load_subnet(saved, args, device)
    images, part = labelled_images(saved, net.num_classes, args, args.split)
    if has_batch_norm(net):
        net = ResizedInput(net)
    top1, top5 = evaluate(net, batches(Expected.by(saved), images, args), device, autocast_of(args, device))
    print(f'{len(images)} images{part}: top-1 {top1:.2f}%, top-5 {top5:.2f}%')


def refuse_backbone(saved: SavedModel) -> None:
    """Raise a `ValueError` if a saved model is a backbone, or a network around one: these have no top-1 accuracy."""
    if saved.record.backbone is not None:
        raise ValueError(
            f'{saved} holds a backbone, or a network around one, and not an image classifier: load it in Python, with '
            'timm_shiftnas.from_pretrained, and measure what it is for')
