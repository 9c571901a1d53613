"""Cross-entropy of a softmax over classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from weingarten.losses.loss import CHUNK, Loss

__all__ = ["CrossEntropy"]


@dataclass(frozen=True)
class CrossEntropy(Loss):
    r"""``l(z, y) = -sum_c q_c log softmax(z)_c``, with ``q`` the one-hot, smoothed or soft label.

    Hessian in the logits: ``(sum_c q_c) (diag(p) - p p^T)`` with ``p = softmax(z)``, whatever the label.

    Shapes: output ``(N, C)`` or ``(N, C, d1, d2, ...)``; target ``(N,)`` or ``(N, d1, d2, ...)`` of class indices, or of the
    output's shape and of floating type for soft labels. M counts the elements whose label is not ``ignore_index``.

    Args:
        ignore_index: class index that marks elements to leave out; PyTorch's default, -100.
        label_smoothing: mass spread evenly over all classes, in [0, 1); for index targets only.

    >>> loss = CrossEntropy()
    >>> round(float(loss(torch.zeros(2, 4), torch.tensor([0, -100]))), 4)
    1.3863
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"CrossEntropy: label_smoothing is {self.label_smoothing}, expected a number in [0, 1)"
            )

    def elements(self, output: Tensor, target: Tensor) -> Tensor:
        self._check(output, target)
        if target.is_floating_point():
            return -(target * functional.log_softmax(output, 1)).sum(1)
        return functional.cross_entropy(
            output,
            target,
            reduction="none",
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def count(self, target: Tensor) -> int:
        if target.is_floating_point():
            return target.numel() // target.shape[1]
        return int((target != self.ignore_index).sum())

    def curvature(self, output: Tensor, target: Tensor, v: Tensor) -> Tensor:
        self._check(output, target)
        p = output.softmax(1)
        return self._mass(output, target) * p * (v - (p * v).sum(1, keepdim=True))

    def root(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        self._check(output, target)
        p = output.softmax(1)
        classes = output.shape[1]
        identity = torch.eye(classes, dtype=p.dtype, device=p.device)
        identity = identity.reshape(classes, 1, classes, *[1] * (output.ndim - 2))
        columns = p.sqrt().movedim(1, 0).unsqueeze(2) * (identity - p)  # (C, N, C, d1, ...)
        columns = columns * self._mass(output, target).sqrt()
        if output.ndim == 2:
            yield from columns.split(CHUNK)
            return
        flat = columns.flatten(3)
        for position in range(
            flat.shape[-1]
        ):  # one position at a time: cross terms between positions must not appear
            alone = torch.zeros_like(flat)
            alone[..., position] = flat[..., position]
            yield from alone.reshape(columns.shape).split(CHUNK)

    def sample(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        self._check(output, target)
        p = output.softmax(1)
        rows = p.movedim(1, -1)
        flat = rows.reshape(-1, rows.shape[-1])
        label = torch.multinomial(
            flat.float(), 1, generator=generator
        )  # float: bfloat16 rounds away small classes
        onehot = torch.zeros_like(flat).scatter_(1, label, 1.0).reshape(rows.shape).movedim(-1, 1)
        return (p - onehot) * self._mass(output, target).sqrt()

    def _mass(self, output: Tensor, target: Tensor) -> Tensor:
        """Total label mass of each element: 1, 0 where ignored, or the soft label's sum; broadcasts over classes."""
        if target.is_floating_point():
            return target.detach().sum(1, keepdim=True)
        return (target != self.ignore_index).unsqueeze(1).to(output.dtype)

    def _check(self, output: Tensor, target: Tensor) -> None:
        if output.ndim < 2:
            raise ValueError(f"CrossEntropy: output has shape {tuple(output.shape)}, expected (N, C, ...)")
        expected = output.shape if target.is_floating_point() else output.shape[:1] + output.shape[2:]
        if target.shape != expected:
            kind = "soft labels" if target.is_floating_point() else "class indices"
            raise ValueError(
                f"CrossEntropy: target has shape {tuple(target.shape)}, expected {tuple(expected)} for {kind} with an output of "
                f"shape {tuple(output.shape)} (classes in dimension 1)"
            )
        if target.dtype in (torch.bool, torch.int32, torch.int16, torch.int8, torch.uint8):
            raise ValueError(
                f"CrossEntropy: target has type {target.dtype}, expected torch.long or a floating type"
            )
        if target.is_floating_point() and self.label_smoothing:
            raise ValueError(
                "CrossEntropy: label_smoothing is for class indices; smooth the soft labels yourself"
            )
