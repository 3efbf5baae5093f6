"""BatchNorm statistics of subnets: the shared running ones of a supernet are those of no network in particular.

An extracted subnet gets its own from some training images (BigNAS, Yu et al., ECCV 2020; Once-for-all, Cai et al.,
ICLR 2020; AttentiveNAS, Wang et al., CVPR 2021): no labels, no gradients, seconds.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers.conv import resize
from ..space import is_supernet
from ..space.core import Arch
from ..utils.distributed import Ranks
from .subnet import extract

__all__ = ['BatchNormCalibration', 'ResizedInput', 'bn_statistics', 'calibrate_bn', 'has_batch_norm']

RECIPES = ('attentivenas', 'ofa')


def has_batch_norm(net: nn.Module) -> bool:
    """Whether the subnets of a supernet need statistics of their own."""
    return any(isinstance(module, _BatchNorm) for module in net.modules())


def bn_statistics(net: nn.Module) -> dict[str, Tensor]:
    """Running statistics of all BatchNorms, under their names in the state_dict."""
    return {
        f'{prefix}.{name}': buffer for prefix, module in net.named_modules() if isinstance(module, _BatchNorm)
        for name, buffer in module.named_buffers(recurse=False)}


@torch.no_grad()
def calibrate_bn(
        subnet: nn.Module,
        loader: Iterable[Any],
        num_images: int = 2000,
        *,
        recipe: str | None = None,
        progress: bool = True,
) -> nn.Module:
    """Replace the BatchNorm statistics of an extracted subnet by those of some images.

    Every batch is normalised by its own statistics; the running ones become their mean over batches. Whole batches are
    taken, until there are enough images. Statistics change at the end, all at once.

    Args:
        subnet: A network of `extract` or `from_pretrained`, changed in place. Without BatchNorm, nothing happens.
        loader: Batches of images [B, C, H, W], or tuples that start with them, as the network expects them but for
            their size: they are resized to its own. Training images, without mixup.
        num_images: How many to see at least, if the loader has them.
        recipe: 'ofa': batches count by their images, with the biased variance (Once-for-all: 2,000 images);
            'attentivenas': batches count alike, with the unbiased variance (64 batches). Default: that of the space.
        progress: Show a bar where the standard error stream is a terminal.

    Returns:
        The subnet, in the mode it was in.

    Raises:
        ValueError: If `subnet` is a supernet, the loader is empty, or an argument is out of range.
    """
    net = unwrap_model(subnet)
    if is_supernet(net):
        raise ValueError('calibrate_bn takes an extracted subnet, not a supernet: extract(net, arch) makes one')
    if recipe is None:
        fixed = getattr(net, 'model_args', {}).get('structure', {})
        recipe = 'ofa' if fixed.get('kernel') == 'transform' else 'attentivenas'
    if recipe not in RECIPES:
        raise ValueError(f'recipe={recipe!r} is unknown; choose one of {RECIPES}')
    if not isinstance(num_images, int) or num_images < 1:
        raise ValueError(f'num_images={num_images!r} must be a whole number of at least 1')
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return subnet
    weight = next(net.parameters())
    if weight.is_meta:
        raise ValueError('the network has no weights (it is on the meta device); load them before calibrating')
    before = {name: buffer.clone() for name, buffer in bn_statistics(net).items()}
    sums = [[0., 0.] for _ in norms]
    counts: dict[nn.Module, int] = {}  # values per channel in a batch
    size = getattr(getattr(net, 'arch', None), 'resolution', None)
    total = seen = 0
    precision = torch.float64 if weight.dtype == torch.float64 else torch.float32

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        counts[module] = inputs[0].numel() // inputs[0].shape[1]

    modes = [(module, module.training) for module in net.modules()]
    momenta = [norm.momentum for norm in norms]
    handles = [norm.register_forward_pre_hook(count) for norm in norms]
    bar = tqdm(total=num_images, desc='calibrating BatchNorm', unit='image', disable=None if progress else True)
    try:
        net.eval()
        for norm in norms:
            norm.train()
            norm.momentum = 1.  # running statistics are those of the last batch
        for batch in loader:
            images = _images_of(batch)
            if seen and len(images) == 1:
                continue  # a last one alone says nothing of a variance
            images = images.to(device=weight.device, dtype=weight.dtype)
            net(images if size is None else resize(images, size))
            share = len(images) if recipe == 'ofa' else 1
            for part, norm in zip(sums, norms):
                biased = (counts[norm] - 1) / counts[norm] if recipe == 'ofa' else 1
                part[0] = part[0] + share * norm.running_mean.to(precision)
                part[1] = part[1] + share * biased * norm.running_var.to(precision)
            total, seen = total + share, seen + len(images)
            bar.update(len(images))
            if seen >= num_images:
                break
    finally:
        bar.close()
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        for name, buffer in bn_statistics(net).items():
            buffer.copy_(before[name])
    if not seen:
        raise ValueError('the loader gave no images to calibrate BatchNorm with; give training images')
    if not all(bool(torch.isfinite(part).all()) for parts in sums for part in parts):
        raise ValueError('statistics are not finite; are there NaNs in the images, or in the weights?')
    for norm, (mean, variance) in zip(norms, sums):
        norm.running_mean.copy_(mean / total)
        norm.running_var.copy_(variance / total)
        norm.num_batches_tracked.fill_(1)
    return subnet


def _images_of(batch: Any) -> Tensor:
    images = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        what = f'{images.dtype} of shape {list(images.shape)}' if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f'a batch must be normalised images, float [B, C, H, W], or start with them; got {what}')
    return images


class ResizedInput(nn.Module):
    """An extracted subnet that takes images of any size: they are resized to its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(resize(x, self.module.arch.resolution))


class BatchNormCalibration:
    """Makes the subnets of a supernet ready for evaluation, and keeps their statistics.

    Args:
        loader: Training images, as for `calibrate_bn`.
        num_images: How many each subnet sees.

    Attributes:
        statistics: By arch, those of the subnets made so far: of one state of the supernet's weights.
    """

    def __init__(self, loader: Iterable[Any], num_images: int = 2000) -> None:
        self.loader, self.num_images = loader, num_images
        self.statistics: dict[Arch, dict[str, Tensor]] = {}

    def prepare(self, net: nn.Module, archs: Sequence[Arch], ranks: Ranks = Ranks()) -> None:
        """Take the statistics of some archs, each in one of the processes, and give them to all."""
        mine = ranks.shard(list(dict.fromkeys(archs)))
        for arch in mine:
            self(net, arch)
        # over the CPU: what arrives elsewhere is on the device of its sender
        taken = {arch: {name: buffer.cpu() for name, buffer in self.statistics[arch].items()} for arch in mine}
        for part in ranks.gather(taken):
            self.statistics |= part

    def __call__(self, net: nn.Module, arch: Arch) -> nn.Module:
        """The extracted, calibrated subnet at an arch, for images of any size."""
        subnet = extract(net, arch)
        if arch in self.statistics:
            subnet.load_state_dict(self.statistics[arch], strict=False)
        else:
            calibrate_bn(subnet, self.loader, self.num_images, progress=False)
            self.statistics[arch] = {name: buffer.clone() for name, buffer in bn_statistics(subnet).items()}
        return ResizedInput(subnet)
