"""Minimal residuals against least squares over the Krylov space, on indefinite and singular matrices."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import weingarten as wg
from tests.cases import PROBLEMS, generator, normal
from tests.solvers.matrices import FLAT, SPACE, B, Dense, matrix
from weingarten import tree

STEPS = range(1, 10)
INDEFINITE = {
    "evenly": matrix(-3.2, 1.1),
    "mostly positive": matrix(-0.3, 4, seed=3),
    "negative": -matrix(),
    "badly scaled": 1e6 * matrix(-1.7, 3, seed=4),
    "positive": matrix(),
}


def krylov_basis(a: Tensor, r: Tensor, steps: int, m: Tensor | None = None) -> Tensor:
    """Orthonormal columns that span ``M r, M A M r, ...``, each made orthogonal to all before, twice."""
    m = torch.eye(len(r), dtype=r.dtype) if m is None else m
    columns: list[Tensor] = []
    for _ in range(steps):
        new = m @ (a @ columns[-1] if columns else r)
        for _ in range(2):
            for column in columns:
                new = new - (column @ new) * column
        columns.append(new / new.norm())
    return torch.stack(columns, 1)


def least_squares(a: Tensor, b: Tensor, steps: int, m: Tensor | None = None, x0: Tensor | None = None):
    """The minimiser of ``|M^{1/2} (b - A x)|`` over the Krylov space by dense algebra: no recurrence."""
    x0 = torch.zeros_like(b) if x0 is None else x0
    root = torch.eye(len(b), dtype=b.dtype) if m is None else torch.linalg.cholesky(m).mT
    r = b - a @ x0
    basis = krylov_basis(a, r, steps, m)
    return x0 + basis @ torch.linalg.lstsq(root @ a @ basis, (root @ r)[:, None]).solution[:, 0]


@pytest.mark.parametrize("name", INDEFINITE)
class TestIndefinite:
    @pytest.mark.parametrize("steps", STEPS)
    def test_iterates_minimise_the_residual(self, name, steps):
        a = INDEFINITE[name]
        found = wg.MINRES(steps, tol=0).solve(Dense(a), B)
        assert found.steps == steps
        expected = least_squares(a, FLAT, steps)
        torch.testing.assert_close(
            SPACE.flatten(found.value), expected, rtol=1e-7, atol=1e-9 * float(expected.norm())
        )
        true = (FLAT - a @ SPACE.flatten(found.value)).norm() / FLAT.norm()
        assert found.residual == pytest.approx(float(true), abs=1e-10)

    @pytest.mark.parametrize("steps", [1, 2, 4, 6])
    def test_preconditioned_and_warm_iterates(self, name, steps):
        a, m = INDEFINITE[name], torch.linalg.inv(matrix(0.3, 2, seed=1))
        start = SPACE.randn(generator(6))
        found = wg.MINRES(steps, 0, Dense(m)).solve(Dense(a), B, start)
        expected = least_squares(a, FLAT, steps, m, SPACE.flatten(start))
        torch.testing.assert_close(
            SPACE.flatten(found.value), expected, rtol=1e-6, atol=1e-8 * float(expected.norm())
        )
        true = (FLAT - a @ SPACE.flatten(found.value)).norm() / FLAT.norm()
        assert found.residual == pytest.approx(float(true), rel=1e-8, abs=1e-10)

    def test_solves(self, name):
        a = INDEFINITE[name]
        for preconditioner in (None, Dense(torch.linalg.inv(matrix(0.3, 2, seed=1)))):
            found = wg.MINRES(30, 1e-10, preconditioner).solve(Dense(a), B)
            expected = torch.linalg.solve(a, FLAT)
            torch.testing.assert_close(
                SPACE.flatten(found.value), expected, rtol=1e-7, atol=1e-8 * float(expected.norm())
            )
            assert found.converged
            assert found.negative_curvature == (name != "positive")

    def test_residual_never_grows_and_is_at_most_that_of_cg(self, name):
        operator = Dense(INDEFINITE[name])
        residuals = [wg.MINRES(k, 0).solve(operator, B).residual for k in STEPS]
        assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(residuals))
        assert residuals[0] <= 1
        for k in (1, 3, 5):
            assert wg.MINRES(k, 0).solve(operator, B).residual <= wg.CG(k, 0).solve(operator, B).residual

    def test_products(self, name):
        for start, more in ((None, 0), (B, 1)):
            operator = Dense(INDEFINITE[name])
            wg.MINRES(4, 0).solve(operator, B, start)
            assert operator.products == 4 + more


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("low", [-1.0, -0.1, -0.01, 0.01])
def test_negative_curvature_is_that_of_the_krylov_space(seed, low):
    a, seen = matrix(low, 2, seed=seed), []
    for steps in STEPS:
        found = wg.MINRES(steps, 0).solve(Dense(a), B)
        basis = krylov_basis(a, FLAT, steps)
        assert found.negative_curvature == bool(torch.linalg.eigvalsh(basis.mT @ a @ basis)[0] <= 0)
        seen.append(found.negative_curvature)
    assert seen[-1] == (low < 0)


class TestSingular:
    A = (
        normal(SPACE.size, 5)
        @ torch.diag(torch.tensor([3.0, -2, 1, 0.5, -0.1])).double()
        @ normal(SPACE.size, 5).mT
    )

    @pytest.mark.parametrize("steps", [5, 6, 50])
    @pytest.mark.parametrize("tol", [0.0, 1e-9])
    def test_consistent_gives_the_solution_of_least_norm(self, steps, tol):
        b = self.A @ FLAT
        found = wg.MINRES(steps, tol).solve(Dense(self.A), SPACE.unflatten(b))
        torch.testing.assert_close(
            SPACE.flatten(found.value), torch.linalg.pinv(self.A, rtol=1e-10) @ b, rtol=1e-6, atol=1e-8
        )
        assert found.residual < 1e-9
        assert found.converged == (tol > 0)

    @pytest.mark.parametrize("steps", [6, 12, 50])
    def test_inconsistent_ends_at_least_squares_unconverged(self, steps):
        found = wg.MINRES(steps, 1e-9).solve(Dense(self.A), B)
        least = (FLAT - self.A @ torch.linalg.pinv(self.A, rtol=1e-10) @ FLAT).norm() / FLAT.norm()
        true = (FLAT - self.A @ SPACE.flatten(found.value)).norm() / FLAT.norm()
        assert found.residual == pytest.approx(float(least))
        assert float(true) == pytest.approx(float(least))
        assert not found.converged

    @pytest.mark.parametrize("seed", range(12))
    def test_inconsistent_and_semi_definite_has_a_direction_without_curvature(self, seed):
        factor = normal(SPACE.size, 5, seed=seed)
        a = factor @ factor.mT
        found = wg.MINRES(50, 1e-9).solve(Dense(a), B)
        assert found.negative_curvature
        assert not found.converged
        consistent = wg.MINRES(50, 1e-9).solve(Dense(a), SPACE.unflatten(a @ FLAT))
        assert consistent.converged
        assert not consistent.negative_curvature

    def test_eigenvector_and_kernel(self):
        values, vectors = torch.linalg.eigh(matrix(-3.2, 1))
        found = wg.MINRES(9, 1e-12).solve(Dense(matrix(-3.2, 1)), SPACE.unflatten(vectors[:, 0]))
        assert found.steps == 1
        torch.testing.assert_close(SPACE.flatten(found.value), vectors[:, 0] / values[0])
        zero = wg.MINRES(9).solve(Dense(0 * matrix()), B)
        assert zero.residual == 1
        assert not zero.converged
        assert zero.negative_curvature  # p^T A p = 0
        assert not any(leaf.any() for leaf in zero.value.values())


def test_exact_preconditioner_takes_one_step():
    found = wg.MINRES(5, 1e-10, Dense(7 * torch.linalg.inv(matrix()))).solve(Dense(matrix()), B)
    assert found.steps == 1
    torch.testing.assert_close(SPACE.flatten(found.value), torch.linalg.solve(matrix(), FLAT))


def test_preconditioner_must_be_positive_definite():
    for m in (-matrix(), matrix(-3.2, 1, seed=2)):
        with pytest.raises(ValueError, match="expected > 0; use the inverse of a Curvature"):
            wg.MINRES(9, 0, Dense(m)).solve(Dense(matrix()), B)


def test_nan_is_neither_converged_nor_negative_curvature():
    for operator, b in ((Dense(matrix() * torch.nan), B), (Dense(matrix()), tree.scale(float("nan"), B))):
        found = wg.MINRES(3).solve(operator, b)
        assert not found.converged
        assert not found.negative_curvature
        assert found.residual != found.residual


def test_steps_are_checked():
    with pytest.raises(ValueError, match="MINRES: steps is 0"):
        wg.MINRES(0)


def test_indefinite_hessian_of_a_model():
    problem = PROBLEMS["mlp"]
    hessian = wg.Hessian(problem.objective(), problem.batches())
    dense = hessian.dense()
    b = hessian.apply(hessian.space.randn(generator(2)))
    found = wg.MINRES(200, 1e-8).solve(hessian, b)
    assert torch.linalg.eigvalsh(dense)[0] < -1e-3
    assert found.converged
    assert found.negative_curvature
    torch.testing.assert_close(
        dense @ hessian.space.flatten(found.value), hessian.space.flatten(b), rtol=1e-6, atol=1e-7
    )
