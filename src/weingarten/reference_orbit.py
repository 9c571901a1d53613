"""Slow, obvious oracles for orbit averages: the group is enumerated, element by element."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from weingarten.groups import Action, Conjugated, Permutation, SignedPermutation, Signs, Wreath
from weingarten.symmetry import Symmetry
from weingarten.tree import Space, TreeLike

__all__ = ["elements", "group_matrices", "orbit_average", "sampled_orbit_average"]


def elements(group: Action, n: int) -> Iterator[Any]:
    """All elements of a finite group on an axis of length n.

    Raises:
        ValueError: for an infinite group; use :func:`sampled_orbit_average`.
    """
    if isinstance(group, Conjugated):
        yield from elements(group.action, n)
    elif isinstance(group, Permutation):
        yield from (torch.tensor(order) for order in itertools.permutations(range(n)))
    elif isinstance(group, Signs):
        yield from (torch.tensor(signs) for signs in itertools.product((1.0, -1.0), repeat=n))
    elif isinstance(group, SignedPermutation):
        yield from itertools.product(elements(Permutation(), n), elements(Signs(), n))
    elif isinstance(group, Wreath):
        inner = list(elements(group.inner, n // group.heads))
        orders = (
            [torch.arange(group.heads)] if group.outer is None else list(elements(group.outer, group.heads))
        )
        for order in orders:
            for chosen in itertools.product(inner, repeat=group.heads):
                yield order, list(chosen)
    else:
        raise ValueError(f"elements: {group} is infinite, expected a finite group")


def group_matrices(symmetry: Symmetry, params: TreeLike) -> Iterator[Tensor]:
    """The matrix ``(P, P)`` of every element of the product group, on flat parameters in their own order."""
    space = _space(symmetry, params)
    sizes = symmetry.kinds(params).sizes
    names = symmetry.names()
    for chosen in itertools.product(*(elements(symmetry.groups[name], sizes[name]) for name in names)):
        found = dict(zip(names, chosen, strict=True))
        if _keeps_ties(symmetry, found):
            yield _matrix(symmetry, found, space)


def orbit_average(matrix: Tensor, symmetry: Symmetry, params: TreeLike) -> Tensor:
    """``E[A M A^T]`` over all elements."""
    total, number = torch.zeros_like(matrix), 0
    for a in group_matrices(symmetry, params):
        total += a @ matrix @ a.T
        number += 1
    return total / number


def sampled_orbit_average(
    matrix: Tensor, symmetry: Symmetry, params: TreeLike, draws: int, generator: torch.Generator
) -> Tensor:
    """``E[A M A^T]`` over random elements, for infinite groups; the error falls as ``draws ** -1/2``."""
    space = _space(symmetry, params)
    total = torch.zeros_like(matrix)
    for _ in range(draws):
        a = _matrix(symmetry, symmetry.sample(params, generator), space)
        total += a @ matrix @ a.T
    return total / draws


def _space(symmetry: Symmetry, params: TreeLike) -> Space:
    return Space.of({leaf: p for leaf, p in params.items() if leaf in symmetry.leaves()})


def _keeps_ties(symmetry: Symmetry, found: dict[str, Any]) -> bool:
    """Whether axes with one tie have one outer element, that of the tie's own name if there is one."""
    outer = {
        name: element for name, element in found.items() if not isinstance(symmetry.groups[name], Wreath)
    }
    for name, element in found.items():
        group = symmetry.groups[name]
        if (
            isinstance(group, Wreath)
            and group.tie is not None
            and not torch.equal(outer.setdefault(group.tie, element[0]), element[0])
        ):
            return False
    return True


def _matrix(symmetry: Symmetry, elements_by_name: dict[str, Any], space: Space) -> Tensor:
    identity = torch.eye(space.size, dtype=space.dtype)
    columns = [space.flatten(symmetry.act(elements_by_name, space.unflatten(row))) for row in identity]
    return torch.stack(columns, dim=1)
