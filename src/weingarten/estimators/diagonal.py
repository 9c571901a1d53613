"""The diagonal of the GGN, for every model."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weingarten import tree
from weingarten.estimators.estimator import Estimator
from weingarten.fisher import Exact, Fisher
from weingarten.layers import RULES, Block, LayerError, capture, factor_type, find_blocks
from weingarten.objective import Batch, Objective, curvature_pass, input_rows
from weingarten.operators import BlockDiagonal, Curvature, DiagonalCurvature
from weingarten.tree import Space, Tree, TreeLike

__all__ = ["Diagonal"]

_CHUNK = 2**24  # entries of per-datum gradients held at once


@dataclass
class DiagonalState:
    """Sum of squared per-datum gradients, their space, the layers treated one by one, the number of valid loss elements."""

    sums: Tree
    space: Space
    blocks: list[Block]
    count: float = 0.0


@dataclass(frozen=True)
class Diagonal(Estimator):
    r"""``d = (1/M) sum_n w_n sum_k (J_n^T s_nk)^2``, entry by entry: with ``Exact()`` the exact diagonal of the GGN.

    For layers that KFAC knows, the squares come from inputs and output gradients; all else has its per-datum gradients taken
    by ``torch.func.vmap``, so that any layer, tied weights and layers used several times are treated exactly, as are models
    written as functions. Models that mix data within a batch are not.

    Args:
        fisher: which output gradients; ``Exact()`` by default, since one sample per datum is noisy in single entries.
        decay: factor on all earlier sums at each batch; 1 weighs all batches alike.
    """

    fisher: Fisher = Exact()
    decay: float = 1.0

    def init(self, objective: Objective, params: TreeLike) -> DiagonalState:
        zeros = {name: _wide(torch.zeros_like(p)) for name, p in params.items()}
        blocks: list[Block] = []
        if isinstance(objective.model, nn.Module):
            with suppress(LayerError):
                blocks, _ = find_blocks(objective.model, zeros, RULES)  # sums stay wide
        return DiagonalState(zeros, Space.of(params), blocks)

    def update(
        self,
        state: DiagonalState,
        objective: Objective,
        params: TreeLike,
        batch: Batch,
        generator: torch.Generator,
    ) -> DiagonalState:
        before = generator.get_state()
        try:
            found = self._by_layer(state.blocks, objective, params, batch, generator)
        except LayerError:  # a layer that is called twice, say: exact in general, if slower
            generator.set_state(before)
            state.blocks = []
            found = self._by_layer([], objective, params, batch, generator)
        sums = {name: self.decay * value + found[name] for name, value in state.sums.items()}
        count = state.count * self.decay + objective.loss.count(batch.targets)
        return DiagonalState(sums, state.space, state.blocks, count)

    def _by_layer(
        self,
        blocks: list[Block],
        objective: Objective,
        params: TreeLike,
        batch: Batch,
        generator: torch.Generator,
    ) -> Tree:
        """Squares of one batch: of the blocks from their rows, of the other leaves in general."""
        rest = {
            name: p for name, p in params.items() if not any(name in b.layout.space.shapes for b in blocks)
        }
        found = {name: _wide(torch.zeros_like(p)) for name, p in params.items()}
        with capture(objective, params, batch, blocks) as seen:
            output = seen.output.detach()
            chunks = list(
                self.fisher.weighted(objective.loss, output, batch.targets, batch.weights, generator)
            )
            for number, columns in enumerate(chunks):
                gradients = seen.gradients(columns, last=number == len(chunks) - 1) if blocks else {}
                for block in blocks:
                    x, leaves = factor_type(seen.seen[block.name][0]), block.leaves(params)
                    g = block.rule.outputs(block.module, x, factor_type(gradients[block.name]), leaves)
                    squares = block.layout.split(block.rule.inputs(block.module, x, leaves).squares(g))
                    found |= {name: found[name] + _wide(value) for name, value in squares.items()}
        with curvature_pass(objective.model):
            for columns in chunks if rest else []:
                general = _squares(objective, rest, tree.detach(params), batch.inputs, columns)
                found |= {name: found[name] + value for name, value in general.items()}
        return found

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


def _squares(objective: Objective, params: Tree, fixed: Tree, inputs: Any, columns: Tensor) -> Tree:
    """Sum over data and columns of squared per-datum gradients in ``params``; the others stay ``fixed``."""

    def one(row: Tensor, column: Tensor) -> Tree:
        def output(p: Tree) -> Tensor:
            return objective.forward({**fixed, **p}, input_rows(inputs, row.reshape(1))).squeeze(0)

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
            return _squares_one_by_one(objective, params, fixed, inputs, columns)
        total = tree.add(total, {name: g.sum(0) for name, g in per_datum.items()})
    return total


def _squares_one_by_one(
    objective: Objective, params: Tree, fixed: Tree, inputs: Any, columns: Tensor
) -> Tree:
    """As :func:`_squares`, in loops over data and columns."""
    params = {name: p.detach().requires_grad_() for name, p in params.items()}
    total = {name: _wide(torch.zeros_like(p)) for name, p in params.items()}
    for n in range(columns.shape[1]):
        with torch.enable_grad():
            row = input_rows(inputs, torch.tensor([n], device=columns.device))
            output = objective.forward({**fixed, **params}, row)
        for column in columns[:, n]:
            found = torch.autograd.grad(
                output[0], list(params.values()), column, retain_graph=True, materialize_grads=True
            )
            total = {name: total[name] + _wide(g) ** 2 for name, g in zip(params, found, strict=True)}
    return tree.detach(total)


def _wide(g: Tensor) -> Tensor:
    return g.float() if g.element_size() < 4 else g
