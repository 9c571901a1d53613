"""What a loss must know to give curvature: its elements, their Hessian, a root of it, and a sampler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["CHUNK", "Loss", "check_weights", "constant_weight", "widened"]

CHUNK = 64
"""Columns per chunk of a root: bounds memory when a datum has many outputs."""


@dataclass(frozen=True)
class Loss(ABC):
    r"""A weighted mean ``L = (1/M) sum_n w_n sum_t l(z_nt, y_nt)`` over M valid elements, or their sum.

    The first dimension of output and target counts data ``n``; what an *element* is (a row of logits at a position ``t``, a
    scalar) is the loss's own business. A per-datum weight ``w_n >= 0`` does not change M, so that weights of one mean no weights.

    Outputs in half precision are raised to float32: values come in float32, columns and products in the output's type.

    Args:
        reduction: "mean" (default, as in PyTorch) divides by M, "sum" by 1.

    Raises:
        ValueError: for another reduction.
    """

    reduction: Literal["mean", "sum"] = field(default="mean", kw_only=True)

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ValueError(
                f"{type(self).__name__}: reduction is {self.reduction!r}, expected 'mean' or 'sum'; the loss of each element is "
                "what elements() returns"
            )

    @abstractmethod
    def elements(self, output: Tensor, target: Tensor) -> Tensor:
        """Loss of each element, first dimension N, zero where ignored; float32 for outputs in half precision."""

    @abstractmethod
    def count(self, target: Tensor) -> float:
        """M, what a mean divides by: the number of valid elements, or the sum of their class weights."""

    @abstractmethod
    def curvature(self, output: Tensor, target: Tensor, v: Tensor) -> Tensor:
        """Product of each datum's (unweighted, undivided) output Hessian with ``v``; shape and type of ``output``."""

    @abstractmethod
    def root(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        """Chunks ``(K_i, *output.shape)`` of columns ``s_k`` with ``sum_k s_nk s_nk^T`` = datum n's output Hessian."""

    @abstractmethod
    def sample(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """Output gradient at labels drawn from the model; its second moment is the Hessian of each datum's loss."""

    def datum_weights(self, target: Tensor) -> Tensor | None:
        """``(N,)``, float64: what datum n's elements weigh on average over its valid ones, 0 where there are none; None for ones.

        What an element weighs is the factor before its Hessian that the label sets (class weight, label mass), so that class
        weights ``c`` with one label per datum are the per-datum weights ``c[y_n]``. A loss that has such factors returns them.
        """
        return None

    def divisor(self, count: float) -> float:
        """What sums over elements are divided by: ``count`` for a mean, 1 for a sum and where there is nothing to divide.

        Args:
            count: M of the data that the sums were taken over, see :meth:`count`.
        """
        return 1 if self.reduction == "sum" or count == 0 else count

    def __call__(self, output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """The weighted mean or sum, a 0-d tensor."""
        return self.total(output, target, weights) / self.divisor(self.count(target))

    def total(self, output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """``sum_n w_n l_n``, whatever the reduction."""
        elements = self.elements(output, target)
        if weights is None:
            return elements.sum()
        check_weights(weights, elements.shape[0])
        return (elements.reshape(len(weights), -1).sum(1) * weights).sum()

    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """Output gradient of each element's loss at the given label; shape and type of ``output``."""
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


def constant_weight(call: str, value: Tensor | Sequence[Any] | float) -> Any:
    """A weight that belongs to a loss, as a float or nested tuples of floats, which can be compared and hashed.

    Raises:
        ValueError: if an entry is negative or not finite, or if the weight requires a gradient, which would be lost.
    """
    found = value.detach().cpu() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(
            f"{call} requires a gradient, expected a constant; pass weights that are learned with the batch, one per datum"
        )
    if not bool((found.isfinite() & (found >= 0)).all()):
        raise ValueError(f"{call} is {found.tolist()}, expected finite numbers >= 0")
    return _tuples(found.tolist())


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else float(value)


def widened(x: Tensor) -> Tensor:
    """Half precision in float32; other types as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
