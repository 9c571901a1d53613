"""Curvatures of disjoint sets of leaves, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from weingarten.matfun import MatrixFunction
from weingarten.operators.batched import map_each
from weingarten.operators.operator import Curvature
from weingarten.tree import Space, Tree, TreeLike

__all__ = ["BlockDiagonal"]


@final
class BlockDiagonal(Curvature):
    """The direct sum of curvatures whose leaves are disjoint; ``map`` factorises matrices of equal size together.

    Args:
        blocks: the curvatures.
        order: the order of the leaves in the joint space; default: as the blocks come.

    Raises:
        ValueError: if there is no block, a leaf belongs to two blocks, or ``order`` does not name every leaf once.
    """

    def __init__(self, blocks: Sequence[Curvature], order: Sequence[str] | None = None) -> None:
        self.blocks = tuple(blocks)
        if not self.blocks:
            raise ValueError("BlockDiagonal: found no block, expected at least one curvature")
        owners: dict[str, Curvature] = {}
        for block in self.blocks:
            for name in block.space.shapes:
                if name in owners:
                    raise ValueError(f"BlockDiagonal: leaf {name!r} belongs to two blocks, expected one")
                owners[name] = block
        names = list(owners) if order is None else list(order)
        if sorted(names) != sorted(owners):
            raise ValueError(
                f"BlockDiagonal: order names {sorted(names)}, expected the leaves {sorted(owners)}"
            )
        self._space = Space(
            shapes={name: owners[name].space.shapes[name] for name in names},
            dtypes={name: owners[name].space.dtypes[name] for name in names},
            device=self.blocks[0].space.device,
        )

    @property
    def space(self) -> Space:
        return self._space

    @property
    def order(self) -> tuple[str, ...]:
        """The leaves in the order of the joint space."""
        return tuple(self._space.shapes)

    def apply(self, v: TreeLike) -> Tree:
        self._space.check(v, "BlockDiagonal.apply")
        parts: Tree = {}
        for block in self.blocks:
            parts |= block.apply({name: v[name] for name in block.space.shapes})
        return {name: parts[name] for name in self._space.shapes}

    def map(self, function: MatrixFunction) -> BlockDiagonal:
        return BlockDiagonal(map_each(self.blocks, function), self.order)

    def trace(self) -> Tensor:
        return torch.stack([block.trace() for block in self.blocks]).sum()

    def diag(self) -> Tree:
        parts: Tree = {}
        for block in self.blocks:
            parts |= block.diag()
        return {name: parts[name] for name in self._space.shapes}
