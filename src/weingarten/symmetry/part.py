"""One entry of a symmetry."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import Tensor

from weingarten.symmetry.words import Word
from weingarten.tree import TreeLike

__all__ = ["Part"]


@dataclass(frozen=True)
class Part:
    """One entry: a leaf, or a slice of one, with its words.

    Attributes:
        key: as written, unique.
        leaf: the parameter's name.
        index: slices of a part of the leaf; empty for all of it.
        words: one per axis.
        cluster: parts with the same cluster are coupled; parts of different clusters are averaged apart.
    """

    key: str
    leaf: str
    index: tuple[slice, ...]
    words: tuple[Word, ...]
    cluster: str = ""

    def of(self, values: TreeLike) -> Tensor:
        """The part's tensor, a view."""
        return values[self.leaf][self.index] if self.index else values[self.leaf]

    def without(self, names: Collection[str]) -> Part:
        """The same with the axes that carry these names free."""
        return replace(self, words=tuple(word.free(names) for word in self.words))
