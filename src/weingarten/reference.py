"""Slow, obvious oracles: dense matrices from the definitions, in plain loops. For tests and for small problems.

Nothing here is shared with the fast code except the data formats, the losses' *values* and the model itself: loss Hessians come
from automatic differentiation of the loss value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weingarten.objective import Batch, Data, Objective, curvature_pass
from weingarten.tree import Space, TreeLike

__all__ = ["datum", "dense_ggn", "dense_hessian", "jacobian"]


def dense_hessian(objective: Objective, data: Data, params: TreeLike) -> Tensor:
    """The Hessian ``(P, P)`` of the mean loss over all batches."""
    space = Space.of(params)
    batches = [Batch.of(batch) for batch in data]
    count = objective.count(batches)

    def value(flat: Tensor) -> Tensor:
        return torch.stack([objective.value(space.unflatten(flat), batch, count) for batch in batches]).sum()

    with curvature_pass(objective.model):
        result: Tensor = torch.autograd.functional.hessian(value, space.flatten(params))
    return result


def dense_ggn(objective: Objective, data: Data, params: TreeLike) -> Tensor:
    """``(1/M) sum_n w_n J_n^T H_n J_n``, datum by datum, as a matrix ``(P, P)``."""
    space = Space.of(params)
    batches = [Batch.of(batch) for batch in data]
    result = torch.zeros(space.size, space.size, dtype=space.dtype)
    for batch in batches:
        for n in range(len(batch.targets)):
            one = datum(batch, n)
            j = jacobian(objective, one, params)
            with curvature_pass(objective.model):
                output = objective.forward(params, one.inputs).detach()
            h = torch.autograd.functional.hessian(
                lambda z, t=one.targets: objective.loss.elements(z, t).sum(), output
            )
            weight = 1.0 if batch.weights is None else float(batch.weights[n])
            result += weight * j.T @ h.reshape(output.numel(), output.numel()) @ j
    return result / objective.count(batches)


def jacobian(objective: Objective, batch: Batch, params: TreeLike) -> Tensor:
    """The Jacobian of the flattened output in the flattened parameters."""
    space = Space.of(params)
    with curvature_pass(objective.model):
        found: Tensor = torch.autograd.functional.jacobian(
            lambda flat: objective.forward(space.unflatten(flat), batch.inputs).reshape(-1),
            space.flatten(params),
        )
    return found


def datum(batch: Batch, n: int) -> Batch:
    """Row ``n`` of a batch, as a batch of one."""
    weights = None if batch.weights is None else batch.weights[n : n + 1]
    return Batch(_row(batch.inputs, n), batch.targets[n : n + 1], weights)


def _row(inputs: Any, n: int) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[n : n + 1]
    if isinstance(inputs, Mapping):
        return {name: _row(value, n) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(_row(value, n) for value in inputs)
    return inputs
