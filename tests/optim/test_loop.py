"""Symo under what PyTorch puts around an optimiser: groups, schedulers, scalers, clipping, compilation, copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import weingarten as wg
from tests.cases import normal
from tests.optim import two_ranks
from weingarten.optim import BothSides, Eigenbases, Natural, OneSide, Polar

X, Y = two_ranks.data()
CHOICES = [None, OneSide(), BothSides(), Eigenbases(), Polar()]


def symo(model: nn.Module, choice: Any = None, **settings: Any) -> wg.Symo:
    example = {"example_inputs": X} if choice is None else {}
    return wg.Symo(model, 0.02, choice, refresh=3, **example, **settings)


def loss_of(model: nn.Module) -> torch.Tensor:
    return (model(X) - Y).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_every_group_has_its_own_rate_decay_betas_and_eps():
    """Two groups in one optimiser step as two optimisers."""
    own: list[dict[str, Any]] = [
        {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.3, "eps": 1e-3},
        {"lr": 0.01, "adamw_betas": (0.5, 0.7), "weight_decay": 0.0},
    ]
    start = {name: normal(5, 3, seed=i) if i % 2 else normal(5, seed=i) for i, name in enumerate("abcd")}
    together, apart = ({name: nn.Parameter(p.clone()) for name, p in start.items()} for _ in range(2))
    halves = (["a", "b"], ["c", "d"])

    def groups(params: dict[str, nn.Parameter], which: tuple[int, ...]) -> list[dict[str, Any]]:
        return [{"params": [(name, params[name]) for name in halves[i]], **own[i]} for i in which]

    one = [wg.Symo(groups(together, (0, 1)), 7.0, OneSide(), scaling=Natural())]
    two = [wg.Symo(groups(apart, (i,)), 7.0, OneSide(), scaling=Natural()) for i in (0, 1)]
    for step in range(6):
        for params, optimizers in ((together, one), (apart, two)):
            for i, p in enumerate(params.values()):
                p.grad = normal(*p.shape, seed=10 * step + i)
            for optimizer in optimizers:
                optimizer.step()
    for name, p in start.items():
        assert torch.equal(together[name], apart[name])
        assert not torch.equal(together[name], p)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.LambdaLR(o, [lambda t: 1 / (t + 1), lambda t: 0.5**t]),
        lambda o: lr_scheduler.SequentialLR(
            o,
            [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.CosineAnnealingLR(o, 5)],
            milestones=[3],
        ),
        lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.2], total_steps=9, cycle_momentum=False),
        lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    ],
)
def test_schedulers_set_the_rates_that_they_set_for_adamw(make: Callable[[Any], Any]):
    found = []
    for ours in (True, False):
        named = list(two_ranks.build().named_parameters())
        groups = [{"params": named[:2], "lr": 0.02}, {"params": named[2:], "lr": 0.04}]
        optimizer = wg.Symo(groups, 0.1, OneSide()) if ours else torch.optim.AdamW(groups, 0.1)
        scheduler, rates = make(optimizer), []
        for step in range(8):
            for _, p in named:
                p.grad = torch.ones_like(p)
            before = named[0][1].detach().clone()
            optimizer.step()
            rates.append([group["lr"] for group in optimizer.param_groups])
            if ours and step == 0:  # the group's own rate: the first step of AdamW's length
                moved = named[0][1].detach() - before * (1 - 0.01 * rates[0][0])
                torch.testing.assert_close(
                    float(moved.square().mean().sqrt()), rates[0][0], rtol=1e-6, atol=0
                )
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        found.append(rates)
    assert found[0] == found[1]
    assert len({tuple(pair) for pair in found[0]}) > 2


def test_clipping_enters_before_the_preconditioner():
    """Momentum and moment are those of clipped gradients, whatever the length of the gradient was."""
    runs = {factor: two_ranks.build() for factor in (1.0, 1000.0)}
    for factor, model in runs.items():
        optimizer = symo(model, OneSide(), scaling=Natural())
        for step in range(6):
            optimizer.zero_grad()
            (loss_of(model) * (factor if step == 3 else 1.0)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
        norms = [optimizer.state[p]["momentum"].norm() for p in model.parameters()]
        assert float(torch.stack(norms).norm()) <= 0.01
    for p, q in zip(runs[1.0].parameters(), runs[1000.0].parameters(), strict=True):
        torch.testing.assert_close(p, q)
    after = two_ranks.build()  # the same outlier, clipped by nobody
    optimizer = symo(after, OneSide(), scaling=Natural())
    for step in range(6):
        optimizer.zero_grad()
        (loss_of(after) * (1000.0 if step == 3 else 1.0)).backward()
        optimizer.step()
    assert float((weights(after)[0] - weights(runs[1.0])[0]).norm()) > 0.01


def test_a_scaler_unscales_before_clipping_and_leaves_out_overflows():
    plain, scaled = two_ranks.build().float(), two_ranks.build().float()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-100)
    x, y = X.float(), Y.float()
    ours, other = (wg.Symo(m, 0.02, OneSide(), refresh=3) for m in (scaled, plain))

    def backward(model: nn.Module) -> torch.Tensor:
        model.zero_grad()
        return (100 * model(x) - y).square().mean()

    for step in range(4):
        before = weights(scaled)
        scaler.scale(backward(scaled)).backward()
        scaler.unscale_(ours)
        nn.utils.clip_grad_norm_(scaled.parameters(), 0.1)
        scaler.step(ours)
        scaler.update()
        if step == 0:
            assert scaler.get_scale() == 2.0**26
            assert all(torch.equal(a, b) for a, b in zip(before, weights(scaled), strict=True))
            assert not ours.state
            continue
        backward(plain).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        other.step()
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def inner(model: nn.Module) -> nn.Module:
    model[0] = torch.compile(model[0], backend="eager")
    return model


@pytest.mark.parametrize("wrap", [whole, inner])
def test_a_state_moves_between_plain_and_compiled_models(wrap):
    plain, compiled = two_ranks.build(), two_ranks.build()
    optimizer, other = symo(plain), symo(wrap(compiled))
    train(plain, optimizer, 4)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
        q.data.copy_(p)
    for model, one in ((plain, optimizer), (compiled, other)):
        train(model, one, 4)
    assert equal(plain, compiled)
    symo(two_ranks.build()).load_state_dict(other.state_dict())


def test_names_of_a_compiled_model_are_those_of_the_model():
    names = [name for name, _ in two_ranks.build().named_parameters()]
    compiled = whole(two_ranks.build())
    for params in (compiled, compiled.named_parameters(), [{"params": compiled.named_parameters()}]):
        optimizer = wg.Symo(params, 0.1, OneSide())
        assert [name for group in optimizer.param_groups for name in group["param_names"]] == names
        assert [name for route in optimizer.routes for name in route.leaves if route.adamw] == names[1::2]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("choice", CHOICES)
def test_copies_and_pickles_keep_the_plan(choice, copied):
    model = two_ranks.build()
    optimizer = symo(model, choice)
    train(model, optimizer, 2)
    twin, other = copied((model, optimizer))
    assert str(other) == str(optimizer)
    train(model, optimizer, 4)
    train(twin, other, 4)
    assert equal(model, twin)


@pytest.mark.parametrize("choice", CHOICES)
def test_the_state_is_made_where_the_parameters_are_at_the_first_step(choice):
    """A trainer moves the model after the optimiser was made; here the other device is PyTorch's without data."""
    model = two_ranks.build()
    optimizer = symo(model, choice)
    away = {name: nn.Parameter(p.to("meta")) for name, p in model.named_parameters()}
    optimizer._params = dict(away)
    for route in optimizer.routes:
        optimizer._state(replace(route))
        for name in route.leaves:
            state = optimizer.state[away[name]]
            assert {v.device.type for v in state.values() if isinstance(v, torch.Tensor)} == {"meta"}
