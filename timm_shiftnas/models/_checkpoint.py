"""Helpers of the models for reading checkpoints."""
from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ['OtherClasses', 'check_fits', 'weights_of']


class OtherClasses(ValueError):
    """A checkpoint has another number of classes than the network.

    Attributes:
        classes: Number of classes of the checkpoint.
    """

    def __init__(self, message: str, classes: int) -> None:
        super().__init__(message)
        self.classes = classes


def weights_of(checkpoint: Mapping) -> dict[str, Tensor]:
    """The weights in a training checkpoint, without the prefix of `DataParallel`."""
    for key in ('state_dict', 'model'):
        checkpoint = checkpoint.get(key, checkpoint)
    return {name.removeprefix('module.'): weight for name, weight in checkpoint.items()}


def check_fits(state_dict: Mapping[str, Tensor], model: nn.Module, *, first_conv: str, classifier: str) -> None:
    """Raise an error of one line for the weights of another network.

    Classes and input channels may differ: timm adapts them afterwards.

    Args:
        state_dict: Weights with the names of `model`.
        model: The network that is to load them.
        first_conv, classifier: Names of these modules.

    Raises:
        OtherClasses: If only the number of classes differs.
        ValueError: If the weights do not fit.
    """
    own = model.state_dict()
    hint = "create the model with the checkpoint's own space= (or arch=) and options"
    for name in sorted(own.keys() ^ state_dict.keys()):
        if not name.startswith(f'{classifier}.'):
            has = 'lacks' if name in own else 'also has'
            raise ValueError(f'the checkpoint is of another network: it {has} {name}; {hint}')
    for name in own.keys() & state_dict.keys():
        there, here = tuple(state_dict[name].shape), tuple(own[name].shape)
        compared = slice(None)
        if name == f'{first_conv}.weight':
            compared = slice(1)
        elif name.startswith(f'{classifier}.'):
            compared = slice(1, None)
        if there[compared] != here[compared]:
            raise ValueError(f'the checkpoint is of another network: {name} is {there} there and {here} here; {hint}')
    bias = state_dict.get(f'{classifier}.bias')
    classes = model.num_classes if bias is None else bias.shape[0]
    if classes != model.num_classes and getattr(model, 'pretrained_cfg', {}).get('num_classes') == model.num_classes:
        raise OtherClasses(
            f'the checkpoint has {classes} classes, not {model.num_classes}; type '
            f'pretrained_cfg_overlay=dict(num_classes={classes}), and its head is left out', classes)
