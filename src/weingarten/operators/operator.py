"""The two protocols everything meets in: an operator can be applied, a curvature has a spectrum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from weingarten import tree
from weingarten.matfun import Log, MatrixFunction, Power, Scale, Shift
from weingarten.tree import Space, Tree, TreeLike

__all__ = ["Curvature", "Identity", "Operator"]


class Operator(ABC):
    """A symmetric linear map on a :class:`~weingarten.tree.Space` of named tensors."""

    @property
    @abstractmethod
    def space(self) -> Space:
        """Names, shapes, types and device of the vectors it takes and returns."""

    @abstractmethod
    def apply(self, v: TreeLike) -> Tree:
        """The product with ``v``."""

    def draw(self, generator: torch.Generator) -> Operator:
        """A random operator whose expectation is this one: the operator itself, except where it is a mean over batches.

        Sums and multiples draw term by term, so that a shift by a multiple of the identity stays as it is.
        """
        return self

    @final
    def __add__(self, other: Operator) -> Operator:
        """The sum, applied term by term."""
        return Sum(self, other)

    @final
    def __mul__(self, factor: float) -> Operator:
        """The multiple by a number."""
        return Scaled(self, factor)

    __rmul__ = __mul__

    @final
    def __matmul__(self, other: Operator) -> Operator:
        """The product ``v -> self.apply(other.apply(v))``; symmetric only if the two commute."""
        return Product(self, other)

    @final
    def dense(self) -> Tensor:
        """The matrix ``(P, P)`` in the order of ``space``; P products, for small problems."""
        space = self.space
        identity = torch.eye(space.size, dtype=space.dtype, device=space.device)
        return torch.stack([space.flatten(self.apply(space.unflatten(row))) for row in identity], dim=1)

    @final
    def to_scipy(self) -> LinearOperator:
        """A ``scipy.sparse.linalg.LinearOperator`` on flat numpy vectors, for eigsh, cg and their kin."""
        space = self.space
        dtype = torch.promote_types(space.dtype, torch.float32)  # numpy has no bfloat16

        def product(x: object) -> object:
            v = torch.as_tensor(x, dtype=dtype, device=space.device).reshape(-1)
            return space.flatten(self.apply(space.unflatten(v))).detach().to(dtype).cpu().numpy()

        return LinearOperator(
            (space.size, space.size),
            matvec=product,
            rmatvec=product,
            dtype=torch.empty(0, dtype=dtype).numpy().dtype,
        )


class Curvature(Operator):
    """A symmetric positive semi-definite operator whose matrix functions are known.

    ``map``, ``trace`` and ``diag`` say all; solving, powers, log-determinants and sampling follow here, once. Nothing is cached:
    a caller who solves often keeps ``inverse = curvature.map(Power(-1, damping))`` and calls ``inverse.apply``.
    """

    @abstractmethod
    def map(self, function: MatrixFunction) -> Curvature:
        """The matrix function, in the same storage or one with the same blocks."""

    @abstractmethod
    def trace(self) -> Tensor:
        """Sum of the eigenvalues, a 0-d tensor."""

    @abstractmethod
    def diag(self) -> Tree:
        """The diagonal, in the shape of the parameters."""

    @final
    def solve(self, b: TreeLike, damping: float = 0.0) -> Tree:
        """``(C + damping I)^{-1} b``.

        Args:
            b: a vector of the space.
            damping: added to every eigenvalue, in units of loss per squared parameter.

        Raises:
            SingularMatrixError: if the sum is singular at working precision.
        """
        return self.map(Power(-1, damping)).apply(b)

    @final
    def power(self, exponent: float, damping: float = 0.0) -> Curvature:
        """``(C + damping I)^exponent``, itself a curvature."""
        return self.map(Power(exponent, damping))

    @final
    def shift(self, damping: float) -> Curvature:
        """``C + damping I``."""
        return self.map(Shift(damping))

    @final
    def scale(self, factor: float) -> Curvature:
        """``factor * C`` as a curvature, for ``factor >= 0`` (``*`` gives a mere operator)."""
        return self.map(Scale(factor))

    @final
    def logdet(self, damping: float = 0.0) -> Tensor:
        """``log det(C + damping I)``, a 0-d tensor."""
        return self.map(Log(damping)).trace()

    @final
    def sample(self, generator: torch.Generator | None = None, damping: float = 0.0) -> Tree:
        """A draw from the normal distribution with mean zero and *precision* ``C + damping I`` (Laplace's posterior)."""
        return self.map(Power(-0.5, damping)).apply(self.space.randn(generator))

    @final
    def quadratic(self, v: TreeLike) -> Tensor:
        """``v^T C v``, a 0-d tensor."""
        return tree.dot(v, self.apply(v))


@final
class Identity(Operator):
    """The map ``v -> v``."""

    def __init__(self, space: Space) -> None:
        self._space = space

    @property
    def space(self) -> Space:
        return self._space

    def apply(self, v: TreeLike) -> Tree:
        self._space.check(v, "Identity.apply")
        return dict(v)


@final
class Sum(Operator):
    """``first + second``."""

    def __init__(self, first: Operator, second: Operator) -> None:
        _check_same_space(first, second, "+")
        self.first, self.second = first, second

    @property
    def space(self) -> Space:
        return self.first.space

    def apply(self, v: TreeLike) -> Tree:
        return tree.add(self.first.apply(v), self.second.apply(v))

    def draw(self, generator: torch.Generator) -> Operator:
        return Sum(self.first.draw(generator), self.second.draw(generator))


@final
class Scaled(Operator):
    """``factor * operator``."""

    def __init__(self, operator: Operator, factor: float) -> None:
        self.operator, self.factor = operator, factor

    @property
    def space(self) -> Space:
        return self.operator.space

    def apply(self, v: TreeLike) -> Tree:
        return tree.scale(self.factor, self.operator.apply(v))

    def draw(self, generator: torch.Generator) -> Operator:
        return Scaled(self.operator.draw(generator), self.factor)


@final
class Product(Operator):
    """``first @ second``."""

    def __init__(self, first: Operator, second: Operator) -> None:
        _check_same_space(first, second, "@")
        self.first, self.second = first, second

    @property
    def space(self) -> Space:
        return self.second.space

    def apply(self, v: TreeLike) -> Tree:
        return self.first.apply(self.second.apply(v))


def _check_same_space(first: Operator, second: object, symbol: str) -> None:
    if not isinstance(second, Operator):
        raise TypeError(
            f"Operator {symbol}: found {type(second).__name__}, expected another operator; the product with a vector is apply(v)"
        )
    if first.space.shapes != second.space.shapes:
        difference = sorted(set(first.space.shapes.items()) ^ set(second.space.shapes.items()))
        raise ValueError(
            f"Operator {symbol}: the operands act on different leaves, found differing {difference}"
        )
