"""What a run tells those who listen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from weingarten.bilevel.history import History
from weingarten.bilevel.problem import Hypergradient
from weingarten.tree import Tree

__all__ = ["Callback", "Event"]


@dataclass(frozen=True)
class Event:
    """The end of one outer step.

    Attributes:
        step: outer steps done, from 1.
        steps: outer steps in all.
        params: the parameters the hypergradient was taken at; memory of the run, copy what you keep.
        hparams: the outer variables after the step; memory of the run, copy what you keep.
        hypergradient: of this step.
        history: of all steps so far.
    """

    step: int
    steps: int
    params: Tree
    hparams: Tree
    hypergradient: Hypergradient
    history: History


Callback = Callable[[Event], bool | None]
"""Called after every outer step; returning True ends the run."""
