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
from .heads import (
    FeatureSum,
    PrefixConv2d,
    PrefixConvTranspose2d,
    SimpleFeaturePyramid,
    elastic_inputs,
    input_channels,
    keep_inputs,
    make_inputs_elastic,
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
    'ElasticProjection', 'ElasticQKV', 'ElasticSqueezeExcite', 'ElasticStem', 'FeatureSum', 'IdentityShortcut',
    'NoShortcut', 'PrefixConv2d', 'PrefixConvTranspose2d', 'ProjectedDepthwiseSeparableConv',
    'ProjectedInvertedResidual', 'Projection', 'RelativeAttention', 'RelativeBlock', 'RelativeIndex',
    'RelativePosition2d', 'SimpleFeaturePyramid', 'WidthShortcut', 'elastic_inputs', 'elastic_kernel', 'extend_table',
    'input_channels', 'keep_activations', 'keep_inputs', 'make_elastic', 'make_inputs_elastic', 'masked',
    'normalize', 'resize',
]
