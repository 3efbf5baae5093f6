"""The pictures of a run: accuracy over MACs, and the distribution over budget groups during training.

They need matplotlib, an optional dependency. Without it, one warning is logged and no picture is written.
"""
from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..space.core import SearchSpace
from ..space.resources import MACS, Resource
from ..utils.files import atomic_write
from ..utils.units import scale_of
from .tables import Row, score_columns

__all__ = ['plot_accuracy', 'plot_front', 'plot_shift']

SIZE = (9.0, 5.6)  # inches of 100 pixels: fits a README without scaling
LABEL = 115  # largest width of an end's label, in pixels
BLUE, ORANGE, GREY, DARK = '#1f5fa8', '#d9822b', '#8a8f98', '#222222'
OTHERS = GREY, '#3f9a5f', '#8a4fb5'

_logger = logging.getLogger(__name__)


def plot_accuracy(
        path: str | os.PathLike,
        rows: Sequence[Row],
        others: Mapping[str, Sequence[Row]] | None = None,
        resource: Resource = MACS,
        metric: str = 'top-1 accuracy',
        beside: Sequence[Resource] = (),
        space: SearchSpace | None = None,
) -> bool:
    """Draw top-1, or the score of another task, against MACs or another resource as a PNG of 900 x 560 pixels.

    With further resources it has a panel for each, two in a line of 440 pixels.

    Args:
        path: File to write.
        rows: The run's subnets, at least one; those of groups are a line, 'smallest' and 'largest' separate marks.
        others: Subnets to compare with, by what the legend calls them, such as 'before training'; at most three.
        resource: What the horizontal axis shows.
        metric: What the percentages are.
        beside: Resources of further panels, as far as the rows have them.
        space: The bound space of the rows, to count resources of their archs; without it, rows hold them by name.

    Returns:
        Whether the picture was written: `False` without matplotlib.
    """
    if not _has_matplotlib():
        return False
    counted = {each: _counted(rows, each, space) for each in (resource, *beside)}
    panels = [each for each, found in counted.items() if found or each == resource]
    columns, lines = min(len(panels), 2), -(-len(panels) // 2)
    figure = _figure(SIZE if len(panels) == 1 else (SIZE[0], 4.4 * lines))
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    score, drawn = score_columns(rows)[0], []
    for number, (ax, each) in enumerate(zip(axes, panels)):
        title = '' if number else 'One supernet, a subnet for every budget'
        drawn.append(_draw_panel(
            ax, title, counted[each],
            {name: _counted(other, each, space) for name, other in (others or {}).items()}, each, score, metric))
        ax.set_ylabel('' if number % columns else ax.get_ylabel())
    for ax in axes[len(panels):]:
        ax.remove()
    figure.draw_without_rendering()  # gives the axes their size
    for ax, ends in zip(axes, drawn):
        for name, point in ends:
            side = 'right' if name == 'largest' else 'left'
            ax.annotate(f'{name}: {point[1]:.1f}%', point, textcoords='offset points', horizontalalignment=side,
                        xytext=(7 if side == 'right' else -7, _label_height(ax, point, side)))
    _save(figure, path)
    return True


def plot_front(path: str | os.PathLike, front: Sequence[Row], rows: Sequence[Row], resource: Resource = MACS) -> bool:
    """Draw the Pareto front of a search, and all archs that were measured, as a PNG of 900 x 560 pixels.

    Args:
        path: File to write.
        front: The front, the cheapest first; at least one row.
        rows: All archs.
        resource: What the horizontal axis shows; rows hold it by its name.

    Returns:
        Whether the picture was written: `False` without matplotlib.
    """
    if not _has_matplotlib():
        return False
    figure = _figure()
    ax = figure.add_subplot()
    scale, label = _axis(resource, max(row[resource.name] for row in rows))
    points, best = ([(row[resource.name] / scale, row['top1']) for row in each] for each in (rows, front))
    ax.plot(*zip(*points), 'o', color=GREY, alpha=0.6, markersize=4, label=f'{len(rows)} measured archs')
    ax.step(*zip(*best), '-o', where='post', color=BLUE, linewidth=2, markersize=5, label='Pareto front')
    _label(ax, 'The most accurate archs for their cost', label, 'top-1 accuracy (%) on the images of the search')
    ax.legend(loc='lower right', frameon=False)
    _save(figure, path)
    return True


def plot_shift(
        path: str | os.PathLike,
        history: Sequence[tuple[int, Sequence[float]]],
        edges: Sequence[float],
        uniform: Sequence[float],
        resource: Resource = MACS,
) -> bool:
    """Draw the history of P, and below it the MACs of uniformly sampled archs, as a PNG of 900 x 560 pixels.

    Both parts share the axis of MACs, or of another resource. In the upper part, time runs upwards and the colour of
    group k is `P_k * K`, which is 1 for a uniform P. The lower part is a histogram of uniformly sampled archs, with the
    last P as a line in the same unit.

    Args:
        path: File to write.
        history: Pairs (update, [P_1, ..., P_K]), at least one; P is in effect from that optimizer update on.
        edges: The K + 1 bounds of the groups, increasing.
        uniform: MACs of uniformly sampled archs, or what they use of the resource.
        resource: What edges and archs count.

    Returns:
        Whether the picture was written: `False` without matplotlib.
    """
    if not _has_matplotlib():
        return False
    history = sorted(dict(history).items())
    figure = _figure()
    grid = figure.add_gridspec(2, 2, height_ratios=(2.2, 1), width_ratios=(40, 1))
    heat = figure.add_subplot(grid[0, 0])
    histogram = figure.add_subplot(grid[1, 0], sharex=heat)
    scale, label = _axis(resource, edges[-1])
    bounds = [edge / scale for edge in edges]
    mesh, ticks = _draw_heat_map(heat, history, bounds)
    heat.tick_params(labelbottom=False)
    heat.set_ylabel('training update')
    heat.set_title('Where training went: probability of each budget group', loc='left', fontweight='bold')
    colour_bar = figure.colorbar(mesh, cax=figure.add_subplot(grid[0, 1]), ticks=ticks)
    colour_bar.ax.set_yticklabels([f'{tick:.3g}×' for tick in ticks])
    colour_bar.ax.minorticks_off()
    colour_bar.set_label('P relative to uniform')
    _draw_uniform_samples(histogram, [count / scale for count in uniform], bounds, history[-1][1])
    histogram.set_xlabel(label)
    histogram.set_xlim(bounds[0], bounds[-1])
    _save(figure, path)
    return True


def _counted(rows: Sequence[Row], resource: Resource, space: SearchSpace | None) -> list[Row]:
    """Rows with the counts of a resource in a space; without a space the rows as they are, none if one lacks it."""
    if space is None:
        return list(rows) if all(resource.name in row for row in rows) else []
    counts = resource.count(space, [space.from_dict(row['arch']) for row in rows]).tolist()
    return [{**row, resource.name: count} for row, count in zip(rows, counts)]


def _draw_panel(
        ax: Any,
        title: str,
        rows: Sequence[Row],
        others: Mapping[str, Sequence[Row]],
        resource: Resource,
        score: str,
        metric: str,
) -> list[tuple[str, tuple[float, float]]]:
    """Draw percentages against one resource. Returns names and points of the ends, which are labelled later."""
    scale, label = _axis(resource, max(row[resource.name] for each in (rows, *others.values()) for row in each))

    def points(each: Sequence[Row]) -> list[tuple[str, tuple[float, float]]]:
        return [(row['name'], (row[resource.name] / scale, row[score])) for row in each]

    for (name, each), colour in zip(others.items(), OTHERS):
        _draw_subnets(ax, points(each), colour, colour, name)
    ends = _draw_subnets(ax, points(rows), BLUE, ORANGE, 'subnets for a budget')
    ax.margins(x=0.05, y=0.12)
    _label(ax, title, label, f'{metric} (%)')
    if title and ax.get_legend_handles_labels()[0]:
        heights = [height for _, (_, height) in sorted(points(rows), key=lambda point: point[1][0])]
        falls = heights[-1] < heights[0]
        ax.legend(loc='lower left' if falls else 'lower right', frameon=False)
    return ends


def _label(ax: Any, title: str, x: str, y: str) -> None:
    """Title and axes of a picture of accuracy."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_title(title, loc='left', fontweight='bold')
    ax.grid(color='#e4e6ea')
    ax.set_axisbelow(True)
    ax.spines[['top', 'right']].set_visible(False)


def _draw_subnets(
        ax: Any,
        points: Sequence[tuple[str, tuple[float, float]]],
        colour: str,
        end_colour: str,
        label: str,
) -> list[tuple[str, tuple[float, float]]]:
    """Draw the groups' subnets as a line and the two ends as triangles. Returns names and points of the ends."""
    markers = {'smallest': 'v', 'largest': '^'}
    if line := sorted(point for name, point in points if name not in markers):
        ax.plot(*zip(*line), '-o', color=colour, linewidth=2, markersize=5, label=label)
    ends = [(name, point) for name, point in points if name in markers]
    for name, point in ends:
        ax.plot(*point, markers[name], color=end_colour, markersize=10, zorder=3)
    return ends


def _label_height(ax: Any, point: tuple[float, float], side: str) -> int:
    """The height above a point, in typographical points, at which its label overlaps the lines least.

    Args:
        ax: Axes of their final size and limits.
        point: Position in data coordinates.
        side: The side of the label that touches the point, 'left' or 'right'.
    """
    (x, y), pixel, box = point, 100 / 72, ax.get_window_extent()
    wide, high = (float(np.ptp(limits)) for limits in (ax.get_xlim(), ax.get_ylim()))
    label = wide * LABEL / box.width
    places = np.linspace(x - label, x, 200) if side == 'right' else np.linspace(x, x + label, 200)
    rises = [np.interp(places, *line.get_data(), left=np.nan, right=np.nan) - y for line in ax.get_lines()]
    rises = [rise * box.height / high / pixel for rise in rises]

    def overlap(height: int) -> int:
        return sum(int(((height - 7 < rise) & (rise < height + 14)).sum()) for rise in rises)

    heights = (10, -20, -34, 24) if side == 'right' else (-20, 10, 24, -34)
    return min(heights, key=overlap)


def _draw_heat_map(
        ax: Any,
        history: Sequence[tuple[int, Sequence[float]]],
        bounds: Sequence[float],
) -> tuple[Any, list[float]]:
    """Draw P_k * K over MACs and time. Returns the coloured mesh and the ticks of its colour bar."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    ratios = [[value * len(p) for value in p] for _, p in history]
    # At least 1.25, so that the noise of a uniform P stays pale; at most 8, so that one group with a P near zero does
    # not make the colours of all others pale.
    limit = min(8.0, max(1.25, *(max(value, 1 / max(value, 1e-9)) for row in ratios for value in row)))
    updates = [update for update, _ in history]
    step = updates[-1] - updates[-2] if len(updates) > 1 else 1
    # Values are clipped to the limits, because a P of zero has no logarithm.
    clipped = [[min(max(value, 1 / limit), limit) for value in row] for row in ratios]
    mesh = ax.pcolormesh(
        bounds, [*updates, updates[-1] + step], clipped, cmap='RdBu_r', norm=LogNorm(1 / limit, limit))
    _draw_edges(ax, bounds)
    if len(updates) == 1:
        ax.set_yticks(updates)
    else:
        ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=(1, 2, 2.5, 5, 10)))
    steps = (1.1, 1.25) if limit < 1.5 else (1.25, 1.5) if limit < 2 else (1.5, 2, 3) if limit < 4 else (2, 4, 8)
    above = [tick for tick in steps if tick <= limit * 1.001]
    return mesh, [*(1 / tick for tick in reversed(above)), 1, *above]


def _draw_uniform_samples(ax: Any, samples: Sequence[float], bounds: Sequence[float], last: Sequence[float]) -> None:
    """Draw the share of uniform samples in each bin of MACs, and the share of the last P in the same bin."""
    bins = 60
    width = (bounds[-1] - bounds[0]) / bins
    if len(samples):
        percent, limits = [100 / len(samples)] * len(samples), (bounds[0], bounds[-1])
        ax.hist(samples, bins, range=limits, weights=percent, color='#c3c8d0', label='archs sampled uniformly')
    density = [100 * p * width / (right - left) for p, left, right in zip(last, bounds, bounds[1:])]
    ax.stairs(density, bounds, baseline=None, color=DARK, linewidth=1.8, label='budgets drawn by the last P')
    _draw_edges(ax, bounds)
    ax.set_ylim(bottom=0)
    ax.set_ylabel('share per bin (%)')
    ax.spines[['top', 'right']].set_visible(False)
    # above the axes, so that no curve crosses it
    ax.legend(loc='lower right', bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0)


def _draw_edges(ax: Any, bounds: Sequence[float]) -> None:
    for bound in bounds[1:-1]:
        ax.axvline(bound, color=DARK, alpha=0.12, linewidth=0.6)


def _axis(resource: Resource, largest: float) -> tuple[float, str]:
    """Scale and label of an axis of a resource, with the unit of its largest value."""
    scale, unit = scale_of(largest, resource.kind)
    if resource == MACS:
        return scale, f'{unit}MACs per image'
    return scale, f'{resource.label} ({unit})' if unit else resource.label


@functools.cache
def _has_matplotlib() -> bool:
    """Whether matplotlib is installed. Cached, so that a run logs one warning."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        _logger.warning("No pictures without matplotlib: run pip install 'timm_shiftnas[quickstart]'")
        return False
    return True


def _figure(size: tuple[float, float] = SIZE) -> Any:
    """A figure on the Agg canvas, without pyplot and its global list of open figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=100, layout='constrained')
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | os.PathLike) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format='png')
