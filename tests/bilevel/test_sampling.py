from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

import weingarten as wg
from weingarten.bilevel.sampling import as_source, seeded


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


X, Y = torch.arange(20.0).reshape(10, 2), torch.arange(10)


def test_all_rows_in_order_without_a_draw():
    g = generator()
    before = g.get_state()
    batch = wg.Rows(X, Y, weights=Y.float()).draw(g)
    assert torch.equal(batch.inputs, X)
    assert torch.equal(batch.rows, Y)
    assert torch.equal(batch.weights, Y.float())
    assert torch.equal(g.get_state(), before)


def test_rows_within_a_batch_are_distinct_and_all_are_reached():
    source, g = wg.Rows(X, Y, 4), generator()
    seen = set()
    for _ in range(30):
        batch = source.draw(g)
        assert len(set(batch.rows.tolist())) == 4
        assert torch.equal(batch.inputs, X[batch.rows])
        assert torch.equal(batch.targets, batch.rows)
        seen |= set(batch.rows.tolist())
    assert seen == set(range(10))


@pytest.mark.parametrize("make", [lambda: wg.Rows(X, Y, 4), lambda: wg.FromDataset(TensorDataset(X, Y), 4)])
def test_draws_come_from_the_generator_alone(make):
    state = torch.get_rng_state()
    first, second = (make().draw(generator(3)) for _ in range(2))
    assert torch.equal(first.rows, second.rows)
    assert not torch.equal(first.rows, make().draw(generator(4)).rows)
    assert torch.equal(torch.get_rng_state(), state)


def test_nested_inputs():
    batch = wg.Rows({"a": X, "b": (X, Y)}, Y, 3).draw(generator())
    assert torch.equal(batch.inputs["a"], X[batch.rows])
    assert torch.equal(batch.inputs["b"][1], Y[batch.rows])


class Noisy(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return torch.randn(3), i


def test_dataset():
    batch = wg.FromDataset(TensorDataset(X, Y), 4).draw(generator())
    assert torch.equal(batch.inputs, X[batch.rows])
    assert torch.equal(batch.targets, Y[batch.rows])
    assert len(wg.FromDataset(TensorDataset(X, Y), None).draw(generator()).rows) == 10
    augmented = [wg.FromDataset(Noisy(), 2).draw(generator(1)).inputs for _ in range(2)]
    assert torch.equal(*augmented)
    with pytest.raises(ValueError, match="collate returned str"):
        wg.FromDataset(TensorDataset(X, Y), 4, collate=str).draw(generator())


def test_views_get_their_own_memory():
    wide = torch.randn(10, 8)
    rows = wg.Rows(wide[:, 2:6], Y)
    assert rows.inputs.is_contiguous()
    assert rows.inputs.storage_offset() == 0
    assert rows.inputs.untyped_storage().nbytes() == 160


def test_what_may_stand_for_a_source():
    assert torch.equal(as_source((X, Y)).draw(generator()).rows, torch.arange(10))
    batch = wg.Batch(X[:2], Y[:2], rows=torch.tensor([7, 3]))
    assert as_source(batch).draw(generator()) is batch
    source = wg.Rows(X, Y)
    assert as_source(source) is source
    with pytest.raises(TypeError, match="expected a Batch or a tuple"):
        as_source(X)


@pytest.mark.parametrize(("size", "found"), [(0, "batch_size is 0"), (11, "batch_size is 11 for 10 rows")])
def test_batch_sizes_out_of_range(size, found):
    with pytest.raises(ValueError, match=found):
        wg.Rows(X, Y, size)
    with pytest.raises(ValueError, match=found):
        wg.FromDataset(TensorDataset(X, Y), size)


def test_tensors_that_do_not_fit():
    with pytest.raises(ValueError, match="has 9 rows, expected 10"):
        wg.Rows({"a": X[:9]}, Y)
    with pytest.raises(ValueError, match="has 9 rows, expected 10"):
        wg.Rows(X, Y, weights=torch.ones(9))
    with pytest.raises(TypeError, match="found str among the inputs"):
        wg.Rows("text", Y)
    with pytest.raises(ValueError, match="for 0 rows"):
        wg.Rows(X[:0], Y[:0])


def test_seeded_puts_the_global_state_back_on_every_exit():
    state = torch.get_rng_state()

    def draw(fail=False):
        with seeded(generator(2)):
            if fail:
                raise RuntimeError("inside")
            return torch.rand(3)

    assert torch.equal(draw(), draw())
    with pytest.raises(RuntimeError, match="inside"):
        draw(fail=True)
    assert torch.equal(torch.get_rng_state(), state)
