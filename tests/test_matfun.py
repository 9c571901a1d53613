"""Functions of symmetric matrices: every route against the eigendecomposition."""

from __future__ import annotations

import pytest
import torch

import weingarten as wg
from tests.cases import normal
from weingarten.matfun import (
    SingularMatrixError,
    by_cholesky,
    by_eigh,
    by_iteration,
    eigh,
    evaluate,
    mean_of,
    on_spectrum,
)


def spd(*batch: int, n: int = 5, floor: float = 0.05) -> torch.Tensor:
    x = normal(*batch, n, n + 1)
    return x @ x.mT / n + floor * torch.eye(n, dtype=torch.float64)


FUNCTIONS = [
    wg.Power(-1, 0.2),
    wg.Power(-1),
    wg.Power(-0.5, 0.2),
    wg.Power(0.5, 0.2),
    wg.Power(1),
    wg.Power(-0.25, 0.1),
    wg.FactoredPower(-1, 0.1),
    wg.Log(0.3),
    wg.Log(),
    wg.Shift(0.3),
    wg.Scale(2.0),
]


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_evaluate_is_the_function_of_the_spectrum_of_each_matrix(function, shape):
    matrix = spd(*shape)
    kept = matrix.clone()
    found = evaluate(function, matrix)
    spectrum, basis = torch.linalg.eigh(matrix)
    torch.testing.assert_close(found, basis @ torch.diag_embed(function(spectrum)) @ basis.mT)
    assert torch.equal(matrix, kept)


@pytest.mark.parametrize("exponent", [0.5, -0.5])
@pytest.mark.parametrize("damping", [1e-6, 1e-2, 10.0])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5])
def test_iteration(exponent, damping, scale):
    matrix = scale * spd(3, n=8, floor=0.0)
    found = by_iteration(exponent, damping * scale, matrix)
    torch.testing.assert_close(
        found, by_eigh(wg.Power(exponent, damping * scale), matrix), rtol=1e-6, atol=1e-8 * scale**exponent
    )


def test_iteration_refuses():
    with pytest.raises(ValueError, match="exponent is -1, expected"):
        by_iteration(-1, 0.1, spd())
    with pytest.raises(SingularMatrixError, match="raise damping"):
        by_iteration(-0.5, 0.0, torch.zeros(2, 2, dtype=torch.float64) + torch.diag(torch.tensor([1.0, 0.0])))


def test_cholesky_falls_back_where_rounding_made_it_indefinite():
    matrix = torch.diag(torch.tensor([1.0, -1e-3], dtype=torch.float64))
    expected = torch.diag(
        torch.tensor([1 / (1 + 1e-4), 1 / 1e-4], dtype=torch.float64)
    )  # clamped, then damped
    torch.testing.assert_close(by_cholesky(1e-4, matrix), expected)


def test_cholesky_of_a_stack_falls_back_only_where_it_must():
    bad = torch.diag(torch.tensor([1.0, 1.0, -1e-3], dtype=torch.float64))
    stack = torch.stack([spd(n=3), bad, spd(n=3) + 1])
    found = by_cholesky(1e-4, stack)
    assert torch.equal(found[[0, 2]], by_cholesky(1e-4, stack[[0, 2]]))
    torch.testing.assert_close(found[1], by_eigh(wg.Power(-1, 1e-4), bad))
    stack[1, 2, 1] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        by_cholesky(1e-4, stack)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [f for f in FUNCTIONS if "damping=0.0" not in str(f)], ids=str)
def test_half_types_are_evaluated_in_float32(function, dtype):
    matrix = spd(2).to(dtype)
    assert torch.equal(evaluate(function, matrix), evaluate(function, matrix.float()).to(dtype))
    spectrum = matrix[0, 0].abs()
    assert torch.equal(on_spectrum(function, spectrum), function(spectrum.float()).to(dtype))
    values, basis = eigh(matrix)
    assert (values.dtype, basis.dtype) == (torch.float32, dtype)
    assert torch.equal(values, eigh(matrix.float())[0])
    other = spd(2).to(dtype) + matrix
    assert torch.equal(mean_of(matrix, other), mean_of(matrix.float(), other.float()).to(dtype))


@pytest.mark.parametrize("function", [wg.Power(-1), wg.Power(-0.5), wg.Log(), wg.FactoredPower(-1)], ids=str)
@pytest.mark.parametrize("smallest", [0.0, 1e-18])
def test_singular_is_refused(function, smallest):
    matrix = torch.diag(torch.tensor([1.0, smallest], dtype=torch.float64))
    with pytest.raises(SingularMatrixError, match="pass damping > 0"):
        evaluate(function, matrix)


@pytest.mark.parametrize("function", [wg.Power(-1, 0.1), wg.Power(0.5), wg.Log(1.0)], ids=str)
def test_nan_is_refused(function):
    with pytest.raises(ValueError, match="not finite"):
        evaluate(function, torch.full((2, 2), torch.nan))


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_shapes_are_checked(shape):
    with pytest.raises(ValueError, match=r"expected \(..., n, n\)"):
        evaluate(wg.Power(-1), torch.zeros(shape))


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("make", [lambda d: wg.Power(-1, d), lambda d: wg.FactoredPower(-1, d), wg.Log])
def test_damping_is_checked(make, damping):
    with pytest.raises(ValueError, match="expected a finite number >= 0"):
        make(damping)


def test_negative_scale_is_refused():
    with pytest.raises(ValueError, match="expected >= 0"):
        wg.Scale(-1.0)


def test_functions_print():
    assert str(wg.Power(-0.5, 0.1)) == "Power(exponent=-0.5, damping=0.1)"
