"""Every solver on symmetric operators over several leaves, against dense solutions and an independent dense iteration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import weingarten as wg
from tests.cases import generator, normal
from tests.solvers.matrices import FLAT, SPACE, B, Dense, matrix
from weingarten import tree
from weingarten.matfun import SingularMatrixError
from weingarten.solvers import SOLVERS
from weingarten.solvers.neumann import largest_eigenvalue
from weingarten.tree import Space

# what each solver of the table needs to be accurate; None: it does not solve at all
ACCURATE = {
    "first-order": None,
    "neumann": wg.Neumann(steps=600, tol=1e-12),
    "robbins-monro": wg.RobbinsMonro(steps=600, tol=1e-12),  # which draws the operator itself here
    "cg": wg.CG(steps=30, tol=1e-12),
    "minres": wg.MINRES(steps=30, tol=1e-12),
    "nystrom": wg.Nystrom(rank=9),
    "direct": wg.Direct(),
}
SOLVING = [name for name in ACCURATE if ACCURATE[name] is not None]
SCALES = [1.0, 1e-3, 250.0]


def test_every_solver_of_the_table_has_a_case():
    assert set(ACCURATE) == set(SOLVERS)
    for name, solver in ACCURATE.items():
        assert solver is None or type(solver) is SOLVERS[name]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", SOLVING)
class TestSolving:
    def test_solves(self, name, scale):
        solution = ACCURATE[name].solve(scale * Dense(matrix()), B)
        expected = torch.linalg.solve(scale * matrix(), FLAT)
        torch.testing.assert_close(SPACE.flatten(solution.value), expected, rtol=1e-8, atol=1e-10 / scale)
        assert solution.converged
        assert solution.residual < 1e-8
        assert not solution.negative_curvature
        assert {n: x.shape for n, x in solution.value.items()} == SPACE.shapes

    def test_reported_residual_is_the_true_one(self, name, scale):
        solution = ACCURATE[name].solve(scale * Dense(matrix()), B)
        true = (FLAT - scale * matrix() @ SPACE.flatten(solution.value)).norm() / FLAT.norm()
        assert solution.residual == pytest.approx(float(true), abs=1e-11)

    def test_multiples_of_the_identity_take_one_step(self, name, scale):
        solution = ACCURATE[name].solve(scale * wg.Identity(SPACE), B)
        torch.testing.assert_close(solution.value, tree.scale(1 / scale, B))
        assert solution.converged
        assert solution.steps == 1

    def test_warm_start_from_elsewhere_and_from_the_solution(self, name, scale):
        operator = scale * Dense(matrix())
        start = SPACE.randn(generator(5))
        found = ACCURATE[name].solve(operator, B, start)
        expected = SPACE.unflatten(torch.linalg.solve(scale * matrix(), FLAT))
        torch.testing.assert_close(found.value, expected, rtol=1e-8, atol=1e-10 / scale)
        again = ACCURATE[name].solve(operator, B, expected)
        torch.testing.assert_close(again.value, expected, rtol=1e-8, atol=1e-10 / scale)


@pytest.mark.parametrize("name", ACCURATE)
class TestEdges:
    def test_zero_right_hand_side(self, name):
        solver = ACCURATE[name] or SOLVERS[name]()
        for start in (None, B):
            solution = solver.solve(Dense(matrix()), SPACE.zeros(), start)
            assert not any(leaf.any() for leaf in solution.value.values())

    def test_wrong_leaf_is_named(self, name):
        solver = ACCURATE[name] or SOLVERS[name]()
        with pytest.raises(ValueError, match="solve: leaf 'b' has shape"):
            solver.solve(Dense(matrix()), B | {"b": normal(3)})

    def test_arguments_are_left_alone(self, name):
        solver = ACCURATE[name] or SOLVERS[name]()
        b, start = SPACE.randn(generator(1)), SPACE.randn(generator(2))
        kept = SPACE.flatten(b).clone(), SPACE.flatten(start).clone()
        solver.solve(Dense(matrix()), b, start)
        assert torch.equal(SPACE.flatten(b), kept[0])
        assert torch.equal(SPACE.flatten(start), kept[1])

    def test_preconditioner_is_taken_or_refused(self, name):
        solver = ACCURATE[name] or SOLVERS[name]()
        inverse = Dense(torch.linalg.inv(matrix()))
        if name in ("cg", "minres", "neumann", "robbins-monro"):
            assert solver.preconditioned(inverse).preconditioner is inverse
        else:
            with pytest.raises(TypeError, match="takes no preconditioner"):
                solver.preconditioned(inverse)


def krylov(a: Tensor, b: Tensor, steps: int, m: Tensor | None = None, x0: Tensor | None = None) -> Tensor:
    """The minimiser of the A-norm of the error over the (preconditioned) Krylov space, by dense algebra: no recurrence."""
    x0 = torch.zeros_like(b) if x0 is None else x0
    m = torch.eye(len(b), dtype=b.dtype) if m is None else m
    columns = [m @ (b - a @ x0)]
    for _ in range(steps - 1):
        columns.append(m @ a @ columns[-1])
    basis = torch.linalg.qr(torch.stack(columns, 1)).Q
    return x0 + basis @ torch.linalg.solve(basis.mT @ a @ basis, basis.mT @ (b - a @ x0))


class TestCG:
    @pytest.mark.parametrize("steps", range(1, 8))
    @pytest.mark.parametrize("scale", SCALES)
    def test_iterates_are_the_krylov_minimisers(self, steps, scale):
        a = scale * matrix()
        found = wg.CG(steps, tol=0).solve(Dense(a), B)
        assert found.steps == steps
        torch.testing.assert_close(
            SPACE.flatten(found.value), krylov(a, FLAT, steps), rtol=1e-7, atol=1e-9 / scale
        )

    @pytest.mark.parametrize("steps", [1, 2, 3, 5])
    def test_preconditioned_and_warm_iterates(self, steps):
        a, m = 3 * matrix(0.01, 5), torch.linalg.inv(matrix(0.3, 2, seed=1))
        start = SPACE.randn(generator(6))
        found = wg.CG(steps, 0, Dense(m)).solve(Dense(a), B, start)
        expected = krylov(a, FLAT, steps, m, SPACE.flatten(start))
        torch.testing.assert_close(SPACE.flatten(found.value), expected, rtol=1e-6, atol=1e-8)

    def test_exact_preconditioner_takes_one_step(self):
        found = wg.CG(5, 1e-10, Dense(7 * torch.linalg.inv(matrix()))).solve(Dense(matrix()), B)
        assert found.steps == 1
        torch.testing.assert_close(SPACE.flatten(found.value), torch.linalg.solve(matrix(), FLAT))

    def test_products(self):
        operator = Dense(matrix())
        wg.CG(4, 0).solve(operator, B)
        assert operator.products == 4
        operator = Dense(matrix())
        wg.CG(4, 0).solve(operator, B, B)
        assert operator.products == 5

    def test_negative_curvature_is_flagged_and_never_reversed(self):
        indefinite = matrix(-3.2, 1)
        found = wg.CG(9, 0).solve(Dense(indefinite), B)
        assert found.negative_curvature
        assert not found.converged
        assert float(tree.dot(found.value, B)) > 0
        negative = wg.CG(9).solve(Dense(-matrix()), B)  # already in the first step
        assert negative.negative_curvature
        assert negative.steps == 0
        torch.testing.assert_close(negative.value, B)
        true = (FLAT + matrix() @ FLAT).norm() / FLAT.norm()
        assert negative.residual == pytest.approx(float(true))

    def test_nan_is_neither_converged_nor_negative_curvature(self):
        for operator, b in (
            (Dense(matrix() * torch.nan), B),
            (Dense(matrix()), tree.scale(float("nan"), B)),
        ):
            found = wg.CG(3).solve(operator, b)
            assert not found.converged
            assert not found.negative_curvature
            assert found.residual != found.residual

    def test_steps_are_checked(self):
        with pytest.raises(ValueError, match="steps is 0"):
            wg.CG(0)


class TestNeumann:
    @pytest.mark.parametrize("steps", [1, 2, 5])
    def test_is_the_truncated_series(self, steps):
        a, alpha = matrix(), 0.2
        term = torch.eye(SPACE.size, dtype=torch.float64)
        total = torch.zeros_like(term)
        for _ in range(steps):
            total, term = total + alpha * term, term - alpha * a @ term
        found = wg.Neumann(steps, alpha, tol=0).solve(Dense(a), B)
        torch.testing.assert_close(SPACE.flatten(found.value), total @ FLAT)

    @pytest.mark.parametrize("scale", SCALES)
    def test_default_step_converges_and_a_long_one_is_refused(self, scale):
        operator = scale * Dense(matrix())
        residuals = [wg.Neumann(k).solve(operator, B).residual for k in (1, 5, 25)]
        assert residuals == sorted(residuals, reverse=True)
        assert residuals[-1] < 0.1
        with pytest.raises(wg.DivergenceError, match="residual grew"):
            wg.Neumann(20, 2.5 / (4 * scale)).solve(operator, B)

    def test_indefinite_operator_is_refused(self):
        with pytest.raises(wg.DivergenceError):
            wg.Neumann(100).solve(Dense(matrix(-3.2, 1)), B)

    def test_preconditioned(self):
        a, m = matrix(0.5, 5), torch.linalg.inv(matrix(0.5, 2, seed=1))
        found = wg.Neumann(2000, preconditioner=Dense(m), tol=1e-9).solve(Dense(a), B)
        torch.testing.assert_close(
            SPACE.flatten(found.value), torch.linalg.solve(a, FLAT), rtol=1e-5, atol=1e-6
        )
        assert wg.Neumann(3, preconditioner=Dense(torch.linalg.inv(a))).solve(Dense(a), B).steps == 1

    def test_a_transient_of_the_plain_residual_is_no_divergence(self):
        """With a preconditioner the residual falls in the norm of P^-1, while its plain norm may rise at first."""
        space = Space.of({"x": torch.zeros(2, dtype=torch.float64)})
        a = torch.diag(torch.tensor([1.0, 100.0], dtype=torch.float64))
        m = torch.tensor([[2.0, 0.9], [0.9, 0.5]], dtype=torch.float64)
        rose = False
        for angle in torch.linspace(0, 3, 16):
            b = {"x": torch.stack([angle.cos(), angle.sin()]).double()}
            step = 1.9 / float(torch.linalg.eigvals(m @ a).real.max())
            found = wg.Neumann(1, step, preconditioner=Dense(m, space)).solve(Dense(a, space), b)
            rose |= found.residual > 1
        assert rose

    def test_largest_eigenvalue(self):
        assert largest_eigenvalue(Dense(3 * matrix()), steps=200) == pytest.approx(12)
        with pytest.raises(wg.DivergenceError, match="norm 0"):
            largest_eigenvalue(Dense(0 * matrix()))

    def test_hyperparameters_are_checked(self):
        for arguments in ({"steps": 0}, {"step": 0.0}, {"step": -1.0}):
            with pytest.raises(ValueError, match="Neumann: steps"):
                wg.Neumann(**arguments)


class TestDirect:
    def test_couples_all_leaves(self):
        block = torch.block_diag(*[matrix()[i : i + 1, i : i + 1] for i in range(SPACE.size)])
        found = SPACE.flatten(wg.Direct().solve(Dense(matrix()), B).value)
        assert (found - torch.linalg.solve(block, FLAT)).norm() > 0.1 * found.norm()

    def test_indefinite_is_solved_and_flagged(self):
        found = wg.Direct().solve(Dense(matrix(-3.2, 1)), B)
        torch.testing.assert_close(SPACE.flatten(found.value), torch.linalg.solve(matrix(-3.2, 1), FLAT))
        assert found.negative_curvature

    def test_singular_and_large_are_refused(self):
        with pytest.raises(SingularMatrixError, match="singular"):
            wg.Direct().solve(Dense(matrix(0, 1)), B)
        with pytest.raises(SingularMatrixError):
            wg.Direct().solve(wg.DiagonalCurvature({"w": torch.zeros(2)}), {"w": torch.ones(2)})
        with pytest.raises(ValueError, match="has 9 parameters, expected at most max_size=8"):
            wg.Direct(8).solve(Dense(matrix()), B)

    def test_curvatures_go_through_their_spectrum(self):
        curvature = wg.DiagonalCurvature({"w": torch.full((2,), 4.0)})
        found = wg.Direct(max_size=1).solve(curvature, {"w": torch.ones(2)})
        assert found.value["w"].tolist() == [0.25, 0.25]
        assert found.converged


def test_first_order_returns_the_right_hand_side_and_claims_nothing():
    operator = Dense(matrix())
    found = wg.FirstOrder().solve(operator, B)
    assert operator.products == 0
    assert not found.converged
    assert found.residual != found.residual
    torch.testing.assert_close(found.value, B)
