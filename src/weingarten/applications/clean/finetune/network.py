"""A network that reads texts by an encoder which is trained with it."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from weingarten.applications.clean.data import Parts
from weingarten.applications.clean.encoder import Encoder
from weingarten.applications.clean.encoding import Encoding, Vector
from weingarten.applications.clean.errors import UserError
from weingarten.applications.clean.texts import Texts

__all__ = ["TextNetwork", "TextRows", "by_last_layer", "encoder_of", "texts_in"]

BATCH = 64
"""Rows in a pass without gradients."""


@dataclass(frozen=True)
class TextRows:
    """The rows of all parts under one numbering: given ones, trusted ones, held-out ones.

    Attributes:
        encoding: of their columns, of which one holds texts.
        tokens: of each row's text.
        features: (N, D), as the frozen encoder has them; what follows from the text is replaced.
        columns: of the features that follow from the text.
    """

    encoding: Encoding
    tokens: list[Tensor]
    features: Tensor
    columns: slice

    @staticmethod
    def of(parts: Parts) -> tuple[TextRows, Parts]:
        """The rows, and the parts with numbers of rows (N,) for features."""
        column, before = texts_in(parts.encoding), _before_texts(parts.encoding)
        texts = [text for frame in parts.frames.values() for text in frame[column.name].tolist()]
        every = {"x": parts.x, "trusted_x": parts.trusted_x, "held_x": parts.held_x}
        numbers = torch.arange(len(texts)).split([len(x) for x in every.values()])
        rows = TextRows(
            parts.encoding,
            encoder_of(column).tokens(texts),
            torch.cat(list(every.values())),
            slice(before, before + column.width),
        )
        return rows, replace(parts, **dict(zip(every, numbers, strict=True)))


def texts_in(encoding: Encoding) -> Vector:
    """The column of texts."""
    return next(c for c in encoding.columns if isinstance(c, Vector) and isinstance(c.reader, Texts))


def encoder_of(column: Vector) -> Encoder:
    """The frozen one that reads the column."""
    assert isinstance(column.reader, Texts)
    return column.reader.encoder


def by_last_layer(parts: Parts) -> Parts:
    """The same parts, their texts read by the last layer of the encoder alone, as those of a trained encoder are."""
    column, before = texts_in(parts.encoding), _before_texts(parts.encoding)
    middle = column.width // 2
    read = replace(
        column,
        mean=column.mean[middle:],
        scale=column.scale[middle:],
        reader=Texts(encoder_of(column).last_layer()),
    )
    kept = [i for i in range(parts.encoding.width) if not before <= i < before + middle]
    return replace(
        parts,
        encoding=Encoding(tuple(read if c is column else c for c in parts.encoding.columns)),
        x=parts.x[:, kept],
        trusted_x=parts.trusted_x[:, kept],
        held_x=parts.held_x[:, kept],
    )


def _before_texts(encoding: Encoding) -> int:
    """How many features come before those of the texts."""
    column = texts_in(encoding)
    return sum(c.width for c in itertools.takewhile(lambda c: c is not column, encoding.columns))


class TextNetwork(nn.Module):
    """From numbers of rows (N,) to logits (N, C): the head on the standardised vector of each text and the other features.

    Args:
        rows: which the numbers stand for.
        head: from features (N, D) to logits; copied.
        trained: ``last`` or ``all`` blocks of the encoder, which is copied.

    Raises:
        UserError: if the last block is asked for and the encoder has no list of blocks.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, rows: TextRows, head: nn.Module, trained: str) -> None:
        super().__init__()
        self.rows, self.head = rows, copy.deepcopy(head)
        column = texts_in(rows.encoding)
        frozen = encoder_of(column)
        self.reader = replace(frozen, model=copy.deepcopy(frozen.model))
        self.encoder: nn.Module = self.reader.model
        self.register_buffer("mean", torch.tensor(column.mean).to(rows.features), persistent=False)
        self.register_buffer("scale", torch.tensor(column.scale).to(rows.features), persistent=False)
        self._release(trained)

    def forward(self, numbers: Tensor) -> Tensor:
        """Logits of the rows with these numbers; many rows go through in batches of similar length."""
        if len(numbers) <= BATCH:
            return self._logits(numbers) if len(numbers) else self.head(self.rows.features[:0])
        lengths = torch.tensor([len(self.rows.tokens[i]) for i in numbers.tolist()])
        order = lengths.argsort(stable=True)
        logits = torch.cat([self._logits(numbers[part]) for part in order.split(BATCH)])
        return logits[order.argsort()]

    def _logits(self, numbers: Tensor) -> Tensor:
        features, columns = self.rows.features[numbers], self.rows.columns
        vectors = self.reader.vectors([self.rows.tokens[i] for i in numbers.tolist()])
        parts = [
            features[:, : columns.start],
            (vectors - self.mean) / self.scale,
            features[:, columns.stop :],
        ]
        logits: Tensor = self.head(torch.cat(parts, 1))
        return logits

    def encoding(self) -> Encoding:
        """The columns' encoding with the encoder as it is now."""
        texts, columns = texts_in(self.rows.encoding), self.rows.encoding.columns
        trained = replace(texts, reader=Texts(self.reader, inside=True))
        return Encoding(tuple(trained if column is texts else column for column in columns))

    def _release(self, trained: str) -> None:
        """Let the parameters that are to be trained require gradients, but those that the vector does not depend on."""
        lists = [module for module in self.encoder.modules() if isinstance(module, nn.ModuleList)]
        if trained == "last" and not lists:
            raise UserError(
                f"--layers: {self.reader.name} has no list of blocks, so none is its last; expected all, or head"
            )
        part = self.encoder if trained == "all" else max(lists, key=len)[-1]
        part.requires_grad_()
        self.reader.vectors(self.rows.tokens[:1]).sum().backward()
        for parameter in self.encoder.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None
