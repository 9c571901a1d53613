"""Binary cross-entropy with logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from weingarten.losses.elementwise import ElementwiseLoss
from weingarten.losses.loss import constant_weight, widened

__all__ = ["BinaryCrossEntropy"]


@dataclass(frozen=True)
class BinaryCrossEntropy(ElementwiseLoss):
    r"""``l(z, y) = -w (c y log p + (1 - y) log(1 - p))`` per entry with ``p = sigmoid(z)``; all entries count in the mean.

    Hessian ``w (c y + 1 - y) p (1 - p)``; targets are probabilities in [0, 1] of the output's shape. The weights are those of
    ``torch.nn.BCEWithLogitsLoss`` (https://docs.pytorch.org/docs/stable/generated/torch.nn.BCEWithLogitsLoss.html), and
    like there they do not change M.

    Args:
        weight: w, a number or a tensor that broadcasts over the entries of a datum; default 1. A weight per datum belongs to
            the batch.
        pos_weight: c, the weight of positive labels, of the same kinds; default 1.
        reduction: "mean" (default) over all entries, or "sum".

    Both are stored as floats or nested tuples of floats, and put on the output's device in its type where they are used.

    Raises:
        ValueError: if a weight is negative, not finite, or requires a gradient; from the methods, if it does not broadcast.

    >>> round(float(BinaryCrossEntropy()(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))), 4)
    0.6931
    >>> round(float(BinaryCrossEntropy(pos_weight=3.0)(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))), 4)
    1.3863
    """

    weight: Tensor | Sequence[Any] | float | None = None
    pos_weight: Tensor | Sequence[Any] | float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight", "pos_weight"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, constant_weight(f"BinaryCrossEntropy: {name}", value))

    def elements(self, output: Tensor, target: Tensor) -> Tensor:
        self.check(output, target)
        z = widened(output)
        return functional.binary_cross_entropy_with_logits(
            z,
            target.to(z.dtype),
            weight=self._factor("weight", z),
            pos_weight=self._factor("pos_weight", z),
            reduction="none",
        )

    def second_derivative(self, output: Tensor, target: Tensor) -> Tensor:
        self.check(output, target)
        p = widened(output).sigmoid()
        return p * (1 - p) * self._mass(target, p.dtype)

    def sample(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        self.check(output, target)
        p = widened(output).sigmoid()
        residual = p - torch.bernoulli(p, generator=generator)
        return (residual * self._mass(target, p.dtype).sqrt()).to(output.dtype)

    def datum_weights(self, target: Tensor) -> Tensor | None:
        if self.weight is None and self.pos_weight is None:
            return None
        return self._mass(target, torch.float64).reshape(len(target), -1).mean(1)

    def _mass(self, target: Tensor, dtype: torch.dtype) -> Tensor:
        """``w (c y + 1 - y)``, the shape of ``target``."""
        y = target.detach().to(dtype)
        weight, positive = self._factor("weight", y), self._factor("pos_weight", y)
        mass = torch.ones_like(y) if positive is None else positive * y + (1 - y)
        return mass if weight is None else weight * mass

    def _factor(self, name: str, like: Tensor) -> Tensor | None:
        """A weight on the device and in the type of ``like``, of whose shape it must broadcast all but the first dimension."""
        value = getattr(self, name)
        if value is None:
            return None
        factor = torch.tensor(value, dtype=like.dtype, device=like.device)
        datum = (1, *like.shape[1:])
        fits = factor.ndim <= len(datum) and all(
            size in (1, of) for size, of in zip(reversed(factor.shape), reversed(datum), strict=False)
        )
        if not fits:
            raise ValueError(
                f"BinaryCrossEntropy: {name} has shape {tuple(factor.shape)}, expected one that broadcasts to {datum}, one datum "
                f"of the output's shape {tuple(like.shape)}; pass weights that differ between data with the batch"
            )
        return factor
