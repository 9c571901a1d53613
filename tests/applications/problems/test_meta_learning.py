"""Implicit MAML and hyper-representation: hypergradients against the inner problem solved again, and the loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import nn

import weingarten as wg
from weingarten import reference, tree
from weingarten.applications.problems import (
    Copies,
    FewShot,
    GroupedMLP,
    HyperRepresentation,
    ImplicitMAML,
    Sines,
    adapt,
    meta_solve,
    rotated_digits,
    signal_classes,
)
from weingarten.bilevel.resolve import Level64, doubled, minimise

EPISODES = 2


def drawn(source, seed=0, episodes=EPISODES):
    return source.draw(episodes, torch.Generator().manual_seed(seed))


def few_shot():
    generator = torch.Generator().manual_seed(1)
    return FewShot(torch.randn(5, 4, 2, generator=generator), ways=3, shots=2, queries=2)


def maml(networks, loss):
    return ImplicitMAML(networks.double(), loss, prox=0.5)


def hyper(dims, outputs, loss):
    body = nn.Sequential(nn.Linear(dims, 4), nn.Tanh()).double()
    return HyperRepresentation(body, GroupedMLP((4, outputs), EPISODES).double(), loss, decay=0.3)


CASES = {
    "maml sine": lambda: (maml(GroupedMLP((1, 3, 1), EPISODES), wg.MSE()), Sines(shots=5, queries=4)),
    "maml classes": lambda: (maml(GroupedMLP((2, 2, 3), EPISODES), wg.CrossEntropy()), few_shot()),
    "maml copies": lambda: (maml(Copies(nn.Linear(2, 3), EPISODES), wg.CrossEntropy()), few_shot()),
    "hyper sine": lambda: (hyper(1, 1, wg.MSE()), Sines(shots=5, queries=4)),
    "hyper classes": lambda: (hyper(2, 3, wg.CrossEntropy()), few_shot()),
}


@pytest.fixture
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def at_minimum(name):
    """The arguments of a hypergradient method where the inner problem is solved."""
    task, source = CASES[name]()
    episodes = drawn(source)
    support, query = doubled(episodes.support), doubled(episodes.query)
    problem, hparams = task.problem(), task.start()
    params = minimise(Level64(problem.inner, support), task.begin(hparams), hparams, 1e-11, 300)
    return problem, params, hparams, wg.Batches(query, support)


@pytest.mark.parametrize("name", CASES)
def test_hypergradient_is_the_derivative_of_the_solved_problem(name, seeded):
    method = wg.Implicit(wg.Hessian, wg.Direct(), None, damping=0.0)
    arguments = at_minimum(name)
    check = wg.check_hypergradient(method, *arguments, against=wg.ReSolve(directions=2))
    assert check.inner_gradient < 1e-9
    assert check.worst.relative_error < 1e-5
    assert check.total.expected > 1e-3
    dense = wg.check_hypergradient(method, *arguments, against=wg.Dense(reference.dense_hessian))
    assert dense.worst.relative_error < 1e-7


def test_implicit_maml_by_its_own_formula(seeded):
    """Episode by episode: ``(I + H/prox)^{-1} d query / d theta``, averaged."""
    problem, params, hparams, batches = at_minimum("maml sine")
    found = wg.Implicit(solver=wg.Direct(), preconditioner=None, damping=0.0)(
        problem, params, hparams, batches
    )
    single = GroupedMLP((1, 3, 1), 1).double()
    objective, space = wg.Objective(single, wg.MSE()), tree.Space.of(hparams)
    total = torch.zeros(space.size, dtype=torch.float64)
    for b in range(EPISODES):
        theta = {name: p.chunk(EPISODES)[b] for name, p in params.items()}
        support, query = (
            wg.Batch(data.inputs[:, [b]], data.targets[..., [b]]) for data in (batches.mixed, batches.outer)
        )
        with_grad = {name: p.detach().requires_grad_() for name, p in theta.items()}
        gradient = torch.autograd.grad(objective.value(with_grad, query), list(with_grad.values()))
        matrix = torch.eye(space.size) + reference.dense_ggn(objective, [support], theta) / 0.5
        total += torch.linalg.solve(matrix, space.flatten(dict(zip(theta, gradient, strict=True)))) / EPISODES
    torch.testing.assert_close(space.flatten(found.value), total)


@pytest.mark.parametrize("name", CASES)
def test_one_step_of_an_isotropic_problem_is_exact_where_curvature_is_the_penalty_alone(name, seeded):
    """With a huge proximal term or decay the penalty is all the curvature there is, and KFAC must know it exactly."""
    task, source = CASES[name]()
    task = type(task)(**{**vars(task), ("prox" if "maml" in name else "decay"): 1e6})
    episodes = drawn(source)
    batches = wg.Batches(doubled(episodes.query), doubled(episodes.support))
    problem, hparams = task.problem(), task.start()
    params = tree.add(
        task.begin(hparams), {n: 0.1 * torch.ones_like(p) for n, p in task.begin(hparams).items()}
    )
    found = wg.Implicit(wg.KFAC(), wg.Direct(), None, damping=0.0)(problem, params, hparams, batches)
    exact = wg.Implicit(solver=wg.Direct(), preconditioner=None, damping=0.0)(
        problem, params, hparams, batches
    )
    assert float(tree.norm(tree.sub(found.value, exact.value)) / tree.norm(exact.value)) < 0.02


def test_grouped_networks_are_networks(seeded):
    grouped, x = GroupedMLP((2, 5, 3), EPISODES).double(), torch.randn(4, EPISODES, 2, dtype=torch.float64)
    layers = [m for m in grouped.modules() if isinstance(m, nn.Conv1d)]
    for b in range(EPISODES):
        z = x[:, b]
        for number, layer in enumerate(layers):
            z = z.tanh() if number else z
            z = z @ layer.weight.chunk(EPISODES)[b][..., 0].T + layer.bias.chunk(EPISODES)[b]
        torch.testing.assert_close(grouped(x)[..., b], z)
    same = grouped.spread(grouped.single())
    assert same.keys() == dict(grouped.named_parameters()).keys()
    outputs = torch.func.functional_call(grouped, same, (x[:, :1].expand_as(x),))
    torch.testing.assert_close(outputs, outputs[..., :1].expand_as(outputs))
    copies = Copies(nn.Linear(2, 3), EPISODES)
    assert copies.spread(copies.single()).keys() == dict(copies.named_parameters()).keys()


def test_adaptation_solves_the_inner_problem(seeded):
    task, source = CASES["hyper classes"]()
    support = doubled(drawn(source).support)
    params, _ = adapt(task, task.start(), support, partial(torch.optim.SGD, lr=1.0), 500)
    inner = Level64(task.problem().inner, support)
    assert float(tree.norm(inner.gradients(params, task.start())[0])) < 1e-6
    begun, _ = adapt(task, task.start(), support, partial(torch.optim.SGD, lr=1.0), 0)
    assert all(not p.any() for p in begun.values())


@dataclass(frozen=True)
class Watched(wg.HypergradientMethod):
    """Notes with which state it is called."""

    method: wg.HypergradientMethod
    states: list = field(default_factory=list)

    def __call__(self, problem, params, hparams, batches, state=None, generator=None):
        self.states.append(state)
        return self.method(problem, params, hparams, batches, state, generator)


def test_loop_learns_and_repeats(seeded):
    task = ImplicitMAML(GroupedMLP((1, 16, 1), 8), wg.MSE(), prox=1.0)
    start, method = task.start(), Watched(wg.Implicit(refresh=5))
    run = partial(
        meta_solve, task, method, partial(torch.optim.SGD, lr=0.2), partial(torch.optim.Adam, lr=2e-2), 40,
        episodes=Sines(), batch=8, inner_steps=3,
    )  # fmt: skip
    first = run()
    assert all(torch.equal(start[name], p) for name, p in task.start().items())
    losses = first.history.column("outer_loss")
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert set(method.states) == {None}  # another batch's factors are of no use
    one, two = (run(callbacks=[lambda event: event.step == 2]) for _ in range(2))
    assert (one.step, one.completed) == (2, False)
    assert all(torch.equal(one.hparams[name], two.hparams[name]) for name in start)


def test_loop_refuses():
    task = ImplicitMAML(GroupedMLP((1, 4, 1), 2), wg.MSE(), prox=1.0)
    run = partial(
        meta_solve, task, wg.Implicit(), outer_optimizer=partial(torch.optim.Adam, lr=1e-2), steps=3,
        episodes=Sines(), batch=2,
    )  # fmt: skip
    with pytest.raises(wg.DivergenceError, match="adapt: parameter"):
        run(inner_optimizer=partial(torch.optim.SGD, lr=1e20), inner_steps=5)
    with pytest.raises(ValueError, match="inner_steps 0"):
        run(inner_optimizer=partial(torch.optim.SGD, lr=0.1), inner_steps=0)


def test_few_shot_episodes():
    examples = torch.arange(6.0)[:, None, None] + torch.arange(5)[None, :, None] / 10
    support, query = (data for data in vars(drawn(FewShot(examples, 3, 2, 3), episodes=50)).values())
    assert torch.equal(support.targets[:, 0], torch.tensor([0, 1, 2, 0, 1, 2]))
    for b in range(50):
        kinds = {int(y): int(x) for x, y in zip(support.inputs[:, b, 0], support.targets[:, b], strict=True)}
        assert len(set(kinds.values())) == 3
        assert all(
            kinds[int(y)] == int(x) for x, y in zip(query.inputs[:, b, 0], query.targets[:, b], strict=True)
        )
        both = torch.cat([support.inputs[:, b, 0], query.inputs[:, b, 0]])
        assert len(both.unique()) == len(both)  # no example is in both
    with pytest.raises(ValueError, match="FewShot: examples has 6 classes of 5"):
        FewShot(examples, ways=7)


def test_classes_of_digits_and_signals():
    pytest.importorskip("sklearn")
    train, test = rotated_digits()
    assert (train.shape, test.shape) == ((30, 174, 64), (10, 174, 64))
    first, images = train[:3, 0].reshape(3, 8, 8), test[:, 0].reshape(10, 8, 8)
    assert torch.equal(
        images[0], first[1].flip(0, 1)
    )  # digit 0 as it is; turned by 180 degrees it is trained on
    assert torch.equal(images[0].rot90(), first[0])
    train, test = signal_classes(9, torch.Generator().manual_seed(0))
    assert (train.shape, test.shape) == ((28, 9, 40), (12, 9, 40))
    assert (train.mean(1)[:4] - train.mean(1)[4:8]).norm() > 1  # classes differ


def test_sines_are_sines():
    episodes = drawn(Sines(shots=40, queries=3))
    x, y = episodes.support.inputs[..., 0], episodes.support.targets[:, 0]
    for b in range(EPISODES):
        basis = torch.stack([x[:, b].sin(), x[:, b].cos()], dim=1)
        weights = torch.linalg.lstsq(basis, y[:, [b]]).solution
        torch.testing.assert_close(basis @ weights, y[:, [b]], atol=1e-4, rtol=1e-4)
        assert 0.1 <= float(weights.norm()) <= 5
