"""Markers, the order of the tests, and fixtures that several rooms share.

Every process runs one thread, here and in the processes that tests start: the models are too small to gain from more.
"""
import inspect
import logging
import os
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'  # torch reads it when it is imported, which the tests do after this

import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

TESTS = Path(__file__).parent

# Files that take longest come first, so that no worker of pytest-xdist starts one when the others are done.
LONGEST = (
    'training/test_train.py', 'training/test_faults.py', 'integration/test_benchmarks.py', 'method/test_task.py',
    'hub/test_publish.py', 'training/test_train_mobilenet.py', 'training/test_distributed.py',
    'integration/test_patch.py', 'integration/test_cli.py', 'method/test_generator.py', 'hub/test_hub.py',
    'models/test_extract.py')

# A test is a `process` test if it or a fixture of it uses one of these names.
STARTERS = {'Client', 'Job', 'Popen', 'call', 'client', 'ranks', 'script', 'start', 'subprocess', 'torchrun'}

# Parts of names of tests that take more than about two seconds, and fixtures whose tests do, by file.
SLOW = {
    'data/test_data.py': ('killed_worker',),
    'hub/test_hub.py': ('fresh_process', 'subnet_for_params', 'has_to_satisfy'),
    'hub/test_publish.py': ('',),
    'integration/test_benchmarks.py': ('comparison', 'separately', 'wrong_flags', 'speed'),
    'integration/test_cli.py': ('ctrl_c', 'console_script', 'extract[--params'),
    'integration/test_examples.py': ('own_loop',),
    'integration/test_patch.py': (
        'compiled', 'everything', 'by_hand', 'resumed', 'scaler', 'copy', 'two_processes',
        'other_models'),
    'method/test_generator.py': ('fitted', 'autoformer_t', 'global_random_state'),
    'method/test_task.py': (
        'untrained', 'compilation', 'function_of_seed', 'saves_and_restores', 'exact_inner_products',
        'restores_everything', 'warmup', 'as_fitted', 'sandwich'),
    'models/test_extract.py': ('onnx', 'torch_export', 'compiles'),
    'models/test_mobilenet_oracles.py': ('logits',),
    'models/test_shiftformer.py': ('compiled',),
    'models/test_shiftmobilenet.py': ('onnx', 'generator_uses'),
    'space/test_complexity.py': ('published_spaces',),
    'training/test_distributed.py': ('',),
    'training/test_faults.py': ('',),
    'training/test_train.py': (
        'finished', 'streamed', 'ctrl_c', 'tracking', 'bar', 'teacher', 'mixup', 'resume', 'uniform', 'accumulation',
        'learning_rate', 'wrong_flags[flags0-', 'undisturbed_run', 'not_ours'),
    'training/test_train_mobilenet.py': ('finished', 'learns', 'resume', 'without_this_package'),
}


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Let workers of pytest-xdist take whole files in their order here: most expensive fixtures belong to a file."""
    if getattr(config.option, 'numprocesses', None):
        config.option.dist = 'loadfile' if config.option.dist == 'no' else config.option.dist
        config.option.loadscopereorder = False  # not the files with the most tests first


def pytest_collection_modifyitems(items):
    """Mark tests and sort their files, longest first."""
    rank = {path: number for number, path in enumerate(LONGEST)}
    for item in items:
        file = item.path.relative_to(TESTS).as_posix()
        fixtures = [definitions[-1].func for definitions in item._fixtureinfo.name2fixturedefs.values()]
        used = {*item.fixturenames, *(name for function in (item.obj, *fixtures) for name in names_in(function))}
        if used & STARTERS:
            item.add_marker('process')
        if any(part in item.name or part in item.fixturenames for part in SLOW.get(file, ())):
            item.add_marker('slow')
    items.sort(key=lambda item: rank.get(item.path.relative_to(TESTS).as_posix(), len(rank)))


def names_in(function):
    """Global names and attributes that the code of a function uses."""
    return inspect.unwrap(function).__code__.co_names


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
