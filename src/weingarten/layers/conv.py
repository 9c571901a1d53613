"""Convolutions in one to three dimensions, and their transposes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from weingarten.layers.conv_rows import ConvRows, Geometry
from weingarten.layers.rows import DenseRows, Rows, factor_type
from weingarten.layers.use import Builder, Site, Tracked, Use
from weingarten.operators import Layout
from weingarten.tree import Space

__all__ = ["CONV", "ConvUse"]


@dataclass(eq=False)
class ConvUse(Use):
    """A convolution is a linear layer on patches (Grosse and Martens 2016, https://arxiv.org/abs/1602.01407).

    Positions are output locations; each group of channels is a block of its own, curvature between groups is left out.
    """

    kind: ClassVar[str] = "convolution"
    geometry: Geometry

    def layout(self, space: Space, roles: tuple[str, ...]) -> Layout:
        return Layout(
            space,
            groups=self.geometry.groups,
            transposed=self.geometry.transposed and "weight" in roles,
        )

    def inputs(self, roles: tuple[str, ...]) -> Rows:
        x = factor_type(self.x)
        if "weight" in roles:
            return ConvRows(x, self.geometry, self.arrangement, self.data, one="bias" in roles)
        groups, positions = self.geometry.groups, len(x) // self.data * prod(self.shape[2:])
        return DenseRows(x.new_empty(groups, self.data, positions, 0), one=True)

    def outputs(self, g: Tensor, roles: tuple[str, ...]) -> Tensor:
        groups = self.geometry.groups
        g = g.flatten(3).unflatten(2, (groups, -1)).permute(0, 2, 1, 4, 3)  # (K, groups, R, L, out)
        g = self.arrangement.split(g, self.data, skip=2)
        return g.reshape(*g.shape[:3], -1, g.shape[-1])


def _build(
    dims: int, transposed: bool, call: Mapping[str, Any], tracked: Mapping[int, Tracked], site: Site
) -> Use | None:
    x, weight, bias = call["input"], call["weight"], call.get("bias")
    leaves = {}
    for role, value in (("weight", weight), ("bias", bias)):
        if (found := tracked.get(id(value))) is not None:
            if not found.whole:
                return None
            leaves[role] = found.leaf
    if id(x) in tracked or x.ndim != dims + 2:  # without a batch axis
        return None
    stride, dilation = _each(call.get("stride", 1), dims), _each(call.get("dilation", 1), dims)
    kernel = tuple(weight.shape[2:])
    padding = call.get("padding", 0)
    if isinstance(padding, str):
        total = [d * (k - 1) * (padding == "same") for d, k in zip(dilation, kernel, strict=True)]
        pads = tuple((t // 2, t - t // 2) for t in total)
    else:
        pads = tuple((p, p) for p in _each(padding, dims))
    extra = _each(call.get("output_padding", 0), dims) if transposed else ()
    geometry = Geometry(kernel, stride, pads, dilation, call.get("groups", 1), transposed, extra)
    return ConvUse.at(site, leaves, x, geometry)


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")

CONV: dict[Any, tuple[tuple[str, ...], Builder]] = {
    functional.conv1d: (_NAMES, partial(_build, 1, False)),
    functional.conv2d: (_NAMES, partial(_build, 2, False)),
    functional.conv3d: (_NAMES, partial(_build, 3, False)),
    functional.conv_transpose1d: (_TRANSPOSED, partial(_build, 1, True)),
    functional.conv_transpose2d: (_TRANSPOSED, partial(_build, 2, True)),
    functional.conv_transpose3d: (_TRANSPOSED, partial(_build, 3, True)),
}
"""Functions by what they are called, with the names of their arguments."""
