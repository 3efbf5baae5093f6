"""Supernets and their static subnets; importing this registers them with timm."""
from ._supernet import TimmSupernet, plain_state_dict
from .backbone import ElasticBackbone, StaticBackbone
from .calibration import BatchNormCalibration, ResizedInput, bn_statistics, calibrate_bn, has_batch_norm
from .elastic import elastic
from .elastic_cnn import ElasticEfficientNet, ElasticMobileNetV3, ElasticPretrainedCnn
from .elastic_model import ElasticModel, backbone_of, static_model, with_backbone
from .elastic_vit import ElasticVisionTransformer
from .importance import sort_by_importance
from .shiftformer import ShiftFormer, ShiftFormerSupernet
from .shiftmobilenet import EfficientNetSupernet, MobileNetV3Supernet, ShiftMobileNetSupernet, ofa_space
from .subnet import (
    Subnet,
    bound_space,
    describe_images,
    extract,
    present_args,
    static_counts,
    static_space,
    stock_description,
)

__all__ = [
    'BatchNormCalibration', 'EfficientNetSupernet', 'ElasticBackbone', 'ElasticEfficientNet', 'ElasticMobileNetV3',
    'ElasticModel', 'ElasticPretrainedCnn', 'ElasticVisionTransformer', 'MobileNetV3Supernet', 'ResizedInput',
    'ShiftFormer', 'ShiftFormerSupernet', 'ShiftMobileNetSupernet', 'StaticBackbone', 'Subnet', 'TimmSupernet',
    'backbone_of', 'bn_statistics', 'bound_space', 'calibrate_bn', 'describe_images', 'elastic', 'extract',
    'has_batch_norm', 'ofa_space', 'plain_state_dict', 'present_args', 'sort_by_importance', 'static_counts',
    'static_model', 'static_space', 'stock_description', 'with_backbone',
]
