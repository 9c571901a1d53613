"""Factors of Kronecker products: stacks of symmetric matrices ``(groups, n, n)``, or their diagonals ``(groups, n)``.

The groups always lead, so that the number of dimensions says which of the two a factor is. Matrices of eigenvectors are
treated alike, with None for the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from weingarten.matfun import MatrixFunction, eigh, evaluate, narrowed

__all__ = [
    "check_factor",
    "diagonal",
    "eigh_each",
    "evaluate_each",
    "is_diagonal",
    "product_type",
    "settled",
    "times_left",
    "times_right",
]

# Entries of matrices that are treated in one call. An accelerator wants many; on a CPU LAPACK takes them one by one anyway, and
# is faster on a matrix that is still in its cache.
_CHUNK_CPU, _CHUNK = 2**14, 2**24


def is_diagonal(factor: Tensor) -> bool:
    """Whether a factor is kept as its diagonal."""
    return factor.ndim == 2


def diagonal(factor: Tensor) -> Tensor:
    """The diagonal ``(groups, n)``, in float32 at least, in which sums over it are taken."""
    found = factor if is_diagonal(factor) else factor.diagonal(dim1=-2, dim2=-1)
    return found.float() if found.element_size() < 4 else found


def product_type(*factors: Tensor | None) -> torch.dtype:
    """The type in which vectors are multiplied: the widest of the factors'.

    float16 becomes float32, since gradients and inverses leave its range; bfloat16 has the range of float32 and stays.
    """
    found: torch.dtype | None = None
    for factor in factors:
        if factor is not None and factor.dtype != found:
            found = factor.dtype if found is None else torch.promote_types(found, factor.dtype)
    return torch.float32 if found is None or found == torch.float16 else found


def times_left(factor: Tensor, w: Tensor) -> Tensor:
    """``F W`` for ``W`` of shape (groups, n, m), in the type of ``W``."""
    factor = factor if factor.dtype == w.dtype else factor.to(w.dtype)
    return factor.unsqueeze(-1) * w if factor.ndim == 2 else torch.bmm(factor, w)


def times_right(w: Tensor, factor: Tensor) -> Tensor:
    """``W F`` for ``W`` of shape (groups, m, n), in the type of ``W``."""
    factor = factor if factor.dtype == w.dtype else factor.to(w.dtype)
    return w * factor.unsqueeze(-2) if factor.ndim == 2 else torch.bmm(w, factor)


def check_factor(factor: Tensor, groups: int, size: int, call: str, name: str) -> None:
    """Raise a ``ValueError`` that names the call and the argument unless the factor is a stack for these matrices."""
    if factor.shape not in ((groups, size, size), (groups, size)):
        raise ValueError(
            f"{call}: {name} has shape {tuple(factor.shape)}, expected {(groups, size, size)}, or {(groups, size)} for a "
            "diagonal; groups come first, and the sizes follow from the layout"
        )


def evaluate_each(
    function: MatrixFunction, stacks: Sequence[Tensor], shifts: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """``evaluate(function, stack + shift I)`` for each stack, with matrices of equal size in one batch.

    Args:
        function: of the shifted matrices.
        stacks: each ``(k, n, n)``, of any ``k`` and ``n``.
        shifts: for each stack ``(k,)``, added to the eigenvalues in float32 at least; default: none.

    >>> from weingarten.matfun import Power
    >>> [x.flatten() for x in evaluate_each(Power(-1), [torch.ones(1, 1, 1)] * 2, [torch.ones(1), torch.zeros(1)])]
    [tensor([0.5000]), tensor([1.])]
    """
    found = _in_batches(lambda stack: (evaluate(function, stack),), stacks, shifts)
    return [narrowed(value, stack.dtype) for (value,), stack in zip(found, stacks, strict=True)]


def eigh_each(stacks: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Eigenvalues ``(k, n)``, in float32 at least, and eigenvectors ``(k, n, n)`` of each stack; equal sizes in one batch.

    Raises:
        ValueError: if an entry is not finite.
    """
    found = _in_batches(eigh, stacks)
    return [(values, basis.to(stack.dtype)) for (values, basis), stack in zip(found, stacks, strict=True)]


def settled(values: Tensor, basis: Tensor) -> Tensor:
    """The same eigenvectors, but in the null space those that diagonalise ``diag(1, ..., n)`` there.

    In a null space every basis is one of eigenvectors, and which of them eigh returns is up to rounding. What is measured along
    them afterwards, as in EKFAC, would depend on the processor. The null space is what rounding cannot tell from it:
    eigenvalues up to ``n eps`` of the largest of the stack, since a matrix of the stack may be nothing but rounding (the keys of
    attention, whose gradients sum to zero over positions). Where it is spanned by coordinate axes, they are the answer.

    Args:
        values: eigenvalues ``(k, n)``, ascending.
        basis: eigenvectors ``(k, n, n)`` in its columns.

    >>> turned = torch.tensor([[[0.6, 0.8, 0.0], [0.8, -0.6, 0.0], [0.0, 0.0, 1.0]]])
    >>> settled(torch.tensor([[0.0, 0.0, 1.0]]), turned)[0].abs().round(decimals=4)
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 1.]])
    """
    n = values.shape[-1]
    numbers = torch.arange(1, n + 1, dtype=basis.dtype, device=basis.device).unsqueeze(-1)
    counts = (values <= n * torch.finfo(basis.dtype).eps * values.max()).sum(-1).tolist()
    found = basis.clone()
    for matrix, count in zip(found, counts, strict=True):
        if count > 1:
            null = matrix[:, :count]
            matrix[:, :count] = null @ eigh(null.mT @ (numbers * null))[1]
    return found


def _in_batches(
    routine: Callable[[Tensor], tuple[Tensor, ...]],
    stacks: Sequence[Tensor],
    shifts: Sequence[Tensor] | None = None,
) -> list[tuple[Tensor, ...]]:
    """The results of a routine on each (shifted) stack, in float32 at least."""
    found: dict[int, tuple[Tensor, ...]] = {}
    for places in _batches(stacks):
        alone = len(places) == 1
        stack = stacks[places[0]] if alone else torch.cat([stacks[i] for i in places])
        wide = stack.float() if stack.element_size() < 4 else stack
        if shifts is not None:
            wide = wide.clone() if alone and wide is stack else wide
            shift = shifts[places[0]] if alone else torch.cat([shifts[i] for i in places])
            wide.diagonal(dim1=-2, dim2=-1).add_(shift.unsqueeze(-1))
        counts = [len(stacks[i]) for i in places]
        values = routine(wide)
        pieces = [values] if alone else zip(*(v.split_with_sizes(counts) for v in values), strict=True)
        found |= dict(zip(places, pieces, strict=True))
    return [found[i] for i in range(len(stacks))]


def _batches(stacks: Sequence[Tensor]) -> Iterator[list[int]]:
    """Places of stacks of one size and type, of at most a chunk's entries unless one alone has more."""
    sizes: dict[tuple[int, torch.dtype], list[int]] = {}
    for i, stack in enumerate(stacks):
        sizes.setdefault((stack.shape[-1], stack.dtype), []).append(i)
    for places in sizes.values():
        chunk = _CHUNK_CPU if stacks[places[0]].device.type == "cpu" else _CHUNK
        batch, entries = [places[0]], stacks[places[0]].numel()
        for i in places[1:]:
            if entries + stacks[i].numel() > chunk:
                yield batch
                batch, entries = [], 0
            batch.append(i)
            entries += stacks[i].numel()
        yield batch
