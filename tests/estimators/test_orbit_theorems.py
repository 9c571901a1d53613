"""What orbit averages contain: optimisers that have names, as special groups (design, section 5)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import weingarten as wg
from tests.cases import normal
from weingarten.symmetry import Symmetry
from weingarten.tree import Tree

OUT, IN = 4, 6
G = normal(OUT, IN)
STEPS = [normal(OUT, IN, seed=i) for i in range(7)]
IRREDUCIBLE = [wg.Rotation(), wg.SignedPermutation()]
DAMPING = 0.01


def symmetry(rows: wg.groups.Action | None, columns: wg.groups.Action | None) -> Symmetry:
    words = ("." if rows is None else "r") + " " + ("." if columns is None else "c")
    groups = {name: g for name, g in (("r", rows), ("c", columns)) if g is not None}
    return Symmetry.parse({"w": words}, **groups)


def step(moment: wg.Curvature, g: Tensor, exponent: float = -0.5, damping: float = 0.0) -> Tensor:
    return moment.power(exponent, damping).apply({"w": g})["w"]


def averaged(found: Symmetry, gradients: list[Tensor]) -> wg.Commutant:
    """The moment averaged over steps: its blocks are averages of blocks."""
    all_moments = [wg.orbit_moment(found, {"w": g}) for g in gradients]
    first = all_moments[0]
    blocks = {key: sum(m.blocks[key] for m in all_moments) / len(gradients) for key in first.blocks}
    return wg.Commutant(first.isotypic, blocks)


def power(matrix: Tensor, exponent: float) -> Tensor:
    spectrum, vectors = torch.linalg.eigh(matrix)
    return (vectors * spectrum**exponent) @ vectors.mT


@pytest.mark.parametrize("group", IRREDUCIBLE)
def test_rotation_and_free_is_exact_orthogonalisation_muon(group):
    """``sqrt(m) G (G^T G)^{-1/2} = sqrt(m) U V^T`` with m the length of the irreducible axis."""
    tall = normal(6, 4, seed=2)
    u, _, v = torch.linalg.svd(tall, full_matrices=False)
    found = step(wg.orbit_moment(symmetry(group, None), {"w": tall}), tall)
    torch.testing.assert_close(found, 6**0.5 * u @ v)
    wide = tall.mT.contiguous()
    found = step(wg.orbit_moment(symmetry(None, group), {"w": wide}), wide)
    torch.testing.assert_close(found, 6**0.5 * (u @ v).mT)


@pytest.mark.parametrize("group", IRREDUCIBLE)
def test_rotation_and_free_over_steps_is_one_sided_shampoo(group):
    right = sum(g.mT @ g for g in STEPS) / len(STEPS) + OUT * DAMPING * torch.eye(IN, dtype=G.dtype)
    found = step(averaged(symmetry(group, None), STEPS), G, damping=DAMPING)
    torch.testing.assert_close(found, OUT**0.5 * G @ power(right, -0.5))


def test_signs_and_signs_is_rmsprop():
    """``g_ij / sqrt(E g_ij^2)``; one gradient alone gives its sign."""
    found = averaged(symmetry(wg.Signs(), wg.Signs()), STEPS)
    mean = sum(g**2 for g in STEPS) / len(STEPS)
    torch.testing.assert_close(step(found, G), G / mean.sqrt())
    torch.testing.assert_close(step(wg.orbit_moment(found.isotypic.symmetry, {"w": G}), G), G.sign())
    torch.testing.assert_close(found.diag()["w"], mean)


@pytest.mark.parametrize("first", IRREDUCIBLE)
@pytest.mark.parametrize("second", IRREDUCIBLE)
def test_irreducible_and_irreducible_is_normalised_sgd(first, second):
    found = step(wg.orbit_moment(symmetry(first, second), {"w": G}), G)
    torch.testing.assert_close(found, G / G.square().mean().sqrt())


@pytest.mark.parametrize("group", IRREDUCIBLE)
def test_irreducible_and_signs_is_column_scaling(group):
    """One factor of Adafactor: columns divided by their RMS; rows the other way round."""
    columns = sum(g.square().mean(0, keepdim=True) for g in STEPS) / len(STEPS)
    torch.testing.assert_close(step(averaged(symmetry(group, wg.Signs()), STEPS), G), G / columns.sqrt())
    rows = sum(g.square().mean(1, keepdim=True) for g in STEPS) / len(STEPS)
    torch.testing.assert_close(step(averaged(symmetry(wg.Signs(), group), STEPS), G), G / rows.sqrt())


def test_free_and_free_is_full_matrix():
    """Full-matrix Adagrad and the empirical Fisher: nothing is averaged over a group."""
    flat = torch.stack([g.flatten() for g in STEPS])
    full = flat.mT @ flat / len(STEPS)
    found = averaged(symmetry(None, None), STEPS)
    torch.testing.assert_close(found.dense(), full)
    expected = power(full + DAMPING * torch.eye(OUT * IN, dtype=G.dtype), -0.5) @ G.flatten()
    torch.testing.assert_close(step(found, G, damping=DAMPING), expected.reshape(OUT, IN))


@pytest.mark.parametrize("group", IRREDUCIBLE)
def test_shampoo_is_geometric_mean(group):
    """``(I (x) R) # (L (x) I) = L^{1/2} (x) R^{1/2}``, whose inverse root gives ``L^{-1/4} G R^{-1/4}``."""
    right = sum(g.mT @ g for g in STEPS) / len(STEPS) / OUT
    left = sum(g @ g.mT for g in STEPS) / len(STEPS) / IN
    over_rows, over_columns = (averaged(s, STEPS) for s in (symmetry(group, None), symmetry(None, group)))
    expected = power(left, -0.25) @ G @ power(right, -0.25)
    for mean in (wg.geometric_mean(over_rows, over_columns), wg.geometric_mean(over_columns, over_rows)):
        torch.testing.assert_close(mean.dense(), torch.kron(power(left, 0.5), power(right, 0.5)))
        torch.testing.assert_close(step(mean, G), expected)


def test_soap_step_is_signs_in_eigenbasis():
    """SOAP: rotate by the eigenvectors of both one-sided factors, step as Adam does, rotate back."""
    left = torch.linalg.eigh(sum(g @ g.mT for g in STEPS))[1]
    right = torch.linalg.eigh(sum(g.mT @ g for g in STEPS))[1]
    rotated = [left.mT @ g @ right for g in STEPS]
    second = sum(g**2 for g in rotated) / len(STEPS)
    expected = left @ ((left.mT @ G @ right) / second.sqrt()) @ right.mT
    flips = symmetry(wg.Conjugated(wg.Signs(), left), wg.Conjugated(wg.Signs(), right))
    torch.testing.assert_close(step(averaged(flips, STEPS), G), expected)


def test_the_gradient_estimator_takes_these_steps():
    """``Orbit`` holds the root already: solving with it is the step of Muon, on the layer it was measured on."""
    x, y = normal(5, IN, seed=3), normal(5, OUT, seed=4)
    objective = wg.Objective(lambda p, inputs: inputs @ p["w"].mT, wg.MSE())
    params: Tree = {"w": G}
    w = G.clone().requires_grad_()
    (g,) = torch.autograd.grad(objective.value({"w": w}, wg.Batch(x, y)), w)
    found = wg.estimate(wg.Orbit(symmetry(None, wg.Rotation())), objective, [(x, y)], params)
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    torch.testing.assert_close(found.solve({"w": g})["w"], IN**0.5 * u @ v, rtol=1e-6, atol=1e-6)
