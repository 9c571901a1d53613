"""The notation of a symmetry: one word per axis.

``"h ."``            rows carry the group ``h``, columns are free
``"(heads dim) ."``  the first axis is split in two; sizes follow from the groups' other uses or from ``sizes``
``"(. h) ."``        the same with a free part, as in the four gates of an LSTM
``"h[2] ."``         the first two axes are merged and carry ``h`` together
``"leaf[0:8]"``      as a key: a part of a leaf, for parameters that were concatenated; python slices, one per axis
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from math import prod

__all__ = ["FREE", "Word", "parse_key", "parse_words", "resolve"]

FREE = "."


@dataclass(frozen=True)
class Word:
    """One word: the atoms an axis is split into, or one atom that spans several axes.

    Attributes:
        atoms: group names or ``FREE``.
        span: how many consecutive axes of the leaf it covers.
    """

    atoms: tuple[str, ...]
    span: int = 1

    def free(self, names: Collection[str]) -> Word:
        """Without these names; free neighbours become one.

        >>> str(Word(("a", ".", "b")).free(["a"]))
        '(. b)'
        """
        kept: list[str] = []
        for atom in self.atoms:
            new = FREE if atom in names else atom
            if new != FREE or kept[-1:] != [FREE]:
                kept.append(new)
        return Word(tuple(kept), self.span)

    def __str__(self) -> str:
        """As it was written."""
        text = self.atoms[0] if len(self.atoms) == 1 else f"({' '.join(self.atoms)})"
        return text if self.span == 1 else f"{text}[{self.span}]"


_TOKEN = re.compile(r"\s*(?:\((?P<split>[^()]*)\)|(?P<name>[^\s()\[\]]+)(?:\[(?P<span>\d+)\])?)")


def parse_words(text: str, key: str) -> tuple[Word, ...]:
    """The words of one leaf.

    >>> [str(word) for word in parse_words("(heads dim) . h[2]", "w")]
    ['(heads dim)', '.', 'h[2]']

    Raises:
        ValueError: at the first character that is not part of a word.
    """
    words, position = [], 0
    while position < len(text.rstrip()):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(
                f"Symmetry: cannot read {text!r} for {key!r} at character {position}; expected words such as 'h', '.', "
                "'(a b)', 'h[2]'"
            )
        split = match["split"]
        atoms = tuple(split.split()) if split is not None else (match["name"],)
        if not atoms:
            raise ValueError(f"Symmetry: empty parentheses in {text!r} for {key!r}; expected names inside")
        span = int(match["span"] or 1)
        if span < 1:
            raise ValueError(
                f"Symmetry: {match[0].strip()!r} in {text!r} for {key!r} spans no axis; expected at least 1"
            )
        words.append(Word(atoms, span))
        position = match.end()
    return tuple(words)


def parse_key(key: str) -> tuple[str, tuple[slice, ...]]:
    """Leaf and slices of a key.

    >>> parse_key("attn.weight[0:8]")
    ('attn.weight', (slice(0, 8, None),))
    """
    if not key.endswith("]"):
        return key, ()
    leaf, _, inside = key[:-1].partition("[")
    slices = []
    for part in inside.split(","):
        bounds = part.strip().split(":")
        if len(bounds) != 2 or not all(re.fullmatch(r"\d*", bound) for bound in bounds):
            raise ValueError(f"Symmetry: cannot read the slice {part!r} in {key!r}; expected 'first:last'")
        slices.append(slice(*(int(bound) if bound else None for bound in bounds)))
    return leaf, tuple(slices)


def resolve(
    words: tuple[Word, ...], shape: tuple[int, ...], sizes: dict[str, int], key: str
) -> tuple[list[str], list[int]]:
    """Atoms and their sizes for a leaf of the given shape; learns new sizes of names into ``sizes``.

    Raises:
        ValueError: if the words do not cover the axes, or a name would have two sizes; it names leaf, axis and both sizes.
    """
    if sum(word.span for word in words) != len(shape):
        text = " ".join(map(str, words))
        raise ValueError(
            f"Symmetry: {key!r} has {len(shape)} axes, shape {tuple(shape)}, but {text!r} covers {sum(w.span for w in words)}"
        )
    atoms: list[str] = []
    lengths: list[int] = []
    axis = 0
    for word in words:
        total = prod(shape[axis : axis + word.span])
        known = {a: sizes[a] for a in word.atoms if a in sizes}
        unknown = [a for a in word.atoms if a not in sizes]
        rest, remainder = divmod(total, prod(known[a] for a in word.atoms if a in known))
        if remainder or len(unknown) > 1 or (not unknown and rest != 1):
            reason = (
                f"{len(unknown)} of its names have no known size, pass sizes="
                if len(unknown) > 1
                else "that does not fit"
            )
            raise ValueError(
                f"Symmetry: axis {axis} of {key!r} has size {total}, but {str(word)!r} has {known or 'no known size'}: {reason}"
            )
        for atom in word.atoms:
            if atom != FREE and atom not in sizes:
                sizes[atom] = rest
            atoms.append(atom)
            lengths.append(sizes[atom] if atom != FREE else rest)
        axis += word.span
    return atoms, lengths
