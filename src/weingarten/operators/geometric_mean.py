"""The geometric mean of two curvatures."""

from __future__ import annotations

from weingarten.groups import Rotation, SignedPermutation
from weingarten.matfun import Power, mean_of
from weingarten.operators.commutant import Commutant
from weingarten.operators.kronecker import Kronecker
from weingarten.operators.layout import Layout
from weingarten.symmetry.words import FREE

__all__ = ["geometric_mean"]


def geometric_mean(a: Commutant, b: Commutant, floor: float = 1e-6) -> Commutant | Kronecker:
    r"""``a # b = a^{1/2} (a^{-1/2} b a^{-1/2})^{1/2} a^{1/2}``, which is ``(a b)^{1/2}`` where the two commute.

    Bhatia 2007, Positive Definite Matrices, chapter 4, https://doi.org/10.1515/9781400827787.

    Curvatures with the same kinds and blocks are averaged block by block. On one leaf with two axes, ``a`` averaged over the rows
    (``I (x) R``) and ``b`` over the columns (``L (x) I``), each irreducible, give ``L^{1/2} (x) R^{1/2}``, and the inverse root
    of that is Shampoo's preconditioner ``L^{-1/4} G R^{-1/4}``.

    Args:
        a: an orbit average.
        b: another.
        floor: where ``a`` is rank-deficient there is no mean; this much of its mean eigenvalue is added to every block of it.

    Raises:
        ValueError: if the two neither share their kinds nor act on different axes of one leaf.
    """
    sides = _free_side(a), _free_side(b)
    if a.space.shapes == b.space.shapes and sorted(map(str, sides)) == ["0", "1"]:
        right, left = (a, b) if sides[0] == 1 else (b, a)
        root = Power(0.5)
        (inputs,), (outputs,) = right.map(root).blocks.values(), left.map(root).blocks.values()
        return Kronecker(Layout(a.space), inputs, outputs)
    if a.space.shapes != b.space.shapes or not _same_kinds(a, b):
        raise ValueError(
            "geometric_mean: expected two orbit averages with one symmetry, or of one matrix over its rows and over its columns; "
            f"found\n{a.isotypic.symmetry}\non {a.space.shapes} and\n{b.isotypic.symmetry}\non {b.space.shapes}"
        )
    return Commutant(
        a.isotypic, {key: mean_of(block, b.blocks[key], floor) for key, block in a.blocks.items()}
    )


def _same_kinds(a: Commutant, b: Commutant) -> bool:
    """Whether blocks of the same key mean the same: equal groups on the same axes, equally coupled."""
    first, second = a.isotypic.symmetry, b.isotypic.symmetry
    return (first.parts, first.groups, a.isotypic.sizes) == (second.parts, second.groups, b.isotypic.sizes)


def _free_side(curvature: Commutant) -> int | None:
    """The free axis of a single matrix whose other axis is irreducible; None for anything else."""
    parts = curvature.isotypic.symmetry.parts
    if len(parts) != 1 or len(parts[0].words) != 2 or len(curvature.blocks) != 1 or parts[0].index:
        return None
    if parts[0].words[0].span != 1:  # the Kronecker product would cut the leaf elsewhere
        return None
    atoms = [word.atoms for word in parts[0].words]
    free = [axis for axis, names in enumerate(atoms) if names == (FREE,)]
    if len(free) != 1 or len(atoms[1 - free[0]]) != 1:
        return None
    group = curvature.isotypic.symmetry.groups[atoms[1 - free[0]][0]]
    return free[0] if isinstance(group, Rotation | SignedPermutation) else None
