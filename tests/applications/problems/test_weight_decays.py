"""Decays per leaf and per weight against a minimum that is found again, and against formulas."""

import pytest
import torch
from torch import nn

import weingarten as wg
from tests.bilevel.problems import data, network, relative_error
from weingarten.applications.problems import WeightDecays
from weingarten.bilevel.resolve import Level64, minimise

TRAIN, HELD = wg.Batch(*data(20)), wg.Batch(*data(9, seed=3))


def spread(task):
    """Decays between 0.01 and 0.5, all different."""
    generator = torch.Generator().manual_seed(4)
    return {
        name: h + 1.5 * torch.rand(h.shape, generator=generator, dtype=h.dtype)
        for name, h in task.start().items()
    }


def minimum(problem, hparams):
    start = {name: p.clone() for name, p in problem.inner.objective.params().items()}
    return minimise(Level64(problem.inner, TRAIN), start, hparams, 1e-11, 300)


@pytest.mark.parametrize("each_weight", [False, True])
def test_hypergradient_is_the_derivative_of_the_held_out_loss_at_the_minimum(each_weight):
    task = WeightDecays(network(), decay=0.05, each_weight=each_weight)
    problem, hparams = task.problem(), spread(task)
    params = minimum(problem, hparams)
    exact = wg.Implicit(wg.Hessian, wg.Direct(), None, damping=0.0)
    found = exact(problem, params, hparams, wg.Batches(HELD, TRAIN)).value
    assert {name: h.shape for name, h in found.items()} == {name: h.shape for name, h in hparams.items()}
    for name, entry in (("0.weight", 3), ("2.bias", 1)):
        ends = []
        for sign in (1, -1):
            moved = {key: h.clone() for key, h in hparams.items()}
            moved[name].view(-1)[entry if each_weight else 0] += sign * 1e-4
            reached = minimise(Level64(problem.inner, TRAIN), dict(params), moved, 1e-12, 300)
            ends.append(float(problem.outer.value(reached, moved, HELD)))
        got = float(found[name].reshape(-1)[entry if each_weight else 0])
        assert got == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-4)


def test_linear_regression_by_hand():
    """``theta = (X^T X 2/N + diag c)^-1 X^T y 2/N``, differentiated on paper."""
    model = nn.Linear(4, 1, bias=False).double()
    task = WeightDecays(model, decay=0.1, each_weight=True, loss=wg.MSE())
    x, y, xv, yv = TRAIN.inputs, TRAIN.inputs[:, :1].sin(), HELD.inputs, HELD.inputs[:, 1:2]
    c = spread(task)["weight"]
    hessian = 2 / len(x) * x.T @ x + torch.diag(c[0].exp())
    theta = torch.linalg.solve(hessian, 2 / len(x) * x.T @ y)
    q = torch.linalg.solve(hessian, 2 / len(xv) * xv.T @ (xv @ theta - yv))
    exact = wg.Implicit(solver=wg.Direct(), preconditioner=None, damping=0.0)
    found = exact(
        task.problem(), {"weight": theta.T}, {"weight": c}, wg.Batches(wg.Batch(xv, yv), wg.Batch(x, y))
    )
    assert relative_error(found.value, {"weight": -(c.exp() * theta.T * q.T)}) < 1e-10


def test_estimate_as_operator_is_refused_and_as_preconditioner_converges():
    task = WeightDecays(network(), decay=0.05)
    problem, hparams = task.problem(), spread(task)
    arguments = problem, problem.inner.objective.params(), hparams, wg.Batches(HELD, TRAIN)
    with pytest.raises(ValueError, match="use it as preconditioner"):
        wg.Implicit(wg.KFAC(), wg.Direct(), None)(*arguments)
    exact = wg.Implicit(solver=wg.Direct(), preconditioner=None)(*arguments)
    found = wg.Implicit(solver=wg.CG(60, tol=1e-10))(*arguments)
    assert relative_error(found.value, exact.value) < 1e-6


def test_decay_that_has_no_logarithm_is_refused():
    with pytest.raises(ValueError, match=r"decay is 0\.0, expected a positive number"):
        WeightDecays(network(), decay=0.0)
