"""The randomised low-rank approximation against its definition, as a solver and as a preconditioner."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import weingarten as wg
from tests.bilevel.problems import classification, relative_error
from tests.cases import PROBLEMS, WEIGHTS, generator, normal
from tests.solvers.matrices import FLAT, SPACE, B, Dense, matrix
from weingarten import reference
from weingarten.matfun import SingularMatrixError
from weingarten.tree import Space

EYE = torch.eye(SPACE.size, dtype=torch.float64)
LARGE = Space.of({"w": normal(6, 8), "b": normal(12)})


def low(rank: int, seed: int = 0) -> Tensor:
    x = normal(SPACE.size, rank, seed=seed)
    return x @ x.mT


def decaying(size: int, rate: float, seed: int = 0) -> Tensor:
    basis = torch.linalg.qr(normal(size, size, seed=seed)).Q
    return basis @ torch.diag(rate ** torch.arange(size, dtype=torch.float64)) @ basis.mT


def orthonormal(rank: int, seed: int = 0, size: int = SPACE.size) -> Tensor:
    return torch.linalg.qr(torch.randn((size, rank), dtype=torch.float64, generator=generator(seed))).Q


class TestApproximation:
    @pytest.mark.parametrize("damping", [0.0, 0.3, 50.0])
    @pytest.mark.parametrize("rank", [1, 3, 6, 9])
    def test_is_the_formula(self, rank, damping):
        h, o = decaying(9, 0.5), orthonormal(rank, seed=4)
        found = wg.nystrom(Dense(h + damping * EYE), rank, damping, generator(4))
        expected = h @ o @ torch.linalg.inv(o.mT @ h @ o) @ (h @ o).mT
        torch.testing.assert_close(found.dense(), expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(
            found.basis.mT @ found.basis, torch.eye(rank, dtype=h.dtype), rtol=0, atol=1e-12
        )

    @pytest.mark.parametrize("rank", [2, 5, 8])
    def test_lies_between_zero_and_the_matrix(self, rank):
        h = decaying(9, 0.3)
        found = wg.nystrom(Dense(h), rank).dense()
        assert torch.linalg.eigvalsh(found)[0] > -1e-12
        assert torch.linalg.eigvalsh(h - found)[0] > -1e-12
        assert (h - found).norm() > 1e-5  # and is not the matrix

    @pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
    @pytest.mark.parametrize("rank", [3, 4, 9, 40])
    def test_is_exact_from_the_rank_on(self, rank, scale):
        h = scale * low(3)
        operator = Dense(h + 0.2 * scale * EYE)
        found = wg.nystrom(operator, rank, 0.2 * scale)
        torch.testing.assert_close(found.dense(), h, rtol=0, atol=1e-12 * scale * float(low(3).norm()))
        assert operator.products == min(rank, 9)

    def test_is_exact_whatever_the_rounding(self):
        """A fourth column is noise, of either sign, that the shift keeps from being blown up."""
        for seed in range(40):
            h = low(3, seed)
            found = wg.nystrom(Dense(h), 4, generator=generator(seed))
            torch.testing.assert_close(found.dense(), h, rtol=0, atol=1e-12 * float(h.norm()))

    def test_zero(self):
        assert not wg.nystrom(Dense(0 * EYE), 3).dense().any()

    def test_error_is_within_the_bound_of_the_paper(self):
        """Frangella, Tropp and Udell, proposition 2.2, for the mean over test matrices."""
        size, rank = 60, 12
        h, spectrum = decaying(size, 0.7), 0.7 ** torch.arange(size, dtype=torch.float64)
        space = Space.of({"x": normal(size)})
        bound = min(
            (1 + 2 * (rank - p) / (p - 1)) * float(spectrum[rank - p])
            + 2 * math.e**2 * rank / (p**2 - 1) * float(spectrum[rank - p :].sum())
            for p in range(2, rank - 1)
        )
        errors = []
        for seed in range(20):
            found = wg.nystrom(Dense(h, space), rank, generator=generator(seed)).dense()
            errors.append(float(torch.linalg.matrix_norm(h - found, ord=2)))
        assert float(spectrum[rank]) <= min(errors)  # no approximation of this rank is better
        assert sum(errors) / len(errors) < bound
        assert max(errors) < 0.5

    def test_draws(self):
        before = torch.get_rng_state()
        first, second, other = (
            wg.nystrom(Dense(decaying(9, 0.5)), 3, generator=g) for g in (None, generator(), generator(1))
        )
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(first.dense(), second.dense())
        assert not torch.allclose(first.dense(), other.dense(), rtol=1e-3)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_coarse_types(self, dtype):
        space = Space.of({name: leaf.to(dtype) for name, leaf in B.items()})

        class Coarse(wg.Operator):
            space = Space.of(B)

            def apply(self, v):
                return self.space.unflatten((low(3) + EYE).to(dtype) @ self.space.flatten(v))

        Coarse.space = space
        found = wg.nystrom(Coarse(), 5, 1.0)
        assert found.basis.dtype == torch.float32
        assert {x.dtype for x in found.apply(space.zeros()).values()} == {dtype}
        dense = torch.stack([found.basis @ (found.spectrum * row) for row in found.basis], 1).double()
        tolerance = 1e-5 if dtype == torch.float32 else 0.15
        assert (dense - low(3)).norm() < tolerance * low(3).norm()

    def test_ggn_of_few_data(self):
        problem = PROBLEMS["mlp, squared error"]
        objective = problem.objective()
        ggn = wg.GGN(objective, problem.batches(WEIGHTS))
        operator = ggn + 0.05 * wg.Identity(ggn.space)
        found = wg.nystrom(operator, 8, 0.05)  # four weighted data with two outputs
        expected = reference.dense_ggn(objective, [problem.whole(WEIGHTS)], objective.params())
        torch.testing.assert_close(found.dense(), expected, rtol=1e-8, atol=1e-10)

    def test_what_is_not_semi_definite_is_refused(self):
        with pytest.raises(
            ValueError, match=r"less damping=0.7 has an eigenvalue <= -0\.\d+, expected none below 0"
        ):
            wg.nystrom(Dense(low(3) + 0.5 * EYE), 9, 0.7)
        with pytest.raises(ValueError, match="use GGN"):
            wg.nystrom(Dense(matrix(-3.2, 1)), 5)
        with pytest.raises(ValueError, match="not finite"):
            wg.nystrom(Dense(matrix() * torch.nan), 5)
        for arguments in ((0, 0.0), (3, -1.0), (3, float("nan")), (3, float("inf"))):
            with pytest.raises(ValueError, match="nystrom: rank is"):
                wg.nystrom(Dense(matrix()), *arguments)

    def test_shapes_of_low_rank_are_checked(self):
        with pytest.raises(
            ValueError, match=r"basis has shape \(8, 2\) and spectrum \(2,\), expected \(9, r\)"
        ):
            wg.LowRank(SPACE, normal(8, 2), normal(2) ** 2)
        with pytest.raises(ValueError, match="LowRank"):
            wg.LowRank(SPACE, normal(9, 2), normal(3) ** 2)


class TestSolver:
    @pytest.mark.parametrize("damping", [1e-6, 0.1, 100.0])
    def test_low_rank_plus_damping_is_solved_exactly(self, damping):
        """Which fails if the damping is counted twice, or in the approximation only."""
        a = low(3) + damping * EYE
        operator = Dense(a)
        found = wg.Nystrom(rank=3, damping=damping, tol=1e-8).solve(operator, B)
        torch.testing.assert_close(
            SPACE.flatten(found.value), torch.linalg.solve(a, FLAT), rtol=1e-7, atol=1e-9
        )
        assert found.converged
        assert operator.products == 3 + 1

    @pytest.mark.parametrize("rank", [1, 4, 7])
    def test_is_the_inverse_of_the_approximation_and_measures_its_residual(self, rank):
        h, o, damping = decaying(9, 0.5), orthonormal(rank), 0.02
        approximation = h @ o @ torch.linalg.inv(o.mT @ h @ o) @ (h @ o).mT
        start = SPACE.randn(generator(3))
        for x0 in (None, start):
            first = torch.zeros_like(FLAT) if x0 is None else SPACE.flatten(start)
            a = h + damping * EYE
            expected = first + torch.linalg.solve(approximation + damping * EYE, FLAT - a @ first)
            found = wg.Nystrom(rank, damping).solve(Dense(a), B, x0)
            torch.testing.assert_close(SPACE.flatten(found.value), expected)
            assert found.residual == pytest.approx(float((FLAT - a @ expected).norm() / FLAT.norm()))
            assert not found.converged

    def test_residual_falls_with_the_rank(self):
        a = decaying(9, 0.4) + 0.01 * EYE
        residuals = [wg.Nystrom(rank, 0.01).solve(Dense(a), B).residual for rank in range(1, 10)]
        assert residuals[-1] < 1e-8 < residuals[4] < 0.2 * residuals[0]

    def test_without_damping_a_part_of_the_rank_is_refused(self):
        with pytest.raises(SingularMatrixError, match="damping > 0"):
            wg.Nystrom(rank=4).solve(Dense(matrix()), B)

    def test_generator(self):
        solver, moving = wg.Nystrom(3, 0.5), wg.Nystrom(3, 0.5, generator=generator(1))
        a = Dense(matrix())
        first, second = (solver.solve(a, B).value for _ in range(2))
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        first, second = (moving.solve(a, B).value for _ in range(2))
        assert not torch.allclose(first["w"], second["w"])

    def test_hypergradient(self):
        """Twelve data of three classes give the GGN the rank 24; the operator's shift is the damping plus the weight decay."""
        case, damping = classification(), 1e-2
        exact = wg.Implicit(solver=wg.Direct(), preconditioner=None, damping=damping)(*case)
        shift = damping + float(case.hparams["log_c"].exp())
        found = wg.Implicit(solver=wg.Nystrom(24, shift), preconditioner=None, damping=damping)(*case)
        assert relative_error(found.value, exact.value) < 1e-8
        assert found.products == 25
        part = wg.Implicit(solver=wg.Nystrom(12, shift), preconditioner=None, damping=damping)(*case)
        assert 1e-4 < relative_error(part.value, exact.value) < 0.1

    def test_hyperparameters_are_checked(self):
        for arguments in ((0, 0.0), (3, -1.0)):
            with pytest.raises(ValueError, match="Nystrom: rank is"):
                wg.Nystrom(*arguments)


class TestPreconditioner:
    def test_cg_takes_fewer_steps(self):
        a = 1e4 * decaying(60, 0.6) + 0.1 * torch.eye(60, dtype=torch.float64)
        b = LARGE.randn(generator(1))
        plain = wg.CG(100, 1e-8).solve(Dense(a, LARGE), b)
        inverse = wg.nystrom(Dense(a, LARGE), 25, 0.1).power(-1, 0.1)
        found = wg.CG(100, 1e-8).preconditioned(inverse).solve(Dense(a, LARGE), b)
        assert found.converged
        assert found.steps <= 12
        assert plain.steps > 2 * found.steps
        torch.testing.assert_close(
            LARGE.flatten(found.value), torch.linalg.solve(a, LARGE.flatten(b)), rtol=1e-6, atol=1e-6
        )

    def test_condition_number(self):
        """With ``rest`` the smallest eigenvalue kept, as in the paper: bounded by its equation 1.5 for this very draw."""
        h, damping = decaying(60, 0.6), 1e-3
        eye = torch.eye(60, dtype=torch.float64)
        found = wg.nystrom(Dense(h + damping * eye, LARGE), 15, damping)
        floored = wg.LowRank(LARGE, found.basis, found.spectrum, found.spectrum[-1])
        error = float(torch.linalg.matrix_norm(h - found.dense(), ord=2))
        for curvature in (found, floored):
            root = curvature.power(-0.5, damping).dense()
            spectrum = torch.linalg.eigvalsh(root @ (h + damping * eye) @ root)
            bound = (float(found.spectrum[-1]) + damping + error) / damping
            assert 1 < float(spectrum[-1] / spectrum[0]) <= bound
