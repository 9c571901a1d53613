"""What the cleaned model has to beat: the same network and training on plainer choices of rows, and other rankings.

Every rival chooses its training by the trusted rows, and what the cleaned model's rounds are trained with is among the choices.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

from weingarten.applications.clean.data import Parts
from weingarten.applications.clean.final import Final
from weingarten.applications.clean.network import accuracy, build_network

__all__ = ["ACCURACY", "AUROC", "RivalResults", "auroc", "compete", "merit"]

TRAININGS = (*(Final(weight_decay=decay, mixup=False) for decay in (1e-3, 1e-2, 3e-2)), Final())
"""Without and with mixup; the cleaned model first learns like the second of these, in its rounds like the last."""
FOLDS = 5
TOLD = (UserWarning, RuntimeWarning)
"""Of cleanlab's warnings, those about the data: they become notes. Those for its developers are left out."""

ACCURACY = {
    "cleaned": "cleaned by weingarten",
    "frozen": "cleaned, the encoder as it was",
    "trusted": "the trusted part alone",
    "both": "training and trusted rows",
    "all": "all training rows as given",
    "kept": "what cleanlab keeps",
    "true": "true labels (out of reach)",
}
AUROC = {
    "cleaned": "weingarten",
    "logistic": "logistic regression on the trusted part",
    "confidence": "cross-validated confidence",
    "quality": "cleanlab's label quality",
}


@dataclass
class RivalResults:
    """Held-out accuracies, AUROCs of the ranking of wrong labels, seconds, by the keys above; remarks; what cleanlab keeps."""

    accuracy: dict[str, float] = field(default_factory=dict)
    auroc: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kept: Tensor | None = None


@dataclass(frozen=True)
class _Trainer:
    """Trains fresh networks from one initialisation."""

    model: str
    hidden: int
    classes: int
    seed: int

    def fit(self, x: Tensor, y: Tensor, training: Final) -> nn.Module:
        network = build_network(self.model, x.shape[1], self.hidden, self.classes, self.seed)
        onehot = functional.one_hot(y, self.classes).to(x.dtype)
        return training.fit(network, x, onehot, torch.ones(len(y), dtype=x.dtype), self.seed)

    def choose(self, x: Tensor, y: Tensor, judge_x: Tensor, judge_y: Tensor) -> tuple[nn.Module, Final]:
        """The network whose training serves the judging rows best, and that training."""
        tried = [(self.fit(x, y, training), training) for training in TRAININGS]
        return max(tried, key=lambda pair: merit(pair[0](judge_x), judge_y))

    def choose_within(self, x: Tensor, y: Tensor, folds: int = 3) -> Final:
        """The training that serves best by cross-validation within the rows."""
        merits = {training: merit(self.validated(x, y, training, folds), y) for training in TRAININGS}
        return max(merits, key=lambda training: merits[training])

    def validated(self, x: Tensor, y: Tensor, training: Final, folds: int) -> Tensor:
        """Logits of each row from networks that have not seen it, shape (N, C)."""
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(self.seed))
        by_class = order[
            torch.sort(y[order], stable=True).indices
        ]  # every fold gets its share of every class
        fold = torch.empty(len(y), dtype=torch.long)
        fold[by_class] = torch.arange(len(y)) % folds
        logits = torch.empty(len(y), self.classes)
        for k in range(folds):
            with torch.no_grad():
                inside, outside = fold != k, fold == k
            network = self.fit(x[inside], y[inside], training)
            logits[outside] = network(x[outside]).detach()
        return logits


def auroc(score: Tensor, wrong: Tensor) -> float:
    """Probability that a wrong label scores higher than a right one; NaN if there is only one sort."""
    if bool(wrong.all()) or not bool(wrong.any()):
        return float("nan")
    return float(roc_auc_score(wrong.numpy(), score.double().numpy()))


def compete(
    parts: Parts, model: str, hidden: int, classes: int, seed: int, progress: Callable[[float, str], None]
) -> RivalResults:
    """Trains every rival and ranks by every rival's score."""
    results, trainer = RivalResults(), _Trainer(model, hidden, classes, seed)

    def judge(key: str, network: nn.Module, start: float) -> None:
        results.seconds[key] = time.perf_counter() - start
        if len(parts.held_y):
            results.accuracy[key] = accuracy(network, parts.held_x, parts.held_y)

    trusted = parts.trusted_x, parts.trusted_y
    progress(0.0, "rival: trusted part")
    start = time.perf_counter()
    judge("trusted", trainer.fit(*trusted, trainer.choose_within(*trusted)), start)
    progress(0.1, "rival: all rows")
    start = time.perf_counter()
    network, training = trainer.choose(parts.x, parts.given, *trusted)
    judge("all", network, start)
    progress(0.3, "rival: both")
    start = time.perf_counter()
    together = torch.cat([parts.x, parts.trusted_x]), torch.cat([parts.given, parts.trusted_y])
    judge("both", trainer.fit(*together, training), start)
    progress(0.4, "rival: cross-validation")
    start = time.perf_counter()
    probability = trainer.validated(parts.x, parts.given, training, FOLDS).double().softmax(1)
    results.seconds["confidence"] = time.perf_counter() - start
    progress(0.7, "rival: cleanlab")
    start = time.perf_counter()
    kept, quality = _cleanlab(parts.given, probability, results.notes)
    results.kept = kept
    if kept is not None:
        judge("kept", trainer.choose(parts.x[kept], parts.given[kept], *trusted)[0], start)
        results.seconds["kept"] += results.seconds["confidence"]
    if parts.truth is not None:
        progress(0.85, "rival: true labels")
        start = time.perf_counter()
        judge("true", trainer.choose(parts.x, parts.truth, *trusted)[0], start)
        _rank(parts, probability, quality, results)
    return results


def _rank(parts: Parts, probability: Tensor, quality: Tensor | None, results: RivalResults) -> None:
    assert parts.truth is not None
    wrong, given = parts.given != parts.truth, parts.given[:, None]
    start = time.perf_counter()
    logistic = LogisticRegression(max_iter=2000).fit(parts.trusted_x.numpy(), parts.trusted_y.numpy())
    believed = torch.from_numpy(logistic.predict_proba(parts.x.numpy()))
    results.seconds["logistic"] = time.perf_counter() - start
    results.auroc["logistic"] = auroc(-believed.gather(1, given)[:, 0], wrong)
    results.auroc["confidence"] = auroc(-probability.gather(1, given)[:, 0], wrong)
    if quality is not None:
        results.auroc["quality"] = auroc(-quality, wrong)


def _cleanlab(given: Tensor, probability: Tensor, notes: list[str]) -> tuple[Tensor | None, Tensor | None]:
    """Which rows cleanlab keeps, and its quality of each label; None where it has nothing to say."""
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ModuleNotFoundError:
        notes.append("cleanlab is not installed, so that rival is missing; pip install cleanlab adds it.")
        return None, None
    labels, predicted = given.numpy(), probability.numpy()
    arguments: dict[str, Any] = {"labels": labels, "pred_probs": predicted}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            for category in TOLD:
                warnings.simplefilter("always", category)
            keep = ~np.asarray(find_label_issues(**arguments, n_jobs=1))
            quality = np.asarray(get_label_quality_scores(**arguments, adjust_pred_probs=True))
    except (ValueError, AssertionError) as error:
        notes.append(f"cleanlab could not judge these labels: {str(error).splitlines()[0]}")
        return None, None
    said = dict.fromkeys(str(warning.message).strip() for warning in caught)
    notes += [f"cleanlab warned (it numbers the classes in order, from 0): {words}" for words in said]
    if keep.sum() < 2 or len(np.unique(labels[keep])) < 2:
        notes.append("cleanlab kept less than two classes, so there is nothing to train on.")
        return None, torch.from_numpy(quality)
    return torch.from_numpy(keep), torch.from_numpy(quality)


def merit(logits: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy, and where that ties the likelihood."""
    with torch.no_grad():
        hits = float((logits.argmax(1) == y).float().mean())
        return hits, -float(functional.cross_entropy(logits, y))
