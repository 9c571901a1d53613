"""A network that weighs rows: learn from a small balanced set how much a row counts, by its loss and its class."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from weingarten.bilevel import L2, Level, Problem
from weingarten.losses import CrossEntropy
from weingarten.objective import Batch, Objective
from weingarten.tree import Tree, TreeLike

__all__ = ["WeightNetwork"]


@dataclass(frozen=True)
class WeightNetwork:
    r"""Weights of rows from a network of one hidden layer, whose parameters :math:`\phi` are the outer variables.

    .. math::
        g(\theta, \phi) = \frac1N \sum_n 2\, \sigma(v_\phi(r_n, y_n))\, \ell(\theta; x_n, y_n) + \frac{c}{2} |\theta|^2,
        \qquad f(\theta) = \mathop{\mathrm{mean}}_{\text{balanced}} \ell(\theta; x, y)

    After Meta-Weight-Net (Shu et al. 2019, https://arxiv.org/abs/1902.07379), with these differences.

    *Which loss v sees.* There it is the current loss :math:`\ell(\theta; x_n, y_n)`, a constant where the inner gradient is
    formed (had the weight a gradient in :math:`\theta`, rows would be pushed to losses that v favours). Training then follows
    :math:`\sum_n v_\phi(\ell_n(\theta)) \nabla \ell_n(\theta)`, which is not the gradient of
    :math:`\sum_n v_\phi(\ell_n) \ell_n`; its Jacobian has a term :math:`v' \nabla \ell_n \nabla \ell_n^T` of either sign, which
    no GGN has. Here :math:`r_n` is the row's loss under reference parameters, such as those of the model trained without
    weights. That is data: g is a function of both arguments, its mixed derivative is exact, and its curvature is a weighted
    GGN, never indefinite. The loss may be taken anew (:meth:`inputs`) between two calls of ``solve``; within one it stays.

    *The class* goes in beside the loss, one-hot: under imbalance the loss alone cannot tell a rare row from a wrong one.
    CMW-Net (Shu et al. 2022, https://arxiv.org/abs/2202.05613) takes the class's size for the same purpose.

    *Scale.* The last layer starts at zero, so that all weights are 1 at the start; they stay in (0, 2). They are not divided
    by their mean over a batch, so that a mini-batch's loss is an unbiased sample of g.

    Args:
        model: its parameters are the inner variables; maps x to logits (N, C).
        classes: C.
        weight_decay: c >= 0, default 1e-3.
        hidden: width of v, default 16: its input has one number and a class.
        seed: of the first layer of v, default 0.

    Raises:
        ValueError: for less than one class or hidden unit or a negative weight decay; from the inner level, if a batch's
            inputs are not a pair ``(x, losses)``.

    >>> task = WeightNetwork(nn.Linear(2, 3), classes=3)
    >>> x, y = torch.ones(2, 2), torch.tensor([0, 2])
    >>> batch = Batch(task.inputs(x, y), y)
    >>> task.problem().inner.transform(task.start(), batch).weights
    tensor([1., 1.])
    """

    model: nn.Module
    classes: int
    weight_decay: float = 1e-3
    hidden: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.classes < 1 or self.hidden < 1 or not self.weight_decay >= 0:
            raise ValueError(
                f"WeightNetwork: classes is {self.classes}, hidden {self.hidden} and weight_decay {self.weight_decay}, expected "
                "classes >= 1, hidden >= 1 and weight_decay >= 0"
            )

    def problem(self) -> Problem:
        """Both levels, of one cross-entropy: inputs are ``(x, losses)`` at the inner and x at the outer level."""
        objective = Objective(self.model, CrossEntropy())
        return Problem(Level(objective, self._weighted, L2(self.weight_decay)), Level(objective))

    def start(self) -> Tree:
        r"""The outer variables at the start.

        ``first.weight`` (hidden, 1 + C) uniform in :math:`\pm 1`, ``first.bias`` (hidden,), ``last.weight`` (1, hidden) and
        ``last.bias`` (1,) zero.
        """
        like = next(self.model.parameters()).detach()
        first = torch.rand(
            self.hidden,
            1 + self.classes,
            generator=torch.Generator().manual_seed(self.seed),
            dtype=like.dtype,
        )
        return {
            "first.weight": (2 * first - 1).to(like.device),
            "first.bias": like.new_zeros(self.hidden),
            "last.weight": like.new_zeros(1, self.hidden),
            "last.bias": like.new_zeros(1),
        }

    def inputs(self, x: Tensor, targets: Tensor, params: TreeLike | None = None) -> tuple[Tensor, Tensor]:
        """The inner level's inputs ``(x, losses)``.

        Args:
            x: what the model takes, (N, ...).
            targets: class numbers (N,).
            params: reference parameters, under which the losses are taken; default: those of the model now.
        """
        objective = Objective(self.model, CrossEntropy())
        params = objective.params() if params is None else params
        with torch.no_grad():
            return x, objective.loss.elements(objective.forward(params, x), targets)

    def weights(self, hparams: TreeLike, losses: Tensor, targets: Tensor) -> Tensor:
        """The weights (N,), in (0, 2), of rows with these losses (N,) and classes (N,).

        The loss enters as its logarithm, ``log(1e-2 + loss)``: those of a trained model spread over decades.
        """
        kinds = functional.one_hot(targets, self.classes).to(losses.dtype)
        features = torch.cat([(losses + 1e-2).log()[:, None], kinds], 1)
        first = functional.linear(features, hparams["first.weight"], hparams["first.bias"]).tanh()
        return 2 * functional.linear(first, hparams["last.weight"], hparams["last.bias"])[:, 0].sigmoid()

    def _weighted(self, hparams: TreeLike, batch: Batch) -> Batch:
        if not isinstance(batch.inputs, tuple | list) or len(batch.inputs) != 2:
            raise ValueError(
                f"WeightNetwork: the inputs of an inner batch are {type(batch.inputs).__name__}, expected a pair (x, losses); "
                "make them by inputs(x, targets): Rows(task.inputs(x, y), y)"
            )
        x, losses = batch.inputs
        return replace(batch, inputs=x, weights=self.weights(hparams, losses, batch.targets))
