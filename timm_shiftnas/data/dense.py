"""Folders of images with masks or boxes, for segmentation and detection.

Images and targets are `tv_tensors` of torchvision, so that its transforms (`torchvision.transforms.v2`) move both.
"""
from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import pil_to_tensor

__all__ = ['BoxImages', 'MaskImages', 'pad_boxes', 'split_boxes']

Transform = Callable[..., Any]


class MaskImages(Dataset):
    """Images and the classes of their pixels: FOLDER/images/NAME.* and FOLDER/masks/NAME.png.

    An item is (image [3, H, W], uint8; classes [H, W], int64).

    Args:
        folder: The folder.
        transform: A joint transform of torchvision: `transform(image, mask)`.

    Raises:
        ValueError: If there are no images, or one has no mask.
    """

    def __init__(self, folder: str | os.PathLike, transform: Transform | None = None) -> None:
        self.folder, self.transform = Path(folder), transform
        self.images = sorted(path for path in self.folder.glob('images/*') if not path.name.startswith('.'))
        masks = {path.stem for path in self.folder.glob('masks/*.png')}
        missing = [path.name for path in self.images if path.stem not in masks]
        if not self.images or missing:
            what = f'images/{missing[0]} has no masks/*.png of its name' if missing else 'has no images'
            raise ValueError(f'{self.folder} {what}; it needs images/NAME.jpg and masks/NAME.png')

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = self.images[index]
        image = _read(path)
        with Image.open(self.folder / 'masks' / f'{path.stem}.png') as file:
            mask = tv_tensors.Mask(pil_to_tensor(file))  # for a palette, the indices
        if self.transform is not None:
            image, mask = self.transform(image, mask)
        return image, mask[0].long()


class BoxImages(Dataset):
    """Images and boxes in COCO's format, read with pycocotools.

    An item is (image [3, H, W], uint8; dict of `boxes` [N, 4] as x1, y1, x2, y2 and `labels` [N], from 0). Crowds and
    empty boxes are left out.

    Args:
        folder: Folder of the images.
        annotations: The JSON file.
        transform: A joint transform of torchvision: `transform(image, target)`.

    Attributes:
        classes: Names of the classes, in the order of the categories' ids.

    Raises:
        ImportError: If pycocotools is not installed.
    """

    def __init__(self, folder: str | os.PathLike, annotations: str | os.PathLike,
                 transform: Transform | None = None) -> None:
        try:
            from pycocotools.coco import COCO
        except ImportError as error:
            raise ImportError("detection needs pycocotools: run pip install 'timm_shiftnas[tasks]'") from error
        self.folder, self.transform = Path(folder), transform
        self.coco = COCO()
        self.coco.dataset = json.loads(Path(annotations).read_text(encoding='utf-8'))
        with redirect_stdout(None):
            self.coco.createIndex()
        self.ids = sorted(self.coco.imgs)
        self.categories = sorted(self.coco.cats)
        self.classes = [self.coco.cats[each]['name'] for each in self.categories]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        about = self.coco.imgs[self.ids[index]]
        image = _read(self.folder / about['file_name'])
        found = [each for each in self.coco.imgToAnns[self.ids[index]]
                 if not each.get('iscrowd') and min(each['bbox'][2:]) > 0]
        boxes = torch.tensor([each['bbox'] for each in found], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target = dict(
            boxes=tv_tensors.BoundingBoxes(boxes, format='XYXY', canvas_size=image.shape[-2:]),
            labels=torch.tensor([self.categories.index(each['category_id']) for each in found], dtype=torch.long))
        return (image, target) if self.transform is None else self.transform(image, target)


def _read(path: Path) -> Tensor:
    with Image.open(path) as file:
        return tv_tensors.Image(pil_to_tensor(file.convert('RGB')))


def pad_boxes(target: dict[str, Tensor], count: int) -> Tensor:
    """The boxes of an image as one tensor [count, 5] of x1, y1, x2, y2, label; the rows without a box have label -1.

    The targets of a batch are then a tensor [B, count, 5], which tasks and processes can split. If there are more
    boxes, the largest ones are kept.
    """
    boxes, labels = target['boxes'].as_subclass(Tensor), target['labels']
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    rows = torch.cat([boxes, labels[:, None].to(boxes)], dim=1)[area.argsort(descending=True)[:count]]
    return torch.cat([rows, rows.new_tensor([0, 0, 0, 0, -1]).expand(count - len(rows), 5)])


def split_boxes(targets: Tensor) -> list[dict[str, Tensor]]:
    """Inverse of `pad_boxes` for a batch [B, count, 5], as torchvision's detectors take it."""
    rows = [each[each[:, 4] >= 0] for each in targets]
    return [dict(boxes=each[:, :4], labels=each[:, 4].long()) for each in rows]
