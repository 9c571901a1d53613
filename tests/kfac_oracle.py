"""KFAC by its definition: one datum, one column, one position at a time, on models that are written out by hand.

A hand-written model takes one datum, without a data axis. Every use of parameters is a call of :class:`Hand` with its input rows
and with the function that makes its matrix out of the leaves, so that nothing here shares a thought with `weingarten.layers`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Params = dict[str, Tensor]
Matrix = Callable[[Params], Tensor]
LIVE = 1e-10


@dataclass
class Call:
    """One use: rows ``(T, in)``, and what is added to the outputs ``(T, out)`` to have the gradient there."""

    leaves: tuple[str, ...]
    group: int
    term: int
    matrix: Matrix
    rows: Tensor
    probe: Tensor


class Hand:
    """Parameters by name, and a record of how they are used for one datum."""

    def __init__(self, params: Params) -> None:
        self.params = {name: p.detach().requires_grad_() for name, p in params.items()}
        self.calls: list[Call] = []
        self.gains: list[tuple[str, ...]] = []

    def __getitem__(self, name: str) -> Tensor:
        return self.params[name]

    def use(
        self, rows: Tensor, leaves: tuple[str, ...], matrix: Matrix, group: int = 0, term: int = 0
    ) -> Tensor:
        """``rows @ matrix^T``; uses of one group and term are further positions, ``term`` 1 has its inputs on the left."""
        z = rows @ matrix(self.params).mT
        probe = torch.zeros_like(z, requires_grad=True)
        self.calls.append(Call(leaves, group, term, matrix, rows.detach(), probe))
        return z + probe

    def gain(self, *leaves: str) -> None:
        """These leaves act entry by entry: one dense block of per-datum gradients."""
        self.gains.append(leaves)


@dataclass
class Sums:
    """Sums of one group and term of a block."""

    entries: Tensor  # (out, in): where each entry of the matrix lies in the block's leaves, side by side
    inputs: Any = 0.0
    rows: float = 0.0
    outputs: Any = 0.0


@dataclass
class Expected:
    """Factors by block, group and term."""

    sums: dict[tuple[str, ...], dict[tuple[int, int], Sums]] = field(default_factory=dict)
    divisor: float = 1.0

    def means(self, leaves: tuple[str, ...], group: int = 0, term: int = 0) -> tuple[Tensor, Tensor]:
        """Output and input factor."""
        s = self.sums[leaves][group, term]
        return s.outputs / self.divisor, s.inputs / (s.rows or 1.0)

    def dense(self, leaves: tuple[str, ...], table: bool) -> Tensor:
        """The block; ``table``: the inputs of term 0 number the rows of a table, whose side has diagonal factors."""
        parts = self.sums[leaves]
        size = sum(s.entries.numel() for (_, term), s in parts.items() if term == 0)
        result = torch.zeros(size, size, dtype=torch.float64)
        for group, term in parts:
            if term == 1:
                continue
            b, a = self.means(leaves, group)
            a = a.diagonal().diag() if table else a
            block, left, right = torch.kron(b, a), None, None
            if (group, 1) in parts:
                other_b, other_a = self.means(leaves, group, 1)
                other_b = other_b.diagonal().diag() if table else other_b
                right = torch.eye(len(a), dtype=a.dtype) if table else None
                total = torch.kron(b, a) + torch.kron(other_a, other_b)
                left = torch.linalg.eigh(a.trace() * b + other_b.trace() * other_a)[1]
                right = (
                    torch.linalg.eigh(b.trace() * a + other_a.trace() * other_b)[1]
                    if right is None
                    else right
                )
                q = torch.kron(left.contiguous(), right.contiguous())
                block = q @ (q.mT @ total @ q).diagonal().diag() @ q.mT
            where = parts[group, 0].entries.reshape(-1)
            result[where[:, None], where] = block
        return result


def factors(
    model: Callable[[Hand, Any], Tensor],
    params: Params,
    data: list[tuple[Any, Callable[[Tensor], list[Tensor]], float, float]],
    divisor: float,
    reduce: bool = False,
) -> Expected:
    """Factors of all blocks.

    Args:
        model: of one datum.
        params: its leaves.
        data: for each datum the input, the function that makes the columns from the output, its weight among the output
            gradients and its weight among the input rows.
        divisor: of the output factors.
        reduce: average inputs and sum gradients over positions first.
    """
    found = Expected(divisor=divisor)
    for x, columns_of, weight, row_weight in data:
        hand = Hand(params)
        output = model(hand, x)
        columns = columns_of(output.detach())
        gradients = [
            torch.autograd.grad(
                output,
                [*(call.probe for call in hand.calls), *hand.params.values()],
                weight**0.5 * s,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for s in columns
        ]
        for place in dict.fromkeys((call.leaves, call.group, call.term) for call in hand.calls):
            mine = [i for i, call in enumerate(hand.calls) if (call.leaves, call.group, call.term) == place]
            rows = torch.cat([hand.calls[i].rows for i in mine])
            g = [torch.cat([found_g[i] for i in mine]) for found_g in gradients]  # each (T, out)
            add(_sums(found, hand, hand.calls[mine[0]]), rows, g, row_weight, reduce)
        names = list(hand.params)
        for leaves in hand.gains:
            g = [
                torch.cat([found_g[len(hand.calls) + names.index(leaf)].reshape(-1) for leaf in leaves])[None]
                for found_g in gradients
            ]
            size = sum(hand.params[leaf].numel() for leaf in leaves)
            sums = found.sums.setdefault(leaves, {}).setdefault((0, 0), Sums(torch.arange(size)[:, None]))
            add(sums, torch.ones(1, 1, dtype=torch.float64), g, row_weight, reduce)
    return found


def add(sums: Sums, rows: Tensor, columns: list[Tensor], row_weight: float, reduce: bool) -> None:
    """One datum: rows ``(T, in)``, output gradients ``(T, out)`` of each column."""
    live = [t for t in range(len(rows)) if any(float(g[t].abs().max()) > LIVE for g in columns)]
    inputs = [rows[t] for t in live]
    if reduce and live:
        inputs = [sum(inputs[1:], inputs[0]) / len(live)]
    for a in inputs:
        sums.inputs = sums.inputs + row_weight * torch.outer(a, a)
        sums.rows += row_weight
    if not inputs:
        sums.inputs = sums.inputs + torch.zeros(rows.shape[1], rows.shape[1], dtype=rows.dtype)
    for column in columns:
        for g in [column.sum(0)] if reduce else column:
            sums.outputs = sums.outputs + torch.outer(g, g)


def _sums(found: Expected, hand: Hand, call: Call) -> Sums:
    """The sums that a call adds to, with the places of its matrix' entries in the block."""
    parts = found.sums.setdefault(call.leaves, {})
    if (call.group, call.term) not in parts:
        first, numbers = 0, {}
        for leaf in call.leaves:
            p = hand.params[leaf]
            numbers[leaf] = torch.arange(first, first + p.numel(), dtype=torch.float64).reshape(p.shape)
            first += p.numel()
        parts[call.group, call.term] = Sums(call.matrix(numbers).long())
    return parts[call.group, call.term]


def root(hessian: Tensor, shape: torch.Size) -> list[Tensor]:
    """Columns whose outer products add up to a symmetric matrix."""
    values, vectors = torch.linalg.eigh(hessian)
    return [
        (value**0.5 * v).reshape(shape)
        for value, v in zip(values, vectors.mT, strict=True)
        if value > 1e-12 * values.max()
    ]
