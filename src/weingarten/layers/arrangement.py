"""Where the data lie in an activation, found by running the model on two and on three rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Arrangement", "ArrangementError", "arrangement", "difference"]


class ArrangementError(ValueError):
    """An activation in which the data cannot be told apart."""


@dataclass(frozen=True)
class Arrangement:
    """The axis of an activation that counts data.

    Args:
        axis: which one.
        merged: "" where it counts data alone; "data first" or "positions first" where data and positions share it, as after
            ``x.view(-1, features)``.
    """

    axis: int = 0
    merged: str = ""

    def fits(self, x: Tensor, data: int) -> bool:
        """Whether an activation can have this arrangement; data that are routed to experts in uneven parts cannot."""
        if self.axis >= x.ndim:
            return False
        size = x.shape[self.axis]
        return size % data == 0 if self.merged else size == data

    def split(self, x: Tensor, data: int, skip: int = 0) -> Tensor:
        """``(..., N, *other axes)``: the data axis behind the ``skip`` first axes, which do not belong to the activation."""
        axis = self.axis + skip
        if self.merged == "data first":
            x = x.unflatten(axis, (data, -1))
        elif self.merged == "positions first":
            x = x.unflatten(axis, (-1, data))
            axis += 1
        return x if axis == skip else x.movedim(axis, skip)


def arrangement(two: Tensor, three: Tensor, single: bool = False) -> Arrangement | None:
    """The arrangement of an activation, from its values for the rows (0, 1) and (0, 1, 2); None where it ignores the data.

    Args:
        two: the activation for two rows.
        three: the same for three.
        single: whether the rows are copies of one datum, alone in its batch, for which any order of data and positions is right.

    Raises:
        ArrangementError: if more than one axis grows with the data, or holds data and positions in no order that can be told.
    """
    if two.ndim == three.ndim:
        grown = [i for i, (a, b) in enumerate(zip(two.shape, three.shape, strict=True)) if a != b]
        if not grown:
            return None
        (axis, *others) = grown
        a, b = two.shape[axis], three.shape[axis]
        if not others and a % 2 == 0 and 3 * a == 2 * b:
            if a == 2:
                return Arrangement(axis)
            return Arrangement(axis, "data first") if single else _merged(axis, two, three)
    raise ArrangementError(
        f"has shape {tuple(two.shape)} for two rows of data, {tuple(three.shape)} for three, expected one axis that counts data"
    )


def _merged(axis: int, two: Tensor, three: Tensor) -> Arrangement:
    """Of an axis of data and positions: the order in which the first two data come out the same, for two rows and for three."""
    candidates = [Arrangement(axis, merged) for merged in ("data first", "positions first")]
    errors = [difference(c.split(two, 2), c.split(three, 3)[:2]) for c in candidates]
    best = errors.index(min(errors))
    if errors[best] > 0.1 or errors[best] >= 0.1 * errors[1 - best]:
        raise ArrangementError(
            f"has shape {tuple(two.shape)} for two rows of data, which cannot be told apart by value"
        )
    return candidates[best]


def difference(x: Tensor, y: Tensor) -> float:
    """Sum of absolute differences, relative to that of the entries."""
    total = x.abs().sum(dtype=torch.float64)
    return float((x - y).abs().sum(dtype=torch.float64) / total) if total else 0.0
