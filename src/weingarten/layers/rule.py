"""What must be known of a layer type."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from weingarten.layers.rows import Rows
from weingarten.operators import Layout
from weingarten.tree import Space, Tree

__all__ = ["LayerRule", "append_one"]


class LayerRule(ABC):
    r"""A layer whose per-datum weight gradient is ``sum_t g_t a_t^T`` with rows ``a`` of inputs and ``g`` of output gradients.

    ``leaves`` below are the block's trainable parameters by their local names (a subset of ``weight`` and ``bias``); the data
    dimension is the first of every activation.
    """

    types: ClassVar[tuple[type[nn.Module], ...]]

    @abstractmethod
    def layout(self, module: nn.Module, space: Space) -> Layout:
        """Where the leaves of ``space`` (full names, weight before bias) lie in the block's matrices."""

    @abstractmethod
    def inputs(self, module: nn.Module, x: Tensor, leaves: Tree) -> Rows:
        """The rows ``a``."""

    @abstractmethod
    def outputs(self, module: nn.Module, x: Tensor, g: Tensor, leaves: Tree) -> Tensor:
        """The rows ``g`` as ``(K, groups, N, T, out)``, from output gradients ``(K, *output.shape)``."""

    def refuse(self, module: nn.Module) -> str | None:
        """Why this module cannot be treated, or None."""
        return None


def append_one(rows: Tensor, leaves: Tree) -> Tensor:
    """Rows for the leaves that are there: the inputs, the inputs and a one for the bias, or the one alone."""
    one = torch.ones(*rows.shape[:-1], 1, dtype=rows.dtype, device=rows.device)
    if "weight" not in leaves:
        return one
    return torch.cat([rows, one], dim=-1) if "bias" in leaves else rows
