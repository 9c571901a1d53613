"""What a person asks to be read, and what was read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from weingarten.applications.clean.encoder import Encoder
from weingarten.applications.clean.errors import UserError, some
from weingarten.applications.clean.images import Images
from weingarten.applications.clean.noise import Noise
from weingarten.applications.clean.reader import Reader
from weingarten.applications.clean.table import BUILT_IN, Table, class_order, matched, read_table
from weingarten.applications.clean.texts import Texts

__all__ = ["Request", "Source", "load"]

DIGITS_TRUSTED, DIGITS_HELD_OUT = 50, 500


@dataclass(frozen=True)
class Request:
    """The data a person asks for; the command line's words."""

    train: str = BUILT_IN
    label: str | None = None
    trusted: str | None = None
    trusted_size: int | None = None
    held_out: str | None = None
    noise: str | None = None
    drop: tuple[str, ...] = ()
    text: str | None = None
    encoder: str | None = None
    images: str | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Source:
    """What was read and how it will be split.

    Attributes:
        train: the table to clean.
        trusted: a table of rows whose labels are right, or None if ``trusted_size`` rows of ``train`` are taken for it.
        held_out: a table to measure on, or None if ``held_out_size`` rows are taken for it,
        held_out_from: from ``train`` or ``trusted``.
        classes: names of the classes, in order.
        noise: put into the training rows, or None.
        readers: of the columns, by name, that hold texts or pictures.
    """

    train: Table
    trusted: Table | None
    held_out: Table | None
    classes: list[str]
    noise: Noise | None
    trusted_size: int
    held_out_size: int
    held_out_from: str
    readers: Mapping[str, Reader] = field(default_factory=dict)

    def tables(self) -> dict[str, Table]:
        """Those that were read."""
        found = {"train": self.train, "trusted": self.trusted, "held_out": self.held_out}
        return {name: table for name, table in found.items() if table is not None}

    def digests(self) -> dict[str, str]:
        """Which bytes were read."""
        tables = {name: table.digest for name, table in self.tables().items()}
        return tables | {f"column {name}": reader.digest() for name, reader in self.readers.items()}

    def prepare(self, cache: Path, progress: Callable[[float, str], None]) -> None:
        """Let the readers make their vectors; ``cache`` is a folder for what should outlast an interruption."""
        for reader in self.readers.values():
            reader.prepare(cache, progress)

    def picture(self, row: int) -> np.ndarray | None:
        """Pixels (H, W) or (H, W, 3) of a row of the training table, large where light; None if there are none."""
        features, shape = self.train.features, self.train.image_shape
        if shape is not None:
            return -features.iloc[row].to_numpy().reshape(shape)
        found = (reader.picture(features[name].iloc[row]) for name, reader in self.readers.items())
        return next((pixels for pixels in found if pixels is not None), None)


def load(request: Request) -> Source:
    """Reads and checks everything, before anything is written.

    Raises:
        UserError: at the first thing that cannot be.
    """
    noise = Noise.parse(request.noise) if request.noise else None
    _check_readers(request)
    train = read_table(request.train, "TRAIN", request.label, request.drop, request.text, request.images)
    trusted = _other(request.trusted, "--trusted", request, train)
    held_table, held_size = None, None
    if request.held_out is not None:
        try:
            held_size = int(request.held_out)
        except ValueError:
            held_table = _other(request.held_out, "--held-out", request, train)
    held_from = "trusted" if trusted is not None and noise is None else "train"
    if held_size is None:
        held_size = 0 if held_table is not None else _default_held_out(train, trusted, held_from)
    classes = class_order(train.labels)
    trusted_size = _trusted_size(request, train, trusted, len(classes))
    source = Source(train, trusted, held_table, classes, noise, trusted_size, held_size, held_from)
    _check(source)
    return replace(source, readers=_readers(request, source))


def _other(path: str | None, option: str, request: Request, train: Table) -> Table | None:
    if path is None:
        return None
    if path == BUILT_IN:
        raise UserError(f"{option}: {BUILT_IN!r} is built in as TRAIN only, expected a .csv or .parquet file")
    drop = [name for name in request.drop if name in train.features.columns]
    label = request.label or "label"
    return matched(
        read_table(path, option, label, drop, text=request.text, images=request.images), train, option
    )


def _check_readers(request: Request) -> None:
    if request.text is not None and request.images is not None:
        raise UserError("--text and --images: found together, expected one of them; leave one out")
    if request.text is not None and request.encoder is None:
        raise UserError(
            f"--text: found {request.text!r} without an encoder, expected --encoder FOLDER of a Hugging Face encoder"
        )
    if request.encoder is not None and request.text is None:
        raise UserError(
            "--encoder: found without --text, expected the name of the column to encode; add --text COLUMN"
        )
    if request.device not in ("auto", "cpu") and request.text is None:
        raise UserError(
            f"--device: found {request.device!r} without --text, expected auto or cpu; an encoder alone runs elsewhere"
        )


def _readers(request: Request, source: Source) -> dict[str, Reader]:
    """The readers of the columns that need one, which have seen all tables and left their remarks there."""
    found: dict[str, Reader] = {}
    if request.text is not None:
        assert request.encoder is not None
        found[request.text] = Texts(Encoder.load(request.encoder, device=request.device))
    if request.images is not None:
        found[request.images] = Images.fit(source.train.features[request.images], source.train.name)
    for name, reader in found.items():
        for table in source.tables().values():
            table.notes.extend(reader.inspect(table.features[name], table.name))
    return found


def _default_held_out(train: Table, trusted: Table | None, held_from: str) -> int:
    if train.name == BUILT_IN:
        return DIGITS_HELD_OUT
    return len(trusted) // 3 if trusted is not None and held_from == "trusted" else len(train) // 5


def _trusted_size(request: Request, train: Table, trusted: Table | None, classes: int) -> int:
    if trusted is not None:
        if request.trusted_size is not None:
            raise UserError(
                "--trusted-size: found together with --trusted, expected one of them; leave one out"
            )
        return len(trusted)
    if request.trusted_size is not None:
        return request.trusted_size
    return DIGITS_TRUSTED if train.name == BUILT_IN else max(2 * classes, len(train) // 10)


def _check(source: Source) -> None:
    """Sizes that fit, and every class among the trusted rows."""
    rows, trusted, held, classes = (
        len(source.train),
        source.trusted_size,
        source.held_out_size,
        len(source.classes),
    )
    if trusted < 1 or held < 0:
        option, found = ("--trusted-size", trusted) if trusted < 1 else ("--held-out", held)
        raise UserError(f"{option}: found {found}, expected a positive number of rows")
    if source.trusted is not None:
        if trusted >= rows:
            raise UserError(
                f"--trusted: it has {trusted} rows and TRAIN {rows}, expected fewer trusted rows than rows "
                "to clean; are they swapped?"
            )
        if source.held_out_from == "trusted" and held > trusted - classes:
            raise UserError(
                f"--held-out: {held} of {trusted} trusted rows leave fewer than one for each of {classes} "
                "classes; hold out fewer"
            )
        _check_classes(source)
    elif trusted < classes:
        raise UserError(
            f"--trusted-size: {trusted} rows cannot hold each of {classes} classes, so a class would be "
            f"missing; expected at least {classes}"
        )
    taken = (trusted if source.trusted is None else 0) + (held if source.held_out_from == "train" else 0)
    if taken + classes > rows:
        raise UserError(
            f"--trusted-size and --held-out: {trusted} trusted and {held} held-out rows are more than "
            f"{rows} rows of data can spare; ask for fewer"
        )
    names, counts = np.unique(source.train.labels, return_counts=True)
    needed = 1 + (source.trusted is None) + (source.held_out_from == "train" and held > 0)
    scarce: Sequence[str] = [name for name, count in zip(names, counts, strict=True) if count < needed]
    if scarce:
        raise UserError(
            f"--label: the class {some(map(repr, scarce))} has fewer than {needed} rows, too few for every "
            "part; remove or merge it"
        )


def _check_classes(source: Source) -> None:
    assert source.trusted is not None
    counts = {name: int((source.trusted.labels == name).sum()) for name in source.classes}
    missing = [name for name, count in counts.items() if count == 0]
    if missing:
        raise UserError(
            f"--trusted: {source.trusted.name} has no row of class {some(map(repr, missing))}, expected "
            "every class of TRAIN; add a few rows"
        )
