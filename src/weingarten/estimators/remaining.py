"""Leaves that a layer-wise estimator leaves to another one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weingarten import tree
from weingarten.estimators.estimator import Estimator
from weingarten.objective import Batch, Objective, curvature_pass
from weingarten.operators import BlockDiagonal, Curvature
from weingarten.tree import Tree, TreeLike

__all__ = ["Remaining", "with_fixed"]


@dataclass
class Remaining:
    """What is left over, and the state of the estimator that treats it.

    Attributes:
        call: who asks, for messages.
        estimator: for the leaves left over; None refuses them by name.
        names: which leaves these are, known after the first batch.
    """

    call: str
    estimator: Estimator | None
    names: list[str] = field(default_factory=list)
    state: Any = None

    def check(self, left: Mapping[str, str]) -> None:
        """Raise a ``ValueError`` if leaves are left over and no estimator is there for them."""
        if left and self.estimator is None:
            listing = "; ".join(f"{name!r} ({reason})" for name, reason in left.items())
            raise ValueError(
                f"{self.call}: cannot treat {listing}; freeze them or pass otherwise=wg.Diagonal()"
            )

    def update(
        self,
        left: Mapping[str, str],
        objective: Objective,
        params: TreeLike,
        batch: Batch,
        generator: torch.Generator,
    ) -> None:
        """Take in one more batch."""
        self.check(left)
        if self.estimator is None or not left:
            return
        self.names = [name for name in params if name in left]
        rest = {name: params[name] for name in self.names}
        inner = with_fixed(objective, {name: p for name, p in params.items() if name not in left})
        with curvature_pass(objective.model):
            if self.state is None:
                self.state = self.estimator.init(inner, rest)
            self.state = self.estimator.update(self.state, inner, rest, batch, generator)

    def read(self) -> list[Curvature]:
        """The curvatures of the leaves left over, block by block."""
        if self.estimator is None or self.state is None:
            return []
        found = self.estimator.read(self.state)
        return list(found.blocks) if isinstance(found, BlockDiagonal) else [found]


def with_fixed(objective: Objective, fixed: TreeLike) -> Objective:
    """The objective as a function of the other leaves."""
    constants = tree.detach(fixed)

    def model(params: Tree, inputs: Any) -> Tensor:
        return objective.forward({**constants, **params}, inputs)

    return Objective(model, objective.loss)
