"""How parameters are used: one file per kind of operation, one table of functions."""

from weingarten.layers.blocks import Block, Term, blocks_of
from weingarten.layers.capture import Capture, capture
from weingarten.layers.conv import ConvUse
from weingarten.layers.linear import LinearUse
from weingarten.layers.operations import OPERATIONS
from weingarten.layers.rows import factor_type
from weingarten.layers.sharing import Expand, Reduce, Sharing
from weingarten.layers.structure import Structure, structure_of
from weingarten.layers.use import Use
from weingarten.layers.watch import LayerError

__all__ = [
    "OPERATIONS",
    "Block",
    "Capture",
    "ConvUse",
    "Expand",
    "LayerError",
    "LinearUse",
    "Reduce",
    "Sharing",
    "Structure",
    "Term",
    "Use",
    "blocks_of",
    "capture",
    "factor_type",
    "structure_of",
]
