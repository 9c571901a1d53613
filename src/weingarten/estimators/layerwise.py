"""One pass over a batch for estimators that work on the inputs and output gradients of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weingarten.fisher import Fisher
from weingarten.layers import (
    Block,
    Capture,
    Sharing,
    Structure,
    blocks_of,
    capture,
    factor_type,
    structure_of,
)
from weingarten.layers.rows import Rows, every
from weingarten.losses import Loss
from weingarten.objective import Batch, Objective
from weingarten.tree import TreeLike

__all__ = ["LayerPass", "Positions", "Thinning", "layer_pass"]


@dataclass(frozen=True)
class LayerPass:
    """One forward pass, cut into blocks, before its backward passes.

    Attributes:
        seen: the forward pass.
        blocks: leaves that are used together.
        left: leaves that no rule covers, and why.
        weights: of each datum in the input factors, ``(N,)``, or None for ones.
    """

    seen: Capture
    blocks: list[Block]
    left: dict[str, str]
    weights: Tensor | None
    columns: Iterator[Tensor]

    def chunks(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """For every chunk of output gradients ``(K, *output.shape)``: the chunk, and the gradients of all uses."""
        for chunk, last in self._columns():
            yield chunk, [factor_type(g) for g in self.seen.gradients(chunk, last)]

    def backward(self, consume: Callable[[Block, list[Tensor]], None]) -> None:
        """Hand over, by chunk and block, the rows of gradients ``(K, groups, N, T, out)`` of its terms, once they are there.

        The order is that of the backward pass, in the middle of which this happens: nothing is kept longer than a block needs.
        """
        owners: dict[int, list[Block]] = {}
        for block in self.blocks:
            for number in block.uses:
                owners.setdefault(number, []).append(block)
        for chunk, last in self._columns():
            there: dict[int, Tensor] = {}
            finished: set[Block] = set()

            def take(number: int, g: Tensor, there: Any = there, finished: Any = finished) -> None:
                there[number] = factor_type(g)
                for block in owners.get(number, []):
                    if all(use in there for use in block.uses):
                        with torch.autocast(g.device.type, enabled=False):
                            consume(block, [term.outputs(there) for term in block.terms])
                        finished.add(block)
                for use in [use for use in there if all(block in finished for block in owners.get(use, []))]:
                    del there[use]

            self.seen.stream(chunk, last, take)

    def _columns(self) -> Iterator[tuple[Tensor, bool]]:
        """Each chunk of output gradients, and whether it is the last."""
        chunk = next(self.columns, None)
        while chunk is not None:
            following = next(self.columns, None)
            yield chunk, following is None
            chunk = following


@contextmanager
def layer_pass(
    structure: Structure | None,
    objective: Objective,
    params: TreeLike,
    batch: Batch,
    fisher: Fisher,
    generator: torch.Generator,
    call: str,
    training: bool = False,
) -> Iterator[tuple[Structure, LayerPass]]:
    """Run the model once on a batch; the structure of the model, found if it is not known, comes back with the pass.

    With ``training``, the model runs in the mode it is in and the graph stays, for a gradient of the loss besides.
    """
    if structure is None or not structure.sure:
        structure = structure_of(objective, params, batch, call)
    device = batch.targets.device.type
    with (
        capture(objective, params, batch, structure, call, fisher.single, training) as seen,
        torch.autocast(device, enabled=False),
    ):
        output = seen.output.detach()
        check_activations(seen, output, call)
        blocks, left = blocks_of(seen, params, call)
        targets = batch.targets.clone() if batch.targets.is_inference() else batch.targets
        columns = fisher.weighted(objective.loss, output, targets, batch.weights, generator)
        yield structure, LayerPass(seen, blocks, left, row_weights(objective.loss, batch), columns)


def check_activations(seen: Capture, output: Tensor, call: str) -> None:
    """Trace an output that is not finite to the first layer.

    Raises:
        ValueError: which layer's input it is, or that its output is.
    """
    if torch.isfinite(output).all():
        return
    for use in seen.uses:
        if use.x.is_floating_point() and not torch.isfinite(use.x).all():
            raise ValueError(
                f"{call}: the input of layer {use.layer!r} is not finite; look for NaN or inf in the data and the parameters"
            )
    last = (
        f"the output of layer {seen.uses[-1].layer!r} or what follows" if seen.uses else "the model's output"
    )
    raise ValueError(f"{call}: {last} is not finite; look for NaN or inf in the data and the parameters")


def row_weights(loss: Loss, batch: Batch) -> Tensor | None:
    """The weight of each datum among the rows of inputs: its own times that of its label's class."""
    by_class = loss.datum_weights(batch.targets)
    if batch.weights is None or by_class is None:
        return by_class if batch.weights is None else batch.weights.detach()
    return batch.weights.detach() * by_class


@dataclass
class Positions:
    """Which positions a loss depends on, seen from one term's output gradients.

    A position whose gradient is zero - padding that is masked, an ignored label, a token that is not pooled - is left out of the
    input factor too, so that its mean runs over what counts.
    """

    shape: torch.Size
    dtype: torch.dtype
    live: Tensor | None = None
    all_live: bool = False

    def see(self, g: Tensor) -> None:
        """Take in output gradients ``(K, groups, N, T, out)``."""
        if self.all_live:
            return
        live = (
            g[..., :: max(1, g.shape[-1] // 8)].abs().amax((0, -1)) > 0
        )  # most positions show in some entries
        if not live.all():
            live = g.abs().amax((0, -1)) > 0
        self.live = live if self.live is None else self.live | live
        self.all_live = bool(self.live.all())

    def weights(self, by_datum: Tensor | None) -> Tensor | None:
        """Weights ``(groups, N, T)`` of the rows of inputs, or None for ones."""
        live = None if self.all_live or self.live is None else self.live
        if by_datum is None:
            return None if live is None else live.to(self.dtype)
        weights = by_datum.to(self.dtype)[:, None].expand(self.shape)
        return weights if live is None else weights * live


@dataclass(frozen=True)
class Thinning:
    """Takes every so many-th row of a layer.

    Attributes:
        rows: about how many rows to keep; None for all.
        start: of the first row, as a share of the distance between two.
    """

    rows: int | None
    start: float

    @staticmethod
    def drawn(rows: int | None, generator: torch.Generator) -> Thinning:
        """With a random start."""
        start = 0.0 if rows is None else float(torch.rand((), generator=generator, device=generator.device))
        return Thinning(rows, start)

    def gradients(self, g: Tensor) -> tuple[Tensor, float]:
        """The output gradients ``(K, groups, N, T, out)`` that are kept, and which share of all they are."""
        stride = self._stride(g.shape[2:4].numel())
        if stride == 1:
            return g, 1.0
        kept = g[(slice(None), slice(None), *every(g.shape[2:4], int(self.start * stride), stride))]
        return kept, kept.shape[2:4].numel() / g.shape[2:4].numel()

    def moment(
        self, rows: Rows, sharing: Sharing, weights: Tensor | None, dense: bool
    ) -> tuple[Tensor, Tensor]:
        """The moment of the rows of inputs that are kept."""
        stride = self._stride(rows.number)
        if stride > 1:
            rows, weights = rows.thinned(weights, int(self.start * stride), stride)
        return rows.moment(sharing, weights, dense)

    def _stride(self, number: int) -> int:
        return 1 if self.rows is None else max(1, round(number / self.rows))
