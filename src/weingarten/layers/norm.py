"""Scales and shifts of normalisation layers."""

from __future__ import annotations

from abc import abstractmethod
from math import prod
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from weingarten.layers.rows import DenseRows, Rows
from weingarten.layers.rule import LayerRule
from weingarten.operators import Layout
from weingarten.tree import Space, Tree

__all__ = ["BatchNormRule", "LayerNormRule"]


class _NormRule(LayerRule):
    """``z = gain * normalised(x) + bias``: a dense block over both, the second moment of per-datum gradients.

    As a Kronecker block, the input row is the number one and the output row is the datum's gradient ``(sum_t g x^, sum_t g)``.
    """

    @abstractmethod
    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        """The input before gain and bias."""

    @abstractmethod
    def channels_last(self, module: nn.Module, x: Tensor) -> Tensor:
        """``(K, N, T, C)`` from ``(K, N, ...)``, where C counts the entries of the gain."""

    def layout(self, module: nn.Module, space: Space) -> Layout:
        return Layout(space, axis=1)

    def inputs(self, module: nn.Module, x: Tensor, leaves: Tree) -> Rows:
        return DenseRows(torch.ones(1, len(x), 1, 1, dtype=x.dtype, device=x.device))

    def outputs(self, module: nn.Module, x: Tensor, g: Tensor, leaves: Tree) -> Tensor:
        flat = self.channels_last(module, g)
        parts = []
        if "weight" in leaves:
            parts.append((flat * self.channels_last(module, self.normalised(module, x).unsqueeze(0))).sum(2))
        if "bias" in leaves:
            parts.append(flat.sum(2))
        return torch.cat(parts, dim=-1)[:, None, :, None]


class LayerNormRule(_NormRule):
    """``nn.LayerNorm`` over any trailing shape."""

    types: ClassVar[tuple[type[nn.Module], ...]] = (nn.LayerNorm,)

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        norm = cast(nn.LayerNorm, module)
        return functional.layer_norm(x, norm.normalized_shape, eps=norm.eps)

    def channels_last(self, module: nn.Module, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], -1, prod(cast(nn.LayerNorm, module).normalized_shape))


class BatchNormRule(_NormRule):
    """``nn.BatchNorm1d/2d/3d`` in evaluation mode, where running statistics are constants."""

    types: ClassVar[tuple[type[nn.Module], ...]] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        norm = cast(nn.BatchNorm2d, module)
        assert norm.running_mean is not None  # else refused
        assert norm.running_var is not None
        return functional.batch_norm(
            x, norm.running_mean.to(x.dtype), norm.running_var.to(x.dtype), eps=norm.eps
        )

    def channels_last(self, module: nn.Module, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:3], -1).mT

    def refuse(self, module: nn.Module) -> str | None:
        if cast(nn.BatchNorm2d, module).running_mean is None:
            return "without running statistics a datum's output depends on the rest of the batch"
        return None
