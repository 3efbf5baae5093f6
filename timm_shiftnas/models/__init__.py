"""Models; importing this registers them with timm."""
from .shiftformer import ShiftFormer, ShiftFormerSupernet
from .subnet import Subnet, extract

__all__ = ['ShiftFormer', 'ShiftFormerSupernet', 'Subnet', 'extract']
