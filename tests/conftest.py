"""The order of the tests, and fixtures that several folders of tests share.

Every process runs one thread, here and in the processes that tests start: the models are too small to gain from more.
"""
import logging
import os
from collections import Counter

os.environ['OMP_NUM_THREADS'] = '1'  # torch reads it when it is imported, which the tests do after this

import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Let workers of pytest-xdist take whole files in their order here: most expensive fixtures belong to a file."""
    if getattr(config.option, 'numprocesses', None):
        config.option.dist = 'loadfile' if config.option.dist == 'no' else config.option.dist
        config.option.loadscopereorder = False  # not the files with the most tests first


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Sort files by their numbers of slow tests, so that no worker starts a long file when the others are done.

    A test that starts processes or trains counts for several. Exhaustive tests are slow, so that `-m 'not slow'` leaves
    them out too.
    """
    slow: Counter = Counter()
    for item in items:
        if item.get_closest_marker('exhaustive'):
            item.add_marker('slow')
        if item.get_closest_marker('slow'):
            trains = item.get_closest_marker('process') or item.path.parent.name == 'training'
            slow[item.path] += 5 if trains else 1
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture
def folder(tmp_path):
    """A data folder: two splits of two classes with twelve grey images each."""
    for split in ('train', 'validation'):
        for label in 'ab':
            path = tmp_path / 'data' / split / label
            path.mkdir(parents=True)
            for i in range(12):
                Image.new('RGB', (32, 32), (i * 20,) * 3).save(path / f'{i}.png')
    return tmp_path / 'data'


@pytest.fixture
def seeded():
    """A fixed seed of torch's global generator."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_handlers_of_other_tests():
    """Remove the log handlers of programs that ran before in this process: their streams are closed."""
    def remove():
        logging.root.handlers = [each for each in logging.root.handlers if type(each) is not logging.StreamHandler]

    remove()
    yield
    remove()
