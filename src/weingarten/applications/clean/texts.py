"""A column of texts, read by a frozen encoder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from weingarten.applications.clean.encoder import Encoder
from weingarten.applications.clean.folder import read_tensors, write_tensors
from weingarten.applications.clean.reader import Reader

__all__ = ["INSIDE", "Texts"]

CHUNK = 1024
"""Texts per file of the cache: what an interruption costs at most."""
INSIDE = "encoder"
"""The folder of an encoder that belongs to the model, in the model's."""


class Texts(Reader):
    """The encoder's vector of each text.

    ``prepare`` encodes every different text once, sorted by length, and keeps the vectors in files of ``CHUNK`` texts whose names
    hold a digest of the encoder and of all texts, so that a resumed run does not encode them again.

    Args:
        encoder: of the texts.
        inside: whether the encoder was trained, belongs to the model and is saved with it.
    """

    one_unit = False  # an encoder's outputs may differ in size by orders of magnitude

    def __init__(self, encoder: Encoder, inside: bool = False) -> None:
        self.encoder, self.inside = encoder, inside
        self._lengths: dict[str, int] = {}
        self._known: dict[str, np.ndarray] = {}

    def inspect(self, column: pd.Series, file: str) -> list[str]:
        texts = column.tolist()
        new = [text for text in dict.fromkeys(texts) if text not in self._lengths]
        self._lengths.update(zip(new, self.encoder.lengths(new), strict=True))
        how = "a text's vector is the mean over its tokens of a middle layer and of the last one, each scaled to length one"
        notes = [
            f"Column {column.name} holds texts. The encoder {self.encoder.name} turned them into numbers: {how}."
        ]
        if self.encoder.device.type != "cpu":
            notes[0] += f" It ran on {self.encoder.device}, whose rounding may differ from another device's."
        longer = sum(self._lengths[text] > self.encoder.limit for text in texts)
        if longer:
            notes.append(
                f"{longer} of {len(texts)} texts of {file} were truncated: they are longer than the {self.encoder.limit} tokens "
                "that the encoder takes, and only their beginnings were read."
            )
        return notes

    def prepare(self, cache: Path, progress: Callable[[float, str], None]) -> None:
        texts = sorted(self._lengths, key=lambda text: (self._lengths[text], text))
        total = len(texts)
        key = hashlib.sha256(json.dumps([self.encoder.digest, texts]).encode()).hexdigest()[:16]

        def tell(done: int) -> None:
            progress(done / total, f"texts {done} of {total}")

        for start in range(0, total, CHUNK):
            part, path = texts[start : start + CHUNK], cache / f"{key}-{start}.safetensors"
            tell(start)
            if not path.exists():
                vectors = self.encoder.encode(part, lambda done, start=start: tell(start + done))  # type: ignore[misc]
                write_tensors(path, {"vectors": torch.from_numpy(vectors)})
            self._known.update(zip(part, read_tensors(path)["vectors"].numpy(), strict=True))
        tell(total)

    def read(self, column: pd.Series) -> np.ndarray:
        texts = column.tolist()
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        known = self._known
        if new:
            new.sort(key=len)
            known = known | dict(zip(new, self.encoder.encode(new), strict=True))
        if not texts:
            return self.encoder.encode(["a"])[:0]
        return np.stack([known[text] for text in texts])

    def picture(self, value: str) -> np.ndarray | None:
        return None

    def digest(self) -> str:
        return self.encoder.digest

    def to_json(self) -> dict[str, Any]:
        if self.inside:
            return {"kind": "texts", "inside": INSIDE}
        return {"kind": "texts", "encoder": self.encoder.name, "digest": self.encoder.digest}

    def save(self, folder: Path) -> None:
        if self.inside:
            self.encoder.save(folder / INSIDE)
