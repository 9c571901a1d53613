"""What is trained on, what is trusted, what is held out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
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
        frames: the tables that the features ``x``, ``trusted_x`` and ``held_x`` were made from: ``train``, ``trusted``, ``held``.
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
    frames: Mapping[str, pd.DataFrame] = field(default_factory=dict, repr=False)


def split(source: Source, seed: int, base_seed: int) -> Parts:
    """The parts of one seed.

    With noise put in, the seed draws the held-out rows, the trusted rows and the noise. Otherwise the held-out rows are those of
    the base seed, and the seed draws the trusted rows.
    """
    code = {name: i for i, name in enumerate(source.classes)}
    y = torch.tensor([code[name] for name in source.train.labels])
    rest, features = np.arange(len(y)), source.train.features
    held = trusted = np.arange(0)
    held_seed = seed if source.noise is not None else base_seed
    if source.held_out_from == "train" and source.held_out_size:
        held, rest = stratified(y.numpy(), rest, source.held_out_size, np.random.default_rng([held_seed, 2]))
    if source.trusted is None:
        trusted, rest = stratified(y.numpy(), rest, source.trusted_size, np.random.default_rng([seed, 3]))
    named = {"train": rest, "trusted": trusted, "held": held}
    frames = {name: features.iloc[rows] for name, rows in named.items()}
    labels = {name: y[torch.from_numpy(rows)] for name, rows in named.items()}
    if source.trusted is not None:
        checked, codes = source.trusted.features, _codes(source.trusted, code)
        kept = np.arange(len(codes))
        if source.held_out_from == "trusted" and source.held_out_size:
            rng = np.random.default_rng([held_seed, 2])
            out, kept = stratified(codes.numpy(), kept, source.held_out_size, rng)
            frames["held"], labels["held"] = checked.iloc[out], codes[out]
        frames["trusted"], labels["trusted"] = checked.iloc[kept], codes[kept]
    if source.held_out is not None:
        frames["held"], labels["held"] = source.held_out.features, _codes(source.held_out, code)
    encoding = Encoding.fit(frames["train"], source.readers)
    x, truth = {name: encoding.apply(frame) for name, frame in frames.items()}, labels["train"]
    return Parts(
        encoding=encoding,
        rows=torch.from_numpy(rest),
        x=x["train"],
        given=truth if source.noise is None else source.noise.apply(truth, x["train"], len(code), seed),
        truth=None if source.noise is None else truth,
        trusted_x=x["trusted"],
        trusted_y=labels["trusted"],
        held_x=x["held"],
        held_y=labels["held"],
        frames=frames,
    )


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
