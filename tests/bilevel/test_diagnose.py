from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import weingarten as wg
from tests.bilevel.problems import by_row, classification, ridge
from weingarten import reference, tree
from weingarten.bilevel import Check


@dataclass(frozen=True)
class Wrong(wg.HypergradientMethod):
    """The exact method with one part spoilt."""

    part: str
    damping: float = 1e-2

    def __call__(self, problem, params, hparams, batches, state=None, generator=None):
        found = wg.Implicit(solver=wg.Direct(), preconditioner=None, damping=self.damping)(
            problem, params, hparams, batches
        )
        mixed = tree.sub(found.direct, found.value)
        if self.part == "direct term":
            zero = tree.zeros_like(found.direct)
            return replace(found, direct=zero, value=tree.sub(zero, mixed))
        if self.part == "inverse product":
            q = tree.scale(1.5, found.inverse_product)
            return replace(found, inverse_product=q, value=tree.sub(found.direct, tree.scale(1.5, mixed)))
        return replace(found, value=tree.add(found.direct, mixed))


@pytest.mark.parametrize("part", ["direct term", "inverse product", "mixed derivative"])
@pytest.mark.parametrize("make", [classification, ridge])
def test_the_part_that_is_wrong_is_named(part, make):
    check = wg.check_hypergradient(Wrong(part), *make())
    assert check.worst.name == part
    assert f"largest disagreement: {part}" in str(check)
    others = [p.relative_error for p in check.parts if p.name != part]
    assert max(others) < 1e-7
    assert check.worst.relative_error > 0.1
    expected = {"direct term": 0.0, "inverse product": 1.0, "mixed derivative": -1.0}[part]
    assert check.worst.cosine == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("matrix", [reference.dense_ggn, reference.dense_hessian])
def test_a_right_method_agrees_everywhere(matrix):
    operator = wg.GGN if matrix is reference.dense_ggn else wg.Hessian
    method = wg.Implicit(operator, wg.Direct(), preconditioner=None)
    check = wg.check_hypergradient(method, *classification(), against=wg.Dense(matrix))
    assert isinstance(check, Check)
    assert check.total.relative_error < 1e-7
    assert check.worst.relative_error < 1e-7
    assert matrix.__name__ in str(check)


def test_damping_of_the_oracle():
    method = wg.Implicit(solver=wg.Direct(), preconditioner=None, damping=1.0)
    assert wg.check_hypergradient(method, *ridge()).total.relative_error < 1e-8
    undamped = wg.check_hypergradient(method, *ridge(), against=wg.Dense(damping=0.0))
    assert undamped.worst.name == "inverse product"


def test_approximations_show_in_the_inverse_product():
    check = wg.check_hypergradient(wg.make_method("identity"), *classification())
    assert check.worst.name == "inverse product"
    check = wg.check_hypergradient(wg.make_method("unrolled"), *classification())
    assert [part.name for part in check.parts] == ["direct term"]


def test_float32_is_compared_with_float64():
    case = ridge()
    single = {
        key: {name: leaf.float() for name, leaf in values.items()}
        for key, values in {"p": case.params, "h": case.hparams}.items()
    }
    batches = wg.Batches(
        *(
            replace(b, inputs=b.inputs.float(), targets=b.targets.float())
            for b in (case.batches.outer, case.batches.mixed)
        )
    )
    method = wg.Implicit(solver=wg.Direct(), preconditioner=None)
    check = wg.check_hypergradient(method, case.problem, single["p"], single["h"], batches)
    assert 0 < check.total.relative_error < 1e-4


@pytest.mark.parametrize("make", [classification, ridge])
def test_re_solving(make):
    method = wg.Implicit(wg.Hessian, wg.Direct(), preconditioner=None, damping=0.0)
    case = make()
    start = {name: p + 0.02 for name, p in case.params.items()}  # re-solving finds the way back by itself
    assert wg.check_hypergradient(method, *case, against=wg.ReSolve(4)).worst.relative_error < 1e-5
    moved = wg.check_hypergradient(method, case.problem, start, case.hparams, case.batches, wg.ReSolve(4))
    assert moved.inner_gradient > 1e-4
    wrong = wg.check_hypergradient(Wrong("direct term", 0.0), *case, against=wg.ReSolve(4))
    assert wrong.worst.name == "direct term"
    wrong = wg.check_hypergradient(Wrong("mixed derivative", 0.0), *case, against=wg.ReSolve(4))
    assert wrong.worst.name == "through the params"


def test_re_solving_all_coordinates():
    case = ridge()
    method = wg.Implicit(solver=wg.Direct(), preconditioner=None, damping=0.0)
    check = wg.check_hypergradient(method, *case, against=wg.ReSolve(directions=20))
    found = method(*case).value
    assert check.total.found == pytest.approx(float(tree.norm(found)))
    assert check.total.relative_error < 1e-6


def test_re_solving_that_fails_says_so():
    case = classification()
    start = {name: p + 1 for name, p in case.params.items()}
    with pytest.raises(wg.DivergenceError, match="after 2 Newton steps"):
        wg.check_hypergradient(
            wg.make_method("exact"),
            case.problem,
            start,
            case.hparams,
            case.batches,
            wg.ReSolve(2, max_steps=2),
        )


def test_suggest_damping():
    case = classification()
    x, y = case.batches.outer.inputs, case.batches.outer.targets
    held_out = wg.Batch(x.flip(0) + 0.1, y.flip(0))
    before = {name: p.clone() for name, p in case.params.items()}
    sweep = wg.suggest_damping(
        wg.make_method("pcg"), *case, held_out, dampings=[1e-3, 1e-1, 10.0], inner_steps=5
    )
    assert [row.damping for row in sweep.rows] == [1e-3, 1e-1, 10.0]
    lowest = min(sweep.rows, key=lambda row: row.held_out_loss)
    assert sweep.best == lowest.damping
    assert "<- best" in str(sweep)
    assert "no step" in str(sweep)
    assert all(torch.equal(before[name], p) for name, p in case.params.items())
    # by hand, for one of them
    damping, length = 1e-1, 0.1
    found = wg.make_method("pcg", damping)(*case).value
    scale = length * 13**0.5 / float(tree.norm(found))
    moved = tree.axpy(-scale, found, case.hparams)
    leaves = {name: p.clone().requires_grad_() for name, p in case.params.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        case.problem.inner.value(leaves, moved, case.batches.mixed).backward()
        optimizer.step()
    expected = float(case.problem.outer.value(tree.detach(leaves), moved, held_out))
    assert sweep.rows[1].held_out_loss == pytest.approx(expected, rel=1e-12)


def test_suggest_damping_shows_what_failed():
    case = ridge()
    flat = {"theta": torch.zeros(4, 1, dtype=torch.float64)}
    singular = wg.Problem(wg.Level(case.problem.inner.objective, by_row), case.problem.outer)
    batches = replace(case.batches, mixed=wg.Batch(*(t[:2] for t in (case.batches.mixed.inputs, case.batches.mixed.targets)),
                                                   rows=torch.arange(2)))  # fmt: skip
    method = wg.Implicit(solver=wg.Neumann(3, step=1e4), preconditioner=None)
    with pytest.raises(ValueError, match="no damping gave a finite held-out loss"):
        wg.suggest_damping(method, singular, flat, case.hparams, batches, case.batches.outer, [1.0])
    with pytest.raises(TypeError, match="Unrolled has no damping"):
        wg.suggest_damping(wg.make_method("unrolled"), *case, case.batches.outer)
    with pytest.raises(ValueError, match="dampings is"):
        wg.suggest_damping(wg.Implicit(), *case, case.batches.outer, [])
    found = wg.suggest_damping(
        wg.Implicit(solver=wg.CG(3), preconditioner=None),
        *case,
        case.batches.outer,
        [1.0],
        project=wg.Box(-1, 1),
    )
    assert found.best == 1.0


def test_models_with_named_inputs_without_penalty_and_with_nothing_to_gain():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 1, bias=False)

        def forward(self, x, scale):
            return scale * self.linear(x)

    model = Scaled()
    objective = wg.Objective(model, wg.MSE())
    inputs = {"x": torch.eye(2), "scale": torch.tensor([[1.0], [2.0]])}
    train = wg.Batch(inputs, torch.ones(2, 1), rows=torch.arange(2))
    problem = wg.Problem(wg.Level(objective, by_row), wg.Level(objective))
    hparams = {"w": torch.zeros(2)}
    method = wg.Implicit(solver=wg.CG(10, tol=1e-8), preconditioner=None)
    check = wg.check_hypergradient(method, problem, objective.params(), hparams, wg.Batches(train, train))
    assert check.total.relative_error < 1e-3
    met = {"linear.weight": torch.tensor([[1.0, 0.5]])}  # the outer loss is zero: so are all parts
    check = wg.check_hypergradient(method, problem, met, hparams, wg.Batches(train, train))
    assert check.total.relative_error == 0
    assert check.total.cosine == 1
