"""Matrix products with a leaf: ``nn.Linear``, Hugging Face's ``Conv1D``, ``x @ W``, packed projections of attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from weingarten.layers.rows import DenseRows, Rows, factor_type
from weingarten.layers.use import Builder, Site, Tracked, Use
from weingarten.operators import Layout
from weingarten.tree import Space

__all__ = ["LINEAR", "LinearUse"]


@dataclass(eq=False)
class LinearUse(Use):
    """``z = W a + b``: rows are the inputs, with a one for the bias; positions are all other axes.

    Attributes:
        transposed: whether the leaf is stored as (in, out).
        parts: number of matrices stacked along the output axis, which become groups: query, key and value of one packed weight.
    """

    kind: ClassVar[str] = "linear"
    transposed: bool = False
    parts: int = 1

    def layout(self, space: Space, roles: tuple[str, ...]) -> Layout:
        return Layout(space, groups=self.parts, transposed=self.transposed and "weight" in roles)

    def inputs(self, roles: tuple[str, ...]) -> Rows:
        x = factor_type(self.arrangement.split(self.x, self.data))
        if "weight" not in roles:
            x = x[..., :0]
        return DenseRows(x.reshape(1, self.data, x.shape[1:-1].numel(), x.shape[-1]), one="bias" in roles)

    def outputs(self, g: Tensor, roles: tuple[str, ...]) -> Tensor:
        g = self.arrangement.split(g, self.data, skip=1)
        g = g.reshape(len(g), self.data, -1, self.parts, g.shape[-1] // self.parts)
        return g.movedim(3, 1)

    def source(self) -> tuple[Any, ...]:
        return (self.x.data_ptr(), self.x.shape, self.x.stride(), self.version, self.arrangement)


def _build(
    x: Any, weight: Any, bias: Any, tracked: Mapping[int, Tracked], site: Site, turned: bool
) -> Use | None:
    """``turned``: whether the weight comes as (in, out)."""
    w, b = tracked.get(id(weight)), tracked.get(id(bias))
    if not isinstance(x, Tensor) or id(x) in tracked:
        return None
    leaves = {}
    if w is not None:
        if not (w.whole or w.transposed) or weight.ndim != 2:
            return None
        leaves["weight"] = w.leaf
    if b is not None:
        if not b.whole or bias.ndim != 1:
            return None
        leaves["bias"] = b.leaf
    stored = turned != (w is not None and w.transposed)
    parts = max((leaf.parts for leaf in (w, b) if leaf is not None), default=1)
    return LinearUse.at(site, leaves, x, stored, 1 if stored else parts)


def _linear(call: Mapping[str, Any], tracked: Mapping[int, Tracked], site: Site) -> Use | None:
    return _build(call["input"], call["weight"], call.get("bias"), tracked, site, turned=False)


def _matmul(call: Mapping[str, Any], tracked: Mapping[int, Tracked], site: Site) -> Use | None:
    return _build(call["input"], call["other"], None, tracked, site, turned=True)


def _addmm(call: Mapping[str, Any], tracked: Mapping[int, Tracked], site: Site) -> Use | None:
    if call.get("beta", 1) != 1 or call.get("alpha", 1) != 1:
        return None
    return _build(call["mat1"], call["mat2"], call["input"], tracked, site, turned=True)


LINEAR: dict[Any, tuple[tuple[str, ...], Builder]] = {
    functional.linear: (("input", "weight", "bias"), _linear),
    torch.addmm: (("input", "mat1", "mat2"), _addmm),
    torch.Tensor.addmm: (("input", "mat1", "mat2"), _addmm),
    **dict.fromkeys(
        (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__),
        (("input", "other"), _matmul),
    ),
}
"""Functions by what they are called, with the names of their arguments."""
