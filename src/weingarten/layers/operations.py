"""What is known of the functions that may take a leaf."""

from __future__ import annotations

from typing import Any

import torch

from weingarten.layers.conv import CONV
from weingarten.layers.elementwise import ELEMENTWISE
from weingarten.layers.embedding import EMBEDDING
from weingarten.layers.linear import LINEAR
from weingarten.layers.norm import NORM
from weingarten.layers.use import Builder

__all__ = ["COPYING", "GATHERING", "OPERATIONS", "SAME", "SELECTING", "SHIFTED", "SPLITTING", "TRANSPOSED"]

OPERATIONS: dict[Any, tuple[tuple[str, ...], Builder]] = {
    **LINEAR,
    **CONV,
    **EMBEDDING,
    **NORM,
    **ELEMENTWISE,
}
"""The table: how each function that may take a leaf uses it."""

_T = torch.Tensor
TRANSPOSED = (_T.t, _T.T.__get__, _T.mT.__get__, torch.t)  # type: ignore[attr-defined]
SAME = (_T.to, _T.float, _T.double, _T.half, _T.bfloat16, _T.type_as, _T.contiguous, _T.clone, _T.view_as)
SHIFTED = (torch.add, _T.add, _T.__add__, _T.__radd__)  # as in a gain kept as its distance from one
COPYING = (_T.expand, _T.expand_as, _T.repeat)
GATHERING = frozenset((
    *COPYING,
    _T.__getitem__, _T.unsqueeze, _T.squeeze, _T.view, _T.reshape, _T.flatten, _T.unflatten, _T.permute, _T.transpose,
    _T.narrow, _T.select, _T.index_select, torch.unsqueeze, torch.squeeze, torch.reshape, torch.flatten, torch.permute,
    torch.transpose, torch.narrow, torch.select, torch.index_select,
))  # fmt: skip

SPLITTING = frozenset((_T.chunk, _T.split, _T.unbind, torch.chunk, torch.split, torch.unbind))
SELECTING = frozenset((
    torch.nonzero, torch.masked_select, _T.nonzero, _T.masked_select, _T.unique, _T.tolist, _T.item, _T.__int__, _T.__index__,
))  # fmt: skip
