"""Gains and shifts of normalisation layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from weingarten.layers.elementwise import DiagonalUse
from weingarten.layers.rows import factor_type
from weingarten.layers.use import Builder, Site, Tracked, Use

__all__ = ["NORM", "NormUse"]


@dataclass(eq=False)
class NormUse(DiagonalUse):
    """``z = gain * normalise(x) + shift``.

    Attributes:
        features: number of trailing axes that the gain has, or 0 if it belongs to the channels in axis 1.
        normalise: the function without gain and shift.
    """

    kind: ClassVar[str] = "norm"
    features: int
    normalise: Callable[[Tensor], Tensor]

    def gradients(self, g: Tensor, role: str) -> Tensor:
        g = factor_type(g)
        if role == "weight":
            g = g * self.normalise(factor_type(self.x))
        if self.features:
            flat = self.arrangement.split(g, self.data, skip=1)
            return flat.reshape(len(g), self.data, -1, prod(self.shape[-self.features :])).sum(2)
        channels = g.reshape(*g.shape[:3], -1).sum(3)  # (K, R, C)
        rows = self.arrangement.split(channels, self.data, skip=1)
        return rows.reshape(len(g), self.data, -1, rows.shape[-1]).sum(2)


def _build(
    function: Any,
    features: int | None,
    call: Mapping[str, Any],
    tracked: Mapping[int, Tracked],
    site: Site,
) -> Use | None:
    leaves = {}
    for role in ("weight", "bias"):
        if (found := tracked.get(id(call.get(role)))) is not None:
            if not found.whole:
                return None
            leaves[role] = found.leaf
    if id(call["input"]) in tracked or _mixes_data(function, call):
        return None
    if features is None:
        features = len(call["normalized_shape"])
    options = {name: value for name, value in call.items() if name not in ("input", "weight", "bias")}
    for name in ("running_mean", "running_var"):
        if options.get(name) is not None:
            options[name] = factor_type(options[name])
    return NormUse.at(site, leaves, call["input"], features, partial(function, **options))


def _mixes_data(function: Any, call: Mapping[str, Any]) -> bool:
    """Whether the statistics are those of the batch, so that a datum's output depends on the others."""
    if function is not functional.batch_norm:
        return False
    return bool(call.get("training")) or call.get("running_mean") is None


_LAYER = ("input", "normalized_shape", "weight", "bias", "eps")
_BATCH = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_INSTANCE = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")

NORM: dict[Any, tuple[tuple[str, ...], Builder]] = {
    functional.layer_norm: (_LAYER, partial(_build, functional.layer_norm, None)),
    functional.rms_norm: (
        ("input", "normalized_shape", "weight", "eps"),
        partial(_build, functional.rms_norm, None),
    ),
    functional.group_norm: (
        ("input", "num_groups", "weight", "bias", "eps"),
        partial(_build, functional.group_norm, 0),
    ),
    functional.batch_norm: (_BATCH, partial(_build, functional.batch_norm, 0)),
    functional.instance_norm: (_INSTANCE, partial(_build, functional.instance_norm, 0)),
}
"""Functions by what they are called, with the names of their arguments."""
