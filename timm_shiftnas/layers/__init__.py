"""Elastic layers: timm's layers whose forward takes the widths to compute, of transformers and of CNNs."""
from .conv import (
    ConvWidths, ElasticBatchNorm, ElasticConv2d, ElasticConvBnAct, ElasticDepthwiseConv2d,
    ElasticDepthwiseSeparableConv, ElasticInvertedResidual, ElasticSqueezeExcite, ProjectedDepthwiseSeparableConv,
    ProjectedInvertedResidual, Projection, elastic_kernel, make_elastic, resize,
)
from .relative_position import RelativeAttention, RelativeBlock, RelativeIndex, RelativePosition2d, extend_table
from .vit import (
    BlockWidths, ElasticAttention, ElasticBlock, ElasticLayerNorm, ElasticLinear, ElasticMlp, ElasticPatchEmbed,
    ElasticQKV,
)

__all__ = [
    'BlockWidths', 'ConvWidths', 'ElasticAttention', 'ElasticBatchNorm', 'ElasticBlock', 'ElasticConv2d',
    'ElasticConvBnAct', 'ElasticDepthwiseConv2d', 'ElasticDepthwiseSeparableConv', 'ElasticInvertedResidual',
    'ElasticLayerNorm', 'ElasticLinear', 'ElasticMlp', 'ElasticPatchEmbed', 'ElasticQKV', 'ElasticSqueezeExcite',
    'ProjectedDepthwiseSeparableConv', 'ProjectedInvertedResidual', 'Projection', 'RelativeAttention',
    'RelativeBlock', 'RelativeIndex', 'RelativePosition2d', 'elastic_kernel', 'extend_table', 'make_elastic',
    'resize',
]
