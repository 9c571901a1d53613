"""Which rank steps which blocks, and what is sent for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from weingarten.optim.cost import StepCost, total
from weingarten.optim.routes import Route
from weingarten.tree import Tree, TreeLike

__all__ = ["Shard", "imbalance", "merged", "replicated_bytes", "sharded_bytes", "shards"]


@dataclass(frozen=True)
class Shard:
    """What one rank steps.

    Attributes:
        routes: their places in the list of routes, ascending.
        cost: of one step.
    """

    routes: tuple[int, ...]
    cost: StepCost

    def of(self, routes: Sequence[Route]) -> list[Route]:
        """This rank's part of all routes."""
        return [routes[i] for i in self.routes]


def shards(costs: Sequence[StepCost], ranks: int) -> list[Shard]:
    """Assign whole routes to ranks: the one with most flops first, each to the rank that has the least so far.

    Longest processing time first (Graham 1969, https://doi.org/10.1137/0117039): at most 4/3 of the shortest possible maximum.
    Equal flops go to the rank with the smaller state. A block is never cut.

    Args:
        costs: of the routes.
        ranks: how many there are; some stay empty if there are fewer routes.

    Raises:
        ValueError: if ``ranks`` is less than one.

    >>> from weingarten.optim.cost import muon_cost
    >>> [shard.routes for shard in shards([muon_cost((n, n)) for n in (8, 5, 6, 5)], 2)]
    [(0,), (1, 2, 3)]
    """
    if ranks < 1:
        raise ValueError(f"shards: ranks is {ranks}, expected >= 1")
    taken: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, 0)] * ranks
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i].flops, -costs[i].state)):
        rank = loads.index(min(loads))
        taken[rank].append(i)
        loads[rank] = (loads[rank][0] + costs[i].flops, loads[rank][1] + costs[i].state)
    return [Shard(tuple(sorted(mine)), total([costs[i] for i in mine])) for mine in taken]


def imbalance(values: Iterable[float]) -> float:
    """The largest over the mean: how much longer a step takes than it would if all ranks had the same; one for zeros.

    >>> imbalance([3.0, 1.0])
    1.5
    """
    found = list(values)
    return max(found) * len(found) / sum(found) if sum(found) else 1.0


def replicated_bytes(size: int, ranks: int) -> float:
    """What each rank receives in a step when every rank keeps all parameters (DDP), on average.

    Gradients are the same everywhere already; a rank steps its own blocks, then all gather the parameters: it lacks
    ``(R - 1) / R`` of them.

    Args:
        size: bytes of all parameters.
        ranks: R.

    >>> replicated_bytes(800, 8)
    700.0
    """
    return size * (ranks - 1) / ranks


def sharded_bytes(size: int, ranks: int) -> float:
    """What each rank receives in a step when parameters are cut along their first axis (FSDP2), on average.

    The rank that steps a block gathers its gradients, of which it has ``1 / R``, and sends the step back the same way. What AdamW
    steps stays where it is.

    Args:
        size: bytes of all parameters in blocks.
        ranks: R.

    >>> sharded_bytes(800, 8)
    175.0
    """
    return 2 * size * (ranks - 1) / ranks**2


def merged(parts: Sequence[Shard], routes: Sequence[Route], found: Sequence[TreeLike]) -> Tree:
    """The parameters of all ranks after a step, each leaf from the rank that stepped it: what the gather gives.

    Args:
        parts: the assignment.
        routes: all of them.
        found: parameters by name, of every rank.
    """
    return {
        name: values[name]
        for part, values in zip(parts, found, strict=True)
        for route in part.of(routes)
        for name in route.leaves
    }
