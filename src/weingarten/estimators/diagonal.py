"""The diagonal of the GGN, for every model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from weingarten import tree
from weingarten.estimators.ekfac import spectrum
from weingarten.estimators.estimator import Estimator
from weingarten.estimators.layerwise import layer_pass
from weingarten.fisher import Exact, Fisher
from weingarten.layers import Block, LayerError, Structure
from weingarten.losses import Loss
from weingarten.objective import Batch, Objective, curvature_pass, input_rows
from weingarten.operators import BlockDiagonal, Curvature, DiagonalCurvature
from weingarten.tree import Space, Tree, TreeLike

__all__ = ["Diagonal"]

_CHUNK = 2**24  # entries of per-datum gradients held at once


@dataclass
class DiagonalState:
    """Sum of squared per-datum gradients, their space, the number of valid loss elements.

    Attributes:
        sums: by leaf, and ``space`` the leaves.
        loss: says what the number divides.
        general: whether the model's uses of its leaves could not be followed, so that all are treated in general.
        structure: the data axes in the model, once known.
    """

    sums: Tree
    space: Space
    loss: Loss
    general: bool
    structure: Structure | None = None
    count: float = 0.0


@dataclass(frozen=True)
class Diagonal(Estimator):
    r"""``d = (1/M) sum_n w_n sum_k (J_n^T s_nk)^2``, entry by entry: with ``Exact()`` the exact diagonal of the GGN.

    For the uses of parameters that KFAC knows, the squares come from inputs and output gradients; all else has its per-datum
    gradients taken by ``torch.func.vmap``, so that any model is treated exactly, also one written as a function. Models that mix
    data within a batch are not.

    Args:
        fisher: which output gradients; ``Exact()`` by default, since one sample per datum is noisy in single entries.
        decay: factor on all earlier sums at each batch; 1 weighs all batches alike.
    """

    fisher: Fisher = Exact()
    decay: float = 1.0

    def init(self, objective: Objective, params: TreeLike) -> DiagonalState:
        zeros = {name: _wide(torch.zeros_like(p)) for name, p in params.items()}
        general = not isinstance(objective.model, nn.Module)
        return DiagonalState(zeros, Space.of(params), objective.loss, general)

    def update(
        self,
        state: DiagonalState,
        objective: Objective,
        params: TreeLike,
        batch: Batch,
        generator: torch.Generator,
    ) -> DiagonalState:
        before = generator.get_state()
        found: Tree = {}
        if not state.general:
            try:
                found = self._by_use(state, objective, params, batch, generator)
            except LayerError:  # data in no order that can be told, say: exact in general, if slower
                state.general = True
        rest = {name: p for name, p in params.items() if name not in found}
        if rest:
            generator.set_state(before)
            found |= self._in_general(objective, rest, params, batch, generator)
        sums = {name: self.decay * value + _wide(found[name]) for name, value in state.sums.items()}
        count = state.count * self.decay + objective.loss.count(batch.targets)
        return replace(state, sums=sums, count=count)

    def _by_use(
        self,
        state: DiagonalState,
        objective: Objective,
        params: TreeLike,
        batch: Batch,
        generator: torch.Generator,
    ) -> Tree:
        """Squares of one batch, for the leaves whose uses are known."""
        found: Tree = {}
        with layer_pass(state.structure, objective, params, batch, self.fisher, generator, "Diagonal") as (
            state.structure,
            seen,
        ):

            def consume(block: Block, gradients: list[Tensor]) -> None:
                leaves = {name: state.sums[name] for name in block.layout.space.shapes}
                wide = replace(block.layout, space=Space.of(leaves))  # sums stay wide
                for name, value in wide.split(spectrum(block, gradients, None)).items():
                    found[name] = found[name] + value if name in found else value

            seen.backward(consume)
        return found

    def _in_general(
        self, objective: Objective, rest: Tree, params: TreeLike, batch: Batch, generator: torch.Generator
    ) -> Tree:
        """Squares of one batch for the leaves ``rest``, by per-datum gradients."""
        found = {name: _wide(torch.zeros_like(p)) for name, p in rest.items()}
        fixed = tree.detach(params)
        with curvature_pass(objective.model), torch.no_grad():
            output = objective.forward(fixed, batch.inputs)
            for columns in self.fisher.weighted(
                objective.loss, output, batch.targets, batch.weights, generator
            ):
                found = tree.add(found, _squares(objective, rest, fixed, batch.inputs, columns))
        return found

    def read(self, state: DiagonalState) -> Curvature:
        if state.count == 0:
            raise ValueError(
                "Diagonal.read: no valid loss element has been seen; are all targets ignored, or was there no update?"
            )
        return BlockDiagonal(
            [
                DiagonalCurvature({name: value / state.loss.divisor(state.count)}, state.space.only([name]))
                for name, value in state.sums.items()
            ]
        )


def _squares(objective: Objective, params: Tree, fixed: Tree, inputs: Any, columns: Tensor) -> Tree:
    """Sum over data and columns of squared per-datum gradients in ``params``; the others stay ``fixed``."""

    def one(row: Tensor, column: Tensor) -> Tree:
        def output(p: Tree) -> Tensor:
            alone = input_rows(inputs, row.reshape(1), columns.shape[1])
            return objective.forward({**fixed, **p}, alone).squeeze(0)

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
            row = input_rows(inputs, torch.tensor([n], device=columns.device), columns.shape[1])
            output = objective.forward({**fixed, **params}, row).squeeze(0)
        for column in columns[:, n]:
            found = torch.autograd.grad(
                output, list(params.values()), column, retain_graph=True, materialize_grads=True
            )
            total = {name: total[name] + _wide(g) ** 2 for name, g in zip(params, found, strict=True)}
    return tree.detach(total)


def _wide(g: Tensor) -> Tensor:
    return g.float() if g.element_size() < 4 else g
