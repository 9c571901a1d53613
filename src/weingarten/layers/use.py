"""One application of parameters to an activation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from weingarten.layers.arrangement import Arrangement
from weingarten.layers.rows import Rows
from weingarten.operators import Layout
from weingarten.tree import Space

__all__ = ["Site", "Tracked", "Use", "bound"]


@dataclass(eq=False)
class Tracked:
    """A leaf as it passes through the model: itself, its transpose, or a rearrangement of its entries.

    Attributes:
        leaf: its name, and ``shape`` its shape.
        value: the tensor that stands for it.
        transposed: whether ``value`` is the transpose of a two-dimensional leaf.
        where: for a rearrangement (a slice, a broadcast copy), the flat number of the leaf's entry at each place of ``value``.
        rows: for a table's rows at indices that do not depend on the data, the indices; ``value`` has one more axis.
        ignored: the index of ``rows`` that has no gradient (padding).
        parts: number of matrices stacked along the first axis (3 for a packed query-key-value projection).
    """

    leaf: str
    shape: torch.Size
    value: Tensor
    transposed: bool = False
    where: Tensor | None = None
    rows: Tensor | None = None
    ignored: int | None = None
    parts: int = 1

    @property
    def whole(self) -> bool:
        """Whether ``value`` is the leaf itself."""
        return not self.transposed and self.where is None and self.rows is None


@dataclass(eq=False)
class Site:
    """Where a use happens: the output, its data axis and the number of data."""

    output: Tensor
    arrangement: Arrangement
    data: int


@dataclass(eq=False)
class Use(ABC):
    r"""One application of leaves: the per-datum gradient is ``sum_t g_t a_t^T`` with rows of inputs and of gradients.

    Attributes:
        leaves: leaf by role, such as ``weight`` and ``bias``.
        x: the activation that the leaves are applied to, detached; shared memory.
        arrangement: the data axis of the output, and ``data`` how many data.
        shape: of the output; ``edge`` is where its gradient is taken.
    """

    kind: ClassVar[str]
    leaves: dict[str, str]
    x: Tensor
    arrangement: Arrangement
    data: int
    shape: torch.Size
    edge: GradientEdge
    version: int = field(init=False)

    def __post_init__(self) -> None:
        self.version = 0 if self.x.is_inference() else self.x._version

    @classmethod
    def at(cls, site: Site, leaves: Mapping[str, str], x: Tensor, *rest: Any) -> Use:
        """The use whose output is that of ``site``."""
        edge = get_gradient_edge(site.output)
        return cls(dict(leaves), x.detach(), site.arrangement, site.data, site.output.shape, edge, *rest)

    @property
    def layer(self) -> str:
        """The name of the layer that the leaves belong to."""
        leaf = next(iter(self.leaves.values()))
        return leaf.rpartition(".")[0] or leaf

    @property
    def overwritten(self) -> bool:
        """Whether ``x`` was changed in place since."""
        return not self.x.is_inference() and self.x._version != self.version

    @abstractmethod
    def layout(self, space: Space, roles: tuple[str, ...]) -> Layout:
        """Where the leaves with these roles (full names in ``space``) lie in the block's matrices."""

    @abstractmethod
    def inputs(self, roles: tuple[str, ...]) -> Rows:
        """The rows ``a`` that belong to these roles."""

    @abstractmethod
    def outputs(self, g: Tensor, roles: tuple[str, ...]) -> Tensor:
        """The rows ``g`` as ``(K, groups, N, T, out)``, from output gradients ``(K, *shape)``."""

    def source(self) -> tuple[Any, ...] | None:
        """Equal for uses whose inputs are the same rows, so that their moments can be shared; None for no sharing."""
        return None


Builder = Callable[[Mapping[str, Any], Mapping[int, Tracked], Site], "Use | None"]
"""From a call's arguments by name, the tracked tensors among them by id, and the site: the use, or None if it is none."""


def bound(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}
