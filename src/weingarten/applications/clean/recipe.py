"""The learning recipe: row weights and a noise model by hypergradients, then one network taught by them in rounds."""

from __future__ import annotations

import copy
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
from weingarten.tree import TreeLike

__all__ = ["FIRST_KEPT", "Cleaned", "Settings", "choose_transition", "clean_labels"]

LOOP = 0.9
"""The outer loop's share of the progress bar."""
THRESHOLD = 0.5
FIRST_KEPT = (
    "How often each class is given each label is taken as the trusted rows first showed it. What was learned on from there "
    "explained the given labels, but served trusted rows that were held back for this comparison less well."
)
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
    weight, transition, notes = row_weight(outcome.hparams), None, []
    network = build_network(settings.model, train_x.shape[1], settings.hidden, classes, seed + 1).to(train_x)
    if task.levels.correct:
        transition, looped_is_better = choose_transition(task, outcome.hparams, network, seed)
        notes = [] if looped_is_better else [FIRST_KEPT]
        _teach(network, task, weight, transition, seed)
    else:
        counts = torch.cat([weight, torch.ones_like(trusted_y, dtype=weight.dtype)])
        labels = functional.one_hot(task.labels, classes).to(train_x)
        Final().fit(network, task.x, labels, counts, seed)
    tell(1.0, "final model")
    return Cleaned(
        **_judgement(network, train_x, given),
        weight=weight,
        threshold=THRESHOLD,
        threshold_reason=REASON,
        model=network,
        transition=transition,
        history=history,
        cost={
            "outer steps": float(outcome.step),
            "curvature products": float(sum(outcome.history.column("products"))),
            "loop seconds": history[-1]["seconds"],
            "final seconds": time.perf_counter() - looped,
        },
        notes=notes,
    )


def choose_transition(task: Task, hparams: TreeLike, network: nn.Module, seed: int) -> tuple[Tensor, bool]:
    """T by which trusted rows are likelier to networks that were taught without them: as the loop left it, or as it began.

    The loop follows the likelihood of the given labels too, and where these depend on more than the class, it bends T to what
    explains them.

    Args:
        task: with T at the start.
        hparams: where the loop left the outer variables.
        network: from which teaching starts; copied.
        seed: of everything random.

    Returns:
        T (C, C), and whether it is the loop's.
    """
    assert task.first is not None
    looped, rows, fold = task.levels.transition(hparams), task.levels.given, task.fold[task.levels.given :]
    if len(fold.unique()) < 2:  # a single trusted row, and nothing to compare by
        return looped, True

    def loss(transition: Tensor) -> float:
        total = 0.0
        for number in fold.unique().tolist():
            held, taught = fold == number, copy.deepcopy(network)
            _teach(taught, task, row_weight(hparams), transition, seed, ~held)
            with torch.no_grad():
                logits = taught(task.x[rows:][held])
            total += float(functional.cross_entropy(logits, task.labels[rows:][held], reduction="sum"))
        return total

    return (looped, True) if loss(looped) <= loss(task.first) else (task.first, False)


def _teach(
    network: nn.Module, task: Task, weight: Tensor, transition: Tensor, seed: int, seen: Tensor | None = None
) -> None:
    """Teach the network in rounds; ``seen`` says which trusted rows take part (m,), None for all."""
    rows, part = task.levels.given, slice(None) if seen is None else seen
    trusted = functional.one_hot(task.labels[rows:], task.levels.classes).to(task.x)
    given = task.x[:rows], task.labels[:rows]
    Rounds().fit(network, *given, weight, transition, task.x[rows:][part], trusted[part], seed)
