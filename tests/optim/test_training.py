"""Symo in a training loop: what is saved, what goes wrong, and what PyTorch's own tools expect of an optimiser."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import weingarten as wg
from tests.cases import normal
from tests.optim import two_ranks
from weingarten.optim import BothSides, Eigenbases, OneSide, roots
from weingarten.optim.roots import Task, factorise, inverse_root, next_basis

X, Y = normal(8, 4), normal(8, 3, seed=1)
CHOICES = [None, OneSide(), BothSides(), Eigenbases()]


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    return two_ranks.build().to(dtype)


def symo(model: nn.Module, choice=None, **settings) -> wg.Symo:
    example = {"example_inputs": X.to(next(model.parameters()).dtype)} if choice is None else {}
    return wg.Symo(model, 0.02, choice, refresh=3, **example, **settings)


def loss_of(model: nn.Module, rows: slice = slice(None)) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    return (model(X[rows].to(dtype)) - Y[rows].to(dtype)).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same_state(a: dict, b: dict) -> bool:
    """Bit for bit, of two optimisers' ``state_dict``."""
    flat = [{(i, k): v for i, entry in d["state"].items() for k, v in entry.items()} for d in (a, b)]
    return flat[0].keys() == flat[1].keys() and all(
        torch.equal(v, flat[1][k]) if isinstance(v, torch.Tensor) else v == flat[1][k]
        for k, v in flat[0].items()
    )


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_resumed_run_is_the_same_bit_for_bit(choice, dtype):
    model = network(dtype)
    optimizer = symo(model, choice)
    train(model, optimizer, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 5)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = network(dtype)
    again.load_state_dict(saved["model"])
    other = symo(again, choice)
    other.load_state_dict(saved["optimizer"])
    train(again, other, 5)
    assert equal(model, again)
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    found = {v.dtype for state in other.state.values() for v in state.values() if isinstance(v, torch.Tensor)}
    assert found == {state_dtype}


def test_loading_copies_and_refuses_other_plans():
    model = network()
    optimizer = symo(model)
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    other = symo(network())
    other.load_state_dict(saved)
    before = copy.deepcopy(saved)
    for p in other.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    other.step()
    assert same_state(before, optimizer.state_dict())  # nothing shared
    assert not same_state(before, other.state_dict())
    with pytest.raises(
        ValueError, match=r"'0.weight' has other \['basis.0.1', 'gram.0', .*'root.0', 'spectrum', 'square'\]"
    ):
        symo(network(), OneSide()).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"other \['basis.0.0'"):
        symo(network(), Eigenbases()).load_state_dict(saved)
    names = wg.Symo(list(network().named_parameters())[:2], symmetry=OneSide())
    with pytest.raises(ValueError, match=r"expected \['0.weight', '0.bias'\]"):
        names.load_state_dict(saved)


def test_closure_accumulation_and_clipping_are_the_plain_step():
    """Two halves accumulated, clipped before the step, and the same from a closure."""
    runs = [network() for _ in range(3)]
    optimizers = [symo(model) for model in runs]
    for _ in range(4):
        for model, optimizer in zip(runs[:2], optimizers[:2], strict=True):
            optimizer.zero_grad()
            for rows in (slice(0, 4), slice(4, 8)) if model is runs[0] else (slice(None),):
                (loss_of(model, rows) * (0.5 if model is runs[0] else 1.0)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()

        def closure() -> torch.Tensor:
            optimizers[2].zero_grad()
            loss = loss_of(runs[2])
            loss.backward()
            nn.utils.clip_grad_norm_(runs[2].parameters(), 0.1)
            return loss

        expected = loss_of(runs[2]).detach()
        torch.testing.assert_close(optimizers[2].step(closure).detach(), expected)
    for other in runs[1:]:
        for a, b in zip(runs[0].parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b)


def test_groups_and_schedulers_set_rates_and_decay():
    model = network()
    named = list(model.named_parameters())
    groups = [
        {"params": named[:2], "lr": 0.0, "weight_decay": 0.0},
        {"params": named[2:], "weight_decay": 0.5},
    ]
    optimizer = wg.Symo(groups, 0.1, OneSide())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    start = weights(model)
    train(model, optimizer, 1)
    scheduler.step()
    assert optimizer.param_groups[1]["lr"] == 0.05
    first = weights(model)
    assert torch.equal(first[0], start[0])
    assert not torch.equal(first[2], start[2])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for entry in state.values():
        entry["momentum"].zero_()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    optimizer.step()  # nothing but decay
    torch.testing.assert_close(weights(model)[2], first[2] * (1 - 0.05 * 0.5))


def test_one_cycle_moves_the_momentum():
    model = network()
    optimizer = symo(model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6)
    found = set()
    for _ in range(5):
        train(model, optimizer, 1)
        found.add(optimizer.param_groups[0]["betas"][0])
        scheduler.step()
    assert len(found) > 2
    assert bool(weights(model)[0].isfinite().all())


def test_grad_scaler_is_invisible():
    plain, scaled = network(torch.float32), network(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = symo(scaled)
    train(plain, symo(plain), 3)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(scaled)).backward()
        scaler.step(optimizer)
        scaler.update()
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_model_trains_as_the_plain_one():
    plain, compiled = network(), network()
    train(plain, symo(plain), 3)
    wrapped = torch.compile(compiled, backend="eager")
    train(wrapped, symo(wrapped), 3)
    assert equal(plain, compiled)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_a_gradient_that_is_not_finite_raises_or_skips_and_changes_nothing(bad):
    model = network(torch.float64)
    for skip in (False, True):
        optimizer = symo(model, skip_nonfinite=skip)
        train(model, optimizer, 2)
        loss_of(model).backward()
        model[2].weight.grad[0, 0] = bad
        before, state = weights(model), copy.deepcopy(optimizer.state_dict())
        if skip:
            optimizer.step()
            assert optimizer.skipped == 1
        else:
            with pytest.raises(wg.NonFiniteGradientError, match=r"\['2.weight'\] are not finite"):
                optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
        assert same_state(state, optimizer.state_dict())


def test_what_is_finite_depends_on_the_type_of_the_state():
    """Moments hold squares: 1e30 has one in float64 and none in float32."""
    for dtype, fits in ((torch.float64, True), (torch.float32, False), (torch.bfloat16, False)):
        model = nn.Linear(3, 4, bias=False).to(dtype)
        optimizer = wg.Symo(model, 0.1, OneSide(), skip_nonfinite=True)
        model.weight.grad = torch.full((4, 3), 1e30, dtype=dtype)
        optimizer.step()
        assert optimizer.skipped == int(not fits)
        assert bool(model.weight.isfinite().all())


def test_bfloat16_gradients_that_cancel_in_their_own_type_are_averaged_in_float32():
    model = nn.Linear(3, 4, bias=False).to(torch.bfloat16)
    optimizer = wg.Symo(model, 0.0, OneSide(), betas=(0.999, 0.999))
    for _ in range(50):
        model.weight.grad = torch.full((4, 3), 1.0, dtype=torch.bfloat16)
        optimizer.step()
    momentum = optimizer.state[model.weight]["momentum"]
    torch.testing.assert_close(momentum, torch.full((4, 3), 1 - 0.999**50), rtol=1e-5, atol=0)


def test_zero_gradients_give_no_step_and_no_nan():
    for choice in CHOICES:
        model = network()
        optimizer = symo(model, choice, weight_decay=0.0)
        before = weights(model)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
        train(model, optimizer, 4)
        assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("choice", CHOICES)
def test_a_failed_factorisation_is_counted_and_never_nan(choice, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("no convergence")

    model = network()
    optimizer = symo(model, choice)
    train(model, optimizer, 1)
    assert optimizer.raised == 0
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    monkeypatch.setattr(torch.linalg, "qr", fail)
    before = weights(model)
    train(model, optimizer, 3)
    assert optimizer.raised > 0
    after = weights(model)
    assert all(bool(p.isfinite().all()) for p in after)
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_damping_is_raised_for_the_singular_matrix_alone():
    sound, singular = (
        torch.diag(torch.tensor([1.0, 3.0])).double(),
        torch.diag(torch.tensor([2.0, 0.0])).double(),
    )
    found, failed = inverse_root(torch.stack([sound, singular]), -0.5, 0.0)
    assert failed == 1
    torch.testing.assert_close(found[0].diagonal(), torch.tensor([1.0, 3.0]).double() ** -0.5)
    torch.testing.assert_close(found[1].diagonal(), torch.tensor([2.0 + 1e-6, 1e-6]).double() ** -0.5)


def test_matrices_of_one_size_are_factorised_in_one_call(monkeypatch):
    calls = []
    monkeypatch.setattr(roots, "inverse_root", lambda s, e, d: calls.append(s.shape) or inverse_root(s, e, d))
    moments = [torch.eye(n)[None] * (i + 1) for i, n in enumerate((3, 2, 3))]
    tasks = [Task(moment, torch.empty_like(moment), -0.5) for moment in moments]
    assert factorise(tasks, 0.0) == 0
    assert sorted(calls) == [(1, 2, 2), (2, 3, 3)]
    for i, task in enumerate(tasks):
        torch.testing.assert_close(task.target, torch.eye(len(task.target[0]))[None] * (i + 1) ** -0.5)


def test_bases_converge_to_eigenvectors_in_their_first_order():
    a = normal(5, 5)
    moment = (a @ torch.diag(torch.tensor([9.0, 6, 4, 2, 1]).double()) @ torch.linalg.inv(a)).mH
    moment = (moment @ moment.mT)[None]
    start = torch.linalg.qr(torch.linalg.eigh(moment[0])[1].flip(1) + 0.05 * normal(5, 5, seed=1))[0][None]
    basis = start
    for _ in range(200):
        basis, failed = next_basis(moment, basis)
    rotated = basis[0].mT @ moment[0] @ basis[0]
    assert failed == 0
    assert float((rotated - torch.diag(rotated.diagonal())).norm()) < 1e-9 * float(rotated.norm())


def test_two_ranks_take_the_same_steps_as_one_process(tmp_path):
    script, store = Path(two_ranks.__file__), tmp_path / "store"
    outs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    ranks = [
        subprocess.Popen([sys.executable, script, str(rank), store, out]) for rank, out in enumerate(outs)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    first, second = (torch.load(out, weights_only=True) for out in outs)
    assert same_state(first["optimizer"], second["optimizer"])
    model = two_ranks.build()
    two_ranks.train(model, *two_ranks.data())
    for name, p in model.state_dict().items():
        assert torch.equal(first["model"][name], second["model"][name])
        torch.testing.assert_close(first["model"][name], p)
