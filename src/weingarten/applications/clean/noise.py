"""Wrong labels, made on purpose, so that their truth is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weingarten.applications.clean.errors import UserError, some

__all__ = ["KINDS", "Noise"]


def _pair(
    truth: np.ndarray, features: np.ndarray, classes: int, fraction: float, rng: np.random.Generator
) -> np.ndarray:
    moved = rng.permutation(len(truth))[: round(fraction * len(truth))]
    noisy = truth.copy()
    noisy[moved] = (truth[moved] + 1) % classes
    return noisy


def _symmetric(
    truth: np.ndarray, features: np.ndarray, classes: int, fraction: float, rng: np.random.Generator
) -> np.ndarray:
    moved = rng.permutation(len(truth))[: round(fraction * len(truth))]
    noisy = truth.copy()
    noisy[moved] = (truth[moved] + rng.integers(1, classes, size=len(moved))) % classes
    return noisy


def _feature(
    truth: np.ndarray, features: np.ndarray, classes: int, fraction: float, rng: np.random.Generator
) -> np.ndarray:
    darkness, noisy = features.mean(axis=1), truth.copy()
    for c in range(classes):
        rows = np.flatnonzero(truth == c)
        darkest = rows[np.argsort(-darkness[rows], kind="stable")][: round(fraction * len(rows))]
        noisy[darkest] = (c + 1) % classes
    return noisy


KINDS: dict[str, Callable[[np.ndarray, np.ndarray, int, float, np.random.Generator], np.ndarray]] = {
    "pair": _pair,
    "symmetric": _symmetric,
    "feature": _feature,
}
WORDS = {
    "pair": "were moved to the next class",
    "symmetric": "were moved to another class, each equally likely",
    "feature": "(of each class those with the largest mean feature, the darkest pictures) were moved to the next class",
}


@dataclass(frozen=True)
class Noise:
    """A kind of label noise and the fraction of the rows it hits.

    ==============  =========================================================================================
    ``pair``        random rows of class c get c + 1, the last class the first
    ``symmetric``   random rows get one of the other classes, each equally likely
    ``feature``     of each class the rows with the largest mean feature (pictures: the darkest) get c + 1
    ==============  =========================================================================================

    The number of moved rows is exact, ``round(fraction N)``; only which rows is random.
    """

    kind: str
    fraction: float

    @staticmethod
    def parse(text: str) -> Noise:
        """The noise that ``KIND:FRACTION`` describes.

        >>> Noise.parse("pair:0.45")
        Noise(kind='pair', fraction=0.45)

        Raises:
            UserError: if it describes none.
        """
        kind, _, number = text.partition(":")
        if kind not in KINDS:
            raise UserError(
                f"--noise: {text!r} is of unknown kind {kind!r}, expected "
                f"{' or '.join(f'{k}:FRACTION' for k in KINDS)}"
            )
        try:
            fraction = float(number)
        except ValueError:
            raise UserError(
                f"--noise: {text!r} has no number after the colon, expected for example {kind}:0.3"
            ) from None
        if not 0 < fraction < 1:
            raise UserError(
                f"--noise: {text!r} has the fraction {number}, expected one between 0 and 1, for example {kind}:0.3"
            )
        return Noise(kind, fraction)

    def apply(self, truth: Tensor, features: Tensor, classes: int, seed: int) -> Tensor:
        """Noisy labels, shape (N,), for true labels (N,) and features (N, D).

        Raises:
            UserError: if the fraction moves no row.
        """
        rng = np.random.default_rng([seed, 1])
        noisy = KINDS[self.kind](truth.numpy(), features.numpy(), classes, self.fraction, rng)
        if (noisy == truth.numpy()).all():
            raise UserError(
                f"--noise: {self} moves none of {len(truth)} rows (classes {some(range(classes))}); raise "
                "the fraction"
            )
        return torch.from_numpy(noisy)

    def describe(self) -> str:
        """One clause for the report."""
        return f"{self.fraction:.0%} of the training labels {WORDS[self.kind]}"

    def __str__(self) -> str:
        return f"{self.kind}:{self.fraction:g}"
