"""Group the uses of leaves into the blocks of a block-diagonal curvature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from weingarten.layers.capture import Capture
from weingarten.layers.elementwise import DiagonalUse
from weingarten.layers.embedding import EmbeddingUse
from weingarten.layers.rows import Rows, joined
from weingarten.layers.use import Use
from weingarten.layers.watch import LayerError
from weingarten.operators import Layout
from weingarten.tree import Space, TreeLike

__all__ = ["Block", "Term", "blocks_of"]


@dataclass(frozen=True, eq=False)
class Term:
    """Uses of the same leaves whose rows have the same meaning: further positions of one layer.

    Attributes:
        uses: by their number in the capture.
        roles: those of the block's leaves.
        flipped: whether the inputs belong to the rows of the block's matrices, as in a head that is tied to an embedding.
    """

    uses: dict[int, Use]
    roles: tuple[str, ...]
    flipped: bool = False

    def inputs(self) -> Rows:
        """The rows of inputs of all uses."""
        found = [use.inputs(self.roles) for use in self.uses.values()]
        return found[0] if self.summed else joined(found)

    def outputs(self, found: Mapping[int, Tensor]) -> Tensor:
        """The rows ``(K, groups, N, T, out)`` of gradients of all uses, from those of the uses by number."""
        parts = [use.outputs(found[number], self.roles) for number, use in self.uses.items()]
        if self.summed:
            return torch.stack(parts).sum(0)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)

    @property
    def summed(self) -> bool:
        """Whether the rows are whole gradients of a datum, which add up over uses, so that KFAC stays exact."""
        return all(isinstance(use, DiagonalUse) for use in self.uses.values())

    @property
    def table(self) -> bool:
        """Whether the inputs number the rows of a table."""
        return isinstance(next(iter(self.uses.values())), EmbeddingUse)

    def source(self) -> object | None:
        """Equal for terms with the same rows of inputs."""
        source = next(iter(self.uses.values())).source() if len(self.uses) == 1 else None
        return None if source is None else (source, "weight" in self.roles, "bias" in self.roles)


@dataclass(frozen=True, eq=False)
class Block:
    """Leaves that are used together, with the layout of their matrices; one term but for tied weights."""

    layout: Layout
    terms: tuple[Term, ...]

    @property
    def uses(self) -> list[int]:
        """The numbers of all uses."""
        return [number for term in self.terms for number in term.uses]

    @property
    def flipped(self) -> list[bool]:
        """Which terms are flipped."""
        return [term.flipped for term in self.terms]

    @property
    def name(self) -> str:
        """The leaves of the block."""
        return ", ".join(self.layout.space.shapes)


def blocks_of(seen: Capture, params: TreeLike, call: str) -> tuple[list[Block], dict[str, str]]:
    """The blocks, in the order of the parameters, and the leaves left over, each with the reason.

    Raises:
        LayerError: if the output does not depend on a leaf, so that its curvature is zero.
    """
    uses: dict[str, list[tuple[int, str]]] = {name: [] for name in params}
    for number, use in enumerate(seen.uses):
        for role, leaf in use.leaves.items():
            uses[leaf].append((number, role))
    left = dict(seen.unknown)
    groups: dict[tuple[int, ...], dict[str, list[str]]] = {}
    for name, found in uses.items():
        if name in left:
            continue
        if not found:
            raise LayerError(
                f"{call}: the model's output does not depend on parameter {name!r}, so that its curvature is zero (is it unused, "
                "or behind a detach?); freeze it"
            )
        groups.setdefault(tuple(number for number, _ in found), {})[name] = [role for _, role in found]
    blocks: list[Block] = []
    for numbers, members in groups.items():
        members = dict(sorted(members.items(), key=lambda item: item[1], reverse=True))  # weight before bias
        space = Space.of({name: params[name] for name in members})
        block = _block(
            [(n, seen.uses[n], tuple(r[i] for r in members.values())) for i, n in enumerate(numbers)], space
        )
        if block is None:
            left |= dict.fromkeys(members, "used in ways that do not share one matrix")
        else:
            blocks.append(block)
    return blocks, left


def _block(uses: list[tuple[int, Use, tuple[str, ...]]], space: Space) -> Block | None:
    layouts = [use.layout(space, roles) for _, use, roles in uses]
    layout, roles = layouts[0], uses[0][2]
    same = {
        n: use for (n, use, r), other in zip(uses, layouts, strict=True) if other == layout and r == roles
    }
    others = [(n, use, r, other) for (n, use, r), other in zip(uses, layouts, strict=True) if n not in same]
    terms = [Term(same, roles)]
    if others:
        turned = others[0][2]
        matrices = len(space.shapes) == 1 and all(len(shape) == 2 for shape in space.shapes.values())
        fits = all(
            r == turned and o.groups == layout.groups == 1 and o.transposed != layout.transposed
            for _, _, r, o in others
        )
        if not (matrices and fits):
            return None
        terms.append(Term({n: use for n, use, _, _ in others}, turned, flipped=True))
    return Block(layout, tuple(terms))
