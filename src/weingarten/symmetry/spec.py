"""A symmetry: which group acts on which axis of which parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from weingarten.groups import Action, Wreath
from weingarten.symmetry.describe import meta_params, table
from weingarten.symmetry.kinds import Kinds
from weingarten.symmetry.part import Part
from weingarten.symmetry.words import FREE, parse_key, parse_words
from weingarten.tree import Tree, TreeLike

__all__ = ["Part", "Symmetry"]


@dataclass(frozen=True)
class Symmetry:
    """A product group that moves parameters; all axes with one name are moved by the same element.

    Made by :meth:`parse` or by ``infer_symmetry``; a value: the methods return changed copies.

    Attributes:
        parts: words of parameters.
        groups: by name.
        sizes: of names that do not follow from a leaf's shape alone.
        shapes: of the parameters, if known.
        buffers: words of buffers that must move along, such as the running statistics of batch norm.
    """

    parts: tuple[Part, ...]
    groups: Mapping[str, Action]
    sizes: Mapping[str, int]
    shapes: Mapping[str, torch.Size] | None = None
    buffers: tuple[Part, ...] = ()

    @staticmethod
    def parse(
        spec: Mapping[str, str],
        sizes: Mapping[str, int] | None = None,
        params: TreeLike | None = None,
        buffers: Mapping[str, str] | None = None,
        **groups: Action,
    ) -> Symmetry:
        """A symmetry from words.

        Args:
            spec: words by leaf; see ``weingarten.symmetry.words``.
            sizes: sizes of names that do not follow from a leaf's shape alone.
            params: if given, shapes are checked at once and printing shows blocks and cost.
            buffers: words of buffers that move along with the parameters.
            **groups: the group of each name.

        Raises:
            ValueError: for words that cannot be read, a name without a group or a group without a use, a name three times on one
                leaf; with ``params``, for what :meth:`kinds` refuses.

        >>> from weingarten.groups import Permutation
        >>> symmetry = Symmetry.parse({"fc1.weight": "h .", "fc1.bias": "h", "fc2.weight": ". h"}, h=Permutation())
        >>> symmetry.names()
        ['h']
        """
        parts = [Part(key, *parse_key(key), parse_words(text, key)) for key, text in spec.items()]
        used = {atom for part in parts for word in part.words for atom in word.atoms} - {FREE}
        if used != groups.keys():
            raise ValueError(
                f"Symmetry.parse: names without a group {sorted(used - groups.keys())}, groups without a use "
                f"{sorted(groups.keys() - used)}; pass each name once as a keyword, such as h=Permutation()"
            )
        for part in parts:
            atoms = [atom for word in part.words for atom in word.atoms if atom != FREE]
            for atom in atoms:
                if atoms.count(atom) > 2:
                    words = [f"{axis}: {word}" for axis, word in enumerate(part.words) if atom in word.atoms]
                    raise ValueError(
                        f"Symmetry.parse: {part.key!r} carries {atom!r} {atoms.count(atom)} times, in the words {words}, "
                        "expected at most twice; free one of them"
                    )
        moved = tuple(
            Part(key, *parse_key(key), parse_words(text, key)) for key, text in (buffers or {}).items()
        )
        symmetry = Symmetry(tuple(parts), dict(groups), dict(sizes or {}), None, moved)
        return symmetry if params is None else symmetry.bind(params)

    def bind(self, params: TreeLike) -> Symmetry:
        """The same, with the shapes of these parameters; refuses what does not fit (see :meth:`kinds`)."""
        sizes = self.kinds(params).sizes
        return replace(self, sizes=sizes, shapes={leaf: params[leaf].shape for leaf in self.leaves()})

    def __str__(self) -> str:
        """A table: leaf, words, and once shapes are known, kinds, block sizes and cost."""
        kinds = None if self.shapes is None else self.kinds(meta_params(self.shapes))
        return table(self.parts, self.groups, kinds)

    def names(self) -> list[str]:
        """The names in use, in order of appearance."""
        found = dict.fromkeys(
            atom for part in self.parts for word in part.words for atom in word.atoms if atom != FREE
        )
        return list(found)

    def leaves(self) -> list[str]:
        """The parameters spoken of, in order."""
        return list(dict.fromkeys(part.leaf for part in self.parts))

    def drop(self, *names: str) -> Symmetry:
        """The smaller group without these names: their axes become free, the approximation finer and its blocks larger.

        Heads that were permuted together with those of a dropped name stay in place.

        Raises:
            ValueError: if a name is not in use.
        """
        unknown = set(names) - set(self.names())
        if unknown:
            raise ValueError(f"Symmetry.drop: no name {sorted(unknown)}, expected some of {self.names()}")
        ties = {*names, *(_tie(self.groups[name]) for name in names)} - {None}
        lone = {
            name for name in self.names() if name in ties
        }  # heads that move with a wreath stay when it goes
        kept = {
            name: replace(group, outer=None, tie=None)
            if isinstance(group, Wreath) and group.tie in ties
            else group
            for name, group in self.groups.items()
        }
        gone = {*names, *lone}
        return replace(self, groups=kept)._with(tuple(part.without(gone) for part in self.parts))

    def uncoupled(self) -> Symmetry:
        """Block-diagonal over leaves: the same groups, without cross-leaf entries."""
        return self._with(tuple(replace(part, cluster=part.key) for part in self.parts))

    def by_component(self) -> Symmetry:
        """Couple only parts that are connected by shared names; drops no more than cross entries of invariant coordinates."""
        owner = {part.key: part.key for part in self.parts}
        carriers: dict[str, str] = {}

        def root(key: str) -> str:
            while owner[key] != key:
                owner[key] = key = owner[owner[key]]
            return key

        for part in self.parts:
            for atom in {atom for word in part.words for atom in word.atoms} - {FREE}:
                ends = sorted((root(part.key), root(carriers.setdefault(atom, part.key))))
                owner[ends[1]] = ends[0]
        return self._with(tuple(replace(part, cluster=root(part.key)) for part in self.parts))

    def restrict(self, leaves: Iterable[str]) -> Symmetry:
        """Only these parameters.

        Raises:
            ValueError: if one of them is not spoken of.
        """
        wanted = list(leaves)
        unknown = set(wanted) - set(self.leaves())
        if unknown:
            raise ValueError(
                f"Symmetry.restrict: no leaf {sorted(unknown)}, expected some of {self.leaves()}"
            )
        return self._with(tuple(part for part in self.parts if part.leaf in wanted))

    def _with(self, parts: tuple[Part, ...]) -> Symmetry:
        changed = replace(self, parts=parts)
        names = changed.names()
        return replace(
            changed,
            groups={name: self.groups[name] for name in names},
            sizes={name: size for name, size in self.sizes.items() if name in names},
            shapes=None if self.shapes is None else {leaf: self.shapes[leaf] for leaf in changed.leaves()},
            buffers=tuple(part.without(set(self.names()) - set(names)) for part in self.buffers),
        )

    def kinds(self, params: TreeLike) -> Kinds:
        """Kinds and sizes for these parameters; refuses what does not fit, with leaf, axis and both sizes."""
        return Kinds(self.parts, self.groups, self.sizes, params)

    def sample(self, params: TreeLike, generator: torch.Generator | None = None) -> dict[str, Any]:
        """A random element for every name; ``Wreath`` groups with the same tie share their outer element.

        A tie that is itself a name of a ``Permutation`` means that name's element.
        """
        sizes = self.kinds(params).sizes
        elements: dict[str, Any] = {}
        outer: dict[str, Tensor] = {}
        for name in sorted(self.names(), key=lambda name: isinstance(self.groups[name], Wreath)):
            group = self.groups[name]
            element = group.sample(sizes[name], generator)
            if isinstance(group, Wreath) and group.tie is not None:
                element = (outer.setdefault(group.tie, elements.get(group.tie, element[0])), element[1])
            elements[name] = element
        return elements

    def act(self, elements: Mapping[str, Any], params: TreeLike) -> Tree:
        """The moved parameters; leaves that the symmetry does not speak of stay."""
        kinds = self.kinds(params)
        moved = {name: p.clone() for name, p in params.items()}
        for part in self.parts:
            atoms = [atom for word in part.words for atom in word.atoms]
            source = part.of(params)
            x = source.reshape(kinds.arranged[part.key].lengths)
            for axis, atom in enumerate(atoms):
                if atom in elements:
                    x = self.groups[atom].act(elements[atom], x.movedim(axis, -1)).movedim(-1, axis)
            if part.index:
                moved[part.leaf][part.index] = x.reshape(source.shape)
            else:
                moved[part.leaf] = x.reshape(source.shape)
        return moved

    def act_on_buffers(
        self, elements: Mapping[str, Any], buffers: TreeLike, sizes: Mapping[str, int] | None = None
    ) -> Tree:
        """The moved buffers, with the same elements; buffers that the symmetry does not speak of stay.

        Args:
            elements: from :meth:`sample`.
            buffers: of the model, by name.
            sizes: of names whose size does not follow from the buffers' shapes.
        """
        return replace(self, parts=self.buffers, sizes={**self.sizes, **(sizes or {})}).act(elements, buffers)


def _tie(group: Action) -> str | None:
    return group.tie if isinstance(group, Wreath) else None
