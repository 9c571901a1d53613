"""Moments of gradients under a group, averaged over steps, and the directions they give."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, final

from torch import Tensor

from weingarten.groups import Action, Rotation, Signs
from weingarten.operators import gram
from weingarten.optim.roots import Task
from weingarten.symmetry import Isotypic, Symmetry
from weingarten.tree import Tree, TreeLike

__all__ = ["EntryMoment", "Moment", "OrbitMoment", "State", "TwoSidedMoment", "one_sided", "weigh"]

State = dict[str, Any]
"""Tensors by name, and the numbers ``weight``: all that ``state_dict`` has to keep."""


class Moment(ABC):
    """What is kept of past gradients of some leaves, and how a direction is preconditioned by it.

    One step calls ``accumulate``, now and then ``tasks`` (whose results are written into the state), ``measure``, and
    ``precondition``. Everything is in the type of the state, float32 at least.

    Attributes:
        adam_length: whether directions are of Adam's length, each entry divided by its own root mean square in some basis.
    """

    adam_length: ClassVar[bool] = False

    @abstractmethod
    def init(self) -> State:
        """The state before the first gradient."""

    @abstractmethod
    def accumulate(self, state: State, gradients: TreeLike, decay: float) -> None:
        """``S <- decay S + (1 - decay) R2(g, g)``, in place."""

    @abstractmethod
    def tasks(self, state: State) -> list[Task]:
        """What has to be factorised when the preconditioner is refreshed."""

    @abstractmethod
    def measure(self, state: State, gradients: TreeLike, decay: float) -> None:
        """Averages that need the refreshed preconditioner; nothing for most moments."""

    @abstractmethod
    def precondition(self, state: State, direction: TreeLike, eps: float) -> Tree:
        """The direction times the inverse root of the moment."""


def weigh(state: State, key: str, decay: float) -> None:
    """Let the total weight of an average, under ``key``, take in one more step."""
    state[key] = decay * state[key] + (1 - decay)


@final
class EntryMoment(Moment):
    """Sign flips on every axis: ``g / (sqrt(E g^2) + eps)``, entry by entry, as in Adam.

    Kingma and Ba 2015, https://arxiv.org/abs/1412.6980. The same as :class:`OrbitMoment` with ``Signs`` everywhere, in two
    elementwise operations.

    Args:
        params: leaves; shapes, type and device.
    """

    adam_length: ClassVar[bool] = True

    def __init__(self, params: TreeLike) -> None:
        self.params = dict(params)
        self.squares = {name: f"square.{i}" for i, name in enumerate(params)}

    def init(self) -> State:
        return {"weight": 0.0} | {
            key: self.params[name].new_zeros(self.params[name].shape) for name, key in self.squares.items()
        }

    def accumulate(self, state: State, gradients: TreeLike, decay: float) -> None:
        for name, g in gradients.items():
            state[self.squares[name]].mul_(decay).addcmul_(g, g, value=1 - decay)
        weigh(state, "weight", decay)

    def tasks(self, state: State) -> list[Task]:
        return []

    def measure(self, state: State, gradients: TreeLike, decay: float) -> None:
        pass

    def precondition(self, state: State, direction: TreeLike, eps: float) -> Tree:
        root = state["weight"] ** 0.5
        return {name: u / (state[self.squares[name]].sqrt() / root + eps) for name, u in direction.items()}

    def __str__(self) -> str:
        return "entry by entry"


@final
class OrbitMoment(Moment):
    r"""``R2(g, g)^exponent`` averaged over steps: one small block ``S = V^T V / dim`` for each kind of the group.

    Artemev et al. 2026, https://arxiv.org/abs/2606.00442. Kinds of multiplicity one are divided by ``sqrt(S) + eps`` and need no
    factorisation.

    Args:
        symmetry: the group; a coarser one than the loss has is a cheaper approximation.
        params: its leaves; shapes, type and device.
        exponent: -1/2; -1/4 for one side of two (:class:`TwoSidedMoment`).
        prefix: of the keys in the state.
    """

    def __init__(
        self, symmetry: Symmetry, params: TreeLike, exponent: float = -0.5, prefix: str = ""
    ) -> None:
        self.isotypic = Isotypic(symmetry, params)
        self.exponent, self.weight = exponent, f"{prefix}weight"
        self.like = next(iter(params.values()))
        self.grams = {key: f"{prefix}gram.{i}" for i, key in enumerate(self.isotypic.blocks)}
        self.roots = {
            key: f"{prefix}root.{i}"
            for i, (key, block) in enumerate(self.isotypic.blocks.items())
            if block.multiplicity > 1
        }

    def init(self) -> State:
        state: State = {self.weight: 0.0}
        for key, block in self.isotypic.blocks.items():
            shape = (block.count, block.multiplicity, block.multiplicity)
            for names in (self.grams, self.roots):
                if key in names:
                    state[names[key]] = self.like.new_zeros(shape)
        return state

    def accumulate(self, state: State, gradients: TreeLike, decay: float) -> None:
        for key, new in gram(self.isotypic, self.isotypic.gather(gradients)).items():
            state[self.grams[key]].lerp_(new, 1 - decay)
        weigh(state, self.weight, decay)

    def tasks(self, state: State) -> list[Task]:
        return [
            Task(state[self.grams[key]] / state[self.weight], state[root], self.exponent)
            for key, root in self.roots.items()
        ]

    def measure(self, state: State, gradients: TreeLike, decay: float) -> None:
        pass

    def precondition(self, state: State, direction: TreeLike, eps: float) -> Tree:
        coordinates = self.isotypic.gather(direction)
        for key, u in coordinates.items():
            if key in self.roots:
                coordinates[key] = u @ state[self.roots[key]]
            else:
                root = (state[self.grams[key]] / state[self.weight]).sqrt() + eps
                coordinates[key] = u * root ** (2 * self.exponent)
        return self.isotypic.scatter(coordinates)

    def __str__(self) -> str:
        """Sizes of the blocks and what they are repeated by: ``128 x 64`` is a block of 128 columns in 64 dimensions."""
        return ", ".join(f"{b.multiplicity} x {b.dim * b.count}" for b in self.isotypic.blocks.values())


def one_sided(
    name: str, leaf: Tensor, side: int, exponent: float = -0.5, prefix: str = "", pieces: int = 1
) -> OrbitMoment:
    """The moment of a weight, seen as a matrix (rows, all else), with rotations on one side and the other one free.

    The free side may be split in equal pieces, whose signs flip: that leaves a block for each piece, and none across.
    """
    free = ["."] * (1 if side == 1 else leaf.ndim - 1)
    groups: dict[str, Action] = {"r": Rotation()}
    if pieces > 1:
        free[0], groups["s"] = "(s .)", Signs()
    words = ["r", *free] if side == 0 else [*free, f"r[{leaf.ndim - 1}]"]
    symmetry = Symmetry.parse(
        {name: " ".join(words)}, {"s": pieces} if pieces > 1 else None, None, None, **groups
    )
    return OrbitMoment(symmetry, {name: leaf}, exponent, prefix)


@final
class TwoSidedMoment(Moment):
    r"""``L^{-1/4} G R^{-1/4}``: the geometric mean of the moments under rotations of the rows and of the columns.

    ``R = E[G^T G] / rows``, ``L = E[G G^T] / columns``: Shampoo (Gupta et al. 2018, https://arxiv.org/abs/1802.09568).

    Args:
        name: of the weight; one with more axes than two is seen as (rows, all else).
        leaf: shape, type and device.
        pieces: in how many the rows and the columns are split, see :func:`one_sided`.
    """

    def __init__(self, name: str, leaf: Tensor, pieces: tuple[int, int] = (1, 1)) -> None:
        rows, columns = pieces
        self.sides = (
            one_sided(name, leaf, 0, -0.25, "right.", columns),
            one_sided(name, leaf, 1, -0.25, "left.", rows),
        )

    def init(self) -> State:
        return {key: value for side in self.sides for key, value in side.init().items()}

    def accumulate(self, state: State, gradients: TreeLike, decay: float) -> None:
        for side in self.sides:
            side.accumulate(state, gradients, decay)

    def tasks(self, state: State) -> list[Task]:
        return [task for side in self.sides for task in side.tasks(state)]

    def measure(self, state: State, gradients: TreeLike, decay: float) -> None:
        pass

    def precondition(self, state: State, direction: TreeLike, eps: float) -> Tree:
        right, left = self.sides
        return left.precondition(state, right.precondition(state, direction, eps), eps)

    def __str__(self) -> str:
        return " and ".join(str(side) for side in self.sides) + ", geometric mean"
