"""One block as a Kronecker product of two factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from weingarten.matfun import FactoredPower, MatrixFunction, Power, Scale, narrowed
from weingarten.operators.batched import Batched
from weingarten.operators.eigenbasis import Eigenbasis
from weingarten.operators.factor import (
    check_factor,
    diagonal,
    eigh_each,
    evaluate_each,
    is_diagonal,
    product_type,
    settled,
    times_left,
    times_right,
)
from weingarten.operators.layout import Layout
from weingarten.operators.operator import Curvature
from weingarten.tree import Space, Tree, TreeLike

__all__ = ["Kronecker"]


@final
class Kronecker(Batched):
    r"""``B (x) A`` on matrices ``W`` of shape (out, in): ``W -> B W A`` (row-major vec; output factor first).

    Matrix functions go through the two small eigendecompositions and give an :class:`Eigenbasis`; ``Scale`` and
    ``FactoredPower`` stay Kronecker products. Factors may be kept in bfloat16 or float16: they are factorised in float32 and
    results return to their type; vectors are multiplied in the wider of the factors' types, float32 in place of float16.

    Args:
        layout: where the leaves lie in the matrices.
        inputs: input factor A, ``(groups, in, in)``, or its diagonal ``(groups, in)`` where it is diagonal (embeddings).
        outputs: output factor B, ``(groups, out, out)``, or its diagonal ``(groups, out)`` (heads over a vocabulary).

    Raises:
        ValueError: if a factor's shape is neither of the two that the layout allows.
    """

    def __init__(self, layout: Layout, inputs: Tensor, outputs: Tensor) -> None:
        groups, rows, columns = layout.shape
        check_factor(inputs, groups, columns, "Kronecker", "inputs")
        check_factor(outputs, groups, rows, "Kronecker", "outputs")
        self.layout, self.inputs, self.outputs = layout, inputs, outputs

    @property
    def space(self) -> Space:
        return self.layout.space

    def apply(self, v: TreeLike) -> Tree:
        self.space.check(v, "Kronecker.apply")
        w, dtype = self.layout.merge(v), product_type(self.inputs, self.outputs)
        w = w if w.dtype == dtype else w.to(dtype)
        return self.layout.split(times_left(self.outputs, times_right(w, self.inputs)))

    @staticmethod
    def map_all(curvatures: Sequence[Kronecker], function: MatrixFunction) -> list[Curvature]:
        """The matrix function of several products, with factors of equal size in one batch."""
        if isinstance(function, Scale):
            return [Kronecker(c.layout, c.inputs, function.factor * c.outputs) for c in curvatures]
        if isinstance(function, FactoredPower):
            return _factored(curvatures, function)
        return [basis.map(function) for basis in _diagonalised(curvatures)]

    def trace(self) -> Tensor:
        return (diagonal(self.inputs).sum(-1) * diagonal(self.outputs).sum(-1)).sum()

    def diag(self) -> Tree:
        return self.layout.split(diagonal(self.outputs).unsqueeze(-1) * diagonal(self.inputs).unsqueeze(-2))

    def diagonalise(self) -> Eigenbasis:
        """The same operator as two rotations and the outer product of the factors' eigenvalues.

        The rotations do not depend on rounding: see :func:`weingarten.operators.factor.settled`.
        """
        return _diagonalised([self], settle=True)[0]

    def __repr__(self) -> str:
        """Leaves and sizes of the factors."""
        _, rows, columns = self.layout.shape
        return f"Kronecker({', '.join(self.space.shapes)}: {rows} x {columns}, {self.space.size} parameters)"


def _factored(curvatures: Sequence[Kronecker], function: FactoredPower) -> list[Curvature]:
    """``FactoredPower``, factor by factor: the damping is shared out, then each factor has its own power.

    A side of length one is a number, which goes into the other factor with all of the damping: exact.
    """
    pairs = [_absorbed(c) for c in curvatures]
    counts = [len(a) for a, _ in pairs]
    a = torch.cat([diagonal(a).sum(-1) for a, _ in pairs])
    b = torch.cat([diagonal(b).sum(-1) for _, b in pairs])
    sizes = [c.layout.shape[1] / c.layout.shape[2] for c in curvatures for _ in range(len(c.inputs))]
    ratio = a.clamp(min=1e-30) / b.clamp(min=1e-30) * torch.tensor(sizes, dtype=a.dtype, device=a.device)
    pi = torch.where((a > 0) & (b > 0), ratio, 1.0).sqrt()
    root = function.damping**0.5
    shifts = [*(pi * root).split_with_sizes(counts), *(root / pi).split_with_sizes(counts)]
    for i, c in enumerate(curvatures):
        if 1 in c.layout.shape[1:]:
            alone = 0 if c.layout.shape[2] == 1 else len(curvatures)  # the side that is one
            shifts[alone + i] = torch.zeros_like(shifts[i])
            shifts[len(curvatures) - alone + i] = torch.full_like(shifts[i], function.damping)
    factors = [*(a for a, _ in pairs), *(b for _, b in pairs)]
    power, full = Power(function.exponent), [i for i, f in enumerate(factors) if not is_diagonal(f)]
    found = dict(zip(full, evaluate_each(power, *_at(full, factors, shifts)), strict=True))
    for i, factor in enumerate(factors):
        if is_diagonal(factor):
            found[i] = narrowed(power(diagonal(factor) + shifts[i].unsqueeze(-1)), factor.dtype)
    size = len(curvatures)
    return [Kronecker(c.layout, found[i], found[size + i]) for i, c in enumerate(curvatures)]


def _absorbed(curvature: Kronecker) -> tuple[Tensor, Tensor]:
    """Input and output factor; where one is a number, it is one, kept as a diagonal, and the other has it as a factor."""
    a, b = curvature.inputs, curvature.outputs
    _, rows, columns = curvature.layout.shape
    if columns == 1:
        number = diagonal(a)
        return torch.ones_like(number), b * (number if is_diagonal(b) else number.unsqueeze(-1)).to(b.dtype)
    if rows == 1:
        number = diagonal(b)
        return a * (number if is_diagonal(a) else number.unsqueeze(-1)).to(a.dtype), torch.ones_like(number)
    return a, b


def _diagonalised(curvatures: Sequence[Kronecker], settle: bool = False) -> list[Eigenbasis]:
    """With ``settle`` for those who look at the bases: a function of the operator does not depend on that of a null space."""
    factors = [*(c.inputs for c in curvatures), *(c.outputs for c in curvatures)]
    full = [i for i, factor in enumerate(factors) if not is_diagonal(factor)]
    pairs = dict(zip(full, eigh_each([factors[i] for i in full]), strict=True))
    if settle:
        pairs = {i: (values, settled(values, basis)) for i, (values, basis) in pairs.items()}
    found: list[Eigenbasis] = []
    for i, c in enumerate(curvatures):
        a, right = pairs.get(i, (diagonal(c.inputs), None))
        b, left = pairs.get(len(curvatures) + i, (diagonal(c.outputs), None))
        spectrum = b.clamp(min=0).unsqueeze(-1) * a.clamp(min=0).unsqueeze(-2)
        found.append(Eigenbasis(c.layout, left, right, spectrum))
    return found


def _at(places: list[int], *lists: Sequence[Tensor]) -> list[list[Tensor]]:
    return [[values[i] for i in places] for values in lists]
