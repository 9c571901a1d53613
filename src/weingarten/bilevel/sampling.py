"""Where batches come from: rows of tensors, or of a dataset, drawn with an explicit generator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from weingarten.objective import Batch

__all__ = ["FromDataset", "Rows", "Source", "as_source", "seeded", "seeded_by"]


class Source(ABC):
    """Something batches can be drawn from."""

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Batch:
        """One batch; equal generator states give equal batches."""


@final
class Rows(Source):
    """Rows of tensors, drawn without replacement within a batch and independently between batches.

    Args:
        inputs: a tensor ``(N, ...)``, or a tuple or dict of such.
        targets: ``(N, ...)``.
        batch_size: rows per batch; None (default) for all of them, in order and without a draw.
        weights: ``(N,)``, >= 0, or None.

    Raises:
        ValueError: if the first dimensions differ, there is no row, or ``batch_size`` is not in 1 ... N.

    >>> rows = Rows(torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 0]), batch_size=2)
    >>> rows.draw(torch.Generator().manual_seed(0)).inputs.shape
    torch.Size([2, 2])
    >>> Rows(torch.zeros(3, 2), torch.tensor([0, 1, 0])).draw(torch.Generator()).rows
    tensor([0, 1, 2])
    """

    def __init__(
        self, inputs: Any, targets: Tensor, batch_size: int | None = None, weights: Tensor | None = None
    ) -> None:
        self.size = len(targets)
        self.inputs, self.targets = _apply(_own, inputs), _own(targets)
        self.weights = None if weights is None else _own(weights)
        self.batch_size = batch_size
        for leaf in _leaves(
            (self.inputs, self.targets) if weights is None else (self.inputs, self.targets, self.weights)
        ):
            if len(leaf) != self.size:
                raise ValueError(
                    f"Rows: a tensor has {len(leaf)} rows, expected {self.size} as the targets have"
                )
        _check_batch_size("Rows", batch_size, self.size)

    def draw(self, generator: torch.Generator) -> Batch:
        if self.batch_size is None:
            rows = torch.arange(self.size, device=self.targets.device)
            return Batch(self.inputs, self.targets, self.weights, rows)
        return self.take(_choose(self.size, self.batch_size, generator).to(self.targets.device))

    def take(self, rows: Tensor) -> Batch:
        """The batch of the given row numbers."""
        weights = None if self.weights is None else self.weights[rows]
        return Batch(
            _apply(lambda leaf: leaf[rows.to(leaf.device)], self.inputs), self.targets[rows], weights, rows
        )

    def __repr__(self) -> str:
        """Sizes only; part of the fingerprint of a checkpoint."""
        return f"Rows(rows={self.size}, batch_size={self.batch_size}, weighted={self.weights is not None})"


@final
class FromDataset(Source):
    """Rows of a map-style dataset of pairs ``(inputs, target)``.

    Random augmentation that uses torch's global generator repeats: that generator is seeded from the explicit one
    around each draw, and put back. Python's ``random`` and numpy are not.

    Args:
        dataset: with ``len`` and integer indexing.
        batch_size: rows per batch; None for all of them.
        collate: from a list of pairs to a pair ``(inputs, targets)``.

    Raises:
        ValueError: if the dataset is empty or ``batch_size`` is not in 1 ... its length.

    >>> from torch.utils.data import TensorDataset
    >>> source = FromDataset(TensorDataset(torch.eye(4), torch.arange(4)), batch_size=3)
    >>> source.draw(torch.Generator().manual_seed(0)).targets.shape
    torch.Size([3])
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int | None,
        collate: Callable[[list[Any]], Any] = default_collate,
    ) -> None:
        self.dataset, self.batch_size, self.collate = dataset, batch_size, collate
        self.size = len(dataset)  # type: ignore[arg-type]  # map-style datasets have a length
        _check_batch_size("FromDataset", batch_size, self.size)

    def draw(self, generator: torch.Generator) -> Batch:
        rows = (
            torch.arange(self.size)
            if self.batch_size is None
            else _choose(self.size, self.batch_size, generator)
        )
        with seeded(generator):
            items = [self.dataset[int(row)] for row in rows]
        found = self.collate(items)
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise ValueError(
                f"FromDataset: collate returned {type(found).__name__}, expected a pair (inputs, targets); pass collate="
            )
        return Batch(found[0], found[1], rows=rows)

    def __repr__(self) -> str:
        """Kind and sizes only; part of the fingerprint of a checkpoint."""
        return f"FromDataset({type(self.dataset).__name__}, rows={self.size}, batch_size={self.batch_size})"


@final
class _Fixed(Source):
    """The same batch every time."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def draw(self, generator: torch.Generator) -> Batch:
        return self.batch

    def __repr__(self) -> str:
        """Size only."""
        return f"Batch(rows={len(self.batch.targets)})"


def as_source(data: Source | Batch | Sequence[Any]) -> Source:
    """A source as it is; a batch, or a tuple ``(inputs, targets[, weights])``, as a source of this one batch.

    A batch without row numbers is numbered from 0.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(data, Source):
        return data
    batch = Batch.of(data)
    if batch.rows is None:
        return Rows(batch.inputs, batch.targets, weights=batch.weights)
    return _Fixed(batch)


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """As :func:`seeded_by`, with a seed drawn from ``generator``."""
    with seeded_by(int(torch.randint(2**62, (), generator=generator, device=generator.device))):
        yield


@contextmanager
def seeded_by(seed: int) -> Iterator[None]:
    """Inside, torch's global generators run from the seed; on every exit they are as before, on a GPU too.

    For what takes no generator of its own, such as dropout and the first weights of a module.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield


def _choose(size: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(size, generator=generator, device=generator.device)[:count]


def _check_batch_size(call: str, batch_size: int | None, size: int) -> None:
    if size == 0 or (batch_size is not None and not 1 <= batch_size <= size):
        raise ValueError(
            f"{call}: batch_size is {batch_size} for {size} rows, expected between 1 and the number of rows"
        )


def _own(leaf: Tensor) -> Tensor:
    """The leaf contiguous at the start of its own storage, so that products repeat bit for bit after a restart."""
    return leaf.detach().contiguous() if leaf.storage_offset() == 0 else leaf.detach().clone().contiguous()


def _apply(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {name: _apply(function, item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_apply(function, item) for item in value)
    raise TypeError(
        f"Rows: found {type(value).__name__} among the inputs, expected tensors, tuples and dicts of tensors"
    )


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(item)
