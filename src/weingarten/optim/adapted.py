"""Bases adapted to a model's symmetry: the axes that its group pins down keep theirs, the others get eigenbases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from weingarten.groups import Rotation, Wreath
from weingarten.optim.choice import Choice
from weingarten.optim.eigenbases import EigenbasisMoment, Frame
from weingarten.optim.moment import EntryMoment, Moment
from weingarten.optim.routes import LARGEST, longest_short_side, unwrapped
from weingarten.symmetry import Symmetry, infer_symmetry
from weingarten.symmetry.part import Part
from weingarten.symmetry.words import FREE

__all__ = ["Adapted", "adapted"]


@final
@dataclass(frozen=True)
class Adapted(Choice):
    r"""Sign flips in a basis that follows from the symmetry, axis by axis: what :class:`Symo` takes for a model.

    Hidden units are alike: averaged over their permutations and signs, a moment says nothing about directions among them, and
    their axis keeps its basis. On axes up to ``max_block`` long (a residual stream, pixels, few units) that average is given up
    for a finer one, and the gradients choose: the eigenbasis of ``E[g g^T]`` along the axis. Inside attention heads the group
    rotates, so that no basis means anything: an axis of heads is turned head by head. In these coordinates every entry is divided
    by its own root mean square, as in Adam: :class:`weingarten.optim.eigenbases.EigenbasisMoment`. Steps commute with the whole
    group: moving the weights and then stepping is the same as stepping and then moving them.

    ``max_block`` is the knob: with 1 this is Adam, with a large one SOAP (Vyas et al. 2024, https://arxiv.org/abs/2409.11321) by
    the head and with its spectrum carried along.

    A weight that no name acts on goes to AdamW, and so does one between a stream, an axis that three weights or more share, and
    the outside: embeddings and heads.

    Args:
        symmetry: words of all weights.
        max_block: a longer axis, or head, keeps its own basis. Default 2048, whose eigenbasis takes seconds on one core.

    Raises:
        ValueError: on use, for a weight that the symmetry does not speak of or does not fit.

    >>> import torch
    >>> from weingarten.groups import SignedPermutation
    >>> symmetry = Symmetry.parse({"up": "h .", "down": ". h"}, h=SignedPermutation())
    >>> print(Adapted(symmetry, max_block=8).moment("up", torch.zeros(32, 8)))
    entry by entry in eigenbases of 8
    """

    symmetry: Symmetry
    max_block: int = 2048

    def moment(self, name: str, leaf: Tensor) -> Moment | None:
        parts = [part for part in self.symmetry.parts if part.leaf == name]
        if not parts:
            raise ValueError(
                f"Adapted: the symmetry has no words for {name!r}, expected some for every weight of the optimiser; it speaks of "
                f"{self.symmetry.leaves()}; give '.' on every axis for AdamW"
            )
        if all(self._outside(part) for part in parts):
            return None
        arranged = self.symmetry.restrict([name]).kinds({name: leaf}).arranged
        frames = [self._frame(part, arranged[part.key].lengths) for part in parts]
        if any(frame.axes() for frame in frames):
            return EigenbasisMoment(name, leaf, frames)
        return EntryMoment({name: leaf})

    def _outside(self, part: Part) -> bool:
        names = _names(part)
        if len(names) != 1:
            return not names
        carriers = {p.leaf for p in self.symmetry.parts if len(p.words) > 1 and names[0] in _names(p)}
        return len(carriers) > 2

    def _frame(self, part: Part, lengths: tuple[int, ...]) -> Frame:
        """Neighbouring free axes become one, as the positions of a convolution kernel."""
        shape: list[int] = []
        blocks: list[int] = []
        before = None
        for atom, length in zip((a for word in part.words for a in word.atoms), lengths, strict=True):
            if atom == before == FREE:
                length *= shape.pop()
                blocks.pop()
            shape.append(length)
            blocks.append(self._blocks(length, atom))
            before = atom
        return Frame(tuple(shape), tuple(blocks), part.index)

    def _blocks(self, length: int, atom: str) -> int:
        """In how many pieces an axis is turned; 0 for none."""
        group = None if atom == FREE else self.symmetry.groups[atom]
        blocks = group.heads if isinstance(group, Wreath) and isinstance(group.inner, Rotation) else 1
        return blocks if 1 < length // blocks <= self.max_block else 0


def _names(part: Part) -> list[str]:
    """Of its axes, once for each."""
    return [atom for word in part.words for atom in word.atoms if atom != FREE]


def adapted(model: nn.Module, example_inputs: Any, max_block: int | None = None) -> Adapted:
    """The inferred symmetry of a model, with a bound that suits its weights.

    Args:
        model: a module, also compiled or in ``DistributedDataParallel``.
        example_inputs: as ``infer_symmetry`` takes them.
        max_block: see :class:`Adapted`. Default: the largest shorter side of a weight, at most 1024. Then a step costs no more
            products than other matrix optimisers take, which factorise that side.

    Raises:
        ValueError: if the model cannot be traced, or ``max_block`` is less than one.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(3, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False))
    >>> adapted(model, torch.ones(2, 3)).max_block
    3
    """
    if max_block is not None and max_block < 1:
        raise ValueError(
            f"adapted: max_block is {max_block}, expected >= 1; pass 1 to turn no axis, or None for the default"
        )
    inner = unwrapped(model)
    return Adapted(
        infer_symmetry(inner, example_inputs), max_block or min(longest_short_side(inner), LARGEST)
    )
