"""Row weights: the formulas, the hypergradient against re-solving the inner problem, and wrong labels found."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import weingarten as wg
from tests.bilevel.problems import data, network
from weingarten.applications.problems import RowWeights
from weingarten.bilevel.resolve import Level64, minimise

ROWS = 12


@pytest.fixture
def task():
    return RowWeights(network(), ROWS, weight_decay=0.1, initial=0.5)


@pytest.fixture
def hparams():
    return {"u": torch.linspace(-1, 2, ROWS, dtype=torch.float64)}


def test_the_inner_level_is_the_formula(task, hparams):
    x, y = data(ROWS)
    rows = torch.tensor([7, 2, 11])  # a mini-batch out of order
    batch = wg.Batch(x[rows], y[rows], rows=rows)
    params = task.problem().inner.objective.params()
    losses = nn.functional.cross_entropy(task.model(x[rows]), y[rows], reduction="none")
    weights = 1 / (1 + (-hparams["u"][rows]).exp()) * (1 + torch.tensor(-0.5, dtype=torch.float64).exp())
    expected = (weights * losses).sum() / 3 + 0.05 * sum(p.square().sum() for p in params.values())
    assert task.problem().inner.value(params, hparams, batch).item() == pytest.approx(expected.item())
    assert task.problem().outer.value(params, hparams, batch).item() == pytest.approx(losses.mean().item())


def test_all_weights_are_one_at_the_start(task):
    assert task.start()["u"].shape == (ROWS,)
    assert task.start()["u"].dtype == torch.float64
    torch.testing.assert_close(task.weights(task.start()), torch.ones(ROWS, dtype=torch.float64))


def test_the_hypergradient_is_the_change_of_the_outer_loss_at_the_new_minimum(task, hparams):
    problem = task.problem()
    inner, held = wg.Batch(*data(ROWS), rows=torch.arange(ROWS)), wg.Batch(*data(7, seed=3))
    first = {name: p.clone() for name, p in problem.inner.objective.params().items()}

    def minimum(outer, start):
        return minimise(Level64(problem.inner, inner), start, outer, 1e-11, 300)

    params = minimum(hparams, first)
    exact = wg.Implicit(wg.Hessian, wg.Direct(), None, damping=0.0)
    found = exact(problem, params, hparams, wg.Batches(held, inner)).value["u"]
    draw, step = torch.Generator().manual_seed(6), 1e-4
    for _ in range(3):  # along random directions
        direction = torch.randn(ROWS, generator=draw, dtype=torch.float64)
        moved = [{"u": hparams["u"] + sign * step * direction} for sign in (1, -1)]
        f = [float(problem.outer.value(minimum(outer, params), outer, held)) for outer in moved]
        assert float(found @ direction) == pytest.approx((f[0] - f[1]) / (2 * step), rel=1e-6)


def test_mini_batches_average_to_all_rows(task, hparams):
    x, y = data(ROWS)
    whole, problem = wg.Batch(x, y, rows=torch.arange(ROWS)), task.problem()
    params = problem.inner.objective.params()
    parts = [replace(whole, inputs=x[r], targets=y[r], rows=r) for r in torch.arange(ROWS).reshape(4, 3)]
    mean = sum(float(problem.inner.value(params, hparams, part)) for part in parts) / 4
    assert mean == pytest.approx(float(problem.inner.value(params, hparams, whole)))


def test_one_hypergradient_ranks_wrong_labels_higher():
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(3, 4, generator=generator, dtype=torch.float64)
    y = torch.arange(90) % 3
    x = centres[y] + torch.randn(90, 4, generator=generator, dtype=torch.float64)
    given = torch.where(torch.arange(90) < 20, (y + 1) % 3, y)
    task = RowWeights(nn.Linear(4, 3).double(), 60)
    problem, inner = task.problem(), wg.Batch(x[:60], given[:60], rows=torch.arange(60))
    start = problem.inner.objective.params()
    params = minimise(Level64(problem.inner, inner), start, task.start(), 1e-9, 300)
    batches = wg.Batches(wg.Batch(x[60:], y[60:]), inner)
    found = wg.Implicit(damping=1e-2)(problem, params, task.start(), batches).value["u"]
    assert (found[:20] > 0).double().mean() > 0.8  # descent takes weight from most wrong rows
    assert (found[20:] > 0).double().mean() < 0.2


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"weight_decay": -1.0}, {"initial": float("inf")}])
def test_it_refuses_numbers_out_of_range(wrong):
    with pytest.raises(ValueError, match="expected rows >= 1, weight_decay >= 0 and a finite initial"):
        RowWeights(**{"model": nn.Linear(2, 2), "rows": 3} | wrong)


def test_it_refuses_batches_whose_rows_it_does_not_know(task, hparams):
    x, y = data(ROWS)
    transform = task.problem().inner.transform
    with pytest.raises(ValueError, match="has rows None"):
        transform(hparams, wg.Batch(x, y))
    with pytest.raises(ValueError, match="has row 12, expected numbers below 12"):
        transform(hparams, wg.Batch(x, y, rows=torch.arange(1, ROWS + 1)))
