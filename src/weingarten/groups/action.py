"""The protocol of a group acting on an axis by real orthogonal matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["TRIVIAL", "Action", "Kind", "Pieces", "matrix"]

TRIVIAL = ""
"""The label of the trivial kind, which every group has and which all names share."""

Pieces = dict[str, Tensor]
"""Coordinates by kind: ``(..., count, length, copies)``."""


@dataclass(frozen=True)
class Kind:
    """A family of irreducible representations of real type in which an axis splits.

    Attributes:
        label: its name; ``TRIVIAL`` for the trivial representation. Equal labels of one group are isomorphic.
        dim: dimension of the irreducible representation.
        length: number of coordinates used for it, at least ``dim``: a vector of mean zero keeps its n entries.
        count: number of inequivalent members of the family (n for sign flips), all of this ``dim`` and ``length``.
        copies: how often each occurs.
    """

    label: str
    dim: int
    length: int
    count: int = 1
    copies: int = 1


class Action(ABC):
    """A group on an axis of length n.

    Coordinates are isometric: ``split`` keeps the Euclidean norm and ``merge`` is its adjoint. Only representations of *real
    type* may be named a kind, those whose commutant is the multiples of the identity (Schur's lemma); SO(2) is not of that type.
    """

    @abstractmethod
    def kinds(self, n: int) -> tuple[Kind, ...]:
        """The kinds of an axis of length n, without those of dimension zero.

        Raises:
            ValueError: if the group does not act on an axis of that length.
        """

    @abstractmethod
    def split(self, x: Tensor) -> Pieces:
        """Coordinates of the last axis: ``(..., n)`` to ``(..., count, length, 1)`` for each kind."""

    @abstractmethod
    def merge(self, pieces: Pieces, n: int) -> Tensor:
        """The inverse of :meth:`split`."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator | None = None) -> Any:
        """A uniformly random group element."""

    @abstractmethod
    def act(self, element: Any, x: Tensor) -> Tensor:
        """The element on the last axis."""

    def pair_kinds(self, n: int) -> tuple[Kind, ...]:
        """The kinds of two axes of length n that are moved by the same element.

        Raises:
            ValueError: if that is not supported for this group or this length.
        """
        raise ValueError(
            f"{self} has no coordinates for two axes of one leaf; free one of them or use Permutation, Signs or Rotation"
        )

    def pair_split(self, x: Tensor) -> Pieces:
        """Coordinates of the last two axes: ``(..., n, n)`` to ``(..., count, length, copies)``."""
        raise ValueError(f"{self} has no coordinates for two axes of one leaf")

    def pair_merge(self, pieces: Pieces, n: int) -> Tensor:
        """The inverse of :meth:`pair_split`."""
        raise ValueError(f"{self} has no coordinates for two axes of one leaf")


def matrix(action: Action, element: Any, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The orthogonal matrix ``(n, n)`` of an element; its columns are the images of the unit vectors."""
    return action.act(element, torch.eye(n, dtype=dtype)).mT
