"""Weight-sharing neural architecture search for timm, with ShiftNAS (Zhang et al., ICCV 2023, arXiv 2307.08300).

Importing the package registers its supernets with timm.
"""
from .calibration import calibrate_bn
from .complexity import macs, params
from .generator import ArchitectureGenerator
from .hub import from_pretrained, load_supernet, save_pretrained
from .models import Subnet, extract, ofa_space
from .publish import push_directory, push_to_hub
from .space import Arch, SearchSpace, shiftformer_space, shiftmobilenet_space

__version__ = '0.1.0'
__all__ = [
    'Arch', 'ArchitectureGenerator', 'SearchSpace', 'Subnet', 'calibrate_bn', 'extract', 'from_pretrained',
    'load_supernet', 'macs', 'ofa_space', 'params', 'push_directory', 'push_to_hub', 'save_pretrained',
    'shiftformer_space', 'shiftmobilenet_space',
]
