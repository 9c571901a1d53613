"""Matrix functions of many small moments at once, which never fail and never return NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weingarten.matfun import Power, evaluate

__all__ = ["Task", "due", "factorise", "inverse_root", "next_basis"]

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
_ATTEMPTS = 6  # damping grows tenfold each time
_FIRST = (
    1e-6  # what a damping of zero is raised to: well above float32's rounding of a mean eigenvalue of one
)


@dataclass(frozen=True)
class Task:
    """One stack of moments ``(count, m, m)`` and what is wanted of it.

    Attributes:
        moment: positive semi-definite.
        target: where the result goes, of the same shape.
        exponent: of the power; None for an eigenbasis, which ``target`` holds from the refresh before, or zeros.
    """

    moment: Tensor
    target: Tensor
    exponent: float | None


def due(step: int, refresh: int) -> bool:
    """Whether to factorise: every ``refresh`` steps, and at powers of two before the first time, when little has been seen."""
    return step % refresh == 0 or (step < refresh and step & (step - 1) == 0)


def factorise(tasks: Sequence[Task], damping: float) -> int:
    """Do all tasks, those of equal size, type and exponent in one batch; returns how many matrices needed more damping.

    >>> task = Task(torch.eye(2)[None] * 4, torch.empty(1, 2, 2), -0.5)
    >>> factorise([task], damping=0.0), task.target[0].diagonal()
    (0, tensor([0.5000, 0.5000]))
    """
    batches: dict[object, list[Task]] = {}
    for task in tasks:
        key = (task.moment.shape[-1], task.moment.dtype, task.moment.device, task.exponent)
        batches.setdefault(key, []).append(task)
    failed = 0
    for batch in batches.values():
        stack = torch.cat([task.moment for task in batch])
        exponent = batch[0].exponent
        if exponent is None:
            found, raised = next_basis(stack, torch.cat([task.target for task in batch]))
        else:
            found, raised = inverse_root(stack, exponent, damping)
        failed += raised
        for task, piece in zip(batch, found.split([len(task.moment) for task in batch]), strict=True):
            task.target.copy_(piece)
    return failed


def inverse_root(moment: Tensor, exponent: float, damping: float) -> tuple[Tensor, int]:
    r"""``(S + damping t I)^exponent`` with ``t = tr S / m`` for a stack ``S`` of shape (count, m, m).

    Damping relative to the mean eigenvalue does the same at every scale of the loss. A zero moment counts as ``t = 1``.

    Args:
        moment: the stack.
        exponent: negative.
        damping: without a unit.

    Returns:
        The roots, and how many matrices could not be factorised with this damping: theirs was raised tenfold until they could,
        and after six attempts the answer is ``(t I)^exponent``.
    """
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    unit = moment / mean
    found = _attempt(unit, exponent, damping)
    if found is not None:
        return found * mean**exponent, 0
    failed, pieces = 0, []
    for matrix in unit.split(1):
        root, raised = _attempt(matrix, exponent, damping), damping
        failed += root is None
        for _ in range(_ATTEMPTS):
            if root is not None:
                break
            raised = max(10 * raised, _FIRST)
            root = _attempt(matrix, exponent, raised)
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)[None]
        pieces.append(identity if root is None else root)
    return torch.cat(pieces) * mean**exponent, failed


def _attempt(unit: Tensor, exponent: float, damping: float) -> Tensor | None:
    """The power, or None where it is not finite or the factorisation fails."""
    try:
        found = evaluate(Power(exponent, damping), unit)
    except (ValueError, LinAlgError):  # singular at working precision, or no convergence
        return None
    return found if bool(found.isfinite().all()) else None


def next_basis(moment: Tensor, basis: Tensor) -> tuple[Tensor, int]:
    """Eigenvectors ``(count, m, m)``: by eigh where ``basis`` is zero, else by one step of orthogonal iteration, ``qr(S Q)``.

    The largest eigenvalue comes first: the iteration draws the first columns to it, so that in this order they stay where they
    are, and with them what is stored along them (SOAP, Vyas et al. 2024, https://arxiv.org/abs/2409.11321, algorithm 4). Where it
    fails the basis stays, the identity in place of zeros.
    """
    fresh = not bool(basis.any())
    try:
        found = torch.linalg.eigh(moment)[1].flip(-1) if fresh else torch.linalg.qr(moment @ basis)[0]
        if bool(found.isfinite().all()):
            return found, 0
    except LinAlgError:
        pass
    identity = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device).expand_as(moment)
    return (identity if fresh else basis), len(moment)
