"""BatchNorm statistics of subnets, because the running ones of a supernet fit no subnet.

An extracted subnet computes its own from some training images (BigNAS, Yu et al., ECCV 2020; Once-for-all, Cai et al.,
ICLR 2020; AttentiveNAS, Wang et al., CVPR 2021): no labels, no gradients, seconds.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers.conv import resize
from ..space import family_of, is_supernet
from ..space.core import Arch
from ..utils.distributed import Ranks
from .subnet import extract

__all__ = [
    'BatchNormCalibration', 'ResizedInput', 'bn_statistics', 'calibrate_bn', 'has_batch_norm', 'parts', 'resized',
]

RECIPES = ('attentivenas', 'ofa')
AT_ONCE, MOST_BYTES = 16, 2 ** 30  # subnets for which images are read once


def has_batch_norm(net: nn.Module) -> bool:
    """Whether the subnets of a supernet need their own statistics."""
    return any(isinstance(module, _BatchNorm) for module in net.modules())


def bn_statistics(net: nn.Module) -> dict[str, Tensor]:
    """Running statistics of all BatchNorms, with their names in the state_dict."""
    return {
        f'{prefix}.{name}': buffer for prefix, module in net.named_modules() if isinstance(module, _BatchNorm)
        for name, buffer in module.named_buffers(recurse=False)}


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
    taken, until there are enough images. The subnet changes only at the end, and not at all if there is an error.

    Args:
        subnet: A network of `extract` or `from_pretrained`, changed in place. Without BatchNorm, nothing happens.
        loader: Batches of images [B, C, H, W], or tuples that start with them, preprocessed as the network expects.
            They are resized to its resolution. Training images, without mixup.
        num_images: The least number of images to use, if the loader has them.
        recipe: 'ofa': batches are weighted by their images, with the biased variance (Once-for-all: 2,000 images);
            'attentivenas': batches have equal weights, with the unbiased variance (64 batches). Default: that of the
            search space.
        progress: Show a bar if the standard error stream is a terminal.

    Returns:
        The subnet, in the mode it was in.

    Raises:
        ValueError: If `subnet` is a supernet, the loader is empty, or an argument is out of range.
    """
    net = unwrap_model(subnet)
    if is_supernet(net):
        raise ValueError('calibrate_bn takes an extracted subnet, not a supernet; extract one first')
    recipe = recipe or _recipe(net)
    if recipe not in RECIPES:
        raise ValueError(f'recipe={recipe!r} is unknown; choose one of {RECIPES}')
    _calibrate([net], loader, num_images, recipe, progress)
    return subnet


def _recipe(net: nn.Module) -> str:
    """The recipe of a subnet's search space."""
    space = getattr(net, 'static_space', None)
    return RECIPES[0] if space is None else family_of(space).bn_recipe(space)


@torch.no_grad()
def _calibrate(
        nets: Sequence[nn.Module], loader: Iterable[Any], num_images: int, recipe: str, progress: bool = False,
) -> None:
    """`calibrate_bn` for several subnets of one supernet: the images are read once for all of them."""
    if not isinstance(num_images, int) or num_images < 1:
        raise ValueError(f'num_images={num_images!r} must be a whole number of at least 1')
    if not any(map(has_batch_norm, nets)):
        return
    norms = [[module for module in net.modules() if isinstance(module, _BatchNorm)] for net in nets]
    means = [[_Statistics(norm, by_images=recipe == 'ofa') for norm in each] for each in norms]
    weight = next(nets[0].parameters())
    if weight.is_meta:
        raise ValueError('the network has no weights (it is on the meta device); load them before calibrating')
    seen = 0
    with ExitStack() as stack:
        for net, own in zip(nets, norms):
            stack.enter_context(_batch_statistics(net, own))
        bar = stack.enter_context(tqdm(
            total=num_images, desc='calibrating BatchNorm', unit='image', disable=None if progress else True))
        for images in map(_images_of, loader):
            if seen and len(images) == 1:
                continue  # a last image alone has no variance
            images = images.to(device=weight.device, dtype=weight.dtype)
            for net, own_means in zip(nets, means):
                _run(net, images, own_means)
            seen += len(images)
            bar.update(len(images))
            if seen >= num_images:
                break
    if not seen:
        raise ValueError('the loader gave no images to calibrate BatchNorm with; give training images')
    every = [mean for own_means in means for mean in own_means]
    if not all(mean.is_finite() for mean in every):
        raise ValueError('statistics are not finite; are there NaNs in the images, or in the weights?')
    for mean in every:
        mean.write()


class _Statistics:
    """Mean over batches of the statistics of one BatchNorm, whose buffers hold those of the last batch.

    Args:
        norm: The layer.
        by_images: Weight batches by their images, and take the biased variance.
    """

    def __init__(self, norm: _BatchNorm, by_images: bool) -> None:
        self.norm, self.by_images = norm, by_images
        self.mean: Any = 0.
        self.variance: Any = 0.
        self.weight = 0
        self.dtype = torch.float64 if norm.running_mean.dtype == torch.float64 else torch.float32

    def add(self, images: int, count: int) -> None:
        """Add a batch with `images` images and `count` values per channel."""
        share, biased = (images, (count - 1) / count) if self.by_images else (1, 1)
        self.mean = self.mean + share * self.norm.running_mean.to(self.dtype)
        self.variance = self.variance + share * biased * self.norm.running_var.to(self.dtype)
        self.weight += share

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.mean).all() and torch.isfinite(self.variance).all())

    def write(self) -> None:
        self.norm.running_mean.copy_(self.mean / self.weight)
        self.norm.running_var.copy_(self.variance / self.weight)
        self.norm.num_batches_tracked.fill_(1)


def _run(net: nn.Module, images: Tensor, means: Sequence[_Statistics]) -> None:
    """Add the statistics of one batch."""
    counts: dict[nn.Module, int] = {}  # values per channel

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        counts[module] = inputs[0].numel() // inputs[0].shape[1]

    handles = [mean.norm.register_forward_pre_hook(count) for mean in means]
    try:
        net(resized(net, images))
    finally:
        for handle in handles:
            handle.remove()
    for mean in means:
        mean.add(len(images), counts[mean.norm])


@contextmanager
def _batch_statistics(net: nn.Module, norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Let BatchNorms normalise by the batch and keep its statistics; afterwards everything is as before."""
    before = {name: buffer.clone() for name, buffer in bn_statistics(net).items()}
    modes = [(module, module.training) for module in net.modules()]
    momenta = [(norm, norm.momentum) for norm in norms]
    try:
        net.eval()
        for norm in norms:
            norm.train()
            norm.momentum = 1.
        yield
    finally:
        for module, training in modes:
            module.training = training
        for norm, momentum in momenta:
            norm.momentum = momentum
        for name, buffer in bn_statistics(net).items():
            buffer.copy_(before[name])


def _images_of(batch: Any) -> Tensor:
    images = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        what = f'{images.dtype} of shape {list(images.shape)}' if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f'a batch must be normalised images, float [B, C, H, W], or start with them; got {what}')
    return images


def resized(net: nn.Module, images: Tensor) -> Tensor:
    """Images at the resolution of a subnet, if its arch has one; a network around a backbone resizes them itself."""
    space = getattr(net, 'static_space', None)
    resolution = None if space is None or space.is_bound else family_of(space).resolution(net.arch)
    return images if resolution is None else resize(images, resolution)


class ResizedInput(nn.Module):
    """An extracted subnet that takes images of any size: they are resized to its resolution."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(resized(self.module, x))


class BatchNormCalibration:
    """Prepares the subnets of a supernet for evaluation, and keeps their statistics.

    Args:
        loader: Training images, as for `calibrate_bn`.
        num_images: Number of images that each subnet uses.

    Attributes:
        statistics: Those of the subnets prepared so far, by arch. They belong to one state of the supernet's weights.
    """

    def __init__(self, loader: Iterable[Any], num_images: int = 2000) -> None:
        self.loader, self.num_images = loader, num_images
        self.statistics: dict[Arch, dict[str, Tensor]] = {}

    def prepare(self, net: nn.Module, archs: Sequence[Arch], ranks: Ranks | None = None) -> None:
        """Compute the statistics of some archs, each in one of the processes, and share them with all."""
        ranks = ranks or Ranks()
        mine = ranks.shard(list(dict.fromkeys(archs)))
        for part in parts(net, [arch for arch in mine if arch not in self.statistics]):
            self.subnets(net, part)
        # on the CPU: tensors arrive on the device of their sender
        taken = {arch: {name: buffer.cpu() for name, buffer in self.statistics[arch].items()} for arch in mine}
        for of_process in ranks.gather(taken):
            self.statistics |= of_process

    def __call__(self, net: nn.Module, arch: Arch) -> nn.Module:
        """The extracted, calibrated subnet at an arch, for images of any size."""
        return self.subnets(net, [arch])[0]

    def subnets(self, net: nn.Module, archs: Sequence[Arch]) -> list[nn.Module]:
        """Calibrated subnets at several archs; images are read once for those that have no statistics yet."""
        subnets = {arch: extract(net, arch) for arch in archs}
        new = {arch: subnet for arch, subnet in subnets.items() if arch not in self.statistics}
        if new:
            _calibrate(list(new.values()), self.loader, self.num_images, _recipe(next(iter(new.values()))))
        for arch, subnet in subnets.items():
            if arch in new:
                self.statistics[arch] = {name: buffer.clone() for name, buffer in bn_statistics(subnet).items()}
            else:
                subnet.load_state_dict(self.statistics[arch], strict=False)
        return [ResizedInput(subnets[arch]) for arch in archs]


def parts(net: nn.Module, archs: Sequence[Arch]) -> Iterator[Sequence[Arch]]:
    """Archs in parts that are evaluated together: 16, or as many as fit into 1 GiB as extracted subnets."""
    size = sum(weight.nbytes for weight in net.parameters()) if has_batch_norm(net) else 0
    count = max(min(AT_ONCE, MOST_BYTES // max(size, 1)), 1)
    return (archs[start:start + count] for start in range(0, len(archs), count))
