"""The orbit average of per-datum moments, against the moments themselves, datum by datum, averaged over the group."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import weingarten as wg
from tests.cases import PROBLEMS, WEIGHTS, N, Problem, generator, initialised, integers, normal
from weingarten.estimators import orbit_fisher
from weingarten.estimators.orbit_rows import Factored, moment_of
from weingarten.reference import datum, dense_ggn, jacobian
from weingarten.reference_orbit import orbit_average
from weingarten.symmetry import Isotypic, Symmetry
from weingarten.tree import Space

P, B, S, R = wg.Permutation(), wg.SignedPermutation(), wg.Signs(), wg.Rotation()
EXTRA = {
    "groups": Problem(
        lambda: nn.Sequential(nn.Conv1d(4, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)),
        wg.CrossEntropy(),
        normal(N, 4, 3),
        integers(2, N),
    ),
    "narrow": Problem(
        lambda: nn.Sequential(nn.Conv1d(2, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)),
        wg.CrossEntropy(),
        normal(N, 2, 4),
        integers(2, N),
    ),
}
MLP = {"0.weight": "h .", "0.bias": "h", "2.weight": ". h", "2.bias": "."}
POSITIONS = "positions, ignored"

# name -> problem, words, groups: every layer in several kinds of words
CASES: dict[str, tuple[str, dict[str, str], dict[str, wg.groups.Action]]] = {
    "linear": ("mlp", MLP, {"h": P}),
    "linear, both sides": ("mlp", {**MLP, "0.weight": "h i", "2.weight": "a h", "2.bias": "a"}, {"h": P, "i": B, "a": P}),
    "linear, names in reverse": ("mlp", {**MLP, "0.weight": "h a", "2.weight": "z h", "2.bias": "z"}, {"h": P, "a": P, "z": S}),
    "linear, wreath": ("mlp", MLP, {"h": wg.Wreath(2)}),
    "linear, wreath of permutations": ("mlp", MLP, {"h": wg.Wreath(2, P)}),
    "linear, wreath in place": ("mlp", MLP, {"h": wg.Wreath(2, P, None)}),
    "linear, conjugated": ("mlp", MLP, {"h": wg.Conjugated(S, torch.linalg.qr(normal(4, 4))[0])}),
    "linear, split rows": ("mlp", {**MLP, "0.weight": "(h .) .", "0.bias": "(h .)", "2.weight": ". (h .)"}, {"h": P}),
    "linear, two names on one side": (
        "mlp", {**MLP, "0.weight": "(h g) .", "0.bias": "(h g)", "2.weight": ". (h g)"}, {"h": P, "g": S}
    ),
    "linear, merged": ("mlp", {**MLP, "0.weight": ".[2]", "2.weight": "k[2]"}, {"k": P, "h": P}),
    "linear, free": ("mlp", dict.fromkeys(("0.weight", "2.weight"), ". .") | dict.fromkeys(("0.bias", "2.bias"), "."), {}),
    "linear, slices": (
        "mlp",
        {"0.weight[0:2]": "g .", "0.weight[2:4]": "k .", "0.bias[0:2]": "g", "0.bias[2:4]": "k", "2.weight[0:3,0:2]": ". g",
         "2.weight[:,2:]": ". k", "2.bias": "."},
        {"g": P, "k": R},
    ),
    "positions": (POSITIONS, MLP, {"h": P}),
    "positions, rotation": (POSITIONS, {**MLP, "0.weight": "h i"}, {"h": R, "i": P}),
    "positions, signs": (POSITIONS, {**MLP, "2.weight": "k h", "2.bias": "k"}, {"h": S, "k": S}),
    "conv": (
        "conv net",
        {"0.weight": "h . . .", "0.bias": "h", "2.weight": "k h . .", "2.bias": "k", "3.weight": "k", "3.bias": "k",
         "6.weight": ". k", "6.bias": "."},
        {"h": P, "k": P},
    ),
    "conv, more words": (
        "conv net",
        {"0.weight": "h .[2] x", "0.bias": "h", "2.weight": "k . y .", "2.bias": ".", "3.weight": "k", "3.bias": ".",
         "6.weight": "o k", "6.bias": "o"},
        {"h": B, "k": R, "x": P, "y": S, "o": S},
    ),
    "conv into linear": ("narrow", {"0.weight": "h . .", "0.bias": "h", "3.weight": ". (h .)", "3.bias": "."}, {"h": P}),
    "conv, channel groups": ("groups", {"0.weight": "h . .", "0.bias": "h", "3.weight": ". (h .)", "3.bias": "."}, {"h": P}),
    "square": ("tied", {"embed.weight": ". h", "mix.weight": "h h", "mix.bias": "h"}, {"h": R}),
    "tied": ("tied", {"embed.weight": ". h", "mix.weight": ". h", "mix.bias": "."}, {"h": P}),
    "attention": (
        "attention",
        {"q.weight": "a .", "q.bias": "a", "k.weight": "a .", "k.bias": "a", "v.weight": "b .", "v.bias": "b",
         "out.weight": ". b", "out.bias": "."},
        {"a": R, "b": R},
    ),
    "embedding": ("tokens", {"0.weight": ". h", "2.weight": ". h", "2.bias": "."}, {"h": P}),
    "norm": (
        "norm and dropout",
        {"0.weight": "h .", "0.bias": "h", "1.weight": "h", "1.bias": "h", "4.weight": ". h", "4.bias": "."},
        {"h": P},
    ),
    "function": ("function", {"first": ". h", "second": "h ."}, {"h": P}),
}  # fmt: skip


def problem_of(name: str) -> Problem:
    return (PROBLEMS | EXTRA)[CASES[name][0]]


def symmetry_of(name: str) -> Symmetry:
    sizes = {"h": 2} if name in ("linear, split rows", "linear, two names on one side") else None
    return Symmetry.parse(CASES[name][1], sizes, **CASES[name][2])


def averaged(matrix: Tensor, symmetry: Symmetry, params: dict[str, Tensor]) -> Tensor:
    """``E[A M A^T]`` by the eigenvectors of M, one orbit moment each (which are tested against enumeration)."""
    space, total = Space.of(params), torch.zeros_like(matrix)
    values, vectors = torch.linalg.eigh(matrix)
    for value, v in zip(values, vectors.mT, strict=True):
        if value.abs() > 1e-13 * values.abs().max():
            total += value * wg.orbit_moment(symmetry, space.unflatten(v)).dense()
    return total


def moment(fisher: wg.Fisher, problem: Problem, batches: list[wg.Batch], seed: int = 0) -> Tensor:
    """``(1/M) sum_n sum_k (J_n^T s_nk)(J_n^T s_nk)^T`` with dense Jacobians, datum by datum."""
    objective = problem.objective()
    params, g = problem.at(objective), generator(seed)
    total: Tensor | float = 0.0
    for batch in batches:
        with torch.no_grad(), wg.objective.curvature_pass(objective.model):
            output = objective.forward(params, batch.inputs)
        for columns in fisher.weighted(objective.loss, output, batch.targets, batch.weights, g):
            for n in range(len(batch.targets)):
                s = columns[:, n].flatten(1) @ jacobian(objective, datum(batch, n), params)
                total = total + s.mT @ s
    return total / objective.count(batches)


def estimate(fisher: wg.Fisher, name: str, batches=None, symmetry=None, **options) -> wg.Commutant:
    problem, symmetry = problem_of(name), symmetry or symmetry_of(name)
    objective = problem.objective()
    estimator = wg.OrbitFisher(symmetry, fisher, **options)
    data = batches or problem.batches(WEIGHTS)
    return wg.estimate(estimator, objective, data, problem.at(objective), generator(0))


CLOSE = {"rtol": 0, "atol": 1e-12}


@pytest.mark.parametrize("name", CASES)
class TestEveryLayer:
    def test_exact_is_the_average_of_the_ggn(self, name):
        problem = problem_of(name)
        objective = problem.objective()
        params = problem.at(objective)
        ggn = dense_ggn(objective, problem.batches(WEIGHTS), params)
        expected = averaged(ggn, symmetry_of(name), params)
        torch.testing.assert_close(estimate(wg.Exact(), name).dense(), expected, **CLOSE)
        uncoupled = symmetry_of(name).uncoupled()
        expected = averaged(ggn, uncoupled, params)
        torch.testing.assert_close(estimate(wg.Exact(), name, symmetry=uncoupled).dense(), expected, **CLOSE)

    def test_factored_and_materialised_moments_agree(self, name, monkeypatch):
        factored = estimate(wg.Exact(), name)
        monkeypatch.setattr(orbit_fisher, "factor", lambda *args: None)
        torch.testing.assert_close(estimate(wg.Exact(), name).blocks, factored.blocks, **CLOSE)
        monkeypatch.setattr(orbit_fisher, "_factored", lambda block: False)  # all by vmap
        torch.testing.assert_close(estimate(wg.Exact(), name).blocks, factored.blocks, **CLOSE)


@pytest.mark.parametrize("name", ["linear", "positions", "conv", "function"])
def test_chunks_of_data_add_up(name, monkeypatch):
    whole = estimate(wg.Exact(), name)
    monkeypatch.setattr(orbit_fisher, "_CHUNK", 2)
    torch.testing.assert_close(estimate(wg.Exact(), name).blocks, whole.blocks, **CLOSE)


@pytest.mark.parametrize("fisher", [wg.Exact(), wg.MonteCarlo(), wg.MonteCarlo(3), wg.Empirical()], ids=str)
@pytest.mark.parametrize("name", ["linear", "positions", "conv", "function"])
def test_every_fisher(name, fisher):
    problem = problem_of(name)
    params = problem.at(problem.objective())
    for batches in (problem.batches(WEIGHTS), [problem.whole()]):
        expected = averaged(moment(fisher, problem, batches), symmetry_of(name), params)
        torch.testing.assert_close(estimate(fisher, name, batches).dense(), expected, **CLOSE)


@pytest.mark.parametrize("name", ["linear", "embedding"])
def test_against_enumeration(name):
    problem = problem_of(name)
    objective = problem.objective()
    params = problem.at(objective)
    ggn = dense_ggn(objective, [problem.whole(WEIGHTS)], params)
    expected = orbit_average(ggn, symmetry_of(name), params)
    torch.testing.assert_close(estimate(wg.Exact(), name).dense(), expected, **CLOSE)


def test_decay_averages_batches_by_their_elements():
    problem, decay = problem_of("linear"), 0.6
    batches = problem.batches(WEIGHTS)
    sizes = [len(batch.targets) * decay ** (2 - i) for i, batch in enumerate(batches)]
    alone = [estimate(wg.Exact(), "linear", [batch]).dense() for batch in batches]
    expected = sum(s * c for s, c in zip(sizes, alone, strict=True)) / sum(sizes)
    torch.testing.assert_close(estimate(wg.Exact(), "linear", decay=decay).dense(), expected, **CLOSE)


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(found):
            if isinstance(x, Tensor):
                self.entries = max(self.entries, x.numel())
        return found


@pytest.mark.parametrize("group", [P, B, R, wg.Wreath(5)], ids=str)
@pytest.mark.parametrize("fisher", [wg.MonteCarlo(), wg.Empirical()], ids=str)
def test_no_per_datum_gradient_of_a_linear_layer_is_formed(group, fisher):
    """Neither of the wide layer, nor of the whole: with one position, moments come from inner products."""
    data, width, inputs = 64, 40, 30
    model = initialised(nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, 3)))
    objective = wg.Objective(model, wg.CrossEntropy())
    symmetry = Symmetry.parse(MLP, h=group)
    batch = (normal(data, inputs), integers(3, data))
    with Largest() as seen:
        found = wg.estimate(wg.OrbitFisher(symmetry, fisher), objective, [batch])
    # no more than the layer's rows, its inputs, or the largest Gram matrix
    assert seen.entries <= max(
        data * width, data * (inputs + 1), width * inputs, (inputs + 4) ** 2, data * inputs * 3
    )
    assert seen.entries < data * width * inputs / 5
    assert found.trace() > 0


NAMES = [(("a", "x"),), (("b", "y"),), (("a", "x"), ("b", "y")), ()]


@pytest.mark.parametrize("positions", [(1, 1), (2, 3), (7, 7)])
@pytest.mark.parametrize("count", [1, 2])
def test_moments_of_factors_are_those_of_what_they_stand_for(positions, count):
    """Two parts that share kinds, with a name on either side: counts, lengths and free axes stay in order."""

    def side(names, t: int, free: int, seed: int) -> Tensor:
        sizes = {"a": (count, 3), "b": (1, 4)}[names[0][0]] if names else (1, 1)
        return normal(4, t, *sizes, free, seed=seed)

    for first_out, first_in, second_out, second_in in (
        (NAMES[0], NAMES[1], NAMES[0], NAMES[1]),
        (NAMES[0], NAMES[1], NAMES[1], NAMES[0]),
        (NAMES[1], NAMES[0], NAMES[1], NAMES[0]),
        (NAMES[0], (), NAMES[0], ()),
        (NAMES[0], (), (), NAMES[0]),
        ((), NAMES[0], (), NAMES[0]),
        ((), (), (), ()),
    ):
        first, second = (
            Factored(side(out, t, 2, seed), side(inputs, t, 5, seed + 1), out, inputs)
            for out, inputs, t, seed in (
                (first_out, first_in, positions[0], 0),
                (second_out, second_in, positions[1], 7),
            )
        )
        names = tuple(sorted((*first_out, *first_in)))
        expected = torch.einsum("nclx,ncly->cxy", first.dense(), second.dense())
        torch.testing.assert_close(moment_of(first, second, names), expected)
        torch.testing.assert_close(moment_of(first.dense(), second, names), expected)


def test_frozen_leaves_are_left_out():
    objective = problem_of("linear").objective()
    objective.model[0].weight.requires_grad_(False)
    symmetry = symmetry_of("linear").restrict(["0.bias", "2.weight", "2.bias"])
    data = problem_of("linear").batches(WEIGHTS)
    found = wg.estimate(wg.OrbitFisher(symmetry, wg.Exact()), objective, data)
    expected = averaged(dense_ggn(objective, data, objective.params()), symmetry, objective.params())
    torch.testing.assert_close(found.dense(), expected, **CLOSE)
    assert Isotypic(symmetry, objective.params()).space.size == found.space.size


class Twice(nn.Module):
    """One layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


def test_a_layer_called_twice_is_treated_exactly():
    objective = wg.Objective(initialised(Twice()), wg.CrossEntropy())
    data, params = [(normal(N, 3), integers(2, N))], objective.params()
    words = {"layer.weight": ". .", "layer.bias": ".", "head.weight": "k .", "head.bias": "k"}
    symmetry = Symmetry.parse(words, k=P)
    found = wg.estimate(wg.OrbitFisher(symmetry, wg.Exact()), objective, data)
    expected = orbit_average(dense_ggn(objective, data, params), symmetry, params)
    torch.testing.assert_close(found.dense(), expected, rtol=0, atol=1e-12)
