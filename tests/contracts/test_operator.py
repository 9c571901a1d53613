"""Every operator and every curvature: one linear-algebra contract over one table, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from scipy.sparse.linalg import eigsh

import weingarten as wg
from tests.cases import PROBLEMS, WEIGHTS, generator, normal
from weingarten import tree
from weingarten.matfun import SingularMatrixError
from weingarten.operators import Layout
from weingarten.symmetry import Isotypic
from weingarten.tree import Space


def spd(n: int, seed: int) -> torch.Tensor:
    x = normal(n, n + 2, seed=seed)
    return x @ x.mT / n + 0.1 * torch.eye(n, dtype=x.dtype)


def stack(groups: int, n: int, seed: int) -> torch.Tensor:
    return torch.stack([spd(n, seed + g) for g in range(groups)])


WITH_BIAS = Layout(Space.of({"w": normal(2, 3), "b": normal(2)}))
GROUPED = Layout(Space.of({"w": normal(4, 2, 2), "b": normal(4)}), groups=2)
TABLE = Layout(Space.of({"e": normal(4, 2)}), transposed=True)
INPUTS_FIRST = Layout(Space.of({"w": normal(3, 2), "b": normal(2)}), transposed=True)
HEAD = Layout(Space.of({"w": normal(3, 2), "b": normal(3)}), axis=1, transposed=True)
TRANSPOSED = Layout(Space.of({"w": normal(4, 2, 2), "b": normal(4)}), groups=2, transposed=True)
NORM = Layout(Space.of({"gain": normal(2), "shift": normal(2)}), axis=1)


def kronecker() -> wg.Kronecker:
    return wg.Kronecker(WITH_BIAS, stack(1, 4, 0), stack(1, 2, 5))


def eigenbasis() -> wg.Eigenbasis:
    basis = kronecker().diagonalise()
    return wg.Eigenbasis(WITH_BIAS, basis.left, basis.right, normal(1, 2, 4, seed=8) ** 2 + 0.1)


CURVATURES = {
    "Kronecker": kronecker,
    "Kronecker, groups": lambda: wg.Kronecker(GROUPED, stack(2, 5, 0), stack(2, 2, 5)),
    "Kronecker, diagonal inputs": lambda: wg.Kronecker(TABLE, normal(1, 4) ** 2 + 0.1, stack(1, 2, 5)),
    "Kronecker, diagonal outputs": lambda: wg.Kronecker(WITH_BIAS, stack(1, 4, 0), normal(1, 2) ** 2 + 0.1),
    "Kronecker, both diagonal": lambda: wg.Kronecker(
        GROUPED, normal(2, 5) ** 2 + 0.1, normal(2, 2, seed=1) ** 2 + 0.1
    ),
    "Kronecker, inputs first": lambda: wg.Kronecker(INPUTS_FIRST, stack(1, 4, 0), stack(1, 2, 5)),
    "Kronecker, head inputs first": lambda: wg.Kronecker(HEAD, normal(1, 3) ** 2 + 0.1, stack(1, 3, 5)),
    "Kronecker, transposed convolution": lambda: wg.Kronecker(TRANSPOSED, stack(2, 5, 0), stack(2, 2, 5)),
    "Kronecker, norm layer": lambda: wg.Kronecker(NORM, stack(1, 1, 0), stack(1, 4, 5)),
    "Eigenbasis": eigenbasis,
    "Eigenbasis, groups": lambda: wg.Kronecker(GROUPED, stack(2, 5, 0), stack(2, 2, 5)).diagonalise(),
    "Eigenbasis, diagonal inputs": lambda: wg.Kronecker(
        TABLE, normal(1, 4) ** 2 + 0.1, stack(1, 2, 5)
    ).diagonalise(),
    "Eigenbasis, diagonal outputs": lambda: wg.Kronecker(
        WITH_BIAS, stack(1, 4, 0), normal(1, 2) ** 2 + 0.1
    ).diagonalise(),
    "Eigenbasis, both diagonal": lambda: wg.Eigenbasis(GROUPED, None, None, normal(2, 2, 5) ** 2 + 0.1),
    "DiagonalCurvature": lambda: wg.DiagonalCurvature(
        {"w": normal(2, 3) ** 2 + 0.1, "b": normal(2) ** 2 + 0.1}
    ),
    "BlockDiagonal, equal sizes": lambda: wg.BlockDiagonal(
        [
            kronecker(),
            wg.Kronecker(Layout(Space.of({"v": normal(4, 4)})), normal(1, 4) ** 2 + 0.1, stack(1, 4, 7)),
            wg.Kronecker(Layout(Space.of({"u": normal(2, 4)})), stack(1, 4, 3), stack(1, 2, 9)),
        ]
    ),
    "BlockDiagonal": lambda: wg.BlockDiagonal(
        [kronecker(), wg.DiagonalCurvature({"z": normal(3) ** 2 + 0.1})], order=["b", "z", "w"]
    ),
}


def low_rank(rank: int, rest: float) -> wg.LowRank:
    basis = torch.linalg.qr(normal(8, rank)).Q
    return wg.LowRank(WITH_BIAS.space, basis, normal(rank, seed=1) ** 2 + 0.1, rest)


CURVATURES |= {"LowRank": lambda: low_rank(3, 0.3), "LowRank, full": lambda: low_rank(8, 0.0)}

ORBITS = {
    "coupled": ({"w": "h .", "b": "h"}, {"h": wg.Permutation()}),
    "square": ({"w": "h h", "b": "h"}, {"h": wg.Permutation()}),
    "slices": ({"w[0:2]": "s .", "w[2:4]": "r .", "b": "."}, {"s": wg.Signs(), "r": wg.Rotation()}),
    "heads": ({"w": "h k", "b": "k"}, {"h": wg.Wreath(2), "k": wg.Permutation()}),
}


def commutant(name: str) -> wg.Commutant:
    spec, groups = ORBITS[name]
    params = {"w": normal(4, 4 if name in ("square", "heads") else 2), "b": normal(4, seed=1)}
    isotypic = Isotypic(wg.Symmetry.parse(spec, **groups), params)
    blocks = {
        key: stack(block.count, block.multiplicity, 10 * i)
        for i, (key, block) in enumerate(isotypic.blocks.items())
    }
    return wg.Commutant(isotypic, blocks)


CURVATURES |= {f"Commutant, {name}": lambda name=name: commutant(name) for name in ORBITS}


def exact(kind: type[wg.Operator], name: str) -> wg.Operator:
    problem = PROBLEMS[name]
    objective = problem.objective()
    return kind(objective, problem.batches(WEIGHTS), problem.at(objective))


OPERATORS = CURVATURES | {
    "GGN": lambda: exact(wg.GGN, "mlp, squared error"),
    "Hessian": lambda: exact(wg.Hessian, "mlp, squared error"),
    "FiniteDifferenceHessian": lambda: exact(wg.FiniteDifferenceHessian, "mlp, squared error"),
    "GGN of a function": lambda: exact(wg.GGN, "function"),
    "Identity": lambda: wg.Identity(WITH_BIAS.space),
    "Sum": lambda: kronecker() + wg.Identity(WITH_BIAS.space),
    "Scaled": lambda: -2.5 * kronecker(),
}


@pytest.fixture(params=OPERATORS, name="operator")
def _operator(request) -> wg.Operator:
    return OPERATORS[request.param]()


@pytest.fixture(params=CURVATURES, name="curvature")
def _curvature(request) -> wg.Curvature:
    return CURVATURES[request.param]()


def two(space: Space) -> tuple[tree.Tree, tree.Tree]:
    return space.randn(generator(1)), space.randn(generator(2))


class TestOperator:
    def test_is_symmetric(self, operator):
        v, w = two(operator.space)
        torch.testing.assert_close(tree.dot(v, operator.apply(w)), tree.dot(w, operator.apply(v)))
        dense = operator.dense()
        torch.testing.assert_close(dense, dense.mT)

    def test_is_linear(self, operator):
        v, w = two(operator.space)
        found = operator.apply(tree.axpy(2.5, v, w))
        torch.testing.assert_close(found, tree.axpy(2.5, operator.apply(v), operator.apply(w)))

    def test_apply_is_the_dense_product_in_any_order_of_leaves(self, operator):
        v, _ = two(operator.space)
        before = {name: leaf.clone() for name, leaf in v.items()}
        found = operator.apply(dict(reversed(v.items())))
        torch.testing.assert_close(
            operator.space.flatten(found), operator.dense() @ operator.space.flatten(v)
        )
        assert all(torch.equal(v[name], before[name]) for name in v)
        assert {name: leaf.shape for name, leaf in found.items()} == operator.space.shapes

    def test_algebra(self, operator):
        dense, identity = operator.dense(), wg.Identity(operator.space)
        eye = torch.eye(len(dense), dtype=dense.dtype)
        torch.testing.assert_close((operator + 0.5 * identity).dense(), dense + 0.5 * eye)
        torch.testing.assert_close((operator * 3.0).dense(), 3 * dense)
        torch.testing.assert_close((operator @ operator).dense(), dense @ dense)

    def test_to_scipy(self, operator):
        linear, v = operator.to_scipy(), normal(operator.space.size)
        torch.testing.assert_close(torch.as_tensor(linear @ v.numpy()), operator.dense() @ v)
        top = eigsh(linear, k=1, return_eigenvectors=False, v0=v.numpy())
        spectrum = torch.linalg.eigvalsh(operator.dense())
        assert abs(top[0]) == pytest.approx(float(spectrum.abs().max()))

    def test_wrong_leaves_are_refused_by_name(self, operator):
        v, _ = two(operator.space)
        first = next(iter(v))
        with pytest.raises(ValueError, match=f"missing \\['{first}'\\] and unexpected \\['other'\\]"):
            operator.apply({name if name != first else "other": leaf for name, leaf in v.items()})
        with pytest.raises(ValueError, match=f"leaf '{first}' has shape"):
            operator.apply(v | {first: torch.zeros(17, dtype=torch.float64)})

    def test_other_spaces_are_refused(self, operator):
        other = wg.Identity(Space.of({"elsewhere": torch.zeros(2)}))
        for symbol, combine in (("+", lambda: operator + other), ("@", lambda: operator @ other)):
            with pytest.raises(ValueError, match=f"Operator \\{symbol}: .*elsewhere"):
                combine()


FUNCTIONS = [
    wg.Power(-1, 0.3),
    wg.Power(-1),
    wg.Power(-0.5, 0.1),
    wg.Power(0.5),
    wg.Power(2, 0.2),
    wg.Log(0.5),
    wg.Log(),
    wg.Shift(0.7),
    wg.Scale(2.5),
    wg.Scale(0.0),
]


class TestCurvature:
    @pytest.mark.parametrize("function", FUNCTIONS, ids=str)
    def test_map_is_the_function_of_the_spectrum(self, curvature, function):
        spectrum, basis = torch.linalg.eigh(curvature.dense())
        expected = basis @ torch.diag(function(spectrum)) @ basis.mT
        found = curvature.map(function)
        torch.testing.assert_close(found.dense(), expected)
        torch.testing.assert_close(found.trace(), expected.trace())
        torch.testing.assert_close(found.space.flatten(found.diag()), expected.diagonal())
        assert found.space.shapes == curvature.space.shapes

    def test_trace_and_diag(self, curvature):
        dense = curvature.dense()
        torch.testing.assert_close(curvature.trace(), dense.trace())
        torch.testing.assert_close(curvature.space.flatten(curvature.diag()), dense.diagonal())

    def test_derived(self, curvature):
        dense, space = curvature.dense(), curvature.space
        damped = dense + 0.4 * torch.eye(len(dense), dtype=dense.dtype)
        v, _ = two(space)
        flat = space.flatten(v)
        torch.testing.assert_close(space.flatten(curvature.solve(v, 0.4)), torch.linalg.solve(damped, flat))
        torch.testing.assert_close(space.flatten(curvature.solve(v)), torch.linalg.solve(dense, flat))
        half = curvature.power(-0.5, 0.4).dense()
        torch.testing.assert_close(half @ half, torch.linalg.inv(damped))
        torch.testing.assert_close(curvature.shift(0.4).dense(), damped)
        torch.testing.assert_close(curvature.scale(1.5).dense(), 1.5 * dense)
        torch.testing.assert_close(curvature.logdet(0.4), torch.logdet(damped))
        torch.testing.assert_close(curvature.quadratic(v), flat @ dense @ flat)

    def test_sample_has_the_inverse_as_second_moment(self, curvature):
        g, space = generator(4), curvature.space
        draws = torch.stack([space.flatten(curvature.sample(g, damping=0.5)) for _ in range(600)])
        expected = torch.linalg.inv(curvature.dense() + 0.5 * torch.eye(space.size, dtype=torch.float64))
        assert (draws.mT @ draws / len(draws) - expected).norm() < 0.35 * expected.norm()
        assert draws.mean(0).norm() < 0.2 * expected.trace().sqrt()
        first, second = (curvature.sample(generator(9), 0.5) for _ in range(2))
        torch.testing.assert_close(first, second, rtol=0, atol=0)

    def test_many_vectors_through_vmap(self, curvature):
        many = [curvature.space.randn(generator(s)) for s in range(4)]
        stacked = {name: torch.stack([v[name] for v in many]) for name in many[0]}
        found = torch.func.vmap(curvature.apply)(stacked)
        for i, v in enumerate(many):
            torch.testing.assert_close({name: leaf[i] for name, leaf in found.items()}, curvature.apply(v))

    def test_singular_is_refused(self, curvature):
        zero = curvature.scale(0.0)
        with pytest.raises(SingularMatrixError, match="damping > 0"):
            zero.solve(curvature.space.randn(generator()))
        with pytest.raises(SingularMatrixError):
            zero.logdet()
        assert zero.logdet(1.0).abs() < 1e-12


@pytest.mark.parametrize("exponent", [-1, -0.5, 0.5])
@pytest.mark.parametrize("name", [name for name in CURVATURES if name.startswith("Kronecker")])
def test_factored_power_against_its_dense_formula(name, exponent):
    curvature, damping = CURVATURES[name](), 0.3
    inputs, outputs = curvature.inputs, curvature.outputs
    inputs = torch.diag_embed(inputs) if inputs.ndim == 2 else inputs
    outputs = torch.diag_embed(outputs) if outputs.ndim == 2 else outputs

    def power(matrix):
        spectrum, basis = torch.linalg.eigh(matrix)
        return basis @ torch.diag(spectrum**exponent) @ basis.mT

    v = curvature.space.randn(generator(1))
    merged, expected = curvature.layout.merge(v), []
    for a, b, w in zip(inputs, outputs, merged, strict=True):
        if 1 in (len(a), len(b)):  # a number: all of the damping goes to the other factor
            whole = torch.kron(b, a) + damping * torch.eye(len(a) * len(b), dtype=a.dtype)
            expected.append((power(whole) @ w.reshape(-1)).reshape(w.shape))
            continue
        pi = ((a.trace() / len(a)) / (b.trace() / len(b))).sqrt()
        left = power(b + damping**0.5 / pi * torch.eye(len(b), dtype=b.dtype))
        right = power(a + damping**0.5 * pi * torch.eye(len(a), dtype=a.dtype))
        expected.append((torch.kron(left, right) @ w.reshape(-1)).reshape(w.shape))
    found = curvature.map(wg.FactoredPower(exponent, damping)).apply(v)
    torch.testing.assert_close(curvature.layout.merge(found), torch.stack(expected))


@pytest.mark.parametrize("name", [name for name in CURVATURES if not name.startswith(("Kronecker", "Block"))])
def test_factored_power_is_power_elsewhere(name):
    curvature = CURVATURES[name]()
    found, expected = (curvature.map(f(-1, 0.3)).dense() for f in (wg.FactoredPower, wg.Power))
    torch.testing.assert_close(found, expected)


def test_factored_power_of_a_dead_layer_is_finite():
    dead = wg.Kronecker(WITH_BIAS, stack(1, 4, 0), torch.zeros(1, 2, 2, dtype=torch.float64))
    b = WITH_BIAS.space.randn(generator())
    for leaf in dead.map(wg.FactoredPower(-1, 1e-2)).apply(b).values():
        assert torch.isfinite(leaf).all()


def test_kronecker_is_output_factor_times_input_factor():
    curvature = kronecker()
    space = Space.of({"w": normal(2, 3)})
    plain = wg.Kronecker(Layout(space), curvature.inputs[:, :3, :3], curvature.outputs)
    torch.testing.assert_close(plain.dense(), torch.kron(curvature.outputs[0], curvature.inputs[0, :3, :3]))
    assert repr(plain) == "Kronecker(w: 2 x 3, 6 parameters)"


def test_operators_are_joined_with_operators_alone():
    one = kronecker()
    with pytest.raises(
        TypeError, match=r"Operator @: found dict, expected another operator; .* is apply\(v\)"
    ):
        one @ one.space.zeros()
    with pytest.raises(TypeError, match=r"Operator \+: found int, expected another operator"):
        one + 1


def test_block_diagonal_is_checked():
    one = wg.DiagonalCurvature({"w": normal(2) ** 2})
    with pytest.raises(ValueError, match="'w' belongs to two blocks"):
        wg.BlockDiagonal([one, one])
    with pytest.raises(ValueError, match="order names"):
        wg.BlockDiagonal([one], order=["w", "x"])
    with pytest.raises(ValueError, match="no block"):
        wg.BlockDiagonal([])


def test_half_precision_keeps_its_space_and_reaches_scipy():
    space = Space.of({"w": torch.zeros(2, 2, dtype=torch.bfloat16), "b": torch.zeros(2)})
    assert space.dtype == torch.float32
    curvature = wg.DiagonalCurvature({"w": torch.ones(2, 2), "b": torch.ones(2)}, space)
    assert {n: x.dtype for n, x in curvature.solve(space.zeros(), 1.0).items()} == space.dtypes
    only = Space.of({"w": torch.zeros(3, dtype=torch.bfloat16)})
    linear = wg.Identity(only).to_scipy()
    assert (linear @ torch.ones(3).numpy()).tolist() == [1.0, 1.0, 1.0]
