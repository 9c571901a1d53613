"""Slow, obvious oracles: dense matrices from the definitions, in plain loops. For tests and for small problems.

Nothing here is shared with the fast code except the data formats, the losses' *values* and the model itself: loss Hessians come
from automatic differentiation of the loss value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weingarten.objective import (
    Batch,
    Data,
    Objective,
    curvature_pass,
    gradient_twice,
    input_rows,
)
from weingarten.tree import Space, TreeLike

__all__ = [
    "datum",
    "datum_ggns",
    "datum_jacobians",
    "dense_ggn",
    "dense_hessian",
    "jacobian",
    "output_hessian",
]


def dense_hessian(objective: Objective, data: Data, params: TreeLike) -> Tensor:
    """The Hessian ``(P, P)`` of the loss over all batches: of its mean, or of its sum.

    Raises:
        NotImplementedError: if an operation of the model has no second derivative.
    """
    space = Space.of(params)
    batches = [Batch.of(batch) for batch in data]
    count = objective.count(batches)

    def value(flat: Tensor) -> Tensor:
        return torch.stack([objective.value(space.unflatten(flat), batch, count) for batch in batches]).sum()

    with curvature_pass(objective.model), torch.enable_grad():
        flat = space.flatten(params).requires_grad_()
        gradient_twice("dense_hessian", value(flat), {"": flat}, "there is no Hessian without it")
        result: Tensor = torch.autograd.functional.hessian(value, flat.detach())
    return result


def dense_ggn(objective: Objective, data: Data, params: TreeLike) -> Tensor:
    """``(1/M) sum_n w_n J_n^T H_n J_n``, datum by datum, as a matrix ``(P, P)``; not divided for a loss that is a sum."""
    space = Space.of(params)
    batches = [Batch.of(batch) for batch in data]
    result = torch.zeros(space.size, space.size, dtype=space.dtype, device=space.device)
    for matrix in datum_ggns(objective, batches, params):
        result += matrix
    return result / objective.loss.divisor(objective.count(batches))


def datum_ggns(objective: Objective, data: Data, params: TreeLike) -> list[Tensor]:
    """``w_n J_n^T H_n J_n`` of every datum, each ``(P, P)``, not divided by M; the loss's own weights are part of ``H_n``."""
    found = []
    for batch in map(Batch.of, data):
        for n in range(len(batch.targets)):
            one = datum(batch, n)
            weight = 1.0 if batch.weights is None else float(batch.weights[n])
            j = jacobian(objective, one, params)
            found.append(weight * j.T @ output_hessian(objective, one, params) @ j)
    return found


def datum_jacobians(objective: Objective, data: Data, params: TreeLike) -> list[Tensor]:
    """``J_n`` of every datum: its flattened output in the flattened parameters, each ``(outputs, P)``."""
    return [
        jacobian(objective, datum(batch, n), params)
        for batch in map(Batch.of, data)
        for n in range(len(batch.targets))
    ]


def output_hessian(objective: Objective, batch: Batch, params: TreeLike) -> Tensor:
    """The Hessian of ``sum_n l_n`` in the flattened output, without the weights of data, not divided by M."""
    with curvature_pass(objective.model), torch.no_grad():
        output = objective.forward(params, batch.inputs)
    h = torch.autograd.functional.hessian(lambda z: objective.loss.elements(z, batch.targets).sum(), output)
    return h.reshape(output.numel(), output.numel())


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
    """Row ``n`` of a batch, as a batch of one; inputs without as many rows as the batch belong to all data."""
    weights = None if batch.weights is None else batch.weights[n : n + 1]
    index = torch.tensor([n], device=batch.targets.device)
    return Batch(input_rows(batch.inputs, index, len(batch.targets)), batch.targets[n : n + 1], weights)
