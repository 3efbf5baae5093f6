"""Train the subnets that a supernet's generator proposes, each alone: from scratch or from inherited weights.

    python benchmarks/train_subnet.py --supernet output/NAME/model --results-file subnets.json --epochs 5 FLAGS
    python benchmarks/train_subnet.py --elastic BASE --pretrained-path FILE --results-file subnets.json FLAGS

FLAGS are those of `train.py` (data, batch size, learning rate, augmentation). The second form prunes the subnets out of
a trained network of timm, whose units are sorted by importance. `--archs FILE` takes a JSON list of archs instead, and
`--groups 1 8` the archs of some groups only. Results are saved after every subnet, so that an interrupted run continues
with the next one.
"""
from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import runs
import timm
import torch
from timm.data import resolve_input_data_config
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask
from timm.utils import random_seed, unwrap_model

import timm_shiftnas
from timm_shiftnas.evaluation.accuracy import evaluate
from timm_shiftnas.method import ArchitectureGenerator, BudgetGroups
from timm_shiftnas.models.calibration import ResizedInput
from timm_shiftnas.training.data import Loaders, create_loaders, open_data, without_useless_shift
from timm_shiftnas.training.elastic import elastic_network
from timm_shiftnas.training.flags import parse_args
from timm_shiftnas.training.setup import choose_num_classes, create_network, model_args, scaled_lr
from timm_shiftnas.utils import seed_process
from timm_shiftnas.utils.distributed import Ranks


def train(net: torch.nn.Module, loaders: Loaders, args: argparse.Namespace, device: torch.device) -> float:
    """Train as `train.py` does, without drawing archs; images and augmentation are those of its seed.

    Returns:
        Seconds: those of the median epoch times the number of epochs.
    """
    task = ClassificationTask(net, criterion_kwargs=dict(loss_type='ce', smoothing=args.smoothing), device=device,
                              verbose=False)
    optimizer = create_optimizer_v2(unwrap_model(net), **optimizer_kwargs(cfg=args))
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=len(loaders.train))
    seconds = []
    for epoch in range(epochs):
        begun = time.monotonic()
        scheduler.step(epoch)
        net.train()
        for number, (images, targets) in enumerate(loaders.train.epoch(epoch)):
            seed_process(args.seed, f'step/{epoch}/0', number)
            task(images, targets)['loss'].backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds.append(time.monotonic() - begun)
    return median(seconds) * epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('--supernet', metavar='DIR', help='model directory that train.py wrote')
    parser.add_argument('--groups', type=runs.positive, nargs='+', metavar='K', help='groups, from 1 (default: all)')
    parser.add_argument('--archs', type=Path, metavar='FILE', help='JSON list of archs (default: one per group)')
    parser.add_argument('--from-scratch', action='store_true', help='new weights instead of inherited ones')
    parser.add_argument('--results-file', type=Path, required=True, metavar='FILE')
    own, flags = parser.parse_known_args()
    args = parse_args(flags)
    names = 'mixup', 'cutmix', 'amp', 'clip_grad', 'model_ema', 'bce_loss', 'resume', 'layer_decay'
    ignored = [name for name in names if getattr(args, name)]
    if ignored:
        parser.error(f'a subnet is trained without --{ignored[0].replace("_", "-")}; leave it out')
    timm.utils.setup_default_logging()
    device, data = torch.device(args.device), open_data(args)
    if own.supernet is not None:
        net, generator = timm_shiftnas.load_supernet(own.supernet)
    elif args.elastic is not None:
        args.num_classes = choose_num_classes(args, data)
        net, _, _ = elastic_network(args, model_args(args), data, device, Ranks())
        generator = ArchitectureGenerator(net.space, seed=args.seed)
        generator.fit(steps=args.generator_fit_steps, seed=args.seed, progress=False)
    else:
        parser.error('there is no network: give --supernet DIR or --elastic BASE')
    space, args.num_classes = net.space, net.num_classes
    groups = BudgetGroups.of_space(space, count=args.num_groups)
    data = without_useless_shift(args, data, len(groups))
    if own.archs:
        targets = [(None, None, space.from_dict(arch)) for arch in json.loads(own.archs.read_text())]
    else:
        archs = generator.propose_many(groups.budgets)
        targets = [(k + 1, budget, arch) for k, (budget, arch) in enumerate(zip(groups.budgets, archs))]
    results = json.loads(own.results_file.read_text()) if own.results_file.exists() else []
    targets = [target for target in targets if own.groups is None or target[0] in own.groups]
    config = resolve_input_data_config(net, vars(args))
    args.lr = scaled_lr(args)
    for number, (group, budget, arch) in enumerate(targets):
        if number < len(results):
            continue
        random_seed(args.seed)
        loaders = create_loaders(args, data, config, device)
        plain = ResizedInput(timm_shiftnas.extract(net, arch).to(device))
        inherited = evaluate(plain, loaders.validation, device)[0]
        if own.from_scratch:
            new = net.build_subnet(arch) if args.elastic else timm_shiftnas.extract(create_network(args, device), arch)
            plain = ResizedInput(new.to(device))
        seconds = train(plain, loaders, args, device)
        results.append(dict(group=group, budget=budget, macs=net.macs(arch), arch=arch.to_dict(), inherited=inherited,
                            top1=evaluate(plain, loaders.validation, device)[0], seconds=seconds))
        logging.getLogger('train').info(f'{json.dumps(results[-1])}')
        runs.write(own.results_file, json.dumps(results))


if __name__ == '__main__':
    main()
