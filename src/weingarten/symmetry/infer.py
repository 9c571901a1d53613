"""Find the symmetry of a model by tracing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain, count, takewhile
from math import prod
from typing import Any

from torch import nn

from weingarten.groups import Action, Wreath
from weingarten.symmetry.infer_words import Atoms, Piece, group_of, pieces_of, readable, spell, wreaths
from weingarten.symmetry.rules import RULES
from weingarten.symmetry.spec import Symmetry
from weingarten.symmetry.trace import Rule, Trace, export

__all__ = ["Freed", "Inference", "explain_symmetry", "infer_symmetry"]


@dataclass(frozen=True)
class Freed:
    """An axis, or a factor of one, on which nothing acts."""

    key: str
    axis: int
    size: int
    reason: str


@dataclass(frozen=True)
class Inference:
    """A symmetry and the reasons for it.

    Attributes:
        symmetry: what :func:`infer_symmetry` returns.
        bounds: for every name, the operator that kept its group from being larger; empty for rotations.
        freed: axes on which nothing acts, with what freed them.
        unknown: operators without a rule that freed the axes they touch.
    """

    symmetry: Symmetry
    bounds: dict[str, str]
    freed: tuple[Freed, ...]
    unknown: tuple[str, ...]

    def __str__(self) -> str:
        """A table of names, then of what is free and why."""
        symmetry = self.symmetry
        lines = [
            f"{name}: {symmetry.groups[name]}, because of {self.bounds[name] or 'linear maps only'}"
            for name in symmetry.names()
        ]
        lines += [f"{f.key} axis {f.axis} ({f.size}): free, because of {f.reason}" for f in self.freed]
        lines += [f"no rule for {name}: the axes that it touches are free" for name in self.unknown]
        return "\n".join(lines)


def infer_symmetry(model: nn.Module, example_inputs: Any) -> Symmetry:
    """The largest symmetry that the operator rules can prove, over all trainable parameters.

    The model is traced in evaluation mode by ``torch.export``. Axes of activations and parameters are tied by
    union-find, and every class is bounded by the operators that touch it: elementwise functions leave permutations,
    odd ones signed permutations, linear maps and inner products rotations. What the rules do not know makes an axis
    free; ``explain_symmetry`` tells what and why.

    Args:
        model: a module; it is not changed.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; sizes of at least two in every
            dimension, since an axis of size one has no symmetry and hides its role.

    Returns:
        A symmetry whose names follow the parameters', with the running statistics of batch norm as its ``buffers``.

    Raises:
        ValueError: if the model cannot be traced.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> symmetry = infer_symmetry(model, torch.ones(2, 3))
    >>> symmetry.groups
    {'0': SignedPermutation()}
    """
    return explain_symmetry(model, example_inputs).symmetry


def explain_symmetry(model: nn.Module, example_inputs: Any, rules: Mapping[str, Rule] = RULES) -> Inference:
    """:func:`infer_symmetry` with its reasons.

    Args:
        model: as there.
        example_inputs: as there.
        rules: the table; pass ``{**RULES, "my_library::operator": rule}`` to teach it an operator of your own.

    Raises:
        ValueError: if the model cannot be traced.
    """
    trace = Trace(model, export(model, example_inputs))
    trace.run(rules)
    tensors = {**trace.params, **trace.buffers}
    pieces_of(tensors)  # the first time settles what depends on choices
    pieces = pieces_of(tensors)
    while not readable(pieces):
        pieces = pieces_of(tensors)
    groups = _groups(trace, pieces)
    names = _names(pieces, groups, trace)
    spec = {p.key: " ".join(spell(atoms, names) for atoms in p.axes) for p in pieces}
    used: dict[str, Any] = {names[block]: group for block, group in groups.items()}
    sizes = {names[block]: _size(block) for block in groups}
    symmetry = Symmetry.parse(
        {p.key: spec[p.key] for p in pieces if p.leaf in trace.params},
        sizes=sizes,
        params=dict(model.named_parameters()),
        buffers={p.key: spec[p.key] for p in pieces if p.leaf in trace.buffers},
        **used,
    )
    bounds = {names[block]: min(block, key=lambda atom: atom.bound).why for block in groups}
    freed = [
        Freed(p.key, axis, atom.size, atom.why)
        for p in pieces
        if p.leaf in trace.params
        for axis, atoms in enumerate(p.axes)
        for atom in atoms
        if not atom.bound
    ]
    return Inference(symmetry, bounds, tuple(freed), tuple(dict.fromkeys(trace.unknown)))


def _size(block: Atoms) -> int:
    return prod(atom.size for atom in block)


def _groups(trace: Trace, pieces: list[Piece]) -> dict[Atoms, Action]:
    """The group of every name: of one atom, or of heads with their inner axis."""
    params = [p for p in pieces if p.leaf in trace.params]
    pairs = wreaths(trace, pieces)
    found: dict[Atoms, Action] = {}
    for piece in params:
        for atoms in piece.axes:
            i = 0
            while i < len(atoms):
                pair = atoms[i : i + 2]
                if pair in pairs:
                    found[pair] = pairs[pair]
                    i += 2
                    continue
                if atoms[i].bound:
                    found[atoms[i],] = group_of(atoms[i])
                i += 1
    return found


def _names(pieces: list[Piece], groups: dict[Atoms, Action], trace: Trace) -> dict[Atoms, str]:
    """Readable names, and ties between wreaths that share their heads."""
    carriers: dict[Atoms, list[str]] = {
        block: [p.leaf for p in pieces if p.leaf in trace.params and _carries(p, block)] for block in groups
    }
    names: dict[Atoms, str] = {}
    taken = {"spec", "sizes", "params", "buffers"}

    def unique(name: str) -> str:
        found = next(n for n in chain([name], (f"{name}.{i}" for i in count(2))) if n not in taken)
        taken.add(found)
        return found

    for block in groups:
        together = [leaf for other in groups if other[0] is block[0] for leaf in carriers[other]]
        names[block] = unique(_name(block[-1].role, carriers[block], together))
    for heads in {block[0]: None for block in groups}:
        sharing = [block for block in groups if block[0] is heads]
        if len(sharing) > 1:
            together = [leaf for block in sharing for leaf in carriers[block]]
            tie = names.get((heads,)) or unique(_name(heads.role or "heads", together, together))
            for block in sharing:
                group = groups[block]
                groups[block] = (
                    replace(group, tie=tie) if isinstance(group, Wreath) and group.outer else group
                )
    return names


def _carries(piece: Piece, block: Atoms) -> bool:
    """Whether the atoms of a block stand side by side on some axis."""
    return any(atoms[i : i + len(block)] == block for atoms in piece.axes for i in range(len(atoms)))


def _name(role: str, leaves: list[str], together: list[str]) -> str:
    """The module that makes the axis, or in attention the modules' common place and the role of the axis."""
    first = leaves[0].rpartition(".")[0]
    if not role:
        return first or leaves[0]
    columns = zip(*(leaf.split(".")[:-1] for leaf in together), strict=False)
    base = ".".join(column[0] for column in takewhile(lambda c: len(set(c)) == 1, columns)) or first
    return f"{base}.{role}" if base else role
