from __future__ import annotations

import gc
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional

import weingarten as wg
from tests.bilevel.problems import (
    ROWS,
    Case,
    by_row,
    classification,
    cosine,
    data,
    flat,
    network,
    relative_error,
    ridge,
    ridge_hypergradient,
    same,
)
from weingarten import reference
from weingarten.solvers.neumann import largest_eigenvalue

DAMPING = 1e-2
IMPLICIT = [name for name in wg.METHODS if isinstance(wg.make_method(name), wg.Implicit)]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def dense_parts(case: Case, matrix=reference.dense_ggn):
    """A = matrix + c I + damping I, and b, from definitions."""
    problem, params, hparams, batches = case
    weighted = by_row(hparams, batches.mixed)
    a = matrix(problem.inner.objective, [weighted], params)
    a = a + (float(hparams["log_c"].exp()) + DAMPING) * torch.eye(len(a), dtype=a.dtype)
    b = torch.func.grad(lambda p: problem.outer.objective.value(p, batches.outer))(params)
    return a, flat(b)


def test_away_from_the_minimum_the_change_to_come_is_foretold():
    """To first order: at a tenth of the distance the error is a tenth of its size."""
    case = ridge()
    exact = wg.Implicit(solver=wg.Direct(), preconditioner=None, damping=0.0)
    there = case.problem.outer.value(case.params, case.hparams, case.batches.outer)
    away = torch.tensor([[0.3], [-0.2], [0.1], [0.4]], dtype=torch.float64)
    errors = []
    for distance in (1e-2, 1e-3):
        params = {"theta": case.params["theta"] + distance * away}
        found = exact(case.problem, params, case.hparams, case.batches)
        leaf = params["theta"].requires_grad_()
        inner = case.problem.inner.value({"theta": leaf}, case.hparams, case.batches.mixed)
        (gradient,) = torch.autograd.grad(inner, leaf)
        assert found.inner_gradient == pytest.approx(float(gradient.norm()), rel=1e-12)
        errors.append(found.outer_change / (float(there) - found.outer_loss) - 1)
    assert 0.08 < errors[1] / errors[0] < 0.12
    assert abs(errors[1]) < 0.02
    minimum = exact(case.problem, case.params, case.hparams, case.batches)
    assert minimum.inner_gradient < 1e-14
    assert abs(minimum.outer_change) < 1e-14


def krylov_solution(a, b, inverse, steps):
    """The best in the A-norm from the span of ``(P^{-1} A)^k P^{-1} b``: what exact CG gives, without its recurrence."""
    basis = [inverse @ b]
    for _ in range(steps - 1):
        v = inverse @ (a @ basis[-1])
        basis.append(v / v.norm())
    q, _ = torch.linalg.qr(torch.stack(basis, 1))
    return q @ torch.linalg.solve(q.T @ a @ q, q.T @ b)


def inverse_of(estimator, case: Case, function) -> torch.Tensor:
    curvature = wg.estimate(
        estimator, case.problem.inner.objective, [by_row(case.hparams, case.batches.mixed)], case.params
    )
    return curvature.map(function(-1, DAMPING + float(case.hparams["log_c"].exp()))).dense()


def expected_product(name, case):
    a, b = dense_parts(case)
    identity = torch.eye(len(a), dtype=a.dtype)
    if name == "identity":
        return b
    if name == "exact":
        return torch.linalg.solve(a, b)
    if name in ("neumann", "nystrom"):
        space = wg.tree.Space.of(case.params)

        class Matrix(wg.Operator):
            space = wg.tree.Space.of(case.params)

            def apply(self, v):
                return space.unflatten(a @ space.flatten(v))

        if name == "nystrom":
            return torch.linalg.solve(wg.nystrom(Matrix(), 10, DAMPING).dense() + DAMPING * identity, b)
        step = 1 / largest_eigenvalue(Matrix())
        return step * sum(torch.linalg.matrix_power(identity - step * a, k) @ b for k in range(20))
    if name == "cg":
        return krylov_solution(a, b, identity, 10)
    if name in ("pcg", "kfac-length"):
        return krylov_solution(a, b, inverse_of(wg.KFAC(), case, wg.FactoredPower), 3 if name == "pcg" else 1)
    estimator, function = {
        "kfac": (wg.KFAC(), wg.FactoredPower),
        "ekfac": (wg.EKFAC(), wg.Power),
        "diagonal": (wg.Diagonal(), wg.Power),
    }[name]
    return inverse_of(estimator, case, function) @ b


PRODUCTS = {
    "identity": 0,
    "neumann": 30,
    "cg": 10,
    "nystrom": 11,
    "pcg": 3,
    "kfac": 0,
    "kfac-length": 1,
    "ekfac": 0,
    "diagonal": 0,
}


@pytest.mark.parametrize("name", IMPLICIT)
def test_inverse_product_is_what_the_method_says(name):
    case = classification()
    found = wg.make_method(name, DAMPING)(*case)
    assert relative_error(found.inverse_product, expected_product(name, case)) < 1e-5
    if name in PRODUCTS:
        assert found.products == PRODUCTS[name]
    assert not found.negative_curvature
    assert found.seconds > 0


@pytest.mark.parametrize("name", IMPLICIT)
def test_hypergradient_is_direct_minus_mixed_at_the_methods_own_product(name):
    case = classification()
    problem, params, hparams, batches = case
    found = wg.make_method(name, DAMPING)(*case)
    expected = {"w": 0.6 * hparams["w"], "log_c": hparams["log_c"].cos()}
    assert relative_error(found.direct, expected) < 1e-12
    s = torch.sigmoid(hparams["w"])
    for n in range(ROWS):  # each datum's own gradient, one at a time: its weight is counted once
        one = wg.Batch(batches.mixed.inputs[n : n + 1], batches.mixed.targets[n : n + 1])
        gradient = torch.func.grad(lambda p, one=one: problem.inner.objective.value(p, one))(params)
        expected["w"][n] -= s[n] * (1 - s[n]) / ROWS * (flat(gradient) @ flat(found.inverse_product))
    expected["log_c"] = expected["log_c"] - hparams["log_c"].exp() * (
        flat(params) @ flat(found.inverse_product)
    )
    assert relative_error(found.value, expected) < 1e-10


def test_accuracy_grows_with_what_is_paid():
    case = classification()
    exact = wg.make_method("exact", DAMPING)(*case).value
    found = {name: wg.make_method(name, DAMPING)(*case).value for name in IMPLICIT}
    error = {name: relative_error(value, exact) for name, value in found.items()}
    assert error["exact"] == 0
    assert error["pcg"] < error["kfac-length"] < error["kfac"]
    assert error["cg"] < error["identity"]
    assert all(cosine(value, exact) > 0.5 for value in found.values())


def test_residual_is_the_true_one():
    case = classification()
    a, b = dense_parts(case)
    for name in ("cg", "pcg", "kfac-length", "neumann", "exact"):
        found = wg.make_method(name, DAMPING)(*case)
        true = float((b - a @ flat(found.inverse_product)).norm() / b.norm())
        assert found.residual == pytest.approx(true, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("operator", [wg.GGN, wg.Hessian])
def test_ridge_has_the_closed_form(operator, damping):
    case = ridge()
    expected = ridge_hypergradient(case, damping)
    for solver in (wg.Direct(), wg.CG(4, tol=1e-14)):
        found = wg.Implicit(operator, solver, preconditioner=None, damping=damping)(*case)
        assert relative_error(found.value, expected) < 1e-10
        assert (
            relative_error(found.direct, {"w": 0.6 * case.hparams["w"], "log_c": case.hparams["log_c"].cos()})
            < 1e-12
        )


def test_at_a_minimum_the_exact_hessian_gives_the_derivative_of_the_re_solved_problem():
    case = classification()
    method = wg.Implicit(wg.Hessian, wg.Direct(), preconditioner=None, damping=0.0)
    check = wg.check_hypergradient(method, *case, against=wg.ReSolve(directions=4))
    assert check.total.relative_error < 1e-5, str(check)
    assert check.inner_gradient < 1e-9


def test_decay_per_leaf_is_exact_in_cg_and_refused_by_kfac_alone():
    case = classification()
    names = list(case.params)
    coefficient = {name: torch.tensor(0.02 * (i + 1), dtype=torch.float64) for i, name in enumerate(names)}
    per_weight = torch.linspace(0.01, 0.2, case.params[names[0]].numel(), dtype=torch.float64)
    coefficient[names[0]] = per_weight.reshape(case.params[names[0]].shape)

    def coefficients(hparams):
        return {name: value * hparams["log_c"].exp() for name, value in coefficient.items()}

    problem = wg.Problem(
        wg.Level(case.problem.inner.objective, by_row, wg.L2(coefficients)), case.problem.outer
    )
    case = replace(case, problem=problem)
    weighted = by_row(case.hparams, case.batches.mixed)
    a = reference.dense_ggn(problem.inner.objective, [weighted], case.params)
    c = flat({n: v.expand_as(case.params[n]) for n, v in coefficients(case.hparams).items()})
    a = a + torch.diag(c + DAMPING)
    b = dense_parts(case)[1]
    expected = torch.linalg.solve(a, b)
    for method in (
        wg.Implicit(solver=wg.CG(200, tol=1e-12), preconditioner=None),
        wg.Implicit(solver=wg.CG(200, tol=1e-12)),
        wg.Implicit(solver=wg.Direct(), preconditioner=None),
    ):
        assert relative_error(method(*case).inverse_product, expected) < 1e-8
    with pytest.raises(ValueError, match="KFAC alone cannot invert; use it as preconditioner"):
        wg.make_method("kfac")(*case)


@pytest.mark.parametrize("linear", [False, True])
def test_any_function_may_be_the_penalty(linear):
    case = classification()

    def penalty(params, hparams):
        total = sum((p if linear else torch.cosh(p)).sum() for p in params.values())
        return 0.05 * hparams["log_c"].exp() * total

    problem = wg.Problem(replace(case.problem.inner, penalty=penalty), case.problem.outer)
    case = replace(case, problem=problem)
    check = wg.check_hypergradient(wg.Implicit(solver=wg.CG(200, tol=1e-12), preconditioner=None), *case)
    assert check.total.relative_error < 1e-7, str(check)
    with pytest.raises(ValueError, match="not a known multiple"):
        wg.make_method("ekfac")(*case)


def test_each_batch_is_used_for_its_own_purpose():
    case = classification()
    problem, params, hparams, batches = case
    part = {k: wg.Batch(*(t[s] for t in (batches.mixed.inputs, batches.mixed.targets)), rows=torch.arange(ROWS)[s])
            for k, s in {"mixed": slice(0, 5), "curvature": slice(5, None)}.items()}  # fmt: skip
    separate = wg.Batches(batches.outer, part["mixed"], part["curvature"])
    found = wg.make_method("exact", DAMPING)(problem, params, hparams, separate)
    a = dense_parts(replace(case, batches=wg.Batches(batches.outer, part["curvature"])))[0]
    b = dense_parts(case)[1]
    assert relative_error(found.inverse_product, torch.linalg.solve(a, b)) < 1e-10
    indirect = found.value["w"] - found.direct["w"]
    assert (indirect[5:] == 0).all()
    assert (indirect[:5] != 0).all()


@pytest.mark.parametrize("name", ["exact", "unrolled", "identity", "sama", "f2sa"])
def test_hparams_that_nothing_depends_on_are_refused_by_name(name):
    case = classification()
    hparams = {**case.hparams, "rate": torch.ones(2, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"outer variable 'rate' enters neither level .*by unrolling only"):
        wg.make_method(name)(case.problem, case.params, hparams, case.batches)
    plain = wg.Level(case.problem.inner.objective)
    with pytest.raises(ValueError, match="'rate'"):
        wg.make_method(name)(wg.Problem(plain, plain), case.params, {"rate": hparams["rate"]}, case.batches)


@pytest.mark.parametrize("name", ["exact", "sama", "f2sa"])
def test_hparams_that_matter_but_happen_to_have_zero_gradient_are_not_refused(name):
    case = classification()
    level = wg.Level(case.problem.inner.objective, penalty=lambda p, h: h["c"] ** 2 * p["0.weight"].sum())
    problem = wg.Problem(level, wg.Level(case.problem.inner.objective))
    hparams = {"c": torch.zeros((), dtype=torch.float64)}
    assert wg.make_method(name)(problem, case.params, hparams, case.batches).value["c"] == 0


def test_warm_start_continues_from_the_last_product():
    case = classification()
    expected = flat(wg.make_method("exact", DAMPING)(*case).inverse_product)
    method = wg.Implicit(solver=wg.CG(5, tol=1e-12), preconditioner=None, damping=DAMPING, warm_start=True)
    errors, state = [], None
    for _ in range(6):
        found = method(*case, state)
        state = found.state
        errors.append(relative_error(found.inverse_product, expected))
        assert same(state.last, found.inverse_product)
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert errors[-1] < 0.05 * errors[0]


def test_kept_factors_are_kept_renewed_and_rebuilt_bit_for_bit():
    case = classification()
    method = wg.make_method("pcg", DAMPING, refresh=3)
    state, inverses, ages = None, [], []
    generator = torch.Generator().manual_seed(4)
    params = case.params
    for step in range(4):
        batches = case.batches
        found = method(case.problem, params, case.hparams, batches, state, generator)
        if 0 < step < 3:
            restarted = replace(state, inverse=None)  # as after a restart
            again = method(
                case.problem, params, case.hparams, batches, restarted, torch.Generator().manual_seed(9)
            )
            assert same(again.value, found.value)
            assert same(again.inverse_product, found.inverse_product)
        state = found.state
        inverses.append(state.inverse)
        ages.append(state.age)
        params = {name: p + 0.1 for name, p in params.items()}
    assert ages == [1, 2, 3, 1]
    assert inverses[0] is inverses[1] is inverses[2]
    assert inverses[3] is not inverses[0]


def test_anchor_does_not_follow_parameters_that_change_in_place():
    case = classification()
    method = wg.make_method("kfac", DAMPING, refresh=5)
    state = method(*case).state
    expected = method(*case, state).value
    with torch.no_grad():
        for p in case.params.values():
            p.add_(1.0)
    rebuilt = method(*case, replace(state, inverse=None))
    kept = method(*case, state)
    assert same(rebuilt.value, kept.value)
    assert not same(kept.value, expected)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inputs, self.outputs = nn.Linear(4, 24), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.inputs(x).chunk(3, -1)
        return self.outputs(functional.scaled_dot_product_attention(q, k, v).mean(1))


def test_fused_attention():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        objective = wg.Objective(Attention().double(), wg.CrossEntropy())
    x = torch.randn(ROWS, 6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = data()[1]
    level = wg.Level(objective, by_row, wg.L2(1e-2))
    batches = wg.Batches(wg.Batch(x[:4], y[:4]), wg.Batch(x, y, rows=torch.arange(ROWS)))
    hparams = {"w": torch.zeros(ROWS, dtype=torch.float64)}
    case = Case(wg.Problem(level, wg.Level(objective)), objective.params(), hparams, batches)
    method = wg.Implicit(solver=wg.CG(400, tol=1e-10))
    check = wg.check_hypergradient(method, *case)
    assert check.total.relative_error < 1e-6, str(check)
    assert torch.isfinite(wg.make_method("unrolled")(*case).value["w"]).all()


def with_dropout() -> Case:
    case = classification()
    model = network()
    model.insert(2, nn.Dropout(0.5))
    objective = wg.Objective(model, wg.CrossEntropy())
    levels = (replace(level, objective=objective) for level in (case.problem.inner, case.problem.outer))
    return Case(wg.Problem(*levels), objective.params(), case.hparams, case.batches)


@pytest.mark.parametrize("name", list(wg.METHODS))
def test_dropout_is_off_and_nothing_is_touched(name):
    case = with_dropout()
    model = case.problem.inner.objective.model
    model[2].train()
    model[0].eval()
    modes = [module.training for module in model.modules()]
    before = [
        {n: v.clone() for n, v in values.items()}
        for values in (case.params, case.hparams, model.state_dict())
    ]
    grads = [p.grad for p in model.parameters()]
    random = torch.get_rng_state()
    first = wg.make_method(name)(*case)
    second = wg.make_method(name)(*case)
    assert same(first.value, second.value)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert [p.grad for p in model.parameters()] == grads
    assert all(p.requires_grad for p in model.parameters())
    assert all(
        same(x, y) for x, y in zip(before, (case.params, case.hparams, model.state_dict()), strict=True)
    )
    assert not any(
        v.requires_grad for v in [*case.params.values(), *case.hparams.values(), *first.value.values()]
    )


@pytest.mark.parametrize("name", ["kfac-length", "pcg", "exact", "diagonal", "unrolled", "sama", "f2sa"])
def test_frozen_parts_are_left_out(name):
    case = classification()
    model = network()
    model[0].requires_grad_(False)
    objective = wg.Objective(model, wg.CrossEntropy())
    problem = wg.Problem(replace(case.problem.inner, objective=objective), wg.Level(objective))
    found = wg.make_method(name, DAMPING)(problem, objective.params(), case.hparams, case.batches)
    if found.inverse_product is not None:
        assert set(found.inverse_product) == {"2.weight", "2.bias"}
    features = torch.tanh(model[0](case.batches.mixed.inputs)).detach()
    held = torch.tanh(model[0](case.batches.outer.inputs)).detach()
    head = wg.Objective(nn.Sequential(nn.Identity(), nn.Identity(), model[2]), wg.CrossEntropy())
    batches = wg.Batches(
        replace(case.batches.outer, inputs=held), replace(case.batches.mixed, inputs=features)
    )
    alone = wg.Problem(replace(case.problem.inner, objective=head), wg.Level(head))
    expected = wg.make_method(name, DAMPING)(alone, head.params(), case.hparams, batches)
    assert relative_error(found.value, expected.value) < 1e-10


def tensors_alive():
    gc.collect()
    alive = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    return len(alive), sum(item.grad_fn is not None for item in alive)


@pytest.mark.parametrize(
    "method",
    [
        wg.Implicit(refresh=5),
        wg.Implicit(solver=wg.CG(3), preconditioner=None, warm_start=True),
        wg.Unrolled(4, wg.Adam(0.01), truncate=2),
        wg.SAMA(),
        wg.F2SA(),
    ],
    ids=["implicit", "iterative", "unrolled", "sama", "f2sa"],
)
def test_no_graph_is_kept(method):
    case = classification()
    params, state, counts = case.params, None, []
    for step in range(50):
        found = method(case.problem, params, case.hparams, case.batches, state)
        state, params = found.state, {name: p * 0.999 for name, p in params.items()}
        if step in (5, 20, 35, 49):
            counts.append(tensors_alive())
    assert len(set(counts)) == 1, counts
    assert counts[0][1] == 0  # none has a history


@pytest.mark.parametrize("name", list(wg.METHODS))
@pytest.mark.parametrize("where", ["outer", "mixed"])
def test_data_that_is_not_finite_is_an_error(name, where):
    case = classification()
    batch = getattr(case.batches, where)
    inputs = batch.inputs.clone()
    inputs[2, 1] = float("nan")
    batches = replace(case.batches, **{where: replace(batch, inputs=inputs)})
    with pytest.raises((ValueError, wg.DivergenceError), match=r"finite|nan"):
        wg.make_method(name)(case.problem, case.params, case.hparams, batches)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="damping is -1"):
        wg.Implicit(damping=-1)
    with pytest.raises(ValueError, match="refresh 0"):
        wg.Implicit(refresh=0)
    with pytest.raises(ValueError, match=r"expected Direct\(\), found CG"):
        wg.Implicit(operator=wg.KFAC())
    with pytest.raises(ValueError, match="no method 'newton', expected one of identity, neumann, cg"):
        wg.make_method("newton")


def test_module_as_a_function_of_its_outer_variables():
    """Weights from a network over the data: outer variables are a module's parameters."""
    case = ridge()
    weigher = nn.Sequential(nn.Linear(4, 1), nn.Sigmoid()).double()

    def weigh(hparams, batch):
        return replace(batch, weights=torch.func.functional_call(weigher, hparams, batch.inputs)[:, 0])

    objective = case.problem.inner.objective
    problem = wg.Problem(wg.Level(objective, weigh, wg.L2(0.1)), wg.Level(objective))
    hparams = dict(weigher.named_parameters())
    method = wg.Implicit(solver=wg.Direct(), preconditioner=None, damping=0.0)
    check = wg.check_hypergradient(method, problem, case.params, hparams, case.batches)
    assert check.total.relative_error < 1e-7, str(check)
