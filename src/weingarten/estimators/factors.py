"""Running sums of Kronecker factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weingarten.estimators.remaining import Remaining
from weingarten.layers import Block, LayerError, Structure
from weingarten.losses import Loss
from weingarten.operators import Layout

__all__ = ["Factors", "KFACState", "check_finite"]


@dataclass(frozen=True)
class Factors:
    """Running sums of one term: outer products of input rows and their total weight, outer products of output gradients."""

    inputs: Tensor
    rows: Tensor
    outputs: Tensor

    def __add__(self, other: Factors) -> Factors:
        return Factors(self.inputs + other.inputs, self.rows + other.rows, self.outputs + other.outputs)

    def scaled(self, factor: float) -> Factors:
        """All sums times a number."""
        if factor == 1:
            return self
        return Factors(self.inputs * factor, self.rows * factor, self.outputs * factor)

    def to(self, dtype: torch.dtype) -> Factors:
        """Factors in another type."""
        return Factors(self.inputs.to(dtype), self.rows, self.outputs.to(dtype))

    def means(self, count: float) -> tuple[Tensor, Tensor]:
        """The input factor and the output factor."""
        rows = self.rows.where(self.rows > 0, 1.0)
        inputs = self.inputs / rows.reshape(-1, *[1] * (self.inputs.ndim - 1))
        return inputs.to(self.inputs.dtype), self.outputs / count


@dataclass
class KFACState:
    """Running sums of the factors.

    Attributes:
        order: the leaves in the order of the parameters.
        structure: the data axes in the model, once known.
        layouts: of each block, by its name.
        factors: the terms of each block, by its name.
        flipped: which terms of a block have their inputs on the left.
        count: the M of the loss, and ``loss`` the loss.
        remaining: the leaves left over.
    """

    order: list[str]
    loss: Loss
    remaining: Remaining
    structure: Structure | None = None
    layouts: dict[str, Layout] = field(default_factory=dict)
    factors: dict[str, list[Factors]] = field(default_factory=dict)
    flipped: dict[str, list[bool]] = field(default_factory=dict)
    count: float = 0.0

    def check(self, found: Mapping[Block, Sequence[Factors]]) -> None:
        """Refuse factors of a model that uses its parameters in another way than in the batches before."""
        for block in found:
            known = self.layouts.get(block.name, block.layout), self.flipped.get(block.name, block.flipped)
            if known != (block.layout, block.flipped) or (self.layouts and block.name not in self.layouts):
                raise LayerError(
                    f"{self.remaining.call}: {block.name!r} is used in another way than in the batches before, expected the same "
                    "forward pass"
                )

    def add(self, found: Mapping[Block, Sequence[Factors]], decay: float, count: float) -> None:
        """Add the factors of a batch with ``count`` elements; earlier sums count ``decay`` times."""
        for block, factors in found.items():
            before = self.factors.get(block.name)
            self.layouts[block.name], self.flipped[block.name] = block.layout, block.flipped
            self.factors[block.name] = (
                list(factors)
                if before is None
                else [old.scaled(decay) + new for old, new in zip(before, factors, strict=True)]
            )
        self.count = decay * self.count + count


def check_finite(name: str, factors: list[Factors]) -> None:
    """Raise a ``ValueError`` that names a block with a factor that is not finite."""
    for sums in factors:
        for kind, value in (("input", sums.inputs), ("output-gradient", sums.outputs)):
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"KFAC: the {kind} factor of {name!r} is not finite; look for NaN or inf in the data or the loss"
                )
