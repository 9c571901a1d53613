"""Hypergradients by the implicit function theorem."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from weingarten import tree
from weingarten.bilevel.penalty import Penalty, PenaltyHessian
from weingarten.bilevel.problem import (
    Batches,
    Hypergradient,
    HypergradientMethod,
    Level,
    Problem,
    refuse_non_finite,
    refuse_silent_zeros,
)
from weingarten.estimators import KFAC, Estimator, estimate
from weingarten.matfun import FactoredPower, MatrixFunction
from weingarten.objective import Batch, Data, Objective, curvature_pass, gradient_twice
from weingarten.operators import GGN, Curvature, Identity, Operator
from weingarten.solvers import CG, Direct, FirstOrder, Solution, Solver
from weingarten.tree import Space, Tree, TreeLike

__all__ = ["Implicit", "ImplicitState", "mixed_product", "outer_gradients"]

ExactOperator = Callable[[Objective, Data, TreeLike], Operator]


@dataclass(frozen=True)
class ImplicitState:
    """What one call leaves for the next.

    Attributes:
        age: calls since the curvature estimate was made.
        anchor: what that estimate was made from, so that it can be made again after a restart, bit for bit.
        inverse: the estimate's inverse; None if it has to be made again from the anchor.
        last: the last inverse product, for a warm start.
    """

    age: int = 0
    anchor: Anchor | None = None
    inverse: Operator | None = None
    last: Tree | None = None


@dataclass(frozen=True)
class Anchor:
    """The arguments of a curvature estimate."""

    params: Tree
    hparams: Tree
    batch: Batch
    generator_state: torch.Tensor


@dataclass(frozen=True)
class Implicit(HypergradientMethod):
    r"""``dF/dhparams = d_hparams f - (d^2_{params hparams} g)^T q`` with ``q ~ (A + damping I)^{-1} d_params f``.

    Liao, Dangel and Yu 2026, https://arxiv.org/abs/2603.29108. The default takes the direction of q from KFAC and its length
    from one GGN product, which costs one product and removes KFAC's error in length.

    =========================  ==========================================================
    identity                   ``Implicit(solver=FirstOrder(), preconditioner=None)``
    Neumann, CG                ``Implicit(solver=Neumann(20), preconditioner=None)``
    KFAC, no product           ``Implicit(operator=KFAC(), solver=Direct(), preconditioner=None)``
    KFAC with length           ``Implicit()``
    preconditioned CG          ``Implicit(solver=CG(3))``
    exact                      ``Implicit(solver=Direct(), preconditioner=None)``
    =========================  ==========================================================

    Args:
        operator: A, either an exact operator such as ``GGN`` (default: never indefinite) or ``Hessian``, or an estimator, whose
            curvature then *is* the operator and needs the solver ``Direct``.
        solver: how the inverse product is approximated.
        preconditioner: estimator of the curvature whose damped inverse preconditions the solver; None for none.
        damping: added to the operator and the preconditioner, in units of the inner loss per squared parameter. The inner
            problem's penalty adds its own, exactly known curvature.
        refresh: the estimated curvature is made anew every so many calls and kept in between.
        warm_start: start the solver from the last call's inverse product.
        inverse: which function of the estimate: ``FactoredPower`` (default: two Cholesky factorisations per layer) or ``Power``.

    Raises (when called):
        ValueError: if an estimator is the operator and the penalty's Hessian is not a multiple of the identity; if a gradient
            is not finite; if an outer variable enters neither level, as a rate of the inner optimiser.
    """

    operator: ExactOperator | Estimator = GGN
    solver: Solver = CG(steps=1)  # noqa: RUF009 - a frozen dataclass
    preconditioner: Estimator | None = KFAC()  # noqa: RUF009 - a frozen dataclass
    damping: float = 1e-2
    refresh: int = 1
    warm_start: bool = False
    inverse: Callable[[float, float], MatrixFunction] = FactoredPower

    def __post_init__(self) -> None:
        if not self.damping >= 0 or self.refresh < 1:
            raise ValueError(
                f"Implicit: damping is {self.damping} and refresh {self.refresh}, expected damping >= 0 and refresh >= 1"
            )
        if isinstance(self.operator, Estimator) and not isinstance(self.solver, Direct):
            raise ValueError(
                f"Implicit: the operator is the estimate {type(self.operator).__name__}, expected Direct(), found {self.solver}; "
                "to iterate, pass the estimator as preconditioner and an exact operator such as GGN"
            )

    def __call__(
        self,
        problem: Problem,
        params: TreeLike,
        hparams: TreeLike,
        batches: Batches,
        state: ImplicitState | None = None,
        generator: torch.Generator | None = None,
    ) -> Hypergradient:
        start = time.perf_counter()
        params, hparams = tree.detach(params), tree.detach(hparams)
        generator = (
            torch.Generator(device=Space.of(params).device).manual_seed(0) if generator is None else generator
        )
        state = ImplicitState() if state is None else state
        loss, b, direct = outer_gradients(problem.outer, params, hparams, batches.outer)
        solution, products, state = self._inverse_product(
            problem.inner, params, hparams, batches, b, state, generator
        )
        refuse_non_finite("inverse product", solution.value)
        mixed, inner_gradient, along = _mixed_terms(
            problem.inner, params, hparams, batches.mixed, solution.value
        )
        refuse_non_finite("mixed derivative", mixed)
        refuse_silent_zeros("Implicit", problem, params, hparams, batches, direct, mixed)
        return Hypergradient(
            value=tree.sub(direct, mixed),
            direct=direct,
            inverse_product=solution.value,
            outer_loss=loss,
            inner_gradient=inner_gradient,
            outer_change=-along,
            residual=solution.residual,
            converged=solution.converged,
            negative_curvature=solution.negative_curvature,
            products=products,
            seconds=time.perf_counter() - start,
            state=state,
        )

    def _inverse_product(
        self,
        inner: Level,
        params: Tree,
        hparams: Tree,
        batches: Batches,
        b: Tree,
        state: ImplicitState,
        generator: torch.Generator,
    ) -> tuple[Solution, int, ImplicitState]:
        if isinstance(self.solver, FirstOrder):
            return self.solver.solve(Identity(Space.of(b)), b), 0, state
        estimator = self.operator if isinstance(self.operator, Estimator) else self.preconditioner
        if estimator is not None:
            state = self._refreshed(
                estimator, inner, params, hparams, batches.for_curvature, state, generator
            )
        if isinstance(self.operator, Estimator):
            assert state.inverse is not None
            q = state.inverse.apply(b)
            return Solution(q, steps=0, residual=float("nan"), converged=False), 0, state
        counted = _Counted(self._damped_operator(inner, params, hparams, batches.for_curvature))
        solver = self.solver if state.inverse is None else self.solver.preconditioned(state.inverse)
        solution = solver.solve(counted, b, state.last if self.warm_start else None)
        return solution, counted.products, replace(state, last=solution.value if self.warm_start else None)

    def _damped_operator(self, inner: Level, params: Tree, hparams: Tree, batch: Batch) -> Operator:
        assert not isinstance(self.operator, Estimator)
        with torch.no_grad():
            data = [inner.transform(hparams, batch)]
        operator = self.operator(inner.objective, data, params)
        constant, rest = _penalty_curvature(inner, params, hparams)
        operator = operator if rest is None else operator + rest
        return operator + (self.damping + constant) * Identity(operator.space)

    def _refreshed(
        self,
        estimator: Estimator,
        inner: Level,
        params: Tree,
        hparams: Tree,
        batch: Batch,
        state: ImplicitState,
        generator: torch.Generator,
    ) -> ImplicitState:
        """The state with an inverse that is at most ``refresh`` calls old."""
        if state.anchor is not None and state.age < self.refresh:
            inverse = (
                state.inverse
                if state.inverse is not None
                else self._inverse_at(estimator, inner, state.anchor)
            )
            return replace(state, age=state.age + 1, inverse=inverse)
        keep = self.refresh > 1  # otherwise nothing refers to the anchor again
        anchor = Anchor(
            params={name: p.clone() for name, p in params.items()} if keep else params,
            hparams={name: p.clone() for name, p in hparams.items()} if keep else hparams,
            batch=batch,
            generator_state=generator.get_state(),
        )
        inverse = self._inverse_at(estimator, inner, anchor, generator)
        return replace(state, age=1, anchor=anchor if keep else None, inverse=inverse)

    def _inverse_at(
        self, estimator: Estimator, inner: Level, anchor: Anchor, generator: torch.Generator | None = None
    ) -> Curvature:
        if generator is None:
            generator = torch.Generator(device=Space.of(anchor.params).device)
            generator.set_state(anchor.generator_state.cpu())  # a checkpoint may have put it on the device
        constant, rest = _penalty_curvature(inner, anchor.params, anchor.hparams)
        if rest is not None:
            if isinstance(self.operator, Estimator):
                raise ValueError(
                    f"Implicit: the penalty {inner.penalty!r} is not a known multiple of |params|^2, which "
                    f"{type(estimator).__name__} alone cannot invert; use it as preconditioner: "
                    "Implicit(solver=CG(3), preconditioner=KFAC())"
                )
            if isinstance(rest, Curvature):  # a preconditioner needs no more than its mean
                constant += float(rest.trace()) / rest.space.size
        with torch.no_grad():
            data = [inner.transform(anchor.hparams, anchor.batch)]
        curvature = estimate(estimator, inner.objective, data, anchor.params, generator)
        return curvature.map(self.inverse(-1, self.damping + constant))


class _Counted(Operator):
    """An operator that counts its products."""

    def __init__(self, operator: Operator) -> None:
        self.operator, self.products = operator, 0

    @property
    def space(self) -> Space:
        return self.operator.space

    def apply(self, v: TreeLike) -> Tree:
        self.products += 1
        return self.operator.apply(v)


def outer_gradients(outer: Level, params: Tree, hparams: Tree, batch: Batch) -> tuple[float, Tree, Tree]:
    """``f``, ``d f/dparams`` and ``d f/dhparams``.

    Raises:
        ValueError: if one of them is not finite.
    """
    params = {name: p.detach().requires_grad_() for name, p in params.items()}
    hparams = {name: h.detach().requires_grad_() for name, h in hparams.items()}
    with curvature_pass(outer.objective.model), torch.enable_grad():
        value = outer.value(params, hparams, batch)
        gradients = torch.autograd.grad(value, [*params.values(), *hparams.values()], materialize_grads=True)
    b = dict(zip(params, gradients[: len(params)], strict=True))
    direct = dict(zip(hparams, gradients[len(params) :], strict=True))
    refuse_non_finite("outer gradient", {**b, **direct})
    return float(value.detach()), b, direct


def mixed_product(inner: Level, params: Tree, hparams: Tree, batch: Batch, q: TreeLike) -> Tree:
    """``(d^2_{params hparams} g)^T q`` by one double backward with q held constant.

    Raises:
        NotImplementedError: if an operation of the inner objective has no second derivative.
    """
    return _mixed_terms(inner, params, hparams, batch, q)[0]


def _mixed_terms(
    inner: Level, params: Tree, hparams: Tree, batch: Batch, q: TreeLike
) -> tuple[Tree, float, float]:
    """:func:`mixed_product`, and what is known on the way: the length of ``d_params g``, and its product with q."""
    params = {name: p.detach().requires_grad_() for name, p in params.items()}
    hparams = {name: h.detach().requires_grad_() for name, h in hparams.items()}
    with curvature_pass(inner.objective.model), torch.enable_grad():
        value = inner.value(params, hparams, batch)
        remedy = "write the inner objective in operations that have one"
        gradient = gradient_twice("mixed_product", value, params, remedy)
        length, inner_product = float(tree.norm(tree.detach(gradient))), tree.dot(gradient, tree.detach(q))
        del gradient  # as large as the parameters, and not needed while the product is differentiated
        if not inner_product.requires_grad:  # the inner objective does not depend on the parameters
            return tree.zeros_like(tree.detach(hparams)), 0.0, 0.0
        mixed = torch.autograd.grad(inner_product, list(hparams.values()), materialize_grads=True)
    return dict(zip(hparams, mixed, strict=True)), length, float(inner_product.detach())


def _penalty_curvature(inner: Level, params: Tree, hparams: Tree) -> tuple[float, Operator | None]:
    """The multiple of the identity, and what else there is."""
    if inner.penalty is None:
        return 0.0, None
    if isinstance(inner.penalty, Penalty):
        constant = inner.penalty.isotropic(params, hparams)
        return (constant, None) if constant is not None else (0.0, inner.penalty.hessian(params, hparams))
    return 0.0, PenaltyHessian(inner.penalty, params, hparams)
