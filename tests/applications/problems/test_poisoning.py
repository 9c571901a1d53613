"""Changes of training rows: the hypergradient against solving the inner problem again, and what may and may not change."""

from functools import partial

import pytest
import torch
from torch import nn

import weingarten as wg
from tests.bilevel.problems import relative_error
from weingarten.applications.problems import Around, Poisoning
from weingarten.bilevel.resolve import Level64, minimise

N, CHANGED, SHAPE = 12, torch.tensor([1, 4, 5, 10]), (2, 2)
EPSILON = 0.2


def small(hidden=True):
    """A network on 12 images of 2 by 2 in float64, of which four may be changed; held-out rows."""
    draw = torch.Generator().manual_seed(2)
    x = torch.rand(N + 8, *SHAPE, generator=draw, dtype=torch.float64)
    x[CHANGED[0]], x[CHANGED[1]] = 0.0, 1.0  # at both ends of the range
    y = torch.randint(3, (N + 8,), generator=draw)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layers = [nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)] if hidden else [nn.Linear(4, 3)]
        objective = wg.Objective(nn.Sequential(nn.Flatten(), *layers).double(), wg.CrossEntropy())
    train, held = wg.Batch(x[:N], y[:N], rows=torch.arange(N)), wg.Batch(x[N:], y[N:])
    return Poisoning(objective, x[CHANGED], CHANGED, EPSILON, penalty=wg.L2(0.05)), train, held


def solved(problem, train, hparams, start):
    return minimise(Level64(problem.inner, train), start, hparams, 1e-11, 300)


@pytest.mark.parametrize("make", [Poisoning.problem, Poisoning.error_minimising])
def test_hypergradient_is_the_difference_of_solving_again(make):
    task, train, held = small()
    problem = make(task)
    outer = held if make is Poisoning.problem else train
    hparams = task.random(torch.Generator().manual_seed(0))
    params = solved(problem, train, hparams, task.objective.params())
    exact = wg.Implicit(wg.Hessian, wg.Direct(), None, damping=0.0)
    found = exact(problem, params, hparams, wg.Batches(outer, train)).value
    direction = torch.randn(2, *hparams["delta"].shape, generator=torch.Generator().manual_seed(1)).double()
    for v in direction:
        ends = []
        for sign in (1, -1):
            moved = {"delta": hparams["delta"] + sign * 1e-4 * v}
            there = solved(problem, train, moved, params)
            ends.append(problem.outer.value(there, moved, outer))
        slope = (ends[0] - ends[1]) / 2e-4
        assert relative_error((found["delta"] * v).sum()[None], slope[None]) < 1e-5


def test_hypergradient_is_the_dense_formula_of_a_linear_model():
    task, train, held = small(hidden=False)
    problem, hparams = task.problem(), task.random(torch.Generator().manual_seed(0))
    params = solved(problem, train, hparams, task.objective.params())
    names = list(params)
    flat = torch.cat([p.reshape(-1) for p in params.values()])

    def read(vector):
        pieces = vector.split([p.numel() for p in params.values()])
        return {n: piece.reshape(params[n].shape) for n, piece in zip(names, pieces, strict=True)}

    def inner(vector, delta):  # written out: no transform, no rows
        p = read(vector)
        x = train.inputs.index_add(0, CHANGED, delta).flatten(1)
        logits = x @ p["1.weight"].T + p["1.bias"]
        return nn.functional.cross_entropy(logits, train.targets) + 0.025 * vector.square().sum()

    def outer(vector):
        p = read(vector)
        return nn.functional.cross_entropy(
            held.inputs.flatten(1) @ p["1.weight"].T + p["1.bias"], held.targets
        )

    hessian = torch.func.hessian(inner)(flat, hparams["delta"])
    q = torch.linalg.solve(hessian, torch.func.grad(outer)(flat))
    mixed = torch.func.jacrev(torch.func.grad(inner), argnums=1)(flat, hparams["delta"])
    expected = -torch.einsum("p,pnij->nij", q, mixed)
    method = wg.Implicit(
        solver=wg.Direct(), preconditioner=None, damping=0.0
    )  # linear: the GGN is the Hessian
    found = method(problem, params, hparams, wg.Batches(held, train)).value["delta"]
    assert relative_error(found, expected) < 1e-8


@pytest.mark.parametrize("rows", [torch.arange(N), torch.tensor([10, 3, 4, 0])])
def test_only_the_rows_that_may_change_do(rows):
    task, train, _ = small()
    delta = torch.arange(1.0, 17.0).double().reshape(4, *SHAPE) / 100
    batch = wg.Batch(train.inputs[rows], train.targets[rows], rows=rows)
    changed = task.change({"delta": delta}, batch)
    expected = batch.inputs.clone()
    for place, row in enumerate(rows.tolist()):
        if row in CHANGED.tolist():
            expected[place] += delta[CHANGED.tolist().index(row)]
    assert torch.equal(changed.inputs, expected)
    assert torch.equal(changed.targets, batch.targets)
    assert torch.equal(task.change(task.start(), batch).inputs, batch.inputs)


def test_a_run_stays_in_the_ball_and_in_the_range_and_does_worse_than_random():
    task, train, held = small(hidden=False)
    seen = []
    sgd = partial(torch.optim.Adam, lr=0.05)
    found = wg.solve(
        task.problem(),
        wg.Implicit(solver=wg.Direct(), preconditioner=None),
        sgd,
        partial(torch.optim.Adam, lr=0.1, maximize=True),  # half the ball in one step
        steps=15,
        inner_steps=5,
        hparams=task.start(),
        inner_data=train,
        outer_data=held,
        project=task.projection(),
        callbacks=[lambda event: seen.append(event.hparams["delta"].clone())],
    ).hparams
    for delta in seen:
        assert delta.abs().max() <= EPSILON
        changed = task.change({"delta": delta}, train).inputs
        assert changed.min() >= 0
        assert changed.max() <= 1
        others = torch.ones(N, dtype=torch.bool).index_fill(0, CHANGED, False)
        assert torch.equal(changed[others], train.inputs[others])
    assert seen[-1].abs().max() == EPSILON  # the ball was felt
    start = task.objective.params()

    def loss(hparams):
        return float(task.problem().outer.value(solved(task.problem(), train, hparams, start), hparams, held))

    controls = [loss(task.random(torch.Generator().manual_seed(k))) for k in range(2)]
    assert loss(found) > max(loss(task.start()), *controls)


def test_the_control_is_of_the_same_size():
    task, _, _ = small()
    delta = task.random(torch.Generator().manual_seed(0))["delta"]
    inside = (task.inputs >= EPSILON) & (task.inputs <= 1 - EPSILON)
    assert inside.any()
    assert (delta[inside].abs() == EPSILON).all()
    assert 0 < (delta > 0).double().mean() < 1
    assert (delta[0] >= 0).all()  # a black image cannot be darker
    assert (delta[1] <= 0).all()


def test_the_projection_is_the_nearest_point():
    centre = torch.tensor([0.05, 0.5, 0.95]).double()
    project, far = Around(centre, 0.2), torch.tensor([-1.0, 0.1, 1.0]).double()
    assert torch.allclose(project(far), torch.tensor([-0.05, 0.1, 0.05]).double())
    assert torch.equal(project(project(far)), project(far))
    assert repr(project) == repr(Around(centre, 0.2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"low": 1.0}, "low 1.0 and high 1.0"),
        ({"rows": torch.tensor([4, 1, 5, 10])}, "strictly increasing"),
        ({"rows": torch.arange(3)}, r"shape \(3,\) for 4 inputs"),
        ({"rows": torch.arange(0), "inputs": torch.zeros(0, 2)}, "expected at least one"),
        ({"inputs": torch.full((4, 2), 16.0)}, "between 16 and 16"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    task, _, _ = small()
    given = {"inputs": task.inputs, "rows": CHANGED, "epsilon": EPSILON, **arguments}
    with pytest.raises(ValueError, match=message):
        Poisoning(task.objective, **given)


def test_a_batch_without_row_numbers_is_refused():
    task, train, _ = small()
    with pytest.raises(ValueError, match="no row numbers"):
        task.change(task.start(), wg.Batch(train.inputs, train.targets))
