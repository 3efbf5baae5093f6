"""Elastic layers of transformers and CNNs: timm's layers with a forward that takes the widths to compute."""
from .conv import (
    Bypass,
    ConvWidths,
    ElasticBatchNorm,
    ElasticConv2d,
    ElasticConvBnAct,
    ElasticDepthwiseConv2d,
    ElasticDepthwiseSeparableConv,
    ElasticEdgeResidual,
    ElasticInvertedResidual,
    ElasticProjection,
    ElasticSqueezeExcite,
    ElasticStem,
    IdentityShortcut,
    NoShortcut,
    ProjectedDepthwiseSeparableConv,
    ProjectedInvertedResidual,
    Projection,
    WidthShortcut,
    elastic_kernel,
    keep_activations,
    make_elastic,
    normalize,
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
    'BlockWidths', 'Bypass', 'ConvWidths', 'ElasticAttention', 'ElasticBatchNorm', 'ElasticBlock', 'ElasticConv2d',
    'ElasticConvBnAct', 'ElasticDepthwiseConv2d', 'ElasticDepthwiseSeparableConv', 'ElasticEdgeResidual',
    'ElasticInvertedResidual', 'ElasticLayerNorm', 'ElasticLinear', 'ElasticMlp', 'ElasticPatchEmbed',
    'ElasticProjection', 'ElasticQKV', 'ElasticSqueezeExcite', 'ElasticStem', 'IdentityShortcut', 'NoShortcut',
    'ProjectedDepthwiseSeparableConv', 'ProjectedInvertedResidual', 'Projection', 'RelativeAttention', 'RelativeBlock',
    'RelativeIndex', 'RelativePosition2d', 'WidthShortcut', 'elastic_kernel', 'extend_table', 'keep_activations',
    'make_elastic', 'masked', 'normalize', 'resize',
]
