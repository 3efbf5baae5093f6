"""Architectures: search spaces, archs, their resources and masks. Of networks, only the base class `Supernet`."""
from .complexity import macs, params
from .core import Arch, Choice, SearchSpace
from .elastic_cnn import CnnMasks, elastic_cnn_space
from .elastic_vit import elastic_vit_space
from .families import Family, families, family_of, register_family, space_from_dict, space_of_family
from .matrix_mapping import Size, arch_masks, nested
from .operators import OperatorTable
from .resources import MACS, MEMORY, PARAMS, RESOURCES, SIZES, Resource
from .shiftformer import ShiftFormerMasks, shiftformer_space
from .shiftmobilenet import BlockMasks, ShiftMobileNetMasks, block_table, shiftmobilenet_space
from .supernet import Supernet, is_supernet

__all__ = [
    'Arch', 'BlockMasks', 'Choice', 'CnnMasks', 'Family', 'MACS', 'MEMORY', 'OperatorTable', 'PARAMS', 'RESOURCES',
    'Resource', 'SIZES', 'SearchSpace', 'ShiftFormerMasks', 'ShiftMobileNetMasks', 'Size', 'Supernet', 'arch_masks',
    'block_table', 'elastic_cnn_space', 'elastic_vit_space', 'families', 'family_of', 'is_supernet', 'macs',
    'nested', 'params', 'register_family', 'shiftformer_space', 'shiftmobilenet_space', 'space_from_dict',
    'space_of_family',
]
