#!/usr/bin/env python3
"""Train a supernet with ShiftNAS, with the flags of timm's training script; the same as `timm-shiftnas train`.

    python train.py --data-dir /data/imagenet --model shiftformer_tiny_supernet --epochs 300 --output runs
"""
import signal
import sys

if __name__ == '__main__':
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next import takes a moment
    from timm_shiftnas_cli.interrupts import CtrlC
    interruptible = CtrlC('train.py').raised
    from timm_shiftnas.training.trainer import launch  # imports take seconds
    with interruptible():
        code = launch()
    sys.exit(code)
