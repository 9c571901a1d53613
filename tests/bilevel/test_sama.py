from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import weingarten as wg
from tests.bilevel.problems import Case, classification, cosine, relative_error, ridge, same
from tests.bilevel.test_unrolled import away_from_the_minimum
from tests.cases import normal
from weingarten.tree import Space


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def away(make=classification) -> Case:
    return Case(*away_from_the_minimum(make))


def inner_gradient(case: Case) -> dict[str, torch.Tensor]:
    return torch.func.grad(lambda p: case.problem.inner.value(p, case.hparams, case.batches.mixed))(
        case.params
    )


@pytest.mark.parametrize("make", [ridge, classification])
def test_without_adaptation_it_is_the_identity_to_the_differences_accuracy(make):
    case = away(make)
    expected = wg.make_method("identity")(*case)
    errors = []
    for step in (1e-1, 1e-2, 1e-3):
        found = wg.SAMA(adaptation=None, step=step)(*case)
        assert same(found.direct, expected.direct)
        assert same(found.inverse_product, expected.inverse_product)
        errors.append(relative_error(found.value, expected.value))
    if make is ridge:  # the mixed derivative is linear in the parameters: no truncation error
        assert max(errors) < 1e-10
    else:
        assert errors[2] < 1e-8
        assert errors[0] / errors[1] == pytest.approx(100, rel=0.1)  # of second order in the step
    assert found.outer_loss == expected.outer_loss
    assert found.products == 0
    assert found.state is None


def update(gradient, before, adaptation):
    """Adam's update as it is written, from the moments before the gradient."""
    b1, b2 = adaptation.betas
    m = b1 * before[0] + (1 - b1) * gradient
    v = b2 * before[1] + (1 - b2) * gradient**2
    return adaptation.lr * m / (v.sqrt() + adaptation.eps)


@pytest.mark.parametrize(
    "adaptation",
    [wg.AdamAdaptation(), wg.AdamAdaptation(0.05, (0.6, 0.8), 1e-2), wg.AdamAdaptation(1.0, (0.0, 0.5))],
)
def test_adaptation_is_the_derivative_of_adams_update(adaptation):
    b1, b2 = adaptation.betas
    generator, state, seen = torch.Generator().manual_seed(1), None, []
    for count in range(1, 6):
        g = torch.randn(7, generator=generator, dtype=torch.float64)
        seen.append(g)
        found, state = adaptation.derivative({"w": g}, state)
        powers = [torch.tensor([b**k for k in range(count)][::-1], dtype=g.dtype) for b in (b1, b2)]
        stacked = torch.stack(seen)
        m, v = ((p[:, None] * x).sum(0) / p.sum() for p, x in zip(powers, (stacked, stacked**2), strict=True))
        # The moments before this gradient of an optimiser that has m and v after it.
        before = (m - (1 - b1) * g) / b1 if b1 else torch.zeros_like(g), (v - (1 - b2) * g**2) / b2
        m = m if b1 else g
        expected = torch.autograd.functional.jacobian(lambda x, s=before: update(x, s, adaptation), g)
        assert torch.allclose(torch.diag(expected), found["w"], rtol=1e-9)
        assert torch.allclose(update(g, before, adaptation), adaptation.lr * m / (v.sqrt() + adaptation.eps))


def test_the_slope_of_adam_is_the_authors_form_of_it():
    """Of an optimiser that has run for long, with eps = 0: in the moments before the last gradient."""
    g, m, v = normal(6), normal(6, seed=1), normal(6, seed=2) ** 2 + 0.1
    lr, b1, b2 = 0.03, 0.8, 0.95
    found, _ = wg.AdamAdaptation(lr, (b1, b2), 0.0).derivative({"w": g}, (10**6, {"w": m}, {"w": v}))
    after = b2 * v + (1 - b2) * g**2
    expected = lr * ((1 - b1) * b2 * v - b1 * (1 - b2) * g * m) / after**1.5
    torch.testing.assert_close(found["w"], expected)


def test_after_many_gradients_it_is_the_derivative_of_torchs_own_step():
    adaptation, generator = wg.AdamAdaptation(0.02, (0.7, 0.9), 1e-3), torch.Generator().manual_seed(3)
    gradients = 1 + torch.randn(300, 6, generator=generator, dtype=torch.float64)
    state = None
    for g in gradients:
        found, state = adaptation.derivative({"w": g}, state)

    def moved(last):
        leaf = torch.zeros(6, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([leaf], adaptation.lr, adaptation.betas, adaptation.eps)
        for g in (*gradients[:-1], last):
            leaf.grad = g
            optimizer.step()
        return leaf.detach().clone()

    step = 1e-6
    difference = -(moved(gradients[-1] + step) - moved(gradients[-1] - step)) / (2 * step)
    assert torch.allclose(difference, found["w"], rtol=1e-6)


def test_adaptation_multiplies_the_outer_gradient_and_its_state_is_carried_along():
    case, adaptation = away(), wg.AdamAdaptation(0.1)
    expected, state = None, None
    for _ in range(3):
        plain = wg.SAMA(None)(*case).inverse_product
        diagonal, expected = adaptation.derivative(inner_gradient(case), expected)
        found = wg.SAMA(adaptation)(*case, state)
        state = found.state
        v = {name: diagonal[name] * leaf for name, leaf in plain.items()}
        assert relative_error(found.inverse_product, v) < 1e-10
        assert cosine(found.inverse_product, plain) < 0.99
        case = replace(case, params={name: 0.9 * p for name, p in case.params.items()})


def test_its_mixed_derivative_is_that_of_its_own_product():
    case = away()
    check = wg.check_hypergradient(wg.SAMA(wg.AdamAdaptation(0.1), step=1e-3), *case)
    part = {part.name: part for part in check.parts}
    assert part["mixed derivative"].relative_error < 1e-6
    assert part["direct term"].relative_error < 1e-6


def test_entries_without_a_gradient_are_left_out():
    found, _ = wg.AdamAdaptation().derivative({"w": torch.tensor([0.0, 1.0])}, None)
    assert found["w"][0] == 0
    assert found["w"][1] > 0


def test_where_the_outer_gradient_is_zero_the_direct_term_remains():
    case = ridge()
    flat_level = wg.Level(case.problem.inner.objective, penalty=lambda p, h: (h["w"] ** 2).sum())
    silent = replace(case.batches.outer, weights=torch.zeros(6, dtype=torch.float64))
    batches = replace(case.batches, outer=silent)
    found = wg.SAMA()(wg.Problem(case.problem.inner, flat_level), case.params, case.hparams, batches)
    assert torch.equal(found.value["w"], 2 * case.hparams["w"])
    assert torch.equal(found.value["log_c"], torch.zeros((), dtype=torch.float64))


class Once(torch.autograd.Function):
    """The square, whose backward pass can not be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


@pytest.mark.parametrize("method", [wg.SAMA(None, 1e-3), wg.F2SA(steps=1)], ids=["sama", "f2sa"])
def test_no_second_derivative_is_taken(method):
    case = away(ridge)

    def level(square):
        objective = wg.Objective(lambda params, x: square(x @ params["theta"]), wg.MSE())
        return replace(case.problem.inner, objective=objective)

    problems = [wg.Problem(level(square), case.problem.outer) for square in (Once.apply, lambda x: x**2)]
    found, expected = (method(problem, case.params, case.hparams, case.batches).value for problem in problems)
    assert relative_error(found, expected) < 1e-12
    with pytest.raises(NotImplementedError, match="second derivative"):
        wg.make_method("identity")(problems[0], case.params, case.hparams, case.batches)


def test_settings_and_adaptations_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="SAMA: step is 0"):
        wg.SAMA(step=0)
    with pytest.raises(ValueError, match=r"betas \(1.0, 0.9\)"):
        wg.AdamAdaptation(betas=(1.0, 0.9))
    with pytest.raises(ValueError, match="lr is 0"):
        wg.AdamAdaptation(lr=0)
    case = away()

    class Broken(wg.Adaptation):
        def derivative(self, gradient, state):
            return Space.of(gradient).unflatten(torch.full((Space.of(gradient).size,), torch.inf)), None

    with pytest.raises(ValueError, match=r"SAMA: adapted outer gradient: leaf '0\.weight'"):
        wg.SAMA(Broken())(*case)


def test_what_is_not_finite_is_named():
    case = away()
    inputs = case.batches.mixed.inputs.clone()
    inputs[0] = torch.inf
    batches = replace(case.batches, mixed=replace(case.batches.mixed, inputs=inputs))
    with pytest.raises(ValueError, match=r"SAMA: inner gradient: leaf '0\.weight'"):
        wg.SAMA()(case.problem, case.params, case.hparams, batches)
    weights = torch.full((12,), torch.nan, dtype=torch.float64)
    level = replace(case.problem.inner, penalty=lambda p, h: (h["w"] * weights).sum())
    problem = wg.Problem(level, case.problem.outer)
    with pytest.raises(ValueError, match="SAMA: mixed derivative: leaf 'w'"):
        wg.SAMA(None)(problem, case.params, case.hparams, case.batches)
