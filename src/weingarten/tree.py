"""Arithmetic on named tensors: the one vector format of the library is ``dict[str, Tensor]``.

Every function returns a new dict with the keys of its first argument and leaves its arguments untouched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Tree = dict[str, Tensor]
TreeLike = Mapping[str, Tensor]

__all__ = ["Space", "Tree", "TreeLike", "add", "axpy", "detach", "dot", "norm", "scale", "sub", "zeros_like"]


def add(x: TreeLike, y: TreeLike) -> Tree:
    """Sum ``x + y``, leaf by leaf.

    >>> add({"a": torch.ones(2)}, {"a": torch.ones(2)})
    {'a': tensor([2., 2.])}
    """
    return {name: leaf + y[name] for name, leaf in x.items()}


def sub(x: TreeLike, y: TreeLike) -> Tree:
    """Difference ``x - y``, leaf by leaf."""
    return {name: leaf - y[name] for name, leaf in x.items()}


def scale(factor: float | Tensor, x: TreeLike) -> Tree:
    """Multiple ``factor * x``."""
    return {name: factor * leaf for name, leaf in x.items()}


def axpy(factor: float | Tensor, x: TreeLike, y: TreeLike) -> Tree:
    """``factor * x + y``.

    >>> axpy(2.0, {"a": torch.ones(2)}, {"a": torch.ones(2)})
    {'a': tensor([3., 3.])}
    """
    return {name: factor * leaf + y[name] for name, leaf in x.items()}


def dot(x: TreeLike, y: TreeLike) -> Tensor:
    """Euclidean inner product over all leaves, a 0-d tensor."""
    return torch.stack([(leaf * y[name]).sum() for name, leaf in x.items()]).sum()


def norm(x: TreeLike) -> Tensor:
    """Euclidean norm over all leaves, a 0-d tensor.

    >>> norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])})
    tensor(5.)
    """
    return dot(x, x).sqrt()


def zeros_like(x: TreeLike) -> Tree:
    """Zeros of the same names, shapes, types and devices."""
    return {name: torch.zeros_like(leaf) for name, leaf in x.items()}


def detach(x: TreeLike) -> Tree:
    """The same numbers without their history."""
    return {name: leaf.detach() for name, leaf in x.items()}


@dataclass(frozen=True)
class Space:
    """Names, shapes and types of the vectors an operator takes.

    The order of the names is the order in which leaves are laid out in a flat vector (row-major within a leaf).
    """

    shapes: dict[str, torch.Size]
    dtypes: dict[str, torch.dtype]
    device: torch.device

    @staticmethod
    def of(values: TreeLike) -> Space:
        """The space that ``values`` lies in.

        >>> Space.of({"w": torch.zeros(2, 3)}).size
        6

        Raises:
            ValueError: if ``values`` is empty or its leaves lie on several devices.
        """
        devices = {leaf.device for leaf in values.values()}
        if len(devices) != 1:
            found = ", ".join(sorted(map(str, devices))) or "no leaf at all"
            raise ValueError(
                f"Space.of: expected leaves on one device, found {found}; move the parameters first"
            )
        return Space(
            shapes={name: leaf.shape for name, leaf in values.items()},
            dtypes={name: leaf.dtype for name, leaf in values.items()},
            device=devices.pop(),
        )

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def dtype(self) -> torch.dtype:
        """The type of a flat vector: the widest of the leaves'."""
        result = next(iter(self.dtypes.values()))
        for dtype in self.dtypes.values():
            result = torch.promote_types(result, dtype)
        return result

    def check(self, v: TreeLike, call: str) -> None:
        """Raise a ``ValueError`` that names ``call`` and the leaf when ``v`` does not lie in this space."""
        missing, extra = self.shapes.keys() - v.keys(), v.keys() - self.shapes.keys()
        if missing or extra:
            raise ValueError(
                f"{call}: expected the leaves {sorted(self.shapes)}, found missing {sorted(missing)} and "
                f"unexpected {sorted(extra)}; pass a dict with exactly the operator's names"
            )
        for name, shape in self.shapes.items():
            if v[name].shape != shape:
                raise ValueError(
                    f"{call}: leaf {name!r} has shape {tuple(v[name].shape)}, expected {tuple(shape)}"
                )

    def only(self, names: Iterable[str]) -> Space:
        """The space of some of the leaves."""
        kept = list(names)
        return Space({n: self.shapes[n] for n in kept}, {n: self.dtypes[n] for n in kept}, self.device)

    def zeros(self) -> Tree:
        """The zero vector."""
        return {
            name: torch.zeros(shape, dtype=self.dtypes[name], device=self.device)
            for name, shape in self.shapes.items()
        }

    def randn(self, generator: torch.Generator | None = None) -> Tree:
        """Independent standard normal entries."""
        return {
            name: torch.randn(shape, dtype=self.dtypes[name], device=self.device, generator=generator)
            for name, shape in self.shapes.items()
        }

    def flatten(self, v: TreeLike) -> Tensor:
        """All leaves as one vector of ``size`` entries.

        >>> Space.of({"w": torch.zeros(2)}).flatten({"w": torch.ones(2)})
        tensor([1., 1.])
        """
        return torch.cat([v[name].reshape(-1).to(self.dtype) for name in self.shapes])

    def unflatten(self, x: Tensor) -> Tree:
        """The inverse of :meth:`flatten`.

        Raises:
            ValueError: if ``x`` does not have ``size`` entries.
        """
        if x.shape != (self.size,):
            raise ValueError(f"Space.unflatten: found shape {tuple(x.shape)}, expected ({self.size},)")
        pieces = x.split([shape.numel() for shape in self.shapes.values()])
        return {
            name: piece.reshape(shape).to(self.dtypes[name])
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }
