"""Where the data lie in a model's activations, found by running it on two and on three rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from weingarten.layers.arrangement import Arrangement, ArrangementError, arrangement, difference
from weingarten.layers.use import Tracked
from weingarten.layers.watch import Key, LayerError, Watch, requiring, tensors
from weingarten.objective import Batch, Objective, curvature_pass, input_rows
from weingarten.tree import TreeLike

__all__ = ["UNSEEN", "Structure", "structure_of"]

UNSEEN = "unseen"


@dataclass(frozen=True)
class Structure:
    """Where the data lie in the output of each call that involves a leaf: by function, leaves and how many times before.

    Attributes:
        arrangements: None where the output is the same for all data, a reason where the data cannot be told apart.
        sure: whether it was found from three different rows, so that it holds for other batches.
    """

    arrangements: Mapping[Key, Arrangement | str | None]
    sure: bool

    def find(self, key: Key) -> Arrangement | str | None:
        """The arrangement of a call; in a loop over more steps than before, that of the last step known, if it is not merged."""
        name, leaves, count = key
        known = next(
            (k for k in ((name, leaves, i) for i in range(count, -1, -1)) if k in self.arrangements), None
        )
        if known is None:
            return UNSEEN
        where = self.arrangements[known]
        return UNSEEN if known != key and isinstance(where, Arrangement) and where.merged else where


def structure_of(objective: Objective, params: TreeLike, batch: Batch, call: str) -> Structure:
    """Find the data axes by running the model on two and on three rows of the batch.

    Raises:
        LayerError: if the model cannot run on them, or mixes the data.
    """
    data = len(batch.targets)
    lengths = [len(x) for x in tensors(batch.inputs) if x.ndim]
    if lengths and data not in lengths:
        raise LayerError(
            f"{call}: the inputs have {' and '.join(map(str, lengths))} rows and the targets {data}, expected one for each datum"
        )
    outputs: dict[int, dict[Key, Tensor]] = {2: {}, 3: {}}
    results: dict[int, Tensor] = {}
    looked_up = False
    # The first pass tells the second which rows of tables ignore the data; if any do, it is repeated.
    for rows in (2, 3, 2):
        if outputs[2] and outputs[3] and not looked_up:
            break
        leaves = requiring({name: _not_zero(p) for name, p in params.items()})
        index = torch.arange(rows, device=batch.targets.device) % data
        probe = _Probe(leaves, rows, outputs[5 - rows])
        with curvature_pass(objective.model), torch.enable_grad():
            try:
                with probe:
                    results[rows] = objective.forward(leaves, input_rows(batch.inputs, index, data)).detach()
            except RuntimeError as error:
                objective.forward(leaves, batch.inputs)  # its own error, where it is no matter of rows
                raise LayerError(
                    f"{call}: the model cannot be run on {rows} rows of the batch's {data} ({error}); inputs that belong to all "
                    "data must not have as many rows as the batch"
                ) from error
        outputs[rows], looked_up = probe.outputs, probe.looked_up
    if len(results[3]) == 3 and difference(results[2], results[3][:2]) > 0.05:
        raise LayerError(
            f"{call}: the model's output for a datum depends on the other data of the batch, as in batch "
            "normalisation by the batch's own statistics; use running statistics, or another normalisation"
        )
    found: dict[Key, Arrangement | str | None] = {}
    for key in outputs[2].keys() & outputs[3].keys():
        try:
            found[key] = arrangement(outputs[2][key], outputs[3][key], single=data == 1)
        except ArrangementError as error:
            found[key] = str(error)
    return Structure(found, sure=data >= 3)


class _Probe(Watch):
    """Collects the outputs of all calls that involve a leaf; ``known`` are those of another number of rows."""

    def __init__(self, leaves: Mapping[str, Tensor], data: int, known: Mapping[Key, Tensor]) -> None:
        super().__init__(leaves, data)
        self.known = known
        self.looked_up = False
        self.outputs: dict[Key, Tensor] = {}

    def note(
        self, func: Any, args: Any, kwargs: Any, output: Any, found: list[Tracked], key: Key
    ) -> str | None:
        if not isinstance(output, Tensor):
            self.follow(func, args, kwargs, output, found)
        else:
            self.outputs[key] = output.detach()
            known = self.known.get(key)
            if func is not functional.embedding:
                self.follow(func, args, kwargs, output, found)
            elif known is not None and known.shape == output.shape:
                self.looked_up |= self.look_up(args, kwargs, output, found)
        return None


def _not_zero(p: Tensor) -> Tensor:
    """The leaf, or other values where it is zero throughout, as layers start that shall do nothing at first."""
    if p.any():
        return p
    return torch.arange(1, p.numel() + 1, device=p.device).cos().to(p.dtype).reshape(p.shape) / 10
