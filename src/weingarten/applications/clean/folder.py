"""The output folder: built aside in ``<output>.partial``, moved into place when it is whole."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from weingarten.applications.clean.errors import UserError
from weingarten.atomic import replacing

__all__ = ["Folder", "plain", "write_json"]

MADE_BY = "weingarten clean"


@dataclass(frozen=True)
class Folder:
    """Where a run leaves its results.

    Args:
        output: the folder a person asked for.
        settings: what determines the results. A folder with the same settings holds the same results and may be replaced.
    """

    output: Path
    settings: Mapping[str, Any]

    @property
    def partial(self) -> Path:
        """Where the results gather until they are whole."""
        return self.output.with_name(self.output.name + ".partial")

    @property
    def _old(self) -> Path:
        return self.output.with_name(self.output.name + ".old")

    def check(self, resume: bool, overwrite: bool) -> None:
        """Whether this run may write here; changes nothing.

        Raises:
            UserError: if the folder holds something else, or cannot be written.
        """
        if self.output.name in ("", ".", ".."):
            raise UserError(
                f"--output: {self.output} is no name for a new folder, expected one such as runs/clean"
            )
        found = _settings_in(self.output) if self.output.is_dir() else None
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"--output: {self.output} is a file, expected a folder's name; choose another")
        if self.output.is_dir() and found is None and any(self.output.iterdir()):
            raise UserError(
                f"--output: {self.output} exists and was not made by {MADE_BY}; choose another name, or empty it"
            )
        if found is not None and found != plain(self.settings) and not overwrite:
            raise UserError(
                f"--output: {self.output} holds results of other settings; choose another name, or replace "
                "them with --overwrite"
            )
        self._check_partial(resume, overwrite)
        parent = next(folder for folder in self.output.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(
                f"--output: {parent} may not be written to; choose another place, or change its permissions"
            )

    def _check_partial(self, resume: bool, overwrite: bool) -> None:
        if not self.partial.exists():
            return
        found = _settings_in(self.partial)
        if found is None and any(p.name != "settings.json.partial" for p in self.partial.iterdir()):
            raise UserError(
                f"--output: {self.partial} is in the way and was not made by {MADE_BY}; move it, or choose "
                "another name"
            )
        if overwrite or found is None:
            return
        if not resume:
            raise UserError(
                f"--output: an unfinished run lies in {self.partial}; go on with --resume, or start anew "
                "with --overwrite"
            )
        different = [key for key, value in plain(self.settings).items() if found.get(key) != value]
        if different or found.keys() != plain(self.settings).keys():
            raise UserError(
                f"--resume: the run in {self.partial} has other settings ({', '.join(different)}), "
                "expected the same; repeat its options, or --overwrite"
            )

    def finished(self) -> bool:
        """Whether whole results of these settings are already there."""
        return self.output.is_dir() and _settings_in(self.output) == plain(self.settings)

    def begin(self, resume: bool) -> None:
        """Make the partial folder, or keep what there is of it."""
        if self._old.exists() and not self.output.exists():  # killed between the two moves of `finish`
            self._old.rename(self.output)
        if not resume and self.partial.exists():
            shutil.rmtree(self.partial)
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            if not (self.partial / "settings.json").exists():
                write_json(self.partial / "settings.json", {"made_by": MADE_BY, **self.settings})
        except OSError as error:
            raise UserError(
                f"--output: {self.partial} cannot be written to ({error.strerror}); choose another place"
            ) from None

    def seed(self, seed: int) -> Path:
        """Where one seed's results lie; they are whole if its ``result.json`` is there."""
        return self.partial / "seeds" / str(seed)

    @property
    def vectors(self) -> Path:
        """Where vectors of texts are kept until the run is finished."""
        return self.partial / "vectors"

    def discard(self) -> None:
        """Take the partial folder away."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def finish(self) -> None:
        """Move the results into place, then take away what they were made from."""
        if self._old.exists():
            shutil.rmtree(self._old)
        if self.output.exists():
            self.output.rename(self._old)
        self.partial.rename(self.output)
        shutil.rmtree(self._old, ignore_errors=True)
        for made_from in ("seeds", "vectors"):
            shutil.rmtree(self.output / made_from, ignore_errors=True)


def plain(value: Any) -> Any:
    """The value as JSON would give it back: lists for tuples, None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    with replacing(path) as partial:
        text = json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False)
        partial.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Whole or not at all."""
    with replacing(path) as partial:
        save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, partial)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The inverse of ``write_tensors``."""
    return dict(load_file(path))


def _settings_in(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.pop("made_by", None) != MADE_BY:
        return None
    return found
