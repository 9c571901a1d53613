"""Parts of square matrices that the two-axis coordinates share."""

from __future__ import annotations

import torch
from torch import Tensor

from weingarten.groups.action import TRIVIAL, Pieces

__all__ = ["antisymmetric", "diagonal_part", "symmetric"]


def symmetric(x: Tensor) -> Tensor:
    """``(X + X^T) / 2``."""
    return (x + x.mT) / 2


def antisymmetric(x: Tensor) -> Tensor:
    """``(X - X^T) / 2``."""
    return (x - x.mT) / 2


def diagonal_part(pieces: Pieces, label: str, n: int) -> Tensor:
    """The diagonal matrix from the trivial coordinate (the sum over ``sqrt(n)``) and the centred diagonal ``label``."""
    mean = pieces[TRIVIAL][..., 0, :, 0] / n**0.5  # (..., 1)
    diagonal = mean.expand(*mean.shape[:-1], n)
    if label in pieces:
        diagonal = diagonal + pieces[label][..., 0, :, 0]
    return torch.diag_embed(diagonal)
