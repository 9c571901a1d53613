"""What `weingarten clean` gains on TREC over every rival, from 50, 100, 400 and 450 trusted questions.

The recipe of the command, on vectors of the frozen MiniLM: given are the 5,033 training questions with their weak labels,
trusted are some of the 500 checked ones, and accuracy is measured on the rest of these (where 400 are trusted, on 100). Where 450
are, there are ten runs, and each of the 500 questions judges one of them: as near as one gets to all of them trusted. Rivals
have the same linear head, choose their training by the trusted rows (`weingarten.applications.clean.rivals`), and are joined by
logistic regression on the trusted rows. True labels of the training questions score the ranking of wrong labels, and are a
second measure of accuracy: on questions whose weak labels were seen. What choosing the noise model by held-back trusted rows
gains is measured there and on the digits of `make demo`.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.bilevel_protocol import spread
from benchmarks.bilevel_trec import CLASSES, checked, questions
from benchmarks.trial_pool import pool
from weingarten.applications.clean.data import Parts, split
from weingarten.applications.clean.encoding import Encoding
from weingarten.applications.clean.levels import row_weight
from weingarten.applications.clean.network import accuracy, build_network
from weingarten.applications.clean.recipe import FIRST_KEPT, Cleaned, clean_labels
from weingarten.applications.clean.rivals import compete
from weingarten.applications.clean.rounds import Rounds
from weingarten.applications.clean.settings import Settings
from weingarten.applications.clean.source import Request, load
from weingarten.applications.clean.task import Task

__all__ = [
    "CHECKED",
    "MOST",
    "TENTHS",
    "TRUSTED",
    "but_a_tenth",
    "gained",
    "gained_on_digits",
    "over_the_best_rival",
    "parts_of",
    "quickly",
    "split_of",
    "summary",
]

CHECKED = 500
TRUSTED, MOST, TENTHS = (50, 100, 400), 450, tuple(range(10))
NOISES = ("pair:0.45", "symmetric:0.5", "feature:0.4")
LOGISTIC = "logistic regression on trusted"
RIVALS = (LOGISTIC, "trusted", "both", "all", "kept")
"""What can be had without the recipe and without the truth, of those there are."""


@dataclass(frozen=True)
class Given:
    """What a cleaning is given, all but the held-out rows and the truth, which judge it."""

    x: Tensor
    labels: Tensor
    truth: Tensor
    trusted_x: Tensor
    trusted_y: Tensor
    held_x: Tensor
    held_y: Tensor
    classes: int
    settings: Settings
    seed: int

    def arguments(self) -> tuple[Any, ...]:
        """Of the recipe."""
        return self.x, self.labels, self.trusted_x, self.trusted_y, self.classes, self.settings, self.seed

    def judged(self, network: nn.Module) -> float:
        """Accuracy on the held-out rows."""
        return accuracy(network, self.held_x, self.held_y)

    def clean(self) -> tuple[Cleaned, float]:
        """By the recipe, and the CPU-seconds of it: other processes do not count."""
        start = time.process_time()
        found = clean_labels(*self.arguments())
        return found, round(time.process_time() - start, 1)

    def untried(self, found: Cleaned) -> dict[str, float]:
        """Accuracies with a noise model that no held-back rows were asked about: as it begins, or as the loop leaves it.

        As it begins it comes with the weights at their start: without hypergradients.
        """
        task = Task.make(*self.arguments())
        assert task.first is not None
        accuracies = {"cleaned, no loop": self._taught(row_weight(task.levels.start(task.first)), task.first)}
        if FIRST_KEPT not in found.notes:
            return accuracies | {"cleaned, the loop's": self.judged(found.model)}
        hparams = task.solve(self.settings, self.seed)[0].hparams
        looped = self._taught(row_weight(hparams), task.levels.transition(hparams))
        return accuracies | {"cleaned, the loop's": looped}

    def _taught(self, weight: Tensor, transition: Tensor) -> float:
        """Accuracy of a network that is taught with these."""
        settings, features = self.settings, self.x.shape[1]
        network = build_network(settings.model, features, settings.hidden, self.classes, self.seed + 1)
        trusted = functional.one_hot(self.trusted_y, self.classes).to(self.x)
        known = weight, transition, self.trusted_x, trusted
        return self.judged(Rounds().fit(network, self.x, self.labels, *known, self.seed))


def quickly(trusted: int = 100, seed: int = 0) -> dict[str, Any]:
    """One split of TREC against logistic regression alone."""
    torch.set_num_threads(1)
    given = split_of(trusted, seed)
    return against_logistic(given, *given.clean())


def once(trusted: int, seed: int) -> dict[str, Any]:
    """One split of TREC against every rival, and with other noise models."""
    torch.set_num_threads(1)
    given = split_of(trusted, seed)
    found, seconds = given.clean()
    entry = against_logistic(given, found, seconds)
    parts = parts_of(given)
    settings = given.settings
    others = compete(parts, settings.model, settings.hidden, CLASSES, seed, lambda part, text: None)
    entry["accuracy"] |= given.untried(found) | others.accuracy
    entry["auroc"] |= others.auroc
    return entry


def parts_of(given: Given) -> Parts:
    """The same as the rivals take it."""
    return Parts(
        Encoding(()), torch.arange(len(given.x)), given.x, given.labels, given.truth, given.trusted_x,
        given.trusted_y, given.held_x, given.held_y,
    )  # fmt: skip


def against_logistic(given: Given, found: Cleaned, seconds: float) -> dict[str, Any]:
    """Accuracies on the other checked questions and on the training questions' truth, AUROC, and whose noise model was taken."""
    plain = LogisticRegression(max_iter=2000).fit(given.trusted_x.numpy(), given.trusted_y.numpy())
    wrong = (given.labels != given.truth).numpy()
    return {
        "accuracy": {
            "cleaned": given.judged(found.model),
            LOGISTIC: float(plain.score(given.held_x.numpy(), given.held_y.numpy())),
        },
        "on training questions": {
            "cleaned": accuracy(found.model, given.x, given.truth),
            LOGISTIC: float(plain.score(given.x.numpy(), given.truth.numpy())),
        },
        "auroc": {"cleaned": float(roc_auc_score(wrong, found.score.numpy()))},
        "loop's noise model": FIRST_KEPT not in found.notes,
        "seconds": seconds,
    }


def split_of(trusted: int, seed: int) -> Given:
    """The questions with their weak labels, and some checked ones that are trusted: all but a tenth, or drawn by the seed."""
    data, (rows, judged) = questions(), but_a_tenth(seed) if trusted == MOST else checked(seed, trusted)
    x, y = data.checked_x, data.checked_y
    return Given(
        data.x, data.weak, data.truth, x[rows], y[rows], x[judged], y[judged], CLASSES,
        Settings(model="linear"), seed,
    )  # fmt: skip


def but_a_tenth(number: int) -> tuple[Tensor, Tensor]:
    """Numbers of the checked questions that are trusted, and of the tenth that judges."""
    parts = KFold(len(TENTHS), shuffle=True, random_state=0).split(range(CHECKED))
    rows, judged = list(parts)[number]
    return torch.from_numpy(rows), torch.from_numpy(judged)


def on_digits(noise: str, seed: int) -> dict[str, Any]:
    """The command's digits with noise put in: the three accuracies, and whose noise model was taken."""
    torch.set_num_threads(1)
    parts, settings = split(load(Request(noise=noise)), seed, 0), Settings()
    assert parts.truth is not None
    given = Given(
        parts.x, parts.given, parts.truth, parts.trusted_x, parts.trusted_y, parts.held_x, parts.held_y, 10,
        settings, seed,
    )  # fmt: skip
    found, _ = given.clean()
    held = {"cleaned": given.judged(found.model)} | given.untried(found)
    return {"accuracy": held, "loop's noise model": FIRST_KEPT not in found.notes}


def gained(seeds: tuple[int, ...], sizes: tuple[int, ...] = TRUSTED) -> dict[str, Any]:
    """Every split of TREC."""
    questions()  # makes the file of vectors once
    with pool() as executor:
        running = {str(size): [executor.submit(once, size, seed) for seed in seeds] for size in sizes}
        return {size: [future.result() for future in futures] for size, futures in running.items()}


def gained_on_digits(seeds: tuple[int, ...], noises: tuple[str, ...] = NOISES) -> dict[str, Any]:
    """Every noise and seed of the digits."""
    with pool() as executor:
        running = {noise: [executor.submit(on_digits, noise, seed) for seed in seeds] for noise in noises}
        return {noise: [future.result() for future in futures] for noise, futures in running.items()}


def over_the_best_rival(accuracy: dict[str, float]) -> dict[str, Any]:
    """Which rival within reach is best, and by how many points "cleaned" leads it."""
    rivals = {key: value for key, value in accuracy.items() if key in RIVALS}
    best = max(rivals, key=lambda key: rivals[key])
    return {"best rival": best, "gain_points": round(100 * (accuracy["cleaned"] - rivals[best]), 2)}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Means over splits, and the lead over the best rival that is within reach."""
    lines: dict[str, Any] = {}
    for size, entries in found.items():
        table = {
            part: {key: round(statistics.mean(e[part][key] for e in entries), 4) for key in entries[0][part]}
            for part in ("accuracy", "on training questions", "auroc")
        }
        lines[size] = table | {
            "standard error of accuracy": {
                key: round(spread([e["accuracy"][key] for e in entries])[1], 4) for key in table["accuracy"]
            },
            **over_the_best_rival(table["accuracy"]),
            "seconds": round(statistics.mean(e["seconds"] for e in entries), 1),
        }
    return lines
