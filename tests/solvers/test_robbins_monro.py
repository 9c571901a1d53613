"""Stochastic steps: each right on average, their tail average convergent, and the operator's own draws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import weingarten as wg
from tests.cases import PROBLEMS, WEIGHTS, generator
from tests.solvers.matrices import FLAT, SPACE, B, Dense, Mixture, matrix
from weingarten import tree

SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MIXTURE = Mixture([matrix(0.5, 4), matrix(0.2, 3, seed=1), matrix(1, 6, seed=2)], SHARES)
MEAN = MIXTURE.mean.matrix
SOLUTION = torch.linalg.solve(MEAN, FLAT)


def errors(solver: wg.RobbinsMonro, seeds: range) -> torch.Tensor:
    found = [replace(solver, generator=generator(s)).solve(MIXTURE, B).value for s in seeds]
    return torch.stack([SPACE.flatten(x) - SOLUTION for x in found])


def test_one_step_is_unbiased():
    start, step, draws = SPACE.randn(generator(2)), 0.2, 3000
    found = torch.stack(
        [
            SPACE.flatten(wg.RobbinsMonro(1, step, generator=generator(s)).solve(MIXTURE, B, start).value)
            for s in range(draws)
        ]
    )
    expected = SPACE.flatten(start) + step * (FLAT - MEAN @ SPACE.flatten(start))
    standard_error = found.std(0) / draws**0.5
    assert (
        (found.mean(0) - expected).abs() < 4.5 * standard_error
    ).all()  # nine coordinates: one in 10^4 by chance
    assert found.std(0).min() > 1e-2  # and it is random
    choices = {tuple(x.tolist()) for x in found.round(decimals=8)}
    assert len(choices) == 3


def test_average_converges_as_one_over_root_steps():
    """Forty times the steps, a sixth of the error; the iterates themselves would stay where they are."""
    few, many = (errors(wg.RobbinsMonro(steps, 0.15), range(6)).norm(dim=1) for steps in (50, 2000))
    ratio = float(many.pow(2).mean().sqrt() / few.pow(2).mean().sqrt())
    assert 0.05 < ratio < 0.35
    assert float(many.max()) < 0.04 * float(SOLUTION.norm())
    mean = errors(wg.RobbinsMonro(500, 0.15), range(24)).mean(0)
    assert float(mean.norm()) < 0.02 * float(SOLUTION.norm())


def test_the_first_half_is_left_out():
    """By hand, with the same draws."""
    for steps in (1, 2, 5, 8):
        draws, x, kept = generator(3), torch.zeros_like(FLAT), []
        for t in range(steps):
            x = x + 0.1 * (FLAT - MIXTURE.draw(draws).matrix @ x)
            kept += [x] if t >= steps // 2 else []
        found = wg.RobbinsMonro(steps, 0.1, generator=generator(3)).solve(MIXTURE, B)
        torch.testing.assert_close(SPACE.flatten(found.value), torch.stack(kept).mean(0))
        true = (FLAT - MEAN @ SPACE.flatten(found.value)).norm() / FLAT.norm()
        assert found.residual == pytest.approx(float(true))
        assert found.steps == steps


def test_preconditioned_steps():
    m, draws, x = torch.linalg.inv(matrix(0.3, 2, seed=1)), generator(3), torch.zeros_like(FLAT)
    x = 0.1 * m @ (FLAT - MIXTURE.draw(draws).matrix @ x)
    found = wg.RobbinsMonro(1, 0.1, preconditioner=Dense(m), generator=generator(3)).solve(MIXTURE, B)
    torch.testing.assert_close(SPACE.flatten(found.value), x)
    exact = wg.RobbinsMonro(2000, preconditioner=Dense(torch.linalg.inv(MEAN))).solve(MIXTURE, B)
    assert exact.residual < 0.05


def test_a_full_product_is_made_for_the_residual_alone():
    MIXTURE.mean.products = 0
    wg.RobbinsMonro(50, 0.1).solve(MIXTURE, B)
    assert MIXTURE.mean.products == 1
    wg.RobbinsMonro(50).solve(MIXTURE, B)
    assert MIXTURE.mean.products == 2
    wg.RobbinsMonro(50, 0.1).solve(MIXTURE, B, SPACE.zeros())
    assert MIXTURE.mean.products == 4


def test_a_solution_of_one_draw_is_not_taken_for_the_solution():
    """After one step on the identity ``|b - A_t x|`` is zero, but not ``|b - A x|``."""
    eye = torch.eye(SPACE.size, dtype=torch.float64)
    mixture = Mixture([eye, 3 * eye], torch.tensor([0.7, 0.3], dtype=torch.float64))
    found = wg.RobbinsMonro(4000, 0.3).solve(mixture, B)
    torch.testing.assert_close(found.value, tree.scale(1 / 1.6, B), rtol=0.1, atol=0.02)
    first = wg.RobbinsMonro(30, 1.0, generator=generator(0)).solve(
        Mixture([eye, 1.5 * eye], torch.tensor([0.9, 0.1], dtype=torch.float64)), B
    )
    assert not first.converged
    assert first.steps == 30


def test_default_step_and_draws():
    before = torch.get_rng_state()
    solver = wg.RobbinsMonro(400)
    first, second = (solver.solve(MIXTURE, B) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(first.value, second.value, rtol=0, atol=0)
    assert first.residual < 0.15
    moving = replace(solver, generator=generator(0))
    first, second = (moving.solve(MIXTURE, B).value for _ in range(2))
    assert not torch.equal(first["w"], second["w"])


def test_divergence_is_refused():
    with pytest.raises(wg.DivergenceError, match="shorten the step"):
        wg.RobbinsMonro(100, 0.8).solve(MIXTURE, B)
    with pytest.raises(wg.DivergenceError):
        wg.RobbinsMonro(300, 50.0).solve(MIXTURE, B)  # to inf and NaN
    with pytest.raises(wg.DivergenceError):
        wg.RobbinsMonro(200).solve(Dense(matrix(-3.2, 1)), B)
    near = SPACE.unflatten(SOLUTION)  # noise near the solution is no divergence
    assert wg.RobbinsMonro(3, 0.1).solve(MIXTURE, B, near).residual < 1


def test_hyperparameters_are_checked():
    for arguments in ({"steps": 0}, {"step": 0.0}, {"step": -1.0}):
        with pytest.raises(ValueError, match="RobbinsMonro: steps"):
            wg.RobbinsMonro(**arguments)


@pytest.mark.parametrize(("kind", "shift"), [(wg.GGN, 2.0), (wg.FiniteDifferenceHessian, 10.0)])
def test_uneven_batches_of_a_model(kind, shift):
    problem = PROBLEMS["mlp, squared error"]
    ggn = kind(problem.objective(), problem.batches(WEIGHTS))
    operator = ggn + shift * wg.Identity(ggn.space)
    b = ggn.space.randn(generator(1))
    expected = torch.linalg.solve(operator.dense(), ggn.space.flatten(b))

    def distance(steps):
        found = [wg.RobbinsMonro(steps, generator=generator(s)).solve(operator, b).value for s in range(4)]
        errors = torch.stack([ggn.space.flatten(x) - expected for x in found])
        return float((errors**2).sum(1).mean().sqrt() / expected.norm())

    few, many = distance(20), distance(320)
    assert many < 0.03
    assert many < 0.5 * few  # a quarter, by theory
