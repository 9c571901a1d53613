"""Orbit averages against enumeration of the group, and curvatures that commute with it against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import weingarten as wg
from tests.cases import generator, normal
from weingarten.operators import CommutantMap
from weingarten.reference_orbit import group_matrices, orbit_average, sampled_orbit_average
from weingarten.symmetry import Isotypic, Symmetry
from weingarten.tree import Space, Tree


def basis(n: int) -> Tensor:
    return torch.linalg.qr(normal(n, n, seed=n))[0]


def case(
    spec: dict[str, str], shapes: dict[str, tuple[int, ...]], **groups: wg.groups.Action
) -> tuple[Symmetry, Tree]:
    params = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return Symmetry.parse(spec, params=params, **groups), params


def coupled(group: wg.groups.Action, n: int) -> tuple[Symmetry, Tree]:
    """One name, on rows, on columns and on a vector, with a free leaf beside."""
    spec = {"a": "h .", "b": "h", "c": ". h", "d": "."}
    return case(spec, {"a": (n, 2), "b": (n,), "c": (1, n), "d": (2,)}, h=group)


def square(group: wg.groups.Action, n: int) -> tuple[Symmetry, Tree]:
    """One name twice on a leaf, around a free axis, with a vector that carries it too."""
    return case({"a": "h . h", "b": "h"}, {"a": (n, 1, n), "b": (n,)}, h=group)


def two(group: wg.groups.Action, n: int) -> tuple[Symmetry, Tree]:
    """Two names, in alphabetical order and not."""
    spec = {"a": "h g", "b": ". g", "c": "g . h"}
    return case(spec, {"a": (n, 2), "b": (2, 2), "c": (2, 2, n)}, h=group, g=wg.Permutation())


P, B, S = wg.Permutation(), wg.SignedPermutation(), wg.Signs()

FINITE = {
    "permutation": lambda: coupled(P, 4),
    "permutation of one": lambda: coupled(P, 1),
    "signed permutation": lambda: coupled(B, 3),
    "signs": lambda: coupled(S, 3),
    "wreath of permutations": lambda: coupled(wg.Wreath(2, P), 4),
    "wreath of signs": lambda: coupled(wg.Wreath(2, S), 4),
    "wreath of signed permutations": lambda: coupled(wg.Wreath(2, B), 2),
    "wreath in place": lambda: coupled(wg.Wreath(2, P, None), 4),
    "wreath of signs in place": lambda: coupled(wg.Wreath(2, S, None), 4),
    "wreath of wreaths": lambda: coupled(wg.Wreath(2, wg.Wreath(2, P)), 4),
    "conjugated permutation": lambda: coupled(wg.Conjugated(P, basis(3)), 3),
    "conjugated signs": lambda: coupled(wg.Conjugated(S, basis(3)), 3),
    "square permutation": lambda: square(P, 4),
    "square signed permutation": lambda: square(B, 3),
    "square signed permutation of two": lambda: square(B, 2),
    "square signs": lambda: square(S, 3),
    "square conjugated": lambda: square(wg.Conjugated(S, basis(3)), 3),
    "two names, permutation": lambda: two(P, 3),
    "two names, signed permutation": lambda: two(B, 2),
    "two names, signs": lambda: two(S, 2),
    "two names, wreath": lambda: two(wg.Wreath(2, P), 4),
    "two names, wreath in place": lambda: two(wg.Wreath(2, P, None), 4),
    "three names on two leaves": lambda: case(
        {"a": "h k", "b": "k l", "c": "h . l", "d": "l"},
        {"a": (2, 3), "b": (3, 2), "c": (2, 2, 2), "d": (2,)},
        h=P,
        k=P,
        l=S,
    ),
    "three names on one leaf": lambda: case(
        {"a": "k h l", "b": "h", "c": "l k"}, {"a": (2, 2, 3), "b": (2,), "c": (3, 2)}, h=S, k=P, l=P
    ),
    "a square and another name": lambda: case(
        {"a": "g h h", "b": "g", "c": "h g"}, {"a": (2, 4, 4), "b": (2,), "c": (4, 2)}, h=P, g=P
    ),
    "slices": lambda: case(
        {"w[0:3]": "h .", "w[3:5]": ". .", "w[5:7,0:1]": "g .", "w[5:7,1:2]": "g .", "b": "h"},
        {"w": (7, 2), "b": (3,)},
        h=P,
        g=S,
    ),
    "split axes": lambda: case(
        {"w": "(h g) .", "v": "(. h)", "b": "h"}, {"w": (6, 2), "v": (6,), "b": (3,)}, h=P, g=S
    ),
    "merged axes": lambda: case({"w": "h[2] .", "b": ". h"}, {"w": (2, 2, 2), "b": (2, 4)}, h=P),
    "nothing moved": lambda: case({"w": ". .", "b": "."}, {"w": (2, 2), "b": (2,)}),
    "uncoupled": lambda: (coupled(P, 3)[0].uncoupled(), coupled(P, 3)[1]),
}  # fmt: skip
INFINITE = {
    "rotation": lambda: coupled(wg.Rotation(), 3),
    "wreath of rotations": lambda: coupled(wg.Wreath(2), 4),
    "square rotation": lambda: square(wg.Rotation(), 3),
    "two names, rotation": lambda: two(wg.Rotation(), 2),
}
ALL = FINITE | INFINITE


def mask(symmetry: Symmetry, params: Tree) -> Tensor:
    """Ones where the leaves of two entries are coupled."""
    space = Space.of(params)
    clusters = {part.leaf: part.cluster for part in symmetry.parts}
    labels = sorted(set(clusters.values()))
    flat = space.flatten(
        {name: torch.full_like(p, float(labels.index(clusters[name]))) for name, p in params.items()}
    )
    return (flat[:, None] == flat[None, :]).double()


def vectors(params: Tree) -> tuple[Tree, Tree, Tensor, Tensor]:
    space = Space.of(params)
    v, u = space.randn(generator(1)), space.randn(generator(2))
    return v, u, space.flatten(v), space.flatten(u)


@pytest.mark.parametrize("name", FINITE)
def test_averages_are_those_of_enumeration(name):
    symmetry, params = FINITE[name]()
    v, u, flat, other = vectors(params)
    keep = mask(symmetry, params)
    space, matrices = Space.of(params), torch.stack(list(group_matrices(symmetry, params)))
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(space.flatten(wg.orbit_mean(symmetry, v)), (matrices @ flat).mean(0), **close)
    for second, found in ((flat, wg.orbit_moment(symmetry, v)), (other, wg.orbit_moment(symmetry, v, u))):
        expected = (matrices @ torch.outer(flat, second) @ matrices.mT).mean(0) * keep
        torch.testing.assert_close(found.dense(), expected, **close)


@pytest.mark.parametrize("name", INFINITE)
def test_averages_are_those_of_sampling(name):
    symmetry, params = INFINITE[name]()
    v, u, flat, other = vectors(params)
    space, g, draws = Space.of(params), generator(7), 400
    moved = []
    for _ in range(draws):
        element = symmetry.sample(params, g)
        moved.append([space.flatten(symmetry.act(element, x)) for x in (v, u)])
    first, second = (torch.stack(rows) for rows in zip(*moved, strict=True))
    for x, found in ((first, wg.orbit_moment(symmetry, v)), (second, wg.orbit_moment(symmetry, v, u))):
        assert (found.dense() - first.mT @ x / draws).norm() < 4 * flat.norm() * x[0].norm() / draws**0.5
    assert (space.flatten(wg.orbit_mean(symmetry, v)) - first.mean(0)).norm() < 4 * flat.norm() / draws**0.5
    torch.testing.assert_close(second.norm(dim=1), other.norm().expand(draws))


def test_the_oracle_samples_what_it_enumerates():
    symmetry, params = case({"a": "h", "b": "h"}, {"a": (2,), "b": (2,)}, h=B)
    m = normal(4, 4)
    found = sampled_orbit_average(m, symmetry, params, 400, generator())
    assert (found - orbit_average(m, symmetry, params)).norm() < 4 * m.norm() / 20


def test_rotations_by_their_known_integrals():
    """``E[A x x^T A^T] = |x|^2 I / n``, and ``E[A X A^T] = tr(X) I / n``."""
    x, m = normal(5), normal(4, 4)
    symmetry = Symmetry.parse({"x": "h"}, h=wg.Rotation())
    expected = x @ x / 5 * torch.eye(5, dtype=x.dtype)
    torch.testing.assert_close(wg.orbit_moment(symmetry, {"x": x}).dense(), expected)
    assert wg.orbit_mean(symmetry, {"x": x})["x"].norm() == 0
    square = Symmetry.parse({"m": "h h"}, h=wg.Rotation())
    torch.testing.assert_close(
        wg.orbit_mean(square, {"m": m})["m"], m.trace() / 4 * torch.eye(4, dtype=m.dtype)
    )


@pytest.mark.parametrize("name", ALL)
class TestCurvature:
    def curvature(self, name: str) -> wg.Commutant:
        symmetry, params = ALL[name]()
        isotypic = Isotypic(symmetry, params)
        blocks = {}
        for i, (key, block) in enumerate(isotypic.blocks.items()):
            x = normal(block.count, block.multiplicity, block.multiplicity + 1, seed=i)
            blocks[key] = x @ x.mT / block.multiplicity + 0.05 * torch.eye(block.multiplicity, dtype=x.dtype)
        return wg.Commutant(isotypic, blocks)

    def test_coordinates_are_isometric(self, name):
        symmetry, params = ALL[name]()
        isotypic = Isotypic(symmetry, params)
        v, _, flat, _ = vectors(params)
        coordinates = isotypic.gather(v)
        torch.testing.assert_close(sum(c.square().sum() for c in coordinates.values()), flat @ flat)
        torch.testing.assert_close(isotypic.scatter(coordinates), v)
        blocks = isotypic.blocks.values()
        assert sum(b.dim * b.count * b.multiplicity for b in blocks) == isotypic.space.size
        for key, block in isotypic.blocks.items():
            assert coordinates[key].shape == (block.count, block.length, block.multiplicity)

    def test_commutes_with_the_group(self, name):
        symmetry, params = ALL[name]()
        curvature, v = self.curvature(name), vectors(params)[0]
        element = symmetry.sample(params, generator(3))
        torch.testing.assert_close(
            curvature.apply(symmetry.act(element, v)), symmetry.act(element, curvature.apply(v))
        )

    def test_functions_of_the_spectrum(self, name):
        curvature = self.curvature(name)
        dense, space = curvature.dense(), curvature.space
        spectrum, vectors = torch.linalg.eigh(dense)
        close = {"rtol": 0, "atol": 1e-11 * float(1 / spectrum[0] ** 2)}
        for function in (wg.Power(-1, 0.1), wg.Power(0.5), wg.Power(-0.25), wg.Log(0.2)):
            expected = vectors @ torch.diag(function(spectrum)) @ vectors.mT
            found = curvature.map(function)
            torch.testing.assert_close(found.dense(), expected, **close)
            torch.testing.assert_close(found.trace(), expected.trace(), **close)
            torch.testing.assert_close(space.flatten(found.diag()), expected.diagonal(), **close)
        torch.testing.assert_close(curvature.logdet(0.1), (spectrum + 0.1).log().sum(), **close)
        b = space.randn(generator(4))
        solution = torch.linalg.solve(
            dense + 0.2 * torch.eye(len(dense), dtype=dense.dtype), space.flatten(b)
        )
        torch.testing.assert_close(space.flatten(curvature.solve(b, 0.2)), solution, **close)

    def test_sample_is_the_inverse_root_of_white_noise(self, name):
        """So that its second moment is the damped inverse, exactly."""
        curvature = self.curvature(name)
        noise = curvature.space.flatten(curvature.space.randn(generator(6)))
        root = curvature.power(-0.5, 0.5).dense()
        found = curvature.space.flatten(curvature.sample(generator(6), damping=0.5))
        torch.testing.assert_close(found, root @ noise)
        damped = curvature.shift(0.5).dense()
        torch.testing.assert_close(root @ damped @ root, torch.eye(len(root), dtype=root.dtype))


def test_leaves_lie_in_the_order_of_the_parameters():
    params = {"b": normal(3), "a": normal(3, 2)}
    symmetry = Symmetry.parse({"a": "h .", "b": "h"}, h=P)
    found = wg.orbit_moment(symmetry, params)
    assert list(found.space.shapes) == ["b", "a"]
    flat = Space.of(params).flatten(params)
    torch.testing.assert_close(found.dense(), orbit_average(torch.outer(flat, flat), symmetry, params))


def test_types_are_kept_and_mixed():
    params = {"a": normal(3, 2).float(), "b": normal(3), "c": normal(3).bfloat16()}
    symmetry = Symmetry.parse({"a": "h .", "b": "h", "c": "h"}, h=P)
    found = wg.orbit_moment(symmetry, params)
    v = found.shift(1.0).apply(params)
    assert {name: x.dtype for name, x in v.items()} == {name: x.dtype for name, x in params.items()}
    assert {name: x.dtype for name, x in wg.orbit_mean(symmetry, params).items()} == found.space.dtypes


def test_a_moment_of_two_vectors_takes_and_refuses_what_the_other_does():
    symmetry, params = FINITE["permutation"]()
    found = wg.orbit_moment(symmetry, params, params)
    assert isinstance(found, CommutantMap)
    torch.testing.assert_close(found.dense(), wg.orbit_moment(symmetry, params).dense())
    with pytest.raises(ValueError, match=r"CommutantMap.apply: expected the leaves"):
        found.apply({"a": params["a"]})
    with pytest.raises(ValueError, match=r"Commutant.apply: leaf 'a' has shape"):
        wg.orbit_moment(symmetry, params).apply(params | {"a": normal(2, 2)})


def coefficients(symmetry: Symmetry, params: Tree) -> int:
    return sum(b.count * b.multiplicity**2 for b in Isotypic(symmetry, params).blocks.values())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("permutation", 32),
        ("signed permutation", 16),
        ("both sides permuted", 4),
        ("signs", 48),
        ("rotation", 16),
        ("free", 144),
    ],
)
def test_toy_layer_has_so_many_coefficients(name, expected):
    """A layer of 3 x 4; the number is that of the commutant's dimensions, ``E[tr(A)^2]``."""
    words, groups = {
        "permutation": ("h .", {"h": P}),
        "signed permutation": ("h .", {"h": B}),
        "both sides permuted": ("h k", {"h": P, "k": P}),
        "signs": ("h .", {"h": S}),
        "rotation": ("h .", {"h": wg.Rotation()}),
        "free": (". .", {}),
    }[name]
    symmetry, params = case({"w": words}, {"w": (3, 4)}, **groups)
    assert coefficients(symmetry, params) == expected
    blocks = wg.orbit_moment(symmetry, params).blocks.values()
    assert sum(block.numel() for block in blocks) == expected
    if name != "rotation":
        traces = torch.stack([a.trace() for a in group_matrices(symmetry, params)])
        assert float((traces**2).mean()) == pytest.approx(expected)
