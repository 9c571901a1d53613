"""First derivatives of a level, for methods that need no second."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weingarten import tree
from weingarten.bilevel.problem import Level
from weingarten.objective import Batch, curvature_pass
from weingarten.tree import Tree, TreeLike

__all__ = ["hparams_gradient", "level_value", "params_gradient"]


def level_value(level: Level, params: TreeLike, hparams: TreeLike, batch: Batch) -> float:
    """The level's objective without dropout; no derivative is taken."""
    with curvature_pass(level.objective.model, twice=False), torch.no_grad():
        return float(level.value(params, hparams, batch))


def params_gradient(level: Level, params: TreeLike, hparams: TreeLike, batch: Batch) -> Tree:
    """The level's gradient in the parameters, without dropout; zeros where it does not depend on them."""
    fixed = tree.detach(hparams)
    return _gradient(level, params, lambda leaves: level.value(leaves, fixed, batch))


def hparams_gradient(level: Level, params: TreeLike, hparams: TreeLike, batch: Batch) -> Tree:
    """The level's gradient in the outer variables without dropout; zeros where it does not depend on them."""
    fixed = tree.detach(params)
    return _gradient(level, hparams, lambda leaves: level.value(fixed, leaves, batch))


def _gradient(level: Level, at: TreeLike, function: Callable[[Tree], Tensor]) -> Tree:
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in at.items()}
    with curvature_pass(level.objective.model, twice=False), torch.enable_grad():
        value = function(leaves)
        if not value.requires_grad:
            return tree.zeros_like(tree.detach(leaves))
        found = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))
