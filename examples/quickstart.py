"""Train a supernet of small vision transformers on images of digits, then take networks for three budgets out of it.

    pip install -e '.[quickstart]'
    python examples/quickstart.py                                       # two minutes on a CPU
    python examples/quickstart.py --epochs 1 --experiment short         # any flag of train.py
"""
import subprocess
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from timm.data import create_transform, resolve_data_config
from torchvision.transforms.functional import to_pil_image

import timm_shiftnas as tsn

ROOT = Path(__file__).parents[1]
flags = sys.argv[1:]
output = Path(flags[flags.index('--output') + 1] if '--output' in flags else 'output')
name = flags[flags.index('--experiment') + 1] if '--experiment' in flags else 'quickstart'
subprocess.run([sys.executable, ROOT / 'train.py', '-c', ROOT / 'configs/quickstart.yaml', *flags], check=True)
