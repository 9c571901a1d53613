"""What the loop of cleaning reports, keeps and obeys: progress, accuracy on trusted rows, a time budget."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from weingarten.applications.clean.folder import write_json
from weingarten.bilevel import Event, History
from weingarten.tree import Tree

__all__ = ["Record"]


class Record:
    """A callback of :func:`weingarten.bilevel.solve`, and a context around it.

    The loop's checkpoint holds its own history only, so the accuracies go to a file next to it: before each checkpoint, and when
    the loop is interrupted.

    Args:
        measure: accuracy on the trusted rows, from the parameters.
        seconds: ends the loop once its steps took that long; None for no limit.
        progress: called with the part done and a few words.
        checkpoint: of the loop, or None.
        every: steps between checkpoints.
        resume: whether to go on with what an earlier loop kept.
    """

    def __init__(
        self,
        measure: Callable[[Tree], float],
        seconds: float | None,
        progress: Callable[[float, str], None],
        checkpoint: Path | None,
        every: int,
        resume: bool,
    ) -> None:
        self._measure, self._seconds, self._progress, self._every = measure, seconds, progress, every
        self._path = None if checkpoint is None else checkpoint.with_name(checkpoint.name + ".accuracy.json")
        self._accuracy: dict[str, float] = {}
        if resume and self._path is not None and self._path.exists():
            self._accuracy = json.loads(self._path.read_text(encoding="utf-8"))

    def __call__(self, event: Event) -> bool:
        """Note one step; whether the time is over."""
        accuracy = self._measure(event.params)
        self._accuracy[str(event.step)] = accuracy
        if event.step % self._every == 0:
            self._save()
        spent = event.history.column("seconds")[-1]
        part = event.step / event.steps
        if self._seconds is not None:
            part = max(part, spent / self._seconds)
        self._progress(min(1.0, part), f"step {event.step} of {event.steps}, trusted rows {accuracy:.0%}")
        return self._seconds is not None and spent >= self._seconds

    def __enter__(self) -> Record:
        """Nothing to do."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Save, whatever ended the loop."""
        self._save()

    def rows(self, history: History, damping: float, networks: int) -> list[dict[str, float]]:
        """The history as the report wants it.

        Args:
            history: of the loop.
            damping: used throughout.
            networks: K; the loop's inner loss is a sum over these, the report shows their mean.
        """
        return [
            {
                "step": float(row["step"]),
                "seconds": row["seconds"],
                "outer_loss": row["outer_loss"],
                "inner_loss": row["inner_loss"] / networks,
                "trusted_accuracy": self._accuracy.get(str(row["step"]), math.nan),
                "damping": damping,
            }
            for row in history.rows()
        ]

    def _save(self) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, self._accuracy)
