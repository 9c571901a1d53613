"""Weight decays as outer variables, one per leaf or one per weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from weingarten.bilevel import L2, Level, Problem
from weingarten.losses import CrossEntropy, Loss
from weingarten.objective import Objective
from weingarten.tree import Tree, TreeLike

__all__ = ["WeightDecays"]


@final
@dataclass(frozen=True)
class WeightDecays:
    r"""Find the weight decays under which training generalises best.

    .. math::
        g &= \mathrm{loss}_{\text{train}}(\theta) + \tfrac12 \sum_i e^{h_i} \theta_i^2, \\
        f &= \mathrm{loss}_{\text{held out}}(\theta)

    Lorraine, Vicol and Duvenaud 2019, https://arxiv.org/abs/1911.02590. The penalty's curvature ``diag(exp(h))`` is known and
    enters the operator exactly. It is no multiple of the identity, so an estimate cannot be the operator (``Implicit(KFAC(),
    Direct(), None)`` refuses); as a preconditioner it takes the mean decay.

    Args:
        model: trained by the inner level; its trainable parameters decay.
        decay: of every weight at the start, > 0; in units of the loss per squared weight. The default suits a loss of order one
            and some 10^3 rows.
        each_weight: one outer variable per weight; False (default): one per leaf, as in the parameter groups of an optimiser.
        loss: of both levels.

    Raises:
        ValueError: if ``decay`` is not positive and finite.

    >>> task = WeightDecays(nn.Linear(3, 2), decay=0.01)
    >>> {name: round(float(h), 2) for name, h in task.start().items()}
    {'weight': -4.61, 'bias': -4.61}
    >>> WeightDecays(nn.Linear(3, 2), each_weight=True).start()["weight"].shape
    torch.Size([2, 3])
    """

    model: nn.Module
    decay: float = 1e-3
    each_weight: bool = False
    loss: Loss = CrossEntropy()  # noqa: RUF009 - a frozen dataclass

    def __post_init__(self) -> None:
        if not 0 < self.decay < float("inf"):
            raise ValueError(
                f"WeightDecays: decay is {self.decay}, expected a positive number, since its logarithm is the outer variable"
            )

    def problem(self) -> Problem:
        """Both levels; only the inner one decays."""
        objective = Objective(self.model, self.loss)
        return Problem(Level(objective, penalty=L2(self.decays)), Level(objective))

    def start(self) -> Tree:
        """The logarithms of the decays, by the names of the parameters: 0-d, or of their shapes."""
        params = Objective(self.model, self.loss).params()
        at = math.log(self.decay)
        return {
            name: torch.full_like(p, at) if self.each_weight else p.new_tensor(at)
            for name, p in params.items()
        }

    def decays(self, hparams: TreeLike) -> Tree:
        """The decays that the outer variables stand for."""
        return {name: h.exp() for name, h in hparams.items()}
