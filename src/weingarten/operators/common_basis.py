"""A sum of Kronecker products in one basis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weingarten.operators.eigenbasis import Eigenbasis
from weingarten.operators.layout import Layout

__all__ = ["common_eigenbasis"]


def common_eigenbasis(layout: Layout, terms: Sequence[tuple[Tensor, Tensor]]) -> Eigenbasis:
    r"""``sum_i B_i (x) A_i`` in the eigenbasis of ``sum_i tr(A_i) B_i`` on the left and of ``sum_i tr(B_i) A_i`` on the right.

    These are the two partial traces of the sum; in that basis its diagonal is kept, which is the closest diagonal in Frobenius
    norm, and the sum itself where the factors commute (one term, say).

    Args:
        layout: where the leaves lie in the matrices ``(groups, out, in)``.
        terms: ``(B_i, A_i)`` of shapes ``(groups, out, out)`` and ``(groups, in, in)``, or without the last axis where a factor
            is diagonal; a side on which one factor is diagonal is not rotated.

    >>> from weingarten.tree import Space
    >>> layout = Layout(Space.of({"w": torch.zeros(1, 2)}))
    >>> one, a = torch.ones(1, 1, 1), torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
    >>> common_eigenbasis(layout, [(one, a), (one, a)]).spectrum.round()
    tensor([[[2., 6.]]])
    """
    left = _basis([(b, a) for b, a in terms])
    right = _basis([(a, b) for b, a in terms])
    spectrum = sum(
        (_diagonal(b, left).unsqueeze(-1) * _diagonal(a, right).unsqueeze(-2) for b, a in terms),
        start=torch.zeros((), dtype=terms[0][0].dtype, device=terms[0][0].device),
    )
    return Eigenbasis(layout, left, right, spectrum)


def _basis(sides: Sequence[tuple[Tensor, Tensor]]) -> Tensor | None:
    """Eigenvectors of the sum of the first factors, weighted by the traces of the second."""
    if any(factor.ndim == 2 for factor, _ in sides):
        return None
    total = sum(
        (_diagonal(other, None).sum(-1)[:, None, None] * factor for factor, other in sides),
        start=0 * sides[0][0],
    )
    return torch.linalg.eigh(total)[1]


def _diagonal(factor: Tensor, basis: Tensor | None) -> Tensor:
    """The diagonal of a factor in a basis, >= 0."""
    if factor.ndim == 2:
        return factor
    if basis is None:
        return factor.diagonal(dim1=-2, dim2=-1)
    return (basis * (factor @ basis)).sum(-2).clamp(min=0)
