"""The cleaned model: taught by the trusted rows first, then by what it believes the given labels to mean, round by round."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weingarten.applications.clean.final import Final, Training, posterior

__all__ = ["FIRST", "Keeper", "Rounds"]

FIRST = Final(weight_decay=1e-2, mixup=False)
"""Training on the trusted rows alone."""


class Keeper:
    """Keeps a network between stages of its training. This one keeps nothing, and the training starts afresh."""

    def restore(self, network: nn.Module) -> int:
        """How many stages are done; the network is as the last of them left it."""
        return 0

    def keep(self, network: nn.Module, stages: int) -> None:
        """Note that so many stages are done."""


@dataclass(frozen=True)
class Rounds:
    r"""A few rounds of expectation and maximisation of the likelihood of noisy labels, stopped early.

    From a network that knows the trusted rows alone, each round replaces the given labels by
    :math:`q_n(c) \propto p(c | x_n) T[c, y_n]` (Dempster, Laird and Rubin 1977,
    https://doi.org/10.1111/j.2517-6161.1977.tb01600.x) and goes on training the same network with mixup on these and on the
    trusted rows. A row weighs ``weight_n max_c q_n(c)^2``, so that rows about which nothing is known yet hardly count; the
    trusted rows together have at least a share of all weight.

    Few rounds of few steps, since where noise depends on more than the class the maximum of that likelihood is no good
    classifier: there the classes drift to what explains the noise.

    Args:
        rounds: how many.
        share: of the trusted rows, in [0, 1).
        first: the training on the trusted rows alone.
        each: the training of a round.
    """

    rounds: int = 5
    share: float = 0.1
    first: Training = FIRST
    each: Training = Final(steps=40, weight_decay=3e-3)  # noqa: RUF009 - a frozen dataclass

    def fit(
        self,
        network: nn.Module,
        x: Tensor,
        given: Tensor,
        weight: Tensor,
        transition: Tensor,
        trusted_x: Tensor,
        trusted: Tensor,
        seed: int,
        keeper: Keeper | None = None,
    ) -> nn.Module:
        """The network, trained in place.

        Args:
            network: fresh, from features to logits (N, C).
            x: features of the given rows (N, D), or whatever the network and the trainings take for them.
            given: their labels (N,).
            weight: how much they count (N,).
            transition: T (C, C).
            trusted_x: features of the trusted rows (m, D).
            trusted: their labels, one-hot (m, C).
            seed: of mixup.
            keeper: keeps the network after each stage, of which the training on the trusted rows is the first.
        """
        keeper = keeper or Keeper()
        rows, done = torch.cat([x, trusted_x]), keeper.restore(network)
        if not done:
            self.first.fit(network, trusted_x, trusted, torch.ones_like(trusted[:, 0]), seed)
            keeper.keep(network, 1)
        for number in range(max(0, done - 1), self.rounds):
            with torch.no_grad():
                soft = posterior(network(x).log_softmax(1), transition, given)
            confidence = weight * soft.max(1).values ** 2
            least = self.share / (1 - self.share) * float(confidence.sum()) / len(trusted)
            weights = torch.cat([confidence, torch.full_like(trusted[:, 0], max(1.0, least))])
            self.each.fit(network, rows, torch.cat([soft, trusted]), weights, seed + number)
            keeper.keep(network, number + 2)
        return network
