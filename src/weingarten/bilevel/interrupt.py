"""Ctrl-C that ends a run between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupted", "Interrupts"]


class Interrupted(KeyboardInterrupt):
    """A run was interrupted and ended after the step it was in.

    Attributes:
        outcome: what there was by then (an ``Outcome``).
    """

    def __init__(self, message: str, outcome: Any) -> None:
        super().__init__(message)
        self.outcome = outcome


class Interrupts:
    """A context in which the first SIGINT sets ``seen``; a second one does what it did before.

    In threads other than the main one, and where SIGINT is ignored, nothing changes. On every exit the previous handler is back.

    >>> with Interrupts() as interrupts:
    ...     interrupts.seen
    False
    """

    def __init__(self) -> None:
        self.seen = False
        self._previous: Any = None
        self._installed = False

    def __enter__(self) -> Interrupts:
        """Install the handler."""
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
        ):
            self._previous = signal.signal(signal.SIGINT, self._note)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the previous handler back."""
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        self._restore()

    def _restore(self) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.SIG_DFL if self._previous is None else self._previous)
            self._installed = False
