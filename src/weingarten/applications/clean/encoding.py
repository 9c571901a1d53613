"""From a table's columns to standardised numbers, with everything needed to do it again stored as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from torch import Tensor

from weingarten.applications.clean.reader import Reader

__all__ = ["Categorical", "Encoding", "Numeric", "Vector"]

MISSING = "(missing)"
DEAD = 1e-6
"""Numbers of a vector whose deviation is below this part of the largest one are taken for constant."""
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

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"kind": "numeric", **asdict(self)}


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

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"kind": "categorical", **asdict(self)}


@dataclass(frozen=True)
class Vector:
    """``(v - mean) / scale`` for the vector v that a reader makes of each value, a text or a picture."""

    name: str
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    reader: Reader = field(repr=False, compare=False)

    @staticmethod
    def fit(column: pd.Series, reader: Reader) -> Vector:
        """Means and standard deviations; of numbers of one unit, the mean of the standard deviations of those that vary.

        Units of an encoder that are dead all but for rounding are not blown up to the size of the others.
        """
        values = reader.read(column).astype("float64")
        scale = values.std(axis=0)
        varying = scale > DEAD * scale.max(initial=0.0)
        common = scale[varying].mean() if reader.one_unit and varying.any() else None
        scale = np.where(varying, scale, 1.0) if common is None else np.full_like(scale, common)
        return Vector(str(column.name), tuple(values.mean(axis=0).tolist()), tuple(scale.tolist()), reader)

    @property
    def width(self) -> int:
        """Number of encoded columns."""
        return len(self.mean)

    def apply(self, column: pd.Series) -> np.ndarray:
        """Encoded columns, shape (N, D)."""
        return (self.reader.read(column) - np.array(self.mean)) / np.array(self.scale)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        values = {"name": self.name, "mean": list(self.mean), "scale": list(self.scale)}
        return {"kind": "vector", **values, "reader": self.reader.to_json()}


@dataclass(frozen=True)
class Encoding:
    """The columns' encodings, in order. Fitted by scikit-learn, kept as values that JSON can hold."""

    columns: tuple[Numeric | Categorical | Vector, ...]

    @staticmethod
    def fit(frame: pd.DataFrame, readers: Mapping[str, Reader] | None = None) -> Encoding:
        """Medians, means, scales and categories of the training rows.

        Each numeric column is divided by its own standard deviation, except columns of one unit (see :func:`_one_unit`), which
        are divided by the mean of theirs: a pixel at the border of a picture that is dark once in a thousand pictures would be 30
        standard deviations out there, and its noise would count as much as the strokes in the middle.

        Args:
            frame: one column per feature.
            readers: of the columns, by name, that hold texts or pictures.
        """
        readers = readers or {}
        columns: dict[str, Numeric | Categorical | Vector] = {
            name: Vector.fit(frame[name], readers[name]) if name in readers else _fit_column(frame[name])
            for name in frame.columns
        }
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
        return [column.to_json() for column in self.columns]

    @staticmethod
    def from_json(values: list[dict[str, Any]], readers: Mapping[str, Reader] | None = None) -> Encoding:
        """The inverse of ``to_json``, given the readers of columns of texts or pictures."""
        return Encoding(tuple(_column_from(value, readers or {}) for value in values))


def _column_from(value: dict[str, Any], readers: Mapping[str, Reader]) -> Numeric | Categorical | Vector:
    fields = {key: v for key, v in value.items() if key != "kind"}
    if value["kind"] == "numeric":
        return Numeric(**fields)
    if value["kind"] == "categorical":
        return Categorical(fields["name"], tuple(fields["categories"]))
    return Vector(fields["name"], tuple(fields["mean"]), tuple(fields["scale"]), readers[fields["name"]])


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
