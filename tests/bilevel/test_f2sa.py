from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import weingarten as wg
from tests.bilevel.problems import Case, classification, cosine, relative_error, ridge
from tests.bilevel.test_unrolled import away_from_the_minimum
from weingarten.bilevel.resolve import Level64, minimise


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def exact(case):
    return wg.Implicit(solver=wg.Direct(), preconditioner=None, damping=0.0)(*case)


def after_calls(method, case, calls=1):
    state = None
    for _ in range(calls):
        found = method(*case, state)
        state = found.state
    return found


def well_conditioned() -> Case:
    """Ridge regression with a weight decay of 1, at its minimum: 20 steps of length 0.5 leave nothing."""
    case = ridge()
    hparams = case.hparams | {"log_c": torch.zeros((), dtype=torch.float64)}
    params = minimise(Level64(case.problem.inner, case.batches.mixed), case.params, hparams, 1e-11, 10)
    return replace(case, params=params, hparams=hparams)


def test_its_distance_from_the_exact_hypergradient_falls_like_one_over_sigma():
    case = well_conditioned()
    expected = exact(case)
    errors = [
        relative_error(wg.F2SA(sigma, steps=25, lr=0.5)(*case).value, expected.value)
        for sigma in (10.0, 100.0, 1000.0, 1e4)
    ]
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)
    assert errors[2] / errors[3] == pytest.approx(10, rel=0.1)
    assert errors[3] < 1e-4 < 1e-3 < errors[0]


def test_it_converges_over_calls_with_what_it_keeps():
    case = well_conditioned()
    expected = exact(case)
    found, state = [], None
    for _ in range(14):
        found.append(wg.F2SA(1e6, steps=2, lr=0.3)(*case, state))
        state = found[-1].state
    errors = [relative_error(one.value, expected.value) for one in found]
    assert all(later < 0.5 * earlier for earlier, later in pairwise(errors[:5]))
    assert errors[-1] < 1e-5
    assert relative_error(found[-1].inverse_product, expected.inverse_product) < 1e-4
    assert relative_error(found[-1].direct, expected.direct) < 1e-12
    assert found[-1].products == 0


def test_it_is_the_derivative_of_the_penalty_at_its_own_two_points():
    """With the steps written out again by hand."""
    problem, params, hparams, batches = case = away_from_the_minimum()
    sigma, lr = 20.0, 0.05
    y = z = params
    for _ in range(3):

        def pull(p):
            return problem.outer.value(p, hparams, batches.outer) / sigma + problem.inner.value(
                p, hparams, batches.mixed
            )

        up = torch.func.grad(pull)(y)
        down = torch.func.grad(lambda p: problem.inner.value(p, hparams, batches.mixed))(z)
        y = {name: p - lr * up[name] for name, p in y.items()}
        z = {name: p - lr * down[name] for name, p in z.items()}

    def lagrangian(h):
        rest = problem.inner.value(y, h, batches.mixed) - problem.inner.value(z, h, batches.mixed)
        return problem.outer.value(y, h, batches.outer) + sigma * rest

    found = wg.F2SA(sigma, steps=3, lr=lr)(*case)
    assert relative_error(found.value, torch.func.grad(lagrangian)(hparams)) < 1e-10
    assert found.outer_loss == pytest.approx(float(problem.outer.value(params, hparams, batches.outer)))
    offset = {name: sigma * (z[name] - y[name]) for name in y}
    assert relative_error(found.inverse_product, offset) < 1e-10


def test_what_the_parameters_have_still_to_descend_cancels():
    """Far from the minimum, where ``sigma (g(y) - g(z))`` with z at the parameters would be all descent."""
    case = away_from_the_minimum()
    found = after_calls(wg.F2SA(1e4), case, 5)
    expected = exact(case)
    parts = [{k: h.value[k] - h.direct[k] for k in h.value} for h in (found, expected)]
    assert cosine(*parts) > 0.8
    assert relative_error(*parts) < 0.7


def test_on_a_network_it_gains_from_call_to_call():
    case = classification()
    expected = wg.Implicit(wg.Hessian, wg.Direct(), preconditioner=None, damping=0.0)(*case).value
    method = wg.F2SA(1e4, lr=0.3)
    errors = [relative_error(after_calls(method, case, calls).value, expected) for calls in (1, 4, 12)]
    assert errors[0] > 1.2 * errors[1] > 1.5 * errors[2]
    identity = wg.make_method("identity")(*case).value
    assert errors[2] < 0.6 * relative_error(identity, expected)


def test_single_precision_at_the_defaults():
    case = ridge()
    single = Case(case.problem, *({n: v.float() for n, v in t.items()} for t in (case.params, case.hparams)),
                  wg.Batches(*(replace(b, inputs=b.inputs.float(), targets=b.targets.float())
                               for b in (case.batches.outer, case.batches.mixed))))  # fmt: skip
    found, expected = (after_calls(wg.F2SA(), c, 10).value for c in (single, case))
    assert relative_error({n: v.double() for n, v in found.items()}, expected) < 1e-4


def test_steps_that_diverge_are_named():
    with pytest.raises(
        wg.DivergenceError,
        match=r"F2SA: after 40 steps, z '\w+' has \d+ entries that are not finite; .* lr is 1",
    ):
        wg.F2SA(steps=40, lr=1e10)(*away_from_the_minimum(ridge))
    with pytest.raises(
        wg.DivergenceError, match=r"F2SA: after 60 steps, y 'theta' has 4 entries that are not finite"
    ):
        wg.F2SA(1e-6, steps=60, lr=1.0)(*ridge())


def test_what_is_not_finite_is_named():
    case = classification()
    for where, match in {
        "mixed": "F2SA: inner gradient at the parameters",
        "outer": "F2SA: outer loss",
    }.items():
        batch = getattr(case.batches, where)
        inputs = batch.inputs.clone()
        inputs[1, 2] = torch.nan
        batches = replace(case.batches, **{where: replace(batch, inputs=inputs)})
        with pytest.raises(ValueError, match=match):
            wg.F2SA()(case.problem, case.params, case.hparams, batches)


def test_settings_that_make_no_sense_are_refused():
    for options, match in (
        ({"sigma": 0.0}, "sigma is 0.0"),
        ({"steps": 0}, "steps 0"),
        ({"lr": float("inf")}, "lr inf"),
    ):
        with pytest.raises(ValueError, match=f"F2SA: .*{match}"):
            wg.F2SA(**options)
