"""Tables and pictures of a run, read back from their files."""
import json
import logging
import sys

import numpy as np
import pytest
from PIL import Image
from support.networks import tiny_supernet
from support.pictures import without_matplotlib
from support.tables import read_csv

from timm_shiftnas.evaluation import format_table, plot_accuracy, plot_shift, plots, write_budgets_csv
from timm_shiftnas.evaluation.tables import read_budgets_csv
from timm_shiftnas.space import MACS, MEMORY, PARAMS
from timm_shiftnas.space.resources import LATENCY


def row(name, budget, macs, params, top1, top5):
    arch = {'depth': 2, 'num_heads': [1, 2]}
    return dict(name=name, budget=budget, macs=macs, params=params, top1=top1, top5=top5, arch=arch)


ROWS = [
    row('smallest', None, 1_200_000, 95_000, 90.25, 99.0),
    row('group 1', 2e6, 1_990_000, 180_000, 94.0, 99.5),
    row('group 2', 6e6, 5_980_000, 1_100_000, 97.125, 100.0),
    row('largest', None, 6_100_000, 1_200_000, 97.5, 100.0),
]


def rgb(path):
    """The pixels of a picture, [560, 900, 3]."""
    with Image.open(path) as image:
        assert image.format == 'PNG' and image.size == (900, 560)
        return np.asarray(image.convert('RGB')).astype(int)


def count(image, colour):
    """Number of pixels of a colour."""
    return int((image == np.array(colour)).all(-1).sum())


BLUE, ORANGE, GREY = (0x1f, 0x5f, 0xa8), (0xd9, 0x82, 0x2b), (0x8a, 0x8f, 0x98)


# -- text --------------------------------------------------------------------------------------------------------------


def test_table_is_aligned():
    assert format_table(ROWS).splitlines() == [
        'name      budget   MACs  params  top-1   top-5',
        'smallest       -   1.2M     95k  90.25   99.00',
        'group 1       2M  1.99M    180k  94.00   99.50',
        'group 2       6M  5.98M    1.1M  97.12  100.00',
        'largest        -   6.1M    1.2M  97.50  100.00',
    ]


def test_rows_of_another_task_and_another_resource(tmp_path):
    """A score in place of top-1 and top-5, beside a resource in its unit: in the text, the CSV and the picture."""
    rows = [dict(name=name, budget=budget, macs=macs, params=9_000, score=score, memory=memory, arch=dict(depth=2))
            for name, budget, macs, score, memory in (
                ('smallest', None, 1_200_000, 40.25, 2_000_000.), ('group 1', 4e6, 2_000_000, 51.5, 3_500_000.))]
    assert format_table(rows, MEMORY, 'mean IoU').splitlines() == [
        'name      budget  MACs  params  memory  mean IoU',
        'smallest       -  1.2M      9k     2MB     40.25',
        'group 1      4MB    2M      9k   3.5MB     51.50',
    ]
    write_budgets_csv(tmp_path / 'budgets.csv', rows)
    assert read_budgets_csv(tmp_path / 'budgets.csv') == rows
    plot_accuracy(tmp_path / 'a.png', rows, resource=MEMORY, metric='mean IoU')
    assert count(rgb(tmp_path / 'a.png'), ORANGE)
    plot_accuracy(tmp_path / 'b.png', rows, resource=MEMORY, metric='mean IoU', beside=[LATENCY])  # the rows lack it
    assert (tmp_path / 'a.png').read_bytes() == (tmp_path / 'b.png').read_bytes()


def test_csv_can_be_read_back(tmp_path):
    path = tmp_path / 'budgets.csv'
    path.write_text('old')
    write_budgets_csv(path, ROWS)
    read = read_csv(path)
    assert list(read[0]) == ['name', 'budget', 'macs', 'params', 'top1', 'top5', 'arch']
    for line, expected in zip(read, ROWS, strict=True):
        assert line['name'] == expected['name'] and json.loads(line['arch']) == expected['arch']
        assert line['budget'] == ('' if expected['budget'] is None else str(expected['budget']))
        for column in ('macs', 'params', 'top1', 'top5'):
            assert float(line[column]) == expected[column]
    assert [p.name for p in tmp_path.iterdir()] == ['budgets.csv']


def test_a_failed_write_leaves_the_old_csv_and_no_other_file(tmp_path):
    path = tmp_path / 'budgets.csv'
    path.write_text('old')
    with pytest.raises(TypeError):
        write_budgets_csv(path, [*ROWS, {**ROWS[0], 'arch': {1, 2}}])  # a set is not JSON
    assert path.read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['budgets.csv']


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_accuracy_picture(tmp_path):
    assert plot_accuracy(tmp_path / 'a.png', ROWS)
    image = rgb(tmp_path / 'a.png')
    line, ends, grey = (count(image, colour) for colour in (BLUE, ORANGE, GREY))
    assert line > 300 and ends > 100 and grey == 0

    # 'smallest' is at the lower left, 'largest' at the upper right
    ys, xs = np.nonzero((image == np.array(ORANGE)).all(-1))
    left = xs < 450
    assert ys[left].min() > 400 and xs[left].max() < 120 and ys[~left].max() < 120 and xs[~left].min() > 800

    baseline = [{**r, 'top1': r['top1'] - 2} for r in ROWS]
    assert plot_accuracy(tmp_path / 'b.png', ROWS, dict(before=baseline))
    assert count(rgb(tmp_path / 'b.png'), GREY) > 300
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.png', 'b.png']


def test_further_resources_are_panels_counted_in_the_space(tmp_path):
    """Halved MACs in the rows move nothing, because the archs are counted; parameters have a panel beside them."""
    space = tiny_supernet().space
    rows = [dict(ROWS[0], name=name, arch=arch.to_dict(), macs=1 + MACS.count(space, arch) // 2)
            for name, arch in (('smallest', space.smallest), ('group 1', space.largest))]
    right = [dict(each, macs=MACS.count(space, space.from_dict(each['arch']))) for each in rows]
    for name, each in (('a', rows), ('b', right)):
        assert plot_accuracy(tmp_path / f'{name}.png', each, beside=[MACS, PARAMS], space=space)
    with Image.open(tmp_path / 'a.png') as image, Image.open(tmp_path / 'b.png') as other:
        assert image.size == (900, 440) and image.tobytes() == other.tobytes()
        left, right = (np.asarray(image.crop((x, 0, x + 450, 440)).convert('RGB')).astype(int) for x in (0, 450))
    assert count(left, ORANGE) > 50 and count(right, ORANGE) > 50


@pytest.mark.slow
@pytest.mark.parametrize('tail', [(96, 97, 98), (97.5, 98, 96.5), (96, 97.5, 97.2), (97, 96.8, 94), (97, 97, 97)])
def test_the_line_does_not_cross_the_label_of_the_largest(tmp_path, tail):
    """The box around the black label, beside the orange mark, has no blue, for any shape of the line's end."""
    macs = 5e6, 5.95e6, 6.1e6
    names = 'group 2', 'group 3', 'largest'
    rows = [*ROWS[:2], *(row(name, None, x, 1_000_000, y, 100.) for name, x, y in zip(names, macs, tail))]
    assert plot_accuracy(tmp_path / 'a.png', rows)
    image = rgb(tmp_path / 'a.png')
    ys, xs = np.nonzero((image == np.array(ORANGE)).all(-1) & (np.arange(900) > 450))
    x, y = int(xs.mean()), int(ys.mean())
    near = image[max(y - 60, 25):y + 60, x - 120:x + 30]
    ys, xs = np.nonzero((near < 60).all(-1))
    assert 90 < np.ptp(xs) < 120 and np.ptp(ys) < 20  # the whole label, and only it
    assert count(near[ys.min():ys.max() + 1, xs.min():xs.max() + 1], BLUE) == 0


@pytest.mark.parametrize('rows', [ROWS[:1], ROWS[1:2], ROWS[::3], ROWS[:1] * 2])
def test_accuracy_picture_of_one_or_two_rows(tmp_path, rows):
    assert plot_accuracy(tmp_path / 'a.png', rows)
    rgb(tmp_path / 'a.png')


@pytest.mark.parametrize('resource, largest, label', [
    (MACS, 2.26e9, 'GMACs per image'), (MACS, 6.1e6, 'MMACs per image'), (MACS, 999e6, 'MMACs per image'),
    (MACS, 5e5, 'kMACs per image'), (MEMORY, 64e6, 'peak memory (MB)'), (PARAMS, 6e6, 'parameters (M)')])
def test_label_of_the_axis(resource, largest, label):
    scale, name = plots._axis(resource, largest)
    assert name == label and 0.5 < largest / scale < 1000


def heat_map(path):
    """The part of a shift picture that is inside the heat map for labels of any width."""
    return rgb(path)[45:310, 120:740]


def edges(groups):
    """Bounds of groups of equal width, from 1 to 2 GMACs."""
    return [1e9 + 1e9 * k / groups for k in range(groups + 1)]


@pytest.mark.slow
@pytest.mark.parametrize('groups', [2, 8, 30])
@pytest.mark.parametrize('length', [1, 2, 1000])
def test_shift_picture_of_a_uniform_p_has_no_colour(tmp_path, groups, length):
    history = [(100 * t, [1 / groups] * groups) for t in range(length)]
    assert plot_shift(tmp_path / 's.png', history, edges(groups), np.random.default_rng(0).normal(1.5e9, 1e8, 1000))
    colours = heat_map(tmp_path / 's.png')
    assert (colours.max(-1) - colours.min(-1)).max() <= 3
    assert [p.name for p in tmp_path.iterdir()] == ['s.png']


def test_shift_picture_of_slight_noise_is_pale(tmp_path):
    noise = np.random.default_rng(0).normal(0.125, 0.0005, (50, 8))
    assert plot_shift(tmp_path / 's.png', list(enumerate(noise.tolist())), edges(8), [])
    colours = heat_map(tmp_path / 's.png')
    assert (colours.max(-1) - colours.min(-1)).max() < 40


def test_shift_picture_shows_which_group_gained_and_when(tmp_path):
    uniform, shifted = [0.25] * 4, [0.55, 0.15, 0.15, 0.15]
    assert plot_shift(tmp_path / 's.png', [(100, shifted), (0, uniform), (200, shifted)], edges(4), [])
    colours = heat_map(tmp_path / 's.png')
    redness = colours[..., 0] - colours[..., 2]
    early, late = redness[-60:], redness[:170]  # time runs upwards
    assert abs(early).max() <= 3
    assert late[:, :110].min() > 50 and late[:, 200:].max() < -50


def test_shift_picture_has_logarithmic_colours(tmp_path):
    # twice and half the uniform share are equally far from 1 in the logarithm: red and blue are equally strong
    p = [2 / 4, 0.5 / 4, 1 / 4, 0.5 / 4]
    assert plot_shift(tmp_path / 's.png', [(0, p)], edges(4), [])
    columns = np.median(heat_map(tmp_path / 's.png'), axis=0)
    red, blue = columns[60], columns[230]
    assert red[0] > 95 and red[2] < 50 and blue[2] > 90 and blue[0] < 20  # both ends of the colour map


def test_shift_picture_of_a_p_of_zero(tmp_path):
    assert plot_shift(tmp_path / 's.png', [(0, [0.0, 1.0])], edges(2), [1.2e9])
    columns = np.median(heat_map(tmp_path / 's.png'), axis=0)
    assert columns[100][2] > columns[100][0] and columns[500][0] > columns[500][2]


def test_shift_picture_has_its_histogram_at_the_samples(tmp_path):
    plot_shift(tmp_path / 's.png', [(0, [0.5, 0.5])], edges(2), [1.25e9 + i for i in range(500)])
    xs = np.nonzero((rgb(tmp_path / 's.png')[380:500, 80:770] == np.array((0xc3, 0xc8, 0xd0))).all(-1))[1] + 80
    assert len(xs) > 300 and 190 < xs.min() and xs.max() < 290  # a quarter of the way along the axis


def test_shift_picture_has_p_and_samples_in_one_unit(tmp_path):
    plot_shift(tmp_path / 's.png', [(0, [0.5, 0.5])], edges(2), [1e9 + 1e9 * (i + 0.5) / 6000 for i in range(6000)])
    column = rgb(tmp_path / 's.png')[380:500, 300]
    top = np.nonzero(column.sum(-1) < 600)[0].min()
    assert abs(column[top] - 0x22).max() < 60  # the dark line is at the end of the bars: both are uniform
    assert (column[top + 5:] == np.array((0xc3, 0xc8, 0xd0))).all()


def test_a_p_of_another_number_of_groups_leaves_no_file(tmp_path):
    with pytest.raises(TypeError):
        plot_shift(tmp_path / 's.png', [(0, [0.2, 0.3, 0.5])], edges(2), [])
    assert not list(tmp_path.iterdir())


def test_pictures_do_not_change_the_global_state_of_matplotlib(tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.delitem(sys.modules, 'matplotlib.pyplot', raising=False)
    before = dict(matplotlib.rcParams.copy())
    plot_accuracy(tmp_path / 'a.png', ROWS)
    plot_shift(tmp_path / 's.png', [(0, [0.5, 0.5])], edges(2), [1.2e9])
    assert dict(matplotlib.rcParams.copy()) == before and 'matplotlib.pyplot' not in sys.modules


def test_without_matplotlib_one_warning_is_logged(tmp_path, caplog):
    with without_matplotlib(), caplog.at_level(logging.WARNING):
        assert not plot_accuracy(tmp_path / 'a.png', ROWS)
        assert not plot_shift(tmp_path / 's.png', [(0, [0.5, 0.5])], edges(2), [])
    assert len(caplog.records) == 1 and "pip install 'timm_shiftnas[quickstart]'" in caplog.text
    assert not list(tmp_path.iterdir())
