"""One network per episode, as one module: no parameter is shared, so that curvature has a block per network."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn

from weingarten.tree import Tree, TreeLike

__all__ = ["Copies", "EpisodeNetworks", "GroupedMLP"]


class EpisodeNetworks(nn.Module):
    """B networks of one shape. From inputs (N, B, ...), datum n of every episode, to outputs (N, C, B).

    The classes are in dimension 1, where ``CrossEntropy`` expects them; targets are (N, B), or (N, C, B) for ``MSE``.

    Attributes:
        episodes: B.
    """

    episodes: int

    @abstractmethod
    def single(self) -> Tree:
        """The parameters of the first network, by the names that :meth:`spread` takes."""

    @abstractmethod
    def spread(self, single: TreeLike) -> Tree:
        """Parameters of all B networks, each equal to the given ones; differentiable."""


@final
class GroupedMLP(EpisodeNetworks):
    r"""B multilayer perceptrons in one call per layer: convolutions with a kernel of one and a group per network.

    KFAC keeps a factor per group, which is a factor per network; ``infer_symmetry`` finds the units of each.

    Args:
        widths: of the inputs, the hidden layers and the outputs; two of them make a linear model.
        episodes: B.
        activation: between the layers; default: tanh, which is smooth.

    >>> networks = GroupedMLP((2, 8, 3), episodes=4)
    >>> networks(torch.zeros(5, 4, 2)).shape
    torch.Size([5, 3, 4])
    >>> networks.single()["layers.0.weight"].shape
    torch.Size([8, 2, 1])
    """

    def __init__(
        self, widths: Sequence[int], episodes: int, activation: Callable[[], nn.Module] = nn.Tanh
    ) -> None:
        super().__init__()
        if len(widths) < 2 or episodes < 1:
            raise ValueError(
                f"GroupedMLP: widths is {tuple(widths)} and episodes {episodes}, expected two widths or more and an episode"
            )
        self.episodes = episodes
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Conv1d(episodes * inputs, episodes * outputs, 1, groups=episodes), activation()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (N, C, B) for inputs (N, B, D)."""
        z = self.layers(x.flatten(1).unsqueeze(-1))
        return z.reshape(z.shape[0], self.episodes, -1).transpose(1, 2)

    def single(self) -> Tree:
        return {name: p.detach().chunk(self.episodes)[0].clone() for name, p in self.named_parameters()}

    def spread(self, single: TreeLike) -> Tree:
        return {name: p.repeat(self.episodes, *[1] * (p.ndim - 1)) for name, p in single.items()}


@final
class Copies(EpisodeNetworks):
    """B copies of any network: simple, and a call per layer and network.

    Args:
        network: from inputs (N, ...) to outputs (N, C).
        episodes: B.

    >>> networks = Copies(nn.Linear(2, 3), episodes=4)
    >>> networks(torch.zeros(5, 4, 2)).shape
    torch.Size([5, 3, 4])
    >>> sorted(networks.single())
    ['bias', 'weight']
    """

    def __init__(self, network: nn.Module, episodes: int) -> None:
        super().__init__()
        if episodes < 1:
            raise ValueError(f"Copies: episodes is {episodes}, expected at least one")
        self.episodes = episodes
        self.networks = nn.ModuleList(copy.deepcopy(network) for _ in range(episodes))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (N, C, B) for inputs (N, B, ...)."""
        return torch.stack([network(x[:, b]) for b, network in enumerate(self.networks)], dim=-1)

    def single(self) -> Tree:
        return {name: p.detach().clone() for name, p in self.networks[0].named_parameters()}

    def spread(self, single: TreeLike) -> Tree:
        return {f"networks.{b}.{name}": p for b in range(self.episodes) for name, p in single.items()}
