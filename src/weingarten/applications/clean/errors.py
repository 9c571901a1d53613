"""What the user can put right."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["UserError", "some"]


class UserError(ValueError):
    """A mistake in the input: one line that names the option, what was found, what was expected and the remedy."""


def some(values: Iterable[object], limit: int = 5) -> str:
    """The first few of many values, and how many more there are.

    >>> some(range(7))
    '0, 1, 2, 3, 4 and 2 more'
    """
    listed = [str(value) for value in values]
    shown = ", ".join(listed[:limit])
    return f"{shown} and {len(listed) - limit} more" if len(listed) > limit else shown


def near(name: str, names: Iterable[object]) -> str:
    """Names like the one asked for, or else the first ones there are.

    >>> near("lable", ["label", "id"])
    "did you mean 'label'?"
    """
    listed = [str(n) for n in names]
    lower = {n.lower(): n for n in reversed(listed)}
    matches = [lower[match] for match in get_close_matches(name.lower(), lower, n=3, cutoff=0.6)]
    return f"did you mean {' or '.join(map(repr, matches))}?" if matches else f"there are: {some(listed, 8)}"
