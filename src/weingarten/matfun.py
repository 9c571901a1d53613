"""Functions of symmetric positive semi-definite matrices, named by small values.

A :class:`MatrixFunction` says *what* is wanted (``Power(-1, damping=1e-3)``); :func:`evaluate` chooses *how*: Cholesky for an
inverse, coupled Newton-Schulz iterations for (inverse) square roots where eigenvalue routines are slow, eigh for all else.
Every routine takes a stack of matrices ``(..., n, n)`` and treats equal shapes in one batch. bfloat16 and float16 are
factorised in float32, and results return to them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "FactoredPower",
    "Log",
    "MatrixFunction",
    "Power",
    "Scale",
    "Shift",
    "SingularMatrixError",
    "by_cholesky",
    "by_eigh",
    "by_iteration",
    "eigh",
    "evaluate",
    "mean_of",
    "narrowed",
    "on_spectrum",
]


class SingularMatrixError(ValueError):
    """A negative power or a logarithm was asked of a matrix that is singular at working precision."""


class MatrixFunction(ABC):
    """A named scalar function, applied to the spectrum of a symmetric matrix."""

    @abstractmethod
    def __call__(self, spectrum: Tensor) -> Tensor:
        """The function of each eigenvalue; the eigenvalues are clamped to be non-negative first."""


def _damped(spectrum: Tensor, damping: float, name: str) -> Tensor:
    """Eigenvalues plus damping, refused where they are zero at working precision."""
    shifted = spectrum.clamp(min=0) + damping
    if damping == 0:
        smallest, largest = float(shifted.min()), float(shifted.max())
        if smallest <= torch.finfo(shifted.dtype).eps * largest:
            raise SingularMatrixError(
                f"{name}: the smallest eigenvalue is {smallest:.2g} at a largest of {largest:.2g}, which is singular at "
                f"{shifted.dtype}; pass damping > 0"
            )
    return shifted


def _check_damping(name: str, damping: float) -> None:
    if not damping >= 0 or damping == float("inf"):
        raise ValueError(f"{name}: damping is {damping}, expected a finite number >= 0")


@dataclass(frozen=True)
class Power(MatrixFunction):
    """``(x + damping) ** exponent``.

    Args:
        exponent: any real number; -1 for solving, -1/2 for sampling and preconditioning.
        damping: added to every eigenvalue, in the curvature's unit (loss per squared parameter).

    >>> Power(-1, damping=1.0)(torch.tensor([1.0, 3.0]))
    tensor([0.5000, 0.2500])
    """

    exponent: float
    damping: float = 0.0

    def __post_init__(self) -> None:
        _check_damping("Power", self.damping)

    def __call__(self, spectrum: Tensor) -> Tensor:
        if self.exponent < 0:
            return _damped(spectrum, self.damping, str(self)) ** self.exponent
        return (spectrum.clamp(min=0) + self.damping) ** self.exponent


@dataclass(frozen=True)
class FactoredPower(MatrixFunction):
    r"""``(A + pi sqrt(damping))^exponent (x) (B + sqrt(damping) / pi)^exponent`` for a Kronecker product ``B (x) A``.

    The usual approximation to ``Power`` on a Kronecker product (Martens and Grosse 2015, section 6.3,
    https://arxiv.org/abs/1503.05671): two Cholesky factorisations in place of two eigendecompositions, cheaper and
    somewhat over-damped. ``pi^2`` is the ratio of the factors' mean eigenvalues. Where a curvature is not a Kronecker product
    (diagonal, dense), it means the same as ``Power``.
    """

    exponent: float
    damping: float = 0.0

    def __post_init__(self) -> None:
        _check_damping("FactoredPower", self.damping)

    def __call__(self, spectrum: Tensor) -> Tensor:
        return Power(self.exponent, self.damping)(spectrum)


@dataclass(frozen=True)
class Log(MatrixFunction):
    """``log(x + damping)``; its trace is the log-determinant."""

    damping: float = 0.0

    def __post_init__(self) -> None:
        _check_damping("Log", self.damping)

    def __call__(self, spectrum: Tensor) -> Tensor:
        return _damped(spectrum, self.damping, str(self)).log()


@dataclass(frozen=True)
class Shift(MatrixFunction):
    """``x + damping``."""

    damping: float

    def __call__(self, spectrum: Tensor) -> Tensor:
        return spectrum + self.damping


@dataclass(frozen=True)
class Scale(MatrixFunction):
    """``factor * x``, for ``factor >= 0``."""

    factor: float

    def __post_init__(self) -> None:
        if not self.factor >= 0:
            raise ValueError(
                f"Scale: factor is {self.factor}, expected >= 0 (a curvature stays positive semi-definite)"
            )

    def __call__(self, spectrum: Tensor) -> Tensor:
        return self.factor * spectrum


def evaluate(function: MatrixFunction, matrix: Tensor) -> Tensor:
    """The matrix function of a stack of symmetric positive semi-definite matrices ``(..., n, n)``.

    Inverses go through Cholesky, and through eigh where Cholesky meets a matrix that is not positive definite at working
    precision; (inverse) square roots of large damped matrices on a GPU go through matrix products; the rest through eigh.

    >>> evaluate(Power(-1), torch.diag(torch.tensor([1.0, 4.0]))).diagonal()
    tensor([1.0000, 0.2500])

    Raises:
        SingularMatrixError: a negative power or a logarithm of a singular matrix without damping.
        ValueError: if the last two dimensions differ, an entry is not finite, or the result leaves the range of float16.
    """
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"evaluate: found a matrix of shape {tuple(matrix.shape)}, expected (..., n, n)")
    if matrix.element_size() < 4:
        return narrowed(evaluate(function, matrix.float()), matrix.dtype)
    if isinstance(function, Scale):
        return function.factor * matrix
    if isinstance(function, Shift):
        return _add_identity(matrix, function.damping)
    if isinstance(function, Power | FactoredPower):
        if function.exponent == -1:
            return by_cholesky(function.damping, matrix)
        half = abs(function.exponent) == 0.5
        if half and matrix.is_cuda and matrix.shape[-1] >= 512 and function.damping > 0:
            return by_iteration(function.exponent, function.damping, matrix)
    return by_eigh(function, matrix)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(..., n)``, in float32 at least, and eigenvectors ``(..., n, n)`` in the type of the matrices.

    Raises:
        ValueError: if an entry is not finite.
    """
    _check_finite(matrix, "eigh")
    spectrum, basis = torch.linalg.eigh(matrix.float() if matrix.element_size() < 4 else matrix)
    return spectrum, basis.to(matrix.dtype)


def on_spectrum(function: MatrixFunction, spectrum: Tensor) -> Tensor:
    """The function of eigenvalues in their own type, computed in float32 at least."""
    if spectrum.element_size() < 4:
        return narrowed(function(spectrum.float()), spectrum.dtype)
    return function(spectrum)


def narrowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A result in the type of the factors it belongs to.

    Raises:
        ValueError: if it leaves the range of float16, which ends at 65504.
    """
    if value.dtype == dtype:
        return value
    result = value.to(dtype)
    if dtype == torch.float16 and not torch.isfinite(result).all():
        raise ValueError(
            f"evaluate: the result reaches {float(value.abs().max()):.2g}, beyond the range of float16; keep factors in "
            "bfloat16 or float32, or raise damping"
        )
    return result


def by_eigh(function: MatrixFunction, matrix: Tensor) -> Tensor:
    """``Q f(spectrum) Q^T`` from the eigendecomposition."""
    _check_finite(matrix, "by_eigh")
    spectrum, basis = torch.linalg.eigh(matrix)
    return (basis * function(spectrum).unsqueeze(-2)) @ basis.mT


def by_cholesky(damping: float, matrix: Tensor) -> Tensor:
    """``(matrix + damping I)^{-1}``, by Cholesky; by eigh for those of the stack with a pivot that is not positive.

    The pivots tell what is not finite, without a pass over the matrix of its own.
    """
    factor, failed = torch.linalg.cholesky_ex(_add_identity(matrix, damping))
    low, high = torch.aminmax(factor.diagonal(dim1=-2, dim2=-1), dim=-1)
    ratio = low / high  # NaN or zero where an entry is not finite
    smallest = torch.finfo(matrix.dtype).eps ** 0.5 if damping == 0 else 0.0
    if not failed.any() and float(ratio.min()) > smallest:
        return torch.cholesky_inverse(factor)
    sound = (failed == 0) & (ratio > smallest)
    result = torch.empty_like(matrix)
    result[sound] = torch.cholesky_inverse(factor[sound])
    result[~sound] = by_eigh(Power(-1, damping), matrix[~sound])  # says what is singular or not finite
    return result


def by_iteration(exponent: float, damping: float, matrix: Tensor, steps: int = 40) -> Tensor:
    """``(matrix + damping I)^{+-1/2}`` by coupled Newton-Schulz iterations: matrix products only.

    ``Y <- Y (3 I - Z Y) / 2``, ``Z <- (3 I - Z Y) Z / 2`` from ``Y = M / |M|_F``, ``Z = I`` converge to ``Y = M^{1/2}``,
    ``Z = M^{-1/2}`` (Higham 2008, Functions of Matrices, eq. 6.35). It stops when ``|I - Z Y|`` no longer falls.

    Raises:
        ValueError: if ``exponent`` is not 1/2 or -1/2.
        SingularMatrixError: if it has not converged after ``steps`` steps.
    """
    if abs(exponent) != 0.5:
        raise ValueError(f"by_iteration: exponent is {exponent}, expected 0.5 or -0.5; use by_eigh")
    _check_finite(matrix, "by_iteration")
    shifted = _add_identity(matrix, damping)
    size = torch.linalg.matrix_norm(shifted, keepdim=True)
    root, inverse_root = shifted / size, torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    identity, last = inverse_root, float("inf")
    tolerance = torch.finfo(matrix.dtype).eps * matrix.shape[-1] ** 0.5
    for _ in range(steps):
        update = inverse_root @ root
        defect = float(torch.linalg.matrix_norm(identity - update).max()) / matrix.shape[-1] ** 0.5
        if defect <= tolerance or (defect < 1e-2 and defect >= last):
            break
        last = defect
        update = (3 * identity - update) / 2
        root, inverse_root = root @ update, update @ inverse_root
    else:
        raise SingularMatrixError(
            f"by_iteration: |I - Z Y| is {last:.2g} after {steps} steps, expected <= 1e-2; raise damping (now {damping}) "
            "or use eigh"
        )
    return root * size.sqrt() if exponent > 0 else inverse_root / size.sqrt()


def mean_of(a: Tensor, b: Tensor, floor: float = 0.0) -> Tensor:
    """``a # b = a^{1/2} (a^{-1/2} b a^{-1/2})^{1/2} a^{1/2}``, the geometric mean of two stacks of PSD matrices.

    Args:
        a: ``(..., n, n)``.
        b: ``(..., n, n)``.
        floor: this multiple of the mean eigenvalue of ``a`` is added to it, so that the mean exists where ``a`` is
            rank-deficient; zero matrices give zero.

    >>> mean_of(torch.eye(2) * 4, torch.eye(2) * 9)
    tensor([[6., 0.],
            [0., 6.]])
    """
    if a.element_size() < 4:
        return narrowed(mean_of(a.float(), b.float(), floor), a.dtype)
    _check_finite(a, "mean_of")
    _check_finite(b, "mean_of")
    spectrum, basis = torch.linalg.eigh(a)
    spectrum = spectrum.clamp(min=0) + floor * a.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    positive = spectrum > 0
    root = spectrum.sqrt()
    inverse = torch.where(positive, torch.where(positive, spectrum, 1.0).rsqrt(), 0.0)
    inner = (inverse.unsqueeze(-1) * (basis.mT @ b @ basis)) * inverse.unsqueeze(-2)
    values, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
    rounding = values.shape[-1] * torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True)
    values = torch.where(values > rounding, values, 0.0)  # a root would make much of rounding errors
    middle = (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT
    outer = (root.unsqueeze(-1) * middle) * root.unsqueeze(-2)
    return basis @ ((outer + outer.mT) / 2) @ basis.mT


def _add_identity(matrix: Tensor, damping: float) -> Tensor:
    if damping == 0:
        return matrix
    result = matrix.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(damping)
    return result


def _check_finite(matrix: Tensor, call: str) -> None:
    if not torch.isfinite(matrix).all():
        raise ValueError(
            f"{call}: the matrix has entries that are not finite; look for NaN or inf in inputs and gradients"
        )
