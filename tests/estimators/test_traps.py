"""Data and models in which rows are easily counted wrongly: each has a plain twin that must give the same factors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import weingarten as wg
from tests.cases import WEIGHTS, N, Tied, initialised, integers, normal
from tests.uses import Conv1D, Matmul
from weingarten import reference

EXACT = wg.KFAC(wg.Exact())
ESTIMATORS = [
    EXACT,
    wg.KFAC(wg.Exact(), wg.Reduce()),
    wg.KFAC(wg.Empirical()),
    wg.EKFAC(wg.Exact()),
    wg.Diagonal(),
]
SAME = {"rtol": 1e-9, "atol": 1e-12}


def agree(
    model: nn.Module, loss: wg.Loss, one: list[wg.Batch], other: list[wg.Batch], ratio: float = 1.0
) -> None:
    """Both data give the same curvature, and the same factors; the second one's divided by ``ratio``."""
    objective = wg.Objective(model, loss)
    for estimator in ESTIMATORS:
        first, second = (wg.estimate(estimator, objective, data) for data in (one, other))
        torch.testing.assert_close(first.dense(), second.dense() / ratio, **SAME)
        assert first.trace() > 0
        for a, b in zip(first.blocks, second.blocks, strict=True):
            if isinstance(a, wg.Kronecker):
                torch.testing.assert_close(a.inputs, b.inputs, **SAME)
                torch.testing.assert_close(a.outputs, b.outputs / ratio, **SAME)


class Sequences(nn.Module):
    """Embedding, learned positions, attention, a convolution's worth of mixing, and a head at each position or for the mean."""

    def __init__(self, causal: bool, pooled: bool, batch_first: bool = True) -> None:
        super().__init__()
        self.causal, self.pooled, self.batch_first = causal, pooled, batch_first
        self.embed, self.place = nn.Embedding(5, 4), nn.Embedding(6, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor, blocked: Tensor | None = None) -> Tensor:
        h = self.embed(x) + self.place(torch.arange(x.shape[1]))
        h = h if self.batch_first else h.transpose(0, 1)
        if self.causal and blocked is None:
            blocked = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        mixed = self.attention(h, h, h, attn_mask=blocked, key_padding_mask=None if self.causal else ~mask)[0]
        h = torch.tanh(self.norm(h + mixed))
        h = h if self.batch_first else h.transpose(0, 1)
        if not self.pooled:
            return self.head(h).mT
        return self.head((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


LENGTHS = [3, 1, 4, 2]


def padded(pooled: bool, weights: Tensor) -> tuple[wg.Batch, list[wg.Batch]]:
    """One batch padded to the longest sequence, and each sequence alone without padding."""
    tokens, labels = integers(5, 4, 4), integers(3, 4, 4, seed=1)
    mask = torch.arange(4) < torch.tensor(LENGTHS)[:, None]
    targets = labels[:, 0] if pooled else labels.masked_fill(~mask, -100)
    whole = wg.Batch((tokens, mask), targets, weights)
    alone = []
    for n, length in enumerate(LENGTHS):
        x, keep = tokens[n : n + 1, :length], mask[n : n + 1, :length]
        alone.append(
            wg.Batch(
                (x, keep), targets[n : n + 1] if pooled else targets[n : n + 1, :length], weights[n : n + 1]
            )
        )
    return whole, alone


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("pooled", [True, False])
def test_padding_changes_nothing(pooled, batch_first):
    whole, alone = padded(pooled, WEIGHTS[:4])
    model = initialised(Sequences(causal=False, pooled=pooled, batch_first=batch_first))
    agree(model, wg.CrossEntropy(), [whole], alone)


def test_ignored_labels_at_the_end_of_causal_sequences_are_padding():
    """The mask is not used: later positions reach no loss."""
    whole, alone = padded(False, WEIGHTS[:4])
    agree(initialised(Sequences(causal=True, pooled=False)), wg.CrossEntropy(), [whole], alone)


def test_ignored_labels_inside_causal_sequences_still_count_where_they_are_attended_to():
    model = initialised(Sequences(causal=True, pooled=False))
    tokens, labels = integers(5, 1, 3), torch.tensor([[-100, 2, -100]])
    batch = wg.Batch((tokens, torch.ones(1, 3).bool()), labels)
    found = wg.estimate(EXACT, wg.Objective(model, wg.CrossEntropy()), [batch])
    (table,) = [b for b in found.blocks if "embed.weight" in b.space.shapes]
    expected = (
        functional.one_hot(tokens[0, :2], 5).double().mean(0)
    )  # the third reaches nothing, the first one the second
    torch.testing.assert_close(table.inputs[0], expected)


@pytest.mark.parametrize("loss", [wg.CrossEntropy(), wg.CrossEntropy(reduction="sum")], ids=["mean", "sum"])
def test_a_datum_of_weight_zero_is_absent(loss):
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    whole, _ = padded(True, weights)
    kept = torch.tensor([0, 2, 3])
    fewer = wg.Batch(tuple(x[kept] for x in whole.inputs), whole.targets[kept], weights[kept])
    agree(
        initialised(Sequences(False, True)), loss, [whole], [fewer], 4 / 3 if loss.reduction == "mean" else 1
    )


def test_class_weights_are_datum_weights():
    by_class = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)
    model, (whole, _) = initialised(Sequences(False, True)), padded(True, torch.ones(4).double())
    targets = torch.tensor([0, 2, 1, 0])
    plain = wg.Batch(whole.inputs, targets)
    weighted = wg.Batch(whole.inputs, targets, by_class[targets])
    for estimator in (EXACT, wg.KFAC(wg.MonteCarlo()), wg.EKFAC(wg.Exact()), wg.Diagonal()):
        first, second = (
            wg.estimate(
                estimator, wg.Objective(model, wg.CrossEntropy(weight=w, reduction="sum")), [data]
            ).dense()
            for w, data in ((by_class, plain), (None, weighted))
        )
        torch.testing.assert_close(first, second, **SAME)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("batch_first", [True, False])
def test_as_many_positions_as_data(size, batch_first):
    """Axes of equal length are told apart: one batch is as its data one by one."""
    tokens, mask = integers(5, size, size), torch.ones(size, size, dtype=torch.bool)
    whole = wg.Batch((tokens, mask), integers(3, size, size, seed=1), WEIGHTS[:size] + 0.1)
    alone = [reference.datum(whole, n) for n in range(size)]
    agree(
        initialised(Sequences(causal=True, pooled=False, batch_first=batch_first)),
        wg.CrossEntropy(),
        [whole],
        alone,
    )


class Table(nn.Module):
    """Added positions of shape ``(T, d)`` or ``(T, 1, d)``, where activations are ``(N, T, d)`` or ``(T, N, d)``."""

    def __init__(self, size: int, data_first: bool) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(size, 3) if data_first else torch.zeros(size, 1, 3))
        self.data_first = data_first

    def forward(self, x: Tensor) -> Tensor:
        if self.data_first:
            return torch.tanh(x + self.table)
        return torch.tanh(x.transpose(0, 1) + self.table).transpose(0, 1)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_added_tables_with_as_many_rows_as_data(size):
    batch = wg.Batch(normal(size, size, 3), normal(size, size, 3, seed=1), WEIGHTS[:size] + 0.1)
    for data_first in (True, False):
        objective = wg.Objective(initialised(Table(size, data_first)), wg.MSE())
        found = wg.estimate(EXACT, objective, [batch])
        torch.testing.assert_close(found.dense(), reference.dense_ggn(objective, [batch], objective.params()))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("make", [Conv1D, lambda: Matmul(True)], ids=["data first", "positions first"])
def test_merged_data_and_positions(make, size):
    for positions in (size, size + 1):
        batch = wg.Batch(normal(size, positions, 3), normal(size, positions, 2, seed=1), WEIGHTS[:size] + 0.1)
        alone = [reference.datum(batch, n) for n in range(size)]
        model = initialised(nn.Sequential(make(), nn.Tanh()))
        agree(model, wg.MSE(), [batch], alone)


def test_merged_data_and_positions_whose_activations_are_zero():
    """A layer that starts at zero tells nothing about where the data lie."""
    model = nn.Sequential(Matmul(True)).double()
    batch = wg.Batch(normal(3, 2, 3), normal(3, 2, 2, seed=1), WEIGHTS[:3])
    agree(model, wg.MSE(), [batch], [reference.datum(batch, n) for n in range(3)])


def test_inputs_that_belong_to_all_data():
    """A mask ``(T, T)`` among the inputs is not cut into data."""
    model = initialised(Sequences(causal=True, pooled=False))
    tokens, mask = integers(5, N, 3), torch.ones(N, 3, dtype=torch.bool)
    blocked = torch.ones(3, 3).triu(1).bool()
    targets = integers(3, N, 3, seed=1)
    plain = wg.Batch({"x": tokens, "mask": mask}, targets, WEIGHTS)
    given = wg.Batch({"x": tokens, "mask": mask, "blocked": blocked}, targets, WEIGHTS)
    agree(model, wg.CrossEntropy(), [given], [plain])


def test_inputs_that_belong_to_all_data_where_gradients_are_formed():
    model = initialised(Sequences(causal=True, pooled=False))
    function = lambda params, inputs: torch.func.functional_call(model, params, (), inputs)  # noqa: E731
    objective = wg.Objective(function, wg.CrossEntropy())
    params = wg.Objective(model, wg.CrossEntropy()).params()
    inputs = {"x": integers(5, N, 3), "mask": torch.ones(N, 3, dtype=torch.bool)}
    targets = integers(3, N, 3, seed=1)
    plain = wg.Batch(inputs, targets, WEIGHTS)
    given = wg.Batch({**inputs, "blocked": torch.ones(3, 3).triu(1).bool()}, targets, WEIGHTS)
    expected = reference.dense_ggn(objective, [plain], params)
    torch.testing.assert_close(reference.dense_ggn(objective, [given], params), expected)
    found = wg.estimate(wg.Diagonal(), objective, [given], params).dense()
    torch.testing.assert_close(found.diagonal(), expected.diagonal())
    free = wg.Symmetry.parse({name: " ".join("." * p.ndim) for name, p in params.items()})
    found = wg.estimate(wg.OrbitFisher(free, wg.Exact()), objective, [given], params)
    torch.testing.assert_close(found.dense(), expected)


def test_inputs_that_belong_to_all_data_with_as_many_rows_are_refused():
    model = initialised(Sequences(causal=True, pooled=False))
    batch = wg.Batch(
        (integers(5, 4, 4), torch.ones(4, 4).bool(), torch.ones(4, 4).triu(1).bool()), integers(3, 4, 4)
    )
    with pytest.raises(
        ValueError, match="inputs that belong to all data must not have as many rows as the batch"
    ):
        wg.estimate(EXACT, wg.Objective(model, wg.CrossEntropy()), [batch])


def test_batches_of_one_size_after_another():
    """What was learned about the model from one batch holds for the next; from a batch of one or two it is not kept."""
    tokens, labels = integers(4, N, 3), integers(4, N, 3, seed=1)
    whole = wg.Batch(tokens, labels, WEIGHTS)
    for cuts in ((0, 1, 3, 5), (0, 3, 4, 5), (0, 2, 5)):
        pieces = [wg.Batch(tokens[a:b], labels[a:b], WEIGHTS[a:b]) for a, b in pairwise(cuts)]
        agree(initialised(Tied()), wg.CrossEntropy(), [whole], pieces)
