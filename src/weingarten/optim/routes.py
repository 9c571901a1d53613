"""Every parameter in exactly one route: a block of the symmetry, a group of its own, or AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from weingarten.groups import Action, Permutation, SignedPermutation, Wreath
from weingarten.optim.choice import Choice
from weingarten.optim.moment import EntryMoment, Moment, OrbitMoment
from weingarten.optim.scaling import Scaling
from weingarten.symmetry import Symmetry, infer_symmetry, plan
from weingarten.symmetry.words import FREE
from weingarten.tree import Tree

__all__ = [
    "LARGEST",
    "Chooser",
    "Route",
    "architecture",
    "described",
    "longest_short_side",
    "routes_of",
    "state_like",
    "unwrapped",
]

Chooser = Callable[[str, Tensor], Choice | None]
"""From a parameter's name and tensor to its group; None for AdamW."""

LARGEST = 1024
"""Of blocks by default: the root of such a one takes about 0.1 s on one core."""


@dataclass(frozen=True)
class Route:
    """Parameters that are preconditioned together.

    Attributes:
        leaves: their names; the state of the moment is kept with the first.
        moment: of their gradients.
        adamw: whether they take AdamW's step.
    """

    leaves: tuple[str, ...]
    moment: Moment
    adamw: bool

    def needs_squares(self, scaling: Scaling) -> bool:
        """Whether Adam's second moments are kept beside the moment, for the length of its steps."""
        return scaling.of_adam and not self.adamw and not self.moment.adam_length


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``DistributedDataParallel`` and ``torch.compile``, whose names the symmetry uses."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def architecture(model: nn.Module, example_inputs: Any, max_block: int | None = None) -> Symmetry:
    """A model's symmetry, planned, with one irreducible kind per name: for whole inverse roots of coupled blocks.

    ``infer_symmetry``, then ``plan``, which for a transformer frees the residual stream and keeps heads and hidden units: query
    with key, value with output, up with down. Then every permutation is enlarged to signed permutations. Under a permutation
    the mean over the units is a kind of dimension one, whose moment has rank one per step; the inverse root of that is
    mostly damping. The larger group averages it with the rest.

    Args:
        model: a module, also compiled or in ``DistributedDataParallel``.
        example_inputs: as ``infer_symmetry`` takes them.
        max_block: largest block. Default: twice the largest shorter side of a weight, and two columns for biases, at most
            1024; what a unit reads and what it writes then fit, and the residual stream of a transformer cannot stay.

    Raises:
        ValueError: if the model cannot be traced or not planned under ``max_block``.

    >>> model = nn.Sequential(nn.Linear(3, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False))
    >>> print(architecture(model, torch.ones(2, 3)))
    leaf      words  shape  kind: block x dimension
    0.weight  0 .    8 x 3  0:vector 5 x 8
    2.weight  . 0    2 x 8  0:vector 5 x 8
    0 = SignedPermutation()
    1 kinds, largest block 5, blocks 0.00 MB, moment 0.0 Mflop, product 0.0 Mflop
    """
    inner = unwrapped(model)
    found = infer_symmetry(inner, example_inputs)
    planned = plan(found, max_block or min(2 * longest_short_side(inner) + 2, LARGEST)).symmetry
    added = set(planned.names()) - set(found.names())  # sign flips, entry by entry
    atoms = [{a for word in part.words for a in word.atoms} - {FREE} for part in planned.parts]
    alone = {
        atom for names in atoms if names <= added for atom in names
    }  # AdamW, with free axes beside them too
    freed = planned.drop(*alone)
    return replace(freed, groups={name: _irreducible(group) for name, group in freed.groups.items()})


def longest_short_side(model: nn.Module) -> int:
    """Of the weights with two axes or more, seen as matrices (rows, all else); one if there is none."""
    return max((min(p.shape[0], p.shape[1:].numel()) for p in model.parameters() if p.ndim > 1), default=1)


def _irreducible(group: Action) -> Action:
    """A group that contains this one and leaves no vector invariant."""
    if isinstance(group, Permutation):
        return SignedPermutation()
    if isinstance(group, Wreath) and isinstance(group.inner, Permutation):
        return replace(group, inner=SignedPermutation())
    return group


def routes_of(symmetry: Symmetry | Choice | Chooser, leaves: Mapping[str, Tensor]) -> list[Route]:
    """Blocks in the order of their first parameters, then AdamW, one route per parameter.

    Args:
        symmetry: what acts where, or how to choose it by parameter.
        leaves: shapes, types (of the state) and device of all parameters.

    Raises:
        ValueError: if a symmetry speaks of a leaf that is no parameter, leaves one out, or does not fit its shape.
    """
    blocks = (
        _of_symmetry(symmetry, leaves) if isinstance(symmetry, Symmetry) else _of_choice(symmetry, leaves)
    )
    taken = {name for route in blocks for name in route.leaves}
    rest = [
        Route((name,), EntryMoment({name: p}), adamw=True) for name, p in leaves.items() if name not in taken
    ]
    return [*blocks, *rest]


def _of_choice(choice: Choice | Chooser, leaves: Mapping[str, Tensor]) -> list[Route]:
    found = []
    for name, p in leaves.items():
        chosen = choice if isinstance(choice, Choice) else choice(name, p)
        if not isinstance(chosen, Choice | None):
            raise ValueError(
                f"Symo: symmetry({name!r}, ...) returned {type(chosen).__name__}, expected a Choice such as OneSide(), or None "
                "for AdamW"
            )
        moment = chosen.moment(name, p) if chosen is not None and p.ndim > 1 else None
        if moment is not None:
            found.append(Route((name,), moment, adamw=False))
    return found


def _of_symmetry(symmetry: Symmetry, leaves: Mapping[str, Tensor]) -> list[Route]:
    extra = [leaf for leaf in symmetry.leaves() if leaf not in leaves]
    missing = [name for name in leaves if name not in symmetry.leaves()]
    if extra or missing:
        raise ValueError(
            f"Symo: the symmetry speaks of {extra}, which are no parameters of the optimiser, and leaves {missing} without a "
            "route; give every parameter its words, '.' on every axis for AdamW"
        )
    symmetry.kinds(leaves)  # refuses what does not fit, with leaf and axis
    named = [
        leaf
        for leaf in symmetry.leaves()
        if any(
            atom != FREE for p in symmetry.parts if p.leaf == leaf for word in p.words for atom in word.atoms
        )
    ]
    if not named:
        return []
    found = symmetry.restrict(named)
    if not any(part.cluster for part in found.parts):
        found = found.by_component()
    return [
        Route(tuple(component), OrbitMoment(found.restrict(component), _only(leaves, component)), adamw=False)
        for component in _components((part.leaf, part.cluster) for part in found.parts)
    ]


def _only(leaves: Mapping[str, Tensor], names: Iterable[str]) -> Tree:
    return {name: leaves[name] for name in names}


def _components(pairs: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Leaves that share clusters, directly or through others, since a leaf may lie in several parts."""
    found: list[tuple[list[str], set[str]]] = []
    for leaf, cluster in pairs:
        joined = [item for item in found if leaf in item[0] or cluster in item[1]]
        leaves = list(dict.fromkeys([name for item in joined for name in item[0]] + [leaf]))
        clusters = {cluster}.union(*(item[1] for item in joined))
        kept = [item for item in found if not any(item is other for other in joined)]
        at = min((found.index(item) for item in joined), default=len(kept))
        found = [*kept[:at], (leaves, clusters), *kept[at:]]
    return [leaves for leaves, _ in found]


def described(routes: Iterable[Route], shapes: Mapping[str, torch.Size]) -> str:
    """A table: route, parameter, shape, and the blocks of the route at its first parameter."""
    rows = [("route", "parameter", "shape", "moment")]
    for number, route in enumerate(routes):
        for name in route.leaves:
            first = name == route.leaves[0]
            label = "AdamW" if route.adamw else f"block {number}"
            shape = " x ".join(map(str, shapes[name])) or "scalar"
            rows.append((label, name, shape, str(route.moment) if first else "with the one above"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def state_like(p: Tensor) -> Tensor:
    """The parameter's shape and device in the type of its state, without memory of its own."""
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    return torch.zeros((), dtype=dtype, device=p.device).expand(p.shape)
