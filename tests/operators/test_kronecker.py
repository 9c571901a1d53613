"""Kronecker blocks: shapes, many at once, and half precision against float32."""

from __future__ import annotations

import pytest
import torch

import weingarten as wg
from tests.cases import generator, normal
from weingarten.matfun import SingularMatrixError
from weingarten.operators import Layout, factor
from weingarten.tree import Space, Tree


def spd(*batch: int, n: int, seed: int = 0) -> torch.Tensor:
    x = normal(*batch, n, n + 3, seed=seed)
    return x @ x.mT / n


def block(name: str, rows: int, columns: int, groups: int = 1, seed: int = 0) -> wg.Kronecker:
    layout = Layout(Space.of({name: normal(groups * rows, columns)}), groups=groups)
    return wg.Kronecker(layout, spd(groups, n=columns, seed=seed), spd(groups, n=rows, seed=seed + 50))


def blocks() -> list[wg.Kronecker]:
    diagonal = block("d", 3, 4, seed=7)
    return [
        block("a", 3, 4),
        block("b", 4, 3, seed=1),
        block("c", 2, 3, groups=2, seed=2),
        wg.Kronecker(diagonal.layout, diagonal.inputs, normal(1, 3) ** 2),
    ]


FUNCTIONS = [
    wg.FactoredPower(-1, 0.1),
    wg.FactoredPower(-0.5, 0.1),
    wg.Power(-1, 0.1),
    wg.Log(0.1),
    wg.Scale(2.0),
]


@pytest.mark.parametrize("chunk", [1, 20, 2**24])
@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_many_at_once_is_one_by_one(function, chunk, monkeypatch):
    monkeypatch.setattr(factor, "_CHUNK_CPU", chunk)
    single = [b.map(function) for b in blocks()]
    other = wg.DiagonalCurvature({"z": normal(3) ** 2})
    found = wg.BlockDiagonal([other, *blocks()]).map(function).blocks
    torch.testing.assert_close(found[0].diag(), other.map(function).diag())
    for ours, expected in zip(found[1:], single, strict=True):
        assert type(ours) is type(expected)
        assert ours.space == expected.space
        torch.testing.assert_close(ours.dense(), expected.dense())


def test_equal_sizes_are_factorised_in_one_call(monkeypatch):
    calls = []
    original = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda m: calls.append(tuple(m.shape)) or original(m))
    given = blocks()
    before = [(b.inputs.clone(), b.outputs.clone()) for b in given]
    wg.BlockDiagonal(given).map(wg.FactoredPower(-1, 0.1))
    assert sorted(calls) == [(2, 2, 2), (3, 4, 4), (4, 3, 3)]
    for b, (inputs, outputs) in zip(given, before, strict=True):
        assert torch.equal(b.inputs, inputs)
        assert torch.equal(b.outputs, outputs)


def test_a_singular_block_is_refused_among_others():
    good, bad = block("a", 3, 3), block("b", 3, 3, seed=1)
    bad.outputs[0] = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    for function in (wg.FactoredPower(-1), wg.Power(-1)):
        with pytest.raises(SingularMatrixError, match="pass damping > 0"):
            wg.BlockDiagonal([good, bad]).map(function)


@pytest.mark.parametrize("function", [wg.FactoredPower(-1, 0.1), wg.Power(-1, 0.1)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [(0, 0), (2, 2), (2, 1)])
def test_what_is_not_finite_is_refused(function, value, where):
    given = blocks()
    given[0].inputs[0][where] = given[0].inputs[0][where[::-1]] = value
    with pytest.raises(ValueError, match="not finite"):
        wg.BlockDiagonal(given).map(function)


@pytest.mark.parametrize(
    ("inputs", "outputs", "match"),
    [
        ((1, 3, 3), (1, 3, 3), r"inputs has shape \(1, 3, 3\), expected \(1, 4, 4\), or \(1, 4\)"),
        ((1, 4, 4), (3, 3), r"outputs has shape \(3, 3\), expected \(1, 3, 3\), or \(1, 3\)"),
        ((4,), (1, 3), "inputs has shape"),
        ((2, 4), (1, 3), "inputs has shape"),
    ],
)
def test_shapes_are_checked(inputs, outputs, match):
    with pytest.raises(ValueError, match=f"Kronecker: {match}"):
        wg.Kronecker(Layout(Space.of({"w": normal(3, 4)})), torch.ones(inputs), torch.ones(outputs))


@pytest.mark.parametrize("name", ["left", "right", "spectrum"])
def test_shapes_of_an_eigenbasis_are_checked(name):
    given = {"left": torch.eye(3)[None], "right": torch.eye(4)[None], "spectrum": torch.ones(1, 3, 4)}
    with pytest.raises(ValueError, match=f"Eigenbasis: {name} has shape"):
        wg.Eigenbasis(Layout(Space.of({"w": normal(3, 4)})), **given | {name: torch.ones(1, 5, 5)})


def half(dtype: torch.dtype, diagonal: str = "") -> tuple[wg.Kronecker, wg.Kronecker]:
    """A block with factors of a half type, and one with the same numbers in float32."""
    layout = Layout(Space.of({"w": torch.zeros(6, 7), "b": torch.zeros(6)}))
    factors = [spd(1, n=8).to(dtype), spd(1, n=6, seed=1).to(dtype)]
    for i, side in enumerate(("inputs", "outputs")):
        if side in diagonal:
            factors[i] = factors[i].diagonal(dim1=-2, dim2=-1).clone()
    return wg.Kronecker(layout, *factors), wg.Kronecker(layout, *(f.float() for f in factors))


def relative(found: Tree, expected: Tree) -> float:
    difference = {name: (found[name] - expected[name]).double() for name in expected}
    return float(wg.tree.norm(difference) / wg.tree.norm(expected))


HALF = [
    wg.FactoredPower(-1, 0.05),
    wg.FactoredPower(-0.5, 0.05),
    wg.Power(-1, 0.05),
    wg.Power(-0.5, 0.05),
    wg.Scale(2.0),
]


@pytest.mark.parametrize("diagonal", ["", "inputs", "outputs", "inputs outputs"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", HALF, ids=str)
def test_half_precision_follows_float32(function, dtype, diagonal):
    ours, reference = half(dtype, diagonal)
    v, spacing = ours.space.randn(generator(2)), torch.finfo(dtype).eps
    assert relative(ours.apply(v), reference.apply(v)) < 4 * spacing
    found, expected = ours.map(function), reference.map(function)
    assert {x.dtype for x in found.apply(v).values()} == {torch.float32}
    assert relative(found.apply(v), expected.apply(v)) < 4 * spacing
    assert relative(found.diag(), expected.diag()) < 4 * spacing
    assert float(found.trace()) == pytest.approx(float(expected.trace()), rel=2 * spacing)
    if isinstance(found, wg.Kronecker):
        assert found.inputs.dtype == found.outputs.dtype == dtype
        torch.testing.assert_close(found.inputs, expected.inputs.to(dtype), rtol=0, atol=0)
    assert float(ours.logdet(1e-3)) == pytest.approx(float(reference.logdet(1e-3)), rel=1e-5)


def test_small_damping_is_not_lost_in_bfloat16():
    """Added in bfloat16 to an eigenvalue of one, 1e-3 would vanish; next to a zero it decides."""
    layout = Layout(Space.of({"w": torch.zeros(2, 2)}))
    rank_one = torch.ones(1, 2, 2, dtype=torch.bfloat16)
    ours = wg.Kronecker(layout, rank_one, torch.eye(2, dtype=torch.bfloat16)[None])
    found = ours.map(wg.FactoredPower(-1, 1e-4))
    exact = wg.Kronecker(layout, rank_one.double(), torch.eye(2).double()[None]).map(
        wg.FactoredPower(-1, 1e-4)
    )
    torch.testing.assert_close(found.inputs.double(), exact.inputs, rtol=1e-2, atol=0)


def test_float16_takes_small_vectors_and_refuses_large_results():
    layout = Layout(Space.of({"w": torch.zeros(2, 2)}))
    eye = torch.eye(2, dtype=torch.float16)[None]
    tiny = {"w": torch.full((2, 2), 1e-12)}
    torch.testing.assert_close(wg.Kronecker(layout, eye, eye).apply(tiny), tiny, rtol=1e-6, atol=0)
    for zero in (0 * eye, torch.zeros(1, 2, dtype=torch.float16)):
        with pytest.raises(ValueError, match=r"beyond the range of float16; keep factors in bfloat16"):
            wg.Kronecker(layout, zero, eye).map(wg.FactoredPower(-1, 1e-12))


def test_diagonal_curvature_in_bfloat16():
    values = {"w": torch.tensor([1.0, 0.0], dtype=torch.bfloat16)}
    found = wg.DiagonalCurvature(values).map(wg.Power(-1, 1e-3))
    assert found.values["w"].dtype == torch.bfloat16
    expected = torch.tensor([1 / (1 + 1e-3), 1e3])
    torch.testing.assert_close(found.values["w"].float(), expected, rtol=4e-3, atol=0)


def test_bases_of_null_spaces_do_not_depend_on_rounding():
    """Two stacks that differ by rounding alone; the second matrix of each is nothing but that."""
    q = torch.linalg.qr(normal(5, 5))[0]
    plain = q @ torch.diag(torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0], dtype=torch.float64)) @ q.mT
    noise = [1e-17 * (x + x.mT) for x in (normal(2, 5, 5, seed=1), normal(2, 5, 5, seed=2))]
    stacks = [torch.stack([plain, torch.zeros_like(plain)]) + x for x in noise]
    free, bases = [], []
    for stack in stacks:
        values, basis = torch.linalg.eigh(stack)
        free.append(basis)
        bases.append(factor.settled(values, basis))
        torch.testing.assert_close(
            bases[-1].mT @ bases[-1], torch.eye(5, dtype=torch.float64).expand(2, 5, 5)
        )
        torch.testing.assert_close(
            bases[-1].mT @ stack @ bases[-1], torch.diag_embed(values.clamp(min=0)), atol=1e-15, rtol=0
        )
        torch.testing.assert_close(bases[-1][1].abs(), torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(bases[0].abs(), bases[1].abs(), atol=1e-12, rtol=0)
    assert float((free[0].abs() - free[1].abs()).abs().max()) > 0.1  # eigh's own do
