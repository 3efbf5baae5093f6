"""Train one elastic segmenter, and take the ones for three budgets out of it.

    pip install -e '.[tasks]'
    python examples/segmentation.py                       # letters on textured ground, without a download
    python examples/segmentation.py --data-dir /data/pets --size 128 --model elastic:mobilenetv3_large_100

FOLDER/train and FOLDER/validation have images/NAME.jpg and masks/NAME.png; a mask holds the class of every pixel, and
255 where there is none.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from dense_prediction import color, create_backbone, parse_args, take_networks, to_pixels, train
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.utils import draw_segmentation_masks, save_image

import timm_shiftnas as tsn
from timm_shiftnas.data.dense import MaskImages
from timm_shiftnas.data.scenes import write_scenes
from timm_shiftnas.layers import FeatureSum, SimpleFeaturePyramid

VOID = 255
PIXELS = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]


class Segmenter(nn.Module):
    """A CNN with the sum of its feature maps, or a ViT with that of a pyramid; then two convolutions."""

    def __init__(self, backbone: nn.Module, classes: int, width: int = 32) -> None:
        super().__init__()
        self.backbone, channels = backbone, backbone.feature_info.channels()
        self.neck = FeatureSum(channels, width) if len(channels) > 1 else nn.Sequential(
            SimpleFeaturePyramid(channels[0], width), FeatureSum([width] * 4, width))
        self.head = nn.Sequential(
            nn.GroupNorm(8, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU(),
            nn.Conv2d(width, classes, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.neck(self.backbone(images)))
        return F.interpolate(logits, size=images.shape[-2:], mode='bilinear', align_corners=False)


def loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, masks, ignore_index=VOID)


def create_loaders(folder: Path, size: int, batch_size: int = 32) -> tuple[DataLoader, DataLoader]:
    """Batches of images [B, 3, size, size] and masks [B, size, size]."""
    augment = v2.Compose([v2.RandomResizedCrop((size, size), scale=(.5, 1)), v2.ColorJitter(.2, .2, .2), *PIXELS])
    resize = v2.Compose([v2.Resize((size, size)), *PIXELS])
    return (DataLoader(MaskImages(folder / 'train', augment), batch_size, shuffle=True, drop_last=True),
            DataLoader(MaskImages(folder / 'validation', resize), batch_size))


@torch.no_grad()
def mean_iou(net: nn.Module, loader: DataLoader, classes: int) -> float:
    """Mean over the classes of intersection over union, in percent, of all validation pixels."""
    metric = MulticlassJaccardIndex(classes, ignore_index=VOID)
    for images, masks in loader:
        metric.update(net(images).argmax(1), masks)
    return 100 * metric.compute().item()


@torch.no_grad()
def draw(path: Path, nets: list[nn.Module], loader: DataLoader, classes: int, count: int = 6) -> None:
    """A picture with a row for each image: the image, its true mask, and that of each network."""
    images, masks = (each[:count] for each in next(iter(loader)))
    pixels, grey = to_pixels(images, 128)
    labels, tiles = range(1, classes), [pixels]
    for column in (masks, *(net(images).argmax(1) for net in nets)):
        each = v2.functional.resize(tv_tensors.Mask(column), [128])
        tiles.append(torch.stack([
            draw_segmentation_masks(image, torch.stack([mask == label for label in labels]), .8, [*map(color, labels)])
            for image, mask in zip(grey, each, strict=True)]))
    save_image(torch.stack(tiles, dim=1).flatten(0, 1) / 255, path, nrow=len(tiles))


def main() -> None:
    args = parse_args(__doc__, output='output/segmentation')
    torch.manual_seed(0)
    folder = args.data_dir or write_scenes(args.output / 'scenes', args.images, pixels=args.size)
    loader, validation = create_loaders(folder, args.size)
    classes = 1 + max(int(masks[masks != VOID].max()) for _, masks in loader)

    # 1. Train: one set of weights for all budgets.
    model = tsn.ElasticModel(Segmenter(create_backbone(args.model, args.size), classes))
    generator = train(model, loss, loader, args.epochs, generator_fit_steps=args.fit_steps)

    # 2. Take networks out of it. No search, no retraining.
    nets, budget = take_networks(
        model, generator, loader, 'mean IoU', lambda net: mean_iou(net, validation, classes), 'image-segmentation',
        args.output)
    draw(args.output / 'masks.png', nets, validation, classes)

    # 3. Load the saved one for a budget: its weights, and the code that builds it.
    net = tsn.from_pretrained(
        args.output / 'model', flops=budget, network=lambda backbone: Segmenter(backbone, classes))
    print(f'loaded: {mean_iou(net, validation, classes):.2f}')


if __name__ == '__main__':
    main()
