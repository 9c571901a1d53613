"""Is this hypergradient right, and if not, which part of it is wrong?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from weingarten import reference, tree
from weingarten.bilevel.problem import Batches, Hypergradient, HypergradientMethod, Problem
from weingarten.bilevel.resolve import Level64, doubled, minimise
from weingarten.objective import Batch, Data, Objective
from weingarten.tree import Space, Tree, TreeLike

__all__ = ["Check", "Dense", "Oracle", "Part", "ReSolve", "check_hypergradient"]


@dataclass(frozen=True)
class Part:
    """One part of a hypergradient, as found and as expected.

    Attributes:
        name: which part.
        relative_error: ``|found - expected| / |expected|``; 0 if both vanish.
        cosine: of the angle between them; 1 if both vanish.
        found: norm of what the method gave.
        expected: norm of what the oracle gave.
    """

    name: str
    relative_error: float
    cosine: float
    found: float
    expected: float


@dataclass(frozen=True)
class Check:
    """The comparison of one hypergradient with an oracle.

    Attributes:
        against: the oracle.
        parts: parts that can disagree independently.
        total: the whole hypergradient.
        inner_gradient: norm of the inner gradient at the parameters. The implicit formula holds where it is zero.
    """

    against: str
    parts: tuple[Part, ...]
    total: Part
    inner_gradient: float

    @property
    def worst(self) -> Part:
        """The part with the largest relative error."""
        return max(self.parts, key=lambda part: part.relative_error)

    def __str__(self) -> str:
        """A table, and which part disagrees most."""
        lines = [f"{'part':<20} {'relative error':>14} {'cosine':>9} {'norm found':>12} {'expected':>12}"]
        for part in (*self.parts, self.total):
            numbers = (
                f"{part.relative_error:14.3g} {part.cosine:9.5f} {part.found:12.4g} {part.expected:12.4g}"
            )
            lines.append(f"{part.name:<20} {numbers}")
        lines.append(
            f"against {self.against}; norm of the inner gradient at the parameters: {self.inner_gradient:.3g}"
        )
        return "\n".join([*lines, f"largest disagreement: {self.worst.name}"])


class Oracle(ABC):
    """A slow way to the truth, in float64."""

    @abstractmethod
    def compare(
        self,
        method: HypergradientMethod,
        found: Hypergradient,
        levels: tuple[Level64, Level64],
        params: Tree,
        hparams: Tree,
        curvature: Batch,
    ) -> tuple[list[Part], Part]:
        """The parts and the total; all arguments but the method and what it found are in float64."""


@dataclass(frozen=True)
class Dense(Oracle):
    r"""The implicit formula with a dense matrix from the definition, part by part.

    ========================  ==========================================================================================
    direct term               against central differences of the outer gradient's own value along random directions
    inverse product           against a dense solve with the matrix, the penalty's Hessian and the damping
    mixed derivative          at the method's own q, against ``(d_hparams g(params + h q) - d_hparams g(params - h q)) / 2 h``
    total                     against all three oracles together
    ========================  ==========================================================================================

    Args:
        matrix: ``reference.dense_ggn`` (default) or ``reference.dense_hessian``.
        damping: default: the method's own.
    """

    matrix: Callable[[Objective, Data, TreeLike], Tensor] = reference.dense_ggn
    damping: float | None = None

    def compare(
        self,
        method: HypergradientMethod,
        found: Hypergradient,
        levels: tuple[Level64, Level64],
        params: Tree,
        hparams: Tree,
        curvature: Batch,
    ) -> tuple[list[Part], Part]:
        inner, outer = levels
        b, direct = outer.gradients(params, hparams)
        damping = getattr(method, "damping", 0.0) if self.damping is None else self.damping
        q = self._solve(inner, params, hparams, curvature, b, damping)
        parts = [_part("direct term", found.direct, direct)]
        if found.inverse_product is not None:
            own = {name: leaf.double() for name, leaf in found.inverse_product.items()}
            mixed = tree.sub(found.direct, found.value)
            parts.append(_part("inverse product", own, q))
            parts.append(_part("mixed derivative", mixed, inner.mixed(params, hparams, own)))
        return parts, _part("total", found.value, tree.sub(direct, inner.mixed(params, hparams, q)))

    def _solve(
        self, inner: Level64, params: Tree, hparams: Tree, batch: Batch, b: Tree, damping: float
    ) -> Tree:
        space = Space.of(params)
        with torch.no_grad():
            data = [inner.level.transform(hparams, batch)]
        matrix = self.matrix(inner.level.objective, data, params) + inner.penalty_hessian(params, hparams)
        matrix += damping * torch.eye(space.size, dtype=space.dtype, device=space.device)
        return space.unflatten(torch.linalg.solve(matrix, space.flatten(b)))


@dataclass(frozen=True)
class ReSolve(Oracle):
    r"""Central differences of ``F(hparams) = f(params*(hparams), hparams)``, the inner problem solved again at every point.

    By Newton's method with a dense Hessian: small, twice differentiable inner problems only. Knows no damping, nor the curvature
    batch, so that a damped method disagrees by what the damping does. The comparison is between derivatives along ``directions``
    random directions, or along every coordinate if there are no more than that.

    Args:
        directions: how many.
        step: half the distance of the two points, relative to the largest outer variable (or 1).
        tol: norm of the inner gradient at which the inner problem counts as solved.
        max_steps: Newton steps for that.
        seed: of the directions.

    Raises (when used):
        DivergenceError: if the inner problem is not solved within ``max_steps``.
    """

    directions: int = 16
    step: float = 1e-4
    tol: float = 1e-10
    max_steps: int = 200
    seed: int = 0

    def compare(
        self,
        method: HypergradientMethod,
        found: Hypergradient,
        levels: tuple[Level64, Level64],
        params: Tree,
        hparams: Tree,
        curvature: Batch,
    ) -> tuple[list[Part], Part]:
        inner, outer = levels
        minimum = minimise(inner, params, hparams, self.tol, self.max_steps)
        size = self.step * max(1.0, *(float(leaf.abs().max()) for leaf in hparams.values()))
        rows: list[list[float]] = []
        for direction in self._directions(hparams):
            ends = [tree.axpy(sign * size, direction, hparams) for sign in (1, -1)]
            moved = [minimise(inner, minimum, end, self.tol, self.max_steps) for end in ends]
            whole = [outer.value(m, end) for m, end in zip(moved, ends, strict=True)]
            fixed = [outer.value(minimum, end) for end in ends]
            expected, direct = (whole[0] - whole[1]) / (2 * size), (fixed[0] - fixed[1]) / (2 * size)
            own, own_direct = (
                float(tree.dot(found.value, direction)),
                float(tree.dot(found.direct, direction)),
            )
            rows.append([own_direct, direct, own - own_direct, expected - direct, own, expected])
        columns = [{"": column} for column in torch.tensor(rows, dtype=torch.float64).unbind(1)]
        parts = [
            _part("direct term", columns[0], columns[1]),
            _part("through the params", columns[2], columns[3]),
        ]
        return parts, _part("total", columns[4], columns[5])

    def _directions(self, hparams: Tree) -> list[Tree]:
        space = Space.of(hparams)
        if space.size <= self.directions:
            return [
                space.unflatten(row) for row in torch.eye(space.size, dtype=space.dtype, device=space.device)
            ]
        generator = torch.Generator(device=space.device).manual_seed(self.seed)
        return [space.randn(generator) for _ in range(self.directions)]


def check_hypergradient(
    method: HypergradientMethod,
    problem: Problem,
    params: TreeLike,
    hparams: TreeLike,
    batches: Batches,
    against: Oracle = Dense(),
) -> Check:
    """Compare one hypergradient with an oracle, and say which part disagrees.

    The method runs in the type of what it is given; the oracle on copies in float64. Dropout is off in both.

    Args:
        method: ``Implicit(...)``, ``Unrolled(...)`` or another.
        problem: the two levels; small enough for a dense matrix of the parameters.
        params: where; the implicit formula supposes a minimum of the inner problem.
        hparams: the outer variables.
        batches: the data, each used as it is.
        against: ``Dense()``, ``Dense(reference.dense_hessian)`` or ``ReSolve()``.

    Returns:
        A :class:`Check`: print it, or ask for ``.worst``.

    >>> from weingarten import CG, L2, MSE, Batch, Implicit, Level
    >>> batch = Batch(torch.eye(2), torch.tensor([[1.0], [0.5]]))
    >>> ridge = Objective(lambda params, x: x @ params["w"], MSE())
    >>> problem = Problem(Level(ridge, penalty=L2(lambda hparams: hparams["c"])), Level(ridge))
    >>> found = check_hypergradient(
    ...     Implicit(solver=CG(10), preconditioner=None), problem,
    ...     {"w": torch.ones(2, 1)}, {"c": torch.tensor(0.1)}, Batches(batch, batch),
    ... )
    >>> found.total.relative_error < 1e-5
    True
    """
    found = method(problem, params, hparams, batches)
    params64 = {name: leaf.detach().double() for name, leaf in params.items()}
    hparams64 = {name: leaf.detach().double() for name, leaf in hparams.items()}
    inner, outer = Level64(problem.inner, batches.mixed), Level64(problem.outer, batches.outer)
    parts, total = against.compare(
        method, found, (inner, outer), params64, hparams64, doubled(batches.for_curvature)
    )
    slope = float(tree.norm(inner.gradients(params64, hparams64)[0]))
    name = getattr(getattr(against, "matrix", None), "__name__", "")
    return Check(f"{type(against).__name__}({name})", tuple(parts), total, slope)


def _part(name: str, found: TreeLike, expected: TreeLike) -> Part:
    found = {key: leaf.double() for key, leaf in found.items()}
    mine, theirs = float(tree.norm(found)), float(tree.norm(expected))
    error = float(tree.norm(tree.sub(found, expected)))
    tiny = 1e-12
    cosine = (
        float(tree.dot(found, expected)) / (mine * theirs)
        if min(mine, theirs) > tiny
        else float(max(mine, theirs) <= tiny)
    )
    return Part(
        name,
        error / theirs if theirs > tiny else (0.0 if error <= tiny else float("inf")),
        cosine,
        mine,
        theirs,
    )
