from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

import weingarten as wg


def draw(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nearest_on_simplex(x, total):
    """By a solver for constrained problems."""
    found = minimize(
        lambda p: ((p - x) ** 2).sum() / 2,
        np.full(len(x), total / len(x)),
        jac=lambda p: p - x,
        bounds=[(0, None)] * len(x),
        constraints={"type": "eq", "fun": lambda p: p.sum() - total, "jac": np.ones_like},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return found.x


@pytest.mark.parametrize("total", [1.0, 3.5])
@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_simplex_is_the_nearest_point(total, size):
    x = draw(6, size, seed=size)
    found = wg.Simplex(total)(x)
    for row, mine in zip(x, found, strict=True):
        assert np.allclose(mine.numpy(), nearest_on_simplex(row.numpy(), total), atol=1e-5)


@pytest.mark.parametrize("axis", [-1, 0, 1, None])
def test_simplex_axes(axis):
    x = draw(3, 4, 5)
    found = wg.Simplex(2.0, axis)(x)
    assert found.shape == x.shape
    assert (found >= 0).all()
    assert torch.allclose(
        found.sum() if axis is None else found.sum(axis), torch.tensor(2.0, dtype=torch.float64)
    )
    again = wg.Simplex(2.0, axis)(found)
    assert torch.allclose(again, found)


def test_simplex_with_ties_large_values_and_float32():
    assert torch.allclose(wg.Simplex()(torch.full((4,), 7.0)), torch.full((4,), 0.25))
    assert wg.Simplex()(torch.tensor([1e8, 0.0])).tolist() == [1.0, 0.0]
    assert wg.Simplex()(torch.tensor([-5.0, -5.0])).tolist() == [0.5, 0.5]


def test_box():
    x = draw(4, 3)
    found = wg.Box(-0.5, 1)(x)
    assert torch.equal(found, x.clamp(-0.5, 1))
    assert torch.equal(wg.Box()(x), x)
    assert torch.equal(wg.Box(low=0)(x), x.clamp(min=0))


def test_empty_sets_are_refused():
    with pytest.raises(ValueError, match="low is 2"):
        wg.Box(2, 1)
    with pytest.raises(ValueError, match="total is 0"):
        wg.Simplex(0)
