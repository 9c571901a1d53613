"""``nn.Embedding``: a linear layer on one-hot rows, kept as counts."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from weingarten.layers.rows import OneHotRows, Rows
from weingarten.layers.rule import LayerRule
from weingarten.operators import Layout
from weingarten.tree import Space, Tree

__all__ = ["EmbeddingRule"]


class EmbeddingRule(LayerRule):
    """The input factor is the diagonal of token counts, never a V x V matrix; padding does not count."""

    types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)

    def layout(self, module: nn.Module, space: Space) -> Layout:
        return Layout(space, transposed=True)

    def inputs(self, module: nn.Module, x: Tensor, leaves: Tree) -> Rows:
        table = cast(nn.Embedding, module)
        dtype = torch.promote_types(leaves["weight"].dtype, torch.float32)  # bfloat16 cannot count beyond 256
        return OneHotRows(x.reshape(len(x), -1), table.num_embeddings, dtype, table.padding_idx)

    def outputs(self, module: nn.Module, x: Tensor, g: Tensor, leaves: Tree) -> Tensor:
        padding = cast(nn.Embedding, module).padding_idx
        g = g.reshape(len(g), 1, g.shape[1], -1, g.shape[-1])
        return g if padding is None else g * (x.reshape(len(x), -1, 1) != padding)

    def refuse(self, module: nn.Module) -> str | None:
        table = cast(nn.Embedding, module)
        if table.max_norm is not None:
            return "max_norm changes the weight inside the forward pass"
        if table.scale_grad_by_freq or table.sparse:
            return "scale_grad_by_freq and sparse gradients are not gradients of the loss"
        return None
