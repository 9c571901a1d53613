"""Choose which names of a symmetry to keep: accuracy against cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from weingarten.groups import Signs
from weingarten.symmetry.describe import Cost, cost_of, meta_params
from weingarten.symmetry.kinds import KindBlock, KindKey, Kinds
from weingarten.symmetry.part import Part
from weingarten.symmetry.spec import Symmetry
from weingarten.symmetry.words import FREE, Word

__all__ = ["Decision", "Plan", "plan"]

_SIGNS = "signs:"  # how names begin that a plan puts on free leaves


@dataclass(frozen=True)
class Decision:
    """What was done with a name or a leaf, and why."""

    subject: str
    action: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """A symmetry that fits a bound.

    Attributes:
        symmetry: coupled by component, bound to its shapes.
        decisions: what was kept, freed or made diagonal.
        cost: predicted.
    """

    symmetry: Symmetry
    decisions: tuple[Decision, ...]
    cost: Cost

    def __str__(self) -> str:
        """Decisions, then the symmetry's table."""
        width = max((len(d.subject) for d in self.decisions), default=0)
        lines = [f"{d.action:9} {d.subject.ljust(width)}  {d.reason}" for d in self.decisions]
        return "\n".join([*lines, "", str(self.symmetry)])


def plan(symmetry: Symmetry, max_block: int = 1024, max_cost: float | None = None) -> Plan:
    """Free as many names as the bounds allow: a smaller group is a finer approximation with larger blocks.

    Starts from the whole group, coupled by component. Free axes that are too wide by themselves get sign flips, which leaves
    a diagonal there (what Adam does with embeddings); leaves that are too wide together are uncoupled. Then names are freed
    one at a time, the one that adds most entries to what is estimated first, while that adds any, no block has more
    than ``max_block`` columns and a moment costs at most ``max_cost``. For a transformer that keeps heads and hidden units and
    frees the residual stream.

    Args:
        symmetry: with known shapes (from ``infer_symmetry``, ``parse(..., params=...)`` or ``bind``).
        max_block: largest block size; its cube is what a matrix function costs. 1024 takes about 0.1 s on one core.
        max_cost: largest number of flops of one moment, such as a tenth of a backward pass; default: no bound.

    Raises:
        ValueError: if the symmetry knows no shapes, or the bounds cannot be met even with all names kept.
    """
    if max_block < 1:
        raise ValueError(f"plan: max_block is {max_block}, expected >= 1")
    current = _fitted(symmetry, max_block)
    excess = _excess(cost_of(_blocks(current)), max_block, max_cost)
    if excess:
        raise ValueError(f"plan: even with all names kept there is {excess}; raise the bound")
    decisions: list[Decision] = []
    names, reasons = list(symmetry.names()), dict[str, str]()
    while names:
        tried, reasons = _tried(current, names, max_block)
        blocks = {name: _blocks(found) for name, found in tried.items()}
        costs = {name: cost_of(found) for name, found in blocks.items()}
        before = _entries(_blocks(current))
        gains = {name: _entries(found) - before for name, found in blocks.items()}
        reasons |= {
            n: _excess(c, max_block, max_cost) or ("" if gains[n] > 0 else "a coarser estimate")
            for n, c in costs.items()
        }
        allowed = [name for name in names if not reasons[name]]
        if not allowed:
            break
        name = max(allowed, key=lambda n: gains[n])
        reason = f"largest block {costs[name].largest}, moment {costs[name].gram_flops / 1e6:.1f} Mflop"
        decisions.append(Decision(name, "freed", reason))
        current = tried[name]
        gone = [n for n in names if n != name and n not in current.names()]
        decisions += [Decision(n, "freed", f"its heads move with those of {name}") for n in gone]
        names = [n for n in names if n != name and n not in gone]
    decisions += [Decision(name, "kept", f"freeing it: {reasons[name]}") for name in names]
    decisions += _by_leaf(current, max_block)
    return Plan(current, tuple(decisions), cost_of(_blocks(current)))


def _tried(current: Symmetry, names: list[str], max_block: int) -> tuple[dict[str, Symmetry], dict[str, str]]:
    """The symmetry without each name, and why some names cannot be freed."""
    found, reasons = {}, {}
    for name in names:
        try:
            found[name] = _fitted(current.drop(name), max_block)
        except ValueError as error:  # free axes on both sides of another name
            reasons[name] = str(error)
    return found, reasons


def _by_leaf(symmetry: Symmetry, max_block: int) -> list[Decision]:
    """What :func:`_fitted` did to single leaves."""
    found = []
    for part in symmetry.parts:
        if any(atom.startswith(_SIGNS) for word in part.words for atom in word.atoms):
            found.append(Decision(part.key, "diagonal", f"its free axes have more than {max_block} entries"))
        if part.cluster.endswith(" alone"):
            found.append(
                Decision(
                    part.key,
                    "uncoupled",
                    f"with what it shares a group with it has more than {max_block} columns",
                )
            )
    return found


def _kinds(symmetry: Symmetry) -> Kinds:
    if symmetry.shapes is None:
        raise ValueError("plan: the symmetry knows no shapes; call symmetry.bind(params) first")
    return symmetry.kinds(meta_params(symmetry.shapes))


def _blocks(symmetry: Symmetry) -> dict[KindKey, KindBlock]:
    return _kinds(symmetry).blocks


def _entries(blocks: dict[KindKey, KindBlock]) -> int:
    """How many entries of the matrix, in isotypic coordinates, a kept group estimates; diagonals and free leaves do not count."""
    total = 0
    for (_, kinds), block in blocks.items():
        if kinds and not any(name.startswith(_SIGNS) for name, _ in kinds):
            total += block.count * block.dim * block.multiplicity**2
    return total


def _excess(cost: Cost, max_block: int, max_cost: float | None) -> str:
    if cost.largest > max_block:
        return f"a block of {cost.largest} columns, more than {max_block}"
    if max_cost is not None and cost.gram_flops > max_cost:
        return f"a moment of {cost.gram_flops / 1e6:.1f} Mflop, more than {max_cost / 1e6:.1f}"
    return ""


def _fitted(symmetry: Symmetry, max_block: int) -> Symmetry:
    """Coupled by component; what is too wide by itself made diagonal on its free axes, what is too wide together uncoupled."""
    current = symmetry.by_component()
    arranged = _kinds(current).arranged
    for part in symmetry.parts:
        if prod(arranged[part.key].free) > max_block:
            current = _diagonal(current, part)
    current = current.by_component()
    return _uncoupled(current, max_block)


def _uncoupled(symmetry: Symmetry, max_block: int) -> Symmetry:
    """The widest part of a block that is too wide gets a cluster of its own, until no block of several parts is too wide."""
    widths = {
        key: {part: piece.stop - piece.start for part, piece in block.columns.items()}
        for key, block in _blocks(symmetry).items()
    }
    place = {part.key: i for i, part in enumerate(symmetry.parts)}
    wide = {key for key, found in widths.items() if sum(found.values()) > max_block}
    holds: dict[str, list[KindKey]] = {}
    for key in wide:
        for part_key in widths[key]:
            holds.setdefault(part_key, []).append(key)
    order = {key: i for i, key in enumerate(widths)}
    alone: set[str] = set()
    while wide := {k for k in wide if len(widths[k]) > 1 and sum(widths[k].values()) > max_block}:
        first = min(wide, key=lambda k: (min(place[part] for part in widths[k]), order[k]))
        largest = max(widths[first], key=widths[first].__getitem__)
        alone.add(largest)
        for key in holds[largest]:
            del widths[key][largest]
    parts = tuple(replace(p, cluster=f"{p.key} alone") if p.key in alone else p for p in symmetry.parts)
    return replace(symmetry, parts=parts)


def _diagonal(symmetry: Symmetry, part: Part) -> Symmetry:
    """Sign flips on the free axes of one part, so that they are averaged entry by entry."""
    words, groups, axis = [], dict(symmetry.groups), 0
    for word in part.words:
        atoms = []
        for atom in word.atoms:
            name = f"{_SIGNS}{part.key}:{axis}" if atom == FREE else atom
            groups.setdefault(name, Signs())
            atoms.append(name)
            axis += 1
        words.append(Word(tuple(atoms), word.span))
    changed = tuple(replace(p, words=tuple(words)) if p.key == part.key else p for p in symmetry.parts)
    return replace(symmetry, parts=changed, groups=groups)
