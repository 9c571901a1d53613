"""Which columns can be used, and what a reader of the report should know about them."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from weingarten.applications.clean.errors import UserError, some

__all__ = ["refuse_unusable", "remarks", "values_to_read"]

MOST_CATEGORIES = 100
_FILE = re.compile(r"\.(?:png|jpe?g|gif|bmp|tiff?|webp|wav|mp3|flac|mp4|avi|npy|dcm)$", re.IGNORECASE)


def values_to_read(column: pd.Series, file: str, named: str) -> list[str]:
    """The texts or paths of a column; refuses one that lacks some or holds something else."""
    what = "texts" if named == "--text" else "paths of image files"
    missing = np.flatnonzero(column.isna() | (column.astype(str).str.strip() == ""))
    if len(missing):
        raise UserError(
            f"{named}: {column.name!r} of {file} is empty or missing in {len(missing)} rows ({some(missing)}), expected {what}; "
            "fill them in, or remove the rows"
        )
    strange = [value for value in column if not isinstance(value, str)]
    if strange:
        raise UserError(
            f"{named}: {column.name!r} of {file} holds {type(strange[0]).__name__} values like {str(strange[0])[:40]}, "
            f"expected {what}; is it the right column?"
        )
    return column.tolist()


def refuse_unusable(column: pd.Series, file: str) -> None:
    """Raises for a column that is neither numeric nor categorical."""
    name = column.name
    remedy = f"leave it out with --drop {name}"
    values = column.dropna()
    if values.empty:
        raise UserError(f"column {name!r} of {file} is empty; {remedy}")
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_complex_dtype(column):
        infinite = int(np.isinf(values.astype(float).to_numpy()).sum())
        if infinite:
            raise UserError(
                f"column {name!r} of {file} has {infinite} infinite values, expected finite ones; mend "
                f"them, or {remedy}"
            )
        return
    if pd.api.types.is_datetime64_any_dtype(column) or pd.api.types.is_timedelta64_dtype(column):
        raise UserError(
            f"column {name!r} of {file} holds dates; columns of dates are for a later version; turn it into numbers, or {remedy}"
        )
    if not all(isinstance(value, (str, bool, int, float, np.generic)) for value in values):
        raise UserError(
            f"column {name!r} of {file} holds {type(values.iloc[0]).__name__} values, expected numbers or "
            f"categories; {remedy}"
        )
    text = values.astype(str)
    different = text.nunique()
    if text.str.contains(_FILE).mean() > 0.5:
        raise UserError(
            f"column {name!r} of {file} holds file paths like {text.iloc[0][:40]!r}; if they are "
            f"images, read them with --images {name}, or else {remedy}"
        )
    if different > 0.5 * len(text) and text.str.split().str.len().mean() >= 3:
        raise UserError(
            f"column {name!r} of {file} holds text like {text.iloc[0][:40]!r}; read it with "
            f"--text {name} --encoder FOLDER, or {remedy}"
        )
    if different > MOST_CATEGORIES or (different > 20 and different > 0.5 * len(text)):
        raise UserError(
            f"column {name!r} of {file} has {different} different values in {len(text)} rows, expected at "
            f"most {MOST_CATEGORIES} categories; {remedy}"
        )


def remarks(features: pd.DataFrame) -> list[str]:
    """What the report says of numeric and categorical columns: missing values, identifiers."""
    notes = []
    for name in features.columns:
        column = features[name]
        if pd.api.types.is_numeric_dtype(column):
            missing = int(column.isna().sum())
            if missing:
                notes.append(
                    f"Column {name}: {missing} missing values were replaced by the training rows' median."
                )
            if (
                pd.api.types.is_integer_dtype(column)
                and len(column) > 20
                and (column.diff().dropna() == 1).all()
            ):
                notes.append(
                    f"Column {name} counts the rows. If it is an identifier, leave it out with --drop {name}."
                )
        elif column.isna().any():
            notes.append(
                f"Column {name}: {int(column.isna().sum())} missing values count as a category of their own."
            )
    return notes
