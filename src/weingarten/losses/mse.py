"""Mean squared error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weingarten.losses.elementwise import ElementwiseLoss
from weingarten.losses.loss import widened

__all__ = ["MSE"]


@dataclass(frozen=True)
class MSE(ElementwiseLoss):
    """``l(z, y) = (z - y)^2`` per entry, averaged over all entries like ``torch.nn.MSELoss``; Hessian 2.

    The model it implies is a normal distribution of variance 1/2 around the output, from which labels are sampled.

    Args:
        reduction: "mean" (default) over all entries, or "sum".

    >>> float(MSE()(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2)))
    5.0
    >>> float(MSE(reduction="sum")(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2)))
    10.0
    """

    def elements(self, output: Tensor, target: Tensor) -> Tensor:
        self.check(output, target)
        return (widened(output) - target) ** 2

    def second_derivative(self, output: Tensor, target: Tensor) -> Tensor:
        self.check(output, target)
        return torch.full_like(widened(output), 2.0)

    def sample(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        self.check(output, target)
        wide = torch.promote_types(output.dtype, torch.float32)
        noise = torch.randn(output.shape, dtype=wide, device=output.device, generator=generator)
        return (2**0.5 * noise).to(output.dtype)
