"""Polar factors against the SVD in float64, and the polynomials against the published list."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import weingarten as wg
from tests.cases import normal
from weingarten.optim import OneSide, Polar
from weingarten.optim.polar import exact_polar, optimal_quintics, polar, polar_express

# Amsel et al. 2025, algorithm 1: for a lower bound of 1e-3, before the safety factor.
PUBLISHED = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]
SHAPES = [(7, 4), (4, 7), (40, 40)]


def with_condition(rows: int, columns: int, condition: float) -> tuple[Tensor, Tensor]:
    """A matrix with log-spaced singular values, and its polar factor."""
    n = min(rows, columns)
    u, v = (torch.linalg.qr(normal(size, n, seed=i))[0] for i, size in enumerate((rows, columns)))
    values = torch.logspace(0, -torch.tensor(condition).log10(), n, dtype=torch.float64)
    return (u * values) @ v.mT, u @ v.mT


def composed(x: Tensor, steps: int) -> Tensor:
    for a, b, c in optimal_quintics(1e-3, steps):
        x = a * x + b * x**3 + c * x**5
    return x


def test_the_polynomials_are_the_published_ones():
    torch.testing.assert_close(optimal_quintics(1e-3, 8), tuple(PUBLISHED), rtol=0, atol=1e-8)


@pytest.mark.parametrize("steps", [1, 3, 5, 6])
def test_no_other_scale_of_the_composition_is_nearer_to_one(steps):
    """Its extremes lie evenly about one, at the bound ``1 - p(lower)``; then it is monotone in the number of steps."""
    found = composed(torch.linspace(1e-3, 1, 200_001, dtype=torch.float64), steps)
    bound = 1 - float(found[0])
    assert float(found.min()) >= 1 - bound - 1e-12
    assert float(found.max()) == pytest.approx(1 + bound, abs=2e-2)
    assert float(found.max()) <= 1 + bound + 1e-11  # a tie: 6e-12 above where products are fused otherwise


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("condition", [1.0, 30.0, 1e3])
def test_exact_polar_is_the_polar_factor(shape, condition):
    g, expected = with_condition(*shape, condition)
    torch.testing.assert_close(exact_polar(g), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(polar(1e-30 * g), expected, rtol=0, atol=1e-10)
    single = exact_polar((1e30 * g).float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(
        single.double(), expected, rtol=0, atol=1e-6 + 1e-7 * condition
    )  # g is rounded


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 3, 5, 6, 8])
@pytest.mark.parametrize("condition", [1.0, 30.0, 1e3])
def test_polar_express_keeps_its_bound(shape, steps, condition):
    """Singular vectors stay, singular values go through the polynomials, and end within the bound where it speaks of them."""
    g, expected = with_condition(*shape, condition)
    values = torch.linalg.svdvals(g) / g.norm()
    found = polar_express(g, steps)
    torch.testing.assert_close(torch.linalg.svdvals(found), composed(values, steps).sort(descending=True)[0])
    torch.testing.assert_close(
        (expected.mT @ found).mT, expected.mT @ found, rtol=0, atol=1e-9
    )  # the same singular vectors
    bound = 1 - float(composed(torch.tensor(1e-3, dtype=torch.float64), steps))
    inside = composed(values[values >= 1e-3], steps)
    assert float((inside - 1).abs().max()) <= bound + 1e-9
    if steps == 8 and len(inside) == len(values):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_polar_express_in_bfloat16():
    for shape in SHAPES:
        g, expected = with_condition(*shape, 10.0)
        found = polar_express(g.float(), 6, dtype=torch.bfloat16)
        assert found.dtype == torch.bfloat16
        assert float((torch.linalg.svdvals(found.double()) - 1).abs().max()) < 0.03
        assert float((found - expected).norm()) < 0.03 * float(expected.norm())


@pytest.mark.parametrize(
    ("call", "slack"),
    [
        (exact_polar, {}),
        (polar_express, {"rtol": 0, "atol": 1e-4}),
        (lambda m: polar_express(m, dtype=torch.bfloat16), {}),
    ],
)
def test_stacks_and_singular_matrices(call, slack):
    """Rank one and zero: finite, never longer than one, also at the ends of float32's range.

    In float32 the null space stays almost zero, though its rounding, which a stack may have of its own, grows by some four
    thousand; bfloat16 makes up directions of 1/512, which are above the lower bound.
    """
    one = torch.outer(normal(6), normal(4, seed=1)).float()
    stack = torch.stack([one, 0 * one, normal(6, 4).float(), 1e-38 * one, 1e38 * one / one.abs().max()])
    found = call(stack)
    for matrix, alone in zip(stack, found, strict=True):
        torch.testing.assert_close(alone, call(matrix), **slack)
    values = torch.linalg.svdvals(found.double())
    assert float(values.max()) < 1.03
    assert bool((found[1] == 0).all())
    for i in (0, 3, 4):
        torch.testing.assert_close(float(values[i, 0]), 1.0, rtol=0.03, atol=0)
        direction = one.double() / one.double().norm()
        assert float((found[i].double() * direction).sum()) > 0.97
        if found.dtype == torch.float32:
            assert float(values[i, 1]) < (1e-5 if call is exact_polar else 0.01)


def test_a_decomposition_that_fails_is_replaced_by_products(monkeypatch):
    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("no convergence")

    g, expected = with_condition(7, 4, 30.0)
    monkeypatch.setattr(torch.linalg, "svd", fail)
    torch.testing.assert_close(polar(g), expected)


def test_polar_keeps_momentum_alone_and_is_one_side_of_it():
    found = []
    for choice, settings in (
        (Polar(), {"betas": (0.95, 0.0)}),
        (OneSide(), {"betas": (0.95, 0.0), "of_momentum": True, "refresh": 1}),
    ):
        w = torch.nn.Parameter(normal(5, 2, 3))
        optimizer = wg.Symo([("w", w)], 0.1, choice, damping=0.0, scaling=wg.optim.Natural(), **settings)
        for seed in range(4):
            w.grad = normal(5, 2, 3, seed=seed)
            optimizer.step()
        found.append((w.detach(), {k for k, v in optimizer.state[w].items() if isinstance(v, Tensor)}))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1] == {"momentum"}
