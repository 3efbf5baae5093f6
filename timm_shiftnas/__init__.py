"""Weight-sharing neural architecture search for timm, with ShiftNAS (Zhang et al., ICCV 2023, arXiv 2307.08300).

Importing the package registers its supernets with timm.
"""
from typing import Any

from .hub import from_pretrained, load_supernet, push_directory, push_to_hub, save_pretrained
from .method import ArchitectureGenerator
from .models import (
    ElasticBackbone,
    ElasticModel,
    Subnet,
    calibrate_bn,
    elastic,
    extract,
    ofa_space,
    sort_by_importance,
)
from .space import Arch, SearchSpace, macs, params, shiftformer_space, shiftmobilenet_space

__version__ = '0.1.0'
__all__ = [
    'Arch', 'ArchitectureGenerator', 'ElasticBackbone', 'ElasticModel', 'SearchSpace', 'Subnet', 'calibrate_bn',
    'create_task', 'elastic', 'extract', 'from_pretrained', 'load_supernet', 'macs', 'ofa_space', 'params',
    'push_directory', 'push_to_hub', 'save_pretrained', 'search', 'shiftformer_space', 'shiftmobilenet_space',
    'sort_by_importance',
]


def __getattr__(name: str) -> Any:
    """Import what needs `timm.task`, which is young and not in every timm, when it is used."""
    if name == 'create_task':
        from .method.loop import create_task
        return create_task
    if name == 'search':
        from .evaluation.search import search
        return search
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
