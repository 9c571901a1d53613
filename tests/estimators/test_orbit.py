"""Orbit curvatures of one gradient, against dense formulas over the enumerated group."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import weingarten as wg
from tests.cases import PROBLEMS, WEIGHTS, N, generator, normal
from weingarten.operators.orbit_average import gram
from weingarten.reference_orbit import elements
from weingarten.symmetry import Isotypic, Symmetry
from weingarten.tree import Space

SPEC = {"0.weight": "h .", "0.bias": "h", "2.weight": ". h", "2.bias": "."}
SYMMETRIES = {
    "permutation": Symmetry.parse(SPEC, h=wg.Permutation()),
    "signed permutation": Symmetry.parse(SPEC, h=wg.SignedPermutation()),
    "signs": Symmetry.parse(SPEC, h=wg.Signs()),
    "wreath": Symmetry.parse(SPEC, h=wg.Wreath(2, wg.Permutation())),
}
PROBLEM = PROBLEMS["mlp"]


def power(matrix: Tensor, exponent: float) -> Tensor:
    spectrum, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    keep = spectrum > 1e-12 * spectrum[-1]
    return (vectors[:, keep] * spectrum[keep] ** exponent) @ vectors[:, keep].mT


def moment(symmetry: Symmetry, v: dict[str, Tensor]) -> Tensor:
    """By enumeration, one image of ``v`` per element."""
    space = Space.of(v)
    moved = [symmetry.act({"h": e}, v) for e in elements(symmetry.groups["h"], 4)]
    rows = torch.stack([space.flatten(x) for x in moved])
    return rows.mT @ rows / len(rows)


def gradient(batches, count: int) -> dict[str, Tensor]:
    objective = PROBLEM.objective()
    params = {name: p.requires_grad_() for name, p in objective.params().items()}
    value = sum(objective.value(params, batch, count) for batch in batches)
    return dict(zip(params, torch.autograd.grad(value, list(params.values())), strict=True))


def estimate(estimator: wg.Estimator, batches=None) -> wg.Commutant:
    return wg.estimate(estimator, PROBLEM.objective(), batches or PROBLEM.batches(WEIGHTS))


@pytest.mark.parametrize("name", SYMMETRIES)
class TestOrbit:
    def test_is_the_root_of_the_averaged_gradient(self, name):
        s_g = moment(SYMMETRIES[name], gradient(PROBLEM.batches(WEIGHTS), N))
        found = estimate(wg.Orbit(SYMMETRIES[name]))
        torch.testing.assert_close(
            found.dense(), power(s_g, 0.5), rtol=0, atol=1e-8
        )  # a root of rounding errors
        torch.testing.assert_close(found.dense() @ found.dense(), s_g, rtol=0, atol=1e-12)

    def test_uncoupled_drops_entries_between_leaves_before_the_root(self, name):
        symmetry = SYMMETRIES[name].uncoupled()
        g = gradient(PROBLEM.batches(WEIGHTS), N)
        s_g = moment(symmetry, g) * torch.block_diag(*(torch.ones(x.numel(), x.numel()) for x in g.values()))
        found = estimate(wg.Orbit(symmetry)).dense()
        torch.testing.assert_close(found @ found, s_g, rtol=0, atol=1e-12)

    def test_decay_averages_the_moments_of_steps(self, name):
        batches, decay = PROBLEM.batches(WEIGHTS), 0.7
        factors = [decay**2, decay, 1.0]
        moments = [moment(SYMMETRIES[name], gradient([b], len(b.targets))) for b in batches]
        expected = sum(f * m for f, m in zip(factors, moments, strict=True)) / sum(factors)
        found = estimate(wg.Orbit(SYMMETRIES[name], decay)).dense()
        torch.testing.assert_close(found @ found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SYMMETRIES)
class TestOrbitSecant:
    def test_satisfies_the_secant_condition(self, name):
        """``H S_w H = S_g`` with the floor added to ``S_w`` on every block."""
        floor = 1e-2
        found = estimate(wg.OrbitSecant(SYMMETRIES[name], floor=floor))
        params = PROBLEM.objective().params()
        blocks = gram(found.isotypic, found.isotypic.gather(params))
        floored = {}
        for key, block in blocks.items():
            mean = block.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
            floored[key] = block + floor * mean * torch.eye(block.shape[-1], dtype=block.dtype)
        s_w = wg.Commutant(found.isotypic, floored).dense()
        s_g, h = moment(SYMMETRIES[name], gradient(PROBLEM.batches(WEIGHTS), N)), found.dense()
        torch.testing.assert_close(h @ s_w @ h, s_g, rtol=0, atol=1e-7 * float(s_g.norm()))
        # and it is the one positive semi-definite solution
        expected = power(s_w, -0.5) @ power(power(s_w, 0.5) @ s_g @ power(s_w, 0.5), 0.5) @ power(s_w, -0.5)
        torch.testing.assert_close(h, expected, rtol=0, atol=1e-6 * float(h.norm()))

    def test_rank_deficient_or_zero_parameters(self, name):
        objective = PROBLEM.objective()
        for change in (
            lambda leaf, p: torch.zeros_like(p),
            lambda leaf, p: torch.zeros_like(p) if "bias" in leaf else p,
            lambda leaf, p: p.sum() * torch.ones_like(p),  # invariant: no part outside of the trivial kind
        ):
            params = {leaf: change(leaf, p) for leaf, p in objective.params().items()}
            found = wg.estimate(wg.OrbitSecant(SYMMETRIES[name]), objective, PROBLEM.batches(), params)
            dense = found.dense()
            assert torch.isfinite(dense).all()
            assert torch.linalg.eigvalsh(dense)[0] > -1e-9 * dense.norm()
            found.solve(params, damping=1e-3)

    def test_zero_parameters_give_the_root(self, name):
        objective = PROBLEM.objective()
        params = {leaf: torch.zeros_like(p) for leaf, p in objective.params().items()}
        secant, orbit = (
            wg.estimate(kind(SYMMETRIES[name]), objective, PROBLEM.batches(), params).dense()
            for kind in (wg.OrbitSecant, wg.Orbit)
        )
        torch.testing.assert_close(secant, orbit, rtol=0, atol=1e-7)

    def test_a_quadratic_loss_gives_its_hessian_up_to_the_floor(self, name):
        """With H in the commutant and gradient H w, the one solution of the secant condition is H."""
        symmetry = SYMMETRIES[name]
        params = PROBLEM.objective().params()
        isotypic = Isotypic(symmetry, params)
        blocks = {}
        for i, (key, block) in enumerate(isotypic.blocks.items()):
            x = normal(block.count, block.multiplicity, block.multiplicity, seed=i)
            blocks[key] = x @ x.mT
        h = wg.Commutant(isotypic, blocks)
        # enough vectors for full rank
        many = [isotypic.space.randn(generator(i)) for i in range(40)]
        s_w = {key: sum(gram(isotypic, isotypic.gather(w))[key] for w in many) for key in blocks}
        s_g = {key: sum(gram(isotypic, isotypic.gather(h.apply(w)))[key] for w in many) for key in blocks}
        found = {
            key: wg.geometric_mean(
                wg.Commutant(isotypic, s_w).power(-1), wg.Commutant(isotypic, s_g), floor=0.0
            ).blocks[key]
            for key in blocks
        }
        torch.testing.assert_close(found, blocks, rtol=1e-6, atol=1e-8)


def test_all_trivial_block_is_uncentred():
    """A gradient that the group leaves alone is all there is: its centred moment would be zero."""
    symmetry = Symmetry.parse({"w": "h ."}, h=wg.Permutation())
    objective = wg.Objective(lambda p, x: x @ p["w"].sum(0), wg.MSE())
    params = {"w": normal(4, 2)}
    found = wg.estimate(wg.Orbit(symmetry), objective, [(normal(5, 2), normal(5))], params)
    assert found.blocks[("", (("h", "standard"),))].norm() < 1e-7
    assert found.blocks[("", ())].norm() > 0.1


@pytest.mark.parametrize("kind", [wg.Orbit, wg.OrbitSecant, wg.OrbitFisher])
class TestRefused:
    def test_leaves_without_words_and_words_without_leaves(self, kind):
        symmetry = SYMMETRIES["permutation"]
        with pytest.raises(
            ValueError, match=rf"{kind.__name__}: the symmetry does not cover \['2.bias'\] and names \[\]"
        ):
            estimate(kind(symmetry.restrict(["0.weight", "0.bias", "2.weight"])))
        more = Symmetry.parse({**SPEC, "x": "."}, h=wg.Permutation())
        with pytest.raises(ValueError, match=r"does not cover \[\] and names \['x'\] that are no parameters"):
            estimate(kind(more))

    def test_decay_that_is_no_average(self, kind):
        for decay in (0.0, 1.5, float("nan")):
            with pytest.raises(ValueError, match=f"{kind.__name__}: decay is {decay}"):
                kind(SYMMETRIES["signs"], decay=decay)

    def test_no_valid_element(self, kind):
        objective = PROBLEM.objective()
        ignored = wg.Batch(PROBLEM.inputs, torch.full((N,), -100))
        with pytest.raises(ValueError, match=rf"{kind.__name__}.read: no valid loss element"):
            wg.estimate(kind(SYMMETRIES["signs"]), objective, [ignored])
        estimator = kind(SYMMETRIES["signs"])
        with pytest.raises(ValueError, match=rf"{kind.__name__}.read: no valid loss element"):
            estimator.read(estimator.init(objective, objective.params()))

    def test_half_precision_is_widened(self, kind):
        model = nn.Linear(3, 2).bfloat16()
        symmetry = Symmetry.parse({"weight": "h .", "bias": "h"}, h=wg.Permutation())
        data = [(normal(4, 3).bfloat16(), torch.tensor([0, 1, 1, 0]))]
        found = wg.estimate(kind(symmetry), wg.Objective(model, wg.CrossEntropy()), data)
        v = found.power(-0.5, 0.1).apply({name: p.detach() for name, p in model.named_parameters()})
        assert {x.dtype for x in v.values()} == {torch.bfloat16}


def test_gradients_that_are_not_finite_are_refused_by_leaf():
    objective = wg.Objective(lambda p, x: x * p["w"].sqrt(), wg.MSE())
    symmetry = Symmetry.parse({"w": "h"}, h=wg.Signs())
    with pytest.raises(ValueError, match="the gradient of 'w' is not finite"):
        wg.estimate(
            wg.Orbit(symmetry), objective, [(normal(2, 3), normal(2, 3))], {"w": torch.zeros(3).double()}
        )


def test_floor_is_checked():
    with pytest.raises(ValueError, match="OrbitSecant: floor is -1"):
        wg.OrbitSecant(SYMMETRIES["signs"], floor=-1)


@pytest.mark.parametrize("kind", [wg.Orbit, wg.OrbitSecant])
@pytest.mark.parametrize("decay", [None, 0.5])
def test_what_is_divided_by(kind, decay):
    """A sum is the mean times the count, and class weights that add up to less than one are still what a mean divides by."""
    data = [PROBLEM.whole()]

    def found(loss: wg.Loss) -> Tensor:
        objective = wg.Objective(PROBLEM.objective().model, loss)
        return wg.estimate(kind(SYMMETRIES["signs"], decay), objective, data).dense()

    mean = found(wg.CrossEntropy())
    torch.testing.assert_close(found(wg.CrossEntropy(reduction="sum")), N * mean)
    torch.testing.assert_close(found(wg.CrossEntropy(weight=[0.1] * 3)), mean)
