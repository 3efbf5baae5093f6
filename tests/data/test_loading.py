"""Training batches: the same from any start and for any number of workers and processes."""
import random

import numpy as np
import pytest
import torch
from support.compare import assert_identical, identical
from timm.data import FastCollateMixup, create_loader
from torch.utils.data import Dataset

from timm_shiftnas.data import DatasetView, TrainLoader, create_dataset
from timm_shiftnas.utils import Ranks

COUNT, BATCH = 90, 8


@pytest.fixture(scope='module')
def digits():
    return DatasetView(create_dataset('sklearn/digits', None, 'train'), torch.arange(COUNT))


def make(digits, ranks=Ranks(), workers=0, batch_size=BATCH, prefetch=True, repeats=0, seed=5, **kwargs):
    loader = create_loader(
        digits.with_transform(None), (3, 32, 32), batch_size, is_training=True, auto_augment='rand-m5-n1',
        num_workers=workers, device=torch.device('cpu'), use_prefetcher=prefetch, persistent_workers=False,
        pin_memory=False, **dict(dict(re_prob=.5), **kwargs))
    return TrainLoader(loader, seed, ranks, repeats)


def read(loader, epoch, start=0):
    """All batches. As in training, other random numbers are drawn in between."""
    batches = []
    for images, targets in loader.epoch(epoch, start):
        batches.append((images.clone(), targets.clone()))
        torch.rand(3), random.random(), np.random.rand()
    return batches


@pytest.mark.parametrize('prefetch', [True, False])
def test_an_epoch_can_start_at_any_batch(digits, prefetch):
    """Random erasing runs in this process with the prefetcher, and in the transform without it."""
    whole = read(make(digits, prefetch=prefetch), 2)
    assert len(whole) == COUNT // BATCH == len(make(digits))
    random.seed(9)
    torch.manual_seed(9)
    for start in (1, 7, 11):
        assert_identical(read(make(digits, prefetch=prefetch), 2, start), whole[start:])
    assert not identical(read(make(digits, prefetch=prefetch), 3), whole)
    assert not identical(read(make(digits, prefetch=prefetch, seed=6), 2), whole)


def test_batches_do_not_depend_on_workers(digits):
    mixup = FastCollateMixup(mixup_alpha=.8, cutmix_alpha=1., num_classes=10)
    alone = read(make(digits, collate_fn=mixup), 0)
    assert alone[0][1].shape == (BATCH, 10)
    assert_identical(alone, read(make(digits, workers=2, collate_fn=mixup), 0))


def test_several_processes_split_the_batches_of_one(digits):
    """Random erasing is off: with the prefetcher, each process draws it for its whole batch."""
    whole = read(make(digits, batch_size=2 * BATCH, re_prob=0.), 1)
    parts = [read(make(digits, Ranks(rank, 2), re_prob=0.), 1) for rank in (0, 1)]
    assert len(parts[0]) == len(parts[1]) == len(whole) == 5
    for (images, targets), *shares in zip(whole, *parts, strict=True):
        for rank, (some, labels) in enumerate(shares):
            assert torch.equal(images[rank::2], some) and torch.equal(targets[rank::2], labels)


def test_repeated_augmentation(digits):
    """Each image occurs three times in all processes together, with different augmentation."""
    class Numbered(Dataset):
        transform = None

        def __len__(self):
            return COUNT

        def __getitem__(self, index):
            return self.transform(digits.base[0][0]), index

    loaders = [TrainLoader(create_loader(
        Numbered(), (3, 32, 32), 10, is_training=True, num_workers=0, device=torch.device('cpu'), pin_memory=False,
        persistent_workers=False), 1, Ranks(rank, 3), 3) for rank in range(3)]
    parts = [read(loader, 0) for loader in loaders]
    targets = torch.stack([torch.cat([labels for _, labels in part]) for part in parts])
    assert (targets == targets[0]).all() and len(set(targets[0].tolist())) == len(targets[0]) == 30
    images = [torch.cat([some for some, _ in part]) for part in parts]
    assert all(not torch.equal(images[0][i], images[1][i]) for i in range(10))
