"""The optimiser that knows a model's symmetry."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor, nn

from weingarten.optim.adapted import adapted
from weingarten.optim.choice import Choice
from weingarten.optim.parameters import (
    check_state,
    dense_gradients,
    named_groups,
    not_finite,
    restored,
    saved_by_name,
    tied_names,
)
from weingarten.optim.roots import due, factorise
from weingarten.optim.routes import Chooser, Route, described, routes_of, state_like
from weingarten.optim.scaling import AdamWScale, Scaling
from weingarten.symmetry import Symmetry
from weingarten.tree import Tree

__all__ = ["NonFiniteGradientError", "Symo"]

_KEPT = ("damping", "nesterov", "of_momentum", "refresh", "scaling", "skip_nonfinite", "skipped", "raised")
_PLAN = ("routes", "_group", "_params")


class NonFiniteGradientError(ValueError):
    """A gradient is NaN, infinite, or so large that its square is."""


@final
class Symo(torch.optim.Optimizer):
    r"""Adam in a basis that follows from the model's symmetry; with other groups Muon, Shampoo, SOAP and Adam on the same code.

    The loss does not change when hidden units are permuted, their signs flipped, heads rotated. Such a group says what an average
    of gradients can look like, and so the form of a preconditioner (Artemev et al. 2026, https://arxiv.org/abs/2606.00442).
    With ``g`` the gradient, per step::

        m <- b1 m + (1 - b1) g,     u = b1 m + (1 - b1) g  (Nesterov), both divided by their total weight
        w <- (1 - lr weight_decay) w - lr scaling(direction)

    By default the group is inferred, and freed on axes up to ``max_block`` (the residual stream). :class:`Adapted` flips signs in
    the basis that is left: wide hidden layers keep theirs, heads and free axes get the eigenbasis ``Q`` of ``E[g g^T]``::

        v <- b2 v + (1 - b2) (Q^T g)^2,     direction = Q (Q^T u / (sqrt(v) + eps))

    Given a ``Symmetry``, it takes the whole inverse root of the orbit-averaged moment, one block ``S`` for each kind::

        S <- b2 S + (1 - b2) V^T V / dim,   direction = u (S + damping (tr S / size) I)^{-1/2},    V the coordinates of g

    Every parameter takes exactly one route: a block, or AdamW where nothing acts on it (embeddings, heads, gains, and by default
    biases); ``print(optimizer)`` shows which. The state is float32 at least, whatever the parameters' type.

    Args:
        params: a model, named parameters, or groups of them: dicts with ``params`` a list of (name, tensor), and ``lr``,
            ``weight_decay``, ``betas``, ``adamw_betas`` or ``eps`` of their own. Frozen parameters of a model are left out.
        lr: learning rate. Default 1e-3, AdamW's.
        symmetry: None infers it from ``params``, a model, and ``example_inputs``: ``adapted(...)``. Else a
            ``Symmetry`` over all parameters (coupled by component unless it says otherwise; ``.`` on every axis means AdamW), a
            ``Choice`` for all weights with two axes or more, or a function from name and tensor to one (None: AdamW).
        example_inputs: of the model, to trace it.
        max_block: of an inferred symmetry, see :func:`adapted`.
        betas: decay of momentum and moment in blocks. Default (0.9, 0.95), as AdamW's for language models; Muon's is (0.95, 0).
        adamw_betas: the same for AdamW. Default (0.9, 0.95), usual for language models.
        eps: added to roots of single entries, in units of the gradient. Default 1e-8, AdamW's.
        damping: of blocks, relative to their mean eigenvalue. Default 1e-3: no direction is lengthened more than 32 times against
            the mean one, also where the moment does not have full rank yet.
        weight_decay: decoupled (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101). Default 0.01, AdamW's.
        nesterov: whether a block's step looks ahead. Default True, as in Muon; AdamW's never does.
        of_momentum: whether blocks average moments of ``u`` rather than of ``g``. Default False; True for Muon.
        refresh: factorise every so many steps, and at steps 1, 2, 4, ... before that. Default 10, so that it costs a tenth.
        scaling: of steps in blocks. Default ``AdamWScale()``: AdamW's learning rate and schedule carry over.
        skip_nonfinite: leave out a step whose gradient is not finite, and count it. Default False: raise.

    Attributes:
        routes: of all parameters.
        skipped: steps left out for a gradient that was not finite.
        raised: matrices that could not be factorised with ``damping``, and got more.

    Raises:
        ValueError: for a hyperparameter out of range, parameters without names or without a route, a symmetry that does not fit,
            a tied parameter in a block whose symmetry was not inferred.

    >>> model = nn.Sequential(nn.Linear(3, 8, bias=False), nn.Tanh(), nn.Linear(8, 2, bias=False))
    >>> optimizer = Symo(model, lr=1e-2, example_inputs=torch.ones(2, 3))
    >>> print(optimizer)
    route    parameter  shape  moment
    block 0  0.weight   8 x 3  entry by entry in eigenbases of 3
    block 1  2.weight   2 x 8  entry by entry in eigenbases of 2
    >>> model(torch.ones(2, 3)).square().mean().backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: nn.Module | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        symmetry: Symmetry | Choice | Chooser | None = None,
        *,
        example_inputs: Any = None,
        max_block: int | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        damping: float = 1e-3,
        weight_decay: float = 0.01,
        nesterov: bool = True,
        of_momentum: bool = False,
        refresh: int = 10,
        scaling: Scaling = AdamWScale(),  # noqa: B008 - a frozen value
        skip_nonfinite: bool = False,
    ) -> None:
        if not 0 <= damping < float("inf"):
            raise ValueError(f"Symo: damping is {damping}, expected a finite number >= 0")
        if refresh < 1:
            raise ValueError(f"Symo: refresh is {refresh}, expected >= 1")
        self.damping, self.nesterov, self.of_momentum = damping, nesterov, of_momentum
        self.refresh, self.scaling, self.skip_nonfinite = refresh, scaling, skip_nonfinite
        self.skipped = self.raised = 0
        inferred = symmetry is None
        if symmetry is None:
            if not isinstance(params, nn.Module) or example_inputs is None:
                raise ValueError(
                    "Symo: to infer the symmetry, pass a model and example_inputs; else pass symmetry=, a Symmetry or a choice "
                    "such as OneSide()"
                )
            symmetry = adapted(params, example_inputs, max_block)
        elif example_inputs is not None or max_block is not None:
            raise ValueError(
                "Symo: example_inputs and max_block belong to an inferred symmetry, but symmetry= is given; pass one or the "
                "other, or symmetry=adapted(model, example_inputs, max_block)"
            )
        self.routes: list[Route] = []
        defaults = {
            "lr": lr,
            "betas": betas,
            "adamw_betas": adamw_betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(named_groups(params), defaults)
        self._group = {name: i for i, group in enumerate(self.param_groups) for name in group["param_names"]}
        self._params: Tree = {
            name: p
            for group in self.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)
        }
        self.routes = routes_of(symmetry, {name: state_like(p) for name, p in self._params.items()})
        self._check_routes({} if inferred else tied_names(params))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Called by the constructor alone.

        Raises:
            ValueError: later, since routes are fixed then; and for hyperparameters out of range.
        """
        if self.routes:
            raise ValueError(
                "Symo.add_param_group: the routes of the parameters are fixed; construct a new Symo over all of them"
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for key in ("lr", "eps", "weight_decay"):
            if not 0 <= group[key] < float("inf"):
                raise ValueError(f"Symo: {key} is {group[key]}, expected a finite number >= 0")
        for key in ("betas", "adamw_betas"):
            if len(group[key]) != 2 or not all(0 <= beta < 1 for beta in group[key]):
                raise ValueError(f"Symo: {key} are {group[key]}, expected two numbers in [0, 1)")

    def _check_routes(self, tied: dict[str, list[str]]) -> None:
        for route in self.routes:
            groups = {self._group[name] for name in route.leaves}
            for key in ("betas", "eps"):
                if len(found := {str(self.param_groups[i][key]) for i in groups}) > 1:
                    raise ValueError(
                        f"Symo: {list(route.leaves)} share a block, but their groups have {key} {sorted(found)}; give them one"
                    )
            for name in route.leaves:
                if name in tied and not route.adamw:
                    raise ValueError(
                        f"Symo: {name!r} is tied to {tied[name]} and would be in a block that knows one of its uses; route it to "
                        "AdamW, or let the symmetry be inferred"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step from the parameters' ``grad``; clip and accumulate before it.

        Args:
            closure: clears gradients, computes the loss, calls ``backward``, and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            NonFiniteGradientError: for a gradient that is not finite, unless ``skip_nonfinite``; nothing has changed then.
            ValueError: for a parameter that has not had a gradient by its first step, or has a sparse or complex one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = self._gradients()
        if gradients is None:
            return loss
        routes = [route for route in self.routes if any(name in gradients for name in route.leaves)]
        moves, tasks = [], []
        for route in routes:
            state = self._state(route)
            own = {
                name: gradients[name]
                if name in gradients
                else torch.zeros_like(self.state[self._params[name]]["momentum"])
                for name in route.leaves
            }
            direction = self._direction(route, state, own)
            measured = direction if self.of_momentum and not route.adamw else own
            route.moment.accumulate(state, measured, self._betas(route)[1])
            moves.append((route, state, direction, measured))
            if due(state["step"], self.refresh):
                tasks += route.moment.tasks(state)
        self.raised += factorise(tasks, self.damping)
        for route, state, direction, measured in moves:
            route.moment.measure(state, measured, self._betas(route)[1])
            eps = self.param_groups[self._group[route.leaves[0]]]["eps"]
            for name, u in route.moment.precondition(state, direction, eps).items():
                if name in gradients:
                    if not route.adamw:
                        u = self.scaling(u, self._adam_rms(route, name, direction[name], u, eps))
                    self._move(name, u)
        return loss

    def _adam_rms(self, route: Route, name: str, direction: Tensor, found: Tensor, eps: float) -> Tensor:
        if not self.scaling.of_adam:
            return direction.new_ones(())
        if not route.needs_squares(self.scaling):
            return found.square().mean().sqrt()
        weight = self.state[self._params[route.leaves[0]]]["square_weight"]
        root = (self.state[self._params[name]]["square"] / weight).sqrt_()
        return (direction / root.add_(eps)).square_().mean().sqrt()

    def _betas(self, route: Route) -> tuple[float, float]:
        group = self.param_groups[self._group[route.leaves[0]]]
        return group["adamw_betas"] if route.adamw else group["betas"]

    def _state(self, route: Route) -> dict[str, Any]:
        """The route's state, with the first parameter; made at the first step."""
        state: dict[str, Any] = self.state[self._params[route.leaves[0]]]
        if not state:
            state |= {"step": 0, "momentum_weight": 0.0, "square_weight": 0.0}
            device = self._params[
                route.leaves[0]
            ].device  # a trainer may have moved the model since the plan was made
            state |= restored(route.moment.init(), device)
            for name in route.leaves:
                p = self._params[name]
                self.state[p]["momentum"] = torch.zeros_like(p, dtype=state_like(p).dtype)
                if route.needs_squares(self.scaling):
                    self.state[p]["square"] = torch.zeros_like(self.state[p]["momentum"])
        state["step"] += 1
        return state

    def _direction(self, route: Route, state: dict[str, Any], gradients: Tree) -> Tree:
        """Momentum, looking ahead in blocks if asked to, divided by the total weight of its gradients."""
        beta, decay = self._betas(route)
        weight = state["momentum_weight"] = beta * state["momentum_weight"] + (1 - beta)
        state["square_weight"] = decay * state["square_weight"] + (1 - decay)
        found = {}
        for name, g in gradients.items():
            own = self.state[self._params[name]]
            if "square" in own:
                own["square"].mul_(decay).addcmul_(g, g, value=1 - decay)
            momentum = own["momentum"].lerp_(g, 1 - beta)
            if self.nesterov and not route.adamw:
                found[name] = g.lerp(momentum, beta) / (1 - beta + beta * weight)
            else:
                found[name] = momentum / weight
        return found

    def _move(self, name: str, direction: Tensor) -> None:
        group, p = self.param_groups[self._group[name]], self._params[name]
        lr = float(group["lr"])
        moved = p.to(direction.dtype)  # the parameter itself, unless its type is narrower
        moved.mul_(1 - lr * group["weight_decay"]).add_(direction, alpha=-lr)
        if moved is not p:
            p.copy_(moved)

    def _gradients(self) -> Tree | None:
        """Gradients in the type of the state; None if this step is to be left out."""
        found = dense_gradients(self._params, self.state)
        bad = not_finite(found)
        if not bad:
            return found or None
        if not self.skip_nonfinite:
            raise NonFiniteGradientError(
                f"Symo.step: the gradients of {bad} are not finite or their squares overflow; lower the learning rate, clip, or "
                "pass skip_nonfinite=True to leave such steps out"
            )
        self.skipped += 1
        return None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state, bit for bit: PyTorch would cast it to the type of the parameters.

        Raises:
            ValueError: if it was saved with other parameters, groups or blocks.
        """
        saved = saved_by_name(state_dict, list(self._params))
        check_state(saved, self.routes, {name: p.shape for name, p in self._params.items()}, self.scaling)
        super().load_state_dict(state_dict)
        for name, state in saved.items():
            p = self._params[name]
            self.state[p] = restored(state, p.device)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles keep: also the plan, which PyTorch's own leaves out."""
        return super().__getstate__() | {key: vars(self)[key] for key in (*_KEPT, *_PLAN)}

    def __repr__(self) -> str:
        """The plan: every parameter with its route and the blocks of its moment."""
        return described(self.routes, {name: p.shape for name, p in self._params.items()})
