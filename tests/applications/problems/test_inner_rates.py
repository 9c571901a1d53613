"""Rates of the inner optimiser: against differences of torch's own trajectory, and in the loop."""

from functools import partial

import pytest
import torch

import weingarten as wg
from tests.bilevel.problems import data, network
from weingarten.applications.problems import InnerRates

TRAIN, HELD = wg.Batch(*data(20)), wg.Batch(*data(9, seed=3))
STEPS = 6


def after(task, hparams):
    """The held-out loss after torch's own steps."""
    problem = task.problem()
    leaves = {name: p.clone().requires_grad_() for name, p in problem.inner.objective.params().items()}
    groups = [{"params": [leaves[name]], "lr": float(h.exp())} for name, h in hparams.items()]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=task.momentum)
    for _ in range(STEPS):
        optimizer.zero_grad()
        problem.inner.value(leaves, hparams, TRAIN).backward()
        optimizer.step()
    return float(problem.outer.value(leaves, hparams, HELD).detach())


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_unrolled_hypergradient_is_the_derivative_of_torchs_own_trajectory(momentum):
    task = InnerRates(network(), rate=0.3, momentum=momentum)
    hparams = {name: h + 0.2 * i for i, (name, h) in enumerate(task.start().items())}
    params = task.problem().inner.objective.params()
    found = wg.Unrolled(STEPS, task.optimizer)(task.problem(), params, hparams, wg.Batches(HELD, TRAIN))
    assert found.outer_loss == pytest.approx(after(task, hparams), rel=1e-12)
    for name in hparams:
        ends = [after(task, {**hparams, name: hparams[name] + sign * 1e-5}) for sign in (1, -1)]
        assert float(found.value[name]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("solver", [wg.FirstOrder(), wg.CG(3), wg.Direct()])
def test_implicit_differentiation_refuses_rates_by_name(solver):
    task = InnerRates(network())
    params = task.problem().inner.objective.params()
    with pytest.raises(ValueError, match=r"'0\.weight' enters neither level.*by unrolling only"):
        wg.Implicit(solver=solver, preconditioner=None)(
            task.problem(), params, task.start(), wg.Batches(HELD, TRAIN)
        )


def run(task, steps, callbacks=True, checkpoint=None):
    followed = task.followed()
    outcome = wg.solve(
        task.problem(),
        wg.Unrolled(3, task.optimizer),
        followed.make,
        partial(torch.optim.Adam, lr=0.2),
        steps,
        hparams=task.start(),
        params=task.problem().inner.objective.params(),
        inner_data=TRAIN,
        outer_data=TRAIN,
        callbacks=[followed.follow] if callbacks else [],
        checkpoint=checkpoint,
    )
    return outcome, followed


def test_training_follows_the_rates():
    task = InnerRates(network(), rate=0.01)
    (moved, followed), (still, _) = run(task, 30), run(task, 30, callbacks=False)
    rates = [group["lr"] for group in followed.made.param_groups]
    assert rates == pytest.approx([float(h.exp()) for h in moved.hparams.values()])
    assert min(rates) > 0.01  # far too small a start
    losses = [float(task.problem().outer.value(found.params, {}, TRAIN)) for found in (moved, still)]
    assert losses[0] < losses[1] - 1e-3


def test_a_resumed_run_has_the_rates_it_left_with(tmp_path):
    task = InnerRates(network(), rate=0.05)
    whole, _ = run(task, 8)
    stop, followed = 3, task.followed()
    for _ in range(2):
        outcome = wg.solve(
            task.problem(),
            wg.Unrolled(3, task.optimizer),
            (followed := task.followed()).make,
            partial(torch.optim.Adam, lr=0.2),
            8,
            hparams=task.start(),
            params=task.problem().inner.objective.params(),
            inner_data=TRAIN,
            outer_data=TRAIN,
            callbacks=[followed.follow, lambda event: event.step == stop],
            checkpoint=tmp_path / "run.pt",
        )
    assert outcome.completed
    assert all(torch.equal(whole.params[name], p) for name, p in outcome.params.items())


def test_rates_that_have_no_logarithm_are_refused():
    with pytest.raises(ValueError, match=r"rate is -0\.1"):
        InnerRates(network(), rate=-0.1)
    with pytest.raises(ValueError, match=r"momentum 1\.0"):
        InnerRates(network(), momentum=1.0)
