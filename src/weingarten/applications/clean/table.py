"""Reading a table: a CSV or Parquet file, or the built-in digits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.datasets import load_digits

from weingarten.applications.clean.columns import refuse_unusable, remarks, values_to_read
from weingarten.applications.clean.errors import UserError, near, some

__all__ = ["BUILT_IN", "Table", "matched", "read_table"]

BUILT_IN = "digits"
MOST_CLASSES = 1000


@dataclass(frozen=True)
class Table:
    """Features and labels as they were read.

    Attributes:
        name: of the file, without its folder.
        features: one column per feature, numeric or categorical.
        labels: class names, one per row.
        digest: of the file's bytes, so that a resumed run can tell whether it is the same data.
        image_shape: rows and columns of pixels, if the features are those of a picture.
        notes: remarks for the report.
    """

    name: str
    features: pd.DataFrame
    labels: np.ndarray
    digest: str
    image_shape: tuple[int, int] | None = None
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)


def read_table(
    source: str,
    option: str,
    label: str | None,
    drop: Sequence[str] = (),
    text: str | None = None,
    images: str | None = None,
) -> Table:
    """The table of a file, or of the built-in data set.

    Args:
        source: path that ends in .csv, .parquet or .pq; or ``digits``.
        option: what the user calls this input, for error messages.
        label: name of the label's column.
        drop: names of columns that are no features.
        text: name of the column of texts.
        images: name of the column of image files. Their paths become absolute ones: they are relative to the table's folder.

    Raises:
        UserError: if there is no such file or column, or its contents cannot be used.
    """
    read = {name: named for name, named in ((text, "--text"), (images, "--images")) if name is not None}
    if source == BUILT_IN and not Path(source).exists():
        for named in read.values():
            raise UserError(
                f"{named}: found with the built-in {BUILT_IN!r}, which has numbers only; leave it out, or give a file"
            )
        return _digits(label, drop)
    path = Path(source)
    frame = _read_frame(path, option)
    label = _check_columns(frame, path.name, label, drop, read)
    labels = _class_names(frame[label], path.name)
    features = frame.drop(columns=[label, *drop])
    if features.shape[1] == 0:
        raise UserError(
            f"{option}: {path.name} has no column besides the label and the dropped ones, expected features"
        )
    for name in features.columns:
        if name in read:
            features[name] = values_to_read(features[name], path.name, read[name])
        else:
            refuse_unusable(features[name], path.name)
    if images is not None:
        features[images] = [str(path.absolute().parent / value) for value in features[images]]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Table(path.name, features, labels, digest, notes=remarks(features.drop(columns=list(read))))


def _check_columns(
    frame: pd.DataFrame, file: str, label: str | None, drop: Sequence[str], read: Mapping[str, str]
) -> str:
    """The label's column; every column that an option names is there, and has one use."""
    if label is None:
        raise UserError(
            f"--label: none given for {file}, expected the name of the label's column; "
            f"{near('label', frame.columns)}"
        )
    for wanted, named in [(label, "--label"), *((name, "--drop") for name in drop), *read.items()]:
        if wanted not in frame.columns:
            raise UserError(f"{named}: {file} has no column {wanted!r}; {near(wanted, frame.columns)}")
        if named in read.values() and wanted in (label, *drop):
            raise UserError(
                f"{named}: {wanted!r} is the column of --{'label' if wanted == label else 'drop'} too, expected a feature"
            )
    return label


def matched(table: Table, train: Table, option: str) -> Table:
    """A second table with the training table's columns, in its order; others are left out.

    Raises:
        UserError: if a column is lacking or of another kind, or a label is none of the training table's.
    """
    lacking = [name for name in train.features.columns if name not in table.features.columns]
    if lacking:
        raise UserError(
            f"{option}: {table.name} lacks {some(map(repr, lacking))}, expected every feature of "
            f"{train.name}; add it, or --drop it"
        )
    for name in train.features.columns:
        numeric = [pd.api.types.is_numeric_dtype(t.features[name]) for t in (train, table)]
        if numeric[0] and not numeric[1]:
            raise UserError(
                f"{option}: column {name!r} of {table.name} holds text, but numbers in {train.name}; mend "
                f"it, or --drop {name}"
            )
    unknown = sorted(set(table.labels) - set(train.labels))
    if unknown:
        raise UserError(
            f"{option}: {table.name} has the label {some(map(repr, unknown))}, which {train.name} has not; "
            f"labels are {some(class_order(train.labels), 8)}"
        )
    extra = [name for name in table.features.columns if name not in train.features.columns]
    notes = (
        [f"Columns of {table.name} that {train.name} has not were left out: {some(extra)}."] if extra else []
    )
    return Table(
        table.name, table.features[list(train.features.columns)], table.labels, table.digest, notes=notes
    )


def class_order(labels: np.ndarray) -> list[str]:
    """The different labels, by value if they are numbers, else by letter.

    >>> class_order(np.array(["10", "9", "9"]))
    ['9', '10']
    """
    names = sorted(set(labels.tolist()))
    try:
        return sorted(names, key=float)
    except ValueError:
        return names


def _digits(label: str | None, drop: Sequence[str]) -> Table:
    if label not in (None, "label") or drop:
        raise UserError(
            f"--label and --drop: found with the built-in {BUILT_IN!r}, which needs neither; leave them "
            "out, or give a file"
        )
    data = load_digits()
    features = pd.DataFrame(data.data, columns=[f"pixel_{i // 8}_{i % 8}" for i in range(64)])
    labels = np.array([str(y) for y in data.target], dtype=object)
    return Table(BUILT_IN, features, labels, hashlib.sha256(data.data.tobytes()).hexdigest(), (8, 8))


def _read_frame(path: Path, option: str) -> pd.DataFrame:
    ending = path.suffix.lower()
    try:
        if path.is_dir():
            raise UserError(f"{option}: {path} is a folder, expected a .csv or .parquet file")
        if not path.exists():
            raise UserError(f"{option}: no such file: {path}; give a .csv or .parquet file, or {BUILT_IN!r}")
        if ending not in (".csv", ".parquet", ".pq"):
            raise UserError(
                f"{option}: {path.name} ends in {ending or 'nothing'!r}, expected .csv or .parquet; convert it"
            )
        with path.open("rb") as file:
            if not file.read(1):
                raise UserError(f"{option}: {path.name} is empty, expected a table with a header")
        frame = pd.read_csv(path, low_memory=False) if ending == ".csv" else pd.read_parquet(path)
    except UserError:
        raise
    except PermissionError:
        raise UserError(
            f"{option}: {path} may not be read; change its permissions (chmod u+r), or its folder's (chmod u+rx)"
        ) from None
    except (OSError, ValueError) as error:  # pandas' and pyarrow's parsers raise kinds of ValueError
        line = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(
            f"{option}: {path.name} is no readable {ending[1:]} table ({line}); check the file"
        ) from None
    if frame.empty:
        raise UserError(
            f"{option}: {path.name} has no rows, expected a header and at least a few rows per class"
        )
    return frame.set_axis([str(name) for name in frame.columns], axis=1).reset_index(drop=True)


def _class_names(column: pd.Series, name: str) -> np.ndarray:
    missing = np.flatnonzero(column.isna().to_numpy())
    if len(missing):
        raise UserError(
            f"--label: {column.name!r} of {name} is empty or NaN in {len(missing)} rows ({some(missing)}); "
            "fill them in, or remove the rows"
        )
    if pd.api.types.is_float_dtype(column):
        fractional = (column != column.round()).to_numpy()
        if fractional.any():
            raise UserError(
                f"--label: {column.name!r} of {name} holds numbers like {column[fractional].iloc[0]}, "
                "expected classes; regression is not supported"
            )
        column = column.astype("int64")
    labels = np.array([str(value).strip() for value in column], dtype=object)
    count = len(set(labels))
    if count < 2:
        raise UserError(
            f"--label: {column.name!r} of {name} has one class only ({labels[0]!r}), expected at least two"
        )
    if count > min(MOST_CLASSES, max(2, len(labels) // 2)):
        raise UserError(
            f"--label: {column.name!r} of {name} has {count} classes in {len(labels)} rows, expected a few "
            "rows per class; is it the right column?"
        )
    return labels
