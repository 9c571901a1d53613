"""Known optimisers are choices of the group: 50 steps equal references written from their papers, on the same gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import weingarten as wg
from tests.cases import normal
from weingarten.optim import (
    AdamWScale,
    Axes,
    BothSides,
    Eigenbases,
    FixedScale,
    Natural,
    OneSide,
    Polar,
    Spectral,
)
from weingarten.optim.moment import EntryMoment, OrbitMoment

STEPS, LR, DECAY, B1, B2, EPS, DAMPING = 50, 0.01, 0.1, 0.9, 0.95, 1e-8, 1e-3
SHAPES = {
    "tall": (7, 4),
    "wide": (3, 6),
    "kernel": (5, 2, 3),
    "bias": (4,),
    "square": (4, 4),
    "cube": (6, 2, 3),
}


def gradient(name: str, w: Tensor, step: int) -> Tensor:
    """Of a quadratic loss with noise that depends on the step, so that trajectories are sensitive to every update."""
    scale = 1 + torch.arange(w.numel(), dtype=w.dtype).reshape(w.shape) / 7
    return scale * w + 0.3 * normal(*w.shape, seed=1000 * list(SHAPES).index(name) + step)


def starts() -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(normal(*shape, seed=len(shape))) for name, shape in SHAPES.items()}


def trajectory(make: Callable[[list], torch.optim.Optimizer]) -> list[dict[str, Tensor]]:
    params = starts()
    optimizer = make(list(params.items()))
    found = []
    for step in range(STEPS):
        for name, p in params.items():
            p.grad = gradient(name, p.detach(), step)
        optimizer.step()
        found.append({name: p.detach().clone() for name, p in params.items()})
    return found


def reference(rule: Callable[[Tensor], Callable[[Tensor, int], Tensor]]) -> list[dict[str, Tensor]]:
    """Decoupled weight decay, then a step along ``rule(matrix)(gradient, step)``; AdamW for the bias."""
    params = {name: p.detach().clone() for name, p in starts().items()}
    rules = {name: (adam() if p.ndim == 1 else rule(p.flatten(1))) for name, p in params.items()}
    found = []
    for step in range(STEPS):
        for name, p in params.items():
            g = gradient(name, p, step)
            u = rules[name](g if g.ndim == 1 else g.flatten(1), step).reshape(p.shape)
            params[name] = p - LR * DECAY * p - LR * u
        found.append(dict(params))
    return found


def adam(b1: float = B1, b2: float = B2) -> Callable[[Tensor, int], Tensor]:
    m = v = torch.zeros(())

    def step(g: Tensor, t: int) -> Tensor:
        nonlocal m, v
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        return m / (1 - b1 ** (t + 1)) / ((v / (1 - b2 ** (t + 1))).sqrt() + EPS)

    return step


def power(matrix: Tensor, exponent: float, damping: float = DAMPING) -> Tensor:
    shifted = matrix + damping * matrix.trace() / len(matrix) * torch.eye(len(matrix), dtype=matrix.dtype)
    spectrum, vectors = torch.linalg.eigh(shifted)
    return vectors @ torch.diag(spectrum**exponent) @ vectors.mT


def due(step: int, refresh: int) -> bool:
    t = step + 1
    return t % refresh == 0 or (t < refresh and t in (1, 2, 4, 8, 16, 32))


def symo(choice, **settings) -> Callable[[list], torch.optim.Optimizer]:
    settings = {"betas": (B1, B2), "adamw_betas": (B1, B2), "nesterov": False, "damping": DAMPING, **settings}
    settings = {"scaling": Natural(), "weight_decay": DECAY, **settings}
    return lambda named: wg.Symo(named, LR, choice, **settings)


def same(found, expected, tol: float = 1e-9, names=tuple(SHAPES)) -> None:
    moved = max(float((expected[-1][name] - p).abs().max()) for name, p in expected[0].items())
    assert moved > 0.05  # the trajectory goes somewhere
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        for name in names:
            torch.testing.assert_close(
                a[name], b[name], rtol=tol, atol=tol, msg=lambda m, s=step, n=name: f"{s} {n}: {m}"
            )


ADAM_MOMENT = Axes(wg.Signs(), wg.Signs())


@pytest.mark.parametrize("choice", [ADAM_MOMENT, lambda name, p: None])
def test_sign_flips_and_the_rest_are_torch_adamw(choice):
    expected = trajectory(
        lambda named: torch.optim.AdamW([p for _, p in named], LR, (B1, B2), EPS, weight_decay=DECAY)
    )
    same(trajectory(symo(choice)), expected, 1e-12)


def test_entry_moment_is_the_orbit_moment_of_sign_flips():
    leaf = {"w": torch.zeros(4, 3, dtype=torch.float64)}
    orbit = OrbitMoment(wg.Symmetry.parse({"w": "r c"}, r=wg.Signs(), c=wg.Signs()), leaf)
    entry, states = EntryMoment(leaf), (orbit.init(), EntryMoment(leaf).init())
    assert orbit.tasks(states[0]) == []
    for seed in range(4):
        g = {"w": normal(4, 3, seed=seed)}
        found = []
        for moment, state in zip((orbit, entry), states, strict=True):
            moment.accumulate(state, g, 0.8)
            found.append(moment.precondition(state, g, 1e-3)["w"])
        torch.testing.assert_close(*found)


MUON = {"betas": (B1, 0.0), "of_momentum": True, "refresh": 1, "damping": 0.0}


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("choice", "settings", "tol"), [(OneSide(), MUON, 1e-7), (Polar(), {}, 1e-11)])
def test_muon_is_torch_muon_with_exact_orthogonalisation(choice, settings, tol, nesterov):
    """torch.optim.Muon, with the polar factor by SVD in place of five Newton-Schulz iterations."""

    def rule(w: Tensor):
        buffer = torch.zeros_like(w)

        def step(g: Tensor, t: int) -> Tensor:
            buffer.lerp_(g, 1 - B1)
            u, _, v = torch.linalg.svd(g.lerp(buffer, B1) if nesterov else buffer, full_matrices=False)
            return max(1, len(w) / w[0].numel()) ** 0.5 * u @ v

        return step

    found = trajectory(symo(choice, nesterov=nesterov, scaling=Spectral(), **settings))
    same(found, reference(rule), tol)  # the Gram matrix squares the condition number


def test_muon_with_fixed_scale_is_torch_muons_match_rms_adamw():
    """Against the optimiser itself: its five iterations leave singular values in 0.7 .. 1.2, so the first steps agree to that."""
    weight = normal(6, 4)
    found, expected = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    ours = wg.Symo(
        [("w", found)],
        LR,
        OneSide(),
        betas=(0.95, 0.0),
        scaling=FixedScale(),
        of_momentum=True,
        refresh=1,
        damping=0.0,
        weight_decay=DECAY,
    )
    theirs = torch.optim.Muon([expected], LR, DECAY, 0.95, adjust_lr_fn="match_rms_adamw")
    for seed in range(5):
        for p, optimizer in ((found, ours), (expected, theirs)):
            p.grad = normal(6, 4, seed=seed)
            optimizer.step()
    found, expected = found.detach(), expected.detach()
    assert float((found - weight).norm()) > 0.01
    assert float((found - expected).norm()) < 0.35 * float((found - weight).norm())


@pytest.mark.parametrize("refresh", [1, 5])
def test_one_side_is_one_sided_shampoo(refresh):
    def rule(w: Tensor):
        flipped = w.shape[0] < w.shape[1]
        state = {"s": 0.0, "m": 0.0, "root": None}

        def step(g: Tensor, t: int) -> Tensor:
            g = g.mT if flipped else g
            state["s"] = B2 * state["s"] + (1 - B2) * g.mT @ g / len(g)
            state["m"] = B1 * state["m"] + (1 - B1) * g
            if due(t, refresh):
                state["root"] = power(state["s"] / (1 - B2 ** (t + 1)), -0.5)
            u = state["m"] / (1 - B1 ** (t + 1)) @ state["root"]
            return u.mT if flipped else u

        return step

    same(trajectory(symo(OneSide(), refresh=refresh)), reference(rule))


@pytest.mark.parametrize("refresh", [1, 5])
def test_both_sides_is_shampoo(refresh):
    """Both factors are means over the other axis, as the orbit average has them."""

    def rule(w: Tensor):
        state = {"l": 0.0, "r": 0.0, "m": 0.0}

        def step(g: Tensor, t: int) -> Tensor:
            rows, columns = g.shape
            state["l"] = B2 * state["l"] + (1 - B2) * g @ g.mT / columns
            state["r"] = B2 * state["r"] + (1 - B2) * g.mT @ g / rows
            state["m"] = B1 * state["m"] + (1 - B1) * g
            if due(t, refresh):
                state["left"], state["right"] = (power(state[k] / (1 - B2 ** (t + 1)), -0.25) for k in "lr")
            return state["left"] @ state["m"] @ state["right"] / (1 - B1 ** (t + 1))

        return step

    same(trajectory(symo(BothSides(), refresh=refresh)), reference(rule))


@pytest.mark.parametrize("refresh", [1, 5])
@pytest.mark.parametrize(("longest", "names"), [(100, ("square", "cube", "bias")), (5, tuple(SHAPES))])
def test_eigenbases_is_soap(refresh, longest, names):
    """Bases by eigh, then by one orthogonal iteration per refresh; sides longer than the limit keep theirs.

    Only where the first moment has full rank: of a null space eigh returns any basis.
    """

    def rule(w: Tensor):
        state = {"l": 0.0, "r": 0.0, "m": 0.0, "v": 0.0}
        for side, n in zip("lr", w.shape, strict=True):
            state[f"q{side}"] = None if n <= longest else torch.eye(n, dtype=w.dtype)

        def step(g: Tensor, t: int) -> Tensor:
            for side, new in (("l", g @ g.mT), ("r", g.mT @ g)):
                state[side] = B2 * state[side] + (1 - B2) * new
                q = state[f"q{side}"]
                if len(new) <= longest and due(t, refresh):
                    state[f"q{side}"] = (
                        torch.linalg.eigh(state[side])[1].flip(-1)
                        if q is None
                        else torch.linalg.qr(state[side] @ q)[0]
                    )
            left, right = state["ql"], state["qr"]
            state["m"] = B1 * state["m"] + (1 - B1) * g
            state["v"] = B2 * state["v"] + (1 - B2) * (left.mT @ g @ right) ** 2
            rotated = left.mT @ state["m"] @ right / (1 - B1 ** (t + 1))
            return left @ (rotated / ((state["v"] / (1 - B2 ** (t + 1))).sqrt() + EPS)) @ right.mT

        return step

    same(trajectory(symo(Eigenbases(longest), refresh=refresh)), reference(rule), 1e-7, names)


def test_rotations_of_both_sides_is_normalised_sgd():
    def rule(w: Tensor):
        state = {"s": 0.0, "m": 0.0}

        def step(g: Tensor, t: int) -> Tensor:
            state["s"] = B2 * state["s"] + (1 - B2) * float(g.square().mean())
            state["m"] = B1 * state["m"] + (1 - B1) * g
            return state["m"] / (1 - B1 ** (t + 1)) / ((state["s"] / (1 - B2 ** (t + 1))) ** 0.5 + EPS)

        return step

    same(trajectory(symo(Axes(wg.Rotation(), wg.Rotation()))), reference(rule))


def test_rotations_and_sign_flips_scale_columns():
    def rule(w: Tensor):
        state = {"s": 0.0, "m": 0.0}

        def step(g: Tensor, t: int) -> Tensor:
            state["s"] = B2 * state["s"] + (1 - B2) * g.square().mean(0, keepdim=True)
            state["m"] = B1 * state["m"] + (1 - B1) * g
            return state["m"] / (1 - B1 ** (t + 1)) / ((state["s"] / (1 - B2 ** (t + 1))).sqrt() + EPS)

        return step

    same(trajectory(symo(Axes(wg.Rotation(), wg.Signs()))), reference(rule))


def test_scalings():
    u, adam_rms = normal(3, 8), torch.tensor(0.3, dtype=torch.float64)
    for scaling, expected in ((AdamWScale(), 0.3), (AdamWScale(2.0), 0.6), (FixedScale(0.7), 0.7)):
        torch.testing.assert_close(float(scaling(u, adam_rms).square().mean().sqrt()), expected)
        assert scaling(torch.zeros(2), adam_rms).tolist() == [0, 0]
    for rows, columns in ((8, 3), (3, 8)):
        q = torch.linalg.qr(normal(8, 3))[0]
        q = q if rows == 8 else q.mT
        torch.testing.assert_close(Spectral()(5 * q, adam_rms), q * max(1, rows / columns) ** 0.5)
    with pytest.raises(ValueError, match="rms"):
        FixedScale(0.0)
    with pytest.raises(ValueError, match="factor"):
        AdamWScale(0.0)


def test_default_scale_is_that_of_adamws_step():
    """Leaf by leaf and step by step, on the trajectory of either."""
    params = starts()
    ours = wg.Symo(params.items(), LR, OneSide(), betas=(B1, B2), nesterov=False, weight_decay=0.0)
    for step in range(STEPS):
        other = {name: p.detach().clone() for name, p in params.items()}
        for name, p in params.items():
            p.grad = gradient(name, p.detach(), step)
        if step == 0:
            rules = {name: adam() for name in params}
        expected = {
            name: LR * float(rules[name](p.grad, step).square().mean().sqrt()) for name, p in params.items()
        }
        ours.step()
        for name, p in params.items():
            assert float((p.detach() - other[name]).square().mean().sqrt()) == pytest.approx(
                expected[name], rel=1e-9
            )
    assert expected["cube"] < 0.9 * LR  # noise has averaged out, the scale has followed
