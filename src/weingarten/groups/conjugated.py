"""A group seen in another basis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weingarten.groups.action import Action, Kind, Pieces

__all__ = ["Conjugated"]


@dataclass(frozen=True, eq=False)
class Conjugated(Action):
    """``A -> Q A Q^T`` for a fixed orthogonal Q: sign flips in an eigenbasis are SOAP's choice.

    Args:
        action: the group.
        basis: Q, orthogonal ``(n, n)``; its columns are the new basis vectors.

    Raises:
        ValueError: if ``basis`` is not orthogonal to about the root of its type's precision.
    """

    action: Action
    basis: Tensor

    def __post_init__(self) -> None:
        shape = self.basis.shape
        if self.basis.ndim != 2 or shape[0] != shape[1]:
            raise ValueError(f"Conjugated: basis has shape {tuple(shape)}, expected (n, n)")
        defect = float((self.basis.mT @ self.basis - torch.eye(shape[0]).to(self.basis)).abs().max())
        if not defect < torch.finfo(self.basis.dtype).eps ** 0.5:
            raise ValueError(
                f"Conjugated: |Q^T Q - I| is {defect:.2g}, expected an orthogonal basis; take it from eigh or qr"
            )

    def kinds(self, n: int) -> tuple[Kind, ...]:
        if n != len(self.basis):
            raise ValueError(f"Conjugated: the axis has length {n}, expected the basis' {len(self.basis)}")
        return self.action.kinds(n)

    def split(self, x: Tensor) -> Pieces:
        return self.action.split(x @ self.basis.to(x))

    def merge(self, pieces: Pieces, n: int) -> Tensor:
        x = self.action.merge(pieces, n)
        return x @ self.basis.to(x).mT

    def sample(self, n: int, generator: torch.Generator | None = None) -> Any:
        return self.action.sample(n, generator)

    def act(self, element: Any, x: Tensor) -> Tensor:
        basis = self.basis.to(x)
        return self.action.act(element, x @ basis) @ basis.mT

    def pair_kinds(self, n: int) -> tuple[Kind, ...]:
        return self.action.pair_kinds(n)

    def pair_split(self, x: Tensor) -> Pieces:
        basis = self.basis.to(x)
        return self.action.pair_split(basis.mT @ x @ basis)

    def pair_merge(self, pieces: Pieces, n: int) -> Tensor:
        x = self.action.pair_merge(pieces, n)
        basis = self.basis.to(x)
        return basis @ x @ basis.mT
