"""Binary cross-entropy with logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from weingarten.losses.elementwise import ElementwiseLoss

__all__ = ["BinaryCrossEntropy"]


@dataclass(frozen=True)
class BinaryCrossEntropy(ElementwiseLoss):
    """``l(z, y) = log(1 + e^z) - y z`` per entry, averaged over all entries like ``torch.nn.BCEWithLogitsLoss``.

    Hessian ``p (1 - p)`` with ``p = sigmoid(z)``; targets are probabilities in [0, 1], of the output's shape and type.

    >>> round(float(BinaryCrossEntropy()(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))), 4)
    0.6931
    """

    def elements(self, output: Tensor, target: Tensor) -> Tensor:
        self.check(output, target)
        return functional.binary_cross_entropy_with_logits(output, target.to(output.dtype), reduction="none")

    def second_derivative(self, output: Tensor, target: Tensor) -> Tensor:
        self.check(output, target)
        p = output.sigmoid()
        return p * (1 - p)

    def sample(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        self.check(output, target)
        p = output.sigmoid()
        return p - torch.bernoulli(p, generator=generator)
