"""Every group of the table: what an action on one axis, or on two axes at once, must be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.cases import generator, normal
from weingarten.groups import (
    GROUPS,
    Action,
    Conjugated,
    Kind,
    Permutation,
    Rotation,
    SignedPermutation,
    Signs,
    Wreath,
)
from weingarten.groups.action import TRIVIAL, matrix
from weingarten.reference_orbit import elements


def basis(n: int) -> Tensor:
    return torch.linalg.qr(normal(n, n, seed=n))[0]


# name in GROUPS -> groups, each with the lengths it is tried on
CASES: dict[str, list[tuple[Action, tuple[int, ...]]]] = {
    "permutation": [(Permutation(), (1, 2, 3, 4, 5))],
    "signed-permutation": [(SignedPermutation(), (1, 2, 3, 4))],
    "signs": [(Signs(), (1, 2, 3, 4))],
    "rotation": [(Rotation(), (1, 2, 3, 4))],
    "wreath": [
        (Wreath(2), (2, 4)),
        (Wreath(2, tie="heads"), (4,)),
        (Wreath(2, outer=None), (4,)),
        (Wreath(1, Permutation()), (3,)),
        (Wreath(2, Permutation()), (2, 4, 6)),
        (Wreath(3, Permutation()), (6,)),
        (Wreath(2, Permutation(), None), (4, 6)),
        (Wreath(2, Signs()), (4,)),
        (Wreath(2, Signs(), None), (4,)),
        (Wreath(2, SignedPermutation()), (4,)),
        (Wreath(2, Wreath(2, Permutation())), (4,)),
    ],
    "conjugated": [
        (Conjugated(Signs(), basis(3)), (3,)),
        (Conjugated(Permutation(), basis(4)), (4,)),
        (Conjugated(Rotation(), basis(3)), (3,)),
        (Conjugated(Wreath(2, Permutation()), basis(4)), (4,)),
    ],
}


def label(group: Action, n: int) -> str:
    if isinstance(group, Conjugated):
        return f"Conjugated {label(group.action, n)}"
    return f"{group}".replace("()", "") + f" {n}"


ONE = [
    pytest.param(group, n, id=label(group, n))
    for cases in CASES.values()
    for group, lengths in cases
    for n in lengths
]
PAIRS = [
    pytest.param(group, n, id=label(group, n))
    for cases in CASES.values()
    for group, lengths in cases
    for n in lengths
    if not isinstance(group, Wreath)
    and not isinstance(getattr(group, "action", None), Wreath)
    and not (isinstance(group, Permutation) and n < 4)
]


def finite(group: Action) -> bool:
    if isinstance(group, Wreath):
        return finite(group.inner)
    return finite(group.action) if isinstance(group, Conjugated) else not isinstance(group, Rotation)


def sampled(group: Action, n: int, draws: int) -> Tensor:
    g = generator(n)
    return torch.stack([matrix(group, group.sample(n, g), n) for _ in range(draws)])


def enumerated(group: Action, n: int) -> Tensor:
    return torch.stack([matrix(group, element, n) for element in elements(group, n)])


def schur(kinds: tuple[Kind, ...], pieces: dict[str, Tensor], m: Tensor) -> Tensor:
    """``E[A M A^T]`` from the coordinates of the unit vectors."""
    total = torch.zeros_like(m)
    for kind in kinds:
        u = pieces[kind.label]  # (n, count, length, copies)
        block = torch.einsum("iclx,ij,jcly->cxy", u, m, u) / kind.dim
        total += torch.einsum("iclx,cxy,jcly->ij", u, block, u)
    return total


def check_shapes(kinds: tuple[Kind, ...], pieces: dict[str, Tensor], x: Tensor, size: int) -> None:
    assert pieces.keys() == {kind.label for kind in kinds}
    assert len(pieces) == len(kinds)
    for kind in kinds:
        assert pieces[kind.label].shape == (2, 3, kind.count, kind.length, kind.copies)
        assert 1 <= kind.dim <= kind.length
    torch.testing.assert_close(sum(piece.square().sum() for piece in pieces.values()), x.square().sum())
    assert sum(kind.dim * kind.count * kind.copies for kind in kinds) == size


def inner_products(pieces: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.einsum("abclx,declz->abdecxz", p, p) for name, p in pieces.items()}


def squares(kinds: tuple[Kind, ...]) -> int:
    return sum(kind.count * kind.copies**2 for kind in kinds)


def test_every_group_has_a_case():
    assert CASES.keys() == GROUPS.keys()
    for name, cases in CASES.items():
        assert all(type(group) is GROUPS[name] for group, _ in cases)


@pytest.mark.parametrize(("group", "n"), ONE)
class TestOneAxis:
    def test_elements_are_orthogonal_and_act_on_the_last_axis(self, group, n):
        g = generator(3)
        for _ in range(4):
            element = group.sample(n, g)
            a = matrix(group, element, n)
            torch.testing.assert_close(a.mT @ a, torch.eye(n, dtype=a.dtype))
            x = normal(2, 3, n)
            torch.testing.assert_close(group.act(element, x), x @ a.mT)
        same = [matrix(group, group.sample(n, generator(5)), n) for _ in range(2)]
        assert torch.equal(*same)

    def test_coordinates_are_isometric_and_merge_inverts(self, group, n):
        x = normal(2, 3, n)
        pieces = group.split(x)
        check_shapes(group.kinds(n), pieces, x, n)
        torch.testing.assert_close(group.merge(pieces, n), x)

    def test_merge_is_the_adjoint_on_arbitrary_coordinates(self, group, n):
        x = normal(2, 3, n)
        y = {name: normal(*p.shape, seed=9) for name, p in group.split(x).items()}
        product = sum((p * y[name]).sum() for name, p in group.split(x).items())
        torch.testing.assert_close((group.merge(y, n) * x).sum(), product)

    def test_inner_products_of_coordinates_do_not_see_the_element(self, group, n):
        x = normal(2, 3, n)
        moved = group.act(group.sample(n, generator(1)), x)
        torch.testing.assert_close(inner_products(group.split(moved)), inner_products(group.split(x)))

    def test_average_of_a_matrix(self, group, n):
        m = normal(n, n, seed=4)
        expected = schur(group.kinds(n), group.split(torch.eye(n, dtype=m.dtype)), m)
        if finite(group):
            a = enumerated(group, n)
            torch.testing.assert_close((a @ m @ a.mT).mean(0), expected, atol=1e-12, rtol=0)
        a = sampled(group, n, 300)
        assert ((a @ m @ a.mT).mean(0) - expected).norm() < 6 * m.norm() / 300**0.5

    def test_multiplicities_are_the_mean_squared_character(self, group, n):
        a = enumerated(group, n) if finite(group) else sampled(group, n, 1500)
        trace = a.diagonal(dim1=1, dim2=2).sum(-1)
        tolerance = 1e-12 if finite(group) else 5 * float((trace**2).std()) / 1500**0.5 + 1e-12
        assert abs(float((trace**2).mean()) - squares(group.kinds(n))) < tolerance


@pytest.mark.parametrize(("group", "n"), PAIRS)
class TestTwoAxes:
    def test_coordinates_are_isometric_and_merge_inverts(self, group, n):
        x = normal(2, 3, n, n)
        pieces = group.pair_split(x)
        check_shapes(group.pair_kinds(n), pieces, x, n * n)
        torch.testing.assert_close(group.pair_merge(pieces, n), x)

    def test_inner_products_of_coordinates_do_not_see_the_element(self, group, n):
        x, element = normal(2, 3, n, n), group.sample(n, generator(1))
        moved = group.act(element, group.act(element, x).mT).mT
        torch.testing.assert_close(
            inner_products(group.pair_split(moved)), inner_products(group.pair_split(x))
        )

    def test_average_of_a_matrix(self, group, n):
        m = normal(n * n, n * n, seed=4)
        units = torch.eye(n * n, dtype=m.dtype).unflatten(-1, (n, n))
        expected = schur(group.pair_kinds(n), group.pair_split(units), m)
        a = enumerated(group, n) if finite(group) else sampled(group, n, 1500)
        found = torch.zeros_like(m)
        for one in a:
            both = torch.kron(one, one)
            found += both @ m @ both.mT / len(a)
        bound = 1e-12 if finite(group) else 6 / len(a) ** 0.5
        assert (found - expected).norm() < bound * m.norm()

    def test_multiplicities_are_mean_characters(self, group, n):
        """``E[tr^4]`` for the pair alone, ``E[tr^3]`` for what it shares with a vector."""
        a = enumerated(group, n) if finite(group) else sampled(group, n, 1500)
        trace = a.diagonal(dim1=1, dim2=2).sum(-1)
        single = {kind.label: kind for kind in group.kinds(n)}
        shared = sum(
            kind.count * kind.copies * single[kind.label].copies
            for kind in group.pair_kinds(n)
            if kind.label in single
        )
        for power, expected in ((4, squares(group.pair_kinds(n))), (3, shared)):
            error = 1e-11 if finite(group) else 5 * float((trace**power).std()) / 1500**0.5 + 1e-12
            assert abs(float((trace**power).mean()) - expected) < error


@pytest.mark.parametrize("n", [4, 5, 6])
def test_permuted_squares_have_fifteen_coefficients(n):
    assert squares(Permutation().pair_kinds(n)) == 15


@pytest.mark.parametrize("n", [1, 2, 3])
def test_rotations_by_exact_integration(n):
    """Over the angle: O(1) is a sign, O(2) rotations and reflections, O(3) is ``+-1`` times a turn by theta."""
    theta = (torch.arange(64, dtype=torch.float64) + 0.5) * math.pi / 64
    zero, one = torch.zeros_like(theta), torch.ones_like(theta)
    # columns: trace of half of the group, of the other half; density of theta
    first, second, density = {
        1: (one, -one, one),
        2: (2 * theta.cos(), zero, one),
        3: (1 + 2 * theta.cos(), -1 - 2 * theta.cos(), 1 - theta.cos()),
    }[n]
    for power, kinds in ((2, Rotation().kinds(n)), (4, Rotation().pair_kinds(n))):
        mean = ((first**power + second**power) / 2 * density).mean() / density.mean()
        assert float(mean) == pytest.approx(squares(kinds))
    assert len(Rotation().pair_kinds(4)) == 3


@pytest.mark.parametrize("n", [1, 2, 3])
def test_small_permuted_squares_are_refused(n):
    with pytest.raises(ValueError, match=f"the axes have length {n}, expected at least 4"):
        Permutation().pair_kinds(n)


def test_wreath_has_no_coordinates_for_two_axes():
    x = normal(4, 4)
    for call in (
        lambda: Wreath(2).pair_kinds(4),
        lambda: Wreath(2).pair_split(x),
        lambda: Wreath(2).pair_merge({}, 4),
    ):
        with pytest.raises(ValueError, match="no coordinates for two axes"):
            call()


def test_wreath_refuses_what_it_cannot_split():
    with pytest.raises(ValueError, match="length 5, expected a multiple of heads=2"):
        Wreath(2).kinds(5)
    with pytest.raises(ValueError, match="heads is 0"):
        Wreath(0)
    with pytest.raises(ValueError, match="several copies"):
        Wreath(2, Wreath(2, Permutation(), None)).kinds(8)
    with pytest.raises(ValueError, match=r"tie='t'.*invariant"):
        Wreath(2, Permutation(), tie="t").kinds(4)


def test_conjugated_refuses_bases_that_are_not_orthogonal():
    with pytest.raises(ValueError, match="expected an orthogonal basis"):
        Conjugated(Signs(), basis(3) + 0.1)
    with pytest.raises(ValueError, match="expected an orthogonal basis"):
        Conjugated(Signs(), torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match=r"shape \(2, 3\), expected \(n, n\)"):
        Conjugated(Signs(), normal(2, 3))
    with pytest.raises(ValueError, match="length 4, expected the basis' 3"):
        Conjugated(Signs(), basis(3)).kinds(4)


def test_trivial_kinds_are_spelt_alike():
    assert Permutation().kinds(3)[0] == Kind(TRIVIAL, 1, 1)
    assert {kind.label for kind in Wreath(2, Permutation()).kinds(4)} >= {TRIVIAL}
