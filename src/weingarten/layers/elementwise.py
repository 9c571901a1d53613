"""Leaves that multiply or shift an activation entry by entry: scales, gains of norms, learned positions, class tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from weingarten.layers.arrangement import Arrangement
from weingarten.layers.embedding import EmbeddingUse, counting_type
from weingarten.layers.rows import DenseRows, Rows, factor_type
from weingarten.layers.use import Builder, Site, Tracked, Use
from weingarten.operators import Layout
from weingarten.tree import Space

__all__ = ["ELEMENTWISE", "CopyUse", "DiagonalUse", "ElementwiseUse", "LookupUse", "copies"]

DENSE = 256
"""Up to so many entries, gains and shifts of one use form a dense block; above, one small block per channel."""


class DiagonalUse(Use):
    """Each entry of a leaf acts on its own: a dense block while it is small, else a block per entry over the leaves of the use.

    As a Kronecker block, the input row is the number one and the output row is the datum's gradient, so that KFAC is exact in
    the entries that the block holds.
    """

    @abstractmethod
    def gradients(self, g: Tensor, role: str) -> Tensor:
        """Per-datum gradients ``(K, N, C)`` of the leaf with this role."""

    def layout(self, space: Space, roles: tuple[str, ...]) -> Layout:
        dense = space.size <= DENSE
        return Layout(space, groups=1 if dense else space.size // len(roles), axis=1)

    def inputs(self, roles: tuple[str, ...]) -> Rows:
        dtype = factor_type(self.x).dtype if self.x.is_floating_point() else torch.get_default_dtype()
        return DenseRows(torch.ones(1, self.data, 1, 1, dtype=dtype, device=self.x.device))

    def outputs(self, g: Tensor, roles: tuple[str, ...]) -> Tensor:
        parts = [self.gradients(g, role) for role in roles]
        if sum(part.shape[-1] for part in parts) <= DENSE:
            return torch.cat(parts, dim=-1)[:, None, :, None]
        return torch.stack(parts, dim=-1).permute(0, 2, 1, 3).unsqueeze(3)  # (K, C, N, 1, roles)


@dataclass(eq=False)
class ElementwiseUse(DiagonalUse):
    """``x * p`` or ``x + p``, with ``p`` broadcast.

    Attributes:
        shape_of_value: shape of the tensor that stands for the leaf.
        where: the leaf's entry at each of its places, or None for the leaf itself.
        size: number of entries of the leaf.
    """

    kind: ClassVar[str] = "elementwise"
    shape_of_value: torch.Size
    where: Tensor | None
    size: int

    def gradients(self, g: Tensor, role: str) -> Tensor:
        g = factor_type(g) * factor_type(self.x) if role == "weight" else factor_type(g)
        g = reduced(self, g, self.shape_of_value).reshape(len(g), self.data, self.shape_of_value.numel())
        if self.where is None:
            return g
        return g.new_zeros(*g.shape[:2], self.size).index_add_(2, self.where.flatten(), g)


@dataclass(eq=False)
class LookupUse(EmbeddingUse):
    """Rows of a table at the same indices ``x`` for all data, added to an activation: learned positions.

    Attributes:
        shape_of_value: the shape in which they are added.
    """

    shape_of_value: torch.Size

    def indices(self) -> Tensor:
        return self.x.reshape(1, -1).expand(self.data, -1)

    def outputs(self, g: Tensor, roles: tuple[str, ...]) -> Tensor:
        g = reduced(self, factor_type(g), self.shape_of_value)
        g = g.reshape(len(g), 1, self.data, -1, self.shape_of_value[-1])
        return g if self.ignored is None else g * (self.indices() != self.ignored).unsqueeze(-1)


def reduced(use: Use, g: Tensor, shape: torch.Size) -> Tensor:
    """Per-datum gradients ``(K, N, *shape)`` of a value of this shape, broadcast to the output: sums over the axes it lacks."""
    sizes = [1] * (len(use.shape) - len(shape)) + list(shape)
    if use.arrangement.merged:
        sizes.insert(use.arrangement.axis, 1)
    del sizes[use.arrangement.axis]  # one for all data
    g = use.arrangement.split(g, use.data, skip=1)
    lacking = [i + 2 for i, (have, need) in enumerate(zip(g.shape[2:], sizes, strict=True)) if have != need]
    g = g.sum(lacking, keepdim=True) if lacking else g
    return g.reshape(*g.shape[:2], *shape)


def _product(call: Mapping[str, Any], tracked: Mapping[int, Tracked], site: Site) -> Use | None:
    return _build("weight", call, tracked, site)


def _sum(call: Mapping[str, Any], tracked: Mapping[int, Tracked], site: Site) -> Use | None:
    return _build("bias", call, tracked, site) if call.get("alpha", 1) == 1 else None


def _build(role: str, call: Mapping[str, Any], tracked: Mapping[int, Tracked], site: Site) -> Use | None:
    first, second = call["input"], call["other"]
    p, x = (tracked.get(id(first)), second) if id(first) in tracked else (tracked.get(id(second)), first)
    if (
        p is None
        or not isinstance(x, Tensor)
        or id(x) in tracked
        or p.transposed
        or not p.value.ndim <= site.output.ndim
    ):
        return None
    if _data_axis_size(p.value, site) != 1:
        return None
    if p.rows is not None:
        if role == "weight":
            return None
        return LookupUse.at(
            site, {"weight": p.leaf}, p.rows, p.shape[0], counting_type(p.value), p.ignored, p.value.shape
        )
    x = x if role == "weight" else p.value  # a sum does not need it, and it may be overwritten
    return ElementwiseUse.at(site, {role: p.leaf}, x, p.value.shape, p.where, p.shape.numel())


def _data_axis_size(value: Tensor, site: Site) -> int:
    """Size of ``value``, broadcast to the output, along the data."""
    axis = site.arrangement.axis - (site.output.ndim - value.ndim)
    return 1 if axis < 0 else value.shape[axis]


_NAMES = ("input", "other", "alpha")

ELEMENTWISE: dict[Any, tuple[tuple[str, ...], Builder]] = {
    **dict.fromkeys(
        (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__), (_NAMES, _product)
    ),
    **dict.fromkeys(
        (torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__radd__),
        (_NAMES, _sum),
    ),
}
"""Functions by what they are called, with the names of their arguments."""


@dataclass(eq=False)
class CopyUse(ElementwiseUse):
    """One copy of a leaf per datum, as in ``token.expand(len(x), -1, -1)``: a shift of nothing."""

    kind: ClassVar[str] = "copies"


def copies(leaf: Tracked, where: Tensor, site: Site) -> Use | None:
    """The use that makes copies, from the flat number of the leaf's entry at each place of the output."""
    if site.arrangement != Arrangement(0):
        return None
    return CopyUse.at(site, {"bias": leaf.leaf}, leaf.value, where.shape[1:], where[0], leaf.shape.numel())
