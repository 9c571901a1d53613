"""A low-rank matrix plus a multiple of the identity, and the randomised approximation that gives one."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from weingarten.matfun import MatrixFunction
from weingarten.operators.operator import Curvature, Operator
from weingarten.tree import Space, Tree, TreeLike

__all__ = ["LowRank", "nystrom"]


@final
class LowRank(Curvature):
    r"""``U diag(spectrum) U^T + rest (I - U U^T)`` with orthonormal columns ``U``; r P numbers, and 2 r P operations a product.

    Every matrix function is exact, since ``f`` acts on ``spectrum`` and on ``rest``; ``f(x) = 1 / (x + damping)`` is the
    formula of Woodbury.

    Args:
        space: names, shapes and types of the parameters, P in all.
        basis: U, ``(P, r)`` in the order of ``space``, with ``U^T U = I``, which is not checked.
        spectrum: ``(r,)``, >= 0.
        rest: the eigenvalue of every direction orthogonal to U, >= 0; default 0. Without meaning where r = P.

    Raises:
        ValueError: if the shapes do not match.

    >>> space = Space.of({"w": torch.zeros(2)})
    >>> curvature = LowRank(space, torch.tensor([[1.0], [0.0]]), torch.tensor([3.0]))
    >>> curvature.solve({"w": torch.tensor([4.0, 4.0])}, damping=1.0)
    {'w': tensor([1., 4.])}
    """

    def __init__(self, space: Space, basis: Tensor, spectrum: Tensor, rest: Tensor | float = 0.0) -> None:
        if basis.ndim != 2 or len(basis) != space.size or spectrum.shape != basis.shape[1:]:
            raise ValueError(
                f"LowRank: basis has shape {tuple(basis.shape)} and spectrum {tuple(spectrum.shape)}, expected "
                f"({space.size}, r) and (r,)"
            )
        self._space, self.basis, self.spectrum = space, basis, spectrum
        self.rest = torch.as_tensor(rest, dtype=spectrum.dtype, device=spectrum.device)

    @property
    def space(self) -> Space:
        return self._space

    def apply(self, v: TreeLike) -> Tree:
        self._space.check(v, "LowRank.apply")
        x = self._space.flatten(v).to(self.basis.dtype)
        return self._space.unflatten(
            self.rest * x + self.basis @ ((self.spectrum - self.rest) * (self.basis.mT @ x))
        )

    def map(self, function: MatrixFunction) -> LowRank:
        rank = len(self.spectrum)
        if rank == self._space.size:
            return LowRank(self._space, self.basis, function(self.spectrum))
        values = function(torch.cat([self.spectrum, self.rest[None]]))
        return LowRank(self._space, self.basis, values[:rank], values[rank])

    def trace(self) -> Tensor:
        return self.spectrum.sum() + (self._space.size - len(self.spectrum)) * self.rest

    def diag(self) -> Tree:
        return self._space.unflatten(self.rest + self.basis**2 @ (self.spectrum - self.rest))


def nystrom(
    operator: Operator, rank: int, damping: float = 0.0, generator: torch.Generator | None = None
) -> LowRank:
    r"""The randomised Nystrom approximation ``H O (O^T H O)^+ (H O)^T`` of ``H = operator - damping I``, from ``rank`` products.

    Frangella, Tropp and Udell 2021, algorithm 2.1, https://arxiv.org/abs/2110.02820, in its stable form: ``H`` is shifted by
    ``nu`` of the size of rounding errors, and the singular values of ``(H + nu I) O (O^T (H + nu I) O)^{-1/2}`` give the
    spectrum. The inverse root is taken by eigenvalues in place of Cholesky: equal but for a rotation, and it cannot break
    down. The approximation lies between 0 and ``H``, and equals ``H`` if the rank is at least that of ``H``.

    ``nystrom(operator, rank, damping).power(-1, damping)`` preconditions ``CG`` on ``operator``, which contains the damping.

    Args:
        operator: symmetric, positive semi-definite after the damping is taken off it.
        rank: number of products and of columns kept, >= 1; above the number of parameters it is lowered to that.
        damping: the multiple of the identity that the operator contains. It is taken off before the approximation, so that it
            counts once when ``solve`` or ``power`` adds it again: on *all* directions.
        generator: draws the orthonormal test matrix O; default: a fresh one with seed 0, so that results repeat.

    Raises:
        ValueError: if rank < 1 or damping < 0, a product is not finite, or a negative eigenvalue is seen.

    >>> from weingarten.operators.diagonal import DiagonalCurvature
    >>> curvature = DiagonalCurvature({"w": torch.tensor([4.0, 0.0, 0.0])})
    >>> print(round(float(nystrom(curvature, rank=1).trace()), 4))
    4.0
    """
    if rank < 1 or not 0 <= damping < float("inf"):
        raise ValueError(
            f"nystrom: rank is {rank} and damping {damping}, expected rank >= 1 and a finite damping >= 0"
        )
    space = operator.space
    generator = torch.Generator(device=space.device).manual_seed(0) if generator is None else generator
    dtype = torch.promote_types(space.dtype, torch.float32)
    shape = (space.size, min(rank, space.size))
    test = torch.linalg.qr(torch.randn(shape, dtype=dtype, device=space.device, generator=generator)).Q
    vectors = [space.unflatten(column) for column in test.mT]
    test = torch.stack([space.flatten(v) for v in vectors], 1).to(dtype)  # as rounded to the leaves' types
    sketch = torch.stack([space.flatten(operator.apply(v)) for v in vectors], 1).to(dtype) - damping * test
    if not torch.isfinite(sketch).all():
        raise ValueError("nystrom: a product is not finite; look for NaN or inf in parameters and data")
    core = test.mT @ sketch
    spectrum, rotation = torch.linalg.eigh((core + core.mT) / 2)
    lowest, size = float(spectrum[0]), float(torch.linalg.matrix_norm(sketch)) + damping * shape[1] ** 0.5
    if lowest < -100 * torch.finfo(space.dtype).eps * size:
        raise ValueError(
            f"nystrom: the operator less damping={damping:.3g} has an eigenvalue <= {lowest:.3g}, expected none below 0; use GGN "
            "in place of an indefinite Hessian, and let damping be what the operator contains, not more"
        )
    shift = max(torch.finfo(dtype).eps * size - 2 * min(lowest, 0.0), torch.finfo(dtype).tiny)
    roots = (spectrum + shift).clamp(min=shift).sqrt()
    basis, values, _ = torch.linalg.svd((sketch + shift * test) @ (rotation / roots), full_matrices=False)
    return LowRank(space, basis, (values**2 - shift).clamp(min=0))
