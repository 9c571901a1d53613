"""Weights of rows: learn from trusted rows how much each row of doubtful data counts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor, nn

from weingarten.bilevel import L2, Level, Problem
from weingarten.losses import CrossEntropy
from weingarten.objective import Batch, Objective
from weingarten.tree import Tree, TreeLike

__all__ = ["RowWeights"]


@dataclass(frozen=True)
class RowWeights:
    r"""One weight per row of the inner level, judged by the loss on trusted rows ("data hyper-cleaning").

    .. math::
        g(\theta, u) = \frac1N \sum_n \frac{\sigma(u_n)}{\sigma(s)} \ell(\theta; x_n, y_n) + \frac{c}{2} |\theta|^2,
        \qquad f(\theta) = \mathop{\mathrm{mean}}_{\text{trusted}} \ell(\theta; x, y)

    Franceschi et al. 2017, https://arxiv.org/abs/1703.01785, whose weights lie in [0, 1]; the sigmoid keeps them there without a
    projection. They are divided by their common value at the start, :math:`\sigma(s)`, and not by their mean: so all of them are
    1 at the start, the decay c means what it means in plain training, and g stays a sum over rows, of which a mini-batch is an
    unbiased sample. As rows are put aside, the decay grows in proportion to what is left.

    The inner batches must number their rows (:class:`weingarten.Rows` does).

    Args:
        model: its parameters are the inner variables; maps inputs to logits (N, C).
        rows: N, rows of the doubtful data.
        weight_decay: c >= 0, default 1e-3: small, for the rows that are put aside do the work of regularisation.
        initial: s, the outer variable of every row at the start; default 1, where the weight, 0.73, can still move either way.

    Raises:
        ValueError: for no rows, a negative weight decay or an ``initial`` that is not finite; from the inner level, if a
            batch does not number its rows or a number is not below ``rows``.

    >>> import torch
    >>> task = RowWeights(nn.Linear(2, 3), rows=4)
    >>> batch = Batch(torch.zeros(2, 2), torch.tensor([0, 1]), rows=torch.tensor([3, 0]))
    >>> task.problem().inner.transform(task.start(), batch).weights
    tensor([1., 1.])
    """

    model: nn.Module
    rows: int
    weight_decay: float = 1e-3
    initial: float = 1.0

    def __post_init__(self) -> None:
        if self.rows < 1 or not self.weight_decay >= 0 or not math.isfinite(self.initial):
            raise ValueError(
                f"RowWeights: rows is {self.rows}, weight_decay {self.weight_decay} and initial {self.initial}, expected "
                "rows >= 1, weight_decay >= 0 and a finite initial"
            )

    def problem(self) -> Problem:
        """Both levels, of one cross-entropy."""
        objective = Objective(self.model, CrossEntropy())
        return Problem(Level(objective, self._weighted, L2(self.weight_decay)), Level(objective))

    def start(self) -> Tree:
        """The outer variables at the start: ``u`` (N,), all ``initial``."""
        like = next(self.model.parameters()).detach()
        return {"u": like.new_full((self.rows,), self.initial)}

    def weights(self, hparams: TreeLike) -> Tensor:
        """The weight of each row, shape (N,), in (0, 1 / sigmoid(initial)); a row of low weight is a suspect."""
        return hparams["u"].sigmoid() * (1 + math.exp(-self.initial))

    def _weighted(self, hparams: TreeLike, batch: Batch) -> Batch:
        if batch.rows is None:
            raise ValueError(
                "RowWeights: an inner batch has rows None, expected the numbers of its rows, by which their weights are found; "
                "pass Rows(x, y, batch_size) as inner_data, or Batch(..., rows=...)"
            )
        if len(batch.rows) and int(batch.rows.max()) >= self.rows:
            raise ValueError(
                f"RowWeights: an inner batch has row {int(batch.rows.max())}, expected numbers below {self.rows}; pass rows=, "
                "the number of rows of the inner data"
            )
        return replace(batch, weights=self.weights(hparams)[batch.rows])
