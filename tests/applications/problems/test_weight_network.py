"""The weight network: the formulas, the hypergradient against re-solving the inner problem, and what it learns."""

from functools import partial

import pytest
import torch
from torch import nn

import weingarten as wg
from tests.bilevel.problems import data, flat, network, relative_error
from weingarten.applications.problems import WeightNetwork
from weingarten.bilevel.resolve import Level64, minimise

ROWS, CLASSES = 12, 3


@pytest.fixture
def task():
    return WeightNetwork(network(), CLASSES, weight_decay=0.05, hidden=4, seed=2)


@pytest.fixture
def hparams(task):
    draw = torch.Generator().manual_seed(4)
    return {
        name: leaf + 0.5 * torch.randn(leaf.shape, generator=draw, dtype=leaf.dtype)
        for name, leaf in task.start().items()
    }


def by_hand(hparams, loss, label):
    """The weight of one row, in loops over hidden units."""
    logit = hparams["last.bias"][0]
    for unit in range(len(hparams["first.bias"])):
        w = hparams["first.weight"][unit]
        inside = w[0] * (loss + 1e-2).log() + w[1 + label] + hparams["first.bias"][unit]
        logit = logit + hparams["last.weight"][0, unit] * inside.tanh()
    return 2 / (1 + (-logit).exp())


def test_the_inner_level_is_the_formula(task, hparams):
    x, y = data(ROWS)
    batch = wg.Batch(task.inputs(x, y), y)
    params = {
        name: 1.1 * p for name, p in task.problem().inner.objective.params().items()
    }  # not the reference
    reference = nn.functional.cross_entropy(task.model(x), y, reduction="none").detach()
    logits = torch.func.functional_call(task.model, params, (x,))
    losses = nn.functional.cross_entropy(logits, y, reduction="none")
    weights = torch.stack([by_hand(hparams, r, int(label)) for r, label in zip(reference, y, strict=True)])
    expected = (weights * losses).mean() + 0.025 * sum(p.square().sum() for p in params.values())
    assert task.problem().inner.value(params, hparams, batch).item() == pytest.approx(expected.item())
    held = wg.Batch(x, y)
    assert task.problem().outer.value(params, hparams, held).item() == pytest.approx(losses.mean().item())


def test_inputs_hold_the_losses_under_the_given_parameters(task):
    x, y = data(ROWS)
    other = {name: p + 0.3 for name, p in task.problem().inner.objective.params().items()}
    same, losses = task.inputs(x, y, other)
    expected = nn.functional.cross_entropy(
        torch.func.functional_call(task.model, other, (x,)), y, reduction="none"
    )
    assert same is x
    assert not losses.requires_grad
    torch.testing.assert_close(losses, expected.detach())


def test_all_weights_are_one_at_the_start_and_the_seed_decides_it(task):
    _, losses = task.inputs(*data(ROWS))
    torch.testing.assert_close(task.weights(task.start(), losses, data(ROWS)[1]), torch.ones_like(losses))
    again, other = (WeightNetwork(network(), CLASSES, hidden=4, seed=seed).start() for seed in (2, 3))
    assert torch.equal(again["first.weight"], task.start()["first.weight"])
    assert not torch.equal(other["first.weight"], task.start()["first.weight"])


def test_the_hypergradient_is_the_change_of_the_outer_loss_at_the_new_minimum(task, hparams):
    problem, (x, y) = task.problem(), data(ROWS)
    inner, held = wg.Batch(task.inputs(x, y), y), wg.Batch(*data(7, seed=3))
    first = {name: p.clone() for name, p in problem.inner.objective.params().items()}
    params = minimise(Level64(problem.inner, inner), first, hparams, 1e-11, 300)
    exact = wg.Implicit(wg.Hessian, wg.Direct(), None, damping=0.0)
    found = exact(problem, params, hparams, wg.Batches(held, inner)).value
    draw, step = torch.Generator().manual_seed(6), 1e-4
    for _ in range(3):  # along random directions
        direction = {
            name: torch.randn(leaf.shape, generator=draw, dtype=leaf.dtype) for name, leaf in hparams.items()
        }
        f = []
        for sign in (1, -1):
            outer = {name: leaf + sign * step * direction[name] for name, leaf in hparams.items()}
            moved = minimise(Level64(problem.inner, inner), params, outer, 1e-11, 300)
            f.append(float(problem.outer.value(moved, outer, held)))
        assert float(flat(found) @ flat(direction)) == pytest.approx((f[0] - f[1]) / (2 * step), rel=1e-6)


def test_the_direct_gradient_of_the_weights_is_exact(task, hparams):
    (_, losses), y = task.inputs(*data(ROWS)), data(ROWS)[1]
    function = partial(task.weights, losses=losses, targets=y)
    found = torch.func.jacrev(lambda h: function(h).sum())(hparams)
    draw = torch.Generator().manual_seed(7)
    direction = {k: torch.randn(h.shape, generator=draw, dtype=h.dtype) for k, h in hparams.items()}
    up, down = ({k: h + s * 1e-5 * direction[k] for k, h in hparams.items()} for s in (1, -1))
    expected = (function(up).sum() - function(down).sum()) / 2e-5
    assert relative_error(flat(found) @ flat(direction), expected) < 1e-8


def test_it_learns_to_give_a_rare_class_more_weight():
    generator = torch.Generator().manual_seed(0)
    y = torch.cat([torch.zeros(180), torch.ones(20)]).long()
    x = torch.randn(200, 2, generator=generator) + y[:, None]  # classes overlap
    held_y = torch.arange(40) % 2
    held_x = torch.randn(40, 2, generator=generator) + held_y[:, None]
    task = WeightNetwork(nn.Linear(2, 2), classes=2, hidden=4)
    inner = task.inputs(x, y)
    found = wg.solve(
        task.problem(),
        wg.Implicit(),
        partial(torch.optim.Adam, lr=0.05),
        partial(torch.optim.Adam, lr=0.1),
        steps=30,
        hparams=task.start(),
        inner_data=(inner, y),
        outer_data=(held_x, held_y),
        inner_steps=10,
    )
    weights = task.weights(found.hparams, inner[1], y)
    assert float(weights[y == 1].mean()) > 2 * float(weights[y == 0].mean())


@pytest.mark.parametrize("wrong", [{"classes": 0}, {"hidden": 0}, {"weight_decay": -1.0}])
def test_it_refuses_numbers_out_of_range(wrong):
    with pytest.raises(ValueError, match="expected classes >= 1, hidden >= 1 and weight_decay >= 0"):
        WeightNetwork(**{"model": nn.Linear(2, 2), "classes": 2} | wrong)


def test_it_refuses_inputs_without_losses(task, hparams):
    x, y = data(ROWS)
    with pytest.raises(ValueError, match=r"are Tensor, expected a pair \(x, losses\)"):
        task.problem().inner.transform(hparams, wg.Batch(x, y))
