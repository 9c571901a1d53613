"""Kronecker-factored approximate curvature."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weingarten.estimators.estimator import Estimator
from weingarten.fisher import Fisher, MonteCarlo
from weingarten.layers import RULES, Block, Expand, Sharing, capture, factor_type, find_blocks
from weingarten.layers.rows import gram
from weingarten.objective import Batch, Objective
from weingarten.operators import BlockDiagonal, Curvature, Kronecker
from weingarten.tree import TreeLike

__all__ = ["KFAC", "KFACState"]


@dataclass
class KFACState:
    """Running sums of the factors.

    Attributes:
        blocks: the layers, in the model's order.
        inputs: sum of outer products of input rows by block, and ``rows`` how many.
        outputs: sum of outer products of output gradients by block, and ``count`` how many valid loss elements.
        order: the leaves in the order of the parameters.
        rest: the state of the estimator of the remaining leaves, and which leaves they are.
    """

    blocks: list[Block]
    order: list[str]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, float] = field(default_factory=dict)
    count: float = 0.0
    rest: Any = None
    rest_names: list[str] = field(default_factory=list)

    def decay(self, factor: float) -> None:
        """Forget: multiply all sums by ``factor``."""
        if factor == 1:
            return
        for sums in (self.inputs, self.outputs, self.rows):
            for name in sums:
                sums[name] = sums[name] * factor  # type: ignore[assignment]
        self.count *= factor


@dataclass(frozen=True)
class KFAC(Estimator):
    r"""Per layer, ``G = (1/M) sum_n w_n g_n g_n^T  (x)  A = (1/R) sum_r a_r a_r^T`` (Martens and Grosse 2015).

    ``a`` are layer inputs with a one for the bias, ``g`` gradients of the loss in the layer's output. An approximation to the
    GGN, exact for one datum and for deep linear networks with squared error. https://arxiv.org/abs/1503.05671

    Args:
        fisher: which output gradients: ``MonteCarlo(1)`` by default (one backward pass, unbiased), ``Exact()``, ``Empirical()``.
        sharing: positions within a datum: ``Expand()`` (default: right for losses at every position) or ``Reduce()``.
        decay: factor on all earlier sums at each batch; 1 (default) weighs all batches alike, 0.95 is an exponential average.
        otherwise: estimator for parameters of layers without a rule, such as ``Diagonal()``; by default they are refused by name.

    Raises (from ``init``):
        TypeError: if the model is a function, in which no layers can be found.
        ValueError: tied parameters or layers without a rule, by name.
    """

    fisher: Fisher = MonteCarlo()
    sharing: Sharing = Expand()
    decay: float = 1.0
    otherwise: Estimator | None = None

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ValueError(f"KFAC: decay is {self.decay}, expected a number in (0, 1]")

    def init(self, objective: Objective, params: TreeLike) -> KFACState:
        if not isinstance(objective.model, nn.Module):
            raise TypeError(
                "KFAC: the model is a function, expected an nn.Module whose layers can be found; use wg.Diagonal or wg.GGN"
            )
        blocks, leftover = find_blocks(objective.model, params, RULES)
        state = KFACState(blocks, list(params), rest_names=list(leftover))
        if leftover:
            if self.otherwise is None:
                listing = "; ".join(f"{name!r} ({reason})" for name, reason in leftover.items())
                raise ValueError(f"KFAC: cannot treat {listing}; freeze them or pass otherwise=wg.Diagonal()")
            state.rest = self.otherwise.init(objective, params)
        return state

    def update(
        self,
        state: KFACState,
        objective: Objective,
        params: TreeLike,
        batch: Batch,
        generator: torch.Generator,
    ) -> KFACState:
        state.decay(self.decay)
        if state.blocks:
            self._update_factors(state, objective, params, batch, generator)
        state.count += objective.loss.count(batch.targets)
        if self.otherwise is not None and state.rest is not None:
            state.rest = self.otherwise.update(state.rest, objective, params, batch, generator)
        return state

    def read(self, state: KFACState) -> Curvature:
        if state.count == 0:
            raise ValueError(
                "KFAC.read: no valid loss element has been seen; are all targets ignored, or was there no update?"
            )
        check_finite(state)
        blocks: list[Curvature] = [
            Kronecker(
                block.layout,
                state.inputs[block.name] / (state.rows[block.name] or 1),
                state.outputs[block.name] / state.count,
            )
            for block in state.blocks
        ]
        return BlockDiagonal([*blocks, *self.read_rest(state)], state.order)

    def read_rest(self, state: KFACState) -> list[Curvature]:
        """The remaining leaves' curvature as a list of one, or of none."""
        if self.otherwise is None or state.rest is None:
            return []
        return [restrict(self.otherwise.read(state.rest), state.rest_names)]

    def _update_factors(
        self,
        state: KFACState,
        objective: Objective,
        params: TreeLike,
        batch: Batch,
        generator: torch.Generator,
    ) -> None:
        with capture(objective, params, batch, state.blocks) as seen:
            for block in state.blocks:
                x, _ = seen.seen[block.name]
                rows = block.rule.inputs(block.module, factor_type(x), block.leaves(params))
                moment, number = rows.moment(self.sharing)
                state.inputs[block.name] = _plus(state.inputs.get(block.name), moment)
                state.rows[block.name] = state.rows.get(block.name, 0) + number
            for block, g in backward(seen, objective, params, batch, state.blocks, self.fisher, generator):
                moment = gram(self.sharing.outputs(g))
                state.outputs[block.name] = _plus(state.outputs.get(block.name), moment)


def backward(
    seen: Any,
    objective: Objective,
    params: TreeLike,
    batch: Batch,
    blocks: list[Block],
    fisher: Fisher,
    generator: torch.Generator,
) -> Any:
    """Yield ``(block, rows of output gradients)`` for every chunk of columns and every block."""
    output = seen.output.detach()
    if not torch.isfinite(output).all():
        for name, (x, z) in seen.seen.items():
            for kind, value in (("input", x), ("output", z)):
                if not torch.isfinite(value).all():
                    raise ValueError(
                        f"KFAC: the {kind} of layer {name!r} is not finite; look for NaN or inf in the data and the parameters"
                    )
    chunks = list(fisher.weighted(objective.loss, output, batch.targets, batch.weights, generator))
    for number, columns in enumerate(chunks):
        found = seen.gradients(columns, last=number == len(chunks) - 1)
        for block in blocks:
            x, _ = seen.seen[block.name]
            yield (
                block,
                block.rule.outputs(
                    block.module, factor_type(x), factor_type(found[block.name]), block.leaves(params)
                ),
            )


def restrict(curvature: Curvature, names: list[str]) -> Curvature:
    """The part of a curvature of independent leaves that belongs to ``names``."""
    blocks = curvature.blocks if isinstance(curvature, BlockDiagonal) else (curvature,)
    kept = [block for block in blocks if set(block.space.shapes) <= set(names)]
    found = {name for block in kept for name in block.space.shapes}
    if found != set(names):
        raise ValueError(
            f"KFAC: the estimator passed as otherwise= couples {sorted(set(names) - found)} with other parameters, "
            "expected independent ones"
        )
    return BlockDiagonal(kept, names)


def check_finite(state: KFACState) -> None:
    """Raise a ``ValueError`` that names the first layer with a factor that is not finite."""
    for kind, sums in (("input", state.inputs), ("output-gradient", state.outputs)):
        for name, value in sums.items():
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"KFAC: the {kind} factor of layer {name!r} is not finite; look for NaN or inf in the data or the loss"
                )


def _plus(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term
