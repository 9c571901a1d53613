"""A pool of processes that runs trials, and the store that keeps them as they finish."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

import torch

__all__ = ["WORKERS", "Cache", "Keyed", "Record", "pool", "work_off"]

WORKERS = 2
Record = dict[str, Any]


class Keyed(Protocol):
    """A trial."""

    @property
    def key(self) -> str:
        """Everything that the outcome depends on, but the code and the machine."""


class Cache:
    """Finished trials as lines of JSON, each written at once and whole, so that a broken-off run goes on where it was.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "trials.jsonl"
        self.records: dict[str, Record] = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # broken off while it was written
                continue
            self.records[entry["key"]] = entry["record"] | {"key": entry["key"]}

    def get(self, trial: Keyed) -> Record | None:
        return self.records.get(trial.key)

    def add(self, trial: Keyed, record: Record) -> None:
        self.records[trial.key] = record | {"key": trial.key}
        line = json.dumps({"key": trial.key, "record": record}, allow_nan=False)
        broken = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a") as file:
            file.write("\n" * broken + line + "\n")


def prepare() -> None:
    """One thread a process; what PyTorch imports at the first optimiser is imported before anything is timed."""
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])


def pool(workers: int = WORKERS) -> ProcessPoolExecutor:
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), prepare)


def work_off(
    next_trials: Callable[[], list[Any]],
    cache: Cache,
    workers: int,
    execute: Callable[[Any], Record],
    tell: Callable[[Any, Record, float, int], str],
    make_pool: Callable[[int], ProcessPoolExecutor] = pool,
) -> None:
    """Run trials, a few at a time, asking anew for the next ones after each, until there are none.

    Args:
        next_trials: those that are not in the cache yet.
        cache: gets every record at once.
        workers: processes.
        execute: runs one trial.
        tell: the line printed after a trial, from it, its record, the start and the number of trials left.
        make_pool: of processes.
    """
    since = time.monotonic()
    running: dict[Future[Record], Any] = {}
    with make_pool(workers) as executor:
        while True:
            pending = [trial for trial in next_trials() if trial not in running.values()]
            for trial in pending[: workers - len(running)]:
                running[executor.submit(execute, trial)] = trial
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                trial = running.pop(future)
                record = future.result()
                cache.add(trial, record)
                left = len([t for t in next_trials() if t not in running.values()])
                print(tell(trial, record, since, left), flush=True)
