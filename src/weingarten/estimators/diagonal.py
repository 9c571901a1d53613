"""The diagonal of the GGN, for every model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weingarten import tree
from weingarten.estimators.estimator import Estimator
from weingarten.fisher import Exact, Fisher
from weingarten.objective import Batch, Objective, curvature_pass, input_rows
from weingarten.operators import BlockDiagonal, Curvature, DiagonalCurvature
from weingarten.tree import Space, Tree, TreeLike

__all__ = ["Diagonal"]

_CHUNK = 2**24  # entries of per-datum gradients held at once


@dataclass
class DiagonalState:
    """Sum of squared per-datum gradients, their space, and the number of valid loss elements."""

    sums: Tree
    space: Space
    count: float = 0.0


@dataclass(frozen=True)
class Diagonal(Estimator):
    r"""``d = (1/M) sum_n w_n sum_k (J_n^T s_nk)^2``, entry by entry: with ``Exact()`` the exact diagonal of the GGN.

    Per-datum gradients come from ``torch.func.vmap``, so any layer, tied weights and layers used several times are treated
    exactly, as are models written as functions. Models that mix data within a batch are not.

    Args:
        fisher: which output gradients; ``Exact()`` by default, since one sample per datum is noisy in single entries.
        decay: factor on all earlier sums at each batch; 1 weighs all batches alike.
    """

    fisher: Fisher = Exact()
    decay: float = 1.0

    def init(self, objective: Objective, params: TreeLike) -> DiagonalState:
        wide = {name: torch.promote_types(p.dtype, torch.float32) for name, p in params.items()}
        return DiagonalState(
            {name: torch.zeros_like(p, dtype=wide[name]) for name, p in params.items()}, Space.of(params)
        )

    def update(
        self,
        state: DiagonalState,
        objective: Objective,
        params: TreeLike,
        batch: Batch,
        generator: torch.Generator,
    ) -> DiagonalState:
        sums = tree.scale(self.decay, state.sums)
        with curvature_pass(objective.model):
            with torch.no_grad():
                output = objective.forward(params, batch.inputs)
            for columns in self.fisher.weighted(
                objective.loss, output, batch.targets, batch.weights, generator
            ):
                sums = tree.add(sums, _squares(objective, dict(params), batch.inputs, columns))
        return DiagonalState(
            sums, state.space, state.count * self.decay + objective.loss.count(batch.targets)
        )

    def read(self, state: DiagonalState) -> Curvature:
        if state.count == 0:
            raise ValueError(
                "Diagonal.read: no valid loss element has been seen; are all targets ignored, or was there no update?"
            )
        return BlockDiagonal(
            [
                DiagonalCurvature({name: value / state.count}, state.space.only([name]))
                for name, value in state.sums.items()
            ]
        )


def _squares(objective: Objective, params: Tree, inputs: Any, columns: Tensor) -> Tree:
    """Sum over data and columns of squared per-datum gradients."""

    def one(row: Tensor, column: Tensor) -> Tree:
        def output(p: Tree) -> Tensor:
            return objective.forward(p, input_rows(inputs, row.reshape(1))).squeeze(0)

        pull = torch.func.vjp(output, params)[1]
        (gradients,) = torch.func.vmap(pull)(column)
        return {name: (_wide(g) ** 2).sum(0) for name, g in gradients.items()}

    size = sum(p.numel() for p in params.values())
    rows = torch.arange(columns.shape[1], device=columns.device)
    step = max(1, _CHUNK // (size * len(columns)))
    total = {name: _wide(torch.zeros_like(p)) for name, p in params.items()}
    for first in range(0, columns.shape[1], step):
        piece = slice(first, first + step)
        try:
            per_datum = torch.func.vmap(one, in_dims=(0, 1))(rows[piece], columns[:, piece])
        except RuntimeError:  # vmap does not know some operation, such as an old-style autograd.Function
            return _squares_one_by_one(objective, params, inputs, columns)
        total = tree.add(total, {name: g.sum(0) for name, g in per_datum.items()})
    return total


def _squares_one_by_one(objective: Objective, params: Tree, inputs: Any, columns: Tensor) -> Tree:
    """As :func:`_squares`, in loops over data and columns."""
    params = {name: p.detach().requires_grad_() for name, p in params.items()}
    total = {name: _wide(torch.zeros_like(p)) for name, p in params.items()}
    for n in range(columns.shape[1]):
        with torch.enable_grad():
            output = objective.forward(params, input_rows(inputs, torch.tensor([n], device=columns.device)))
        for column in columns[:, n]:
            found = torch.autograd.grad(
                output[0], list(params.values()), column, retain_graph=True, materialize_grads=True
            )
            total = {name: total[name] + _wide(g) ** 2 for name, g in zip(params, found, strict=True)}
    return tree.detach(total)


def _wide(g: Tensor) -> Tensor:
    return g.float() if g.element_size() < 4 else g
