"""Train a supernet of small vision transformers on images of digits, then take networks for three budgets out of it.

    pip install -e '.[quickstart]'
    python examples/quickstart.py                 # about two minutes on a CPU
    python examples/quickstart.py --epochs 5      # a short run; further flags go to train.py
"""
import argparse
import subprocess
import sys
from pathlib import Path

import torch
from timm.data import create_transform, resolve_data_config

import timm_shiftnas as tsn
from timm_shiftnas.data import create_dataset

ROOT = Path(__file__).parents[1]
parser = argparse.ArgumentParser()
parser.add_argument('--output', type=Path, default='output')
args, flags = parser.parse_known_args()

# 1. Train: one set of weights for 1,791,153 networks.
command = [sys.executable, ROOT / 'train.py', '-c', ROOT / 'configs' / 'quickstart.yaml', '--output', args.output]
subprocess.run([*map(str, command), *flags], check=True)

# 2. Take the network for a budget out of it. No search, no retraining.
for budget in ('2M', '4M', '8M'):
    net = tsn.from_pretrained(args.output / 'quickstart' / 'model', flops=budget)

    # 3. Use it as any torch module.
    transform = create_transform(**resolve_data_config(model=net))
    images = create_dataset('sklearn/digits', None, 'validation')
    batch = torch.stack([transform(image) for image, _ in images])
    targets = torch.tensor([target for _, target in images])
    with torch.no_grad():
        top1 = 100 * (net(batch).argmax(1) == targets).float().mean()
    print(f'{budget} MACs: top-1 {top1:.1f}%, {net.arch}')
