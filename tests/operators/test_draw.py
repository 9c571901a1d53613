"""Operators that are means over batches: their terms sum to them, and draws are right on average."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import weingarten as wg
from tests.cases import PROBLEMS, WEIGHTS, N, generator, normal
from weingarten import tree
from weingarten.tree import Space

KINDS = [wg.GGN, wg.Hessian, wg.FiniteDifferenceHessian]
kinds = pytest.mark.parametrize("kind", KINDS)
LOSSES = {
    "mlp": [wg.CrossEntropy(), wg.CrossEntropy(reduction="sum"), wg.CrossEntropy(weight=[0.2, 3.0, 0.0])],
    "positions, ignored": [wg.CrossEntropy(ignore_index=1, label_smoothing=0.1)],
    "mlp, squared error": [wg.MSE()],
}
CASES = [(name, loss) for name, losses in LOSSES.items() for loss in losses]


def operator(kind, name="mlp", loss=None, weights=WEIGHTS):
    problem = PROBLEMS[name]
    objective = problem.objective()
    return kind(wg.Objective(objective.model, loss or problem.loss), problem.batches(weights))


@kinds
@pytest.mark.parametrize(("name", "loss"), CASES, ids=str)
def test_terms_are_a_mean_that_is_the_operator(kind, name, loss):
    whole = operator(kind, name, loss)
    terms = whole.terms()
    assert [share for share, _ in terms] == pytest.approx([1 / N, 2 / N, 2 / N])
    total = sum(share * part.dense() for share, part in terms)
    torch.testing.assert_close(total, whole.dense(), rtol=1e-6, atol=1e-9)
    assert not torch.allclose(terms[1][1].dense(), terms[2][1].dense(), rtol=0.1)


@kinds
def test_a_term_of_a_mean_is_the_operator_on_that_batch(kind):
    whole = operator(kind)
    for (_, part), batch in zip(whole.terms(), whole.data, strict=True):
        torch.testing.assert_close(part.dense(), kind(whole.objective, [batch]).dense(), rtol=1e-7, atol=1e-9)


@kinds
def test_draws_follow_the_shares(kind):
    whole, g = operator(kind), generator(5)
    before = torch.get_rng_state()
    found = [id(whole.draw(g).data[0]) for _ in range(2000)]
    assert torch.equal(torch.get_rng_state(), before)
    counts = [found.count(id(batch)) for batch in whole.data]
    expected = [2000 * share for share, _ in whole.terms()]
    chi_squared = sum((n - m) ** 2 / m for n, m in zip(counts, expected, strict=True))
    assert chi_squared < 13.8  # two degrees of freedom: one in a thousand
    again = generator(5)
    assert found[:20] == [id(whole.draw(again).data[0]) for _ in range(20)]


def test_sums_and_multiples_draw_term_by_term():
    ggn = operator(wg.GGN)
    eye = torch.eye(ggn.space.size, dtype=torch.float64)
    shifted = 2.0 * (ggn + 0.3 * wg.Identity(ggn.space))
    choices = [2 * (part.dense() + 0.3 * eye) for _, part in ggn.terms()]
    seen = set()
    for seed in range(12):
        found = shifted.draw(generator(seed)).dense()
        seen.add(next(k for k, choice in enumerate(choices) if torch.allclose(found, choice)))
    assert seen == {0, 1, 2}
    hessian = operator(wg.Hessian)  # each of two draws its own batch
    v = ggn.space.randn(generator())
    drawn = {round(float(tree.dot(v, (ggn + hessian).draw(generator(s)).apply(v))), 9) for s in range(80)}
    assert len(drawn) == 9


def test_other_operators_are_their_own_draw():
    space = Space.of({"w": normal(3)})
    for one in (wg.Identity(space), wg.DiagonalCurvature({"w": normal(3) ** 2})):
        assert one.draw(generator()) is one
        torch.testing.assert_close((one + one).draw(generator()).dense(), 2 * one.dense())


@kinds
def test_loaders_are_refused(kind):
    problem = PROBLEMS["mlp"]
    loader = DataLoader(TensorDataset(problem.inputs, problem.targets), batch_size=2)
    whole = kind(problem.objective(), loader)
    for call in (whole.terms, lambda: whole.draw(generator())):
        with pytest.raises(
            TypeError,
            match=r"the data is a DataLoader, expected a list or tuple of batches; pass list\(loader\)",
        ):
            call()
    assert len(kind(problem.objective(), list(loader)).terms()) == 3
