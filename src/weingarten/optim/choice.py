"""Groups for single weights by the shape alone: the known optimisers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from torch import Tensor

from weingarten.groups import Action, Signs
from weingarten.optim.eigenbases import EigenbasisMoment, Frame
from weingarten.optim.moment import (
    EntryMoment,
    Moment,
    OrbitMoment,
    TwoSidedMoment,
    one_sided,
)
from weingarten.optim.polar import PolarMoment
from weingarten.symmetry import Symmetry

__all__ = ["Axes", "BothSides", "Choice", "Eigenbases", "OneSide", "Polar"]


class Choice(ABC):
    """Which group acts on a weight, from its shape. A convolution kernel is a matrix (channels out, all else)."""

    @abstractmethod
    def moment(self, name: str, leaf: Tensor) -> Moment | None:
        """The moment of a weight with two axes or more; None routes it to AdamW."""


def _sides(leaf: Tensor) -> tuple[int, int]:
    return leaf.shape[0], leaf.shape[1:].numel()


def _pieces(leaf: Tensor, side: int, max_block: int) -> int | None:
    """In how many equal pieces a side is split for blocks of at most ``max_block``: along rows, or along the second axis.

    None if it would take pieces of less than a quarter of that: a length with no divisor in between.
    """
    length, rest = leaf.shape[side], leaf.shape[2:].numel() if side == 1 else 1
    for pieces in range(-(-length * rest // max_block), length + 1):
        if length % pieces == 0:
            size = length // pieces * rest
            return pieces if pieces == 1 or 4 * size > max_block else None
    return None


@final
@dataclass(frozen=True)
class OneSide(Choice):
    r"""Rotations of the longer side, the shorter one free: ``G (E[G^T G] / rows)^{-1/2}``, or on the left.

    With a moment of the momentum of this step alone, ``Symo(betas=(0.95, 0.0), of_momentum=True, refresh=1)``, that is the polar
    factor of the momentum, exact Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/); averaged over
    steps it is one-sided Shampoo (https://arxiv.org/abs/1802.09568).

    Args:
        max_block: a longer shorter side is split in equal pieces of at most this length, which are preconditioned each by
            itself; weights whose side cannot be split go to AdamW. Default 2048, whose root takes about a second on one core.

    >>> import torch
    >>> print(OneSide().moment("w", torch.zeros(7, 4)))
    4 x 7
    >>> print(OneSide(max_block=2).moment("w", torch.zeros(7, 4)))  # two pieces
    2 x 14
    """

    max_block: int = 2048

    def moment(self, name: str, leaf: Tensor) -> Moment | None:
        rows, columns = _sides(leaf)
        free = 1 if rows >= columns else 0
        pieces = _pieces(leaf, free, self.max_block)
        return None if pieces is None else one_sided(name, leaf, 1 - free, pieces=pieces)


@final
@dataclass(frozen=True)
class Polar(Choice):
    r"""The polar factor of the momentum itself, times the root of the longer side: Muon.

    :class:`OneSide` with the moment of this step's momentum alone, without keeping it: no second moments, no damping. The way to
    compute it is chosen by :func:`weingarten.optim.polar.polar`. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/;
    ``Symo(model, 0.02, Polar(), scaling=Spectral())`` has the scale of ``torch.optim.Muon``.

    >>> import torch
    >>> print(Polar().moment("w", torch.zeros(7, 4)))
    polar factor of 7 x 4
    """

    def moment(self, name: str, leaf: Tensor) -> Moment:
        return PolarMoment(name, leaf)


@final
@dataclass(frozen=True)
class BothSides(Choice):
    r"""``L^{-1/4} G R^{-1/4}``, Shampoo: the geometric mean of rotations on either side.

    Gupta, Koren and Singer 2018, https://arxiv.org/abs/1802.09568.

    Args:
        max_block: longer sides are split in equal pieces of at most this length, as in :class:`OneSide`. Default 2048.

    >>> import torch
    >>> print(BothSides().moment("w", torch.zeros(7, 4)))
    4 x 7 and 7 x 4, geometric mean
    """

    max_block: int = 2048

    def moment(self, name: str, leaf: Tensor) -> Moment | None:
        rows, columns = (_pieces(leaf, side, self.max_block) for side in (0, 1))
        return None if rows is None or columns is None else TwoSidedMoment(name, leaf, (rows, columns))


@final
@dataclass(frozen=True)
class Eigenbases(Choice):
    r"""Sign flips in the eigenbases of both one-sided moments: SOAP.

    Vyas et al. 2024, https://arxiv.org/abs/2409.11321.

    Args:
        max_block: a longer side keeps its own basis; weights with two longer sides go to AdamW. Default 2048.
        carry: whether the spectrum is carried along when a basis turns, see :class:`EigenbasisMoment`. Default False, as in SOAP.

    >>> import torch
    >>> print(Eigenbases(max_block=5).moment("w", torch.zeros(7, 4)))
    entry by entry in eigenbases of 4
    """

    max_block: int = 2048
    carry: bool = False

    def moment(self, name: str, leaf: Tensor) -> Moment | None:
        shape = _sides(leaf)
        blocks = tuple(int(side <= self.max_block) for side in shape)
        return EigenbasisMoment(name, leaf, [Frame(shape, blocks)], self.carry) if any(blocks) else None


@final
@dataclass(frozen=True)
class Axes(Choice):
    r"""A group of one's own on either side of every weight.

    ``Axes(Signs(), Signs())`` is Adam, ``Axes(Rotation(), Rotation())`` SGD on gradients of RMS one (one scale per weight),
    ``Axes(Rotation(), Signs())`` divides columns by their RMS, ``Axes(Rotation(), None)`` is Shampoo on the right.

    Args:
        rows: acts on the first axis; None leaves it free.
        columns: acts on all others together; None leaves them free.

    Raises:
        ValueError: on use, for a side of a length on which the group does not act.

    >>> import torch
    >>> from weingarten.groups import Rotation
    >>> print(Axes(Rotation(), None).moment("w", torch.zeros(7, 4)))
    4 x 7
    """

    rows: Action | None
    columns: Action | None

    def moment(self, name: str, leaf: Tensor) -> Moment | None:
        if isinstance(self.rows, Signs) and isinstance(self.columns, Signs):
            return EntryMoment({name: leaf})
        groups = {key: g for key, g in (("r", self.rows), ("c", self.columns)) if g is not None}
        span = f"[{leaf.ndim - 1}]" if leaf.ndim > 2 else ""
        rest = f"c{span}" if self.columns is not None else " ".join("." * (leaf.ndim - 1))
        return OrbitMoment(
            Symmetry.parse(
                {name: f"{'r' if self.rows is not None else '.'} {rest}"}, None, None, None, **groups
            ),
            {name: leaf},
        )
