"""What losses with a diagonal output Hessian share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from weingarten.losses.loss import CHUNK, Loss

__all__ = ["ElementwiseLoss"]


@dataclass(frozen=True)
class ElementwiseLoss(Loss):
    """A loss whose elements are the entries of the output; the mean is over all of them, as in PyTorch."""

    @abstractmethod
    def second_derivative(self, output: Tensor, target: Tensor) -> Tensor:
        """``d^2 l / dz^2`` of every entry, the shape of ``output``; float32 for outputs in half precision."""

    def count(self, target: Tensor) -> int:
        """The number of entries."""
        return target.numel()

    def curvature(self, output: Tensor, target: Tensor, v: Tensor) -> Tensor:
        """Entrywise product with the second derivative."""
        return (self.second_derivative(output, target) * v).to(output.dtype)

    def root(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        """One column per entry of a datum's output, in chunks of at most 64."""
        diagonal = self.second_derivative(output, target).sqrt().to(output.dtype).reshape(len(output), -1)
        size = diagonal.shape[1]
        for first in range(0, size, CHUNK):
            rows = torch.arange(first, min(first + CHUNK, size), device=output.device)
            columns = torch.zeros(len(rows), *diagonal.shape, dtype=diagonal.dtype, device=output.device)
            columns[torch.arange(len(rows), device=output.device), :, rows] = diagonal[:, rows].T
            yield columns.reshape(len(rows), *output.shape)

    def check(self, output: Tensor, target: Tensor) -> None:
        """Refuse shapes that would broadcast.

        Raises:
            ValueError: if the shapes differ.
        """
        if output.shape != target.shape:
            raise ValueError(
                f"{type(self).__name__}: target has shape {tuple(target.shape)}, expected the output's {tuple(output.shape)}"
            )
