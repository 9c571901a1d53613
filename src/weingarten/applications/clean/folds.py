"""Cross-fitting: K networks, each of which never trains on one part of the rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["IGNORED", "Folds", "assign_folds", "fitted_targets", "held_targets", "out_of_fold"]

IGNORED = -100
"""The target of rows that a network must not see; what ``CrossEntropy`` leaves out."""


class Folds(nn.Module):
    r"""K networks in one, as one model of the labels that were given: ``output[n, j, k] = log sum_c p_k(c | x_n) T_n[c, j]``.

    ``p_k`` is the softmax of network k and ``T_n[c, j]`` the probability that a row of class c is given the label j ("forward
    correction", Patrini et al. 2017, https://arxiv.org/abs/1609.03683). The output is a normalised log-probability, so that the
    generalised Gauss-Newton matrix of a cross-entropy on it is the Fisher matrix of the noisy likelihood. No parameter is
    shared: the curvature has a block per network.

    Args:
        networks: K networks from (N, D) to logits (N, C).
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor, transition: Tensor, noisy: Tensor) -> Tensor:
        """Log-probabilities of the given labels.

        Args:
            x: features (N, D).
            transition: (N, C, C), rows of each matrix sum to one; entries of noisy rows are positive.
            noisy: (N,) bool; False for rows whose label is right, where T is the identity and ``transition`` is not looked at.
                (The identity's zeros would turn a small probability into the logarithm of zero.)

        Returns:
            (N, C, K).
        """
        logits = torch.stack([network(x) for network in self.networks], dim=-1)
        clean = logits.log_softmax(1)
        noisy_probability = torch.bmm(transition.transpose(1, 2), clean.exp())
        tiny = torch.finfo(logits.dtype).tiny
        return torch.where(noisy[:, None, None], noisy_probability.clamp_min(tiny).log(), clean)


def assign_folds(labels: Tensor, folds: int, generator: torch.Generator) -> Tensor:
    """A fold number (N,) for each row, so that every fold has its share of every label.

    >>> assign_folds(torch.tensor([0, 0, 1, 1]), 2, torch.Generator().manual_seed(0)).sort().values
    tensor([0, 0, 1, 1])
    """
    drawn = torch.randperm(len(labels), generator=generator)
    order = drawn[torch.argsort(labels[drawn], stable=True)]
    fold = torch.empty_like(labels)
    fold[order] = torch.arange(len(labels)) % folds
    return fold


def held_targets(labels: Tensor, fold: Tensor, folds: int) -> Tensor:
    """Targets (N, K) for judging: each row's label at the network that does not train on it, ``IGNORED`` at the others.

    >>> held_targets(torch.tensor([7, 8]), torch.tensor([1, 0]), 2)
    tensor([[-100,    7],
            [   8, -100]])
    """
    return torch.where(_own(fold, folds), labels[:, None], IGNORED)


def fitted_targets(labels: Tensor, fold: Tensor, folds: int) -> Tensor:
    """Targets (N, K) for training: the complement of :func:`held_targets`."""
    return torch.where(_own(fold, folds), IGNORED, labels[:, None])


def out_of_fold(log_probability: Tensor, fold: Tensor) -> Tensor:
    """Of outputs (N, C, K) those of the network that did not train on the row, (N, C)."""
    index = fold[:, None, None].expand(-1, log_probability.shape[1], 1)
    return log_probability.gather(2, index)[:, :, 0]


def _own(fold: Tensor, folds: int) -> Tensor:
    return fold[:, None] == torch.arange(folds, device=fold.device)
