"""Rendered letters: comparison with Pillow, the split by fonts, and the cache."""
import shutil
import string
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from timm_shiftnas.data import DatasetView, create_dataset
from timm_shiftnas.data.glyphs import Glyphs, find_fonts


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    return tmp_path / 'cache' / 'timm_shiftnas'


@pytest.fixture
def two_fonts(tmp_path):
    """A folder of two fonts: the first by name is for training, the second for validation."""
    folder = tmp_path / 'fonts' / 'deep'
    folder.mkdir(parents=True)
    for name, file in (('DejaVuSans.ttf', 'a.ttf'), ('DejaVuSerif.ttf', 'B.TTF')):
        shutil.copy(next(path for path in find_fonts() if path.name == name), folder / file.lower())
    return tmp_path / 'fonts'


def arrays(dataset):
    return np.stack([np.asarray(image) for image, _ in dataset])


@pytest.mark.slow
def test_letters_of_difficulty_0_are_those_of_the_font(two_fonts):
    """All images of a letter are equal, and close to Pillow's drawing of the same size."""
    for split, name in (('train', 'a.ttf'), ('validation', 'b.ttf')):
        dataset = Glyphs(split, two_fonts, images=104 if split == 'train' else 416, difficulty=0, input_img_mode='L')
        assert [target for _, target in dataset] == [*range(52), *range(52)]
        images = arrays(dataset)
        assert np.array_equal(images[:52], images[52:])
        font = ImageFont.truetype(str(two_fonts / 'deep' / name), 192)  # three quarters of 8 * 32 pixels
        for letter, image in zip(string.ascii_uppercase + string.ascii_lowercase, images):
            drawn, (left, _, right, _) = Image.new('L', (256, 256)), font.getbbox(letter, anchor='ls')
            ImageDraw.Draw(drawn).text(
                (128 - (left + right) / 2, 0.74 * 256), letter, fill=255, font=font, anchor='ls')
            expected = np.asarray(drawn.reduce(8), dtype=float)
            assert abs(image.sum() / expected.sum() - 1) < 0.08, letter  # total brightness
            assert np.abs(image - expected).sum() < 0.25 * expected.sum(), letter  # position


@pytest.mark.slow
def test_validation_fonts_are_unseen(two_fonts):
    sans, serif = (Glyphs(split, two_fonts, images=52, difficulty=0, input_img_mode='L')
                   for split in ('train', 'validation'))
    different = [not np.array_equal(a, b) for a, b in zip(arrays(sans), arrays(serif))]
    assert sum(different) > 50
    train, validation = Glyphs('train', images=520), Glyphs('validation', images=520)
    assert (len(train), len(validation)) == (520, 156)  # 130, rounded up to a multiple of the 52 letters
    assert set(Counter(train.targets).values()) == {10}


def test_symbol_fonts_are_left_out():
    names = [path.name for path in find_fonts()]
    assert 'DejaVuSans.ttf' in names and 'cmr10.ttf' in names and names == sorted(names)
    assert not {'cmsy10.ttf', 'cmex10.ttf', 'LastResortHE-Regular.ttf', 'STIXSizOneSymReg.ttf'} & set(names)


@pytest.mark.slow
def test_difficulty_adds_noise():
    spread = []
    for difficulty in (0.0, 0.3, 1.0):
        images = arrays(Glyphs('train', images=1040, difficulty=difficulty, input_img_mode='L'))[:, :2, :2] / 255.
        spread.append(images.std(axis=(1, 2)).mean())  # the corner, which no letter reaches
    assert spread[0] == 0 and 0.02 < spread[1] < spread[2]


def test_rendered_once_and_cached(cache, two_fonts):
    first = arrays(Glyphs('train', two_fonts, images=104, pixels=20))
    file, = cache.iterdir()
    written = file.stat().st_mtime_ns
    assert np.array_equal(first, arrays(Glyphs('train', two_fonts, images=104, pixels=20)))
    assert file.stat().st_mtime_ns == written and first.shape == (104, 20, 20, 3)
    file.write_bytes(b'broken')
    assert np.array_equal(first, arrays(Glyphs('train', two_fonts, images=104, pixels=20)))
    assert [path.name for path in cache.iterdir()] == [file.name]
    assert not np.array_equal(first, arrays(Glyphs('train', two_fonts, images=104, pixels=20, difficulty=0.6)))
    assert len(list(cache.iterdir())) == 2


def test_glyphs_work_with_a_cache_that_cannot_be_written(cache, two_fonts):
    cache.parent.mkdir()
    cache.write_text('a file where the folder should be')
    assert len(Glyphs('train', two_fonts, images=52)) == 52


def test_glyphs_by_name(two_fonts):
    options = dict(glyphs=dict(images=104, difficulty=0.1), input_img_mode='L', batch_size=3, class_map='')
    dataset = create_dataset('glyphs', str(two_fonts), 'val', **options)
    assert dataset[0][0].mode == 'L' and len(dataset) == 52
    view = DatasetView(create_dataset('glyphs', None, 'training', **options), [1, 5], transform=np.asarray)
    assert view[1][0].shape == (32, 32) and view[1][1] == 5


@pytest.mark.parametrize('wrong, message', [
    (dict(difficulty=1.5), 'difficulty=1.5'),
    (dict(pixels=4), 'pixels=4'),
    (dict(images=0), 'images=0'),
    (dict(fonts='/nowhere'), "'/nowhere'"),
])
def test_arguments_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        Glyphs('train', **wrong)


def test_one_font_is_not_enough(two_fonts):
    (two_fonts / 'deep' / 'b.ttf').write_bytes(b'no font')
    with pytest.raises(ValueError, match=f'1 font .*{two_fonts}'):
        Glyphs('train', two_fonts)
    with pytest.raises(ValueError, match="'dev'.*'train' or 'validation'"):
        create_dataset('glyphs', None, 'dev')
