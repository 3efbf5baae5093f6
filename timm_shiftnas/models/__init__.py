"""Models; importing this registers them with timm."""
from .shiftformer import ShiftFormer, ShiftFormerSupernet
from .shiftmobilenet import ElasticEfficientNet, ElasticMobileNetV3, arch_space, ofa_space, stock_blocks
from .subnet import Subnet, extract

__all__ = [
    'ElasticEfficientNet', 'ElasticMobileNetV3', 'ShiftFormer', 'ShiftFormerSupernet', 'Subnet', 'arch_space',
    'extract', 'ofa_space', 'stock_blocks',
]
