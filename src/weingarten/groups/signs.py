"""Sign flips of single entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weingarten.groups.action import TRIVIAL, Action, Kind, Pieces

__all__ = ["Signs"]


@dataclass(frozen=True)
class Signs(Action):
    """``(Z_2)^n``: every entry is a kind of its own, so that averaging leaves a diagonal (Adam's choice).

    Two axes: the diagonal entries are invariant, n copies of the trivial kind; each pair i < j is a kind with the two copies
    ``(X_ij, X_ji)``.
    """

    def kinds(self, n: int) -> tuple[Kind, ...]:
        return (Kind("entry", 1, 1, count=n),)

    def split(self, x: Tensor) -> Pieces:
        return {"entry": x[..., :, None, None]}

    def merge(self, pieces: Pieces, n: int) -> Tensor:
        return pieces["entry"][..., :, 0, 0]

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return 2.0 * torch.randint(0, 2, (n,), generator=generator) - 1.0

    def act(self, element: Any, x: Tensor) -> Tensor:
        return x * element.to(x)

    def pair_kinds(self, n: int) -> tuple[Kind, ...]:
        found = (Kind(TRIVIAL, 1, 1, copies=n), Kind("pair", 1, 1, count=n * (n - 1) // 2, copies=2))
        return tuple(kind for kind in found if kind.count > 0)

    def pair_split(self, x: Tensor) -> Pieces:
        n = x.shape[-1]
        pieces = {TRIVIAL: x.diagonal(dim1=-2, dim2=-1)[..., None, None, :]}
        if n > 1:
            row, column = torch.triu_indices(n, n, 1, device=x.device)
            pieces["pair"] = torch.stack([x[..., row, column], x[..., column, row]], dim=-1)[..., :, None, :]
        return pieces

    def pair_merge(self, pieces: Pieces, n: int) -> Tensor:
        result = torch.diag_embed(pieces[TRIVIAL][..., 0, 0, :])
        if "pair" in pieces:
            row, column = torch.triu_indices(n, n, 1, device=result.device)
            flat = result.flatten(-2)
            flat = flat.index_copy(-1, row * n + column, pieces["pair"][..., 0, 0])
            flat = flat.index_copy(-1, column * n + row, pieces["pair"][..., 0, 1])
            result = flat.unflatten(-1, (n, n))
        return result
