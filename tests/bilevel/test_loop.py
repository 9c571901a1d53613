from __future__ import annotations

import builtins
import io
import signal
import threading
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

import weingarten as wg
from tests.bilevel.problems import ROWS, by_row, classification, decay, outer_variables, ridge, same
from tests.bilevel.runs import ADAM, METHODS, SGD, XV, YV, X, Y, equal, network, run
from weingarten.bilevel.run import training_pass


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_it_finds_the_best_weight_decay(inner_steps):
    """Ridge regression, the decay alone is to be chosen: the minimum of a function of one number.

    Three steps of L-BFGS with what it remembers of earlier decays ended at -2.5.
    """
    objective = ridge().problem.inner.objective
    truth = torch.tensor([[0.5], [-0.3], [0.2], [0.0]], dtype=torch.float64)
    noise = torch.randn(21, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batches = wg.Batches(wg.Batch(XV, XV @ truth + 0.1 * noise[:9]), wg.Batch(X, X @ truth + noise[9:]))
    problem = wg.Problem(wg.Level(objective, penalty=wg.L2(decay)), wg.Level(objective))
    x, y = batches.mixed.inputs, batches.mixed.targets

    def outer(log_c):
        hessian = 2 / ROWS * x.T @ x + log_c.exp() * torch.eye(4, dtype=torch.float64)
        theta = torch.linalg.solve(hessian, 2 / ROWS * x.T @ y)
        return float(objective.value({"theta": theta}, batches.outer))

    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    best = grid[torch.tensor([outer(log_c) for log_c in grid]).argmin()]
    assert -5.9 < best < 5.9
    found = wg.solve(
        problem,
        wg.Implicit(solver=wg.CG(4, tol=1e-12), preconditioner=None, damping=0.0),
        partial(torch.optim.LBFGS, lr=1, line_search_fn="strong_wolfe"),
        partial(torch.optim.Adam, lr=0.1),
        200,
        hparams={"log_c": torch.tensor(0.0, dtype=torch.float64)},
        params={"theta": torch.zeros(4, 1, dtype=torch.float64)},
        inner_data=batches.mixed,
        outer_data=batches.outer,
        inner_steps=inner_steps,
    )
    assert float(found.hparams["log_c"]) == pytest.approx(float(best), abs=0.005)
    assert found.completed
    assert found.step == 200


def test_one_step_is_what_the_description_says():
    """Inner steps, hypergradient, outer step, projection, by hand."""
    case = classification()
    found = wg.solve(
        case.problem, wg.make_method("exact"), SGD, ADAM, 2, hparams=case.hparams, params=case.params, inner_steps=3,
        inner_data=case.batches.mixed, outer_data=case.batches.outer, project={"w": wg.Box(-0.5, 0.5)},
    )  # fmt: skip
    params = {name: p.clone().requires_grad_() for name, p in case.params.items()}
    hparams = {name: h.clone().requires_grad_() for name, h in case.hparams.items()}
    inner, outer = SGD(list(params.values())), ADAM(list(hparams.values()))
    hparams["w"].data.clamp_(-0.5, 0.5)
    for _ in range(2):
        for _ in range(3):
            inner.zero_grad()
            fixed = wg.tree.detach(hparams)
            case.problem.inner.value(params, fixed, case.batches.mixed).backward()
            inner.step()
        value = wg.make_method("exact")(case.problem, params, hparams, case.batches).value
        for name, h in hparams.items():
            h.grad = value[name]
        outer.step()
        hparams["w"].data.clamp_(-0.5, 0.5)
    assert all(torch.allclose(found.params[name], p, rtol=1e-12) for name, p in params.items())
    assert all(torch.allclose(found.hparams[name], h, rtol=1e-12) for name, h in hparams.items())


@pytest.mark.parametrize("name", list(METHODS))
def test_runs_repeat_and_touch_nothing(name):
    state, hparams = torch.get_rng_state(), outer_variables()
    first = run(METHODS[name], hparams=hparams)
    torch.rand(5)
    second = run(METHODS[name])
    assert equal(first, second)
    assert not equal(first, run(METHODS[name], seed=4))
    torch.set_rng_state(state)
    run(METHODS[name])
    assert torch.equal(torch.get_rng_state(), state)
    assert same(hparams, outer_variables())
    assert not any(leaf.requires_grad for leaf in [*first.params.values(), *first.hparams.values()])


def test_projection_holds_at_every_step():
    seen = []
    run(METHODS["identity"], project=wg.Simplex(2.0, axis=None), steps=3, callbacks=[lambda e: seen.append(e.hparams)],
        hparams={"w": torch.ones(ROWS, dtype=torch.float64), "log_c": torch.zeros(1, dtype=torch.float64)})  # fmt: skip
    for hparams in seen:
        assert float(hparams["w"].sum()) == pytest.approx(2.0)
        assert (hparams["w"] >= 0).all()
        assert float(hparams["log_c"]) == pytest.approx(2.0)
    with pytest.raises(
        ValueError, match="project names 'weights', expected names of outer variables: w, log_c"
    ):
        run(METHODS["identity"], project={"weights": wg.Box(0, 1)})


def test_dropout_is_on_in_training_and_batch_normalisation_is_left_alone():
    assert not equal(run(METHODS["identity"]), run(METHODS["identity"], dropout=0.0))
    model = (
        nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)).double().eval()
    )
    with training_pass(model):
        assert [m.training for m in model] == [True, False, True, True]
    assert not any(m.training for m in model.modules())
    statistics = {name: b.clone() for name, b in model.named_buffers()}
    objective = wg.Objective(model, wg.CrossEntropy())
    problem = wg.Problem(wg.Level(objective, by_row), wg.Level(objective))
    start = {"w": torch.zeros(ROWS, dtype=torch.float64)}
    wg.solve(
        problem, wg.make_method("pcg"), ADAM, ADAM, 2, hparams=start, inner_data=(X, Y), outer_data=(XV, YV)
    )
    assert same(statistics, dict(model.named_buffers()))


def test_modules_are_loaded_with_the_result():
    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(ROWS, dtype=torch.float64))
            self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def go(hparams, **options):
        model = network()
        objective = wg.Objective(model, wg.CrossEntropy())
        problem = wg.Problem(wg.Level(objective, by_row), wg.Level(objective))
        options |= {"inner_data": (X, Y), "outer_data": (XV, YV)}
        return model, wg.solve(problem, wg.Implicit(), ADAM, ADAM, 3, hparams=hparams, **options)

    weights = Weights()
    model, found = go(weights)
    assert list(found.hparams) == ["w"]
    assert torch.equal(weights.w, found.hparams["w"])
    assert (weights.w != 0).any()
    assert same(dict(model.named_parameters()), found.params)
    again = go({"w": torch.zeros(ROWS, dtype=torch.float64)})[1]
    assert equal(found, again)
    start = {name: p.detach().clone() for name, p in network(5).named_parameters()}
    model, found = go(weights, params=start)
    assert same(dict(model.named_parameters()), dict(network().named_parameters()))
    assert same(start, dict(network(5).named_parameters()))


def test_history():
    found = run(METHODS["warm-start"])
    history = found.history
    assert history.column("step") == list(range(1, 8))
    assert len(history) == len(history.rows()) == 7
    assert history.rows()[2]["outer_loss"] == history.column("outer_loss")[2]
    assert all(later > earlier for earlier, later in pairwise(history.column("seconds")))
    assert set(history.column("negative_curvature")) == {False}
    assert all(0 < n <= 3 for n in history.column("products"))
    assert all(length > 0 for length in history.column("inner_gradient"))
    assert all(abs(change) > 0 for change in history.column("outer_change"))
    frame = history.to_pandas()
    assert list(frame["inner_loss"]) == history.column("inner_loss")
    assert str(history).count("\n") == 7
    assert "steps=7" in repr(history)
    with pytest.raises(KeyError, match="no column 'loss', expected one of step, outer_loss"):
        history.column("loss")
    long = run(METHODS["identity"], steps=25).history
    assert str(long).count("\n") == 21
    assert "..." in str(long)


def without(monkeypatch, package):
    original = builtins.__import__

    def refusing(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refusing)


def test_optional_dependencies_are_named(monkeypatch):
    without(monkeypatch, "pandas")
    with pytest.raises(ImportError, match="pandas is not installed; pip install"):
        wg.History().to_pandas()
    without(monkeypatch, "rich")
    with pytest.raises(ImportError, match="rich is not installed; pip install"):
        wg.ProgressBar()


def test_callbacks_see_every_step_and_may_stop():
    events, second = [], []

    def stop_at_4(event):
        events.append((event.step, event.steps, event.hypergradient.outer_loss, len(event.history)))
        return event.step == 4

    found = run(METHODS["identity"], callbacks=[stop_at_4, lambda event: second.append(event.step)])
    assert [e[:2] for e in events] == [(1, 7), (2, 7), (3, 7), (4, 7)]
    assert [e[2] for e in events] == found.history.column("outer_loss")
    assert second == [1, 2, 3, 4]  # all callbacks of a step are called
    assert not found.completed
    assert found.step == 4


def test_progress_bar(capsys):
    from rich.console import Console

    stream = io.StringIO()
    with wg.ProgressBar("cleaning", Console(file=stream, force_terminal=True, width=100)) as bar:
        run(METHODS["identity"], callbacks=[bar], steps=3)
    assert "cleaning" in stream.getvalue()
    assert "3/3" in stream.getvalue()
    run(METHODS["identity"], progress=True, steps=2)
    out, err = capsys.readouterr()
    assert out == ""
    assert "2/2" in err


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"inner_steps": 0}, "inner_steps 0"),
        ({"checkpoint_every": 2}, "checkpoint_every is 2 and checkpoint None"),
        ({"hparams": {}}, "hparams is empty"),
        ({"outer_optimizer": torch.optim.LBFGS}, "outer_optimizer makes an LBFGS"),
        ({"hparams": {"w": torch.ones(3, dtype=torch.long)}}, r"hparams\['w'\] has type torch.int64"),
    ],
)
def test_arguments_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        run(METHODS["identity"], **options)


def test_divergence_names_step_and_quantity(tmp_path):
    file = tmp_path / "run.pt"
    diverging = partial(torch.optim.SGD, lr=1e200)
    with pytest.raises(
        wg.DivergenceError, match=r"at outer step 1, (inner loss \(inner step 2 of 2\)|parameter)"
    ):
        run(METHODS["identity"], inner_optimizer=diverging, checkpoint=file, checkpoint_every=1)
    assert not file.exists()
    with pytest.raises(wg.DivergenceError, match=r"at outer step \d+, .*; lower") as error:
        run(
            METHODS["identity"],
            inner_optimizer=partial(torch.optim.SGD, lr=1e3),
            steps=200,
            checkpoint=file,
            checkpoint_every=40,
        )
    kept = int(str(error.value).rpartition("still holds step ")[2])
    assert kept == len(torch.load(file, weights_only=True)["content"]["history"]["step"])
    bad = X.clone()
    bad[3] = float("nan")
    with pytest.raises(wg.DivergenceError, match=r"inner loss \(inner step 1 of 2\) is nan"):
        run(METHODS["identity"], inner_data=(bad, Y))
    with pytest.raises(ValueError, match=r"outer gradient: leaf '0.weight' has .* not finite"):
        run(METHODS["identity"], outer_data=(bad, Y))


def test_modes_come_back_after_an_error():
    model = network().eval()

    def fail():
        with training_pass(model):
            assert model.training
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert not any(module.training for module in model.modules())


def interrupt_at(step, times=1):
    def callback(event):
        if event.step == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    return callback


def test_interrupt_finishes_the_step_saves_and_says_how_to_go_on(tmp_path):
    file, whole = tmp_path / "run.pt", run(METHODS["kept-factors"])
    previous = signal.getsignal(signal.SIGINT)
    with pytest.raises(
        KeyboardInterrupt, match=r"after outer step 3 of 7; saved to .*run.pt; to go on, call solve again"
    ) as e:
        run(METHODS["kept-factors"], checkpoint=file, callbacks=[interrupt_at(3)])
    assert isinstance(e.value, wg.Interrupted)
    assert e.value.outcome.step == 3
    assert signal.getsignal(signal.SIGINT) is previous
    assert equal(run(METHODS["kept-factors"], checkpoint=file), whole)


def test_interrupt_without_a_checkpoint_and_in_the_last_step(tmp_path):
    with pytest.raises(wg.Interrupted, match="nothing was saved") as e:
        run(METHODS["identity"], callbacks=[interrupt_at(2)])
    assert len(e.value.outcome.history) == 2
    with pytest.raises(wg.Interrupted, match="all steps are done"):
        run(METHODS["identity"], callbacks=[interrupt_at(7)], checkpoint=tmp_path / "run.pt")


def test_second_interrupt_acts_at_once():
    with pytest.raises(KeyboardInterrupt) as e:
        run(METHODS["identity"], callbacks=[interrupt_at(2, times=2)])
    assert not isinstance(e.value, wg.Interrupted)


def test_interrupts_are_left_alone_where_they_are_ignored_and_in_threads():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run(METHODS["identity"], callbacks=[interrupt_at(2)]).completed
    finally:
        signal.signal(signal.SIGINT, previous)
    found, handlers = [], []
    callback = lambda event: handlers.append(signal.getsignal(signal.SIGINT))  # noqa: E731
    thread = threading.Thread(target=lambda: found.append(run(METHODS["identity"], callbacks=[callback])))
    thread.start()
    thread.join()
    assert equal(found[0], run(METHODS["identity"]))
    assert set(handlers) == {previous}
