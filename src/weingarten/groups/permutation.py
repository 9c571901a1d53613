"""The symmetric group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weingarten.groups.action import TRIVIAL, Action, Kind, Pieces
from weingarten.groups.square import antisymmetric, symmetric

__all__ = ["Permutation"]


@dataclass(frozen=True)
class Permutation(Action):
    """``S_n``: hidden units under any elementwise activation.

    Kinds: the mean (trivial), and the rest (standard, dimension n - 1). Two axes (n >= 4): trivial twice (mean of the diagonal
    and off it), standard three times (centred diagonal, row and column sums of the rest), symmetric and antisymmetric matrices
    with zero diagonal and zero row sums; 2^2 + 3^2 + 1 + 1 = 15 coefficients.
    """

    def kinds(self, n: int) -> tuple[Kind, ...]:
        return (Kind(TRIVIAL, 1, 1),) + ((Kind("standard", n - 1, n),) if n > 1 else ())

    def split(self, x: Tensor) -> Pieces:
        n = x.shape[-1]
        mean = x.mean(-1, keepdim=True)
        pieces = {TRIVIAL: (n**0.5 * mean)[..., None, :, None]}
        if n > 1:
            pieces["standard"] = (x - mean)[..., None, :, None]
        return pieces

    def merge(self, pieces: Pieces, n: int) -> Tensor:
        mean = pieces[TRIVIAL][..., 0, :, 0] / n**0.5
        if n == 1:
            return mean
        rest = pieces["standard"][..., 0, :, 0]
        return rest + (mean - rest.mean(-1, keepdim=True))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randperm(n, generator=generator)

    def act(self, element: Any, x: Tensor) -> Tensor:
        return x[..., element.to(x.device)]

    def pair_kinds(self, n: int) -> tuple[Kind, ...]:
        if n < 4:
            raise ValueError(
                f"Permutation on two axes of one leaf: the axes have length {n}, expected at least 4; free one of them"
            )
        found = (
            Kind(TRIVIAL, 1, 1, copies=2),
            Kind("standard", n - 1, n, copies=3),
            Kind("symmetric", n * (n - 3) // 2, n * n),
            Kind("antisymmetric", (n - 1) * (n - 2) // 2, n * n),
        )
        return tuple(kind for kind in found if kind.dim > 0)

    def pair_split(self, x: Tensor) -> Pieces:
        n = x.shape[-1]
        diagonal = x.diagonal(dim1=-2, dim2=-1)
        off = x - torch.diag_embed(diagonal)
        total = off.sum((-2, -1))
        trivial = torch.stack([diagonal.sum(-1) / n**0.5, total / (n * (n - 1)) ** 0.5], dim=-1)
        row, column = off.sum(-1) - total[..., None] / n, off.sum(-2) - total[..., None] / n
        standard = torch.stack(
            [
                diagonal - diagonal.mean(-1, keepdim=True),
                (row + column) / (2 * (n - 2)) ** 0.5,
                (row - column) / (2 * n) ** 0.5,
            ],
            dim=-1,
        )
        rest = off - _off_diagonal(trivial[..., 1], standard[..., 1], standard[..., 2], n)
        return {
            TRIVIAL: trivial[..., None, None, :],
            "standard": standard[..., None, :, :],
            "symmetric": symmetric(rest).flatten(-2)[..., None, :, None],
            "antisymmetric": antisymmetric(rest).flatten(-2)[..., None, :, None],
        }

    def pair_merge(self, pieces: Pieces, n: int) -> Tensor:
        trivial, standard = pieces[TRIVIAL][..., 0, 0, :], pieces["standard"][..., 0, :, :]
        diagonal = trivial[..., :1] / n**0.5 + standard[..., 0]
        result = torch.diag_embed(diagonal) + _off_diagonal(
            trivial[..., 1], standard[..., 1], standard[..., 2], n
        )
        rest = pieces["symmetric"][..., 0, :, 0] + pieces["antisymmetric"][..., 0, :, 0]
        return result + rest.unflatten(-1, (n, n))


def _off_diagonal(total: Tensor, plus: Tensor, minus: Tensor, n: int) -> Tensor:
    """The matrix with zero diagonal and these coordinates of mean, of row plus column sums, and of row minus column sums."""
    u = plus / (2 * (n - 2)) ** 0.5
    v = minus / (2 * n) ** 0.5
    full = (
        total[..., None, None] / (n * (n - 1)) ** 0.5
        + u[..., :, None]
        + u[..., None, :]
        + v[..., :, None]
        - v[..., None, :]
    )
    return full - torch.diag_embed(full.diagonal(dim1=-2, dim2=-1))
