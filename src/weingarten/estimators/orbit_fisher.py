"""The orbit average of per-datum gradient moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from weingarten import tree
from weingarten.estimators.estimator import Estimator
from weingarten.estimators.orbit import check_covered, check_decay
from weingarten.estimators.orbit_rows import PartRows, factor, materialised, moment_of
from weingarten.fisher import Fisher, MonteCarlo
from weingarten.layers import RULES, Block, ConvRule, LayerError, LinearRule, capture, find_blocks
from weingarten.layers.rows import DenseRows
from weingarten.objective import Batch, Objective, input_rows
from weingarten.operators import Commutant, Curvature
from weingarten.symmetry.isotypic import Coordinates, Isotypic
from weingarten.symmetry.part import Part
from weingarten.symmetry.spec import Symmetry
from weingarten.tree import Tree, TreeLike

__all__ = ["OrbitFisher"]

_CHUNK = 64  # data treated together: bounds the memory of per-datum gradients where they are formed


@dataclass
class OrbitFisherState:
    """Sums of per-datum moments by kind, the layers whose gradients come as outer products, and the number of elements."""

    isotypic: Isotypic
    blocks: list[Block]
    sums: Coordinates
    count: float = 0.0


@final
@dataclass(frozen=True)
class OrbitFisher(Estimator):
    r"""``(1/M) sum_n w_n sum_k R2(J_n^T s_nk, J_n^T s_nk)``: the orbit average of the GGN.

    Unlike the estimates from one gradient it keeps its signal near a minimum, where the mean gradient vanishes, and no root
    is taken: it is a GGN estimate as it stands. For linear and convolutional layers the per-datum gradient is a sum of outer
    products over positions, and its moments come from inner products of the factors wherever that is cheaper than forming it.

    Args:
        symmetry: covers every parameter; ``symmetry.uncoupled()`` for a block-diagonal estimate.
        fisher: which output gradients; as for ``KFAC``.
        decay: factor on earlier batches; 1 weighs all batches alike.

    Raises (from ``init``):
        ValueError: if the symmetry does not cover a parameter, by name.
    """

    symmetry: Symmetry
    fisher: Fisher = MonteCarlo()
    decay: float = 1.0

    def __post_init__(self) -> None:
        check_decay("OrbitFisher", self.decay)

    def init(self, objective: Objective, params: TreeLike) -> OrbitFisherState:
        check_covered("OrbitFisher", self.symmetry, params)
        isotypic = Isotypic(self.symmetry, params)
        blocks: list[Block] = []
        if isinstance(objective.model, nn.Module):
            found, _ = find_blocks(objective.model, _untied(objective.model, params), RULES)
            blocks = [
                block
                for block in found
                if isinstance(block.rule, LinearRule | ConvRule) and block.layout.groups == 1
            ]
        sums = {
            key: torch.zeros(
                block.count,
                block.multiplicity,
                block.multiplicity,
                dtype=torch.promote_types(isotypic.space.dtype, torch.float32),
                device=isotypic.space.device,
            )
            for key, block in isotypic.blocks.items()
        }
        return OrbitFisherState(isotypic, blocks, sums)

    def update(
        self,
        state: OrbitFisherState,
        objective: Objective,
        params: TreeLike,
        batch: Batch,
        generator: torch.Generator,
    ) -> OrbitFisherState:
        state.sums = {key: self.decay * value for key, value in state.sums.items()}
        state.count = self.decay * state.count + objective.loss.count(batch.targets)
        before = generator.get_state()
        try:
            self._add_batch(state, objective, params, batch, generator)
        except LayerError:  # a layer that is called twice, say: its gradients are then formed
            generator.set_state(before)
            state.blocks = []
            self._add_batch(state, objective, params, batch, generator)
        return state

    def _add_batch(
        self,
        state: OrbitFisherState,
        objective: Objective,
        params: TreeLike,
        batch: Batch,
        generator: torch.Generator,
    ) -> None:
        with capture(objective, params, batch, state.blocks) as seen:
            output = seen.output.detach()
            chunks = list(
                self.fisher.weighted(objective.loss, output, batch.targets, batch.weights, generator)
            )
            for number, columns in enumerate(chunks):
                found = seen.gradients(columns, last=number == len(chunks) - 1) if state.blocks else {}
                self._add(state, objective, params, batch, columns, seen.seen, found)

    def read(self, state: OrbitFisherState) -> Curvature:
        if state.count == 0:
            raise ValueError(
                "OrbitFisher.read: no valid loss element has been seen; are all targets ignored, or was there no update?"
            )
        blocks = {
            key: value / (state.count * state.isotypic.blocks[key].dim) for key, value in state.sums.items()
        }
        return Commutant(state.isotypic, blocks)

    def _add(
        self,
        state: OrbitFisherState,
        objective: Objective,
        params: TreeLike,
        batch: Batch,
        columns: Tensor,
        seen: dict[str, tuple[Tensor, Tensor]],
        found: dict[str, Tensor],
    ) -> None:
        data = columns.shape[1]
        for column in range(len(columns)):
            for first in range(0, data, _CHUNK):
                piece = slice(first, first + _CHUNK)
                rows: dict[str, PartRows] = {}
                for block in state.blocks:
                    rows |= _layer_rows(
                        state.isotypic,
                        block,
                        params,
                        seen[block.name][0],
                        found[block.name][column : column + 1],
                        piece,
                    )
                rest = [part for part in self.symmetry.parts if part.key not in rows]
                if rest:
                    rows |= _general_rows(
                        state.isotypic, rest, objective, params, batch, columns[column, piece], piece
                    )
                _accumulate(state, rows)


def _untied(model: nn.Module, params: TreeLike) -> Tree:
    """Parameters that belong to one layer each; those of several go through per-datum gradients."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    single = {group[0] for group in owners.values() if len(group) == 1}
    return {name: p for name, p in params.items() if name in single}


def _accumulate(state: OrbitFisherState, rows: dict[str, PartRows]) -> None:
    """Add the moments of every pair of parts that share a kind."""
    for key, block in state.isotypic.blocks.items():
        members = list(block.columns.items())
        for i, (one, where) in enumerate(members):
            for other, there in members[i:]:
                moment = moment_of(rows[one][key], rows[other][key], key[1])
                state.sums[key][:, where, there] += moment
                if one != other:
                    state.sums[key][:, there, where] += moment.mT


def _layer_rows(
    isotypic: Isotypic, block: Block, params: TreeLike, x: Tensor, g: Tensor, piece: slice
) -> dict[str, PartRows]:
    """Rows of a layer's parts; parts whose words do not factor are formed from the same inputs and output gradients."""
    leaves = block.leaves(params)
    g = block.rule.outputs(block.module, x, g, leaves)[0, 0, piece]  # (N, T, out)
    dense = block.rule.inputs(block.module, x[piece], leaves)
    assert isinstance(dense, DenseRows)
    a = dense.values[0]  # (N, T, in [+ 1])
    rows: dict[str, PartRows] = {}
    for part in isotypic.symmetry.parts:
        if part.leaf not in block.layout.space.shapes:
            continue
        is_bias = part.leaf.rpartition(".")[2] == "bias"
        shape = block.layout.space.shapes[part.leaf]
        inputs = a[..., -1:] if is_bias else a[..., : shape[1:].numel()]
        inputs = inputs.unflatten(-1, shape[1:]) if len(shape) > 1 else inputs
        index = part.index or (slice(None),)
        inputs = inputs[(slice(None), slice(None), *index[1:])].flatten(2) if len(shape) > 1 else inputs
        outputs = g[..., index[0]]
        found = factor(isotypic, part, outputs, inputs)
        if found is None:
            gradients = (
                torch.einsum("nto,nti->noi", outputs, inputs).squeeze(-1)
                if is_bias
                else torch.einsum("nto,nti->noi", outputs, inputs)
            )
            found = materialised(isotypic, part, gradients)
        rows[part.key] = found
    return rows


def _general_rows(
    isotypic: Isotypic,
    parts: Sequence[Part],
    objective: Objective,
    params: TreeLike,
    batch: Batch,
    columns: Tensor,
    piece: slice,
) -> dict[str, PartRows]:
    """Rows of the remaining parts from per-datum gradients by vmap."""
    wanted = {part.leaf: params[part.leaf].detach() for part in parts}
    gradients = per_datum_gradients(objective, params, wanted, batch, columns, piece)
    return {part.key: materialised(isotypic, part, _sliced(part, gradients[part.leaf])) for part in parts}


def _sliced(part: Part, x: Tensor) -> Tensor:
    return x[(slice(None), *part.index)] if part.index else x


def per_datum_gradients(
    objective: Objective, params: TreeLike, wanted: Tree, batch: Batch, columns: Tensor, piece: slice
) -> dict[str, Tensor]:
    """``J_n^T s_n`` in the wanted leaves, ``(N, *leaf.shape)``."""
    fixed = tree.detach(params)

    def one(row: Tensor, column: Tensor) -> Tree:
        def output(p: Tree) -> Tensor:
            return objective.forward(fixed | p, input_rows(batch.inputs, row.reshape(1))).squeeze(0)

        pull = torch.func.vjp(output, wanted)[1]
        found: Tree = pull(column)[0]
        return found

    rows = torch.arange(len(batch.targets), device=columns.device)[piece]
    return torch.func.vmap(one)(rows, columns)
