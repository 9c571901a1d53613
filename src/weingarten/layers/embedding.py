"""Rows of a table: a linear layer on one-hot rows, kept as counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from weingarten.layers.rows import OneHotRows, Rows
from weingarten.layers.use import Builder, Site, Tracked, Use
from weingarten.operators import Layout
from weingarten.tree import Space

__all__ = ["EMBEDDING", "EmbeddingUse"]


@dataclass(eq=False)
class EmbeddingUse(Use):
    """The input factor is the diagonal of token counts, never a V x V matrix; padding does not count.

    Attributes:
        x: the indices.
        size: number of rows of the table.
        dtype: type that counts are kept in.
        ignored: the index whose row has no gradient, or None.
    """

    kind: ClassVar[str] = "embedding"
    size: int
    dtype: torch.dtype
    ignored: int | None

    def layout(self, space: Space, roles: tuple[str, ...]) -> Layout:
        return Layout(space, transposed=True)

    def indices(self) -> Tensor:
        """Indices ``(N, T)``."""
        return self.arrangement.split(self.x, self.data).reshape(self.data, -1)

    def inputs(self, roles: tuple[str, ...]) -> Rows:
        return OneHotRows(self.indices(), self.size, self.dtype)

    def outputs(self, g: Tensor, roles: tuple[str, ...]) -> Tensor:
        g = self.arrangement.split(g, self.data, skip=1)
        g = g.reshape(len(g), 1, self.data, -1, g.shape[-1])
        return g if self.ignored is None else g * (self.indices() != self.ignored).unsqueeze(-1)


def counting_type(weight: Tensor) -> torch.dtype:
    """A type that can count: bfloat16 cannot beyond 256."""
    return torch.promote_types(weight.dtype, torch.float32)


def _build(call: Mapping[str, Any], tracked: Mapping[int, Tracked], site: Site) -> Use | None:
    weight = tracked.get(id(call["weight"]))
    refused = call.get("max_norm") is not None or call.get("scale_grad_by_freq") or call.get("sparse")
    if weight is None or not weight.whole or refused:
        return None
    value = call["weight"]
    return EmbeddingUse.at(
        site,
        {"weight": weight.leaf},
        call["input"],
        len(value),
        counting_type(value),
        padding_index(call),
    )


def padding_index(call: Mapping[str, Any]) -> int | None:
    """The padding index as a non-negative number, or None."""
    index: int | None = call.get("padding_idx")
    return index if index is None or index >= 0 else index + len(call["weight"])


EMBEDDING: dict[Any, tuple[tuple[str, ...], Builder]] = {
    functional.embedding: (
        ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
        _build,
    ),
}
"""Functions by what they are called, with the names of their arguments."""
