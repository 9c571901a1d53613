"""The protocol of estimators, and the loop that runs one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from weingarten import tree
from weingarten.objective import Batch, Data, Objective
from weingarten.operators import Curvature
from weingarten.tree import TreeLike

__all__ = ["Estimator", "estimate"]


class Estimator(ABC):
    """A way to measure a curvature. The object holds hyperparameters only; what it has seen is the explicit state."""

    passes: ClassVar[int] = 1

    @abstractmethod
    def init(self, objective: Objective, params: TreeLike) -> Any:
        """The state before any data; refuses models it cannot treat."""

    @abstractmethod
    def update(
        self, state: Any, objective: Objective, params: TreeLike, batch: Batch, generator: torch.Generator
    ) -> Any:
        """The state after one more batch."""

    @abstractmethod
    def read(self, state: Any) -> Curvature:
        """The estimate, divided by the number of valid elements seen."""

    def finish(self, state: Any) -> Any:
        """Called after each pass over the data, for estimators that make several."""
        return state


def estimate(
    estimator: Estimator,
    objective: Objective,
    data: Data,
    params: TreeLike | None = None,
    generator: torch.Generator | None = None,
) -> Curvature:
    """The curvature of ``objective`` on ``data`` at ``params``.

    Args:
        estimator: ``KFAC()``, ``EKFAC()``, ``Diagonal()``, ...
        objective: model and loss.
        data: batches ``(inputs, targets)``, ``(inputs, targets, weights)`` or ``Batch``; iterable ``estimator.passes`` times.
        params: where; default: the module's trainable parameters.
        generator: draws the labels; default: a fresh one with seed 0, so that results repeat and the global state is untouched.

    Raises:
        ValueError: if the data is empty (an iterator that is used up, say), or the estimator refuses the model.

    >>> from torch import nn
    >>> from weingarten import KFAC, MSE
    >>> model = nn.Linear(2, 1, bias=False)
    >>> estimate(KFAC(), Objective(model, MSE()), [(torch.eye(2), torch.zeros(2, 1))]).space.size
    2
    """
    params = tree.detach(objective.params() if params is None else params)
    generator = (
        torch.Generator(device=next(iter(params.values())).device).manual_seed(0)
        if generator is None
        else generator
    )
    state = estimator.init(objective, params)
    for _ in range(estimator.passes):
        batches = 0
        for batch in data:
            state = estimator.update(state, objective, params, Batch.of(batch), generator)
            batches += 1
        if batches == 0:
            raise ValueError(
                f"estimate: the data gave no batch, {type(estimator).__name__} makes {estimator.passes} passes; "
                "pass a list or a DataLoader that can be iterated again"
            )
        state = estimator.finish(state)
    return estimator.read(state)
