"""Sign flips in eigenbases: every entry divided by its own root mean square, in a basis that the gradients choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, final

import torch
from torch import Tensor

from weingarten.optim.moment import Moment, State, weigh
from weingarten.optim.roots import Task
from weingarten.tree import Tree, TreeLike

__all__ = ["EigenbasisMoment", "Frame"]


@dataclass(frozen=True)
class Frame:
    """How a part of a leaf is seen: as a tensor of some shape, with a basis of its own on some of its axes.

    Attributes:
        shape: the axes of the leaf (or of its part), some of them split or merged.
        blocks: for every axis, in how many equal pieces it is turned, each in the eigenbasis of its own moment; 0 for an axis
            that stays as it is.
        index: where in the leaf the part lies; empty for the whole leaf.
    """

    shape: tuple[int, ...]
    blocks: tuple[int, ...]
    index: tuple[slice, ...] = ()

    def of(self, leaf: Tensor) -> Tensor:
        """The part, in this shape."""
        return (leaf[self.index] if self.index else leaf).reshape(self.shape)

    def put(self, value: Tensor, leaf: Tensor) -> None:
        """Write the part back, in place."""
        target = leaf[self.index] if self.index else leaf
        target.copy_(value.reshape(target.shape))

    def axes(self) -> list[int]:
        """Those that are turned."""
        return [axis for axis, blocks in enumerate(self.blocks) if blocks]

    def moment_shape(self, axis: int) -> tuple[int, int, int]:
        """``(blocks, size, size)`` of the moments along an axis."""
        size = self.shape[axis] // self.blocks[axis]
        return self.blocks[axis], size, size

    def gram(self, x: Tensor, axis: int) -> Tensor:
        """``x x^T`` along an axis, block by block."""
        blocks, size, _ = self.moment_shape(axis)
        before, after = prod(self.shape[:axis]), prod(self.shape[axis + 1 :])
        y = x.reshape(before, blocks, size, after).permute(1, 2, 0, 3).reshape(blocks, size, -1)
        return y @ y.mT

    def turn(self, x: Tensor, axis: int, matrices: Tensor) -> Tensor:
        """``matrices``, one for each block, times ``x`` along an axis."""
        blocks, size, _ = self.moment_shape(axis)
        before, after = prod(self.shape[:axis]), prod(self.shape[axis + 1 :])
        if after > 1:
            return (matrices @ x.reshape(before, blocks, size, after)).reshape(self.shape)
        if blocks == 1:
            return (x.reshape(before, size) @ matrices[0].mT).reshape(self.shape)
        y = x.reshape(before, blocks, size).transpose(0, 1) @ matrices.mT
        return y.transpose(0, 1).reshape(self.shape)


@final
class EigenbasisMoment(Moment):
    r"""``Q ((Q^T u) / (sqrt(v) + eps))``: ``Q`` the eigenbases of the moments along some axes, ``v`` the mean of ``(Q^T g)^2``.

    With a basis on both sides of a matrix that is SOAP (Vyas et al. 2024, https://arxiv.org/abs/2409.11321). The bases come from
    eigh, then from one orthogonal iteration per refresh.

    When a basis turns by ``O = Q'^T Q`` (new times old), what ``v`` says is carried along: the variance of the new coordinates is
    ``(O * O) v`` if the old ones were uncorrelated. SOAP keeps ``v`` as it is; then a direction that turned into a coordinate
    whose gradients used to be small is lengthened by the ratio of the two.

    Args:
        name: of the leaf.
        leaf: shape, type and device.
        frames: of its parts, which cover the leaf once.
        carry: whether ``v`` is carried along; False for SOAP.
    """

    adam_length: ClassVar[bool] = True

    def __init__(self, name: str, leaf: Tensor, frames: Sequence[Frame], carry: bool = True) -> None:
        self.name, self.leaf, self.frames, self.carry = name, leaf, tuple(frames), carry
        self.turned = [
            (f"{i}.{axis}", frame, axis) for i, frame in enumerate(self.frames) for axis in frame.axes()
        ]

    def init(self) -> State:
        state: State = {"weight": 0.0, "spectrum": self.leaf.new_zeros(self.leaf.shape)}
        for key, frame, axis in self.turned:
            for what in ("gram", "basis"):
                state[f"{what}.{key}"] = self.leaf.new_zeros(frame.moment_shape(axis))
        return state

    def accumulate(self, state: State, gradients: TreeLike, decay: float) -> None:
        for key, frame, axis in self.turned:  # the scale of a moment does not matter for its eigenbasis
            state[f"gram.{key}"].lerp_(frame.gram(frame.of(gradients[self.name]), axis), 1 - decay)

    def tasks(self, state: State) -> list[Task]:
        if self.carry:
            state["before"] = {key: state[f"basis.{key}"].clone() for key, *_ in self.turned}
        return [Task(state[f"gram.{key}"], state[f"basis.{key}"], None) for key, *_ in self.turned]

    def measure(self, state: State, gradients: TreeLike, decay: float) -> None:
        before = state.pop("before", None)
        if before is not None:
            self._carry(state, before)
        rotated = self._turned(state, gradients[self.name], back=False)
        state["spectrum"].mul_(decay).addcmul_(rotated, rotated, value=1 - decay)
        weigh(state, "weight", decay)

    def precondition(self, state: State, direction: TreeLike, eps: float) -> Tree:
        u = self._turned(state, direction[self.name], back=False)
        u = u / (state["spectrum"].sqrt().div_(state["weight"] ** 0.5).add_(eps))
        return {self.name: self._turned(state, u, back=True)}

    def _carry(self, state: State, before: Tree) -> None:
        """Take the spectrum from the bases before to those of now; zeros stay zeros before the first ones."""
        for key, frame, axis in self.turned:
            squares = (state[f"basis.{key}"].mT @ before[key]).square_()
            frame.put(frame.turn(frame.of(state["spectrum"]), axis, squares), state["spectrum"])

    def _turned(self, state: State, value: Tensor, back: bool) -> Tensor:
        found = []
        for i, frame in enumerate(self.frames):
            x = frame.of(value)
            for axis in frame.axes():
                basis = state[f"basis.{i}.{axis}"]
                x = frame.turn(x, axis, basis if back else basis.mT)
            found.append(x)
        if not self.frames[0].index:
            return found[0].reshape(value.shape)
        whole = torch.empty_like(value, memory_format=torch.contiguous_format)
        for frame, x in zip(self.frames, found, strict=True):
            frame.put(x, whole)
        return whole

    def __str__(self) -> str:
        """``entry by entry in eigenbases of 4 x 32 and 128``: four pieces of 32 on one axis, all 128 of another."""
        shapes = [frame.moment_shape(axis)[:2] for _, frame, axis in self.turned]
        sizes = [f"{blocks} x {size}" if blocks > 1 else f"{size}" for blocks, size in shapes]
        parts = f", in {len(self.frames)} parts" if len(self.frames) > 1 else ""
        return (
            f"entry by entry in eigenbases of {' and '.join(dict.fromkeys(sizes) if parts else sizes)}{parts}"
        )
