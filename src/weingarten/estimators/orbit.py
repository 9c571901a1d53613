"""Curvature from the symmetry of the loss: orbit averages of one gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from weingarten import tree
from weingarten.estimators.estimator import Estimator
from weingarten.losses import Loss
from weingarten.matfun import Power, evaluate, mean_of
from weingarten.objective import Batch, Objective, curvature_pass
from weingarten.operators import Commutant, Curvature, gram
from weingarten.symmetry.isotypic import Coordinates, Isotypic
from weingarten.symmetry.spec import Symmetry
from weingarten.tree import Tree, TreeLike

__all__ = ["Orbit", "OrbitSecant", "OrbitState", "check_covered", "check_decay"]


@dataclass
class OrbitState:
    """What has been seen.

    Attributes:
        isotypic: the coordinates.
        params: where the curvature is taken.
        loss: says what the number of elements divides.
        gradient: that of the sum over all elements; for estimates from the gradient of all data.
        count: the number of these elements, or the sum of their class weights.
        grams: exponential sum of the batches' ``V^T V / dim``, and its total weight; for averages over steps.
        weight: total weight of ``grams``.
    """

    isotypic: Isotypic
    params: Tree
    loss: Loss
    gradient: Tree | None = None
    count: float = 0.0
    grams: Coordinates | None = None
    weight: float = 0.0


class _GradientEstimator(Estimator):
    """Estimators that see nothing but gradients of the loss."""

    symmetry: Symmetry
    decay: float | None

    def init(self, objective: Objective, params: TreeLike) -> OrbitState:
        check_covered(type(self).__name__, self.symmetry, params)
        return OrbitState(Isotypic(self.symmetry, params), tree.detach(params), objective.loss)

    def update(
        self,
        state: OrbitState,
        objective: Objective,
        params: TreeLike,
        batch: Batch,
        generator: torch.Generator,
    ) -> OrbitState:
        gradient, count = total_gradient(objective, params, batch)
        if self.decay is None:
            state.gradient = gradient if state.gradient is None else tree.add(state.gradient, gradient)
            state.count += count
            return state
        new = gram(state.isotypic, _coordinates(state, tree.scale(1 / state.loss.divisor(count), gradient)))
        old = state.grams
        state.grams = (
            new if old is None else {key: self.decay * old[key] + block for key, block in new.items()}
        )
        state.weight = self.decay * state.weight + 1.0
        return state

    def moment(self, state: OrbitState) -> Coordinates:
        """``S_g``: uncentred, so that the invariant part of the gradient keeps its place in the all-trivial block."""
        if state.grams is not None:
            return {key: block / state.weight for key, block in state.grams.items()}
        if state.gradient is None or state.count == 0:
            raise ValueError(
                f"{type(self).__name__}.read: no valid loss element has been seen; are all targets ignored, or was there no "
                "update?"
            )
        gradient = tree.scale(1 / state.loss.divisor(state.count), state.gradient)
        return gram(state.isotypic, _coordinates(state, gradient))


@final
@dataclass(frozen=True)
class Orbit(_GradientEstimator):
    r"""``H_g = R2(g, g)^{1/2}``: the orbit average of a gradient, made a Hessian estimate by the secant condition.

    ``g = H (w - w*)`` on every point of the orbit; with ``S_w`` proportional to the identity, ``S_g ~ H S_w H`` gives
    ``H ~ S_g^{1/2}`` up to scale (Artemev et al. 2026, eq. 11, https://arxiv.org/abs/2606.00442). It needs a gradient that
    carries signal: near a minimum use averages over steps or :class:`OrbitFisher`.

    Centring matters on the all-trivial block alone, where the centred moment is zero; there the uncentred one is used.

    Args:
        symmetry: covers every parameter; ``symmetry.uncoupled()`` for a block-diagonal estimate.
        decay: None (default) takes one moment of the mean gradient of all data; a number in (0, 1] makes every batch a step
            and averages the moments with that factor on earlier ones.

    Raises (from ``init``):
        ValueError: if the symmetry does not cover a parameter, by name.
    """

    symmetry: Symmetry
    decay: float | None = None

    def __post_init__(self) -> None:
        check_decay("Orbit", self.decay)

    def read(self, state: OrbitState) -> Curvature:
        blocks = {key: evaluate(Power(0.5), block) for key, block in self.moment(state).items()}
        return Commutant(state.isotypic, blocks)


@final
@dataclass(frozen=True)
class OrbitSecant(_GradientEstimator):
    r"""``H_pd = S_w^{-1} # S_g``: the one positive semi-definite H with ``H S_w H = S_g`` (eq. 10 of the same source).

    ``S_w`` is the moment of the parameters and often rank-deficient: a multiple of its mean eigenvalue is added on every
    block. The all-trivial block uses uncentred moments, as in :class:`Orbit`.

    Args:
        symmetry: covers every parameter.
        decay: as for :class:`Orbit`.
        floor: what is added to ``S_w``, relative to the mean eigenvalue of the block; 1 where that is zero.

    Raises (from ``init``):
        ValueError: if the symmetry does not cover a parameter, by name.
    """

    symmetry: Symmetry
    decay: float | None = None
    floor: float = 1e-3

    def __post_init__(self) -> None:
        check_decay("OrbitSecant", self.decay)
        if not self.floor >= 0:
            raise ValueError(f"OrbitSecant: floor is {self.floor}, expected >= 0")

    def read(self, state: OrbitState) -> Curvature:
        weights = gram(state.isotypic, _coordinates(state, state.params))
        blocks = {}
        for key, block in self.moment(state).items():
            mean = weights[key].diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
            identity = torch.eye(block.shape[-1], dtype=block.dtype, device=block.device)
            floor = torch.where(mean > 0, self.floor * mean, 1.0)
            blocks[key] = mean_of(evaluate(Power(-1), weights[key] + floor * identity), block)
        return Commutant(state.isotypic, blocks)


def _coordinates(state: OrbitState, values: TreeLike) -> Coordinates:
    """In float32 at least, in which matrices can be decomposed."""
    found = state.isotypic.gather(values)
    return {key: u.to(torch.promote_types(u.dtype, torch.float32)) for key, u in found.items()}


def check_decay(call: str, decay: float | None) -> None:
    """Raise a ``ValueError`` for a factor that is no average."""
    if decay is not None and not 0 < decay <= 1:
        raise ValueError(f"{call}: decay is {decay}, expected a number in (0, 1]")


def total_gradient(objective: Objective, params: TreeLike, batch: Batch) -> tuple[Tree, float]:
    """Gradient of ``sum_n w_n l_n`` and M, see :meth:`Loss.count`; evaluation mode, nothing left on the model.

    Raises:
        ValueError: if the gradient of a leaf is not finite.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    with curvature_pass(objective.model), torch.enable_grad():
        value = objective.loss.total(objective.forward(leaves, batch.inputs), batch.targets, batch.weights)
        found = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    for name, g in zip(leaves, found, strict=True):
        if not torch.isfinite(g).all():
            raise ValueError(
                f"Orbit: the gradient of {name!r} is not finite; look for NaN or inf in the data or the loss"
            )
    return dict(zip(leaves, found, strict=True)), objective.loss.count(batch.targets)


def check_covered(call: str, symmetry: Symmetry, params: TreeLike) -> None:
    """Raise a ``ValueError`` that names the parameters that a symmetry does not speak of, or speaks of in vain."""
    missing = [name for name in params if name not in symmetry.leaves()]
    extra = [name for name in symmetry.leaves() if name not in params]
    if missing or extra:
        raise ValueError(
            f"{call}: the symmetry does not cover {missing} and names {extra} that are no parameters; add words for them "
            "('.' for free axes), or use symmetry.restrict(...) and freeze the rest"
        )
