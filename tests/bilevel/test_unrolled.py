from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

import weingarten as wg
from tests.bilevel.problems import classification, relative_error, ridge, same


def away_from_the_minimum(make=classification):
    case = make()
    generator = torch.Generator().manual_seed(2)
    moved = {
        name: p + 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in case.params.items()
    }
    return case.problem, moved, case.hparams, case.batches


def after(problem, params, hparams, batches, factory, steps):
    """The inner steps as torch.optim does them."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer = factory(list(leaves.values()))
    for _ in range(steps):
        optimizer.zero_grad()
        problem.inner.value(leaves, hparams, batches.mixed).backward()
        optimizer.step()
    return {name: p.detach() for name, p in leaves.items()}


INNER = {
    "sgd": (wg.SGD(0.3), partial(torch.optim.SGD, lr=0.3)),
    "momentum": (wg.SGD(0.1, 0.9), partial(torch.optim.SGD, lr=0.1, momentum=0.9)),
    "adam": (wg.Adam(0.05), partial(torch.optim.Adam, lr=0.05)),
    "adam-betas": (
        wg.Adam(0.05, (0.5, 0.7), 1e-3),
        partial(torch.optim.Adam, lr=0.05, betas=(0.5, 0.7), eps=1e-3),
    ),
}


@pytest.mark.parametrize("name", list(INNER))
@pytest.mark.parametrize("make", [classification, ridge])
def test_unrolled_is_the_derivative_of_torchs_own_trajectory(name, make):
    problem, params, hparams, batches = away_from_the_minimum(make)
    ours, factory = INNER[name]
    found = wg.Unrolled(4, ours)(problem, params, hparams, batches)

    def outer(h):
        moved = after(problem, params, h, batches, factory, 4)
        return float(problem.outer.value(moved, h, batches.outer))

    assert found.outer_loss == pytest.approx(outer(hparams), rel=1e-12)
    step, expected = 1e-5, {k: torch.zeros_like(v) for k, v in hparams.items()}
    for key, leaf in hparams.items():
        for i in range(leaf.numel()):
            ends = []
            for sign in (1, -1):
                moved = {k: v.clone() for k, v in hparams.items()}
                moved[key].view(-1)[i] += sign * step
                ends.append(outer(moved))
            expected[key].view(-1)[i] = (ends[0] - ends[1]) / (2 * step)
    assert relative_error(found.value, expected) < 1e-6
    assert found.inverse_product is None
    assert found.products == 0
    assert found.state is None


@pytest.mark.parametrize("name", list(INNER))
def test_truncation_differentiates_the_last_steps_only(name):
    """With the first steps done by hand, by the same optimizer, the rest is a full unrolling; SGD has no state to carry over."""
    problem, params, hparams, batches = away_from_the_minimum()
    ours, factory = INNER[name]
    whole = wg.Unrolled(5, ours)(problem, params, hparams, batches)
    assert same(wg.Unrolled(5, ours, truncate=5)(problem, params, hparams, batches).value, whole.value)
    cut = wg.Unrolled(5, ours, truncate=2)(problem, params, hparams, batches)
    assert cut.outer_loss == pytest.approx(whole.outer_loss, rel=1e-14)
    assert relative_error(cut.value, whole.value) > 1e-3
    if name == "sgd":
        middle = after(problem, params, hparams, batches, factory, 3)
        expected = wg.Unrolled(2, ours)(problem, middle, hparams, batches)
        assert relative_error(cut.value, expected.value) < 1e-10


RATES = {
    "one rate": (lambda h: wg.SGD(h["r"].exp(), 0.9), {"r": torch.tensor(0.1).double().log()}),
    "Adam": (lambda h: wg.Adam(h["r"].exp()), {"r": torch.tensor(0.05).double().log()}),
    "per leaf": (
        lambda h: wg.SGD({name: rate.exp() for name, rate in h.items()}),
        {
            n: torch.tensor(math.log(v)).double()
            for n, v in {"0.weight": 0.3, "0.bias": 0.1, "2.weight": 0.2, "2.bias": 0.05}.items()
        },
    ),
}


@pytest.mark.parametrize("name", list(RATES))
def test_rates_of_the_inner_optimizer_as_outer_variables(name):
    case = away_from_the_minimum()
    make, rates = RATES[name]
    level = wg.Level(case[0].inner.objective)
    problem, batches = wg.Problem(level, level), case[3]
    found = wg.Unrolled(4, make)(problem, case[1], rates, batches)

    def outer(moved):
        return wg.Unrolled(4, make(moved))(problem_with_use, case[1], used, batches).outer_loss

    used = {"c": torch.tensor(0.0).double()}  # a constant optimiser wants an outer variable that is used
    problem_with_use = wg.Problem(level, wg.Level(level.objective, penalty=lambda p, h: h["c"]))
    for key in rates:
        ends = [outer({**rates, key: rates[key] + sign * 1e-5}) for sign in (1, -1)]
        assert float(found.value[key]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)
    with pytest.raises(ValueError, match="by unrolling only"):
        wg.Implicit()(problem, case[1], rates, batches)
    with pytest.raises(ValueError, match="by unrolling only"):
        wg.Unrolled(4, wg.SGD(0.1))(problem, case[1], rates, batches)


def test_direct_term_is_taken_at_the_end_of_the_trajectory():
    case = away_from_the_minimum()
    found = wg.Unrolled(3, wg.SGD(0.1))(*case)
    assert torch.allclose(found.direct["w"], 0.6 * case[2]["w"])
    assert torch.allclose(found.direct["log_c"], case[2]["log_c"].cos())


def test_adam_is_finite_where_a_gradient_is_zero():
    objective = wg.Objective(lambda params, x: torch.relu(x @ params["a"]) @ params["b"], wg.MSE())
    params = {"a": -torch.ones(2, 3), "b": torch.ones(3, 1)}  # every unit is dead
    batch = wg.Batch(torch.ones(4, 2), torch.ones(4, 1))
    level = wg.Level(objective, penalty=lambda p, h: h["c"] * (p["b"] ** 2).sum())
    problem = wg.Problem(level, wg.Level(objective, penalty=lambda p, h: (p["b"] ** 2).sum()))
    found = wg.Unrolled(3, wg.Adam(0.1))(problem, params, {"c": torch.tensor(0.5)}, wg.Batches(batch, batch))
    assert torch.isfinite(found.value["c"])
    zero = {"c": torch.tensor(0.0)}  # now b's gradient is zero at the first step as well
    found = wg.Unrolled(1, wg.Adam(0.1))(problem, params, zero, wg.Batches(batch, batch))
    assert torch.isfinite(found.value["c"])


def test_many_steps_approach_the_implicit_hypergradient():
    case = ridge()
    exact = wg.Implicit(solver=wg.Direct(), preconditioner=None, damping=0.0)(*case)
    found = wg.Unrolled(400, wg.SGD(0.5))(*case)
    assert relative_error(found.value, exact.value) < 1e-3


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="steps is 0"):
        wg.Unrolled(0, wg.SGD(0.1))
    with pytest.raises(ValueError, match="truncate 3"):
        wg.Unrolled(2, wg.SGD(0.1), truncate=3)


def test_module_model_is_left_alone():
    case = classification()
    model = case.problem.inner.objective.model
    assert isinstance(model, nn.Module)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wg.Unrolled(3, wg.Adam(0.1))(*case)
    assert same(before, model.state_dict())
