"""Elastic layers of transformers and CNNs: timm's layers with a forward that takes the widths to compute."""
from .conv import (
    ConvWidths,
    ElasticBatchNorm,
    ElasticConv2d,
    ElasticConvBnAct,
    ElasticDepthwiseConv2d,
    ElasticDepthwiseSeparableConv,
    ElasticInvertedResidual,
    ElasticProjection,
    ElasticSqueezeExcite,
    IdentityShortcut,
    NoShortcut,
    ProjectedDepthwiseSeparableConv,
    ProjectedInvertedResidual,
    Projection,
    WidthShortcut,
    elastic_kernel,
    make_elastic,
    resize,
)
from .relative_position import RelativeAttention, RelativeBlock, RelativeIndex, RelativePosition2d, extend_table
from .vit import (
    BlockWidths,
    ElasticAttention,
    ElasticBlock,
    ElasticLayerNorm,
    ElasticLinear,
    ElasticMlp,
    ElasticPatchEmbed,
    ElasticQKV,
)
from .widths import masked

__all__ = [
    'BlockWidths', 'ConvWidths', 'ElasticAttention', 'ElasticBatchNorm', 'ElasticBlock', 'ElasticConv2d',
    'ElasticConvBnAct', 'ElasticDepthwiseConv2d', 'ElasticDepthwiseSeparableConv', 'ElasticInvertedResidual',
    'ElasticLayerNorm', 'ElasticLinear', 'ElasticMlp', 'ElasticPatchEmbed', 'ElasticProjection', 'ElasticQKV',
    'ElasticSqueezeExcite', 'IdentityShortcut', 'NoShortcut', 'ProjectedDepthwiseSeparableConv',
    'ProjectedInvertedResidual', 'Projection', 'RelativeAttention', 'RelativeBlock', 'RelativeIndex',
    'RelativePosition2d', 'WidthShortcut', 'elastic_kernel', 'extend_table', 'make_elastic', 'masked', 'resize',
]
