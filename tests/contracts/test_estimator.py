"""Every estimator over every model: what an estimate must be, whatever it approximates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

import weingarten as wg
from tests.cases import PROBLEMS, WEIGHTS, N, Problem, generator, rows


class Anywhere(wg.Estimator):
    """An orbit estimator with a symmetry for whatever parameters there are: one name per layer, on first axes of one length."""

    def __init__(self, make: Callable[[wg.Symmetry], wg.Estimator], group: wg.groups.Action) -> None:
        self.make, self.group = make, group

    def init(self, objective, params):
        spec, lengths = {}, {}
        for leaf, p in params.items():
            layer = f"{leaf.rpartition('.')[0] or leaf}-rows"
            moved = lengths.setdefault(layer, len(p)) == len(p)
            spec[leaf] = f"{layer if moved else '.'} {'. ' * (p.ndim - 1)}"
        groups = dict.fromkeys(lengths, self.group)
        estimator = self.make(wg.Symmetry.parse(spec, params=params, **groups).by_component())
        return estimator, estimator.init(objective, params)

    def update(self, state, objective, params, batch, generator):
        return state[0], state[0].update(state[1], objective, params, batch, generator)

    def read(self, state):
        return state[0].read(state[1])


ESTIMATORS: dict[str, wg.Estimator] = {
    "KFAC": wg.KFAC(),
    "KFAC exact": wg.KFAC(wg.Exact()),
    "KFAC empirical, reduce": wg.KFAC(wg.Empirical(), wg.Reduce()),
    "EKFAC": wg.EKFAC(wg.MonteCarlo(2)),
    "EKFAC exact": wg.EKFAC(wg.Exact()),
    "Diagonal": wg.Diagonal(),
    "Diagonal sampled": wg.Diagonal(wg.MonteCarlo(2)),
    "Orbit": Anywhere(wg.Orbit, wg.Permutation()),
    "OrbitSecant": Anywhere(wg.OrbitSecant, wg.SignedPermutation()),
    "OrbitFisher": Anywhere(wg.OrbitFisher, wg.Permutation()),
    "OrbitFisher exact": Anywhere(lambda s: wg.OrbitFisher(s.uncoupled(), wg.Exact()), wg.Rotation()),
}
DETERMINISTIC = [
    "KFAC exact", "KFAC empirical, reduce", "EKFAC exact", "Diagonal", "Orbit", "OrbitSecant", "OrbitFisher exact"
]  # fmt: skip


def accepted(names: list[str]) -> list[pytest.param]:
    return [
        pytest.param(ESTIMATORS[e], problem, id=f"{e} - {p}")
        for e in names
        for p, problem in PROBLEMS.items()
        if problem.kfac or isinstance(ESTIMATORS[e], wg.Diagonal | Anywhere)
    ]


def estimate(estimator: wg.Estimator, problem: Problem, data, seed: int = 0) -> wg.Curvature:
    objective = problem.objective()
    return wg.estimate(estimator, objective, data, problem.at(objective), generator(seed))


def factors(curvature: wg.Curvature) -> dict[str, torch.Tensor]:
    """Input and output factors of KFAC, by block."""
    return {
        f"{kind} {', '.join(block.space.shapes)}": getattr(block, kind)
        for block in curvature.blocks
        for kind in ("inputs", "outputs")
    }


@pytest.mark.parametrize(("estimator", "problem"), accepted(list(ESTIMATORS)))
class TestAnyEstimator:
    def test_space_is_the_parameters_in_order_and_psd(self, estimator, problem):
        objective = problem.objective()
        params = problem.at(objective)
        curvature = estimate(estimator, problem, problem.batches(WEIGHTS))
        assert list(curvature.space.shapes) == list(params)
        assert curvature.space.shapes == {name: p.shape for name, p in params.items()}
        dense = curvature.dense()
        torch.testing.assert_close(dense, dense.mT)
        spectrum = torch.linalg.eigvalsh(dense)
        assert spectrum[0] >= -1e-10 * spectrum[-1]
        assert spectrum[-1] > 0

    def test_repeats_and_leaves_the_global_generator_alone(self, estimator, problem):
        objective = problem.objective()
        params, before = problem.at(objective), torch.get_rng_state()
        first, second = (
            wg.estimate(estimator, objective, problem.batches(), params, generator(3)).dense()
            for _ in range(2)
        )
        assert torch.equal(first, second)
        wg.estimate(estimator, objective, problem.batches(), params)  # without a generator
        assert torch.equal(before, torch.get_rng_state())

    def test_model_is_untouched(self, estimator, problem):
        objective = problem.objective()
        before = snapshot(objective.model)
        with torch.no_grad():
            wg.estimate(estimator, objective, problem.batches(WEIGHTS), problem.at(objective))
        assert_same(before, snapshot(objective.model))

    def test_model_is_untouched_after_an_exception(self, estimator, problem):
        objective = problem.objective()
        if not isinstance(objective.model, nn.Module):
            pytest.skip("a function has no state")
        before = snapshot(objective.model)
        wrong = replace(problem.batches()[1], targets=torch.zeros(2, 99, dtype=torch.float64))
        with pytest.raises(ValueError, match="target has shape"):
            wg.estimate(estimator, objective, [problem.batches()[0], wrong])
        negative = problem.whole(torch.full((N,), -1.0, dtype=torch.float64))
        with pytest.raises(ValueError, match="weight of datum 0 is -1"):
            wg.estimate(estimator, objective, [negative])
        assert_same(before, snapshot(objective.model))

    def test_weights_of_one_are_no_weights_and_weights_scale(self, estimator, problem):
        plain = estimate(estimator, problem, problem.batches()).dense()
        ones = torch.ones(N, dtype=torch.float64)
        torch.testing.assert_close(estimate(estimator, problem, problem.batches(ones)).dense(), plain)
        torch.testing.assert_close(estimate(estimator, problem, problem.batches(3 * ones)).dense(), 3 * plain)
        assert not estimate(estimator, problem, problem.batches(0 * ones)).dense().any()

    def test_data_that_ran_out_is_refused(self, estimator, problem):
        used = iter(problem.batches())
        list(used)
        with pytest.raises(ValueError, match="gave no batch"):
            estimate(estimator, problem, used)


def snapshot(model) -> list:
    if not isinstance(model, nn.Module):
        return []
    if model.training:  # make modes differ between submodules once
        list(model.modules())[-1].eval()
    return [
        {name: p.clone() for name, p in model.state_dict().items()},
        [(name, p.requires_grad, p.grad, id(p)) for name, p in model.named_parameters()],
        [
            (name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in model.named_modules()
        ],
    ]


def assert_same(before: list, after: list) -> None:
    torch.testing.assert_close(before[:1], after[:1], rtol=0, atol=0)
    assert before[1:] == after[1:]


@pytest.mark.parametrize(("estimator", "problem"), accepted(DETERMINISTIC))
class TestDeterministicEstimator:
    def test_uneven_batches_are_one_batch(self, estimator, problem):
        several = estimate(estimator, problem, problem.batches(WEIGHTS)).dense()
        torch.testing.assert_close(several, estimate(estimator, problem, [problem.whole(WEIGHTS)]).dense())

    def test_a_weight_of_zero_drops_the_datum(self, estimator, problem):
        zero = torch.ones(N, dtype=torch.float64)
        zero[2] = 0
        kept = [0, 1, 3, 4]
        found = estimate(estimator, problem, [problem.whole(zero)])
        fewer = estimate(estimator, problem, [rows(problem.whole(), kept)])
        ratio = problem.loss.count(problem.targets[kept]) / problem.loss.count(problem.targets)
        if isinstance(estimator, wg.KFAC):  # from the mean of inputs too, and from no divisor
            for name, factor in factors(fewer).items():
                expected = ratio * factor if name.startswith("outputs") else factor
                torch.testing.assert_close(factors(found)[name], expected)
        elif isinstance(estimator, wg.Diagonal):
            torch.testing.assert_close(found.dense(), ratio * fewer.dense())
        else:  # EKFAC: its trace is that of the exact blocks, in whatever basis
            torch.testing.assert_close(found.trace(), ratio * fewer.trace())

    def test_frozen_parameters_are_left_out(self, estimator, problem):
        objective = problem.objective()
        params = problem.at(objective)
        whole = wg.estimate(estimator, objective, problem.batches(), params)
        first = next(iter(params))
        if isinstance(objective.model, nn.Module):
            next(objective.model.parameters()).requires_grad_(False)
            part = wg.estimate(estimator, objective, problem.batches())
            assert list(part.space.shapes) == [name for name in params if name != first]
            if isinstance(estimator, wg.Diagonal):
                expected = {name: d for name, d in whole.diag().items() if name != first}
                torch.testing.assert_close(part.diag(), expected)
            for name in part.space.shapes:  # blocks without a frozen leaf are as before
                if name.rpartition(".")[0] != first.rpartition(".")[0]:
                    torch.testing.assert_close(part.diag()[name], whole.diag()[name])


def test_functions_are_refused_by_name_where_layers_are_needed():
    problem = PROBLEMS["function"]
    for estimator in (wg.KFAC(), wg.EKFAC()):
        with pytest.raises(TypeError, match="the model is a function"):
            estimate(estimator, problem, problem.batches())


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_decay_is_the_exponential_average(decay):
    problem = PROBLEMS["mlp"]
    batches = problem.batches(WEIGHTS)
    factor = [decay ** (len(batches) - 1 - i) for i in range(len(batches))]
    size = [len(batch.targets) for batch in batches]
    weight = [float(batch.weights.sum()) for batch in batches]  # of the rows of inputs
    alone = [estimate(wg.KFAC(wg.Exact()), problem, [batch]) for batch in batches]
    found = factors(estimate(wg.KFAC(wg.Exact(), decay=decay), problem, batches))
    for name, value in found.items():
        each = weight if name.startswith("inputs") else size
        expected = sum(f * s * factors(c)[name] for f, s, c in zip(factor, each, alone, strict=True))
        torch.testing.assert_close(value, expected / sum(f * s for f, s in zip(factor, each, strict=True)))
    diagonals = [estimate(wg.Diagonal(), problem, [batch]).dense() for batch in batches]
    total = sum(f * s for f, s in zip(factor, size, strict=True))
    expected = sum(f * s * d for f, s, d in zip(factor, size, diagonals, strict=True)) / total
    torch.testing.assert_close(estimate(wg.Diagonal(decay=decay), problem, batches).dense(), expected)
    with pytest.raises(ValueError, match="decay is 0"):
        wg.KFAC(decay=0)


@pytest.mark.parametrize("kind", [wg.KFAC, wg.EKFAC, wg.Diagonal])
def test_sampled_labels_converge_to_exact_in_the_mean(kind):
    problem = PROBLEMS["positions, ignored"]
    exact = estimate(
        wg.KFAC(wg.Exact()) if kind is wg.KFAC else wg.Diagonal(), problem, problem.batches(WEIGHTS)
    )
    sampled = estimate(kind(wg.MonteCarlo(3000)), problem, problem.batches(WEIGHTS))
    if kind is wg.KFAC:
        torch.testing.assert_close(
            sampled.dense(), exact.dense(), rtol=0.1, atol=0.03 * float(exact.dense().max())
        )
    else:  # both have the exact trace
        torch.testing.assert_close(sampled.trace(), exact.trace(), rtol=0.05, atol=0)


@pytest.mark.parametrize("estimator", [wg.KFAC(wg.Exact()), wg.EKFAC(), wg.Diagonal()])
def test_all_targets_ignored_is_refused(estimator):
    problem = PROBLEMS["mlp"]
    ignored = replace(problem.whole(), targets=torch.full((N,), -100))
    with pytest.raises(ValueError, match=r"no valid loss element|has seen no data"):
        estimate(estimator, problem, [ignored])


def test_samples_are_checked():
    with pytest.raises(ValueError, match="samples is 0"):
        wg.MonteCarlo(0)
