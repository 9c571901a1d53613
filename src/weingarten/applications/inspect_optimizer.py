"""What Symo would do with a model, on paper: its routes, what a step costs next to other optimisers, and shards over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weingarten.applications.inspect import InspectionError, try_out
from weingarten.optim import Symo
from weingarten.optim.cost import (
    StepCost,
    adamw_cost,
    muon_cost,
    route_costs,
    soap_cost,
    total,
)
from weingarten.optim.routes import Route, unwrapped
from weingarten.optim.shards import Shard, imbalance, replicated_bytes, sharded_bytes, shards

__all__ = ["OptimizerPlan", "RouteKind", "Sharding", "plan_optimizer"]

_SHOWN = 6  # parameters of a route


@dataclass(frozen=True)
class RouteKind:
    """Routes that look alike.

    Attributes:
        count: how many there are.
        label: ``block`` or ``AdamW``.
        leaves: names of the first one's parameters, the layer's number a star where there are several.
        shapes: theirs.
        moment: as the first one prints it.
        cost: of all of them together.
    """

    count: int
    label: str
    leaves: str
    shapes: str
    moment: str
    cost: StepCost


@dataclass(frozen=True)
class OptimizerPlan:
    """The routes of a model's parameters and what they cost.

    Attributes:
        name: the model's class.
        routes: of Symo.
        shapes: of the parameters.
        costs: of the routes, for one step.
        gpu: the same where large roots are found by products, as on a GPU.
        refresh: steps between two factorisations.
        itemsize: bytes of one entry of the parameters.
        outer: embeddings, and matrices of the shape of the largest one, which are heads; Muon leaves them out.
    """

    name: str
    routes: list[Route]
    shapes: dict[str, torch.Size]
    costs: list[StepCost]
    gpu: list[StepCost]
    refresh: int
    itemsize: int
    outer: frozenset[str]

    @property
    def size(self) -> int:
        """Number of trainable parameters."""
        return total(self.costs).entries

    @property
    def largest(self) -> int:
        """Size of the largest matrix that is factorised."""
        return total(self.costs).largest

    def kinds(self) -> list[RouteKind]:
        """Routes grouped by parameters' shapes and blocks, in order."""
        found: dict[object, list[int]] = {}
        for i, route in enumerate(self.routes):
            shapes = tuple(self.shapes[name] for name in route.leaves)
            place = _starred(route.leaves[0])
            found.setdefault((route.adamw, shapes, str(route.moment), place), []).append(i)
        return [self._kind(places) for places in found.values()]

    def _kind(self, places: list[int]) -> RouteKind:
        route = self.routes[places[0]]
        several = len(places) > 1 or len(route.leaves) > _SHOWN
        names = list(dict.fromkeys(_starred(name) if several else name for name in route.leaves))
        shapes = [" x ".join(map(str, self.shapes[name])) or "scalar" for name in route.leaves]
        return RouteKind(
            len(places),
            "AdamW" if route.adamw else "block",
            _shortened(names[:_SHOWN]) + _more(route.leaves),
            ", ".join(shapes[:_SHOWN]) + _more(route.leaves),
            "" if route.adamw else _blocks(route),
            total([self.costs[i] for i in places]),
        )

    def compared(self) -> dict[str, StepCost]:
        """Symo, and others on the same model: Muon with AdamW for ``outer`` parameters and vectors, SOAP and AdamW for all."""
        muon = {name for name, shape in self.shapes.items() if len(shape) > 1} - self.outer
        shapes = self.shapes.items()
        return {
            "Symo": total(self.costs),
            "Symo, roots by products (GPU)": total(self.gpu),
            "Muon": total([muon_cost(s) if name in muon else adamw_cost(s) for name, s in shapes]),
            "SOAP": total([soap_cost(s) for _, s in shapes]),
            "AdamW": total([adamw_cost(s) for _, s in shapes]),
        }

    def backward(self, tokens: int) -> float:
        """``6 * parameters * tokens``: flops of a forward and a backward pass (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361)."""
        return 6.0 * self.size * tokens

    def shards(self, ranks: int) -> Sharding:
        """Whole routes over ranks.

        Raises:
            ValueError: if ``ranks`` is less than one.
        """
        parts = shards(self.costs, ranks)
        blocks = total([c for c, route in zip(self.costs, self.routes, strict=True) if not route.adamw])
        return Sharding(
            parts,
            imbalance(shard.cost.flops for shard in parts),
            imbalance(shard.cost.state for shard in parts),
            replicated_bytes(self.itemsize * self.size, ranks),
            sharded_bytes(self.itemsize * blocks.entries, ranks),
        )


@dataclass(frozen=True)
class Sharding:
    """Routes over ranks.

    Attributes:
        parts: one for each rank.
        flops: of the busiest rank over the mean.
        state: of the fullest rank over the mean.
        replicated: bytes that a rank receives in a step under DDP.
        cut: the same under FSDP2.
    """

    parts: list[Shard]
    flops: float
    state: float
    replicated: float
    cut: float


def plan_optimizer(model: nn.Module, inputs: Any, max_block: int | None = None) -> OptimizerPlan:
    """Construct :class:`weingarten.Symo` and count what its step would cost; nothing is computed.

    Args:
        model: a module, also on the meta device, where the largest models take no memory.
        inputs: as for ``infer_symmetry``, on the same device.
        max_block: as for Symo.

    Raises:
        InspectionError: if the model has nothing to train, fails on its inputs, cannot be traced, or the bound cannot be met.

    >>> with torch.device("meta"):
    ...     model, inputs = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.empty(2, 3)
    >>> found = plan_optimizer(model, inputs)
    >>> found.size, found.largest, [kind.moment for kind in found.kinds()][:2]
    (26, 3, ['entry by entry in eigenbases of 3', 'entry by entry in eigenbases of 2'])
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise InspectionError(f"the {type(model).__name__} has no trainable parameter")
    if max_block is not None and max_block < 1:
        raise InspectionError(f"max_block is {max_block}, expected >= 1")
    try_out(model, inputs)
    try:
        optimizer = Symo(model, example_inputs=inputs, max_block=max_block)
    except ValueError as error:
        raise InspectionError(str(error)) from error
    inner = unwrapped(model)
    params: Mapping[str, torch.Tensor] = {n: p for n, p in inner.named_parameters() if p.requires_grad}
    return OptimizerPlan(
        type(inner).__name__,
        optimizer.routes,
        {name: p.shape for name, p in params.items()},
        route_costs(optimizer),
        route_costs(optimizer, gpu=True),
        optimizer.refresh,
        max(p.element_size() for p in params.values()),
        _outer(inner),
    )


def _outer(model: nn.Module) -> frozenset[str]:
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    largest = max((table.shape for table in tables), default=None)
    known = {id(table) for table in tables}
    return frozenset(name for name, p in model.named_parameters() if id(p) in known or p.shape == largest)


def _starred(name: str) -> str:
    """``h.3.attn.weight`` as ``h.*.attn.weight``."""
    return ".".join("*" if word.isdecimal() else word for word in name.split("."))


def _more(leaves: tuple[str, ...]) -> str:
    return f" and {len(leaves) - _SHOWN} more" if len(leaves) > _SHOWN else ""


def _shortened(names: list[str]) -> str:
    """Names with what they begin with said once: ``h.*.attn: c_attn.weight, c_proj.weight``."""
    if len(names) == 1:
        return names[0]
    split = [name.split(".") for name in names]
    same = 0
    while all(len(words) > same + 1 and words[same] == split[0][same] for words in split):
        same += 1
    rest = ", ".join(".".join(words[same:]) for words in split)
    return f"{'.'.join(split[0][:same])}: {rest}" if same else rest


def _blocks(route: Route) -> str:
    """The moment's blocks, equal ones once."""
    return ", ".join(dict.fromkeys(str(route.moment).split(", ")))
