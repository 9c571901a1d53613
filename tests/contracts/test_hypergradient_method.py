"""Every method by name, on one small problem in float64 with an exact answer."""

from __future__ import annotations

import math

import pytest
import torch

import weingarten as wg
from tests.bilevel.problems import Case, cosine, same
from tests.bilevel.problems import classification as at_a_minimum
from tests.bilevel.test_unrolled import away_from_the_minimum
from weingarten.bilevel.checkpoint import decode, encode

CALLS = 3


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def indirect(found: wg.Hypergradient) -> dict[str, torch.Tensor]:
    return {name: found.value[name] - found.direct[name] for name in found.value}


def in_training() -> Case:
    return Case(*away_from_the_minimum())


def copy(values):
    return {name: leaf.clone() for name, leaf in values.items()}


@pytest.mark.parametrize("make", [at_a_minimum, in_training])
@pytest.mark.parametrize("name", list(wg.METHODS))
def test_it_points_where_the_exact_one_points(name, make):
    """Its indirect part, which methods differ in; the direct term alone would make most cosines near 1."""
    case, method, state = make(), wg.make_method(name), None
    exact = wg.make_method("exact", 1e-4)(*case)
    for _ in range(CALLS):
        found = method(*case, state)
        state = found.state
        assert cosine(found.value, exact.value) > 0.5
        assert cosine(indirect(found), indirect(exact)) > 0.5


@pytest.mark.parametrize("name", list(wg.METHODS))
def test_its_value_is_shaped_as_the_outer_variables_and_nothing_is_changed(name):
    case, method, state = in_training(), wg.make_method(name), None
    model = case.problem.inner.objective.model
    tensors = {"params": case.params, "hparams": case.hparams, "model": model.state_dict()}
    before = {key: copy(values) for key, values in tensors.items()}
    for _ in range(CALLS):
        kept = encode(state)
        snapshot = decode(encode(state)) if state is None else torch.utils._pytree.tree_map(
            lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, kept
        )  # fmt: skip
        found = method(*case, state, torch.Generator().manual_seed(2))
        assert repr(encode(state)) == repr(snapshot)  # the state that is passed in is not changed
        for part in (found.value, found.direct):
            assert list(part) == list(case.hparams)
            assert all(part[k].shape == h.shape and part[k].dtype == h.dtype for k, h in case.hparams.items())
        if found.inverse_product is not None:
            assert {k: v.shape for k, v in found.inverse_product.items()} == {
                k: v.shape for k, v in case.params.items()
            }
        assert math.isfinite(found.outer_loss)
        assert found.products >= 0
        state = found.state
    for key, values in tensors.items():
        assert same(before[key], copy(values))


@pytest.mark.parametrize("name", list(wg.METHODS))
def test_its_state_goes_through_a_checkpoint(name):
    """What is kept is plain, and the next call from it is the same bit for bit."""
    case, method = in_training(), wg.make_method(name, refresh=4)
    first = method(*case, None, torch.Generator().manual_seed(2))
    moved = Case(case.problem, {k: 0.9 * p for k, p in case.params.items()}, case.hparams, case.batches)
    found, again = (
        method(*moved, state, torch.Generator().manual_seed(3))
        for state in (first.state, decode(encode(first.state)))
    )
    assert same(found.value, again.value)
