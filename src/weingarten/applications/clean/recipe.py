"""The learning recipe: row weights and a noise model by hypergradients, then one network taught by them in rounds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from weingarten.applications.clean.final import Final
from weingarten.applications.clean.levels import row_weight
from weingarten.applications.clean.network import build_network
from weingarten.applications.clean.rounds import Rounds
from weingarten.applications.clean.settings import Settings
from weingarten.applications.clean.task import Task
from weingarten.bilevel import Outcome

__all__ = ["Cleaned", "Settings", "clean_labels"]

LOOP = 0.9
"""The outer loop's share of the progress bar."""
THRESHOLD = 0.5
REASON = "where the cleaned model finds the given label less likely than all others together"


@dataclass(frozen=True)
class Cleaned:
    """What cleaning found, for N given rows and C classes.

    Attributes:
        weight: that hypergradients found, in [0, 1], (N,). With corrected labels a wrong row keeps most of its weight: what it
            says about the other classes is still used. ``score`` ranks wrong labels better.
        score: 1 - the cleaned model's probability of the given label, (N,); higher is more likely wrong.
        suspect: ``score > threshold`` and another label is suggested.
        threshold: on the score.
        threshold_reason: why it is this one.
        suggested: the most likely label, (N,).
        probability: of each class, (N, C): the cleaned model's.
        model: the cleaned network.
        transition: T (C, C), how often each class is given each label; None where labels were not corrected.
        history: one row per outer step: ``step``, ``seconds``, ``outer_loss``, ``inner_loss`` (of one network),
            ``trusted_accuracy`` (cross-fitted), ``damping``.
        cost: ``outer steps``, ``curvature products``, ``loop seconds`` (all sessions of a resumed run), ``final seconds``.
        notes: remarks for the report.
    """

    weight: Tensor
    score: Tensor
    suspect: Tensor
    threshold: float
    threshold_reason: str
    suggested: Tensor
    probability: Tensor
    model: nn.Module
    transition: Tensor | None
    history: list[dict[str, float]]
    cost: dict[str, float]
    notes: list[str] = field(default_factory=list)

    def taught(self, network: nn.Module, x: Tensor, given: Tensor, **cost: float) -> Cleaned:
        """What another network, trained with these weights and this transition, makes of the labels.

        Args:
            network: trained.
            x: what it takes for the given rows.
            given: their labels.
            cost: what this took, joined to the cost so far.
        """
        return replace(self, model=network, cost=self.cost | cost, **_judgement(network, x, given))


def _judgement(network: nn.Module, x: Tensor, given: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        probability = network(x).softmax(1)
    score, suggested = 1 - probability.gather(1, given[:, None])[:, 0], probability.argmax(1)
    suspect = (score > THRESHOLD) & (suggested != given)
    return {"score": score, "suspect": suspect, "suggested": suggested, "probability": probability}


def clean_labels(
    train_x: Tensor,
    given: Tensor,
    trusted_x: Tensor,
    trusted_y: Tensor,
    classes: int,
    settings: Settings,
    seed: int,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: Callable[[float, str], None] | None = None,
) -> Cleaned:
    """Find wrong labels and train a network that withstands them.

    Args:
        train_x: features (N, D), standardised.
        given: labels to judge (N,), class numbers.
        trusted_x: features of rows whose labels are right, (m, D).
        trusted_y: these labels, (m,); every class should be there.
        classes: C.
        settings: see there.
        seed: of everything random.
        checkpoint: where the loop saves its state; None for nowhere.
        resume: go on from the checkpoint if there is one.
        progress: called with the part done in [0, 1] and what is going on.

    Raises:
        ValueError: for an unknown method.
        CheckpointError: if the checkpoint is of other settings.
        DivergenceError: if training diverges.
        Interrupted: a ``KeyboardInterrupt`` after SIGINT, with the state saved to the checkpoint.
    """
    tell = progress or (lambda part, text: None)
    task = Task.make(train_x, given, trusted_x, trusted_y, classes, settings, seed)
    outcome, history = task.solve(
        settings, seed, checkpoint, resume, lambda part, text: tell(LOOP * part, text)
    )
    looped = time.perf_counter()
    tell(LOOP, "final model")
    network = build_network(settings.model, train_x.shape[1], settings.hidden, classes, seed + 1).to(train_x)
    _finish(network, task, outcome, seed)
    tell(1.0, "final model")
    return Cleaned(
        **_judgement(network, train_x, given),
        weight=row_weight(outcome.hparams),
        threshold=THRESHOLD,
        threshold_reason=REASON,
        model=network,
        transition=task.levels.transition(outcome.hparams) if task.levels.correct else None,
        history=history,
        cost={
            "outer steps": float(outcome.step),
            "curvature products": float(sum(outcome.history.column("products"))),
            "loop seconds": history[-1]["seconds"],
            "final seconds": time.perf_counter() - looped,
        },
    )


def _finish(network: nn.Module, task: Task, outcome: Outcome, seed: int) -> None:
    """Train the network on the given rows, as the outer variables see them, and on the trusted rows, which count fully."""
    rows, classes = task.levels.given, task.levels.classes
    weight = row_weight(outcome.hparams)
    labels = functional.one_hot(task.labels, classes).to(task.x.dtype)
    if task.levels.correct:
        transition, trusted = task.levels.transition(outcome.hparams), (task.x[rows:], labels[rows:])
        Rounds().fit(network, task.x[:rows], task.labels[:rows], weight, transition, *trusted, seed)
    else:
        counts = torch.cat([weight, torch.ones(len(labels) - rows, dtype=weight.dtype)])
        Final().fit(network, task.x, labels, counts, seed)
