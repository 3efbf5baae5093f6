"""What the models share in reading checkpoints."""
from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def check_fits(state_dict: Mapping[str, Tensor], model: nn.Module, first_conv: str, classifier: str) -> None:
    """Refuse the weights of another network in one line (timm adapts other classes and input channels after this).

    Args:
        state_dict: Weights under the names of `model`.
        model: Where they are to go.
        first_conv, classifier: Names of these modules.

    Raises:
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
        if name == f'{first_conv}.weight':
            same = there[0] == here[0]
        elif name.startswith(f'{classifier}.'):
            same = there[1:] == here[1:]
        else:
            same = there == here
        if not same:
            raise ValueError(f'the checkpoint is of another network: {name} is {there} there and {here} here; {hint}')
    bias = state_dict.get(f'{classifier}.bias')
    classes = model.num_classes if bias is None else bias.shape[0]
    if classes != model.num_classes and getattr(model, 'pretrained_cfg', {}).get('num_classes') == model.num_classes:
        raise ValueError(
            f'the checkpoint has {classes} classes; say so, as in pretrained_cfg_overlay=dict(num_classes={classes}), '
            f'and its head is left out')
