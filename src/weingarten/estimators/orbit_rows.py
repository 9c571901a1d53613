"""Per-datum gradients in isotypic coordinates, factored wherever a layer gives them as outer products."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from weingarten.groups.action import TRIVIAL
from weingarten.symmetry.isotypic import Isotypic
from weingarten.symmetry.kinds import KindKey
from weingarten.symmetry.part import Part
from weingarten.symmetry.words import FREE

__all__ = ["Factored", "PartRows", "Side", "factor", "materialised", "moment_of"]

Names = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Side:
    """One side of a sum of outer products, in the coordinates of at most one name: ``(N, T, count, length, free)`` by kind."""

    pieces: dict[Names, Tensor]


@dataclass(frozen=True)
class Factored:
    """``V_n = sum_t out_nt (x) in_nt`` of one kind."""

    out: Tensor
    inputs: Tensor
    out_names: Names
    in_names: Names

    @property
    def positions(self) -> int:
        """T."""
        return self.out.shape[1]

    def dense(self) -> Tensor:
        """``(N, count, length, multiplicity)``, with counts and lengths in the order of names."""
        swapped = self.out_names and self.in_names and self.in_names[0][0] < self.out_names[0][0]
        equation = "ntalx,ntbmy->nbamlxy" if swapped else "ntalx,ntbmy->nablmxy"
        v = torch.einsum(equation, self.out, self.inputs)
        return v.flatten(5, 6).flatten(3, 4).flatten(1, 2)

    def side(self, name: str) -> Tensor | None:
        """The side that carries ``name``."""
        for names, tensor in ((self.out_names, self.out), (self.in_names, self.inputs)):
            if names and names[0][0] == name:
                return tensor
        return None


PartRows = dict[KindKey, Factored | Tensor]
"""One part's per-datum gradients by kind: factored, or as ``(N, count, length, multiplicity)``."""


def factor(isotypic: Isotypic, part: Part, g: Tensor, a: Tensor) -> PartRows | None:
    """Split both sides of ``sum_t g_t a_t^T``; None where the words do not allow it.

    Args:
        isotypic: the coordinates.
        part: a leaf, or a part of one, whose first axis is that of ``g`` and whose other axes are those of ``a``.
        g: ``(N, T, out)``.
        a: ``(N, T, in)``, of width one for a bias.
    """
    arranged = isotypic.arranged[part.key]
    if any(times > 1 for _, times in arranged.names):
        return None
    first = len(part.words[0].atoms)
    if part.words[0].span != 1:
        return None
    atoms = [atom for word in part.words for atom in word.atoms]
    out = _side(isotypic, atoms[:first], list(arranged.lengths[:first]), g)
    inputs = _side(isotypic, atoms[first:], list(arranged.lengths[first:]), a)
    if out is None or inputs is None:
        return None
    rows: PartRows = {}
    for out_names, o in out.pieces.items():
        for in_names, i in inputs.pieces.items():
            key = (part.cluster, tuple(sorted((*out_names, *in_names))))
            rows[key] = Factored(o, i, out_names, in_names)
    return rows


def _side(isotypic: Isotypic, atoms: list[str], lengths: list[int], x: Tensor) -> Side | None:
    named = [axis for axis, atom in enumerate(atoms) if atom != FREE]
    if len(named) > 1 or prod(lengths) != x.shape[-1]:
        return None
    if not named:
        return Side({(): x[:, :, None, None, :]})
    axis, name = named[0], atoms[named[0]]
    group = isotypic.symmetry.groups[name]
    if any(kind.copies > 1 for kind in group.kinds(isotypic.sizes[name])):
        return None
    x = (
        x.unflatten(-1, lengths).movedim(2 + axis, -1).flatten(2, -2)
        if len(lengths) > 1
        else x[:, :, None, :]
    )
    pieces = group.split(x)  # (N, T, free, count, length, 1)
    return Side(
        {
            () if label == TRIVIAL else ((name, label),): p[..., 0].movedim(2, -1)
            for label, p in pieces.items()
        }
    )


def materialised(isotypic: Isotypic, part: Part, gradients: Tensor) -> PartRows:
    """Coordinates of per-datum gradients ``(N, *part.shape)``."""
    return dict(torch.func.vmap(lambda x: isotypic.split_part(part, x))(gradients))


def moment_of(first: Factored | Tensor, second: Factored | Tensor, names: Names) -> Tensor:
    """``sum_n V_n^T V'_n``: ``(count, multiplicity, multiplicity')``."""
    if isinstance(first, Factored) and isinstance(second, Factored) and names:
        pairs = first.positions * second.positions
        if (
            pairs <= 4
            or pairs
            <= first.out.shape[2] * first.out.shape[3] * first.inputs.shape[2] * first.inputs.shape[3]
        ):
            return _factored_moment(first, second, names)
    v = first.dense() if isinstance(first, Factored) else first
    u = second.dense() if isinstance(second, Factored) else second
    return torch.einsum("nclx,ncly->cxy", v, u)


def _factored_moment(first: Factored, second: Factored, names: Names) -> Tensor:
    """By inner products over the named axes; no per-datum gradient is formed."""
    inner = []
    for name, _ in names:
        p, q = first.side(name), second.side(name)
        assert p is not None
        assert q is not None
        inner.append(torch.einsum("ntclx,nsclz->ntscxz", p, q))
    # free entries come in the order (out, in) of each part, named or not
    if len(names) == 2:
        order = "xy" if first.out_names[0] == names[0] else "yx"
        other = "zw" if second.out_names[0] == names[0] else "wz"
        found = torch.einsum(f"ntsaxz,ntsbyw->ab{order}{other}", inner[0], inner[1])
        return found.flatten(4, 5).flatten(2, 3).flatten(0, 1)
    p_free, q_free = _unnamed(first), _unnamed(second)
    half = torch.einsum("ntscxz,nsw->ntcxzw", inner[0], q_free)
    order = "xy" if first.out_names else "yx"
    other = "zw" if second.out_names else "wz"
    found = torch.einsum(f"ntcxzw,nty->c{order}{other}", half, p_free)
    return found.flatten(3, 4).flatten(1, 2)


def _unnamed(rows: Factored) -> Tensor:
    tensor = rows.inputs if rows.out_names else rows.out
    return tensor[:, :, 0, 0, :]
