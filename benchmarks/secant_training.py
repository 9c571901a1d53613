"""Training with stops: parameters, gradients, past mini-batch gradients, and secants."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import weingarten as wg
from benchmarks.secant_models import BATCH, NETWORKS, build, digits
from weingarten import tree
from weingarten.symmetry import Symmetry

Tree = dict[str, Tensor]
LOSSES = (1.5, 0.8, 0.41, 0.15, 0.05)  # where training stops to look
MEMORY = 30  # mini-batch gradients kept for averages over steps
AHEAD = (1, 5, 20)  # training steps to the displaced parameters
DRAWS, RADIUS = 4, 1e-8  # random displacements; their relative norm, which crosses no kink of a ReLU
DECAY = 1e-3  # weight decay at the minimum


@dataclass(frozen=True)
class Secant:
    """``w' - w`` and ``g' - g`` of the loss on all data."""

    displacement: Tree
    change: Tree


@dataclass(frozen=True)
class Stop:
    """Where training stood.

    ``past`` are the last mini-batch gradients, each at its own parameters. At the minimum, ``gradient`` and ``past``
    are those of the loss with weight decay; the secants are always those of the loss alone.
    """

    label: str
    loss: float
    gradient_norm: float
    objective: wg.Objective
    batch: wg.Batch
    params: Tree
    gradient: Tree
    past: list[Tree]
    secants: dict[str, list[Secant]]
    symmetry: Symmetry


def gradient(objective: wg.Objective, params: Tree, batch: wg.Batch, decay: float = 0.0) -> Tree:
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    found = torch.autograd.grad(objective.value(leaves, batch), list(leaves.values()))
    return {name: g + decay * params[name] for name, g in zip(leaves, found, strict=True)}


class Training:
    """One network and one seed."""

    def __init__(self, name: str, seed: int) -> None:
        self.network, self.batch = NETWORKS[name], digits(seed)
        self.model, self.optimizer = build(name, seed)
        self.objective = wg.Objective(self.model, wg.CrossEntropy())
        self.generator = torch.Generator().manual_seed(seed)
        self.past: deque[Tree] = deque(maxlen=MEMORY)
        self.symmetry = self.network.symmetry(self.params())

    def params(self) -> Tree:
        return {name: p.clone() for name, p in self.objective.params().items()}

    def loss(self) -> float:
        return float(self.objective.value(self.params(), self.batch))

    def draw(self) -> wg.Batch:
        rows = torch.randperm(len(self.batch.targets), generator=self.generator)[:BATCH]
        return wg.Batch(self.batch.inputs[rows], self.batch.targets[rows])

    def step(self, model: nn.Module, optimizer: Any) -> Tree:
        batch = self.draw()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch.inputs), batch.targets).backward()
        optimizer.step()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    def stops(self) -> Iterator[Stop]:
        """At every loss of ``LOSSES`` that is reached, and at the minimum of the loss with weight decay."""
        waiting = list(LOSSES)
        for number in range(self.network.steps):
            self.past.append(self.step(self.model, self.optimizer))
            if number % 5 == 0 and (loss := self.loss()) <= waiting[0]:
                while waiting and loss <= waiting[0]:
                    reached = waiting.pop(0)
                yield self.stop(str(reached), loss)
            if not waiting:
                break
        self.minimise()
        params = self.params()
        self.past.extend(gradient(self.objective, params, self.draw(), DECAY) for _ in range(MEMORY))
        yield self.stop("minimum", self.loss(), DECAY)

    def stop(self, label: str, loss: float, decay: float = 0.0) -> Stop:
        params, alone = self.params(), gradient(self.objective, self.params(), self.batch)
        g = tree.axpy(decay, params, alone)
        secants = {
            "random": self.random_secants(params, alone),
            "training": self.training_secants(params, alone),
        }
        norm = float(tree.norm(g))
        return Stop(
            label, loss, norm, self.objective, self.batch, params, g, list(self.past), secants, self.symmetry
        )

    def secant(self, params: Tree, g: Tree, moved: Tree) -> Secant:
        return Secant(tree.sub(moved, params), tree.sub(gradient(self.objective, moved, self.batch), g))

    def random_secants(self, params: Tree, g: Tree) -> list[Secant]:
        found = []
        for _ in range(DRAWS):
            v = {
                name: torch.randn(p.shape, dtype=p.dtype, generator=self.generator)
                for name, p in params.items()
            }
            size = RADIUS * tree.norm(params) / tree.norm(v)
            found.append(self.secant(params, g, tree.axpy(float(size), v, params)))
        return found

    def training_secants(self, params: Tree, g: Tree) -> list[Secant]:
        """The steps that would come next, on a copy."""
        model, optimizer = deepcopy(self.model), self.network.optimizer
        ahead = optimizer(model.parameters(), lr=self.network.rate)
        ahead.load_state_dict(deepcopy(self.optimizer.state_dict()))
        found = []
        for number in range(1, max(AHEAD) + 1):
            self.step(model, ahead)
            if number in AHEAD:
                moved = {name: p.detach().clone() for name, p in model.named_parameters()}
                found.append(self.secant(params, g, moved))
        return found

    def minimise(self) -> None:
        """L-BFGS on the loss with weight decay."""
        optimizer = torch.optim.LBFGS(
            self.model.parameters(),
            max_iter=300,
            history_size=20,
            tolerance_grad=1e-7,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            params = dict(self.model.named_parameters())
            value = self.objective.value(params, self.batch) + DECAY / 2 * tree.dot(params, params)
            value.backward()
            return value

        optimizer.step(closure)
