"""Which output gradients stand for the loss Hessian: all of its columns, sampled labels, or the given ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from weingarten.losses import Loss
from weingarten.losses.loss import check_weights

__all__ = ["Empirical", "Exact", "Fisher", "MonteCarlo"]


class Fisher(ABC):
    r"""A way to write the loss Hessian in the outputs as a sum of outer products of output gradients.

    All estimates of GGN type are ``sum_k sum_n (J_n^T s_nk)(J_n^T s_nk)^T`` with ``J_n`` datum n's output Jacobian.
    """

    @property
    def single(self) -> bool:
        """Whether there is one column, so that no backward pass is batched."""
        return False

    @abstractmethod
    def columns(
        self, loss: Loss, output: Tensor, target: Tensor, generator: torch.Generator
    ) -> Iterator[Tensor]:
        """Chunks ``(K_i, *output.shape)`` of unweighted, undivided columns ``s_nk``."""

    def weighted(
        self, loss: Loss, output: Tensor, target: Tensor, weights: Tensor | None, generator: torch.Generator
    ) -> Iterator[Tensor]:
        """The columns times ``sqrt(w_n)``: their outer products carry the weight once.

        Raises:
            ValueError: if the output is not finite, or a weight is negative.
        """
        if not torch.isfinite(output).all():
            raise ValueError(
                f"{type(self).__name__}: the model's output is not finite; look for NaN or inf in the data and the parameters"
            )
        for chunk in self.columns(loss, output, target, generator):
            if weights is None:
                yield chunk
            else:
                check_weights(weights, len(output))
                yield chunk * weights.detach().sqrt().to(chunk.dtype).reshape(-1, *[1] * (output.ndim - 1))


@dataclass(frozen=True)
class Exact(Fisher):
    """Every column of a root of the output Hessian ("type 2"): exact, K = number of outputs per datum."""

    def columns(
        self, loss: Loss, output: Tensor, target: Tensor, generator: torch.Generator
    ) -> Iterator[Tensor]:
        yield from loss.root(output, target)


@dataclass(frozen=True)
class MonteCarlo(Fisher):
    """Gradients at labels sampled from the model: unbiased, K = samples. The default: one sample costs one backward pass."""

    samples: int = 1

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"MonteCarlo: samples is {self.samples}, expected >= 1")

    @property
    def single(self) -> bool:
        return self.samples == 1

    def columns(
        self, loss: Loss, output: Tensor, target: Tensor, generator: torch.Generator
    ) -> Iterator[Tensor]:
        drawn = [loss.sample(output, target, generator) for _ in range(self.samples)]
        yield torch.stack(drawn) / self.samples**0.5


@dataclass(frozen=True)
class Empirical(Fisher):
    """Gradients at the given labels: the empirical Fisher, a second moment of gradients and *not* a GGN estimate."""

    @property
    def single(self) -> bool:
        return True

    def columns(
        self, loss: Loss, output: Tensor, target: Tensor, generator: torch.Generator
    ) -> Iterator[Tensor]:
        yield loss.gradient(output, target).unsqueeze(0)
