"""Two tasks in one cross-entropy: against two cross-entropies written out, GGN, and differences."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import weingarten as wg
from tests.bilevel.problems import relative_error
from weingarten.applications.problems import AuxiliaryWeights, Joined, masked_rows
from weingarten.bilevel.resolve import Level64, minimise
from weingarten.reference import dense_ggn

CLASSES, OTHERS, SORTS = 2, 4, 3


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES + OTHERS)).to(dtype)
    task = AuxiliaryWeights(model, CLASSES, SORTS, weight=0.5, decay=0.02)

    def rows(count, sort, targets):
        return wg.Rows((torch.randn(count, 3, generator=generator, dtype=dtype), sort), targets)

    def draw(low, high, count):
        return torch.randint(low, high, (count,), generator=generator)

    main = rows(5, torch.zeros(5, dtype=torch.long), draw(0, CLASSES, 5))
    other = rows(9, draw(1, SORTS + 1, 9), draw(CLASSES, CLASSES + OTHERS, 9))
    held = rows(6, torch.zeros(6, dtype=torch.long), draw(0, CLASSES, 6))
    hparams = {"log_weight": torch.linspace(-1, 0.5, SORTS, dtype=dtype)}
    return task, hparams, Joined(main, other).draw(generator), held.draw(generator)


def test_both_levels_are_the_formulas():
    task, hparams, train, held = problem()
    levels = task.problem()
    params = levels.inner.objective.params()
    with torch.no_grad():
        x, sort = train.inputs
        main = functional.cross_entropy(task.model(x[:5])[:, :CLASSES], train.targets[:5])
        losses = functional.cross_entropy(
            task.model(x[5:])[:, CLASSES:], train.targets[5:] - CLASSES, reduction="none"
        )
        weights = hparams["log_weight"].exp()[sort[5:] - 1]
        squares = sum(p.square().sum() for p in params.values())
        expected = main + (weights * losses).mean() + 0.01 * squares
        outer = functional.cross_entropy(task.model(held.inputs[0])[:, :CLASSES], held.targets)
    assert torch.allclose(levels.inner.value(params, hparams, train), expected, rtol=1e-12)
    assert torch.allclose(levels.outer.value(params, hparams, held), outer, rtol=1e-12)


def test_curvature_is_the_sum_of_the_tasks_and_kfac_takes_part():
    task, hparams, train, held = problem()
    levels = task.problem()
    objective, params = levels.inner.objective, levels.inner.objective.params()
    batch = levels.inner.transform(hparams, train)
    found = wg.GGN(objective, [batch], params).dense()
    assert torch.allclose(found, dense_ggn(objective, [batch], params), atol=1e-10)
    parts = []
    for part, classes in ((slice(0, 5), slice(0, CLASSES)), (slice(5, None), slice(CLASSES, None))):
        alone = wg.Objective(
            lambda p, x, c=classes: torch.func.functional_call(
                task.model, {n.removeprefix("model."): v for n, v in p.items()}, (x,)
            )[:, c],
            wg.CrossEntropy(),
        )
        rows = wg.Batch(batch.inputs[0][part], batch.targets[part] - classes.start, batch.weights[part])
        parts.append(dense_ggn(alone, [rows], params) * len(rows.targets) / len(batch.targets))
    assert torch.allclose(found, sum(parts), atol=1e-10)
    arguments = levels, params, hparams, wg.Batches(held, train)
    exact = wg.Implicit(solver=wg.Direct(), preconditioner=None)(*arguments)
    assert relative_error(wg.Implicit(solver=wg.CG(60, tol=1e-10))(*arguments).value, exact.value) < 1e-6


def test_hypergradient_is_the_derivative_of_the_held_out_loss_at_the_minimum():
    task, hparams, train, held = problem()
    levels = task.problem()
    start = {name: p.clone() for name, p in levels.inner.objective.params().items()}
    params = minimise(Level64(levels.inner, train), start, hparams, 1e-11, 300)
    exact = wg.Implicit(wg.Hessian, wg.Direct(), None, damping=0.0)
    found = exact(levels, params, hparams, wg.Batches(held, train)).value["log_weight"]
    along, ends = torch.tensor([1.0, -0.7, 0.5]).double(), []
    for sign in (1, -1):
        moved = {"log_weight": hparams["log_weight"] + sign * 1e-4 * along}
        reached = minimise(Level64(levels.inner, train), dict(params), moved, 1e-12, 300)
        ends.append(float(levels.outer.value(reached, moved, held)))
    assert float(found @ along) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-4)


def test_other_tasks_logits_do_nothing_in_float32():
    task, _, train, _ = problem(torch.float32)
    logits = task.problem().inner.objective.forward(task.problem().inner.objective.params(), train.inputs)
    assert (logits.softmax(1)[:5, CLASSES:] == 0).all()
    assert (logits.softmax(1)[5:, :CLASSES] == 0).all()


def test_masked_rows_ask_for_every_known_token_once():
    known = torch.arange(7) >= 3
    tokens = torch.tensor([[3, 2, 6, 0], [4, 4, 0, 0], [2, 2, 2, 0]])
    masked, hidden = masked_rows(tokens, 1, known)
    assert hidden.tolist() == [3, 6, 4, 4]
    assert ((masked == 1).sum(1) == 1).all()
    restored = torch.where(masked == 1, hidden[:, None], masked)
    assert restored.tolist() == [tokens[i].tolist() for i in (0, 0, 1, 1)]


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="sorts 0"):
        AuxiliaryWeights(nn.Linear(2, 3), classes=1, sorts=0)
    with pytest.raises(ValueError, match=r"weight 0\.0"):
        AuxiliaryWeights(nn.Linear(2, 3), classes=1, weight=0.0)
