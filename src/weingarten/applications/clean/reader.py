"""What turns a column of texts or pictures into numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

__all__ = ["Reader"]


class Reader(ABC):
    """Turns each value of a column into a vector of numbers, whatever the other rows hold.

    A reader sees the columns of all tables first (``inspect``), may then take its time (``prepare``), and is asked for the
    vectors of some rows again and again (``read``).

    Attributes:
        one_unit: whether the numbers are measured in one unit, so that they are scaled by a common factor.
    """

    one_unit: ClassVar[bool]

    @abstractmethod
    def inspect(self, column: pd.Series, file: str) -> list[str]:
        """Look at a column before anything is written; remarks for the report.

        Raises:
            UserError: for a value that cannot be read; it names the row and the file.
        """

    @abstractmethod
    def prepare(self, cache: Path, progress: Callable[[float, str], None]) -> None:
        """Make the vectors of all values inspected.

        Args:
            cache: a folder for what should outlast an interruption.
            progress: called with the part done in [0, 1] and what is going on.
        """

    @abstractmethod
    def read(self, column: pd.Series) -> np.ndarray:
        """Vectors, shape (N, D); of values that were not inspected, too."""

    @abstractmethod
    def picture(self, value: str) -> np.ndarray | None:
        """The value as pixels (H, W) or (H, W, 3) in 0..255, for the report; None if it is no picture."""

    @abstractmethod
    def digest(self) -> str:
        """Of all that determines the vectors of the values inspected, beside the values themselves."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Plain values by which a saved model finds its reader again; ``kind`` says which."""

    def save(self, folder: Path) -> None:  # noqa: B027 - most readers have nothing to write
        """Write what a saved model does not find elsewhere into its folder."""
