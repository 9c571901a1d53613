"""The cleaned model as a file: a folder to save it to and load it from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from weingarten.applications.clean.encoding import Encoding
from weingarten.applications.clean.folder import read_tensors, write_json, write_tensors
from weingarten.applications.clean.network import describe_network, network_from

__all__ = ["Classifier", "load_model"]

FORMAT = 1


@dataclass(frozen=True)
class Classifier:
    """A model together with how its inputs are made from a table and what its outputs are called."""

    network: nn.Module
    encoding: Encoding
    classes: list[str]

    def logits(self, table: pd.DataFrame) -> Tensor:
        """Logits (N, C) for a table with the training table's feature columns; others are not looked at."""
        with torch.no_grad():
            logits: Tensor = self.network(self.encoding.apply(table))
        return logits

    def predict(self, table: pd.DataFrame) -> list[str]:
        """The most likely class of each row."""
        return [self.classes[i] for i in self.logits(table).argmax(1).tolist()]

    def save(self, folder: Path) -> None:
        """Write ``model.safetensors`` and ``config.json``."""
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


def load_model(folder: str | Path) -> Classifier:
    """The model that ``weingarten clean`` left in its output folder. Nothing in the folder is run.

    Raises:
        ValueError: if the folder's format is not known to this version.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("format") != FORMAT:
        raise ValueError(
            f"load_model: {folder} has format {config.get('format')}, expected {FORMAT}; clean again with "
            "this version"
        )
    network = network_from(config["layers"])
    network.load_state_dict(read_tensors(folder / "model.safetensors"))
    return Classifier(network.eval(), Encoding.from_json(config["features"]), list(config["classes"]))
