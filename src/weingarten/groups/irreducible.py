"""Groups under which a whole axis is one irreducible representation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weingarten.groups.action import TRIVIAL, Action, Kind, Pieces
from weingarten.groups.square import antisymmetric, diagonal_part, symmetric

__all__ = ["Rotation", "SignedPermutation"]


class _Irreducible(Action):
    """The coordinates of the axis are its entries."""

    def kinds(self, n: int) -> tuple[Kind, ...]:
        return (Kind("vector", n, n),)

    def split(self, x: Tensor) -> Pieces:
        return {"vector": x[..., None, :, None]}

    def merge(self, pieces: Pieces, n: int) -> Tensor:
        return pieces["vector"][..., 0, :, 0]


@dataclass(frozen=True)
class Rotation(_Irreducible):
    """The orthogonal group O(n): features between two linear maps with no nonlinearity, or RMS normalisation without gain.

    Two axes: the trace, the traceless symmetric and the antisymmetric matrices.
    """

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Haar distributed: QR of a normal matrix with the signs of R's diagonal moved into Q (Mezzadri 2007)."""
        q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
        return q * r.diagonal().sign()

    def act(self, element: Any, x: Tensor) -> Tensor:
        return x @ element.to(x).mT

    def pair_kinds(self, n: int) -> tuple[Kind, ...]:
        found = (
            Kind(TRIVIAL, 1, 1),
            Kind("symmetric", n * (n + 1) // 2 - 1, n * n),
            Kind("antisymmetric", n * (n - 1) // 2, n * n),
        )
        return tuple(kind for kind in found if kind.dim > 0)

    def pair_split(self, x: Tensor) -> Pieces:
        n = x.shape[-1]
        trace = x.diagonal(dim1=-2, dim2=-1).sum(-1) / n**0.5
        traceless = x - torch.diag_embed((trace / n**0.5)[..., None].expand(*trace.shape, n))
        pieces = {
            TRIVIAL: trace[..., None, None, None],
            "symmetric": symmetric(traceless).flatten(-2)[..., None, :, None],
            "antisymmetric": antisymmetric(x).flatten(-2)[..., None, :, None],
        }
        return {kind.label: pieces[kind.label] for kind in self.pair_kinds(n)}

    def pair_merge(self, pieces: Pieces, n: int) -> Tensor:
        trace = pieces[TRIVIAL][..., 0, 0, 0]
        result = torch.diag_embed((trace / n**0.5)[..., None].expand(*trace.shape, n))
        for label in ("symmetric", "antisymmetric"):
            if label in pieces:
                result = result + pieces[label][..., 0, :, 0].unflatten(-1, (n, n))
        return result


@dataclass(frozen=True)
class SignedPermutation(_Irreducible):
    """Permutations with sign flips: hidden units under an odd activation such as tanh.

    Two axes: the trace, the centred diagonal, the off-diagonal symmetric and antisymmetric matrices.
    """

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        order = torch.randperm(n, generator=generator)
        return order, 2.0 * torch.randint(0, 2, (n,), generator=generator) - 1.0

    def act(self, element: Any, x: Tensor) -> Tensor:
        order, sign = element
        return x[..., order.to(x.device)] * sign.to(x)

    def pair_kinds(self, n: int) -> tuple[Kind, ...]:
        off = n * (n - 1) // 2
        found = (
            Kind(TRIVIAL, 1, 1),
            Kind("diagonal", n - 1, n),
            Kind("symmetric", off, n * n),
            Kind("antisymmetric", off, n * n),
        )
        return tuple(kind for kind in found if kind.dim > 0)

    def pair_split(self, x: Tensor) -> Pieces:
        n = x.shape[-1]
        diagonal = x.diagonal(dim1=-2, dim2=-1)
        off = x - torch.diag_embed(diagonal)
        pieces = {
            TRIVIAL: (diagonal.sum(-1) / n**0.5)[..., None, None, None],
            "diagonal": (diagonal - diagonal.mean(-1, keepdim=True))[..., None, :, None],
            "symmetric": symmetric(off).flatten(-2)[..., None, :, None],
            "antisymmetric": antisymmetric(off).flatten(-2)[..., None, :, None],
        }
        return {kind.label: pieces[kind.label] for kind in self.pair_kinds(n)}

    def pair_merge(self, pieces: Pieces, n: int) -> Tensor:
        result = diagonal_part(pieces, "diagonal", n)
        for label in ("symmetric", "antisymmetric"):
            if label in pieces:
                result = result + pieces[label][..., 0, :, 0].unflatten(-1, (n, n))
        return result
