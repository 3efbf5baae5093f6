#!/usr/bin/env python3
"""Train a supernet with ShiftNAS, with the flags of timm's training script; the same as `timm-shiftnas train`.

    python train.py --data-dir /data/imagenet --model shiftformer_tiny_supernet --epochs 300 --output runs
"""
import sys

if __name__ == '__main__':
    try:
        from timm_shiftnas.training.trainer import launch
    except KeyboardInterrupt:  # imports take seconds
        sys.exit('train.py: interrupted')
    sys.exit(launch())
