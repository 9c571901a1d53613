"""The models that are cleaned for: built, and described in plain values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weingarten.applications.clean.errors import UserError
from weingarten.bilevel.sampling import seeded_by

__all__ = ["MODELS", "accuracy", "build_network", "describe_network", "network_from"]

MODELS = ("linear", "mlp")
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}


def build_network(model: str, features: int, hidden: int, classes: int, seed: int) -> nn.Sequential:
    """A fresh network (N, D) -> (N, C), its initialisation drawn from the seed alone.

    Raises:
        UserError: if the model's name is unknown.
    """
    if model not in MODELS:
        raise UserError(f"--model: unknown model {model!r}, expected {' or '.join(MODELS)}")
    with seeded_by(seed):
        if model == "linear":
            return nn.Sequential(nn.Linear(features, classes))
        return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def describe_network(network: nn.Module) -> list[dict[str, Any]]:
    """The layers of a chain of linear layers and activations, as plain values.

    Raises:
        TypeError: if there is another layer in it.
    """
    layers: list[dict[str, Any]] = []
    for layer in network if isinstance(network, nn.Sequential) else [network]:
        if isinstance(layer, nn.Linear):
            layers.append({"kind": "linear", "inputs": layer.in_features, "outputs": layer.out_features})
            continue
        names = [name for name, kind in ACTIVATIONS.items() if type(layer) is kind]
        if not names:
            raise TypeError(
                f"describe_network: found the layer {type(layer).__name__}, expected Linear or one of "
                f"{list(ACTIVATIONS)}"
            )
        layers.append({"kind": names[0]})
    return layers


def network_from(layers: list[dict[str, Any]]) -> nn.Sequential:
    """The inverse of ``describe_network``, with parameters yet to be loaded."""
    return nn.Sequential(
        *(
            nn.Linear(v["inputs"], v["outputs"]) if v["kind"] == "linear" else ACTIVATIONS[v["kind"]]()
            for v in layers
        )
    )


def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Fraction of the rows whose most likely class is their label; NaN for no rows."""
    with torch.no_grad():
        return float((network(x).argmax(1) == y).float().mean())
