"""Named-tensor arithmetic and spaces."""

from __future__ import annotations

import pytest
import torch

from tests.cases import generator, normal
from weingarten import tree
from weingarten.tree import Space

X = {"a": normal(2, 3), "b": normal(4, seed=1), "c": normal(seed=2)}
Y = {name: normal(*X[name].shape, seed=9) for name in reversed(X)}  # another order
SPACE = Space.of(X)


def flat(x):
    return SPACE.flatten(x)


def test_arithmetic_is_that_of_flat_vectors():
    kept = flat(X).clone(), flat(Y).clone()
    torch.testing.assert_close(flat(tree.add(X, Y)), flat(X) + flat(Y))
    torch.testing.assert_close(flat(tree.sub(X, Y)), flat(X) - flat(Y))
    torch.testing.assert_close(flat(tree.scale(-2.5, X)), -2.5 * flat(X))
    torch.testing.assert_close(flat(tree.axpy(torch.tensor(3.0), X, Y)), 3 * flat(X) + flat(Y))
    torch.testing.assert_close(tree.dot(X, Y), flat(X) @ flat(Y))
    torch.testing.assert_close(tree.norm(X), flat(X).norm())
    assert not flat(tree.zeros_like(X)).any()
    assert torch.equal(flat(X), kept[0])
    assert torch.equal(flat(Y), kept[1])


def test_detach_keeps_the_caller():
    leaf = torch.ones(2, requires_grad=True)
    assert not tree.detach({"a": leaf})["a"].requires_grad
    assert leaf.requires_grad


def test_flatten_and_back():
    assert SPACE.size == 11
    torch.testing.assert_close(SPACE.unflatten(flat(X)), X, rtol=0, atol=0)
    assert torch.equal(flat(dict(reversed(X.items()))), flat(X))  # the space's order counts
    assert torch.equal(flat(X)[:3], X["a"][0])  # row-major
    with pytest.raises(ValueError, match=r"found shape \(3,\), expected \(11,\)"):
        SPACE.unflatten(torch.zeros(3))


def test_mixed_types():
    space = Space.of({"half": torch.ones(2, dtype=torch.bfloat16), "full": torch.ones(2)})
    assert space.dtype == torch.float32
    v = space.unflatten(torch.arange(4.0))
    assert {n: x.dtype for n, x in v.items()} == space.dtypes
    assert {n: x.dtype for n, x in space.zeros().items()} == space.dtypes
    assert space.flatten(v).tolist() == [0, 1, 2, 3]
    assert float(tree.dot(v, v)) == 14


def test_random_vectors_repeat():
    before = torch.get_rng_state()
    first, second = (SPACE.randn(generator(3)) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert torch.equal(before, torch.get_rng_state())


def test_part_of_a_space():
    part = SPACE.only(["c", "a"])
    assert list(part.shapes) == ["c", "a"]
    assert part.size == 7


def test_refusals():
    with pytest.raises(ValueError, match="no leaf at all"):
        Space.of({})
    with pytest.raises(ValueError, match="found cpu, meta"):
        Space.of({"a": torch.zeros(1), "b": torch.zeros(1, device="meta")})
    with pytest.raises(
        ValueError, match=r"call: expected the leaves .* missing \['a'\] and unexpected \['z'\]"
    ):
        SPACE.check({"b": X["b"], "c": X["c"], "z": X["a"]}, "call")
