"""The state of a run, and one step of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from weingarten import tree
from weingarten.bilevel.checkpoint import decode, describe, encode
from weingarten.bilevel.history import History
from weingarten.bilevel.problem import (
    Batches,
    Hypergradient,
    HypergradientMethod,
    Level,
    Problem,
    refuse_diverged,
)
from weingarten.bilevel.projection import Projection
from weingarten.bilevel.sampling import Source, seeded
from weingarten.objective import Batch
from weingarten.tree import Space, Tree, TreeLike

__all__ = ["OptimizerFactory", "Run", "training_pass"]

OptimizerFactory = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass
class Run:
    """Everything that changes from step to step, next to everything that does not."""

    problem: Problem
    method: HypergradientMethod
    params: Tree
    hparams: Tree
    inner: torch.optim.Optimizer
    outer: torch.optim.Optimizer
    sources: tuple[Source, Source, Source | None]
    inner_steps: int
    project: dict[str, Projection]
    generator: torch.Generator
    method_generator: torch.Generator
    state: Any = None
    step: int = 0
    history: History = field(default_factory=History)

    @staticmethod
    def start(
        problem: Problem,
        method: HypergradientMethod,
        params: TreeLike,
        hparams: TreeLike,
        factories: tuple[OptimizerFactory, OptimizerFactory],
        sources: tuple[Source, Source, Source | None],
        inner_steps: int,
        project: Projection | Mapping[str, Projection] | None,
        seed: int,
    ) -> Run:
        """A run before its first step, on copies of the tensors."""
        leaves, outer = _leaves("params", params), _leaves("hparams", hparams)
        inner_optimizer = factories[0](list(leaves.values()))
        outer_optimizer = factories[1](list(outer.values()))
        if isinstance(outer_optimizer, torch.optim.LBFGS):
            raise ValueError(
                "solve: outer_optimizer makes an LBFGS, which asks for the loss many times a step; expected an optimizer that "
                "takes one gradient a step, such as Adam or SGD"
            )
        run = Run(
            problem=problem,
            method=method,
            params=leaves,
            hparams=outer,
            inner=inner_optimizer,
            outer=outer_optimizer,
            sources=sources,
            inner_steps=inner_steps,
            project=_by_name(project, outer),
            generator=torch.Generator().manual_seed(seed),
            method_generator=torch.Generator(device=Space.of(leaves).device).manual_seed(seed),
        )
        run._project()
        return run

    def advance(self) -> Hypergradient:
        """One outer step.

        Raises:
            DivergenceError: if a loss, the parameters or the hypergradient is not finite.
        """
        start = time.perf_counter()
        self.step += 1
        inner_loss = self._train()
        inner, outer, curvature = self.sources
        batches = Batches(
            outer=outer.draw(self.generator),
            mixed=inner.draw(self.generator),
            curvature=None if curvature is None else curvature.draw(self.generator),
        )
        params, hparams = tree.detach(self.params), tree.detach(self.hparams)
        found = self.method(self.problem, params, hparams, batches, self.state, self.method_generator)
        self._refuse("hypergradient", found.value, "lower the outer optimiser's rate or raise the damping")
        self.state = found.state
        for name, leaf in self.hparams.items():
            leaf.grad = found.value[name].to(leaf.dtype)
        self.outer.step()
        self._project()
        self._refuse("outer variable", self.hparams, "lower the outer optimiser's rate")
        self.history.append(self.step, inner_loss, found, time.perf_counter() - start)
        return found

    def settings(self, steps: int, seed: int) -> dict[str, str]:
        """What a resumed run must have in common with the one that was interrupted."""
        inner, outer = self.problem.inner, self.problem.outer
        found = {
            "steps": steps,
            "seed": seed,
            "kind of device": Space.of(self.params).device.type,  # each kind has random numbers of its own
            "inner_steps": self.inner_steps,
            "params": _shapes(self.params),
            "hparams": _shapes(self.hparams),
            "hypergradient": self.method,
            "inner optimizer": _optimizer(self.inner),
            "outer optimizer": _optimizer(self.outer),
            "inner data": self.sources[0],
            "outer data": self.sources[1],
            "curvature data": self.sources[2],
            "project": self.project,
        }
        for name, level in {"inner": inner, "outer": outer}.items():
            found |= {f"{name} {key}": value for key, value in _level(level).items()}
        return {name: value if isinstance(value, str) else describe(value) for name, value in found.items()}

    def content(self) -> dict[str, Any]:
        """The state as tensors and plain containers."""
        return {
            "step": self.step,
            "params": encode(self.params),
            "hparams": encode(self.hparams),
            "inner": encode(self.inner.state_dict()),
            "outer": encode(self.outer.state_dict()),
            "generators": [self.generator.get_state(), self.method_generator.get_state()],
            "state": encode(self.state),
            "history": self.history.columns(),
        }

    def restore(self, content: Mapping[str, Any]) -> None:
        """The inverse of :meth:`content`."""
        with torch.no_grad():
            for mine, theirs in ((self.params, content["params"]), (self.hparams, content["hparams"])):
                for name, leaf in mine.items():
                    leaf.copy_(theirs[name])
        self.inner.load_state_dict(content["inner"])
        self.outer.load_state_dict(content["outer"])
        for generator, state in zip(
            (self.generator, self.method_generator), content["generators"], strict=True
        ):
            generator.set_state(state.cpu())
        self.state = decode(content["state"])
        self.history = History(content["history"])
        self.step = content["step"]

    def _train(self) -> float:
        """The inner steps; the last loss."""
        inner, hparams, loss = self.problem.inner, tree.detach(self.hparams), float("nan")
        if isinstance(self.inner, torch.optim.LBFGS):
            self.inner.state.clear()  # it compares gradients, and those were of other outer variables
        for number in range(1, self.inner_steps + 1):
            batch = self.sources[0].draw(self.generator)
            where = f"(inner step {number} of {self.inner_steps})"
            with training_pass(inner.objective.model), seeded(self.generator):
                loss = float(self.inner.step(self._closure(inner, hparams, batch, where)))  # type: ignore[arg-type]
        self._refuse("parameter", self.params, "lower the inner optimiser's rate")
        return loss

    def _closure(self, inner: Level, hparams: Tree, batch: Batch, where: str) -> Callable[[], Tensor]:
        def value_and_gradient() -> Tensor:
            value = inner.value(self.params, hparams, batch)
            gradient = torch.autograd.grad(value, list(self.params.values()), materialize_grads=True)
            for p, g in zip(self.params.values(), gradient, strict=True):
                p.grad = g
            value = value.detach()
            self._refuse(
                f"inner loss {where}",
                {"": value},
                "lower the inner optimiser's rate, or look for NaN in the data",
            )
            return value

        return value_and_gradient

    def _project(self) -> None:
        with torch.no_grad():
            for name, projection in self.project.items():
                self.hparams[name].copy_(projection(self.hparams[name]))

    def _refuse(self, quantity: str, values: TreeLike, advice: str) -> None:
        refuse_diverged(f"solve: at outer step {self.step}, {quantity}", values, advice)


@contextmanager
def training_pass(model: object) -> Iterator[None]:
    """Training mode for all submodules except batch normalisation; on every exit each has its own mode back."""
    if not isinstance(model, nn.Module):
        yield
        return
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = not isinstance(module, _NormBase)
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _leaves(call: str, values: TreeLike) -> Tree:
    if not values:
        raise ValueError(f"solve: {call} is empty, expected at least one named tensor")
    for name, leaf in values.items():
        if not leaf.is_floating_point():
            raise ValueError(
                f"solve: {call}[{name!r}] has type {leaf.dtype}, expected a floating-point tensor"
            )
    return {name: leaf.detach().clone().requires_grad_() for name, leaf in values.items()}


def _by_name(project: Projection | Mapping[str, Projection] | None, hparams: Tree) -> dict[str, Projection]:
    if project is None:
        return {}
    if not isinstance(project, Mapping):
        return dict.fromkeys(hparams, project)
    for name in project:
        if name not in hparams:
            raise ValueError(
                f"solve: project names {name!r}, expected names of outer variables: {', '.join(hparams)}"
            )
    return dict(project)


def _shapes(values: Tree) -> str:
    return ", ".join(
        f"{name} {tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"
        for name, leaf in values.items()
    )


def _optimizer(optimizer: torch.optim.Optimizer) -> str:
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.state_dict()["param_groups"]
    ]
    return f"{type(optimizer).__name__} {describe(groups)}"


def _level(level: Level) -> dict[str, str]:
    model = level.objective.model
    return {
        "model": describe(model),
        "loss": describe(level.objective.loss),
        "output": describe(level.objective.output),
        "transform": describe(level.transform),
        "penalty": describe(level.penalty),
    }
