"""Measurement of the latency of subnets on this machine.

Calls of a network take turns with calls of a reference network, so that what slows both down for a while (frequency,
other processes) cancels. The latency is the median of the quotients times the median of the reference. Calls continue
until the median is known well enough: its uncertainty is half of the interval of the quotients that holds the true
median with a probability of about 0.95.
"""
from __future__ import annotations

import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils import tqdm
from torch import nn

from ..models.subnet import extract
from ..space.core import Arch, SearchSpace
from ..space.latency import Device, fingerprint
from ..utils.streams import stream
from .arch_file import ArchFile
from .backends import Run, check_backend, prepared, versions_of
from .predictor import fit_predictor

__all__ = ['Setup', 'Timing', 'archs_to_measure', 'compare', 'create_device', 'machine', 'measure', 'measure_archs']

ROUNDS = 30  # turns between two checks of the spread
MOST_ROUNDS = 300
WARM_UP = 5  # calls
MAX_SPREAD = .05
ENOUGH = .2  # stop measuring at this share of the accepted spread
TRIES = 3
FEWEST = 20  # archs that a predictor is fitted to

_logger = logging.getLogger(__name__)


class Timing(NamedTuple):
    """Time of a network, measured in turns with the reference.

    Attributes:
        ratio: Its time divided by that of the reference.
        reference: Seconds of the reference.
        spread: Uncertainty of the median of the quotients, relative to it.
    """
    ratio: float
    reference: float
    spread: float


@dataclass(frozen=True)
class Setup:
    """Settings that latencies depend on; a latency is the time of a whole batch of `batch_size` images."""
    backend: str = 'eager'
    device: str = 'cpu'
    threads: int = 1
    batch_size: int = 1


def compare(
        run: Run, reference: Run, goal: float = ENOUGH * MAX_SPREAD, clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time a run in turns with a reference.

    Args:
        run, reference: Forward passes.
        goal: The spread at which measuring ends; after 300 turns it ends in any case.
        clock: Seconds.
    """
    def seconds(each: Run) -> float:
        start = clock()
        each()
        return clock() - start

    for each in (run, reference) * WARM_UP:
        each()
    pairs: list[tuple[float, float]] = []
    spread = math.inf
    while spread > goal and len(pairs) < MOST_ROUNDS:
        pairs += [(seconds(run), seconds(reference)) for _ in range(ROUNDS)]
        ratios = sorted(one / other for one, other in pairs)
        # two standard deviations of the number of quotients below the true median
        middle, reach = (len(ratios) - 1) / 2, math.sqrt(len(ratios))
        low, high = ratios[max(math.floor(middle - reach), 0)], ratios[min(math.ceil(middle + reach), len(ratios) - 1)]
        spread = (high - low) / 2 / statistics.median(ratios)
    return Timing(statistics.median(ratios), statistics.median(other for _, other in pairs), spread)


def measure(run: Run, reference: Run, what: str, max_spread: float = MAX_SPREAD,
            clock: Callable[[], float] = time.perf_counter) -> Timing:
    """Run `compare`, and repeat it up to 3 times in all while the spread is above `max_spread`.

    Raises:
        ValueError: If it stays too large.
    """
    for attempt in range(TRIES):
        timing = compare(run, reference, ENOUGH * max_spread, clock)
        if timing.spread <= max_spread:
            return timing
        if attempt < TRIES - 1:
            _logger.warning(f'{what}: measurements differ by {timing.spread:.0%}; measuring again')
    raise ValueError(
        f'{what}: measurements differ by {timing.spread:.1%}, more than {max_spread:.1%}: the machine is busy; stop '
        'what else runs, or give fewer --threads or a larger --max-spread, and repeat the command, which continues '
        'where this one ended')


# -- archs -------------------------------------------------------------------------------------------------------------


def archs_to_measure(space: SearchSpace, count: int, seed: int = 0) -> list[Arch]:
    """Different archs that cover a space: both ends, one third sampled uniformly, others small or large throughout.

    Uniform sampling alone gives archs of about the same size. So for two of three archs a position is drawn, around
    which the values of all its choices are drawn. Large positions are likelier: costs are products of choices, so few
    archs are large.
    """
    noise = stream(seed, 'measure', 0)
    archs = dict.fromkeys((space.smallest, space.largest))
    count = min(count, space.size)
    while len(archs) < count:
        if len(archs) % 3 == 0:
            archs[space.sample(noise)] = None
            continue
        position = 1.3 * torch.rand((), generator=noise).item() ** .6 - .15
        indices = []
        for choice in space.choices:
            place = position + .25 * torch.randn((), generator=noise).item()
            indices.append(min(max(int(place * len(choice.values)), 0), len(choice.values) - 1))
        archs[space.decode(indices)] = None
    return list(archs)


def measure_archs(
        net: nn.Module, archs: Sequence[Arch], setup: Setup, partial: str | os.PathLike, max_spread: float = MAX_SPREAD,
        progress: bool = True,
) -> list[Timing]:
    """Measure subnets of a supernet in turns with that of its smallest arch.

    Args:
        net: The supernet.
        archs: The archs.
        setup: How they run.
        partial: File in which results are kept, and from which an interrupted measurement continues.
        max_spread: Largest uncertainty of a latency, relative to it.
        progress: Show a progress bar if the standard error stream is a terminal.

    Raises:
        ValueError: If the backend is not installed, if `partial` is of another measurement, or if the machine is busy.
    """
    check_backend(setup.backend, setup.device)
    file = ArchFile(
        partial,
        dict(asdict(setup), space=fingerprint(net.space), machine=machine(), versions=versions_of(setup.backend)),
        Timing._fields, 'give another --name')
    done = {arch: Timing(*numbers) for arch, numbers in file.read(net.space).items()}
    net = net.eval()
    with ExitStack() as stack:
        reference = stack.enter_context(_prepared(net, net.space.smallest, setup))
        bar = tqdm(archs, desc='measuring', unit='subnet', disable=None if progress else True)
        for number, arch in enumerate(bar):
            if arch not in done:
                with _prepared(net, arch, setup) as run:
                    done[arch] = measure(run, reference, f'subnet {number + 1} of {len(archs)}', max_spread)
                file.append(arch, done[arch])
    return [done[arch] for arch in archs]


def _prepared(net: nn.Module, arch: Arch, setup: Setup) -> Any:
    subnet = extract(net, arch).to(setup.device)
    noise = torch.Generator().manual_seed(0)
    images = torch.randn(setup.batch_size, *subnet.pretrained_cfg['input_size'], generator=noise).to(setup.device)
    return prepared(subnet, images, setup.backend, setup.threads)


def machine() -> str:
    """The processor of this machine."""
    for line in Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else ():
        if line.startswith('model name'):
            return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


# -- the device file ---------------------------------------------------------------------------------------------------


class UnpredictableError(ValueError):
    """Measured latencies that a predictor cannot tell from noise."""


def create_device(
        space: SearchSpace, archs: Sequence[Arch], seconds: Sequence[float], name: str, setup: Setup,
        spread: float = 0., **facts: Any,
) -> Device:
    """The device file of measured latencies, with the predictor that is fitted to them.

    Args:
        space: The bound space of the supernet.
        archs: The archs that were measured.
        seconds: Their latencies.
        name: Name of the device.
        setup: How they ran.
        spread: Of the measurements.
        **facts: `machine` and `versions`, as for `Device`.

    Raises:
        UnpredictableError: If the predictor is wrong by more than the latency itself.
        ValueError: If there are too few archs, or scipy is not installed.
    """
    if len(archs) < FEWEST:
        raise ValueError(f'{len(archs)} archs are too few for a predictor; measure {FEWEST} or more, and better 200')
    prices, error = fit_predictor(space, archs, seconds)
    if not error['p95'] < 1:  # no budget would bound anything
        raise UnpredictableError(
            f'latencies are predicted with an error of {error["p95"]:.0%} (95th percentile), so that no budget would '
            'bound them; measure again, while nothing else runs, or more archs')
    return Device(
        name=name, space=fingerprint(space), **asdict(setup), prices=prices, error=error, archs=len(archs),
        spread=spread, **facts)
