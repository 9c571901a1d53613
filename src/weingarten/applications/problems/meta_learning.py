"""Meta-learning as a bilevel problem: implicit MAML and hyper-representation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from weingarten.applications.problems.episode_networks import EpisodeNetworks
from weingarten.applications.problems.meta_loop import MetaTask
from weingarten.bilevel import L2, Level, Problem, Proximal
from weingarten.losses import Loss
from weingarten.objective import Batch, Objective
from weingarten.tree import Tree, TreeLike

__all__ = ["HyperRepresentation", "ImplicitMAML"]


@dataclass(frozen=True)
class ImplicitMAML(MetaTask):
    r"""Learn where to start: ``min over phi of (1/B) sum_b query_b(theta_b*)``.

    ``theta_b* = argmin over theta of support_b(theta) + prox/2 |theta - phi|^2`` for each episode b. Rajeswaran et al. 2019,
    https://arxiv.org/abs/1909.04630: ``d query_b/d phi = (I + H_b/prox)^{-1} d query_b/d theta`` with the curvature ``H_b`` of
    the support loss, whatever steps led to ``theta_b*``. The proximal term's own curvature ``prox I`` is exactly known. The B
    inner problems are one: the mean over episodes, so that each block of its curvature, its proximal term and its damping are
    1/B of an episode's.

    Args:
        networks: B networks in one module; the outer variables phi are one network's parameters.
        loss: of the outputs (N, C, B), for support and query alike.
        prox: strength of the proximal term, in units of an episode's support loss per squared parameter.

    >>> from weingarten import MSE
    >>> from weingarten.applications.problems.episode_networks import GroupedMLP
    >>> task = ImplicitMAML(GroupedMLP((1, 8, 1), episodes=4), MSE(), prox=2.0)
    >>> task.problem().inner.penalty.strength
    0.5
    """

    networks: EpisodeNetworks
    loss: Loss
    prox: float

    def problem(self) -> Problem:
        objective = Objective(self.networks, self.loss)
        penalty = Proximal(self.prox / self.networks.episodes, self.networks.spread)
        return Problem(Level(objective, penalty=penalty), Level(objective))

    def start(self) -> Tree:
        return self.networks.single()

    def begin(self, hparams: TreeLike) -> Tree:
        return self.networks.spread(hparams)


@dataclass(frozen=True)
class HyperRepresentation(MetaTask):
    r"""Learn features: ``min over phi of (1/B) sum_b query_b(h_b*, phi)``.

    ``h_b* = argmin over h of support_b(h, phi) + decay/2 |h|^2`` for each episode b. Franceschi et al. 2018,
    https://arxiv.org/abs/1806.04910. The outer variables phi are the parameters of the body that maps
    inputs to features; the inner problem trains a head per episode on the features of its support set, from zero. With linear
    heads it is convex. The B inner problems are one: the mean over episodes, as in :class:`ImplicitMAML`.

    Args:
        body: from inputs (N, ...) to features (N, F), row by row (no batch normalisation); run as it is, without gradients
            of its own.
        heads: B heads on features, such as ``GroupedMLP((F, C), B)``.
        loss: of the outputs (N, C, B), for support and query alike.
        decay: of the heads, > 0, in units of an episode's support loss per squared parameter.

    >>> from weingarten import MSE
    >>> from weingarten.applications.problems.episode_networks import GroupedMLP
    >>> body = nn.Sequential(nn.Linear(1, 8), nn.Tanh())
    >>> task = HyperRepresentation(body, GroupedMLP((8, 1), episodes=4), MSE(), decay=0.4)
    >>> round(task.problem().inner.penalty.coefficient, 3), sorted(task.start())
    (0.1, ['0.bias', '0.weight'])
    """

    body: nn.Module
    heads: EpisodeNetworks
    loss: Loss
    decay: float

    def problem(self) -> Problem:
        objective = Objective(self.heads, self.loss)
        penalty = L2(self.decay / self.heads.episodes)
        return Problem(Level(objective, self.featured, penalty), Level(objective, self.featured))

    def start(self) -> Tree:
        return {name: p.detach().clone() for name, p in self.body.named_parameters()}

    def begin(self, hparams: TreeLike) -> Tree:
        like = next(iter(hparams.values()))
        return {
            name: torch.zeros_like(p).to(like) for name, p in self.heads.spread(self.heads.single()).items()
        }

    def featured(self, hparams: TreeLike, batch: Batch) -> Batch:
        """The batch with features (N, B, F) in place of inputs (N, B, ...)."""
        x: Tensor = batch.inputs
        features = torch.func.functional_call(self.body, dict(hparams), (x.flatten(0, 1),))
        return replace(batch, inputs=features.unflatten(0, x.shape[:2]))
