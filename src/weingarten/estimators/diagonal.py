"""The diagonal of the GGN, for every model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weingarten import tree
from weingarten.estimators.estimator import Estimator
from weingarten.fisher import Exact, Fisher
from weingarten.objective import Batch, Objective, curvature_pass
from weingarten.operators import BlockDiagonal, Curvature, DiagonalCurvature
from weingarten.tree import Tree, TreeLike

__all__ = ["Diagonal"]

_CHUNK = 2**24  # entries of per-datum gradients held at once


@dataclass
class DiagonalState:
    """Sum of squared per-datum gradients, and the number of valid loss elements."""

    sums: Tree
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
        return DiagonalState({name: torch.zeros_like(p) for name, p in params.items()})

    def update(
        self, state: DiagonalState, objective: Objective, params: TreeLike, batch: Batch, generator: torch.Generator
    ) -> DiagonalState:
        sums = tree.scale(self.decay, state.sums)
        with curvature_pass(objective.model):
            with torch.no_grad():
                output = objective.forward(params, batch.inputs)
            for columns in self.fisher.weighted(objective.loss, output, batch.targets, batch.weights, generator):
                sums = tree.add(sums, _squares(objective, dict(params), batch.inputs, columns))
        return DiagonalState(sums, state.count * self.decay + objective.loss.count(batch.targets))

    def read(self, state: DiagonalState) -> Curvature:
        return BlockDiagonal([DiagonalCurvature({name: value / state.count}) for name, value in state.sums.items()])


def _squares(objective: Objective, params: Tree, inputs: Any, columns: Tensor) -> Tree:
    """Sum over data and columns of squared per-datum gradients."""

    def one(datum: Any, column: Tensor) -> Tree:
        def output(p: Tree) -> Tensor:
            return objective.forward(p, _map(lambda x: x.unsqueeze(0), datum)).squeeze(0)

        _, pull = torch.func.vjp(output, params)
        (gradients,) = torch.func.vmap(pull)(column)
        return {name: (g**2).sum(0) for name, g in gradients.items()}

    size = sum(p.numel() for p in params.values())
    step = max(1, _CHUNK // (size * len(columns)))
    total: Tree | None = None
    for first in range(0, columns.shape[1], step):
        piece = slice(first, first + step)
        per_datum = torch.func.vmap(one, in_dims=(0, 1))(_map(lambda x, p=piece: x[p], inputs), columns[:, piece])
        summed = {name: g.sum(0) for name, g in per_datum.items()}
        total = summed if total is None else tree.add(total, summed)
    assert total is not None
    return total


def _map(function: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, dict):
        return {name: _map(function, value) for name, value in inputs.items()}
    return tuple(_map(function, value) for value in inputs)
