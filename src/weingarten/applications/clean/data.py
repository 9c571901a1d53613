"""What is trained on, what is trusted, what is held out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from weingarten.applications.clean.encoding import Encoding
from weingarten.applications.clean.source import Source
from weingarten.applications.clean.table import Table

__all__ = ["Parts", "rehearse", "split", "stratified"]


@dataclass(frozen=True)
class Parts:
    """Tensors of one seed: features (N, D) standardised by the training rows, labels (N,).

    Attributes:
        rows: of the training part, counted from 0 in the training table.
        given: labels to clean; ``truth`` is what they were before noise was put in, None where nobody knows.
    """

    encoding: Encoding
    rows: Tensor
    x: Tensor
    given: Tensor
    truth: Tensor | None
    trusted_x: Tensor
    trusted_y: Tensor
    held_x: Tensor
    held_y: Tensor


def split(source: Source, seed: int, base_seed: int) -> Parts:
    """The parts of one seed.

    With noise put in, the seed draws the held-out rows, the trusted rows and the noise. Otherwise the held-out rows are those of
    the base seed, and the seed draws the trusted rows.
    """
    code = {name: i for i, name in enumerate(source.classes)}
    y = torch.tensor([code[name] for name in source.train.labels])
    rest, frames = np.arange(len(y)), source.train.features
    held = trusted = np.arange(0)
    held_seed = seed if source.noise is not None else base_seed
    if source.held_out_from == "train" and source.held_out_size:
        held, rest = stratified(y.numpy(), rest, source.held_out_size, np.random.default_rng([held_seed, 2]))
    if source.trusted is None:
        trusted, rest = stratified(y.numpy(), rest, source.trusted_size, np.random.default_rng([seed, 3]))
    encoding = Encoding.fit(frames.iloc[rest], source.readers)
    x, truth = encoding.apply(frames.iloc[rest]), y[torch.from_numpy(rest)]
    held_x, held_y = encoding.apply(frames.iloc[held]), y[torch.from_numpy(held)]
    trusted_x, trusted_y = encoding.apply(frames.iloc[trusted]), y[torch.from_numpy(trusted)]
    if source.trusted is not None:
        trusted_x, trusted_y = encoding.apply(source.trusted.features), _codes(source.trusted, code)
        if source.held_out_from == "trusted" and source.held_out_size:
            every = np.arange(len(trusted_y))
            out, kept = stratified(
                trusted_y.numpy(), every, source.held_out_size, np.random.default_rng([held_seed, 2])
            )
            held_x, held_y = trusted_x[out], trusted_y[out]
            trusted_x, trusted_y = trusted_x[kept], trusted_y[kept]
    if source.held_out is not None:
        held_x, held_y = encoding.apply(source.held_out.features), _codes(source.held_out, code)
    noisy = truth if source.noise is None else source.noise.apply(truth, x, len(code), seed)
    known = None if source.noise is None else truth
    return Parts(encoding, torch.from_numpy(rest), x, noisy, known, trusted_x, trusted_y, held_x, held_y)


def rehearse(source: Source, seed: int) -> None:
    """Finds what only a split can find, without reading a text or a picture.

    Raises:
        UserError: as :func:`split` does.
    """
    blank = {
        name: replace(table, features=table.features.assign(**dict.fromkeys(source.readers, 0.0)))
        for name, table in source.tables().items()
    }
    split(replace(source, readers={}, **blank), seed, seed)  # type: ignore[arg-type]


def stratified(
    y: np.ndarray, rows: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """``size`` of the rows, drawn class by class in proportion, at least one of each class if that many; and the others.

    >>> y = np.array([0] * 90 + [1] * 10)
    >>> drawn, others = stratified(y, np.arange(100), 10, np.random.default_rng(0))
    >>> np.bincount(y[drawn]).tolist(), len(others)
    ([9, 1], 90)
    """
    classes, counts = np.unique(y[rows], return_counts=True)
    share = counts * size / len(rows)
    taken = np.floor(share).astype(int)
    if size >= len(classes):
        taken = np.maximum(taken, 1)
    while taken.sum() < size:
        taken[np.argmax(np.where(taken < counts, share - taken, -np.inf))] += 1
    while taken.sum() > size:
        taken[np.argmax(np.where(taken > 1, taken - share, -np.inf))] -= 1
    drawn = np.concatenate(
        [rng.permutation(rows[y[rows] == c])[:n] for c, n in zip(classes, taken, strict=True)]
    )
    drawn.sort()
    return drawn, np.setdiff1d(rows, drawn)


def _codes(table: Table, code: dict[str, int]) -> Tensor:
    return torch.tensor([code[name] for name in table.labels])
