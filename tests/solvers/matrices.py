"""Matrices as operators on several leaves, with their products counted."""

from __future__ import annotations

import torch
from torch import Tensor

import weingarten as wg
from tests.cases import generator, normal
from weingarten.tree import Space

SPACE = Space.of({"w": normal(2, 3), "b": normal(2), "s": normal()})


class Dense(wg.Operator):
    """A matrix as an operator, which counts its products."""

    def __init__(self, matrix: Tensor, space: Space = SPACE) -> None:
        self.matrix, self._space, self.products = matrix, space, 0

    @property
    def space(self) -> Space:
        return self._space

    def apply(self, v):
        self.space.check(v, "Dense.apply")
        self.products += 1
        return self.space.unflatten(self.matrix @ self.space.flatten(v))


def matrix(low: float = 0.5, high: float = 4.0, seed: int = 0) -> Tensor:
    """Symmetric with eigenvalues evenly between the two."""
    basis = torch.linalg.qr(normal(SPACE.size, SPACE.size, seed=seed)).Q
    return basis @ torch.diag(torch.linspace(low, high, SPACE.size, dtype=torch.float64)) @ basis.mT


B = SPACE.randn(generator(11))
FLAT = SPACE.flatten(B)


class Mixture(wg.Operator):
    """Matrices with probabilities: an operator that draws one of them, and whose product is that of their mean."""

    def __init__(self, matrices: list[Tensor], shares: Tensor) -> None:
        self.operators, self.shares = [Dense(m) for m in matrices], shares
        self.mean = Dense(sum(p * m for p, m in zip(shares, matrices, strict=True)))

    @property
    def space(self) -> Space:
        return SPACE

    def apply(self, v):
        return self.mean.apply(v)

    def draw(self, generator):
        return self.operators[int(torch.multinomial(self.shares, 1, generator=generator))]
