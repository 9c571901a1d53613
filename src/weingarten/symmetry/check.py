"""Refuse a symmetry that changes the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from weingarten.groups import Permutation, SignedPermutation, Wreath
from weingarten.losses import Loss
from weingarten.objective import Batch, Data, Objective, curvature_pass
from weingarten.symmetry.part import Part
from weingarten.symmetry.spec import Symmetry
from weingarten.symmetry.words import FREE
from weingarten.tree import Tree

__all__ = ["SymmetryError", "check_symmetry"]


class SymmetryError(ValueError):
    """A declared symmetry changes the loss.

    Attributes:
        name: the name of the group that does.
        leaf: the parameter where the declaration is wrong, as far as a single axis can be blamed.
        axis: of that parameter.
        change: relative change in loss under the whole symmetry.
    """

    def __init__(self, message: str, name: str, leaf: str, axis: int, change: float) -> None:
        super().__init__(message)
        self.name, self.leaf, self.axis, self.change = name, leaf, axis, change


@dataclass(frozen=True)
class _Probe:
    """Everything needed to move a model and compare its loss."""

    objective: Objective
    batches: list[Batch]
    params: Tree
    buffers: Tree
    value: Tensor
    limit: float

    def change(self, symmetry: Symmetry, elements: Mapping[str, Any]) -> float:
        """Relative change in loss when the parameters and buffers are moved; infinite if the moved loss is not finite."""
        moved = symmetry.act(elements, self.params)
        sizes = symmetry.kinds(self.params).sizes
        moved |= symmetry.act_on_buffers(elements, self.buffers, sizes)
        value = _loss(self.objective, self.batches, moved)
        scale = self.value.abs().max().clamp(min=torch.finfo(self.value.dtype).tiny)
        result = float((value - self.value).abs().max() / scale)
        return result if result == result else float("inf")


def check_symmetry(
    symmetry: Symmetry,
    model: nn.Module,
    loss: Loss,
    data: Data,
    trials: int = 3,
    generator: torch.Generator | None = None,
    tol: float | None = None,
    output: Callable[[Any], Tensor] | None = None,
) -> float:
    """Draw group elements, act on the parameters, and compare the loss of every batch.

    The model is evaluated as for curvature, in evaluation mode. Buffers named in ``symmetry.buffers`` move along.
    If the loss changes, every name is tried alone, then with one of its axes left out after the other, which finds
    the axis to blame.

    Args:
        symmetry: from ``Symmetry.parse`` or ``infer_symmetry``.
        model: the module whose parameters the symmetry names; use float64 for sharp results.
        loss: of the model's output.
        data: batches as for ``estimate``; random inputs are good, since zeros hide differences.
        trials: number of group elements.
        generator: to draw them.
        tol: largest relative change allowed; None for ``eps ** 0.6`` of the loss's type, 4e-10 in float64 and 7e-5 in float32.
        output: picks the tensor that the loss takes from what the model returns, as for ``Objective``.

    Returns:
        The largest relative change in loss.

    Raises:
        SymmetryError: if the loss changes by more, with the leaf, the axis and the change.
        ValueError: if the symmetry does not fit the parameters' shapes, or the data is empty or gives a loss of zero
            or not finite.
    """
    objective = Objective(model, loss, output)
    batches = [Batch.of(batch) for batch in data]
    with torch.no_grad(), curvature_pass(model):
        params = objective.params()
        buffers = {name: b.detach() for name, b in model.named_buffers()}
        value = _loss(objective, batches, params)
        if len(value) == 0 or not value.isfinite().all() or not value.abs().max() > 0:
            raise ValueError(
                f"check_symmetry: the loss of the batches is {value.tolist()}, expected finite numbers, not all zero"
            )
        limit = torch.finfo(value.dtype).eps ** 0.6 if tol is None else tol
        probe = _Probe(objective, batches, params, buffers, value, limit)
        largest = 0.0
        for _ in range(trials):
            elements = symmetry.sample(params, generator)
            change = probe.change(symmetry, elements)
            if not change <= limit:
                raise _blame(probe, symmetry, elements, change, generator)
            largest = max(largest, change)
    return largest


def _loss(objective: Objective, batches: list[Batch], params: Tree) -> Tensor:
    """The loss of every batch."""
    values = [objective.value(params, batch) for batch in batches]
    return torch.stack(values) if values else torch.empty(0)


def _units(symmetry: Symmetry) -> list[list[str]]:
    """Names that move together: one, or those with the same tie."""
    units: dict[str, list[str]] = {}
    for name in symmetry.names():
        group = symmetry.groups[name]
        tie = group.tie if isinstance(group, Wreath) and group.tie is not None else name
        units.setdefault(tie, []).append(name)
    return list(units.values())


def _blame(
    probe: _Probe,
    symmetry: Symmetry,
    elements: Mapping[str, Any],
    change: float,
    generator: torch.Generator | None,
) -> SymmetryError:
    """Find the name, then the leaf and axis, and say so."""
    found = []
    for unit in _units(symmetry):
        chosen = {name: elements[name] for name in unit}
        alone = probe.change(symmetry, chosen)
        if not alone <= probe.limit:
            found.append((alone, chosen))
    found.sort(key=lambda pair: pair[0], reverse=True)
    for explain in (_superfluous, _forgotten):
        for alone, chosen in found:
            verdict = explain(probe, symmetry, chosen)
            if verdict is not None:
                return _error(symmetry, verdict, alone, change)
    alone, chosen = found[0] if found else (change, dict(elements))
    return _error(symmetry, _strongest(probe, symmetry, chosen, generator), alone, change)


@dataclass(frozen=True)
class _Verdict:
    """What is wrong, and where."""

    part: Part
    axis: int
    name: str
    text: str


def _error(symmetry: Symmetry, verdict: _Verdict, alone: float, change: float) -> SymmetryError:
    name = verdict.name
    message = (
        f"check_symmetry: {name!r} = {symmetry.groups[name]} changes the loss by {alone:.3g} "
        f"(relative; all names: {change:.3g}). Leaf {verdict.part.key!r}, axis {verdict.axis}, {verdict.text}"
    )
    return SymmetryError(message, name, verdict.part.leaf, verdict.axis, change)


def _left_out(
    probe: _Probe, symmetry: Symmetry, elements: Mapping[str, Any]
) -> list[tuple[float, Part, int, str]]:
    """The change in loss with one axis left out after the other, smallest first."""
    found = [
        (probe.change(_rewrite(symmetry, part.key, axis, atom, FREE), elements), part, axis, atom)
        for part in symmetry.parts
        for axis, word in enumerate(part.words)
        for atom in dict.fromkeys(word.atoms)
        if atom in elements
    ]
    return sorted(found, key=lambda item: item[0])


def _superfluous(probe: _Probe, symmetry: Symmetry, elements: Mapping[str, Any]) -> _Verdict | None:
    """An axis without which the loss stays."""
    change, part, axis, name = _left_out(probe, symmetry, elements)[0]
    if not change <= probe.limit:
        return None
    text = (
        f"should not carry it: without it there the change is {change:.2g}. Write another name or '.' there"
    )
    return _Verdict(part, axis, name, text)


def _forgotten(probe: _Probe, symmetry: Symmetry, elements: Mapping[str, Any]) -> _Verdict | None:
    """A free axis of the right size that would have to carry the name as well."""
    sizes = symmetry.kinds(probe.params).sizes
    for part in symmetry.parts:
        shape = part.of(probe.params).shape
        if any(word.span > 1 for word in part.words):
            continue
        for axis, word in enumerate(part.words):
            for name in elements:
                if word.atoms == (FREE,) and shape[axis] == sizes[name]:
                    change = probe.change(_rewrite(symmetry, part.key, axis, FREE, name), elements)
                    if change <= probe.limit:
                        return _Verdict(
                            part, axis, name, f"should carry it too: with it there the change is {change:.2g}"
                        )
    return None


def _strongest(
    probe: _Probe, symmetry: Symmetry, elements: Mapping[str, Any], generator: torch.Generator | None
) -> _Verdict:
    """The axis that matters most, and whether a smaller group on the same axes leaves the loss unchanged."""
    change, part, axis, name = _left_out(probe, symmetry, elements)[0]
    text = f"matters most: without it there the change is {change:.2g}. "
    for group in (SignedPermutation(), Permutation()):
        if len(elements) > 1 or isinstance(symmetry.groups[name], type(group)):
            continue
        smaller = replace(symmetry, groups={**symmetry.groups, name: group})
        element = smaller.sample(probe.params, generator)[name]
        if probe.change(smaller, {name: element}) <= probe.limit:
            return _Verdict(
                part,
                axis,
                name,
                f"{text}The group is too large: {group} on the same axes leaves the loss unchanged",
            )
    return _Verdict(
        part, axis, name, f"{text}No single axis explains it; infer_symmetry shows what can be proved"
    )


def _rewrite(symmetry: Symmetry, key: str, axis: int, old: str, new: str) -> Symmetry:
    """The symmetry with one name of one word replaced; a word that cannot do without it becomes free."""

    def changed(part: Part) -> Part:
        word = part.words[axis]
        if new == FREE:
            word = word.free({old})
            word = word if word.atoms.count(FREE) < 2 else word.free(word.atoms)
        else:
            word = replace(word, atoms=tuple(new if atom == old else atom for atom in word.atoms))
        return replace(part, words=(*part.words[:axis], word, *part.words[axis + 1 :]))

    return replace(symmetry, parts=tuple(changed(p) if p.key == key else p for p in symmetry.parts))
