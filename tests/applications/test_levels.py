"""The two levels of `weingarten clean` against written-out formulas, and the small parts of the recipe."""

from functools import partial

import pytest
import torch

from weingarten.applications.clean.folds import (
    IGNORED,
    Folds,
    assign_folds,
    fitted_targets,
    held_targets,
    out_of_fold,
)
from weingarten.applications.clean.levels import (
    GivenAndTrusted,
    Levels,
    believed_transition,
    evenly_wrong,
)
from weingarten.applications.clean.network import build_network
from weingarten.applications.clean.row_adam import RowAdam
from weingarten.objective import Batch
from weingarten.operators import GGN
from weingarten.reference import dense_ggn

CLASSES = 4


def small(correct=True, given=12, trusted=6, features=3, hidden=4):
    """Levels, outer variables, batches and folds of a small problem in double precision; folds of equal size."""
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    x, fold = draw(given + trusted, features), torch.arange(given + trusted) % 3
    labels = torch.randint(CLASSES, (given + trusted,), generator=generator)
    model = Folds([build_network("mlp", features, hidden, CLASSES, k) for k in range(3)]).double()
    levels = Levels(model, CLASSES, given, correct)
    hparams = {name: h.double() + 0.3 * draw(h.shape) for name, h in levels.start().items()}
    inner, outer = (s.draw(generator) for s in GivenAndTrusted.pair(x, labels, fold, 3, given, 99))
    return levels, hparams, inner, outer, labels, fold


def losses(levels, hparams, x, labels):
    """``-log p`` (N, K) of the labels, with T for given rows."""
    columns = []
    for network in levels.model.networks:
        p = network(x).softmax(1)
        if levels.correct:
            p = torch.cat([p[: levels.given] @ hparams["transition"].softmax(1), p[levels.given :]])
        columns.append(-p[torch.arange(len(x)), labels].log())
    return torch.stack(columns, 1)


@pytest.mark.parametrize("correct", [True, False])
def test_the_levels_are_the_formulas(correct):
    levels, hparams, inner, outer, labels, fold = small(correct)
    params, given = levels.problem().inner.objective.params(), levels.given
    with torch.no_grad():
        nll, squares = (
            losses(levels, hparams, inner.inputs, labels),
            sum(p.square().sum() for p in params.values()),
        )
        weight, rho = (
            hparams["weight"].sigmoid() / torch.tensor(2.0).double().sigmoid(),
            hparams["trusted"].exp(),
        )
        g = 0.5 * levels.weight_decay * squares
        for k in range(3):
            fit_given, fit_trusted = fold[:given] != k, fold[given:] != k
            g += (weight * nll[:given, k])[fit_given].mean() + rho * nll[given:, k][fit_trusted].mean()
        own = nll[torch.arange(len(labels)), fold]
        f = own[given:].mean() + (levels.gamma * own[:given].mean() if correct else 0)
        assert torch.allclose(levels.problem().inner.value(params, hparams, inner), g, rtol=1e-12)
        assert torch.allclose(levels.problem().outer.value(params, hparams, outer), f, rtol=1e-12)


def test_the_curvature_is_the_fisher_matrix_of_the_noisy_likelihood():
    levels, hparams, inner, *_ = small()
    problem = levels.problem()
    objective, params = problem.inner.objective, problem.inner.objective.params()
    batch = problem.inner.transform(hparams, inner)
    found = GGN(objective, [batch], params).dense()
    assert torch.allclose(found, dense_ggn(objective, [batch], params), atol=1e-10)
    fisher, names = torch.zeros_like(found), list(params)
    leaves = {name: params[name].clone().requires_grad_() for name in names}
    output = objective.forward(leaves, batch.inputs)
    valid = batch.targets != IGNORED
    for n, k in valid.nonzero().tolist():
        for j in range(CLASSES):
            score = torch.autograd.grad(
                output[n, j, k], list(leaves.values()), retain_graph=True, materialize_grads=True
            )
            flat = torch.cat([s.reshape(-1) for s in score])
            fisher += batch.weights[n] * output[n, j, k].exp().detach() * torch.outer(flat, flat)
    assert torch.allclose(found, fisher / valid.sum(), atol=1e-10)


def test_a_row_that_a_network_holds_out_does_not_move_it():
    levels, hparams, inner, _, _, fold = small()
    params = {name: p.requires_grad_() for name, p in levels.problem().inner.objective.params().items()}
    moved = Batch(inner.inputs + 5.0 * (fold == 1)[:, None], inner.targets, None, inner.rows)
    for k in range(3):
        names = [name for name in params if name.startswith(f"networks.{k}.")]
        gradients = []
        for batch in (inner, moved):
            value = levels.problem().inner.value(params, hparams, batch)
            gradients.append(torch.autograd.grad(value, [params[name] for name in names]))
        same = all(torch.allclose(s, t) for s, t in zip(*gradients, strict=True))
        assert same == (k == 1)


def test_small_probabilities_of_trusted_rows_keep_their_gradient():
    model = Folds([torch.nn.Linear(1, 2)])
    with torch.no_grad():
        model.networks[0].weight.copy_(torch.tensor([[300.0], [-300.0]]))
    transition = torch.eye(2).expand(1, -1, -1)
    output = model(torch.ones(1, 1), transition, torch.tensor([False]))
    output[0, 1, 0].backward()
    assert torch.isfinite(output).all()
    assert model.networks[0].weight.grad.abs().max() > 0.5


# ------------------------------------------------------------------ parts


def test_folds_are_balanced_and_targets_complement_each_other():
    labels = torch.arange(30) % 3
    fold = assign_folds(labels, 3, torch.Generator().manual_seed(0))
    for c in range(3):
        counts = torch.bincount(fold[labels == c], minlength=3)
        assert counts.max() - counts.min() <= 1
    fitted, held = fitted_targets(labels, fold, 3), held_targets(labels, fold, 3)
    assert ((fitted == IGNORED) != (held == IGNORED)).all()
    assert ((held != IGNORED).sum(1) == 1).all()
    values = torch.arange(30.0)[:, None, None] * torch.ones(30, 4, 3) + torch.arange(3.0) / 10
    assert torch.allclose(out_of_fold(values, fold)[:, 0], torch.arange(30.0) + fold / 10)


def test_mini_batches_estimate_the_full_objective_without_bias():
    levels, hparams, *_ = small()
    generator = torch.Generator().manual_seed(2)
    given, trusted = levels.given, 6
    x = torch.randn(given + trusted, 3, generator=generator, dtype=torch.float64)
    labels, fold = torch.arange(given + trusted) % CLASSES, torch.arange(given + trusted) % 3
    problem = levels.problem()
    params = problem.inner.objective.params()
    for number, level in enumerate((problem.inner, problem.outer)):
        full = GivenAndTrusted.pair(x, labels, fold, 3, given, 99)[number].draw(generator)
        small_ones = GivenAndTrusted.pair(x, labels, fold, 3, given, 5)[number]
        with torch.no_grad():
            values = torch.stack(
                [level.value(params, hparams, small_ones.draw(generator)) for _ in range(800)]
            )
            assert abs(values.mean() - level.value(params, hparams, full)) < 4 * values.std() / 800**0.5


def test_rows_not_drawn_stay_where_they_are():
    start = torch.zeros(4)
    p = start.clone().requires_grad_()
    optimizer = RowAdam([p], [0.1])
    for rows in ([0, 1], [1, 2], [1]):
        p.grad = torch.zeros(4)
        p.grad[rows] = 1.0
        optimizer.step()
    assert torch.allclose(p.detach(), torch.tensor([-0.1, -0.3, -0.1, 0.0]), atol=1e-6)


def test_row_adam_is_adam_where_every_entry_has_a_gradient():
    torch.manual_seed(0)
    a, b = (torch.ones(5, requires_grad=True) for _ in range(2))
    mine, theirs = RowAdam([a], [0.05]), torch.optim.Adam([b], lr=0.05, betas=(0.9, 0.99))
    for _ in range(10):
        a.grad = torch.randn(5)
        b.grad = a.grad.clone()
        mine.step()
        theirs.step()
    assert torch.allclose(a, b, atol=1e-6)
    with pytest.raises(ValueError, match="2 rates for 1 tensors"):
        RowAdam([a], [0.1, 0.2])


# ------------------------------------------------------------------ the transitions to start from


def test_even_noise_is_a_stochastic_matrix_with_the_kept_share_on_its_diagonal():
    found = evenly_wrong(CLASSES, 0.7)
    assert torch.allclose(found.sum(1), torch.ones(CLASSES))
    assert torch.equal(found.diagonal(), torch.full((CLASSES,), 0.7))
    assert found[~torch.eye(CLASSES, dtype=torch.bool)].unique().numel() == 1
    assert evenly_wrong(1, 1.0).tolist() == [[1.0]]


def noisy_labels(rows=4000):
    """T, true classes of which the last has no row, and labels drawn from T."""
    generator = torch.Generator().manual_seed(3)
    transition = torch.rand(CLASSES, CLASSES, generator=generator, dtype=torch.float64)
    transition = transition / transition.sum(1, keepdim=True)
    truth = torch.randint(CLASSES - 1, (rows,), generator=generator)
    return transition, truth, torch.multinomial(transition[truth], 1, generator=generator)[:, 0]


def test_a_perfect_model_shows_the_transition_up_to_the_prior():
    transition, truth, given = noisy_labels()
    certain = torch.nn.functional.one_hot(truth, CLASSES).double()
    prior, counts = (
        evenly_wrong(CLASSES, 0.6).double(),
        certain.T @ torch.nn.functional.one_hot(given).double(),
    )
    seen = counts.sum(1, keepdim=True)
    found = believed_transition(certain, given, prior, strength=10.0)
    assert torch.allclose(found, (counts + 10 * prior) / (seen + 10))
    assert torch.allclose(found[-1], prior[-1])  # of a class without rows nothing else is known
    weakly = believed_transition(certain, given, prior, strength=1e-6)
    deviation = (transition * (1 - transition) / seen.clamp_min(1)).sqrt()
    assert ((weakly - transition).abs() < 4 * deviation)[:-1].all()


def test_a_model_without_an_opinion_shows_how_often_each_label_is_given():
    _, truth, given = noisy_labels()
    even = torch.full((len(truth), CLASSES), 1 / CLASSES, dtype=torch.float64)
    found = believed_transition(even, given, evenly_wrong(CLASSES, 0.6), strength=1e-6)
    often = torch.bincount(given, minlength=CLASSES).double() / len(given)
    assert torch.allclose(found, often.expand(CLASSES, -1), atol=1e-6)


def test_outer_variables_start_at_the_transition_they_are_told():
    levels, *_ = small()
    told = noisy_labels()[0]
    assert torch.allclose(levels.transition(levels.start(told)), told)
    assert torch.allclose(levels.transition(levels.start()), evenly_wrong(CLASSES, 0.6).double())
    plain, *_ = small(correct=False)
    assert "transition" not in plain.start(told)
    assert torch.equal(plain.transition(plain.start()), torch.eye(CLASSES, dtype=torch.float64))
