"""On a GPU everything is what it is on the CPU, in float64.

These tests are skipped where there is no GPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import weingarten as wg
from tests.bilevel.problems import by_row, classification, cosine, decay, outer_variables
from tests.bilevel.runs import ADAM, XV, YV, X, Y, network
from tests.bilevel.runs import METHODS as LOOPED
from tests.bilevel.test_unrolled import away_from_the_minimum
from tests.cases import LAYERS, LOSSES, PROBLEMS, WEIGHTS, Head, generator, initialised, normal
from tests.contracts.test_estimator import DETERMINISTIC, ESTIMATORS
from tests.contracts.test_operator import CURVATURES
from tests.contracts.test_solver import ACCURATE
from tests.devices import GPU, agree, on
from tests.estimators.architectures import TORCH
from weingarten import tree

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)


def estimates(estimator: wg.Estimator, objective: wg.Objective, batches: list[wg.Batch], params=None) -> None:
    """The estimate, products with it and its inverse are the CPU's."""
    found = wg.estimate(estimator, on(objective), on(batches), on(params))
    expected = wg.estimate(estimator, objective, batches, params)
    agree(found.dense(), expected.dense(), rtol=1e-5, atol=1e-8)
    v = expected.space.randn(generator())
    agree(found.apply(on(v)), expected.apply(v), rtol=1e-5, atol=1e-8)
    agree(found.solve(on(v), 0.1), expected.solve(v, 0.1), rtol=1e-5, atol=1e-8)
    agree(found.diag(), expected.diag(), rtol=1e-5, atol=1e-8)
    agree(found.trace(), expected.trace(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("estimator", [wg.KFAC(wg.Exact()), wg.EKFAC(wg.Exact()), wg.Diagonal(wg.Exact())])
def test_layers(name, estimator):
    if (name, type(estimator)) == ("Conv1d circular", wg.EKFAC):
        pytest.skip(
            "its factor has eigenvalues that are equal, so that every device may have a basis of its own"
        )
    make, x = LAYERS[name]
    model = initialised(Head(make()))
    with torch.no_grad():
        shape = model.eval()(x).shape
    estimates(estimator, wg.Objective(model, wg.MSE()), [wg.Batch(x, normal(*shape, seed=2), WEIGHTS)])


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_estimators(name, problem):
    if "KFAC" in name and not problem.kfac:
        pytest.skip("KFAC does not take this model")
    objective = problem.objective()
    estimates(ESTIMATORS[name], objective, problem.batches(WEIGHTS), problem.at(objective))


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - set(DETERMINISTIC)))
def test_estimators_that_draw(name, problem):
    """From a generator on the GPU, and from one of their own."""
    if "KFAC" in name and not problem.kfac:
        pytest.skip("KFAC does not take this model")
    objective = on(problem.objective())
    params = None if problem.params is None else on(problem.params)
    for drawn in (torch.Generator(GPU).manual_seed(1), None):
        given = {} if drawn is None else {"generator": drawn}
        found = wg.estimate(ESTIMATORS[name], objective, on(problem.batches(WEIGHTS)), params, **given)
        assert found.trace().device == GPU
        assert float(found.trace()) > 0


@pytest.mark.parametrize("case", TORCH.values(), ids=TORCH)
def test_architectures(case):
    estimates(wg.KFAC(wg.Exact(), otherwise=wg.Diagonal()), case.objective(), [case.batch()])


@pytest.mark.parametrize(("loss", "output", "target"), LOSSES.values(), ids=LOSSES)
def test_losses(loss, output, target):
    v = normal(*output.shape, seed=5)
    ours = on((output, target))
    agree(loss(*ours), loss(output, target))
    agree(loss.gradient(*ours), loss.gradient(output, target))
    agree(loss.curvature(*ours, on(v)), loss.curvature(output, target, v))
    for found, expected in zip(loss.root(*ours), loss.root(output, target), strict=True):
        agree(found, expected)
    drawn = loss.sample(*ours, torch.Generator(GPU).manual_seed(0))
    assert drawn.device == GPU
    assert drawn.isfinite().all()


@pytest.mark.parametrize("name", CURVATURES)
def test_curvatures(name, tmp_path):
    """Written on the CPU, read on the GPU, written from there and read on the CPU."""
    expected = CURVATURES[name]()
    wg.save(expected, tmp_path / "cpu.safetensors")
    found = wg.load(tmp_path / "cpu.safetensors", GPU)
    v = expected.space.randn(generator())
    agree(found.apply(on(v)), expected.apply(v))
    agree(found.solve(on(v), 0.1), expected.solve(v, 0.1))
    agree(found.dense(), expected.dense())
    agree(found.power(-0.5, 0.1).apply(on(v)), expected.power(-0.5, 0.1).apply(v))
    wg.save(found, tmp_path / "gpu.safetensors")
    back = wg.load(tmp_path / "gpu.safetensors")
    assert torch.equal(back.dense(), expected.dense())


@pytest.mark.parametrize("operator", [wg.GGN, wg.Hessian, wg.FiniteDifferenceHessian])
def test_operators(operator):
    problem = PROBLEMS["mlp"]
    objective = problem.objective()
    found, expected = (
        operator(o, b, o.params())
        for o, b in ((on(objective), on(problem.batches())), (objective, problem.batches()))
    )
    v = expected.space.randn(generator())
    agree(found.apply(on(v)), expected.apply(v), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [name for name, solver in ACCURATE.items() if solver is not None])
def test_solvers(name, tmp_path):
    expected = CURVATURES["Kronecker"]()
    wg.save(expected, tmp_path / "operator.safetensors")
    found, b = wg.load(tmp_path / "operator.safetensors", GPU), expected.space.randn(generator())
    solver = ACCURATE[name]
    agree(solver.solve(found, on(b)).value, solver.solve(expected, b).value, rtol=1e-4, atol=1e-6)


def problem_on(problem: wg.Problem) -> wg.Problem:
    """Both levels with one model on the GPU."""
    objective = on(problem.inner.objective)
    return replace(
        problem,
        inner=replace(problem.inner, objective=objective),
        outer=replace(problem.outer, objective=objective),
    )


DRAWN = ("kfac", "kfac-length", "ekfac", "pcg", "nystrom")
"""Methods that draw labels or directions, which are other ones on a GPU."""


@pytest.mark.parametrize("name", list(wg.METHODS))
def test_hypergradients(name):
    problem, params, hparams, batches = away_from_the_minimum()
    method = wg.make_method(name)
    expected = method(problem, params, hparams, batches).value
    found = method(problem_on(problem), on(params), on(hparams), on(batches)).value
    if name in DRAWN:
        assert {leaf.device for leaf in found.values()} == {GPU}
        assert cosine(on(found, "cpu"), expected) > 0.9
    else:
        agree(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "estimator", [wg.KFAC(wg.Exact()), wg.EKFAC(wg.Exact()), wg.Diagonal()], ids=lambda e: type(e).__name__
)
def test_hypergradients_from_curvatures_that_draw_nothing(estimator):
    problem, params, hparams, batches = away_from_the_minimum()
    for method in (
        wg.Implicit(estimator, wg.Direct(), None),
        wg.Implicit(solver=wg.CG(3), preconditioner=estimator),
    ):
        expected = method(problem, params, hparams, batches)
        found = method(problem_on(problem), on(params), on(hparams), on(batches))
        agree(found.value, expected.value, rtol=1e-5, atol=1e-8)


def looped(device, method, **options):
    model = network(dropout=0.0).to(device)
    objective = wg.Objective(model, wg.CrossEntropy())
    problem = wg.Problem(wg.Level(objective, by_row, wg.L2(decay)), wg.Level(objective))
    return wg.solve(
        problem, method, ADAM, ADAM, 6, hparams=on(outer_variables(), device),
        inner_data=wg.Rows(X.to(device), Y.to(device)), outer_data=wg.Rows(XV.to(device), YV.to(device)),
        inner_steps=2, project={"w": wg.Box(-0.9, 0.9)}, seed=3, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["unrolled", "sama", "f2sa", "identity"])
def test_loop(name):
    """With all rows in every batch, so that nothing is drawn."""
    found, expected = looped(GPU, LOOPED[name]), looped("cpu", LOOPED[name])
    agree(found.hparams, expected.hparams, rtol=1e-5, atol=1e-7)
    agree(found.params, expected.params, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOOPED)
def test_loop_goes_on_from_a_checkpoint(name, tmp_path):
    """To the same numbers as without a break, whatever the method keeps or draws."""
    whole = looped(GPU, LOOPED[name])
    path = tmp_path / "run.pt"
    looped(GPU, LOOPED[name], checkpoint=path, callbacks=[lambda event: event.step == 3])
    again = looped(GPU, LOOPED[name], checkpoint=path, resume=True)
    for leaf, value in whole.hparams.items():
        assert value.device == GPU
        torch.testing.assert_close(again.hparams[leaf], value, rtol=1e-9, atol=1e-12)
    with pytest.raises(wg.CheckpointError, match="kind of device: found cuda, expected cpu"):
        looped("cpu", LOOPED[name], checkpoint=path, resume=True)


@pytest.mark.parametrize("against", [wg.Dense(), wg.ReSolve()], ids=lambda a: type(a).__name__)
def test_diagnosis(against):
    case = classification()
    arguments = problem_on(case.problem), on(case.params), on(case.hparams), on(case.batches)
    check = wg.check_hypergradient(wg.make_method("exact", 0.0), *arguments, against=against)
    assert check.total.cosine > 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kfac_under_autocast(dtype):
    """Factors in float32, near those without autocast."""
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 10))
    model = initialised(model).float().to(GPU)
    x, y = normal(128, 32).float().to(GPU), torch.arange(128, device=GPU) % 10
    objective, batch = wg.Objective(model, wg.CrossEntropy()), wg.Batch(x, y)
    expected = wg.estimate(wg.KFAC(wg.Exact()), objective, [batch])
    with torch.autocast("cuda", dtype):
        found = wg.estimate(wg.KFAC(wg.Exact()), objective, [batch])
    assert found.trace().dtype == torch.float32
    torch.testing.assert_close(found.trace(), expected.trace(), rtol=0.05, atol=0)


def test_fused_attention():
    """The kernel that a GPU chooses by itself has no second derivative; KFAC needs none."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(64 * 16, 5)).to(GPU)
    x, y = torch.randn(8, 16, 64, device=GPU), torch.arange(8, device=GPU) % 5
    objective = wg.Objective(model, wg.CrossEntropy())
    curvature = wg.estimate(wg.KFAC(), objective, [wg.Batch(x, y)])
    assert float(curvature.trace()) > 0
    ggn = wg.GGN(objective, [wg.Batch(x, y)], objective.params())
    v = ggn.space.randn(torch.Generator(GPU).manual_seed(0))
    assert float(tree.dot(v, ggn.apply(v))) >= 0
