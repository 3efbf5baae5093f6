"""Train one elastic detector (torchvision's FCOS), and take the ones for three budgets out of it.

    pip install -e '.[tasks]'
    python examples/detection.py                          # letters on textured ground, without a download
    python examples/detection.py --data-dir /data/coco --size 256 --model elastic:mobilenetv3_large_100

FOLDER/train and FOLDER/validation have images/ and annotations.json, in COCO's format.
"""
from pathlib import Path

import torch
from dense_prediction import color, create_backbone, parse_args, take_networks, to_pixels, train
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork, nms
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, save_image

import timm_shiftnas as tsn
from timm_shiftnas.data.dense import BoxImages, pad_boxes, split_boxes
from timm_shiftnas.data.scenes import write_scenes
from timm_shiftnas.layers import SimpleFeaturePyramid, make_inputs_elastic

BOXES = 32  # most boxes of an image
PIXELS = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]


class Pyramid(nn.Module):
    """A backbone and the maps that FCOS reads: an FPN of a CNN, a simple feature pyramid of a ViT."""

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.out_channels, channels = backbone, width, backbone.feature_info.channels()
        if len(channels) == 1:
            self.neck = SimpleFeaturePyramid(channels[0], width, scales=(2, 1))
        else:
            self.neck = FeaturePyramidNetwork(channels, width)
            make_inputs_elastic(*(block[0] for block in self.neck.inner_blocks))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        maps = self.body(images)
        return self.neck(maps) if len(maps) == 1 else list(self.neck(dict(enumerate(maps))).values())


class Detector(FCOS):
    """torchvision's FCOS in two steps: `detector(images)`, and the loss or the boxes of its output."""

    def __init__(self, backbone: nn.Module, classes: int, size: int, width: int = 32) -> None:
        pyramid, info = Pyramid(backbone, width), backbone.feature_info.reduction()
        strides = info if len(info) > 1 else [info[0] // 2, info[0]]
        anchors = AnchorGenerator([(stride,) for stride in strides], [(1.,)] * len(strides))
        super().__init__(
            pyramid, classes, anchor_generator=anchors, head=FCOSHead(width, 1, classes, num_convs=1), score_thresh=.05,
            nms_thresh=.5)
        self.size = size

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """`cls_logits`, `bbox_regression`, `bbox_ctrness`: [B, places of all maps, ...]."""
        return self.head(self.backbone(images))

    def places(self) -> tuple[torch.Tensor, list[int]]:
        """The anchors [places of all maps, 4], and the number of places of every map."""
        image, strides = torch.zeros(1, 3, self.size, self.size), [each[0] for each in self.anchor_generator.sizes]
        maps = [image[:, :, ::stride, ::stride] for stride in strides]
        anchors, = self.anchor_generator(ImageList(image, [(self.size, self.size)]), maps)
        return anchors, [each.shape[2] * each.shape[3] for each in maps]

    def loss(self, output: dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        anchors, counts = self.places()
        return sum(self.compute_loss(split_boxes(targets), output, [anchors] * len(targets), counts).values())

    def boxes(self, output: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """`boxes`, `scores` and `labels` of every image."""
        anchors, counts = self.places()
        count = len(output['cls_logits'])
        levels = {name: list(each.split(counts, dim=1)) for name, each in output.items()}
        return self.postprocess_detections(levels, [list(anchors.split(counts))] * count, [(self.size,) * 2] * count)


def create_loaders(folder: Path, size: int, batch_size: int = 32) -> tuple[DataLoader, DataLoader]:
    """Batches of images [B, 3, size, size] and padded boxes [B, BOXES, 5]."""
    def dataset(split: str, *steps: nn.Module) -> BoxImages:
        joint = v2.Compose([*steps, v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=4), *PIXELS])

        def transform(image: torch.Tensor, target: dict) -> tuple[torch.Tensor, torch.Tensor]:
            image, target = joint(image, target)
            return image.as_subclass(torch.Tensor), pad_boxes(target, BOXES)

        return BoxImages(folder / split / 'images', folder / split / 'annotations.json', transform)

    train = dataset('train', v2.RandomResizedCrop((size, size), scale=(.5, 1)), v2.ColorJitter(.2, .2, .2))
    return (DataLoader(train, batch_size, shuffle=True, drop_last=True),
            DataLoader(dataset('validation', v2.Resize((size, size))), batch_size))


@torch.no_grad()
def mean_precision(net: nn.Module, detector: Detector, loader: DataLoader) -> float:
    """COCO's mean average precision over IoU 0.5 to 0.95, in percent."""
    metric = MeanAveragePrecision()
    for images, targets in loader:
        metric.update(detector.boxes(net(images)), split_boxes(targets))
    return 100 * metric.compute()['map'].item()


@torch.no_grad()
def draw(path: Path, nets: list[nn.Module], detector: Detector, loader: DataLoader, names: list[str], count: int = 6,
         least: float = .35) -> None:
    """A picture with a row for each image: its true boxes, and those of each network, whose scores are above `least`.

    Of boxes that overlap, the one of the highest score is drawn, whatever its class.
    """
    images, targets = (each[:count] for each in next(iter(loader)))
    columns, tiles = [split_boxes(targets), *(detector.boxes(net(images)) for net in nets)], []
    for i, image in enumerate(to_pixels(images, 192)[1]):
        for column in columns:
            boxes, labels = column[i]['boxes'], column[i]['labels']
            if 'scores' in column[i]:
                kept = nms(boxes, column[i]['scores'], iou_threshold=.3)
                kept = kept[column[i]['scores'][kept] > least]
                boxes, labels = boxes[kept], labels[kept]
            drawn = boxes * 192 / detector.size, [names[label] for label in labels], [*map(color, labels)]
            tiles.append(draw_bounding_boxes(image, *drawn, width=2) if len(labels) else image)
    save_image(torch.stack(tiles) / 255, path, nrow=len(columns))


def main() -> None:
    args = parse_args(__doc__, output='output/detection')
    torch.manual_seed(0)
    folder = args.data_dir or write_scenes(args.output / 'scenes', args.images, pixels=args.size)
    loader, validation = create_loaders(folder, args.size)
    names = loader.dataset.classes

    def build(backbone: nn.Module) -> Detector:
        return Detector(backbone, len(names), args.size)

    # 1. Train: one set of weights for all budgets.
    model = tsn.ElasticModel(build(create_backbone(args.model, args.size)))
    detector = model.network
    generator = train(model, detector.loss, loader, args.epochs, generator_fit_steps=args.fit_steps)

    # 2. Take networks out of it. No search, no retraining.
    nets, budget = take_networks(
        model, generator, loader, 'mAP', lambda net: mean_precision(net, detector, validation), 'object-detection',
        args.output)
    draw(args.output / 'boxes.png', nets, detector, validation, names)

    # 3. Load the saved one for a budget: its weights, and the code that builds it.
    net = tsn.from_pretrained(args.output / 'model', flops=budget, network=build)
    print(f'loaded: {mean_precision(net, net, validation):.2f}')


if __name__ == '__main__':
    main()
