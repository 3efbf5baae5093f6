"""Time and memory, as ratios of medians from one interleaved run each.

    python benchmarks/speed.py supernet            # supernet at an arch / the extracted network
    python benchmarks/speed.py step                # a ShiftNAS step / a uniform step, and its parts
    python benchmarks/speed.py per-mac             # time per MAC / that of timm's vit_tiny_patch16_224
    python benchmarks/speed.py relative-position   # fused attention / gathered tables
    python benchmarks/speed.py generator           # seconds of fit(), milliseconds of propose(), on every space
    python benchmarks/speed.py calibration         # images per second of calibrate_bn / of plain inference
    python benchmarks/speed.py memory              # peak memory of ShiftNAS updates / of uniform ones
    python benchmarks/speed.py scaling             # an update of one process / of two with as many images each

`--model shiftmobilenet_supernet` measures the CNN (supernet, step, calibration), `--model elastic_supernet --base NAME`
a network of timm (supernet), `--device cuda --amp` bf16 autocast, `--channels-last` that memory layout, and
`--torchcompile` compiled networks. Images per second, and their share of the matrix rate (a large matrix product of the
same type in the same run), are printed with the ratios.
"""
from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import timm_shiftnas
from timm_shiftnas.layers import RelativePosition2d
from timm_shiftnas.method import ArchitectureGenerator, BudgetGroups
from timm_shiftnas.method.config import ShiftNASConfig
from timm_shiftnas.method.task import EveryArch, ShiftNASTask
from timm_shiftnas.space import Arch

REAL = (
    'shiftformer_tiny_supernet', 'shiftformer_small_supernet', 'shiftformer_base_supernet', 'shiftmobilenet_supernet',
    'attentivenas_supernet', 'ofa_mobilenetv3_supernet', 'ofa_mobilenetv3_w12_supernet')
PATCHES = dict(grid_size=(14, 14), num_prefix=1, max_distance=14)


class Bench:
    """Device, precision and timing of a measurement."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16) if args.amp else nullcontext
        self._rate: float | None = None

    def synchronize(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize()

    def interleave(self, cases: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of every case in each round, in rotating order, after two rounds of warm-up."""
        times: dict[str, list[float]] = {name: [] for name in cases}
        names = list(cases)
        for number in range(self.args.rounds + 2):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                self.synchronize()
                start = time.perf_counter()
                cases[name]()
                self.synchronize()
                if number >= 2:
                    times[name].append(time.perf_counter() - start)
        return times

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.args.channels_last else torch.contiguous_format

    def network(self) -> nn.Module:
        """The measured supernet, in training mode."""
        base = {} if self.args.base is None else dict(base=self.args.base)
        net = timm.create_model(self.args.model, **base)
        return net.to(self.device, memory_format=self.layout).train()

    def images(self, net: nn.Module, arch: Arch | None = None) -> torch.Tensor:
        """A batch for a supernet, at the resolution of the arch if it has one."""
        size = getattr(arch, 'resolution', net.pretrained_cfg['input_size'][-1])
        images = torch.randn(self.args.batch_size, net.in_chans, size, size, device=self.device)
        return images.contiguous(memory_format=self.layout)

    def forward(self, call: Callable[[], torch.Tensor]) -> None:
        with torch.no_grad(), self.autocast():
            call()

    def backward(self, net: nn.Module, call: Callable[[], torch.Tensor]) -> None:
        """Run forward and backward as in training; gradients start as None."""
        for parameter in net.parameters():
            parameter.grad = None
        with self.autocast():
            loss = call().float().logsumexp(-1).mean()
        loss.backward()

    def compiled(self, net: nn.Module) -> nn.Module:
        return torch.compile(net, dynamic=True) if self.args.torchcompile else net

    def rate(self) -> float:
        """MACs per second of a large matrix product in the precision of the networks."""
        if self._rate is None:
            size = 8192 if self.device.type == 'cuda' else 2048
            dtype = torch.bfloat16 if self.args.amp else torch.float32
            a, b = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
            self._rate = size ** 3 / median(self.interleave({'matmul': lambda: a @ b})['matmul'])
        return self._rate

    def speed(self, macs: float, seconds: float) -> str:
        """Images per second, and the share of the matrix rate for `macs` per batch."""
        return f'{self.args.batch_size / seconds:8.1f} images/s  {macs / seconds / self.rate():4.0%} of the matrix rate'


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    """Median of the ratios of single rounds: slowdowns of a whole round cancel."""
    return median(a / b for a, b in zip(times[above], times[below]))


def some_archs(net: nn.Module) -> dict[str, Arch]:
    return dict(smallest=net.space.smallest, sampled=net.space.sample(torch.Generator().manual_seed(0)),
                largest=net.space.largest)


def supernet(bench: Bench) -> None:
    net = bench.network()
    run = bench.compiled(net)
    for name, arch in some_archs(net).items():
        images = bench.images(net, arch)
        plain = timm_shiftnas.extract(net, arch).train()
        static = torch.compile(plain) if bench.args.torchcompile else plain
        times = bench.interleave(dict(
            supernet=lambda: bench.backward(net, lambda: run(images, arch)),
            extracted=lambda: bench.backward(plain, lambda: static(images))))
        seconds = {key: median(values) for key, values in times.items()}
        print(f'{name:9s} {net.macs(arch) / 1e9:6.3f} GMACs  supernet {seconds["supernet"] * 1e3:8.1f} ms  '
              f'extracted {seconds["extracted"] * 1e3:8.1f} ms  ratio {ratio(times, "supernet", "extracted"):.3f}  '
              f'{bench.speed(3 * net.macs(arch) * len(images), seconds["supernet"])}', flush=True)


def step_parts(bench: Bench, arch: Arch | None = None) -> tuple[dict[str, Callable[[], None]], ShiftNASTask, Arch]:
    """The parts of a ShiftNAS update, the uniform step first; at a middle arch unless one is given."""
    net = bench.network()
    size, count = bench.args.batch_size, bench.args.shift_batch_size
    images, targets = bench.images(net), torch.randint(net.num_classes, (size,), device=bench.device)
    shift = torch.randn(count, *images.shape[1:]), torch.randint(net.num_classes, (count,))
    config = ShiftNASConfig(
        shift=bench.args.shift, generator_images=bench.args.generator_images, total_updates=10 ** 6)
    groups = BudgetGroups.of_space(net.space)
    task = ShiftNASTask(
        net, config=config, generator=ArchitectureGenerator(net.space).fit(), groups=groups,
        shift_batches=lambda n: (shift, shift), device=bench.device, verbose=False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6, fused=bench.device.type == 'cuda')
    now = task._step(images, targets)
    if arch is None:
        archs = task.generator.propose_many([sum(pair) / 2 for pair in zip(groups.edges, groups.edges[1:])])
        arch = archs[len(archs) // 2]

    def train() -> None:
        with bench.autocast():
            loss = task.criterion(net(images, arch), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def generator() -> None:
        with bench.autocast():
            task.sampler.update_generator(now)

    def draw() -> None:
        task.sampler.archs.clear()
        task._draw_archs(now)

    parts = {'uniform step': train, 'generator update': generator, 'drawing archs': draw}
    if config.shift != 'none':
        parts['shift update'] = lambda: task.sampler.update_shift(now)
    return parts, task, arch


def step(bench: Bench) -> None:
    """Print the parts of a ShiftNAS step, weighted by their intervals, and their sum."""
    parts, task, arch = step_parts(bench)
    config, size, count = task.config, bench.args.batch_size, bench.args.shift_batch_size
    every = {'uniform step': 1, 'generator update': config.generator_interval,
             'drawing archs': config.generator_interval}
    if config.shift != 'none':
        every['shift update'] = task.sampler.shift_interval
    times = bench.interleave(parts)
    base = median(times['uniform step'])
    print(f'{bench.args.model}, batch {size}, {len(task.groups)} groups, generator on '
          f'{config.images_for_generator(size)} images, shift {config.shift} on {count}')
    shares = {name: ratio(times, name, 'uniform step') / interval for name, interval in every.items()}
    for name, interval in every.items():
        print(f'{name:17s} {median(times[name]):9.4f} s, every {interval:3d} updates: '
              f'{shares[name]:6.1%} of a uniform step')
    added = sum(shares.values()) - 1
    for accum in sorted({1, max(1024 // size, 1)}):
        print(f'ratio of a ShiftNAS update to a uniform one of the same archs, {accum} x {size} images: '
              f'{1 + added / accum:.3f}')
    print(f'uniform: {bench.speed(3 * timm_shiftnas.macs(task.space, arch) * size, base)}')


def memory(bench: Bench) -> None:
    """Print peak memory, each measured in its own process, at the largest arch, which needs most."""
    peaks = {}
    for name in ('uniform', 'ShiftNAS'):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
            peaks[name] = pool.submit(peak_memory, bench.args, name == 'ShiftNAS').result()
    print(f'{bench.args.model}, batch {bench.args.batch_size}, largest arch, shift {bench.args.shift}: '
          f'uniform {peaks["uniform"] / 2 ** 30:.2f} GiB, ShiftNAS {peaks["ShiftNAS"] / 2 ** 30:.2f} GiB, '
          f'ratio {peaks["ShiftNAS"] / peaks["uniform"]:.3f}')


def peak_memory(args: argparse.Namespace, everything: bool) -> int:
    """Peak bytes of the device's allocator, or of this process on the CPU."""
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    parts, *_ = step_parts(bench, timm.create_model(args.model, device='meta').space.largest)
    for _ in range(2):
        for part in list(parts.values()) if everything else [parts['uniform step']]:
            part()
    if bench.device.type == 'cuda':
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def scaling(bench: Bench) -> None:
    """Print the speed of two processes of one thread each against one, and the cost of DDP's parameter search."""
    with TemporaryDirectory() as folder:
        context = multiprocessing.get_context('spawn')
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            runs = [pool.submit(time_process, bench.args, f'file://{folder}/store', rank) for rank in range(2)]
            times, _ = [run.result() for run in runs]
    size, seconds = bench.args.batch_size, {name: median(values) for name, values in times.items()}
    print(f'{bench.args.model}, {size} images per process, one thread each:')
    for name, value in seconds.items():
        processes = 1 if name == 'alone' else 2
        print(f'{name:30s} {value * 1e3:8.1f} ms per update  {processes * size / value:7.1f} images/s')
    print(f'two processes are {2 * ratio(times, "alone", "together"):.2f} times as fast as one; '
          f'finding unused parameters costs {ratio(times, "together", "told that all are used") - 1:.1%}')


def time_process(args: argparse.Namespace, store: str, rank: int) -> dict[str, list[float]]:
    """Seconds of the updates of this process in each round; for 'alone' the other process waits."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=store, rank=rank, world_size=2)
    bench = Bench(args)
    plain = bench.network()
    images, arch = bench.images(plain), plain.space.largest
    nets = {None: plain} | {  # separate networks: DDP leaves its hooks on what it wraps
        found: nn.parallel.DistributedDataParallel(EveryArch(bench.network()), find_unused_parameters=found)
        for found in (True, False)}
    optimizers = {key: torch.optim.AdamW(net.parameters(), lr=1e-6) for key, net in nets.items()}

    def update(key: bool | None) -> None:
        bench.backward(nets[key], lambda: nets[key](images, arch))
        optimizers[key].step()

    def alone() -> None:
        if rank == 0:
            update(None)
        dist.barrier()

    times = bench.interleave({
        'alone': alone, 'together': lambda: update(True), 'told that all are used': lambda: update(False)})
    dist.destroy_process_group()
    return times


def per_mac(bench: Bench) -> None:
    net = bench.network()
    reference = timm.create_model('vit_tiny_patch16_224').to(bench.device).train()
    images = bench.images(net)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # torch 2.14 misses the fused kernel
        reference.eval()(images[:1])
    reference.train()
    cost = {'vit_tiny': counter.get_total_flops() / 2, 'smallest': net.macs(net.space.smallest),
            'largest': net.macs(net.space.largest)}
    run, plain = bench.compiled(net), torch.compile(reference) if bench.args.torchcompile else reference
    calls = {'vit_tiny': (reference, lambda: plain(images)),
             'smallest': (net, lambda: run(images, net.space.smallest)),
             'largest': (net, lambda: run(images, net.space.largest))}
    for title, passes in (('forward', 1), ('forward + backward', 3)):
        cases = {name: partial(bench.forward, call) if passes == 1 else partial(bench.backward, module, call)
                 for name, (module, call) in calls.items()}
        times = bench.interleave(cases)
        for name, macs in cost.items():
            relative = ratio(times, name, 'vit_tiny') * cost['vit_tiny'] / macs
            print(f'{title:18s} {name:9s} {macs / 1e9:6.3f} GMACs {median(times[name]) * 1e3:9.1f} ms  '
                  f'time per MAC / vit_tiny {relative:.3f}  '
                  f'{bench.speed(passes * macs * len(images), median(times[name]))}', flush=True)


def relative_position(bench: Bench) -> None:
    position = RelativePosition2d(**PATCHES).to(bench.device)
    shape = bench.args.batch_size, 3, 197, 64
    q, k, v = (torch.randn(shape, device=bench.device, requires_grad=True) for _ in range(3))
    index = position.index(q)

    def run(attend: Callable) -> None:
        with bench.autocast():
            out = attend(q, k, v, index)
        torch.autograd.grad(out.float().square().mean(), [q, k, v, *position.parameters()])

    times = bench.interleave(dict(
        fused=lambda: run(position.attend), gathered=lambda: run(position.attend_plainly)))
    print(f'forward + backward, 3 heads, 197 tokens, batch {bench.args.batch_size}: '
          f'fused {median(times["fused"]) * 1e3:.1f} ms, gathered {median(times["gathered"]) * 1e3:.1f} ms, '
          f'ratio {ratio(times, "fused", "gathered"):.3f}')


def generator(bench: Bench) -> None:
    for name in REAL:
        space = timm.create_model(name, device='meta').space
        start = time.perf_counter()
        fitted = ArchitectureGenerator(space).fit(progress=False)
        seconds = time.perf_counter() - start
        budgets = torch.linspace(fitted.budget_min, fitted.budget_max, 22, dtype=torch.float64)[1:-1].tolist()
        times = []
        for budget in budgets:
            start = time.perf_counter()
            fitted.propose(budget)
            times.append(time.perf_counter() - start)
        used = [timm_shiftnas.macs(space, arch) / budget
                for arch, budget in zip(fitted.propose_many(budgets), budgets)]
        print(f'{name:28s} fit {seconds:5.1f} s  propose {median(times) * 1e3:5.1f} ms '
              f'(longest {max(times) * 1e3:.1f})  budget use: mean {sum(used) / len(used):.4f}, least {min(used):.4f}',
              flush=True)


def calibration(bench: Bench) -> None:
    net = bench.network()
    for name, arch in some_archs(net).items():
        sub, images = timm_shiftnas.extract(net, arch).eval(), bench.images(net, arch)
        times = bench.interleave(dict(
            calibration=lambda: timm_shiftnas.calibrate_bn(sub, [images] * 4, progress=False),
            inference=lambda: [bench.forward(lambda: sub(images)) for _ in range(4)]))
        rates = {key: 4 * len(images) / median(values) for key, values in times.items()}
        print(f'{name:9s} {net.macs(arch) / 1e9:6.3f} GMACs  calibrate_bn {rates["calibration"]:8.1f} images/s  '
              f'inference {rates["inference"]:8.1f} images/s  ratio {ratio(times, "inference", "calibration"):.3f}',
              flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog='\n'.join(__doc__.splitlines()[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    measures = {'supernet': supernet, 'step': step, 'per-mac': per_mac, 'relative-position': relative_position,
                'generator': generator, 'calibration': calibration, 'memory': memory, 'scaling': scaling}
    parser.add_argument('what', choices=tuple(measures))
    parser.add_argument('--model', default='shiftformer_tiny_supernet')
    parser.add_argument('--base', help='of --model elastic_supernet')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--shift', default='hypergradient', choices=('hypergradient', 'grad_norm', 'variation', 'none'))
    parser.add_argument('--shift-batch-size', type=int, default=32)
    parser.add_argument('--generator-images', type=int)
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--amp', action='store_true', help='bf16 autocast')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--torchcompile', action='store_true', help='compiled networks, of supernet and per-mac')
    args = parser.parse_args()
    if args.torchcompile and args.what not in ('supernet', 'per-mac'):
        parser.error(f'--torchcompile does not apply to {args.what}; leave it out')
    if args.what == 'generator' and args.device != 'cpu':
        parser.error(f'the generator runs on the CPU, not on {args.device}; leave --device out')
    if args.what == 'per-mac' and 'shiftformer' not in args.model:
        parser.error(f'per-mac compares with a ViT; give a ShiftFormer instead of {args.model}')
    if args.what == 'calibration' and 'shiftformer' in args.model:
        parser.error(f'{args.model} has no BatchNorm; give a MobileNet such as shiftmobilenet_supernet')
    torch.set_num_threads(args.threads)
    measures[args.what](Bench(args))


if __name__ == '__main__':
    main()
