"""Fine-tuning as a part of one seed: the cleaned network first, then its rivals; finished parts are kept on disk."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from weingarten.applications.clean.data import Parts
from weingarten.applications.clean.encoding import Encoding
from weingarten.applications.clean.final import Final
from weingarten.applications.clean.finetune.network import TextNetwork, TextRows, by_last_layer
from weingarten.applications.clean.finetune.tuning import Tuning
from weingarten.applications.clean.folder import read_tensors, write_json, write_tensors
from weingarten.applications.clean.network import accuracy, build_network
from weingarten.applications.clean.recipe import Cleaned
from weingarten.applications.clean.rivals import RivalResults, merit
from weingarten.applications.clean.rounds import FIRST, Keeper, Rounds
from weingarten.applications.clean.settings import Settings

__all__ = ["ROUNDS", "Tuned", "fine_tune"]

ROUNDS = 3
FIRST_RATE, SEEN = 1e-4, 4000
"""In the training on the trusted rows alone: the encoder's rate, and how many rows are seen, in 125 steps.

It is the rival's too and was chosen to its favour: the best of five on two splits of TREC, where half the steps, twice and half
the rate did worse on average.
"""


@dataclass(frozen=True)
class Tuned:
    """What cleaning has found with the encoder trained.

    Attributes:
        cleaned: by the whole network.
        head: of the network, from features to logits.
        encoding: from the columns to these features, by the trained encoder.
        results: figures of the cleaned network and its rivals.
    """

    cleaned: Cleaned
    head: nn.Module
    encoding: Encoding
    results: RivalResults


def fine_tune(
    parts: Parts,
    cleaned: Cleaned,
    results: RivalResults,
    settings: Settings,
    classes: int,
    seed: int,
    folder: Path,
    progress: Callable[[float, str], None],
) -> Tuned:
    """Train ``settings.layers`` of the encoder, by the weights and the transition that cleaning with a frozen encoder found.

    Args:
        parts: of the seed, one column of which a frozen encoder has read.
        cleaned: with the frozen encoder.
        results: with the frozen encoder. The rankings of the rivals and cleanlab's choice of rows stay as they are; trained
            anew, with the same trainings as the cleaned network, are those that have an accuracy.
        settings: see there.
        classes: C.
        seed: of everything random.
        folder: where finished parts are kept; they are used again if they are there.
        progress: called with the part done in [0, 1] and what is going on.

    Raises:
        UserError: if the last block is asked for and the encoder has no list of blocks.
        DivergenceError: if a gradient is not finite.
    """
    assert cleaned.transition is not None
    parts = by_last_layer(parts)
    rows, numbered = TextRows.of(parts)
    finished = _Finished(folder, numbered.held_x, numbered.held_y)
    work = _Work(rows, parts, numbered, settings, classes, seed, finished, results.kept)
    work.meter = _Meter(work.size(), progress)
    network = work.clean(cleaned)
    work.compete()
    found, held = finished.values, results.accuracy
    if len(parts.held_y):
        held = found["accuracy"] | {"frozen": held["cleaned"]}
        held["cleaned"] = accuracy(network, numbered.held_x, numbered.held_y)
    seconds = results.seconds | found["seconds"]
    seconds["cleaned"] += results.seconds["cleaned"]
    cost = {"fine-tuning seconds": found["seconds"]["cleaned"]}
    return Tuned(
        cleaned.taught(network, numbered.x, numbered.given, **cost),
        network.head,
        network.encoding(),
        replace(results, accuracy=held, seconds=seconds),
    )


class _Finished(Keeper):
    """What is finished, on disk: the network after its last stage, accuracies on the held-out rows, seconds.

    Args:
        folder: made already.
        held_x: numbers of the held-out rows (N,).
        held_y: their labels (N,).
    """

    def __init__(self, folder: Path, held_x: Tensor, held_y: Tensor) -> None:
        self.folder, self.path, self.held = folder, folder / "finetune.json", (held_x, held_y)
        self.since = time.perf_counter()
        self.values: dict[str, Any] = {"stages": 0, "accuracy": {}, "seconds": {"cleaned": 0.0}, "passes": {}}
        if self.path.exists():
            self.values = json.loads(self.path.read_text(encoding="utf-8"))

    @property
    def stages(self) -> int:
        """How many stages of the cleaned network are done."""
        return int(self.values["stages"])

    def restore(self, network: nn.Module) -> int:
        """As the last stage left it, if there was one."""
        if self.stages:
            network.load_state_dict(read_tensors(self._tensors(self.stages)))
            network.eval()
        return self.stages

    def keep(self, network: nn.Module, stages: int) -> None:
        """The network after its first stage knows the trusted rows alone, and is a rival."""
        write_tensors(self._tensors(stages), network.state_dict())
        seconds = self.values["seconds"]
        seconds["cleaned"] += self.lap()
        if stages == 1:
            seconds["trusted"] = seconds["cleaned"]
            self.score("trusted", network)
        self.values["stages"] = stages
        self.write()
        self._tensors(stages - 1).unlink(missing_ok=True)

    def lap(self) -> float:
        """Seconds since the last call."""
        before, self.since = self.since, time.perf_counter()
        return self.since - before

    def score(self, key: str, network: nn.Module) -> None:
        """Note the network's accuracy, if there is anything to judge it by."""
        if len(self.held[1]):
            self.values["accuracy"][key] = accuracy(network, *self.held)

    def write(self) -> None:
        """Whole or not at all."""
        write_json(self.path, self.values)

    def _tensors(self, stages: int) -> Path:
        return self.folder / f"finetune-{stages}.safetensors"


@dataclass
class _Meter:
    """Counts rows that were trained on."""

    total: int
    progress: Callable[[float, str], None]
    done: int = 0
    text: str = "encoder"

    def __call__(self, rows: int) -> None:
        self.skip_to(self.done + rows)

    def skip_to(self, done: int) -> None:
        self.done = done
        self.progress(min(1.0, done / self.total), self.text)


@dataclass
class _Work:
    """One seed's fine-tuning.

    Attributes:
        parts: with features of the frozen encoder; ``numbered``: the same, with numbers of rows for features.
        kept: which rows cleanlab keeps.
    """

    rows: TextRows
    parts: Parts
    numbered: Parts
    settings: Settings
    classes: int
    seed: int
    finished: _Finished
    kept: Tensor | None
    meter: _Meter = field(init=False)

    def passes(self) -> int:
        """Through the trusted rows, at first."""
        return max(4, SEEN // len(self.parts.trusted_y))

    def size(self) -> int:
        """Rows of all trainings together."""
        given, trusted = len(self.parts.given), len(self.parts.trusted_y)
        kept = 0 if self.kept is None else int(self.kept.sum())
        rivals = ROUNDS * (given + (given + trusted) + kept + (self.parts.truth is not None) * given)
        return self.passes() * trusted + ROUNDS * (given + trusted) + rivals

    def clean(self, cleaned: Cleaned) -> TextNetwork:
        """The cleaned network, which after its first stage is the rival that knows the trusted rows alone."""
        parts, tuning = self.numbered, Tuning(progress=self.meter)
        self.finished.lap()
        network = self._network(self.parts.trusted_x, parts.trusted_y, FIRST)
        stages = self.finished.stages
        self.meter.done = (stages > 0) * self.passes() * len(parts.trusted_y)
        self.meter.done += max(0, stages - 1) * (len(parts.given) + len(parts.trusted_y))
        rounds = Rounds(
            rounds=ROUNDS, first=replace(tuning, passes=self.passes(), rate=FIRST_RATE), each=tuning
        )
        assert cleaned.transition is not None
        known = cleaned.weight, cleaned.transition, parts.trusted_x, self._onehot(parts.trusted_y)
        rounds.fit(network, parts.x, parts.given, *known, self.seed, self.finished)
        return network

    def compete(self) -> None:
        """Every rival that is not finished yet."""
        parts, x = self.numbered, self.parts.x
        best = self._rival("all", x, parts.x, parts.given)
        together = torch.cat([x, self.parts.trusted_x]), torch.cat([parts.x, parts.trusted_x])
        self._rival("both", *together, torch.cat([parts.given, parts.trusted_y]), best)
        if self.kept is not None:
            self._rival("kept", x[self.kept], parts.x[self.kept], parts.given[self.kept])
        if parts.truth is not None:
            self._rival("true", x, parts.x, parts.truth)

    def _rival(self, key: str, x: Tensor, numbers: Tensor, y: Tensor, passes: int | None = None) -> int:
        """Train on the rows, judge on the held-out ones.

        Returns:
            the number of passes: until the trusted rows are served no better, unless it is given.
        """
        finished = self.finished
        passes_of: dict[str, int] = finished.values["passes"]
        before = self.meter.done
        if key in passes_of:
            self.meter.skip_to(before + ROUNDS * len(y))
            return passes_of[key]
        self.meter.text = f"rival: encoder, {key}"
        finished.lap()
        network = self._network(x, y, Final())
        tuning, weights, onehot = Tuning(progress=self.meter), torch.ones(len(y)), self._onehot(y)
        best, number = (-1.0, 0.0), 0
        while number < (ROUNDS if passes is None else passes):
            tuning.fit(network, numbers, onehot, weights, self.seed + number + 1)
            with torch.no_grad():
                found = merit(network(self.numbered.trusted_x), self.numbered.trusted_y)
            if passes is None and found <= best:
                break
            best, number = found, number + 1
            finished.score(key, network)
        self.meter.skip_to(before + ROUNDS * len(y))
        finished.values["seconds"][key] = finished.lap()
        passes_of[key] = number
        finished.write()
        return number

    def _network(self, x: Tensor, y: Tensor, training: Final) -> TextNetwork:
        """A fresh one whose head knows what the frozen encoder says of the rows.

        Training it with the encoder from a random head would bend the encoder first (Kumar et al. 2022,
        https://arxiv.org/abs/2202.10054).
        """
        settings = self.settings
        head = build_network(settings.model, x.shape[1], settings.hidden, self.classes, self.seed + 1)
        training.fit(head, x, self._onehot(y), torch.ones(len(y)), self.seed)
        return TextNetwork(self.rows, head, settings.layers)

    def _onehot(self, y: Tensor) -> Tensor:
        return functional.one_hot(y, self.classes).to(self.parts.x.dtype)
