"""Images with masks and boxes: the drawn set, the readers, and padded boxes."""
import json

import pytest
import torch
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from timm_shiftnas.data.dense import BoxImages, MaskImages, pad_boxes, split_boxes
from timm_shiftnas.data.scenes import write_scenes


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp('scenes'), 8, letters='AB', pixels=32, most=2)


def readers(folder, split='train', transform=None):
    return (MaskImages(folder / split, transform),
            BoxImages(folder / split / 'images', folder / split / 'annotations.json', transform))


@pytest.mark.parametrize('split, count', [('train', 8), ('validation', 2)])
def test_boxes_are_those_of_the_masks(folder, split, count):
    masks, boxes = readers(folder, split)
    assert len(masks) == len(boxes) == count and boxes.classes == ['A', 'B']
    for (image, mask), (same, target) in zip(masks, boxes, strict=True):
        assert torch.equal(image, same) and image.shape == (3, 32, 32) and mask.shape == (32, 32)
        labels = target['labels'].tolist()
        assert set(mask.unique().tolist()) >= {0} | {label + 1 for label in labels}
        for label, box in zip(labels, target['boxes'], strict=True):
            if labels.count(label) == 1 and len(labels) == 1:
                torch.testing.assert_close(masks_to_boxes((mask == label + 1)[None])[0] + torch.tensor([0, 0, 1, 1]),
                                           box.as_subclass(torch.Tensor))


def test_the_set_depends_on_its_arguments_alone(folder, tmp_path):
    write_scenes(tmp_path, 8, letters='AB', pixels=32, most=2)
    for path in sorted(folder.rglob('*.*')):
        assert path.read_bytes() == (tmp_path / path.relative_to(folder)).read_bytes()
    with pytest.raises(ValueError, match='seed'):
        write_scenes(tmp_path, 8, letters='AB', pixels=32, most=2, seed=1)


def test_transforms_move_images_and_targets(folder):
    flip = v2.RandomHorizontalFlip(1.)
    for plain, flipped in zip(readers(folder), readers(folder, transform=flip), strict=True):
        assert torch.equal(flipped[0][0], plain[0][0].flip(-1))
    assert torch.equal(MaskImages(folder / 'train', flip)[0][1], MaskImages(folder / 'train')[0][1].flip(-1))
    boxes, flipped = (each[0][1]['boxes'].as_subclass(torch.Tensor) for each in (
        readers(folder)[1], readers(folder, transform=flip)[1]))
    torch.testing.assert_close(flipped[:, [0, 2]], 32 - boxes[:, [2, 0]])


def test_coco_categories_of_any_ids_crowds_and_empty_boxes(folder, tmp_path):
    about = dict(images=[dict(id=7, file_name='00000.png')], categories=[dict(id=90, name='z'), dict(id=3, name='a')])
    boxes = [(90, [1, 2, 3, 4], 0), (3, [5, 5, 2, 2], 0), (3, [0, 0, 9, 9], 1), (3, [4, 4, 0, 2], 0)]
    about['annotations'] = [
        dict(id=i, image_id=7, category_id=label, bbox=box, iscrowd=crowd)
        for i, (label, box, crowd) in enumerate(boxes)]
    (tmp_path / 'a.json').write_text(json.dumps(about))
    data = BoxImages(folder / 'train' / 'images', tmp_path / 'a.json')
    assert data.classes == ['a', 'z']
    assert data[0][1]['boxes'].tolist() == [[1, 2, 4, 6], [5, 5, 7, 7]] and data[0][1]['labels'].tolist() == [1, 0]


def test_missing_masks_are_named(folder, tmp_path):
    (tmp_path / 'images').mkdir()
    (tmp_path / 'images' / 'a.jpg').touch()
    with pytest.raises(ValueError, match='a.jpg'):
        MaskImages(tmp_path)


def test_padded_boxes_are_split_again_and_the_largest_are_kept():
    target = dict(boxes=torch.tensor([[0., 0, 2, 2], [1, 1, 9, 9], [3, 3, 6, 6]]), labels=torch.tensor([4, 0, 2]))
    padded = pad_boxes(target, 5)
    assert padded.shape == (5, 5) and padded[3:, 4].tolist() == [-1, -1]
    back, = split_boxes(padded[None])
    assert back['labels'].tolist() == [0, 2, 4] and back['boxes'].tolist() == [[1, 1, 9, 9], [3, 3, 6, 6], [0, 0, 2, 2]]
    assert pad_boxes(target, 2)[:, 4].tolist() == [0, 2]
    nothing = pad_boxes(dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)), 2)
    assert len(split_boxes(nothing[None])[0]['labels']) == 0
