#!/usr/bin/env python3
"""Train a supernet with ShiftNAS, with the flags of timm's training script; the same as `timm-shiftnas train`.

    python train.py --data-dir /data/imagenet --model shiftformer_tiny_supernet --epochs 300 --output runs
"""
import sys

if __name__ == '__main__':
    from timm_shiftnas_cli.interrupts import CtrlC
    interruptible = CtrlC('train.py').raised
    from timm_shiftnas.training.trainer import launch  # imports take seconds
    with interruptible():
        code = launch()
    sys.exit(code)
