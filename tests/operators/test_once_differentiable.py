"""Operations without a second derivative, which PyTorch leaves out in silence where it is told the inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

import weingarten as wg
from tests.bilevel.problems import ROWS, classification
from tests.cases import N, initialised, integers, normal
from weingarten import reference
from weingarten.bilevel.implicit import mixed_product
from weingarten.bilevel.penalty import PenaltyHessian


class Once(torch.autograd.Function):
    """x^3 / 3."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3 / 3

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return ctx.saved_tensors[0] ** 2 * g


class Cubic(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.first, self.second, self.kind = nn.Linear(3, 4), nn.Linear(4, 3), kind

    def forward(self, x):
        h = self.first(x)
        return self.second(self.kind(h))


def objective_of(kind) -> wg.Objective:
    return wg.Objective(initialised(Cubic(kind)), wg.CrossEntropy())


DATA = [wg.Batch(normal(N, 3), integers(3, N))]


def test_hessian_is_refused():
    objective = objective_of(Once.apply)
    with pytest.raises(
        NotImplementedError, match=r"Hessian.apply: found an operation without a second .*FiniteDifference"
    ):
        wg.Hessian(objective, DATA).apply(objective.params())
    with pytest.raises(NotImplementedError, match=r"dense_hessian: found an operation without a second"):
        reference.dense_hessian(objective, DATA, objective.params())


def test_ggn_is_refused():
    """Its tangents come from a second backward pass, since such an operation has no forward derivative."""
    objective = objective_of(Once.apply)
    with pytest.raises(NotImplementedError, match=r"GGN.apply: found .*estimate the curvature with wg.KFAC"):
        wg.GGN(objective, DATA).apply(objective.params())


def test_estimates_need_no_second_derivative():
    plain = objective_of(lambda h: h**3 / 3)
    expected = reference.dense_ggn(plain, DATA, plain.params()).diagonal()
    found = wg.estimate(wg.Diagonal(), objective_of(Once.apply), DATA).dense().diagonal()
    torch.testing.assert_close(found, expected)


def bilevel(model: nn.Module, penalty=None):
    case = classification()
    objective = wg.Objective(model, wg.CrossEntropy())

    def scaled(hparams, batch):
        return replace(batch, inputs=hparams["scale"] * batch.inputs)

    inner = wg.Level(objective, scaled, penalty)
    problem = wg.Problem(inner, wg.Level(objective))
    hparams = {"scale": torch.ones(3, dtype=torch.float64)}
    batch = wg.Batch(normal(ROWS, 3), integers(3, ROWS))
    return replace(
        case, problem=problem, params=objective.params(), hparams=hparams, batches=wg.Batches(batch, batch)
    )


def test_mixed_products_are_refused():
    problem, params, hparams, batches = bilevel(initialised(Cubic(Once.apply)))
    with pytest.raises(NotImplementedError, match=r"mixed_product: found an operation without a second"):
        mixed_product(problem.inner, params, hparams, batches.mixed, params)


@pytest.mark.parametrize("steps", [1, 3])
def test_unrolling_is_refused(steps):
    case = bilevel(initialised(Cubic(Once.apply)))
    with pytest.raises(NotImplementedError, match=r"Unrolled: found an operation without a second"):
        wg.Unrolled(steps, wg.SGD(0.1))(*case)


def test_an_outer_model_needs_a_first_derivative_only():
    case = bilevel(initialised(Cubic(lambda h: h**3 / 3)))
    once = wg.Level(objective_of(Once.apply))
    found = wg.Unrolled(2, wg.SGD(0.1))(*replace(case, problem=replace(case.problem, outer=once)))
    expected = wg.Unrolled(2, wg.SGD(0.1))(*case)
    torch.testing.assert_close(found.value, expected.value)


def test_penalties_are_refused():
    def penalty(params, hparams):
        return sum((Once.apply(p) + p**4).sum() for p in params.values())

    params = {"w": normal(3)}
    with pytest.raises(
        NotImplementedError, match=r"PenaltyHessian.apply: found an operation without a second"
    ):
        PenaltyHessian(penalty, params, {}).apply(params)
