"""One thread, here and in the processes that tests start: the models are too small to gain from more."""
import os

os.environ['OMP_NUM_THREADS'] = '1'  # read when torch is imported, which the tests do after this

import pytest  # noqa: E402
from PIL import Image  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    """Two splits of two classes with twelve grey images each."""
    for split in ('train', 'validation'):
        for label in 'ab':
            path = tmp_path / 'data' / split / label
            path.mkdir(parents=True)
            for i in range(12):
                Image.new('RGB', (32, 32), (i * 20,) * 3).save(path / f'{i}.png')
    return tmp_path / 'data'
