"""The cleaned model as a file: a folder to save it to and load it from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from weingarten.applications.clean.encoder import Encoder
from weingarten.applications.clean.encoding import Encoding, Vector
from weingarten.applications.clean.folder import read_tensors, write_json, write_tensors
from weingarten.applications.clean.images import Images
from weingarten.applications.clean.network import describe_network, network_from
from weingarten.applications.clean.reader import Reader
from weingarten.applications.clean.texts import Texts

__all__ = ["Classifier", "load_model"]

FORMAT = 2
"""2 reads texts by two layers of their encoder."""


@dataclass(frozen=True)
class Classifier:
    """A model together with how its inputs are made from a table and what its outputs are called."""

    network: nn.Module
    encoding: Encoding
    classes: list[str]

    def logits(self, table: pd.DataFrame) -> Tensor:
        """Logits (N, C) for a table with the training table's feature columns; others are not looked at.

        Paths of images are relative to the working directory, or absolute.
        """
        with torch.no_grad():
            logits: Tensor = self.network(self.encoding.apply(table))
        return logits

    def predict(self, table: pd.DataFrame) -> list[str]:
        """The most likely class of each row."""
        return [self.classes[i] for i in self.logits(table).argmax(1).tolist()]

    def save(self, folder: Path) -> None:
        """Write ``model.safetensors``, ``config.json``, and the encoder if it was trained."""
        for column in self.encoding.columns:
            if isinstance(column, Vector):
                column.reader.save(folder)
        write_tensors(folder / "model.safetensors", self.network.state_dict())
        write_json(
            folder / "config.json",
            {
                "format": FORMAT,
                "layers": describe_network(self.network),
                "classes": self.classes,
                "features": self.encoding.to_json(),
            },
        )


def load_model(folder: str | Path, encoder: str | Path | None = None) -> Classifier:
    """The model that ``weingarten clean`` left in its output folder. Nothing in the folder is run.

    Args:
        folder: the output folder.
        encoder: the folder of the encoder that a column of texts was read with, of which a saved model holds the digest alone;
            None if the encoder was trained with the model, for then it is in the folder.

    Raises:
        ValueError: if the folder's format is not known to this version, or the encoder is lacking or another one.
    """
    wanted = _wanted(_config(Path(folder)))
    if encoder is not None and any("inside" in value for value in wanted.values()):
        raise ValueError(
            f"load_model: encoder: found {encoder}, expected none: this model has an encoder of its own"
        )
    others = {name: value for name, value in wanted.items() if "inside" not in value}
    return restore(folder, {name: _reader(value, encoder) for name, value in others.items()})


def restore(folder: str | Path, readers: Mapping[str, Reader]) -> Classifier:
    """As :func:`load_model`, with readers that are at hand already, but for an encoder that is in the folder."""
    folder = Path(folder)
    config = _config(folder)
    own = {
        name: Texts(Encoder.load(folder / value["inside"], "load_model: folder").last_layer(), inside=True)
        for name, value in _wanted(config).items()
        if "inside" in value
    }
    network = network_from(config["layers"])
    network.load_state_dict(read_tensors(folder / "model.safetensors"))
    encoding = Encoding.from_json(config["features"], {**readers, **own})
    return Classifier(network.eval(), encoding, list(config["classes"]))


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("format") != FORMAT:
        raise ValueError(
            f"load_model: {folder} has format {config.get('format')}, expected {FORMAT}; clean again with "
            "this version"
        )
    return config


def _wanted(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is known of the readers, by column."""
    return {value["name"]: value["reader"] for value in config["features"] if value["kind"] == "vector"}


def _reader(value: dict[str, Any], folder: str | Path | None) -> Reader:
    if value["kind"] == "images":
        return Images(value["height"], value["width"], value["colour"])
    which = f"the encoder {value['encoder']} (digest {value['digest'][:12]})"
    if folder is None:
        raise ValueError(f"load_model: this model reads texts by {which}, expected encoder=<its folder>")
    encoder = Encoder.load(folder, "load_model: encoder")
    if encoder.digest != value["digest"]:
        raise ValueError(
            f"load_model: encoder: {folder} has the digest {encoder.digest[:12]}, expected {which}; give the folder that "
            "--encoder named"
        )
    return Texts(encoder)
