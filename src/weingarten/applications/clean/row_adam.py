"""An optimiser for outer variables that belong to rows of the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["RowAdam"]


class RowAdam(torch.optim.Optimizer):
    """Adam in which an entry whose gradient is exactly zero stays where it is, and its averages and step count as they are.

    A mini-batch says nothing about the rows it did not draw. Adam would go on moving them by their momentum; here each entry
    takes the steps that plain Adam would take on the batches it was in. With nonzero gradients everywhere it *is* Adam
    (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980).

    Args:
        params: tensors.
        rates: learning rates, one per tensor.
        betas: decay of the averages.
        eps: added to the root.

    Raises:
        ValueError: if there is not one rate per tensor.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        rates: Sequence[float],
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ) -> None:
        if len(params) != len(rates):
            raise ValueError(
                f"RowAdam: found {len(rates)} rates for {len(params)} tensors, expected one each"
            )
        groups = [{"params": [p], "lr": rate} for p, rate in zip(params, rates, strict=True)]
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: evaluates the loss anew; optional.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, p.grad, group)
        return loss

    def _move(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state, (b1, b2) = self.state[p], group["betas"]
        if not state:
            state.update({name: torch.zeros_like(p) for name in ("count", "first", "second")})
        seen = g != 0
        state["count"] += seen
        for name, beta, value in (("first", b1, g), ("second", b2, g * g)):
            state[name].copy_(torch.where(seen, beta * state[name] + (1 - beta) * value, state[name]))
        count = state["count"].clamp_min(1)
        first, second = state["first"] / (1 - b1**count), state["second"] / (1 - b2**count)
        p.sub_(torch.where(seen, group["lr"] * first / (second.sqrt() + group["eps"]), 0.0))
