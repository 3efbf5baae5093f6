"""Elastic layers: timm's layers whose forward takes the widths to compute, of transformers and of CNNs."""
from . import conv, vit
from .conv import *
from .vit import *

__all__ = [*conv.__all__, *vit.__all__]
