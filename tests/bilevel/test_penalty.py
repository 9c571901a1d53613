"""The proximal penalty against automatic differentiation."""

from __future__ import annotations

import pytest
import torch

import weingarten as wg
from weingarten.bilevel.implicit import mixed_product
from weingarten.bilevel.penalty import PenaltyHessian


def leaves(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in {"a": (2, 3), "b": (4,)}.items()
    }


def squared(hparams):
    """A centre that is no linear function of the outer variables."""
    return {name: h**2 for name, h in hparams.items()}


@pytest.mark.parametrize("centre", [None, squared])
def test_derivatives_of_the_proximal_penalty(centre):
    penalty = wg.Proximal(0.7) if centre is None else wg.Proximal(0.7, centre)
    params, hparams, q = leaves(0), leaves(1), leaves(2)
    assert penalty.isotropic(params, hparams) == 0.7
    double, known = (
        PenaltyHessian(penalty, params, hparams).apply(q),
        penalty.hessian(params, hparams).apply(q),
    )
    nothing = wg.Objective(lambda p, x: 0 * p["b"][:1].expand(1, 1), wg.MSE())
    level, batch = wg.Level(nothing, penalty=penalty), wg.Batch(torch.zeros(1, 1), torch.zeros(1, 1).double())
    mixed = mixed_product(level, params, hparams, batch, q)
    for name in params:
        torch.testing.assert_close(known[name], double[name])
        slope = torch.ones(()) if centre is None else 2 * hparams[name]
        torch.testing.assert_close(
            mixed[name], -0.7 * slope * q[name]
        )  # d/dphi of strength (theta - centre(phi))


def test_centre_that_does_not_fit():
    with pytest.raises(
        ValueError, match=r"Proximal: the centre of parameter 'b' is \(2,\), expected shape \(4,\)"
    ):
        wg.Proximal(1.0)(leaves(0), leaves(1) | {"b": torch.zeros(2)})
    with pytest.raises(ValueError, match="'a' is no such leaf"):
        wg.Proximal(1.0, lambda hparams: {})(leaves(0), {})
    with pytest.raises(ValueError, match="strength is -1"):
        wg.Proximal(-1.0)
