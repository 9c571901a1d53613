"""Kronecker-factored approximate curvature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weingarten.estimators.estimator import Estimator
from weingarten.estimators.factors import Factors, KFACState, check_finite
from weingarten.estimators.layerwise import LayerPass, Positions, Thinning, layer_pass
from weingarten.estimators.remaining import Remaining
from weingarten.fisher import Fisher, MonteCarlo
from weingarten.layers import Block, Capture, Expand, Sharing, Term, factor_type
from weingarten.layers.rows import output_moment
from weingarten.objective import Batch, Objective
from weingarten.operators import BlockDiagonal, Curvature, Kronecker, common_eigenbasis
from weingarten.tree import Tree, TreeLike

__all__ = ["KFAC"]


@dataclass(frozen=True)
class KFAC(Estimator):
    r"""Per layer, ``G = (1/M) sum_n w_n g_n g_n^T  (x)  A = sum_r w_r a_r a_r^T / sum_r w_r`` (Martens and Grosse 2015).

    ``a`` are layer inputs with a one for the bias, ``g`` gradients of the loss in the layer's output. An approximation to the
    GGN, exact for one datum and for deep linear networks with squared error. https://arxiv.org/abs/1503.05671

    A layer is any call that applies parameters to an activation: matrix products, convolutions, embeddings, gains and shifts,
    whatever the module around it. A weight that is used several times has the rows of all its uses; where it serves as table
    *and* as matrix (tied embeddings) the two Kronecker products are added in the eigenbasis of their mean. Rows of positions
    that no loss depends on (padding, ignored labels) are left out of both factors, and rows of inputs carry the weights of
    their data, so that both means run over what counts.

    Args:
        fisher: which output gradients: ``MonteCarlo(1)`` by default (one backward pass, unbiased), ``Exact()``, ``Empirical()``.
        sharing: positions within a datum: ``Expand()`` (default: right for losses at every position) or ``Reduce()``.
        decay: factor on all earlier sums at each batch; 1 (default) weighs all batches alike, 0.95 is an exponential average.
        otherwise: estimator for parameters used in other ways, such as ``Diagonal()``; by default they are refused by name.
        widest: longest side of a layer that gets a whole factor; longer ones (a vocabulary) get its diagonal. The default,
            8,192, is a factor of 268 MB in float32.
        dtype: type in which factors are summed and kept; by default the activations' type, float32 for half precision.
        rows: about how many rows of each layer enter its factors per batch, evenly spaced from a random start; all by default.
            Output factors stay unbiased; both get noisier.

    Raises (from ``init``):
        TypeError: if the model is a function, in which no parameters can be followed.

    Raises (from ``update``):
        ValueError: parameters that are unused, or used in a way that is not understood, by name.
    """

    fisher: Fisher = MonteCarlo()
    sharing: Sharing = Expand()
    decay: float = 1.0
    otherwise: Estimator | None = None
    widest: int = 8192
    dtype: torch.dtype | None = None
    rows: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ValueError(f"KFAC: decay is {self.decay}, expected a number in (0, 1]")
        if self.widest < 1:
            raise ValueError(f"KFAC: widest is {self.widest}, expected >= 1")
        if self.rows is not None and (self.rows < 1 or not isinstance(self.sharing, Expand)):
            raise ValueError(
                f"KFAC: rows is {self.rows} with {self.sharing}, expected >= 1 with Expand(), where each position is a row"
            )

    def init(self, objective: Objective, params: TreeLike) -> KFACState:
        check_model(objective, params, "KFAC")
        return KFACState(list(params), objective.loss, Remaining("KFAC", self.otherwise))

    def update(
        self,
        state: KFACState,
        objective: Objective,
        params: TreeLike,
        batch: Batch,
        generator: torch.Generator,
    ) -> KFACState:
        self._pass(state, objective, params, batch, generator, gradient=False)
        return state

    def step(
        self,
        state: KFACState,
        objective: Objective,
        params: TreeLike,
        batch: Batch,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tree]:
        """As :meth:`update`, with the loss and its gradient from the same forward pass: for use inside a training step.

        The model runs in the mode it is in (dropout included, if it trains); ``state`` is updated in place.

        Returns:
            The loss of the batch, a 0-d tensor, and its gradient in ``params``.
        """
        return self._pass(state, objective, params, batch, generator, gradient=True)

    def _pass(
        self,
        state: KFACState,
        objective: Objective,
        params: TreeLike,
        batch: Batch,
        generator: torch.Generator,
        gradient: bool,
    ) -> tuple[Tensor, Tree]:
        """Take a batch in, with or without the gradient of the loss."""
        with layer_pass(
            state.structure,
            objective,
            params,
            batch,
            self.fisher,
            generator,
            state.remaining.call,
            training=gradient,
        ) as (state.structure, seen):
            state.remaining.check(seen.left)
            result: tuple[Tensor, Tree] = torch.tensor(torch.nan), {}
            if gradient:
                result = loss_and_gradient(objective, seen.seen, batch)
            found = self._factors(seen, generator)
        state.check(found)
        state.remaining.update(seen.left, objective, params, batch, generator)
        state.add(
            found, self.decay, objective.loss.count(batch.targets)
        )  # last: an error before leaves the sums as they were
        return result

    def read(self, state: KFACState) -> Curvature:
        if state.count == 0:
            raise ValueError(
                "KFAC.read: no valid loss element has been seen; are all targets ignored, or was there no update?"
            )
        return BlockDiagonal([*self.blocks(state), *state.remaining.read()], state.order)

    def blocks(self, state: KFACState) -> list[Curvature]:
        """The curvature of each block."""
        found: list[Curvature] = []
        for name, layout in state.layouts.items():
            check_finite(name, state.factors[name])
            terms = [sums.means(state.loss.divisor(state.count)) for sums in state.factors[name]]
            sides = [
                (a, b) if turned else (b, a)
                for (a, b), turned in zip(terms, state.flipped[name], strict=True)
            ]
            if len(sides) == 1:
                found.append(Kronecker(layout, sides[0][1], sides[0][0]))
            else:
                found.append(common_eigenbasis(layout, [(factor_type(b), factor_type(a)) for b, a in sides]))
        return found

    def _factors(self, seen: LayerPass, generator: torch.Generator) -> dict[Block, list[Factors]]:
        """The factors of one batch, by block and term."""
        thin = Thinning.drawn(self.rows, generator)
        outputs: dict[Term, Tensor] = {}
        positions: dict[Term, Positions] = {}

        def consume(block: Block, gradients: list[Tensor]) -> None:
            for term, g in zip(block.terms, gradients, strict=True):
                dense = not self._diagonal(block, g.shape[-1], left=not term.flipped)
                kept, share = thin.gradients(g)
                moment = output_moment(self.sharing, kept, dense)
                moment = moment if share == 1 else moment / share
                outputs[term] = outputs[term] + moment if term in outputs else moment
                positions.setdefault(term, Positions(g.shape[1:4], g.dtype)).see(g)

        seen.backward(consume)
        shared: list[tuple[object, Tensor | None, tuple[Tensor, Tensor]]] = []
        found: dict[Block, list[Factors]] = {}
        for block in seen.blocks:
            found[block] = []
            for term in block.terms:
                inputs = self._inputs(block, term, positions[term].weights(seen.weights), thin, shared)
                moment, number = (_each(x, block.layout.groups) for x in inputs)
                factors = Factors(moment, number, outputs[term])
                found[block].append(factors if self.dtype is None else factors.to(self.dtype))
        return found

    def _inputs(
        self,
        block: Block,
        term: Term,
        weights: Tensor | None,
        thin: Thinning,
        shared: list[tuple[object, Tensor | None, tuple[Tensor, Tensor]]],
    ) -> tuple[Tensor, Tensor]:
        """The moment of a term's inputs, taken once for terms with the same inputs (query, key and value, say)."""
        rows = term.inputs()
        dense = not self._diagonal(block, rows.width, left=term.flipped)
        source = term.source()
        for other, used, result in shared if source is not None else []:
            if other == (source, dense) and _same(used, weights):
                return result
        result = thin.moment(rows, self.sharing, weights, dense)
        shared.append(((source, dense), weights, result))
        return result

    def _diagonal(self, block: Block, width: int, left: bool) -> bool:
        """Whether a side of the block has a diagonal factor: if it is too wide, or numbers the rows of a table."""
        return width > self.widest or any(term.table and term.flipped == left for term in block.terms)


def check_model(objective: Objective, params: TreeLike, call: str) -> None:
    """Refuse functions, and parameters that the model does not have."""
    if not isinstance(objective.model, nn.Module):
        raise TypeError(
            f"{call}: the model is a function, expected an nn.Module whose parameters can be followed; use wg.Diagonal or wg.GGN"
        )
    names = {name for name, _ in objective.model.named_parameters()}
    aliases = {name for name, _ in objective.model.named_parameters(remove_duplicate=False)}
    for name in params:
        if name not in names:
            which = (
                "is a second name of a tied parameter" if name in aliases else "does not exist in the model"
            )
            raise ValueError(f"{call}: parameter {name!r} {which}, expected one of its named_parameters()")


def loss_and_gradient(objective: Objective, seen: Capture, batch: Batch) -> tuple[Tensor, Tree]:
    """The loss of a forward pass and its gradient; the graph stays."""
    loss = objective.loss
    value = loss.total(seen.output, batch.targets, batch.weights) / loss.divisor(loss.count(batch.targets))
    found = torch.autograd.grad(value, list(seen.leaves.values()), retain_graph=True, materialize_grads=True)
    return value.detach(), dict(zip(seen.leaves, found, strict=True))


def _each(x: Tensor, groups: int) -> Tensor:
    """What is the same for all groups, for each of them."""
    return x if len(x) == groups else x.expand(groups, *x.shape[1:])


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)
