"""Time of a supernet's forward + backward at an arch against the extracted network: a ratio from one interleaved run.

    python benchmarks/supernet_step.py --model shiftformer_tiny_supernet --batch-size 8

Prints, for the smallest, a sampled and the largest arch, the median times and the median of the pairwise ratios.
"""
from __future__ import annotations

import argparse
import statistics
import time

import timm
import torch

import timm_shiftnas


def step_time(run, parameters, device: torch.device) -> float:
    """Seconds of one forward and backward, as a training step has them: gradients start as None."""
    for parameter in parameters:
        parameter.grad = None
    if device.type == 'cuda':
        torch.cuda.synchronize()
    start = time.perf_counter()
    run().sum().backward()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='shiftformer_tiny_supernet')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--device', default='cpu')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    net = timm.create_model(args.model).to(device).train()
    images = torch.randn(args.batch_size, net.in_chans, *net.patch_embed.img_size, device=device)
    archs = dict(
        smallest=net.space.smallest, sampled=net.space.sample(torch.Generator().manual_seed(0)),
        largest=net.space.largest)
    for name, arch in archs.items():
        plain = timm_shiftnas.extract(net, arch)
        runs = [(lambda: net(images, arch), list(net.parameters())), (lambda: plain(images), list(plain.parameters()))]
        times: list[list[float]] = [[], []]
        for number in range(args.rounds + 2):
            for which in (0, 1) if number % 2 else (1, 0):
                seconds = step_time(*runs[which], device)
                if number >= 2:
                    times[which].append(seconds)
        ratio = statistics.median(a / b for a, b in zip(*times))
        supernet, extracted = (statistics.median(values) for values in times)
        print(f'{name:9s} {net.macs(arch) / 1e9:6.3f} GMACs  supernet {supernet * 1e3:7.1f} ms  '
              f'extracted {extracted * 1e3:7.1f} ms  ratio {ratio:.3f}')


if __name__ == '__main__':
    main()
