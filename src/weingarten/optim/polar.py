"""The orthogonal polar factor of a matrix, exactly or by matrix products alone, and the moment that is nothing else."""

from __future__ import annotations

from functools import cache
from typing import final

import numpy as np
import torch
from torch import Tensor

from weingarten.optim.moment import Moment, State
from weingarten.optim.roots import LinAlgError, Task
from weingarten.tree import Tree, TreeLike

__all__ = ["PolarMoment", "exact_polar", "optimal_quintics", "polar", "polar_express"]

_LOWER = 1e-3  # smallest singular value, relative to the Frobenius norm, for which the polynomials are best
_CUSHION = 0.02407327424182761  # the same within one step: the paper's
_SHORTEST = 64  # of sides for which bfloat16 gains over float32


def polar(matrix: Tensor) -> Tensor:
    r"""``U V^T`` of ``U diag(s) V^T`` for a stack ``(..., rows, columns)``, in the way the device is fast in.

    :func:`exact_polar` on a CPU and in float64. Elsewhere :func:`polar_express`: in bfloat16 on a GPU that has it, singular
    values within about a percent of one; in float32 for short sides, which cost little, and on other devices.

    >>> polar(torch.tensor([[3.0, 0.0], [0.0, -2.0]])).round(decimals=5)
    tensor([[ 1.,  0.],
            [ 0., -1.]])
    """
    if matrix.device.type == "cpu" or matrix.dtype == torch.float64:
        return exact_polar(matrix)
    if matrix.is_cuda and torch.cuda.is_bf16_supported() and min(matrix.shape[-2:]) >= _SHORTEST:
        return polar_express(matrix, 6, dtype=torch.bfloat16).to(matrix.dtype)
    return polar_express(matrix)


def exact_polar(matrix: Tensor) -> Tensor:
    r"""``U V^T`` from the singular value decomposition; directions that are zero at working precision stay zero.

    On a CPU it takes twice the time of an eigendecomposition of the Gram matrix, which squares the condition number, and less
    than eight steps of :func:`polar_express`.

    Args:
        matrix: a stack ``(..., rows, columns)``, finite; narrower types than float32 are computed in it.
    """
    x = _scaled(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))
    try:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
    except LinAlgError:  # no convergence: the products always do
        return polar_express(matrix, steps=20)
    kept = s > s[..., :1] * max(x.shape[-2:]) * torch.finfo(x.dtype).eps
    return ((u * kept.unsqueeze(-2)) @ vh).to(matrix.dtype)


def polar_express(
    matrix: Tensor, steps: int = 8, lower: float = _LOWER, dtype: torch.dtype | None = None
) -> Tensor:
    r"""The polar factor by ``X <- a X + b X (X^T X) + c X (X^T X)^2`` with the best ``a, b, c`` in every step.

    Amsel, Persson, Musco and Gower 2025, https://arxiv.org/abs/2505.16932; see :func:`optimal_quintics`. Rounding may lift
    a norm above the interval, where the polynomials grow, so inputs of every step but the last are shrunk by twice that.

    Args:
        matrix: a stack ``(..., rows, columns)``.
        steps: of three matrix products each. Default 8: for singular values above ``lower`` the error is that of rounding.
        lower: singular values above this multiple of the Frobenius norm come out as near to one as they can; smaller ones are
            lengthened as much as ``lower`` is. Default 1e-3.
        dtype: of the products. Default: that of the matrix, at least float32.

    Returns:
        The factors, in the type of the products if one is given, else in that of the matrix.
    """
    wide = matrix.shape[-2] < matrix.shape[-1]
    x = _scaled(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    x = (x.mT if wide else x).to(dtype or x.dtype)
    safety = 1 + 2 * torch.finfo(x.dtype).eps
    for step, (a, b, c) in enumerate(optimal_quintics(lower, steps)):
        s = safety if step < steps - 1 else 1.0
        gram = x.mT @ x
        x = (a / s) * x + x @ ((b / s**3) * gram + (c / s**5) * (gram @ gram))
    return (x.mT if wide else x).to(dtype or matrix.dtype)


@cache
def optimal_quintics(lower: float, steps: int) -> tuple[tuple[float, float, float], ...]:
    r"""Odd polynomials ``a x + b x^3 + c x^5`` whose composition is nearest to one on ``[lower, 1]``.

    The best composition is greedy: each step takes the best polynomial on the interval ``[p(l), 2 - p(l)]`` that the one before
    leaves (Amsel et al. 2025, https://arxiv.org/abs/2505.16932). Intervals that reach below a cushion are treated as if they
    ended there, for the sake of rounding, and the result is centred at one.

    >>> [round(float(a), 3) for a in optimal_quintics(1e-3, 1)[0]]
    [8.287, -23.596, 17.3]
    """
    low, high, found = lower, 1.0, []
    for _ in range(steps):
        coefficients = _best_quintic(max(low, _CUSHION * high), high)
        ends = [_at(coefficients, x) for x in (low, high)]
        coefficients = coefficients * (2 / sum(ends))
        low = _at(coefficients, low)
        high = 2 - low
        found.append((float(coefficients[0]), float(coefficients[1]), float(coefficients[2])))
    return tuple(found)


def _at(coefficients: np.ndarray, x: float) -> float:
    return float(coefficients @ np.array([x, x**3, x**5]))


def _best_quintic(low: float, high: float) -> np.ndarray:
    """Of least ``max |1 - p|`` on ``[low, high]``, by Remez' exchange: the error alternates in sign at four points.

    The inner two are the extrema of ``p``. Where the interval is a point to rounding, the limit: ``(15 x - 10 x^3 + 3 x^5) / 8``.
    """
    if high - low < 1e-5 * high:
        return np.array([15 / 8, -10 / 8, 3 / 8]) / high ** np.array([1, 3, 5])
    inner, signs = np.array([(3 * low + high) / 4, (low + 3 * high) / 4]), np.array([1.0, -1.0, 1.0, -1.0])
    error = np.inf
    for _ in range(100):
        points = np.array([low, *inner, high])
        *coefficients, new = np.linalg.solve(np.stack([points, points**3, points**5, signs], 1), np.ones(4))
        a, b, c = coefficients
        if abs(new - error) < 1e-15:
            break
        error = new
        root = np.sqrt(9 * b**2 - 20 * a * c)  # p' = a + 3 b x^2 + 5 c x^4
        inner = np.sqrt((-3 * b + np.array([-root, root])) / (10 * c))
    return np.array(coefficients)


def _scaled(matrix: Tensor) -> Tensor:
    """With a largest entry of one, so that squares neither overflow nor vanish; zero stays zero."""
    largest = matrix.abs().amax((-2, -1), keepdim=True)
    return matrix / torch.where(largest > 0, largest, 1.0)


@final
class PolarMoment(Moment):
    r"""``sqrt(longer side) U V^T`` of the direction itself: nothing is kept of past gradients.

    The same as rotations of the longer side, averaged over the momentum of this step alone, without its Gram matrix.

    Args:
        name: of the weight; one with more axes than two is seen as (rows, all else).
        leaf: its shape.
    """

    def __init__(self, name: str, leaf: Tensor) -> None:
        self.name, self.leaf = name, leaf
        self.matrix = (leaf.shape[0], leaf.shape[1:].numel())

    def init(self) -> State:
        return {}

    def accumulate(self, state: State, gradients: TreeLike, decay: float) -> None:
        pass

    def tasks(self, state: State) -> list[Task]:
        return []

    def measure(self, state: State, gradients: TreeLike, decay: float) -> None:
        pass

    def precondition(self, state: State, direction: TreeLike, eps: float) -> Tree:
        found = polar(direction[self.name].reshape(self.matrix)) * max(self.matrix) ** 0.5
        return {self.name: found.reshape(self.leaf.shape)}

    def __str__(self) -> str:
        return f"polar factor of {self.matrix[0]} x {self.matrix[1]}"
