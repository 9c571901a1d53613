"""``nn.Conv1d`` and ``nn.Conv2d`` with stride, padding, dilation and groups."""

from __future__ import annotations

from typing import ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional

from weingarten.layers.rows import DenseRows, Rows
from weingarten.layers.rule import LayerRule, append_one
from weingarten.operators import Layout
from weingarten.tree import Space, Tree

__all__ = ["ConvRule"]

Conv = nn.Conv1d | nn.Conv2d


class ConvRule(LayerRule):
    """A convolution is a linear layer on patches (Grosse and Martens 2016, https://arxiv.org/abs/1602.01407).

    Positions are output locations; each group of channels is a block of its own, curvature between groups is left out.
    """

    types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d, nn.Conv2d)

    def layout(self, module: nn.Module, space: Space) -> Layout:
        return Layout(space, groups=cast(Conv, module).groups)

    def inputs(self, module: nn.Module, x: Tensor, leaves: Tree) -> Rows:
        conv = cast(Conv, module)
        patches = _patches(conv, x)  # (N, C k, L)
        grouped = patches.reshape(len(x), conv.groups, -1, patches.shape[-1])
        return DenseRows(append_one(grouped.permute(1, 0, 3, 2), leaves))

    def outputs(self, module: nn.Module, x: Tensor, g: Tensor, leaves: Tree) -> Tensor:
        groups = cast(Conv, module).groups
        columns, data, channels = g.shape[:3]
        return g.reshape(columns, data, groups, channels // groups, -1).permute(0, 2, 1, 4, 3)


def _patches(conv: Conv, x: Tensor) -> Tensor:
    """Input patches ``(N, C * kernel, L)``."""
    if isinstance(conv.padding, str):
        total = [
            d * (k - 1) if conv.padding == "same" else 0
            for d, k in zip(conv.dilation, conv.kernel_size, strict=True)
        ]
        pads = [(t // 2, t - t // 2) for t in total]
    else:
        pads = [(p, p) for p in conv.padding]
    flat = [side for pair in reversed(pads) for side in pair]
    x = functional.pad(x, flat, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    kernel, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
    if isinstance(conv, nn.Conv1d):
        x, kernel, stride, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
    return functional.unfold(x, kernel, dilation=dilation, stride=stride)
