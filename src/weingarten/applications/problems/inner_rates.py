"""Learning rates of the inner optimiser as outer variables."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn

from weingarten.bilevel import SGD, Event, Level, Problem
from weingarten.losses import CrossEntropy, Loss
from weingarten.objective import Objective
from weingarten.tree import Tree

__all__ = ["FollowedRates", "InnerRates"]


@final
@dataclass(frozen=True)
class InnerRates:
    r"""Find the rates, one per leaf, under which T steps of SGD generalise best.

    .. math::
        F(h) = \mathrm{loss}_{\text{held out}}(\theta_T), \qquad \theta_{t+1} = \theta_t - e^{h} \odot m_{t+1}, \quad
        m_{t+1} = \mu m_t + \nabla \mathrm{loss}_{\text{train}}(\theta_t)

    Maclaurin, Duvenaud and Adams 2015, https://arxiv.org/abs/1502.03492; one step at a time it is the hypergradient descent of
    Baydin et al. 2018, https://arxiv.org/abs/1703.04782. A rate moves no minimum: the implicit function theorem knows nothing of
    it, and ``Implicit`` refuses it by name. Few steps prefer rates that are too small (Wu et al. 2018,
    https://arxiv.org/abs/1803.02021).

    Args:
        model: trained by the inner level.
        rate: of every leaf at the start, > 0; in units of squared weight per loss.
        momentum: in [0, 1).
        loss: of both levels.

    Raises:
        ValueError: if ``rate`` is not positive and finite, or ``momentum`` not in [0, 1).

    >>> from weingarten.bilevel import Batches, Unrolled
    >>> from weingarten.objective import Batch
    >>> task = InnerRates(nn.Linear(2, 2), rate=0.1)
    >>> data = Batch(torch.eye(2), torch.tensor([0, 1]))
    >>> method = Unrolled(5, task.optimizer)
    >>> found = method(task.problem(), task.model.state_dict(), task.start(), Batches(data, data))
    >>> bool(found.value["weight"] < 0)  # a larger rate would learn faster
    True
    """

    model: nn.Module
    rate: float = 0.1
    momentum: float = 0.0
    loss: Loss = CrossEntropy()  # noqa: RUF009 - a frozen dataclass

    def __post_init__(self) -> None:
        if not 0 < self.rate < float("inf") or not 0 <= self.momentum < 1:
            raise ValueError(
                f"InnerRates: rate is {self.rate} and momentum {self.momentum}, expected a positive number and one in [0, 1)"
            )

    def problem(self) -> Problem:
        """Both levels; neither depends on the outer variables, which enter by the optimiser alone."""
        level = Level(Objective(self.model, self.loss))
        return Problem(level, level)

    def start(self) -> Tree:
        """The logarithms of the rates, 0-d, by the names of the parameters."""
        params = Objective(self.model, self.loss).params()
        return {name: p.new_tensor(math.log(self.rate)) for name, p in params.items()}

    def optimizer(self, hparams: Tree) -> SGD:
        """The inner optimiser at these outer variables: ``Unrolled(steps, task.optimizer)``."""
        return SGD({name: h.exp() for name, h in hparams.items()}, self.momentum)

    def followed(self) -> FollowedRates:
        """The same optimiser for the training in ``solve``."""
        return FollowedRates(self.start(), self.momentum)


@final
@dataclass
class FollowedRates:
    """Let the training in ``solve`` use the rates as they stand: ``inner_optimizer=it.make, callbacks=[it.follow]``.

    Attributes:
        hparams: logarithms of the rates at the start, by the names of the parameters, in their order.
        momentum: in [0, 1).
        made: the optimiser of the run.
    """

    hparams: Tree
    momentum: float = 0.0
    made: torch.optim.SGD | None = field(default=None, init=False)

    def make(self, params: list[Tensor]) -> torch.optim.SGD:
        """An ``OptimizerFactory``: SGD with one parameter group per leaf."""
        groups = [
            {"params": [p], "lr": float(h.exp())} for p, h in zip(params, self.hparams.values(), strict=True)
        ]
        self.made = torch.optim.SGD(groups, momentum=self.momentum)
        return self.made

    def follow(self, event: Event) -> bool:
        """A callback: put the rates of the outer variables into the optimiser; never ends the run."""
        assert self.made is not None, "solve makes its optimisers before the first step"
        for group, name in zip(self.made.param_groups, self.hparams, strict=True):
            group["lr"] = float(event.hparams[name].exp())
        return False
