"""Weight-sharing neural architecture search for timm, with ShiftNAS (Zhang et al., ICCV 2023, arXiv 2307.08300).

Importing the package registers its supernets with timm.
"""
from .complexity import macs, params
from .generator import ArchitectureGenerator
from .hub import from_pretrained, load_supernet, save_pretrained
from .models import Subnet, extract
from .space import Arch, SearchSpace, shiftformer_space

__version__ = '0.1.0'
__all__ = [
    'Arch', 'ArchitectureGenerator', 'SearchSpace', 'Subnet', 'extract', 'from_pretrained', 'load_supernet', 'macs',
    'params', 'save_pretrained', 'shiftformer_space',
]
