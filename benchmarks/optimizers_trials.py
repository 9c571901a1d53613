"""One trial: a workload trained by a method with a rate, a weight decay, a seed, for some steps."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.optimizers_rivals import method, state_bytes
from benchmarks.optimizers_workloads import WORKLOADS, Data
from benchmarks.trial_pool import Record
from weingarten.optim import NonFiniteGradientError

WARM_UP, LAST, EVALUATIONS = 0.05, 0.1, 20


@dataclass(frozen=True)
class Trial:
    workload: str
    method: str
    lr: float
    weight_decay: float
    seed: int
    steps: int

    @property
    def key(self) -> str:
        """Everything that the outcome depends on."""
        workload = WORKLOADS[self.workload]
        settings = {"settings": method(self.method).settings, "batch": workload.batch}
        return json.dumps(asdict(self) | settings, sort_keys=True)

    def __str__(self) -> str:
        return (
            f"{self.workload:13} {self.method:18} lr {self.lr:.2e}, decay {self.weight_decay}, seed {self.seed:3}, "
            f"{self.steps:4} steps"
        )


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a tenth; ``step`` counts from 0."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - 1 - warm)))


@functools.cache
def data(name: str) -> Data:
    return WORKLOADS[name].data()


class Run:
    """A model in training, with its clocks: CPU-seconds of gradients and of the optimiser."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.workload = trial, WORKLOADS[trial.workload]
        torch.manual_seed(trial.seed)
        self.model = self.workload.make()
        self.generator = torch.Generator().manual_seed(1000 + trial.seed)
        self.validation = data(trial.workload).held_out()
        start = time.process_time()
        self.optimizer = method(trial.method).make(
            self.model, self.validation[0][:2], trial.lr, trial.weight_decay
        )
        self.setup_seconds = time.process_time() - start
        self.seconds = {"gradient": 0.0, "optimizer": 0.0}
        self.losses: list[float] = []
        self.curve: dict[str, list[float]] = {
            key: [] for key in ("step", "loss", "gradient_seconds", "optimizer_seconds")
        }

    def timed(self, key: str, call: Callable[[], Any]) -> Any:
        start = time.process_time()
        found = call()
        self.seconds[key] += time.process_time() - start
        return found

    def gradient(self, inputs: Tensor, targets: Tensor) -> float:
        self.model.zero_grad()
        loss = self.workload.loss(self.model(inputs), targets)
        loss.backward()
        return loss.item()

    def step(self, number: int) -> bool:
        """False if it diverged."""
        inputs, targets = data(self.trial.workload).batch(self.workload.batch, self.generator)
        for group in self.optimizer.param_groups:
            group["lr"] = self.trial.lr * rate(number, self.trial.steps)
        loss = self.timed("gradient", lambda: self.gradient(inputs, targets))
        if not math.isfinite(loss):
            return False
        self.losses.append(round(loss, 4))
        try:
            self.timed("optimizer", self.optimizer.step)
        except (NonFiniteGradientError, torch.linalg.LinAlgError):
            return False
        return True

    @torch.no_grad()
    def evaluate(self, step: int) -> float:
        loss = self.workload.loss(self.model(self.validation[0]), self.validation[1]).item()
        if not math.isfinite(loss):
            return loss
        self.curve["step"].append(step)
        self.curve["loss"].append(round(loss, 5))
        for key, seconds in self.seconds.items():
            self.curve[f"{key}_seconds"].append(round(seconds, 3))
        return loss


def run(trial: Trial) -> Record:
    """Train, and say how it went; plain numbers only. Infinite losses are None."""
    running = Run(trial)
    stops = {round(trial.steps * i / EVALUATIONS) for i in range(1, EVALUATIONS + 1)}
    running.evaluate(0)
    final = math.inf
    for number in range(trial.steps):
        if not running.step(number):
            break
        if number + 1 in stops:
            final = running.evaluate(number + 1)
            if not math.isfinite(final):
                break
    finished = running.curve["step"][-1] == trial.steps and math.isfinite(final)
    return {
        **asdict(trial),
        "diverged": not finished,
        "final": round(final, 5) if finished else None,
        "setup_seconds": round(running.setup_seconds, 3),
        **{f"{key}_seconds": round(value, 3) for key, value in running.seconds.items()},
        "state_bytes": state_bytes(running.optimizer),
        "curve": running.curve,
        "losses": running.losses,
    }


def final(record: Record) -> float:
    return math.inf if record["diverged"] else float(record["final"])
