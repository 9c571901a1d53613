"""A progress bar for a run."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from weingarten.bilevel.events import Event

__all__ = ["ProgressBar"]


class ProgressBar:
    """A callback that shows steps done, time left and the outer loss; needs ``rich`` (``pip install 'weingarten[cli]'``).

    As a context it leaves the terminal in order whatever happens; it also ends by itself with the last step.

    Args:
        title: text before the bar.
        console: a ``rich.console.Console``; default: one on standard error.

    Raises:
        ImportError: if rich is not installed.

    >>> with ProgressBar("demo") as bar:
    ...     callable(bar)
    True
    """

    def __init__(self, title: str = "solve", console: Any = None) -> None:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        except ImportError as error:
            raise ImportError(
                "ProgressBar: rich is not installed; pip install 'weingarten[cli]', or pass progress=False"
            ) from error
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        self._progress = Progress(*columns, console=Console(stderr=True) if console is None else console)
        self._title = title
        self._task: Any = None

    def __call__(self, event: Event) -> None:
        """Move the bar to the event's step."""
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task(self._title, total=event.steps, loss="")
        loss = f"outer loss {event.hypergradient.outer_loss:.4g}"
        self._progress.update(self._task, completed=event.step, loss=loss)
        if event.step == event.steps:
            self._progress.stop()

    def __enter__(self) -> ProgressBar:
        """The bar itself; it appears with the first event."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing."""
        self._progress.stop()
