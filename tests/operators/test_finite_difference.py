"""Hessian products from differences of gradients, against the exact Hessian and on models without a second derivative."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weingarten as wg
from tests.bilevel.problems import classification, relative_error
from tests.cases import PROBLEMS, WEIGHTS, N, generator, initialised, integers, mlp, normal
from weingarten import reference, tree


def errors(problem, dtype=torch.float64, step=None, seeds=range(4)):
    """Relative errors of products with random vectors, and the estimates of them."""
    wide = problem.objective()
    dense = reference.dense_hessian(wide, [problem.whole()], wide.params())
    objective = wg.Objective(problem.objective().model.to(dtype), problem.loss)
    data = [wg.Batch(problem.inputs.to(dtype), problem.targets)]
    operator = wg.FiniteDifferenceHessian(objective, data, step=step)
    found = []
    for seed in seeds:
        v = operator.space.randn(generator(seed))
        flat = operator.space.flatten(v).double()
        product = operator.space.flatten(operator.apply(v)).double()
        found.append((float((product - dense @ flat).norm() / (dense @ flat).norm()), operator.error(v)))
    return found


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "tokens"])
def test_is_the_hessian_to_eight_digits(name, weights):
    problem = PROBLEMS[name]
    objective = problem.objective()
    params = problem.at(objective)
    expected = reference.dense_hessian(objective, [problem.whole(weights)], params)
    found = wg.FiniteDifferenceHessian(objective, problem.batches(weights), params).dense()
    assert (found - expected).norm() < 1e-8 * expected.norm()


def test_single_precision_has_three_digits():
    for true, estimate in errors(PROBLEMS["mlp"], torch.float32):
        assert true < 2e-3
        assert true < 3 * estimate < 0.05


def test_default_step_is_between_truncation_and_rounding():
    best, long, short = (max(e for e, _ in errors(PROBLEMS["mlp"], step=s)) for s in (None, 1e-2, 1e-10))
    assert best < 1e-8
    assert long > 1e3 * best
    assert short > 1e3 * best


@pytest.mark.parametrize("step", [3e-2, 1e-2, 1e-3])
def test_error_is_estimated_where_truncation_rules(step):
    for true, estimate in errors(PROBLEMS["mlp"], step=step):
        assert 0.8 * 3 * true < estimate < 1.2 * 3 * true


def test_error_is_estimated_where_rounding_rules():
    for true, estimate in errors(PROBLEMS["mlp"], step=1e-10):
        assert 0.2 * true < estimate < 5 * true
    for true, estimate in errors(PROBLEMS["mlp"]):
        assert true < 10 * estimate < 1e-7


def test_length_of_the_vector_does_not_matter():
    problem = PROBLEMS["mlp"]
    operator = wg.FiniteDifferenceHessian(problem.objective(), problem.batches())
    v = operator.space.randn(generator())
    unit = operator.apply(v)
    for factor in (1e-12, 1e9):
        torch.testing.assert_close(
            operator.apply(tree.scale(factor, v)), tree.scale(factor, unit), rtol=1e-6, atol=1e-9 * factor
        )
    assert not any(leaf.any() for leaf in operator.apply(operator.space.zeros()).values())
    assert operator.error(operator.space.zeros()) == 0


def test_padding_is_refused():
    """Its row has no gradient, yet the output depends on it: the difference would not be symmetric."""
    problem = PROBLEMS["tokens"]
    operator = wg.FiniteDifferenceHessian(problem.objective(), problem.batches())
    with pytest.raises(ValueError, match="embedding with padding_idx"):
        operator.apply(operator.space.randn(generator()))


class Slope(torch.autograd.Function):
    """x^2 g, without a derivative."""

    @staticmethod
    def forward(ctx, x, g):
        return x**2 * g

    @staticmethod
    def backward(ctx, g):
        raise NotImplementedError("there is no second derivative")


class Once(torch.autograd.Function):
    """x^3 / 3, whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3 / 3

    @staticmethod
    def backward(ctx, g):
        return Slope.apply(*ctx.saved_tensors, g)


class Cubic(nn.Module):
    def __init__(self, once: bool) -> None:
        super().__init__()
        self.first, self.second, self.once = nn.Linear(3, 4), nn.Linear(4, 3), once

    def forward(self, x):
        h = self.first(x)
        return self.second(Once.apply(h) if self.once else h**3 / 3)


def test_model_without_a_second_derivative():
    data = [wg.Batch(normal(N, 3), integers(3, N))]
    once, twice = (wg.Objective(initialised(Cubic(flag)), wg.CrossEntropy()) for flag in (True, False))
    b = once.params()
    with pytest.raises(NotImplementedError, match="no second derivative"):
        wg.Hessian(once, data).apply(b)
    operator = wg.FiniteDifferenceHessian(once, data)
    expected = reference.dense_hessian(twice, data, twice.params())
    assert (operator.dense() - expected).norm() < 1e-8 * expected.norm()
    damped = operator + 2.0 * wg.Identity(operator.space)
    found = wg.MINRES(100, 1e-8).solve(damped, b)
    flat = torch.linalg.solve(expected + 2 * torch.eye(len(expected)), operator.space.flatten(b))
    torch.testing.assert_close(operator.space.flatten(found.value), flat, rtol=1e-6, atol=1e-8)


def test_model_and_gradients_are_left_alone():
    problem = PROBLEMS["norm and dropout"]
    objective = problem.objective()
    objective.model.train()
    before = {name: p.clone() for name, p in objective.model.named_parameters()}
    operator = wg.FiniteDifferenceHessian(objective, problem.batches())
    with torch.no_grad():
        operator.apply(operator.space.randn(generator()))
    assert objective.model.training
    for name, p in objective.model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None


def test_hypergradient():
    case = classification()
    exact, found = (
        wg.Implicit(operator=kind, solver=wg.CG(100, 1e-9), preconditioner=None)(*case)
        for kind in (wg.Hessian, wg.FiniteDifferenceHessian)
    )
    assert relative_error(found.value, exact.value) < 1e-6


def test_arguments_are_checked():
    half = wg.Objective(mlp(3, 2).bfloat16(), wg.CrossEntropy())
    with pytest.raises(TypeError, match=r"parameters are torch.bfloat16, expected float32 or float64"):
        wg.FiniteDifferenceHessian(half, [(normal(N, 3), integers(2, N))])
    problem = PROBLEMS["mlp"]
    for step in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="step is"):
            wg.FiniteDifferenceHessian(problem.objective(), problem.batches(), step=step)
    with pytest.raises(TypeError, match="pass a list of batches"):
        wg.FiniteDifferenceHessian(problem.objective(), iter(problem.batches()))
