"""Training a network on labels that may be distributions over the classes, and what these are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from weingarten.bilevel import L2
from weingarten.losses import CrossEntropy
from weingarten.objective import Batch, Objective

__all__ = ["Final", "Training", "posterior"]


class Training(Protocol):
    """How a network is trained on labels that may be distributions."""

    def fit(self, network: nn.Module, x: Tensor, soft: Tensor, weights: Tensor, seed: int) -> nn.Module:
        """The network, trained in place on rows x (N, ...), their label distributions (N, C) and weights (N,)."""


def posterior(log_probability: Tensor, transition: Tensor, given: Tensor) -> Tensor:
    r"""Corrected label distributions :math:`q_n(c) \propto p(c | x_n) T[c, y_n]`, shape (N, C).

    Args:
        log_probability: of the true classes, (N, C).
        transition: T (C, C).
        given: labels (N,).

    >>> posterior(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([0]))
    tensor([[0.7500, 0.2500]])
    """
    return (log_probability + transition.T[given].log()).softmax(1)


@dataclass(frozen=True)
class Final:
    """Adam on all rows at once (or on mini-batches), its rate falling to zero along a cosine.

    Minimises the weighted mean of ``-sum_c q_n(c) log p(c | x_n)`` plus ``weight_decay / 2`` times the squared norm, where in
    each step every row is mixed with a random other row: ``x <- (1 - a) x + a x'``, ``q <- (1 - a) q + a q'``, the weight alike,
    with a uniform in [0, 1]. Mixup (Zhang et al. 2018, https://arxiv.org/abs/1710.09412) keeps the network from learning
    single wrong labels by heart.

    Args:
        steps: of Adam.
        rate: at the start.
        weight_decay: see above.
        batch_size: the most rows in a step.
        mixup: whether to mix.
    """

    steps: int = 200
    rate: float = 1e-2
    weight_decay: float = 3e-3
    batch_size: int = 4096
    mixup: bool = True

    def fit(self, network: nn.Module, x: Tensor, soft: Tensor, weights: Tensor, seed: int) -> nn.Module:
        """The network, trained in place on features (N, D), soft labels (N, C) and weights (N,)."""
        objective, penalty = Objective(network, CrossEntropy()), L2(self.weight_decay)
        params = dict(network.named_parameters())
        optimizer = torch.optim.Adam(params.values(), lr=self.rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        generator, weights = torch.Generator().manual_seed(seed), weights / weights.mean()
        for _ in range(self.steps):
            batch = self._draw(x, soft, weights, generator)
            value = objective.value(params, batch) + penalty(params, {})
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
        return network

    def _draw(self, x: Tensor, soft: Tensor, weights: Tensor, generator: torch.Generator) -> Batch:
        parts = [x, soft, weights[:, None]]
        if len(x) > self.batch_size:
            rows = torch.randperm(len(x), generator=generator)[: self.batch_size]
            parts = [part[rows] for part in parts]
        if self.mixup:
            other = torch.randperm(len(parts[0]), generator=generator)
            share = torch.rand(len(other), 1, generator=generator).to(x.dtype)
            parts = [torch.lerp(part, part[other], share) for part in parts]
        return Batch(parts[0], parts[1], parts[2][:, 0])
