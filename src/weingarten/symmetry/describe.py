"""Sizes, costs and tables of a symmetry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weingarten.groups import Action
from weingarten.symmetry.kinds import KindBlock, KindKey, Kinds
from weingarten.symmetry.part import Part
from weingarten.tree import Tree

__all__ = ["Cost", "cost_of", "meta_params", "table"]


@dataclass(frozen=True)
class Cost:
    """What one estimate costs.

    Attributes:
        gram_flops: ``2 count length m^2`` over all kinds: the moments ``V^T V``.
        apply_flops: the same number again for one product with the blocks.
        bytes: of the blocks.
        largest: the largest block size m.
    """

    gram_flops: int
    apply_flops: int
    bytes: int
    largest: int


def cost_of(blocks: dict[KindKey, KindBlock], itemsize: int = 4) -> Cost:
    """Predicted flops (a multiply-add counts two, as in PyTorch's counter) and bytes; counted in the tests, not timed."""
    flops = sum(2 * b.count * b.length * b.multiplicity**2 for b in blocks.values())
    size = sum(b.count * b.multiplicity**2 for b in blocks.values()) * itemsize
    return Cost(flops, flops, size, max((b.multiplicity for b in blocks.values()), default=0))


def meta_params(shapes: Mapping[str, torch.Size]) -> Tree:
    """Tensors of these shapes without storage."""
    found: dict[str, Tensor] = {leaf: torch.empty(shape, device="meta") for leaf, shape in shapes.items()}
    return found


def table(parts: Sequence[Part], groups: Mapping[str, Action], kinds: Kinds | None) -> str:
    """One line per part, then the groups; with shapes, kinds, block sizes and cost where they are known."""
    rows = [["leaf", "words"] + (["shape", "kind: block x dimension"] if kinds is not None else [])]
    for part in parts:
        row = [part.key, " ".join(map(str, part.words))]
        if kinds is not None:
            row += [" x ".join(map(str, kinds.arranged[part.key].lengths)), _kinds_of(kinds, part.key)]
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines += [f"{name} = {group}" for name, group in groups.items()]
    if kinds is not None:
        cost = cost_of(kinds.blocks)
        lines.append(
            f"{len(kinds.blocks)} kinds, largest block {cost.largest}, blocks {cost.bytes / 1e6:.2f} MB, "
            f"moment {cost.gram_flops / 1e6:.1f} Mflop, product {cost.apply_flops / 1e6:.1f} Mflop"
        )
    return "\n".join(lines)


def _kinds_of(kinds: Kinds, key: str) -> str:
    found = []
    for (_, names), block in kinds.blocks.items():
        if key in block.columns:
            label = ".".join(f"{name}:{kind}" for name, kind in names) or "trivial"
            found.append(f"{label} {block.multiplicity} x {block.dim * block.count}")
    return ", ".join(found)
