"""Follow leaves through the calls of a forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode, resolve_name

from weingarten.layers.attention import attention
from weingarten.layers.embedding import EMBEDDING, padding_index
from weingarten.layers.operations import GATHERING, SAME, SELECTING, SHIFTED, SPLITTING, TRANSPOSED
from weingarten.layers.use import Tracked, bound
from weingarten.tree import TreeLike

__all__ = ["Key", "LayerError", "Watch", "entries", "node_of", "requiring", "tensors"]

Key = tuple[str, tuple[str, ...], int]
"""A call that involves leaves: its function, the leaves, and how many times before."""


class LayerError(ValueError):
    """A model whose use of its parameters cannot be followed."""


class Watch(TorchFunctionMode):
    """Follows leaves through the calls of a forward pass."""

    def __init__(self, leaves: Mapping[str, Tensor], data: int) -> None:
        super().__init__()
        self.data = data
        self.tracked = {id(p): Tracked(name, p.shape, p) for name, p in leaves.items()}
        self.unknown: dict[str, str] = {}
        self.selected = False
        self.counts: dict[tuple[str, tuple[str, ...]], int] = {}
        self.before: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward:
            call = bound(_ATTENTION, args, kwargs)
            for packed in (call.get("in_proj_weight"), call.get("in_proj_bias")):
                if id(packed) in self.tracked:
                    self.tracked[id(packed)].parts = 3
            with self:
                return attention(*args, **kwargs)
        found = [self.tracked[id(x)] for x in tensors((args, kwargs)) if id(x) in self.tracked]
        if found:  # before an operation in place moves them
            self.before = {node_of(x) for x in tensors((args, kwargs)) if x.requires_grad}
        self.selected = self.selected or _selects(func, args)
        output = func(*args, **kwargs)
        if found and any(x.requires_grad for x in tensors(output)):
            leaves = tuple(p.leaf for p in found)
            name = str(resolve_name(func) or getattr(func, "__name__", func))
            count = self.counts[name, leaves] = self.counts.get((name, leaves), -1) + 1
            reason = self.note(func, args, kwargs, output, found, (name, leaves, count))
            if reason is not None:
                for leaf in leaves:
                    self.unknown.setdefault(leaf, f"used by {name}{reason}")
        return output

    def note(
        self, func: Any, args: Any, kwargs: Any, output: Any, found: list[Tracked], key: Key
    ) -> str | None:
        """Take the call in; a reason (which may be empty) if it is not understood."""
        raise NotImplementedError

    def follow(self, func: Any, args: Any, kwargs: Any, output: Any, found: list[Tracked]) -> bool:
        """Keep track of tensors that stand for a leaf."""
        if len(found) != 1:
            return False
        (p,) = found
        if not isinstance(output, Tensor):
            if func not in SPLITTING or p.rows is not None or p.transposed:
                return False
            for piece, where in zip(output, entries(func, args, kwargs, p), strict=True):
                self.tracked[id(piece)] = Tracked(p.leaf, p.shape, piece, where=where)
            return True
        shifted = func in SHIFTED and len(args) == 2 and not kwargs
        if (func in SAME or shifted) and output.shape == p.value.shape:
            new = Tracked(p.leaf, p.shape, output, p.transposed, p.where, p.rows, p.ignored, p.parts)
        elif func in TRANSPOSED and len(p.shape) == 2 and (p.whole or p.transposed):
            new = Tracked(p.leaf, p.shape, output, not p.transposed)
        elif func in GATHERING and p.rows is not None:
            where = entries(func, args, kwargs, p)
            rows = _whole_rows(where, p.shape[-1])
            if rows is None and p.ignored is not None:
                return False
            kept = {"where": where} if rows is None else {"rows": rows}
            new = Tracked(p.leaf, p.shape, output, **kept, ignored=p.ignored)
        elif func in GATHERING and p.rows is None and not p.transposed:
            new = Tracked(p.leaf, p.shape, output, where=entries(func, args, kwargs, p))
        else:
            return False
        self.tracked[id(output)] = new
        return True

    def look_up(self, args: Any, kwargs: Any, output: Tensor, found: list[Tracked]) -> bool:
        """Keep track of rows of a table that are the same for all data."""
        (table,) = found
        call = bound(EMBEDDING[functional.embedding][0], args, kwargs)
        if table.whole and not call.get("max_norm"):
            padding = padding_index(call)
            new = Tracked(table.leaf, table.shape, output, rows=call["input"], ignored=padding)
            self.tracked[id(output)] = new
        return table.whole


def entries(func: Any, args: Any, kwargs: Any, p: Tracked) -> Any:
    """The flat number of the leaf's entry at each place of a view or copy, by making the same view of the numbers."""
    if p.rows is not None:
        width = p.shape[-1]
        numbers = p.rows.unsqueeze(-1) * width + torch.arange(width, device=p.rows.device)
    elif p.where is not None:
        numbers = p.where
    else:
        numbers = torch.arange(p.value.numel(), device=p.value.device).reshape(p.value.shape)
    swap = [numbers if x is p.value else x for x in args]
    return func(*swap, **{name: numbers if x is p.value else x for name, x in kwargs.items()})


def _whole_rows(entries: Tensor, width: int) -> Tensor | None:
    """The rows of a table whose entries, by their flat numbers, lie whole along the last axis; None where they do not."""
    if entries.shape[-1] != width:
        return None
    rows = entries[..., 0] // width
    whole = rows.unsqueeze(-1) * width + torch.arange(width, device=entries.device)
    return rows if torch.equal(whole, entries) else None


def _selects(func: Any, args: Any) -> bool:
    """Whether a call may return as many things as the values say, as where tokens are routed to experts."""
    if func is torch.where:
        return len(args) == 1
    return func in SELECTING or (
        func is Tensor.__getitem__ and any(x.dtype == torch.bool for x in tensors(args[1:]))
    )


def node_of(x: Tensor) -> Any:
    """The node of the graph that made a tensor."""
    return get_gradient_edge(x).node


def requiring(params: TreeLike) -> dict[str, Tensor]:
    """The parameters as new leaves of a graph; shared memory."""
    return {name: p.detach().requires_grad_() for name, p in params.items()}


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for x in value.values():
            yield from tensors(x)
    elif isinstance(value, tuple | list):
        for x in value:
            yield from tensors(x)


_ATTENTION = (
    "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias"
)  # fmt: skip
