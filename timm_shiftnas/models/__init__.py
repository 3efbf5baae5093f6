"""Supernets and their static subnets; importing this registers them with timm."""
from .calibration import BatchNormCalibration, ResizedInput, bn_statistics, calibrate_bn, has_batch_norm
from .shiftformer import ShiftFormer, ShiftFormerSupernet
from .shiftmobilenet import ElasticEfficientNet, ElasticMobileNetV3, arch_space, ofa_space, stock_blocks
from .subnet import Subnet, extract, present_args, static_counts, static_space, stock_description

__all__ = [
    'BatchNormCalibration', 'ElasticEfficientNet', 'ElasticMobileNetV3', 'ResizedInput', 'ShiftFormer',
    'ShiftFormerSupernet', 'Subnet', 'arch_space', 'bn_statistics', 'calibrate_bn', 'extract', 'has_batch_norm',
    'ofa_space', 'present_args', 'static_counts', 'static_space', 'stock_blocks', 'stock_description',
]
