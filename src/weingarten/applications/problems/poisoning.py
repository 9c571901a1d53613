r"""How much a model loses if some of its training rows are changed within a small ball: robustness, measured on local data.

The purpose is to measure the robustness of one's own model on one's own data, before somebody else's data makes the
measurement: a worst case within a ball, set beside random changes of the same size and beside no change, and against the
defence of cleaning. The worst case is a bilevel problem. Its outer variables are the changes ``delta``,

``max over |delta| <= epsilon of f(params*(delta))``, ``params*(delta) = argmin over params of g(params, x + delta, y)``,

with f the loss on clean held-out rows: availability poisoning, Munoz-Gonzalez et al. 2017, https://arxiv.org/abs/1708.08689.
The sibling that *minimises* the training loss itself over ``delta`` makes rows from which nothing is learned: Huang et al.
2021, https://arxiv.org/abs/2101.04898. Labels are never changed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from weingarten.bilevel import Level, Penalty, Problem, Projection
from weingarten.objective import Batch, Objective
from weingarten.tree import Tree, TreeLike

__all__ = ["Around", "Poisoning"]


@final
@dataclass(frozen=True, eq=False)
class Around(Projection):
    """Changes of at most ``epsilon`` per entry that keep ``centre + change`` between ``low`` and ``high``.

    The set is a box, so clamping entry by entry is the exact projection.

    Args:
        centre: what is changed, ``(P, ...)``, within ``low ... high``.
        epsilon: largest change of an entry, > 0, in units of ``centre``.
        low: smallest value that a changed entry may have.
        high: largest one.

    >>> Around(torch.tensor([0.0, 0.5, 1.0]), epsilon=0.25)(torch.tensor([-1.0, 1.0, -1.0]))
    tensor([ 0.0000,  0.2500, -0.2500])
    """

    centre: Tensor
    epsilon: float
    low: float = 0.0
    high: float = 1.0

    def __call__(self, leaf: Tensor) -> Tensor:
        smallest = (self.low - self.centre).clamp(min=-self.epsilon)
        largest = (self.high - self.centre).clamp(max=self.epsilon)
        return torch.minimum(torch.maximum(leaf, smallest), largest)

    def __repr__(self) -> str:
        """Sizes only; part of the fingerprint of a checkpoint."""
        return f"Around(centre={tuple(self.centre.shape)}, epsilon={self.epsilon}, low={self.low}, high={self.high})"


@final
@dataclass(frozen=True, eq=False)
class Poisoning:
    r"""Rows of the training data that may be changed within a ball, for the worst or for random changes.

    Args:
        objective: model and loss, of both levels.
        inputs: the rows that may be changed, as they are, ``(P, ...)``, with entries between ``low`` and ``high``.
        rows: their row numbers in the training data, ``(P,)``, strictly increasing. All other rows stay as they are.
        epsilon: largest change of an entry, > 0, in units of ``inputs``.
        low: smallest value of an entry; default 0, black.
        high: largest one; default 1, white.
        penalty: of the inner level; without one a model that fits every row has no isolated minimum, and no hypergradient there.

    Raises:
        ValueError: for numbers out of range, and for rows that do not number the inputs.

    >>> from weingarten import CrossEntropy
    >>> model = Objective(torch.nn.Linear(2, 2), CrossEntropy())
    >>> task = Poisoning(model, torch.tensor([[0.5, 0.5]]), rows=torch.tensor([1]), epsilon=0.1)
    >>> data = Batch(torch.full((2, 2), 0.5), torch.tensor([0, 1]), rows=torch.arange(2))
    >>> task.change({"delta": torch.tensor([[0.1, -0.1]])}, data).inputs
    tensor([[0.5000, 0.5000],
            [0.6000, 0.4000]])
    """

    objective: Objective
    inputs: Tensor
    rows: Tensor
    epsilon: float
    low: float = 0.0
    high: float = 1.0
    penalty: Penalty | None = None

    def __post_init__(self) -> None:
        if not self.epsilon > 0 or not self.low < self.high:
            raise ValueError(
                f"Poisoning: epsilon is {self.epsilon}, low {self.low} and high {self.high}, expected epsilon > 0 and low < high"
            )
        if not len(self.inputs):
            raise ValueError("Poisoning: inputs has no row, expected at least one that may be changed")
        if self.rows.shape != (len(self.inputs),) or not bool((self.rows.diff() > 0).all()):
            raise ValueError(
                f"Poisoning: rows has shape {tuple(self.rows.shape)} for {len(self.inputs)} inputs, expected one number for each "
                "input, strictly increasing; sort the rows and the inputs with them"
            )
        smallest, largest = float(self.inputs.min()), float(self.inputs.max())
        if smallest < self.low or largest > self.high:
            raise ValueError(
                f"Poisoning: inputs lie between {smallest:.4g} and {largest:.4g}, expected between low={self.low} and "
                f"high={self.high}; scale the inputs, or pass the range that they have"
            )

    def problem(self) -> Problem:
        """Availability poisoning: the outer loss, on clean rows, is to be *maximised* over ``delta``.

        Pass an outer optimiser that does so, ``functools.partial(torch.optim.Adam, lr=0.1, maximize=True)``, and
        ``project=task.projection()``.
        """
        return Problem(self._inner(), Level(self.objective))

    def error_minimising(self) -> Problem:
        """Unlearnable rows: the outer loss is the training loss on the changed rows, to be *minimised* over ``delta``.

        Without a penalty, both levels minimise one function, and the hypergradient is its direct term.
        """
        return Problem(self._inner(), Level(self.objective, self.change))

    def start(self) -> Tree:
        """No change: ``{"delta": zeros (P, ...)}``."""
        return {"delta": torch.zeros_like(self.inputs)}

    def random(self, generator: torch.Generator) -> Tree:
        """Changes by ``epsilon`` up or down at random, within the range: the control of the same size."""
        signs = torch.randint(2, self.inputs.shape, generator=generator, device=self.inputs.device)
        delta = self.epsilon * (2 * signs - 1).to(self.inputs.dtype)
        return {"delta": self.projection()(delta)}

    def projection(self) -> Projection:
        """Onto the changes within ``epsilon`` and the range of the inputs."""
        return Around(self.inputs, self.epsilon, self.low, self.high)

    def change(self, hparams: TreeLike, batch: Batch) -> Batch:
        """The batch with ``inputs + delta`` in the rows that may be changed, found by ``batch.rows``.

        Raises:
            ValueError: if the batch has no row numbers.
        """
        if batch.rows is None:
            raise ValueError(
                "Poisoning.change: the batch has no row numbers, expected batch.rows; draw it from wg.Rows(inputs, targets)"
            )
        place = torch.searchsorted(self.rows, batch.rows).clamp(max=len(self.rows) - 1)
        may = self.rows[place] == batch.rows
        delta = hparams["delta"][place] * may.reshape(-1, *[1] * (self.inputs.ndim - 1))
        return replace(batch, inputs=batch.inputs + delta)

    def _inner(self) -> Level:
        return Level(self.objective, self.change, self.penalty)
