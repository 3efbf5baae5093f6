"""Weight-sharing neural architecture search for timm, with ShiftNAS (Zhang et al., ICCV 2023, arXiv 2307.08300).

Importing the package registers its supernets with timm.
"""
from .hub import from_pretrained, load_supernet, push_directory, push_to_hub, save_pretrained
from .method import ArchitectureGenerator
from .method.loop import create_task
from .models import Subnet, calibrate_bn, extract, ofa_space
from .space import Arch, SearchSpace, macs, params, shiftformer_space, shiftmobilenet_space

__version__ = '0.1.0'
__all__ = [
    'Arch', 'ArchitectureGenerator', 'SearchSpace', 'Subnet', 'calibrate_bn', 'create_task', 'extract',
    'from_pretrained', 'load_supernet', 'macs', 'ofa_space', 'params', 'push_directory', 'push_to_hub',
    'save_pretrained', 'shiftformer_space', 'shiftmobilenet_space',
]
