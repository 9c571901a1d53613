"""The two levels of cleaning as a bilevel problem of the library."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from weingarten.applications.clean.folds import Folds, fitted_targets, held_targets
from weingarten.bilevel import L2, Level, Problem, Rows, Source
from weingarten.losses import CrossEntropy
from weingarten.objective import Batch, Objective
from weingarten.tree import Tree, TreeLike

__all__ = ["GivenAndTrusted", "Levels", "believed_transition", "evenly_wrong", "row_weight"]

START = 2.0
"""Weights start at ``sigmoid(2) = 0.88``: high, and where the sigmoid still answers."""


def evenly_wrong(classes: int, kept: float = 0.6) -> Tensor:
    """T (C, C) of labels that stay with probability ``kept`` and else change to every other class alike.

    What is assumed where nothing is known: below one, for T is not to be learned from a start that denies noise.

    >>> evenly_wrong(3, 0.5)[0]
    tensor([0.5000, 0.2500, 0.2500])
    """
    others = (1 - kept) / max(1, classes - 1)
    return torch.full((classes, classes), others).fill_diagonal_(kept)


def believed_transition(probability: Tensor, given: Tensor, prior: Tensor, strength: float = 10.0) -> Tensor:
    r"""T from what a model believes: ``T[c, j]`` in proportion to ``sum_n p(c | x_n) [y_n = j] + strength prior[c, j]``.

    It shows noise that depends on the class, such as labels that mostly stayed at one default class, from which a start of
    even noise does not lead away. A model that errs blurs T, and does not bend it.

    Args:
        probability: of the true classes (N, C), by a model that has not seen the given labels.
        given: labels (N,).
        prior: T (C, C) without data.
        strength: rows that the prior counts for, per class: ten, so that a class of a few rows is not denied on their account.

    >>> believed_transition(torch.eye(2), torch.tensor([0, 0]), torch.full((2, 2), 0.5), 2.0)
    tensor([[0.6667, 0.3333],
            [0.6667, 0.3333]])
    """
    counts = probability.T @ torch.nn.functional.one_hot(given, probability.shape[1]).to(probability.dtype)
    counts = counts + strength * prior.to(counts)
    return counts / counts.sum(1, keepdim=True)


def row_weight(hparams: TreeLike) -> Tensor:
    """The weights in (0, 1) that the outer variable ``weight`` stands for."""
    return hparams["weight"].sigmoid()


@dataclass(frozen=True)
class Levels:
    r"""Which outer variables there are, and how the two levels depend on them.

    With K networks :math:`p_k`, of which network k trains on all rows outside of fold k,

    .. math::
        g &= \sum_k \Big[ \mathop{\mathrm{mean}}_{\text{given, not in fold } k} \frac{\sigma(u_n)}{\sigma(2)} \ell_{nk}
             + \rho \mathop{\mathrm{mean}}_{\text{trusted, not in fold } k} \ell_{nk} + \frac{c}{2} |\theta_k|^2 \Big] \\
        f &= \mathop{\mathrm{mean}}_{\text{trusted}} \ell_{n,k(n)} + \gamma \mathop{\mathrm{mean}}_{\text{given}} \ell_{n,k(n)}

    with :math:`\ell_{nk} = -\log \sum_c p_k(c | x_n) T[c, y_n]` for given labels (T the identity for trusted ones) and k(n) the
    fold of row n. ``g`` is a sum of K problems that share no parameter, so that weight decay, curvature and damping are those
    of one network.

    How these come from a cross-entropy that divides by its number M of valid elements: of a batch with n given and m trusted
    rows each row is valid for K - 1 networks, M = (K - 1)(n + m). The mean over the given rows of one network divides by
    n (K - 1) / K, so their weights carry the factor ``K (n + m) / n`` and those of the trusted rows ``K (n + m) / m``. (Exact for
    folds of equal size; these differ by at most one row.) The outer level has M = n + m and no factor K.

    Args:
        model: the networks.
        classes: C.
        given: number of given rows; rows from there on are trusted.
        correct: whether T is an outer variable. If not, T is the identity and gamma zero: plain reweighting.
        weight_decay: c.
        gamma: see above.
    """

    model: Folds
    classes: int
    given: int
    correct: bool = True
    weight_decay: float = 1e-2
    gamma: float = 1.0

    def problem(self) -> Problem:
        """Both levels."""
        objective = Objective(self.model, CrossEntropy())
        return Problem(Level(objective, self.fitted, L2(self.weight_decay)), Level(objective, self.held))

    def start(self, transition: Tensor | None = None, trusted: float = 0.1) -> Tree:
        """Outer variables at the start: ``weight`` u (N,), ``trusted`` log rho, ``transition`` logits of T's rows (C, C).

        Args:
            transition: T (C, C), entries positive, rows of sum one; default: :func:`evenly_wrong`.
            trusted: rho, small: trusted rows are few and soon overfitted.
        """
        like = next(self.model.parameters()).detach()
        found = {"weight": like.new_full((self.given,), START), "trusted": like.new_tensor(math.log(trusted))}
        if self.correct:
            first = evenly_wrong(self.classes) if transition is None else transition
            found["transition"] = first.to(like).log()
        return found

    def transition(self, hparams: TreeLike) -> Tensor:
        """T (C, C), ``T[c, j] = P(given j | true c)``."""
        if self.correct:
            return hparams["transition"].softmax(1)
        return torch.eye(self.classes, dtype=hparams["weight"].dtype)

    def fitted(self, hparams: TreeLike, batch: Batch) -> Batch:
        """The inner level's batch: per-row weights and transitions."""
        rows, given = self._rows(batch)
        n, m, k = int(given.sum()), int((~given).sum()), len(self.model.networks)
        start = 1 / (1 + math.exp(-START))
        weight = row_weight(hparams)[rows.clamp_max(self.given - 1)] * (k * len(rows) / (max(n, 1) * start))
        trusted = hparams["trusted"].exp() * (k * len(rows) / max(m, 1))
        return replace(
            batch, inputs=self._inputs(hparams, batch, given), weights=torch.where(given, weight, trusted)
        )

    def held(self, hparams: TreeLike, batch: Batch) -> Batch:
        """The outer level's batch; it depends on T alone."""
        rows, given = self._rows(batch)
        n, m = int(given.sum()), int((~given).sum())
        gamma = self.gamma if self.correct else 0.0
        weights = torch.where(given, gamma * len(rows) / max(n, 1), len(rows) / max(m, 1))
        return replace(
            batch, inputs=self._inputs(hparams, batch, given), weights=weights.to(batch.inputs.dtype)
        )

    def _rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert batch.rows is not None, "both sources number their rows"
        return batch.rows, batch.rows < self.given

    def _inputs(self, hparams: TreeLike, batch: Batch, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, noisy = batch.inputs, given if self.correct else torch.zeros_like(given)
        return x, self.transition(hparams).expand(len(x), -1, -1), noisy


class GivenAndTrusted(Source):
    """All rows, or in each batch some of the given rows and some of the trusted rows (all, if there are fewer).

    Args:
        x: features of the given rows, then of the trusted ones.
        targets: (N, K).
        given: number of given rows.
        batch_size: the most rows of either sort in a batch.
    """

    def __init__(self, x: Tensor, targets: Tensor, given: int, batch_size: int) -> None:
        self.rows, self.given, self.batch_size = Rows(x, targets), given, batch_size

    @staticmethod
    def pair(
        x: Tensor, labels: Tensor, fold: Tensor, folds: int, given: int, batch_size: int
    ) -> tuple[GivenAndTrusted, GivenAndTrusted]:
        """The inner and the outer source."""
        inner, outer = fitted_targets(labels, fold, folds), held_targets(labels, fold, folds)
        return GivenAndTrusted(x, inner, given, batch_size), GivenAndTrusted(x, outer, given, batch_size)

    def draw(self, generator: torch.Generator) -> Batch:
        trusted = self.rows.size - self.given
        if max(self.given, trusted) <= self.batch_size:
            return self.rows.draw(generator)
        first, second = (self._some(size, generator) for size in (self.given, trusted))
        return self.rows.take(torch.cat([first, self.given + second]))

    def _some(self, size: int, generator: torch.Generator) -> Tensor:
        if size <= self.batch_size:
            return torch.arange(size)
        return torch.randperm(size, generator=generator)[: self.batch_size]

    def __repr__(self) -> str:
        """Sizes only; part of the fingerprint of a checkpoint."""
        return f"GivenAndTrusted({self.rows!r}, given={self.given}, batch_size={self.batch_size})"
