"""Datasets by name, views, the held-out split, and the batches of the probability shift."""
import random
import subprocess
import sys
import tarfile
import traceback
from collections import Counter
from multiprocessing import active_children

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from support.compare import assert_identical
from torch.utils.data import DataLoader, IterableDataset

from timm_shiftnas.data import BrokenImageError, DatasetView, StepBatches, create_dataset, split_held_out

CONFIG = dict(input_size=(3, 16, 16), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation='bilinear', crop_pct=0.9)


def make_folder(root, split='train', classes=('cat', 'dog'), count=3):
    """Write images of noise, all different, to root/split/class/number.png."""
    rng = np.random.default_rng(0)
    for name in classes:
        folder = root / split / name
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f'{i}.png')
    return root


def pixels(dataset):
    return [(np.asarray(image).tobytes(), target) for image, target in dataset]


@pytest.fixture(scope='module')
def digits():
    return create_dataset('sklearn/digits', None, 'train')


def test_the_tilde_of_a_data_folder_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(make_folder(tmp_path)))
    assert len(create_dataset('', '~', 'train')) == 6


# -- sklearn/digits ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_digits_are_the_images_of_scikit_learn_split_in_two():
    from sklearn.datasets import load_digits

    train = create_dataset('sklearn/digits', None, 'train', input_img_mode='L')
    validation = create_dataset('sklearn/digits', None, 'validation', input_img_mode='L')
    assert (len(train), len(validation)) == (1437, 360)
    source = load_digits()
    original = Counter(
        (np.round(image * 255 / 16).astype(np.uint8).tobytes(), target)
        for image, target in zip(source.images, source.target))
    assert Counter(pixels(train)) + Counter(pixels(validation)) == original  # complete, without repetition
    for digit in range(10):
        share = validation.targets.count(digit) / np.sum(source.target == digit)
        assert abs(share - 0.2) < 0.01
    assert train[0][0].size == (8, 8) and type(train[0][1]) is int


def test_digits_accept_the_names_and_arguments_of_timm():
    train = create_dataset(
        'SKLEARN/digits', '', 'training', is_training=True, batch_size=8, seed=3, input_img_mode=None, class_map='')
    assert train.transform is None and train[0][0].mode == 'RGB'
    assert pixels(train) == pixels(create_dataset('sklearn/digits', None, 'train'))  # the split is fixed
    validation = pixels(create_dataset('sklearn/digits', None, 'validation'))
    for synonym in ('val', 'valid', 'eval', 'evaluation', 'test'):
        assert pixels(create_dataset('sklearn/digits', None, synonym)) == validation
    train.transform, train.target_transform = (lambda image: image.size), (lambda target: -target - 1)
    assert train[0][0] == (8, 8) and train[0][1] < 0


def test_unknown_digits_and_splits():
    with pytest.raises(ValueError, match="'sklearn/digit'.*'sklearn/digits'"):
        create_dataset('sklearn/digit', None, 'train')
    with pytest.raises(ValueError, match="'dev'.*'train' or 'validation'"):
        create_dataset('sklearn/digits', None, 'dev')


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)  # makes the import fail
    with pytest.raises(ImportError, match=r"pip install 'timm_shiftnas\[quickstart\]'"):
        create_dataset('sklearn/digits', None, 'train')


# -- folders and tars of images ----------------------------------------------------------------------------------------


def test_a_folder_gives_the_images_of_timm(tmp_path):
    make_folder(tmp_path, 'train')
    make_folder(tmp_path, 'val', count=2)
    for split, length in (('train', 6), ('validation', 4)):
        ours = create_dataset('', tmp_path, split, class_map=None)
        timms = timm.data.create_dataset('', str(tmp_path), split)
        assert pixels(ours) == pixels(timms) and len(ours) == length
        assert ours.reader.class_to_idx == {'cat': 0, 'dog': 1}
    assert create_dataset('', str(tmp_path), 'train', input_img_mode='L')[0][0].mode == 'L'
    assert create_dataset('', str(tmp_path), 'train', input_img_mode='')[0][0].getpixel((23, 19))  # in memory
    assert len(create_dataset('', str(tmp_path / 'train'), '')) == 6  # an empty split: the folder itself


def error_of(*args, **kwargs):
    """The message of the error of `create_dataset`, which is one line."""
    with pytest.raises(ValueError) as caught:
        create_dataset(*args, **kwargs)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_unusable_folders(tmp_path):
    missing = str(tmp_path / 'nowhere')
    assert missing in error_of('', missing, 'train')
    assert 'sklearn/digits' in error_of('', None, 'train')
    assert "'sklern/digits'" in error_of('sklern/digits', '', 'train')

    flat = make_folder(tmp_path / 'flat', '.')
    message = error_of('', str(flat), 'validation')  # timm would read the training images instead
    assert str(flat) in message and "'validation'" in message and 'cat, dog' in message

    one = make_folder(tmp_path / 'one', classes=['cat'])
    message = error_of('', str(one), 'train')
    assert str(one / 'train') in message and '1 class' in message

    (tmp_path / 'empty' / 'train' / 'cat').mkdir(parents=True)
    message = error_of('', str(tmp_path / 'empty'), 'train')
    assert str(tmp_path / 'empty' / 'train') in message and '0 images' in message

    (tmp_path / 'images.zip').write_bytes(b'PK')
    assert 'images.zip' in error_of('', str(tmp_path / 'images.zip'), 'train')
    (tmp_path / 'images.tar').write_bytes(b'no tar')
    assert 'images.tar' in error_of('', str(tmp_path / 'images.tar'), 'train')
    assert 'cifar11' in error_of('torch/cifar11', str(tmp_path), 'train')


def error_in_worker(loader):
    """The error that a `DataLoader` raises for one of its workers."""
    with pytest.raises(BrokenImageError) as caught:
        list(loader)
    traceback.clear_frames(caught.tb)  # its frames hold the loader's iterator, whose later collection takes 5 s
    return caught.value


@pytest.mark.parametrize('kind', ['text', 'truncated', 'empty', 'damaged header'])
def test_a_broken_image_is_an_error_of_one_line_that_names_the_file(tmp_path, kind):
    make_folder(tmp_path)
    path = tmp_path / 'train' / 'dog' / '1.png'
    whole = path.read_bytes()
    path.write_bytes({
        'text': b'<html>404</html>',
        'truncated': whole[:len(whole) // 2],
        'empty': b'',
        'damaged header': whole[:20] + b'\0' * 20 + whole[40:],
    }[kind])
    dataset = create_dataset('', str(tmp_path), 'train')
    with pytest.raises(BrokenImageError) as direct:
        dataset[4]
    message = str(direct.value)
    assert message.startswith(f"cannot read the image '{path}'") and len(message.splitlines()) == 1
    assert len(pixels(DatasetView(dataset, [0, 1, 2, 3, 5]))) == 5  # the others are fine

    view, _ = split_held_out(dataset, 0.1, seed=1)
    assert 4 in view.indices
    loader = timm.data.create_loader(
        view, (3, 16, 16), batch_size=5, is_training=False, num_workers=1, device=torch.device('cpu'),
        persistent_workers=False)
    error = error_in_worker(loader)
    assert isinstance(error, ValueError) and type(error) is BrokenImageError and str(error) == message


def test_a_file_name_with_line_breaks_is_quoted(tmp_path):
    make_folder(tmp_path)
    path = tmp_path / 'train' / 'dog' / 'a\nb\u2028 timm_shiftnas.data.BrokenImageError: c.png'
    path.write_bytes(b'no image')
    loader = DataLoader(create_dataset('', str(tmp_path), 'train'), batch_size=None, sampler=[6], num_workers=1)
    message = str(error_in_worker(loader))
    assert len(message.splitlines()) == 1 and message.startswith(f'cannot read the image {str(path)!r}')


def test_a_tar_that_was_read_here_can_be_read_in_workers(tmp_path):
    make_folder(tmp_path, count=40)
    with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
        tar.add(tmp_path / 'train', 'train')
    folder = pixels(create_dataset('', str(tmp_path), 'train'))
    dataset = create_dataset('', str(tmp_path / 'train.tar'), 'train')
    assert pixels(dataset) == folder
    assert pixels(DataLoader(dataset, batch_size=None, num_workers=2)) == folder


# -- views and the held-out split --------------------------------------------------------------------------------------


@pytest.mark.parametrize('share', [0.05, 0.5, 1e-9])
def test_held_out_split_is_disjoint_complete_and_repeatable(digits, share):
    train, held_out = split_held_out(digits, share, seed=7)
    assert len(held_out) == max(1, round(share * 1437))
    assert sorted([*train.indices.tolist(), *held_out.indices.tolist()]) == list(range(1437))
    again = split_held_out(digits, share, seed=7)
    assert torch.equal(held_out.indices, again[1].indices)
    assert not torch.equal(held_out.indices, split_held_out(digits, share, seed=8)[1].indices)
    index = int(held_out.indices[0])
    assert pixels([held_out[0]]) == pixels([digits[index]])


@pytest.mark.parametrize('share', [0, -0.1, 0.51, 1, float('nan'), True])
def test_held_out_share_out_of_range(digits, share):
    with pytest.raises(ValueError, match=str(share)):
        split_held_out(digits, share)


def test_datasets_that_cannot_be_split(digits):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

        def __len__(self):  # as timm's have
            return 5

    with pytest.raises(ValueError, match='Stream'):
        split_held_out(Stream(), 0.1)
    with pytest.raises(ValueError, match='transform'):
        split_held_out(create_dataset('sklearn/digits', None, 'train', transform=np.asarray), 0.1)


@pytest.mark.parametrize('prefetcher', [True, False])
@pytest.mark.parametrize('workers', [0, 1])
def test_views_have_their_own_transforms_in_the_loader_of_timm(digits, prefetcher, workers):
    train, held_out = split_held_out(digits, 0.01)
    held_out.transform, held_out.target_transform = (lambda image: 'mine'), (lambda target: -1)
    loader = timm.data.create_loader(
        train, batch_size=500, is_training=False, num_workers=workers, use_prefetcher=prefetcher,
        device=torch.device('cpu'), persistent_workers=False, **CONFIG)
    images, targets = list(loader)[0]
    transform = timm.data.create_transform(**CONFIG)
    raw = [digits[int(i)] for i in train.indices[:500]]
    expected = torch.stack([transform(image) for image, _ in raw])
    assert (images - expected).abs().max() < 1e-5
    assert targets.dtype == torch.long and targets.tolist() == [target for _, target in raw]
    assert digits.transform is None and held_out[0] == ('mine', -1)
    assert len(loader.dataset) == len(train) == 1423


def test_views_of_views(digits):
    inner = DatasetView(digits, [5, 6, 7], target_transform=lambda target: target + 100)
    outer = DatasetView(inner, [2, 0]).with_transform(lambda image: image.size)
    assert list(outer) == [((8, 8), digits[7][1] + 100), ((8, 8), digits[5][1] + 100)]


# -- batches for probability shift -------------------------------------------------------------------------------------


def test_step_batches_have_the_evaluation_transform_of_timm(digits):
    view, _ = split_held_out(digits, 0.1)
    view.transform = lambda image: 'augmented'  # as create_loader does to the training part
    batches = StepBatches(view, 32, seed=5, **CONFIG)
    images, targets = batches.batch(11)
    assert images.shape == (32, 3, 16, 16) and images.dtype == torch.float32 and targets.dtype == torch.int64
    positions = batches.indices(11)
    assert len(set(positions)) == 32
    transform = timm.data.create_transform(**CONFIG)
    for row, position in enumerate(positions):
        image, target = digits[int(view.indices[position])]
        assert torch.equal(images[row], transform(image)) and targets[row] == target
    assert view[0][0] == 'augmented'


def test_step_batches_are_a_function_of_seed_and_step(digits):
    batches, other = (StepBatches(digits, 64, seed, **CONFIG) for seed in (3, 4))
    chosen = {(seed, step): tuple(b.indices(step)) for seed, b in ((3, batches), (4, other)) for step in range(50)}
    assert len(set(chosen.values())) == 100  # no repetition, and not a function of seed + step
    counts = Counter(i for indices in chosen.values() for i in indices)
    assert max(counts.values()) < 20 and len(counts) > 1400  # 6,400 draws from 1,437 images
    assert_identical(batches.batch(9), StepBatches(digits, 64, 3, **CONFIG).batch(9))
    assert tuple(batches.indices(9)) == chosen[3, 9]


@pytest.mark.slow
@pytest.mark.parametrize('workers', [1, 2])
def test_step_batches_are_the_same_with_workers(digits, workers):
    here = StepBatches(digits, 8, 0, **CONFIG)
    away = StepBatches(digits, 8, 0, workers=workers, **CONFIG)
    for step in (4, 5, 6, 7, 12, 13, 2, 2, 3):  # in sequence, forwards, back, repeated
        assert_identical(here.batch(step), away.batch(step), step)
    away.close()
    assert_identical(here.batch(4), away.batch(4))


def test_workers_stop_when_step_batches_are_deleted(digits):
    others = set(active_children())
    batches = StepBatches(digits, 8, 0, workers=1, **CONFIG)
    batches.batch(0)
    assert len(set(active_children()) - others) == 1
    del batches  # not part of a reference cycle
    assert set(active_children()) == others


def test_step_batches_of_a_small_dataset_hold_all_images(digits):
    images, targets = StepBatches(DatasetView(digits, [1, 2, 3]), 128, 0, **CONFIG).batch(0)
    assert len(images) == 3 and sorted(targets.tolist()) == sorted(digits[i][1] for i in (1, 2, 3))


def test_step_batches_need_images(digits):
    with pytest.raises(ValueError, match='batch_size=0'):
        StepBatches(digits, 0, 0, **CONFIG)
    with pytest.raises(ValueError, match='0 images'):
        StepBatches(DatasetView(digits, []), 1, 0, **CONFIG)


@pytest.mark.parametrize('workers', [0, 2])
def test_step_batches_do_not_change_random_states(digits, workers):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    batches = StepBatches(digits, 8, 0, workers=workers, **CONFIG)
    for step in (0, 1, 5):
        batches.batch(step)
    batches.close()
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()
    assert torch.equal(before[0], after[0]) and before[1] == after[1]
    assert all(np.array_equal(x, y) for x, y in zip(before[2], after[2], strict=True))


@pytest.mark.parametrize('workers', [0, 1])
def test_step_batches_name_a_broken_image_and_continue_when_it_is_repaired(tmp_path, workers):
    make_folder(tmp_path)
    path = tmp_path / 'train' / 'cat' / '2.png'
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    batches = StepBatches(create_dataset('', str(tmp_path), 'train'), 6, 0, workers=workers, **CONFIG)
    others = set(active_children())
    with pytest.raises(BrokenImageError) as caught:
        batches.batch(0)
    assert set(active_children()) == others  # the workers have stopped
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1
    path.write_bytes(whole)
    assert len(batches.batch(0)[0]) == 6
    batches.close()


@pytest.mark.exhaustive
@pytest.mark.process
@pytest.mark.slow
def test_step_batches_survive_a_killed_worker_and_the_end_of_the_interpreter():
    code = f"""
import os, signal
from multiprocessing import active_children
from timm_shiftnas.data import StepBatches, create_dataset

digits = create_dataset('sklearn/digits', None, 'train')
here, away = (StepBatches(digits, 8, 0, workers=workers, **{CONFIG!r}) for workers in (0, 2))
away.batch(0)
try:
    os.kill(active_children()[0].pid, signal.SIGKILL)
    for step in range(1, 20):  # some batches may have been read ahead
        away.batch(step)
except RuntimeError as error:
    print('killed' in str(error))
print((here.batch(1)[0] == away.batch(1)[0]).all().item(), len(active_children()))
"""
    # in another process, because torch reports a dead worker from a signal handler, which can interrupt any line
    ended = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stdout) == (0, 'True\nTrue 2\n'), ended.stderr
