"""What an architecture is: search spaces, archs, their MACs and parameters, and their masks. No networks."""
from .core import Arch, Choice, SearchSpace, shiftformer_space, shiftmobilenet_space, space_from_dict
from .supernet import Supernet, is_supernet
from .complexity import macs, macs_range, params
from .matrix_mapping import ArchMasks, BlockMasks, MobileNetMasks, arch_masks
from .shiftmobilenet import (
    BlockChoices, BlockShape, HEAD_RATIO, block_choices, block_shapes, output_side, se_width, width_choices,
)

__all__ = [
    'Arch', 'ArchMasks', 'BlockChoices', 'BlockMasks', 'BlockShape', 'Choice', 'HEAD_RATIO', 'MobileNetMasks',
    'SearchSpace', 'Supernet', 'arch_masks', 'block_choices', 'block_shapes', 'is_supernet', 'macs', 'macs_range',
    'output_side', 'params', 'se_width', 'shiftformer_space', 'shiftmobilenet_space', 'space_from_dict',
    'width_choices',
]
