"""See how a model uses its parameters in one forward pass, without touching the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from weingarten.layers.elementwise import copies
from weingarten.layers.operations import COPYING, OPERATIONS
from weingarten.layers.stream import stream
from weingarten.layers.structure import UNSEEN, Structure
from weingarten.layers.use import Site, Tracked, Use, bound
from weingarten.layers.watch import Key, LayerError, Watch, entries, node_of, requiring
from weingarten.objective import Batch, Objective, curvature_pass, each_tensor, graph_nodes
from weingarten.tree import TreeLike

__all__ = ["Capture", "capture"]


@dataclass
class Capture:
    """One forward pass: the model's output, and every use of a leaf.

    Attributes:
        output: the model's output, with its graph.
        leaves: the parameters in that graph.
        uses: in the order of the calls.
        unknown: leaves that are used in a way that is not understood, and how.
    """

    output: Tensor
    leaves: dict[str, Tensor]
    uses: list[Use]
    unknown: dict[str, str]

    def gradients(self, columns: Tensor, last: bool) -> list[Tensor]:
        """Gradients of each use's output for output gradients ``(K, *output.shape)``, as ``(K, *use.shape)``.

        Args:
            columns: the output gradients; several go through one batched backward pass.
            last: whether the graph may be freed.
        """
        found: dict[int, Tensor] = {}
        self.stream(columns, last, found.__setitem__)
        return [found[number] for number in range(len(self.uses))]

    def stream(self, columns: Tensor, last: bool, consume: Callable[[int, Tensor], None]) -> None:
        """As :meth:`gradients`, handing each one over with the number of its use as soon as it is there."""

        def take(number: int, g: Tensor | None) -> None:
            consume(number, columns.new_zeros(len(columns), *self.uses[number].shape) if g is None else g)

        if self.uses:
            stream(self.output, [use.edge for use in self.uses], columns, last, take)


@contextmanager
def capture(
    objective: Objective,
    params: TreeLike,
    batch: Batch,
    structure: Structure,
    call: str,
    single: bool = False,
    training: bool = False,
) -> Iterator[Capture]:
    """Run the model once and see how it uses ``params``; nothing of the model is changed.

    Args:
        objective: the model.
        params: the leaves to follow; other parameters of the model are constants.
        batch: one batch.
        structure: from :func:`structure_of`, for any batch.
        call: who asks, for messages.
        single: whether each backward pass takes one column, which fused attention can do.
        training: whether the model runs in the mode it is in, rather than in evaluation mode.

    Raises:
        LayerError: if an input of a use is overwritten afterwards, or a leaf is used where it cannot be followed.
    """
    leaves = requiring(params)
    record = _Record(leaves, len(batch.targets), structure)
    with curvature_pass(objective.model, not single, training), torch.enable_grad():
        try:
            with record:
                output = objective.forward(leaves, each_tensor(_usable, batch.inputs))
        except LayerError as error:
            raise LayerError(f"{call}: {error}") from None
        if not output.requires_grad:
            raise LayerError(
                f"{call}: the model's output does not depend on any layer; does it run under torch.no_grad or detach?"
            )
        nodes = set(graph_nodes(output))
        uses = [use for use in record.uses if use.edge.node in nodes]  # the others are cut off, by detach say
        for use in uses:
            if use.overwritten:
                raise LayerError(
                    f"{call}: the input of layer {use.layer!r} is overwritten in place after the layer; use an out-of-place "
                    "operation"
                )
        if any(node.name() == "CheckpointFunctionBackward" for node in nodes):
            raise LayerError(
                f"{call}: the model calls torch.utils.checkpoint with use_reentrant=True, inside of which layers cannot be seen; "
                "pass use_reentrant=False"
            )
        unknown = {**record.unknown}
        for name in _used_elsewhere(nodes, record):
            unknown.setdefault(
                name, "used by an operation that cannot be seen, such as a torch.autograd.Function"
            )
        uses = [use for use in uses if not any(leaf in unknown for leaf in use.leaves.values())]
        yield Capture(output, leaves, uses, unknown)


class _Record(Watch):
    """Collects the uses of leaves."""

    def __init__(self, leaves: Mapping[str, Tensor], data: int, structure: Structure) -> None:
        super().__init__(leaves, data)
        self.structure = structure
        self.uses: list[Use] = []
        self.explained: set[Any] = set()

    def note(
        self, func: Any, args: Any, kwargs: Any, output: Any, found: list[Tracked], key: Key
    ) -> str | None:
        if not isinstance(output, Tensor):
            if not self.follow(func, args, kwargs, output, found):
                return ""
            for piece in output:
                self.explained |= _nodes_between(piece, self.before)
            return None
        where = self.structure.find(key)
        if where == UNSEEN:
            raise LayerError(
                f"{key[0]} takes {' and '.join(map(repr, key[1]))} {key[2] + 1} times, which it does not for other rows of the "
                "batch, expected the same calls for all data"
            )
        if isinstance(where, str):
            return f", whose output {where}"
        if where is not None and where.merged and self.selected:
            return ", in whose output data are mixed with positions after some were selected by their values"
        if where is not None and not where.fits(output, self.data):
            return f", whose output has shape {tuple(output.shape)} for {self.data} rows, expected an axis that counts them"
        self.explained |= _nodes_between(output, self.before)
        if where is None:
            if func is functional.embedding:
                understood = self.look_up(args, kwargs, output, found)
            else:
                understood = self.follow(func, args, kwargs, output, found)
            return None if understood else " before it meets the data"
        use = self._use(func, args, kwargs, found, Site(output, where, self.data))
        if use is None:
            return ""
        self.uses.append(use)
        return None

    def _use(self, func: Any, args: Any, kwargs: Any, found: list[Tracked], site: Site) -> Use | None:
        if func in OPERATIONS:
            names, build = OPERATIONS[func]
            return build(bound(names, args, kwargs), self.tracked, site)
        if func in COPYING and len(found) == 1 and found[0].rows is None and not found[0].transposed:
            return copies(found[0], entries(func, args, kwargs, found[0]), site)
        return None


def _used_elsewhere(nodes: set[Any], record: _Record) -> Iterator[str]:
    """Leaves that reach the output by a path that no call explains."""
    owners = {node_of(p.value): p.leaf for p in record.tracked.values() if p.value.requires_grad}
    for node in nodes:
        if node not in record.explained:
            for following, _ in node.next_functions:
                if following in owners:
                    yield owners[following]


def _nodes_between(output: Tensor, ends: set[Any]) -> set[Any]:
    """The nodes of the graph that one call made, down to those of its arguments."""
    found: set[Any] = set()
    stack = [node_of(output)]
    while stack:
        node = stack.pop()
        if node is not None and node not in ends and node not in found:
            found.add(node)
            stack.extend(following for following, _ in node.next_functions)
    return found


def _usable(x: Tensor) -> Tensor:
    """Not an inference tensor, which autograd refuses to save."""
    return x.clone() if x.is_inference() else x
