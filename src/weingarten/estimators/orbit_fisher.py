"""The orbit average of per-datum gradient moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from weingarten import tree
from weingarten.estimators.estimator import Estimator
from weingarten.estimators.layerwise import layer_pass
from weingarten.estimators.orbit import check_covered, check_decay
from weingarten.estimators.orbit_rows import PartRows, factor, materialised, moment_of
from weingarten.fisher import Fisher, MonteCarlo
from weingarten.layers import Block, ConvUse, LayerError, LinearUse, Structure
from weingarten.losses import Loss
from weingarten.objective import Batch, Objective, curvature_pass, input_rows
from weingarten.operators import Commutant, Curvature
from weingarten.symmetry.isotypic import Coordinates, Isotypic
from weingarten.symmetry.part import Part
from weingarten.symmetry.spec import Symmetry
from weingarten.tree import Tree, TreeLike

__all__ = ["OrbitFisher"]

_CHUNK = 64  # data treated together: bounds the memory of per-datum gradients where they are formed


@dataclass
class OrbitFisherState:
    """Sums of per-datum moments by kind, and the number of elements.

    Attributes:
        isotypic: the symmetry's coordinates.
        sums: by kind.
        loss: says what the number of elements divides.
        general: whether all per-datum gradients are formed, since the model's uses of its leaves could not be followed.
        structure: the data axes in the model, once known.
    """

    isotypic: Isotypic
    sums: Coordinates
    loss: Loss
    general: bool
    structure: Structure | None = None
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
        return OrbitFisherState(isotypic, sums, objective.loss, not isinstance(objective.model, nn.Module))

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
        if not state.general:
            try:
                self._add_by_use(state, objective, params, batch, generator)
            except LayerError:  # data in no order that can be told, say: gradients are then formed
                state.general = True
                generator.set_state(before)
        if state.general:
            with curvature_pass(objective.model), torch.no_grad():
                output = objective.forward(params, batch.inputs)
                for columns in self.fisher.weighted(
                    objective.loss, output, batch.targets, batch.weights, generator
                ):
                    for column in columns:
                        self._add(state, objective, params, batch, column, {})
        return state

    def _add_by_use(
        self,
        state: OrbitFisherState,
        objective: Objective,
        params: TreeLike,
        batch: Batch,
        generator: torch.Generator,
    ) -> None:
        with layer_pass(state.structure, objective, params, batch, self.fisher, generator, "OrbitFisher") as (
            state.structure,
            seen,
        ):
            inputs = {
                block: block.terms[0].inputs().formed().full()[0] for block in seen.blocks if _factored(block)
            }
            for columns, found in seen.chunks():
                outputs = {block: block.terms[0].outputs(dict(enumerate(found))) for block in inputs}
                for number, column in enumerate(columns):
                    rows = {block: (inputs[block], g[number, 0]) for block, g in outputs.items()}
                    self._add(state, objective, params, batch, column, rows)

    def read(self, state: OrbitFisherState) -> Curvature:
        if state.count == 0:
            raise ValueError(
                "OrbitFisher.read: no valid loss element has been seen; are all targets ignored, or was there no update?"
            )
        blocks = {
            key: value / (state.loss.divisor(state.count) * state.isotypic.blocks[key].dim)
            for key, value in state.sums.items()
        }
        return Commutant(state.isotypic, blocks)

    def _add(
        self,
        state: OrbitFisherState,
        objective: Objective,
        params: TreeLike,
        batch: Batch,
        column: Tensor,
        known: Mapping[Block, tuple[Tensor, Tensor]],
    ) -> None:
        """Add the moments of one column of output gradients; ``known`` holds rows of inputs and of gradients ``(N, T, ...)``."""
        for first in range(0, len(column), _CHUNK):
            piece = slice(first, first + _CHUNK)
            rows: dict[str, PartRows] = {}
            for block, (inputs, outputs) in known.items():
                rows |= _layer_rows(state.isotypic, block, inputs[piece], outputs[piece])
            rest = [part for part in self.symmetry.parts if part.key not in rows]
            if rest:
                rows |= _general_rows(state.isotypic, rest, objective, params, batch, column[piece], piece)
            _accumulate(state, rows)


def _factored(block: Block) -> bool:
    """Whether the per-datum gradients are sums of outer products of one matrix, stored as (out, in)."""
    if len(block.terms) > 1 or block.layout.groups > 1 or block.layout.transposed:
        return False
    return all(isinstance(use, LinearUse | ConvUse) for use in block.terms[0].uses.values())


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


def _layer_rows(isotypic: Isotypic, block: Block, a: Tensor, g: Tensor) -> dict[str, PartRows]:
    """Rows of a layer's parts, from inputs ``(N, T, in [+ 1])`` and output gradients ``(N, T, out)``.

    Parts whose words do not factor are formed from them.
    """
    roles = dict(zip(block.layout.space.shapes, block.terms[0].roles, strict=True))
    rows: dict[str, PartRows] = {}
    for part in isotypic.symmetry.parts:
        if part.leaf not in block.layout.space.shapes:
            continue
        is_bias = roles[part.leaf] == "bias"
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
            alone = input_rows(batch.inputs, row.reshape(1), len(batch.targets))
            return objective.forward(fixed | p, alone).squeeze(0)

        pull = torch.func.vjp(output, wanted)[1]
        found: Tree = pull(column)[0]
        return found

    rows = torch.arange(len(batch.targets), device=columns.device)[piece]
    return torch.func.vmap(one)(rows, columns)
