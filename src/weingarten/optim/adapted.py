"""Bases adapted to a model's symmetry: the axes that its group pins down keep theirs, the others get eigenbases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from weingarten.groups import Action, Rotation, Wreath
from weingarten.optim.choice import Choice
from weingarten.optim.eigenbases import EigenbasisMoment, Frame
from weingarten.optim.moment import EntryMoment, Moment
from weingarten.symmetry import Symmetry
from weingarten.symmetry.part import Part
from weingarten.symmetry.words import FREE

__all__ = ["Adapted"]


@final
@dataclass(frozen=True)
class Adapted(Choice):
    r"""Sign flips in a basis that follows from the symmetry, axis by axis: what :class:`Symo` takes for a model.

    Hidden units can be permuted and their signs flipped, and nothing else: their axis has a basis that means something, and
    keeps it. Where the group rotates (inside a head, between query and key) or was freed (a residual stream, pixels) no basis is
    better than another, and the moment ``E[g g^T]`` along the axis chooses: its eigenbasis. An axis of heads is turned head by
    head. In these coordinates every entry is divided by its own root mean square, as in Adam:
    :class:`weingarten.optim.eigenbases.EigenbasisMoment`. Steps commute with the whole group: moving the parameters and then
    stepping is the same as stepping and then moving them.

    With every name dropped from the symmetry that is SOAP with its spectrum carried along, with sign flips on every axis Adam.

    Args:
        symmetry: words of all weights; ``.`` on every axis of a weight routes it to AdamW, like vectors.
        max_block: a longer axis, or head, keeps its own basis. Default 2048, whose eigenbasis takes seconds on one core.

    Raises:
        ValueError: on use, for a weight that the symmetry does not speak of or does not fit.

    >>> import torch
    >>> from weingarten.groups import SignedPermutation
    >>> symmetry = Symmetry.parse({"up": "h .", "down": ". h"}, h=SignedPermutation())
    >>> print(Adapted(symmetry).moment("up", torch.zeros(32, 8)))
    entry by entry in eigenbases of 8
    """

    symmetry: Symmetry
    max_block: int = 2048

    def moment(self, name: str, leaf: Tensor) -> Moment | None:
        if name not in self.symmetry.leaves():
            raise ValueError(
                f"Adapted: the symmetry has no words for {name!r}, expected some for every weight of the optimiser; it speaks of "
                f"{self.symmetry.leaves()}; give '.' on every axis for AdamW"
            )
        mine = self.symmetry.restrict([name])
        if not mine.names():
            return None
        lengths = {key: arranged.lengths for key, arranged in mine.kinds({name: leaf}).arranged.items()}
        frames = [self._frame(part, lengths[part.key], mine.groups) for part in mine.parts]
        if any(frame.axes() for frame in frames):
            return EigenbasisMoment(name, leaf, frames)
        return EntryMoment({name: leaf})

    def _frame(self, part: Part, lengths: tuple[int, ...], groups: Mapping[str, Action]) -> Frame:
        """Neighbouring free axes become one, as the positions of a convolution kernel."""
        shape: list[int] = []
        blocks: list[int] = []
        before = None
        for atom, length in zip((a for word in part.words for a in word.atoms), lengths, strict=True):
            if atom == before == FREE:
                length *= shape.pop()
                blocks.pop()
            shape.append(length)
            blocks.append(self._blocks(length, None if atom == FREE else groups[atom]))
            before = atom
        return Frame(tuple(shape), tuple(blocks), part.index)

    def _blocks(self, length: int, group: Action | None) -> int:
        """In how many pieces an axis is turned; 0 for none."""
        if group is None or isinstance(group, Rotation):
            blocks = 1
        elif isinstance(group, Wreath) and isinstance(group.inner, Rotation):
            blocks = group.heads
        else:
            return 0
        return blocks if 1 < length // blocks <= self.max_block else 0
