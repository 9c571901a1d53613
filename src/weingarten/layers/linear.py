"""``nn.Linear`` with any leading dimensions."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from weingarten.layers.rows import DenseRows, Rows
from weingarten.layers.rule import LayerRule, append_one
from weingarten.operators import Layout
from weingarten.tree import Space, Tree

__all__ = ["LinearRule"]


class LinearRule(LayerRule):
    """``z = W a + b``: rows are the inputs, a one appended for the bias; positions are the dimensions between first and last."""

    types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    def layout(self, module: nn.Module, space: Space) -> Layout:
        return Layout(space)

    def inputs(self, module: nn.Module, x: Tensor, leaves: Tree) -> Rows:
        return DenseRows(append_one(x.reshape(1, len(x), -1, x.shape[-1]), leaves))

    def outputs(self, module: nn.Module, x: Tensor, g: Tensor, leaves: Tree) -> Tensor:
        return g.reshape(len(g), 1, g.shape[1], -1, g.shape[-1])
