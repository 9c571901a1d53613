"""What a loss must know to give curvature: its elements, their Hessian, a root of it, and a sampler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["CHUNK", "Loss", "check_weights"]

CHUNK = 64
"""Columns per chunk of a root: bounds memory when a datum has many outputs."""


class Loss(ABC):
    r"""A weighted mean ``L = (1/M) sum_n w_n sum_t l(z_nt, y_nt)`` over M valid elements.

    The first dimension of output and target counts data ``n``; what an *element* is (a row of logits at a position ``t``, a
    scalar) is the loss's own business. A per-datum weight ``w_n >= 0`` does not change M, so that weights of one mean no weights.
    """

    @abstractmethod
    def elements(self, output: Tensor, target: Tensor) -> Tensor:
        """Loss of each element, first dimension N, zero where ignored."""

    @abstractmethod
    def count(self, target: Tensor) -> int:
        """M, the number of valid elements that the mean divides by."""

    @abstractmethod
    def curvature(self, output: Tensor, target: Tensor, v: Tensor) -> Tensor:
        """Product of each datum's (unweighted, undivided) output Hessian with ``v``; shapes of ``output``."""

    @abstractmethod
    def root(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        """Chunks ``(K_i, *output.shape)`` of columns ``s_k`` with ``sum_k s_nk s_nk^T`` = datum n's output Hessian."""

    @abstractmethod
    def sample(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """Output gradient at labels drawn from the model; its second moment is the Hessian of each datum's loss."""

    def __call__(self, output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """The weighted mean, a 0-d tensor."""
        return self.total(output, target, weights) / max(self.count(target), 1)

    def total(self, output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """``sum_n w_n l_n``: the mean times M."""
        elements = self.elements(output, target)
        if weights is None:
            return elements.sum()
        check_weights(weights, elements.shape[0])
        return (elements.reshape(len(weights), -1).sum(1) * weights).sum()

    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """Output gradient of each element's loss at the given label; the shape of ``output``."""
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            (result,) = torch.autograd.grad(self.elements(leaf, target).sum(), leaf)
        return result


def check_weights(weights: Tensor, data: int) -> None:
    """Refuse per-datum weights of the wrong shape, negative or not finite.

    Raises:
        ValueError: which of these, with what was found.
    """
    if weights.shape != (data,):
        raise ValueError(
            f"Loss: weights have shape {tuple(weights.shape)}, expected ({data},), one per datum"
        )
    values = weights.detach()
    if not (values >= 0).all():  # also catches NaN
        worst = int((values.nan_to_num(nan=-torch.inf)).argmin())
        raise ValueError(
            f"Loss: weight of datum {worst} is {float(values[worst]):.4g}, expected >= 0; a negative weight has no curvature "
            "estimate (pass weights through a sigmoid or clamp them)"
        )
