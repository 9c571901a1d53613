"""What happened in each step of a run, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weingarten import tree
from weingarten.bilevel.problem import Hypergradient

__all__ = ["History"]

COLUMNS = (
    "step",
    "outer_loss",
    "inner_loss",
    "hypergradient_norm",
    "inner_gradient",
    "outer_change",
    "residual",
    "products",
    "seconds",
    "negative_curvature",
)


class History:
    """One row per outer step, in memory and in checkpoints.

    ==================  =======================================================================================
    step                1, 2, ...
    outer_loss          f on the outer batch, before the outer variables moved
    inner_loss          g on the batch of the last inner step, before that step
    hypergradient_norm  Euclidean, over all outer variables
    inner_gradient      Euclidean length, zero at the inner minimum; NaN where the method does not take it
    outer_change        what f would change by, to first order, if inner training were finished; NaN likewise
    residual            of the inverse-curvature product, relative; NaN where it was not to be had
    products            curvature-vector products of this step
    seconds             wall time of all steps so far, in all sessions, without callbacks and checkpoints
    negative_curvature  whether the solver met it
    ==================  =======================================================================================

    >>> history = History()
    >>> len(history), history.column("step")
    (0, [])
    """

    def __init__(self, columns: Mapping[str, Sequence[Any]] | None = None) -> None:
        self._columns: dict[str, list[Any]] = {
            name: list(() if columns is None else columns[name]) for name in COLUMNS
        }

    def append(self, step: int, inner_loss: float, found: Hypergradient, seconds: float) -> None:
        """Add the row of one step that took ``seconds``."""
        before = self._columns["seconds"][-1] if len(self) else 0.0
        row = (
            step,
            found.outer_loss,
            inner_loss,
            float(tree.norm(found.value)),
            found.inner_gradient,
            found.outer_change,
            found.residual,
            found.products,
            before + seconds,
            found.negative_curvature,
        )
        for name, value in zip(COLUMNS, row, strict=True):
            self._columns[name].append(value)

    def column(self, name: str) -> list[Any]:
        """One column as a list.

        Raises:
            KeyError: if there is no such column; the message lists them.
        """
        if name not in self._columns:
            raise KeyError(f"History.column: no column {name!r}, expected one of {', '.join(COLUMNS)}")
        return list(self._columns[name])

    def columns(self) -> dict[str, list[Any]]:
        """All columns by name, as plain lists."""
        return {name: list(values) for name, values in self._columns.items()}

    def rows(self) -> list[dict[str, Any]]:
        """One dict per step."""
        return [
            dict(zip(COLUMNS, values, strict=True)) for values in zip(*self._columns.values(), strict=True)
        ]

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame``.

        Raises:
            ImportError: if pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "History.to_pandas: pandas is not installed; pip install 'weingarten[data]', or use History.rows()"
            ) from error
        return pd.DataFrame(self._columns)

    def __len__(self) -> int:
        """Number of steps."""
        return len(self._columns["step"])

    def __str__(self) -> str:
        """A table; the middle of a long run is left out."""
        rows = self.rows()
        shown = rows if len(rows) <= 20 else [*rows[:10], None, *rows[-10:]]
        lines = [" ".join(f"{name:>18}" for name in COLUMNS)]
        for row in shown:
            cells = ["..."] * len(COLUMNS) if row is None else [_cell(value) for value in row.values()]
            lines.append(" ".join(f"{cell:>18}" for cell in cells))
        return "\n".join(lines)

    def __repr__(self) -> str:
        """Number of steps and the last row."""
        return f"History(steps={len(self)}{', last=' + repr(self.rows()[-1]) if len(self) else ''})"


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
