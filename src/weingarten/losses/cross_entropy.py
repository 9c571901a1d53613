"""Cross-entropy of a softmax over classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from weingarten.losses.loss import CHUNK, Loss, constant_weight, widened

__all__ = ["CrossEntropy"]


@dataclass(frozen=True)
class CrossEntropy(Loss):
    r"""``l(z, y) = -sum_c w_c q_c log softmax(z)_c``, with ``q`` the one-hot, smoothed or soft label and class weights ``w``.

    Hessian in the logits: ``m (diag(p) - p p^T)`` with ``p = softmax(z)`` and the label's mass ``m = sum_c w_c q_c``. Value and
    mean are those of ``torch.nn.CrossEntropyLoss``
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html).

    Shapes: output ``(N, C)`` or ``(N, C, d1, d2, ...)``; target ``(N,)`` or ``(N, d1, d2, ...)`` of class indices, or of the
    output's shape and of floating type for soft labels. M is the number of elements whose label is not ``ignore_index``; with
    class weights it is the sum of ``w_y`` over them, smoothed or not; for soft labels it is the number of elements in any case.

    Args:
        weight: ``(C,)``, what each class weighs, >= 0; default ones. Stored as a tuple of floats, and put on the output's
            device in its type where it is used.
        ignore_index: class index that marks elements to leave out; PyTorch's default, -100.
        label_smoothing: share of the label's mass that is spread evenly over all classes, in [0, 1).
        reduction: "mean" (default) divides by M, "sum" by 1.

    Raises:
        ValueError: if ``label_smoothing`` is out of range, or a class weight is negative, not finite, or requires a gradient;
            from the methods, if output, target and class weights do not fit together.

    >>> loss = CrossEntropy()
    >>> round(float(loss(torch.zeros(2, 4), torch.tensor([0, -100]))), 4)
    1.3863
    >>> CrossEntropy(weight=[1.0, 3.0]).count(torch.tensor([0, 1, 1]))
    7.0
    """

    weight: Tensor | Sequence[float] | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"CrossEntropy: label_smoothing is {self.label_smoothing}, expected a number in [0, 1)"
            )
        if self.weight is not None:
            weight = constant_weight("CrossEntropy: weight", self.weight)
            if not isinstance(weight, tuple) or not weight or isinstance(weight[0], tuple):
                raise ValueError(
                    f"CrossEntropy: weight is {weight}, expected one number per class, of shape (C,)"
                )
            object.__setattr__(self, "weight", weight)

    def elements(self, output: Tensor, target: Tensor) -> Tensor:
        self._check(output, target)
        logits, soft = widened(output), target.is_floating_point()
        return functional.cross_entropy(
            logits,
            widened(target) if soft else target,
            self._class_weights(logits.dtype, logits.device),
            reduction="none",
            ignore_index=-100 if soft else self.ignore_index,  # which soft labels do not have
            label_smoothing=self.label_smoothing,
        )

    def count(self, target: Tensor) -> float:
        if target.is_floating_point():
            return target.numel() // target.shape[1]
        valid = target != self.ignore_index
        if self.weight is None:
            return int(valid.sum())
        labels = target[valid]
        classes = len(self.weight)
        if not bool(((labels >= 0) & (labels < classes)).all()):
            raise ValueError(
                f"CrossEntropy: found labels from {int(labels.min())} to {int(labels.max())}, expected 0 to {classes - 1}, since "
                f"weight has {classes} entries, or ignore_index={self.ignore_index}"
            )
        found = labels.bincount(minlength=classes).tolist()
        return float(sum(w * number for w, number in zip(self.weight, found, strict=True)))

    def curvature(self, output: Tensor, target: Tensor, v: Tensor) -> Tensor:
        self._check(output, target)
        p = widened(output).softmax(1)
        return (self._mass(target, p.dtype) * p * (v - (p * v).sum(1, keepdim=True))).to(output.dtype)

    def root(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        self._check(output, target)
        p = widened(output).softmax(1)
        columns = covariance_root(p.movedim(1, -1)).movedim((-1, -2), (0, 2))  # (C - 1, N, C, d1, ...)
        columns = (columns * self._mass(target, p.dtype).sqrt()).to(output.dtype)
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
        p = widened(output).softmax(1)
        rows = p.movedim(1, -1)
        flat = rows.reshape(-1, rows.shape[-1])
        label = torch.multinomial(flat.float(), 1, generator=generator)
        onehot = torch.zeros_like(flat).scatter_(1, label, 1.0).reshape(rows.shape).movedim(-1, 1)
        return ((p - onehot) * self._mass(target, p.dtype).sqrt()).to(output.dtype)

    def datum_weights(self, target: Tensor) -> Tensor | None:
        if target.is_floating_point():
            return self._mass(target, torch.float64).reshape(len(target), -1).mean(1)
        valid = (target != self.ignore_index).reshape(len(target), -1)
        if self.weight is None and bool(valid.any(1).all()):
            return None
        mass = self._mass(target, torch.float64).reshape(len(target), -1)
        return mass.sum(1) / valid.sum(1).clamp(min=1)

    def _mass(self, target: Tensor, dtype: torch.dtype) -> Tensor:
        """``m = sum_c w_c q_c`` of each element, 0 where ignored; ``(N, 1, d1, ...)``, broadcasts over classes."""
        weight = self._class_weights(dtype, target.device)
        even = 1.0 if self.weight is None else sum(self.weight) / len(self.weight)
        if target.is_floating_point():
            label = target.detach().to(dtype)
            if weight is not None:
                label = label * weight.reshape(-1, *[1] * (label.ndim - 2))
            given, valid = label.sum(1, keepdim=True), torch.ones((), dtype=dtype, device=target.device)
        else:
            labelled = target != self.ignore_index
            valid = labelled.unsqueeze(1).to(dtype)
            given = valid if weight is None else weight[target.where(labelled, 0)].unsqueeze(1)
        return valid * ((1 - self.label_smoothing) * given + self.label_smoothing * even)

    def _class_weights(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        return None if self.weight is None else torch.tensor(self.weight, dtype=dtype, device=device)

    def _check(self, output: Tensor, target: Tensor) -> None:
        if output.ndim < 2:
            raise ValueError(f"CrossEntropy: output has shape {tuple(output.shape)}, expected (N, C, ...)")
        expected = output.shape if target.is_floating_point() else output.shape[:1] + output.shape[2:]
        if target.shape != expected:
            kind = "soft labels" if target.is_floating_point() else "class indices"
            remedy = ""
            if output.ndim > 2 and target.shape == output.shape[:-1]:
                last = "mT" if output.ndim == 3 else "movedim(-1, 1)"
                remedy = f"; pass output=lambda out: out.{last} to wg.Objective (out.logits.{last} for Hugging Face)"
            raise ValueError(
                f"CrossEntropy: target has shape {tuple(target.shape)}, expected {tuple(expected)} for {kind} with an output of "
                f"shape {tuple(output.shape)} (classes in dimension 1){remedy}"
            )
        if target.dtype in (torch.bool, torch.int32, torch.int16, torch.int8, torch.uint8):
            raise ValueError(
                f"CrossEntropy: target has type {target.dtype}, expected torch.long or a floating type"
            )
        if self.weight is not None and len(self.weight) != output.shape[1]:
            raise ValueError(
                f"CrossEntropy: weight has {len(self.weight)} entries, expected {output.shape[1]}, one per class of an output of "
                f"shape {tuple(output.shape)} (classes in dimension 1)"
            )


def covariance_root(p: Tensor) -> Tensor:
    r"""The Cholesky factor of ``diag(p) - p p^T`` without its last column, which is zero: ``(..., C, C - 1)``.

    With ``q_j = sum_{k > j} p_k``: ``sqrt(p_j q_j / q_{j-1})`` on the diagonal and ``-p_i sqrt(p_j / (q_{j-1} q_j))``
    below (Tanabe and Sagae 1992, J. R. Statist. Soc. B 54, 211); nothing cancels, and where nothing is left
    the column is zero.

    >>> root = covariance_root(torch.tensor([0.5, 0.5]))
    >>> root @ root.mT
    tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]])
    """
    tail = p.flip(-1).cumsum(-1).flip(-1)  # q_{j-1}
    before, after, head = tail[..., :-1], tail[..., 1:], p[..., :-1]
    share = (head / before.where(before > 0, 1.0)).sqrt()
    inverse = torch.where(after > 0, after.where(after > 0, 1.0).rsqrt(), 0.0)
    lower = -(p.unsqueeze(-1) * inverse.unsqueeze(-2)) * share.unsqueeze(-2)
    classes = p.shape[-1]
    below = torch.ones(classes, classes - 1, dtype=torch.bool, device=p.device).tril(-1)
    root = torch.where(below, lower, 0.0)
    root.diagonal(dim1=-2, dim2=-1).copy_(after.sqrt() * share)
    return root
