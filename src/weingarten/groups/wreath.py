"""Blocks of an axis that are moved inside and among each other: attention heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weingarten.groups.action import TRIVIAL, Action, Kind, Pieces
from weingarten.groups.irreducible import Rotation
from weingarten.groups.permutation import Permutation

__all__ = ["Wreath"]


@dataclass(frozen=True)
class Wreath(Action):
    """An axis of ``heads * d`` entries: every head is moved by its own element of ``inner``, and the heads by one of ``outer``.

    Kinds: a nontrivial kind of ``inner`` gives one kind over all heads; the trivial one leaves a number per head, which
    splits under ``outer``.

    Args:
        heads: number of blocks of the axis.
        inner: ``Rotation()`` (default: keys and queries, values and outputs), or another one-axis group.
        outer: ``Permutation()``; None if heads must stay in place.
        tie: a name; axes whose ``Wreath`` has the same tie get the same ``outer`` element (queries with values). Ties are exact
            where ``inner`` has no trivial kind and no leaf carries two tied names: then they do not change the average.

    Raises (the second and third once the length is known):
        ValueError: if there is no head, the length is no multiple of ``heads``, an inner kind has several copies, or a tie is set
            and ``inner`` leaves something invariant, of which the tied names would share the kinds.
    """

    heads: int
    inner: Action = Rotation()  # noqa: RUF009 - a frozen value
    outer: Permutation | None = Permutation()  # noqa: RUF009 - a frozen value
    tie: str | None = None

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise ValueError(f"Wreath: heads is {self.heads}, expected >= 1")

    def kinds(self, n: int) -> tuple[Kind, ...]:
        found = []
        for kind in self._inner_kinds(n):
            if self.outer is None and kind.label == TRIVIAL:
                found.append(Kind(TRIVIAL, 1, 1, copies=self.heads))  # a head's invariant stays where it is
            elif self.outer is None:
                found.append(Kind(_inner_label(kind.label), kind.dim, kind.length, kind.count * self.heads))
            elif kind.label == TRIVIAL:
                found += [
                    Kind(_outer_label(k.label), k.dim, k.length, k.count)
                    for k in self.outer.kinds(self.heads)
                ]
            else:
                found.append(
                    Kind(
                        _inner_label(kind.label), kind.dim * self.heads, kind.length * self.heads, kind.count
                    )
                )
        return tuple(found)

    def split(self, x: Tensor) -> Pieces:
        inner = self.inner.split(x.unflatten(-1, (self.heads, -1)))  # (..., heads, count, length, 1)
        pieces: Pieces = {}
        for label, piece in inner.items():
            if self.outer is None:
                pieces[_inner_label(label)] = (
                    piece.movedim(-4, -1).flatten(-2) if label == TRIVIAL else piece.flatten(-4, -3)
                )
            elif label == TRIVIAL:
                parts = self.outer.split(piece[..., 0, 0, 0])
                pieces |= {_outer_label(name): part for name, part in parts.items()}
            else:
                pieces[_inner_label(label)] = piece.movedim(-4, -3).flatten(-3, -2)
        return pieces

    def merge(self, pieces: Pieces, n: int) -> Tensor:
        size = self._size(n)
        inner: Pieces = {}
        for kind in self.inner.kinds(size):
            if self.outer is None:
                piece = pieces[_inner_label(kind.label)]
                if kind.label == TRIVIAL:
                    inner[TRIVIAL] = piece[..., 0, 0, :, None, None, None]
                else:
                    inner[kind.label] = piece.unflatten(-3, (self.heads, kind.count))
            elif kind.label == TRIVIAL:
                parts = {k.label: pieces[_outer_label(k.label)] for k in self.outer.kinds(self.heads)}
                inner[TRIVIAL] = self.outer.merge(parts, self.heads)[..., None, None, None]
            else:
                inner[kind.label] = (
                    pieces[_inner_label(kind.label)].unflatten(-2, (self.heads, kind.length)).movedim(-3, -4)
                )
        return self.inner.merge(inner, size).flatten(-2)

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, list[Any]]:
        order = torch.arange(self.heads) if self.outer is None else self.outer.sample(self.heads, generator)
        return order, [self.inner.sample(self._size(n), generator) for _ in range(self.heads)]

    def act(self, element: Any, x: Tensor) -> Tensor:
        order, inner = element
        heads = x.unflatten(-1, (self.heads, -1)).unbind(-2)
        moved = [self.inner.act(g, heads[int(h)]) for g, h in zip(inner, order, strict=True)]
        return torch.cat(moved, dim=-1)

    def _inner_kinds(self, n: int) -> tuple[Kind, ...]:
        found = self.inner.kinds(self._size(n))
        if any(kind.copies > 1 for kind in found):
            raise ValueError(
                f"Wreath: {self.inner} has a kind with several copies, expected an inner group without"
            )
        if self.tie is not None and any(kind.label == TRIVIAL for kind in found):
            raise ValueError(
                f"Wreath: tie={self.tie!r}, but {self.inner} leaves a number per head invariant, which tied axes would share; "
                "use one name for both axes, or leave the tie out and free one of them"
            )
        return found

    def _size(self, n: int) -> int:
        if n % self.heads:
            raise ValueError(f"Wreath: the axis has length {n}, expected a multiple of heads={self.heads}")
        return n // self.heads


def _outer_label(label: str) -> str:
    return TRIVIAL if label == TRIVIAL else f"heads {label}"


def _inner_label(label: str) -> str:
    """Heads inside of heads keep labels of their own."""
    return f"head {label}" if label.startswith("head") else label
