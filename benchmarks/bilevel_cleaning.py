"""What `weingarten clean` gains on TREC over every rival, from 50, 100 and 400 trusted questions.

The recipe of the command, on vectors of the frozen MiniLM: given are the 5,033 training questions with their weak labels,
trusted are some of the 500 checked ones, and accuracy is measured on the rest of these (where 400 are trusted, on 100). Rivals
have the same linear head, choose their training by the trusted rows (`weingarten.applications.clean.rivals`), and are joined by
logistic regression on the trusted rows. True labels of the training questions score the ranking of wrong labels, and are a
second measure of accuracy: on questions whose weak labels were seen.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.bilevel_trec import CLASSES, Data, checked, questions
from weingarten.applications.clean.data import Parts
from weingarten.applications.clean.encoding import Encoding
from weingarten.applications.clean.levels import row_weight
from weingarten.applications.clean.network import accuracy, build_network
from weingarten.applications.clean.recipe import clean_labels
from weingarten.applications.clean.rivals import compete
from weingarten.applications.clean.rounds import Rounds
from weingarten.applications.clean.settings import Settings
from weingarten.applications.clean.task import Task

__all__ = ["TRUSTED", "gained", "summary"]

TRUSTED = (50, 100, 400)
RIVALS = ("logistic regression on trusted", "trusted", "both", "all", "kept")
"""What can be had without the recipe and without the truth."""


def without_loop(data: Data, x: Tensor, y: Tensor, settings: Settings, seed: int) -> nn.Module:
    """The recipe with the noise model and the row weights at their start: what the hypergradients add is the rest."""
    task = Task.make(data.x, data.weak, x, y, CLASSES, settings, seed)
    start = task.levels.start(task.first_transition(settings, seed))
    network = build_network(settings.model, data.x.shape[1], settings.hidden, CLASSES, seed + 1)
    trusted = functional.one_hot(y, CLASSES).to(x.dtype)
    weight, transition = row_weight(start), task.levels.transition(start)
    return Rounds().fit(network, data.x, data.weak, weight, transition, x, trusted, seed)


def once(data: Data, trusted: int, seed: int, model: str, rivals: bool = True) -> dict[str, Any]:
    """One split: accuracies on the other checked questions, on the training questions' truth, and AUROCs."""
    rows, judged = checked(seed, trusted)
    x, y = data.checked_x[rows], data.checked_y[rows]
    held_x, held_y = data.checked_x[judged], data.checked_y[judged]
    settings = Settings(model=model)
    start = time.process_time()  # of one thread: other processes do not count
    found = clean_labels(data.x, data.weak, x, y, CLASSES, settings, seed)
    seconds = time.process_time() - start
    plain = LogisticRegression(max_iter=2000).fit(x.numpy(), y.numpy())
    held = {
        "cleaned": accuracy(found.model, held_x, held_y),
        "cleaned, no loop": accuracy(without_loop(data, x, y, settings, seed), held_x, held_y),
        "logistic regression on trusted": float(plain.score(held_x.numpy(), held_y.numpy())),
    }
    wrong = (data.weak != data.truth).numpy()
    entry: dict[str, Any] = {
        "accuracy": held,
        "on training questions": {
            "cleaned": accuracy(found.model, data.x, data.truth),
            "logistic regression on trusted": float(plain.score(data.x.numpy(), data.truth.numpy())),
        },
        "auroc": {"cleaned": float(roc_auc_score(wrong, found.score.numpy()))},
        "seconds": round(seconds, 1),
    }
    if rivals:
        parts = Parts(
            Encoding(()), torch.arange(len(data.x)), data.x, data.weak, data.truth, x, y, held_x, held_y
        )
        others = compete(parts, model, settings.hidden, CLASSES, seed, lambda part, text: None)
        held |= others.accuracy
        entry["auroc"] |= others.auroc
    return entry


def gained(
    seeds: tuple[int, ...], trusted: tuple[int, ...] = TRUSTED, model: str = "linear", rivals: bool = True
) -> dict[str, Any]:
    """Every split, by one thread; without ``rivals`` logistic regression is the only one."""
    torch.set_num_threads(1)
    data = questions()
    return {str(size): [once(data, size, seed, model, rivals) for seed in seeds] for size in trusted}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Means over splits, and the lead over the best rival that is within reach."""
    lines: dict[str, Any] = {}
    for size, entries in found.items():
        table = {
            part: {key: round(statistics.mean(e[part][key] for e in entries), 4) for key in entries[0][part]}
            for part in ("accuracy", "on training questions", "auroc")
        }
        rivals = {key: v for key, v in table["accuracy"].items() if key in RIVALS}
        best = max(rivals, key=lambda key: rivals[key])
        lines[size] = table | {
            "best rival": best,
            "gain_points": round(100 * (table["accuracy"]["cleaned"] - rivals[best]), 2),
            "seconds": round(statistics.mean(e["seconds"] for e in entries), 1),
        }
    return lines
