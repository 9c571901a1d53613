"""From a table's columns to standardised numbers, with everything needed to do it again stored as plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from torch import Tensor

__all__ = ["Categorical", "Encoding", "Numeric"]

MISSING = "(missing)"
MANY = 16
"""Fewer columns with equal ranges may have them by chance."""


@dataclass(frozen=True)
class Numeric:
    """``(x - mean) / scale``, missing values replaced by the median."""

    name: str
    median: float
    mean: float
    scale: float

    @property
    def width(self) -> int:
        """Number of encoded columns."""
        return 1

    def apply(self, column: pd.Series) -> np.ndarray:
        """Encoded column, shape (N, 1)."""
        values = pd.to_numeric(column).astype("float64").fillna(self.median).to_numpy()
        return ((values - self.mean) / self.scale)[:, None]


@dataclass(frozen=True)
class Categorical:
    """One column per category; a category not seen in training is all zeros."""

    name: str
    categories: tuple[str, ...]

    @property
    def width(self) -> int:
        """Number of encoded columns."""
        return len(self.categories)

    def apply(self, column: pd.Series) -> np.ndarray:
        """Encoded columns, shape (N, number of categories)."""
        return (_as_text(column)[:, None] == np.array(self.categories, dtype=object)[None]).astype("float64")


@dataclass(frozen=True)
class Encoding:
    """The columns' encodings, in order. Fitted by scikit-learn, kept as values that JSON can hold."""

    columns: tuple[Numeric | Categorical, ...]

    @staticmethod
    def fit(frame: pd.DataFrame) -> Encoding:
        """Medians, means, scales and categories of the training rows.

        Each numeric column is divided by its own standard deviation, except columns of one unit (see :func:`_one_unit`), which
        are divided by the mean of theirs: a pixel at the border of a picture that is dark once in a thousand pictures would be 30
        standard deviations out there, and its noise would count as much as the strokes in the middle.
        """
        columns = {name: _fit_column(frame[name]) for name in frame.columns}
        numeric = [name for name, column in columns.items() if isinstance(column, Numeric)]
        same = _one_unit(frame[numeric].astype("float64"))
        own = [c.scale for name, c in columns.items() if isinstance(c, Numeric) and name in same]
        for name, column in columns.items():
            if isinstance(column, Numeric) and name in same:
                columns[name] = replace(column, scale=float(np.mean(own)))
        return Encoding(tuple(columns.values()))

    @property
    def width(self) -> int:
        """Number of encoded features D."""
        return sum(column.width for column in self.columns)

    def apply(self, frame: pd.DataFrame) -> Tensor:
        """Encoded features, shape (N, D), float32.

        Raises:
            ValueError: if a column is lacking.
        """
        lacking = [column.name for column in self.columns if column.name not in frame.columns]
        if lacking:
            raise ValueError(
                f"Encoding.apply: the table lacks the columns {lacking}, expected {[c.name for c in self.columns]}"
            )
        encoded = np.concatenate([column.apply(frame[column.name]) for column in self.columns], axis=1)
        return torch.from_numpy(encoded.astype("float32"))

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values for a configuration file."""
        return [{"kind": type(column).__name__.lower(), **asdict(column)} for column in self.columns]

    @staticmethod
    def from_json(values: list[dict[str, Any]]) -> Encoding:
        """The inverse of ``to_json``."""
        columns: list[Numeric | Categorical] = []
        for value in values:
            fields = {key: v for key, v in value.items() if key != "kind"}
            if value["kind"] == "numeric":
                columns.append(Numeric(**fields))
            else:
                columns.append(Categorical(fields["name"], tuple(fields["categories"])))
        return Encoding(tuple(columns))


def _fit_column(column: pd.Series) -> Numeric | Categorical:
    name = str(column.name)
    if not pd.api.types.is_numeric_dtype(column):
        found = OneHotEncoder().fit(_as_text(column)[:, None]).categories_[0]
        return Categorical(name, tuple(str(category) for category in found))
    values = column.astype("float64").to_numpy()[:, None]
    if np.isnan(values).all():  # every value of the training rows is missing: a constant
        return Numeric(name, median=0.0, mean=0.0, scale=1.0)
    imputer = SimpleImputer(strategy="median").fit(values)
    scaler = StandardScaler().fit(imputer.transform(values))
    return Numeric(name, float(imputer.statistics_[0]), float(scaler.mean_[0]), float(scaler.scale_[0]))


def _one_unit(frame: pd.DataFrame) -> set[Any]:
    """Names of columns that are measured in one unit, as pixels or yes/no answers are; empty if they seem not to be.

    That is assumed of columns that vary and have the same minimum, if there are at least 16 of them and half of them have the
    same maximum too: digits' pixels run from 0 to 16, nearly all of them.
    """
    low, high = frame.min(), frame.max()
    varying = low.index[(high > low).to_numpy()]
    if len(varying) < MANY:
        return set()
    same = varying[(low[varying] == low[varying].mode()[0]).to_numpy()]
    top = int((high[same] == high[same].mode()[0]).sum())
    return set(same) if len(same) >= MANY and 2 * top >= len(same) else set()


def _as_text(column: pd.Series) -> np.ndarray:
    return np.array(
        [MISSING if missing else str(value) for value, missing in zip(column, column.isna(), strict=True)],
        dtype=object,
    )
