"""What models are made of, each with one plain torch form and, where it pays, a CPU kernel. Imports no model."""

from distserve.engine.layers.activation import gelu_tanh, silu_mul
from distserve.engine.layers.attention import StepLayout, attention, rope_attention
from distserve.engine.layers.linear import Embedding, GatedLinear, Linear, MergedLinear
from distserve.engine.layers.norm import add_rms_norm, layer_norm, rms_norm
from distserve.engine.layers.rope import Rotary
from distserve.engine.layers.shared import Head, RowLinear, VocabularyEmbedding
from distserve.engine.layers.stack import AttentionShape, BlockParts, Stack

__all__ = [
    "AttentionShape",
    "BlockParts",
    "Embedding",
    "GatedLinear",
    "Head",
    "Linear",
    "MergedLinear",
    "Rotary",
    "RowLinear",
    "Stack",
    "StepLayout",
    "VocabularyEmbedding",
    "add_rms_norm",
    "attention",
    "gelu_tanh",
    "layer_norm",
    "rms_norm",
    "rope_attention",
    "silu_mul",
]
