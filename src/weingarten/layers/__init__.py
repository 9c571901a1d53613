"""What KFAC knows of each layer type: one file per type, one table."""

from weingarten.layers.capture import Block, Capture, LayerError, capture, find_blocks
from weingarten.layers.conv import ConvRule
from weingarten.layers.embedding import EmbeddingRule
from weingarten.layers.linear import LinearRule
from weingarten.layers.norm import BatchNormRule, LayerNormRule
from weingarten.layers.rows import factor_type
from weingarten.layers.rule import LayerRule
from weingarten.layers.sharing import Expand, Reduce, Sharing

RULES: tuple[LayerRule, ...] = (LinearRule(), ConvRule(), EmbeddingRule(), LayerNormRule(), BatchNormRule())
"""The table: the first rule whose types hold a module's exact type speaks for it."""

__all__ = [
    "RULES",
    "Block",
    "Capture",
    "ConvRule",
    "Expand",
    "LayerError",
    "LayerRule",
    "LinearRule",
    "Reduce",
    "Sharing",
    "capture",
    "factor_type",
    "find_blocks",
]
