"""Hand over the gradients of a backward pass one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

__all__ = ["stream"]


def stream(
    output: Tensor,
    edges: Sequence[GradientEdge],
    columns: Tensor,
    last: bool,
    consume: Callable[[int, Tensor | None], None],
) -> None:
    """Gradients at edges of a graph for output gradients ``(K, *output.shape)``, in the order they are found.

    A single column's gradients are handed over in the middle of the backward pass, so that no two need be there at once;
    several columns go through one batched backward pass.

    Args:
        output: the end of the graph.
        edges: where gradients are wanted.
        columns: the output gradients.
        last: whether the graph may be freed.
        consume: takes the number of an edge and its gradients ``(K, ...)``, or None if no gradient came by.
    """
    batched = len(columns) > 1
    several = len({edge.node for edge in edges}) < len(edges)
    direct = list(range(len(edges))) if batched or several else _lowest(output, edges)
    done: set[int] = set()

    def take(number: int, g: Tensor | None) -> None:
        done.add(number)
        consume(number, g if g is None or batched else g.unsqueeze(0))

    with ExitStack() as hooks:
        for number in set(range(len(edges))) - set(direct):
            node, place = edges[number].node, edges[number].output_nr
            handle = node.register_prehook(partial(_hand_over, take, number, place))
            hooks.callback(handle.remove)
        found = torch.autograd.grad(
            output,
            [edges[number] for number in direct],
            columns if batched else columns[0],
            retain_graph=not last,
            allow_unused=True,
            is_grads_batched=batched,
        )
    for number, g in zip(direct, found, strict=True):
        take(number, g)
    for number in set(range(len(edges))) - done:
        take(number, None)


def _hand_over(
    take: Callable[[int, Tensor | None], None], number: int, output: int, gradients: tuple[Tensor | None, ...]
) -> None:
    take(number, gradients[output])


def _lowest(output: Tensor, edges: Sequence[GradientEdge]) -> list[int]:
    """The edges below which there is no other: a backward pass to these goes through all of them."""
    numbers = {edge.node: number for number, edge in enumerate(edges)}
    below: dict[Any, bool] = {}  # whether an edge lies at or below a node
    lowest = []
    stack: list[tuple[Any, bool]] = [(output.grad_fn, False)]
    while stack:
        node, expanded = stack.pop()
        following = [child for child, _ in node.next_functions if child is not None]
        if expanded:
            inside = any(below[child] for child in following)
            if node in numbers and not inside:
                lowest.append(numbers[node])
            below[node] = inside or node in numbers
        elif node not in below:
            below[node] = False
            stack.append((node, True))
            stack.extend((child, False) for child in following if child not in below)
    return lowest
