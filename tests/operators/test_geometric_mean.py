"""Geometric means of orbit averages against their dense formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import weingarten as wg
from tests.cases import normal
from weingarten.matfun import mean_of
from weingarten.symmetry import Isotypic, Symmetry

P, R = wg.Permutation(), wg.Rotation()


def power(matrix: Tensor, exponent: float) -> Tensor:
    spectrum, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return (vectors * spectrum**exponent) @ vectors.mT


def mean(a: Tensor, b: Tensor) -> Tensor:
    root, inverse = power(a, 0.5), power(a, -0.5)
    return root @ power(inverse @ b @ inverse, 0.5) @ root


def commutant(symmetry: Symmetry, params: dict[str, Tensor], seed: int) -> wg.Commutant:
    isotypic, blocks = Isotypic(symmetry, params), {}
    for i, (key, block) in enumerate(isotypic.blocks.items()):
        x = normal(block.count, block.multiplicity, block.multiplicity + 2, seed=seed + i)
        blocks[key] = x @ x.mT
    return wg.Commutant(isotypic, blocks)


CASES = {
    "coupled": (Symmetry.parse({"w": "h .", "b": "h"}, h=P), {"w": normal(4, 2), "b": normal(4)}),
    "square": (Symmetry.parse({"w": "h h", "b": "h"}, h=P), {"w": normal(4, 4), "b": normal(4)}),
    "signs": (Symmetry.parse({"w": "h .", "b": "h"}, h=wg.Signs()), {"w": normal(3, 2), "b": normal(3)}),
}


@pytest.mark.parametrize("name", CASES)
class TestSameKinds:
    def pair(self, name: str) -> tuple[wg.Commutant, wg.Commutant]:
        return commutant(*CASES[name], seed=0), commutant(*CASES[name], seed=100)

    def test_is_the_dense_formula_and_symmetric(self, name):
        a, b = self.pair(name)
        found = wg.geometric_mean(a, b, floor=0.0).dense()
        torch.testing.assert_close(found, mean(a.dense(), b.dense()))
        torch.testing.assert_close(found, wg.geometric_mean(b, a, floor=0.0).dense())
        # Riccati: the one positive definite X with X a^{-1} X = b
        torch.testing.assert_close(found @ torch.linalg.inv(a.dense()) @ found, b.dense())

    def test_commuting_operands_give_the_root_of_their_product(self, name):
        a, _ = self.pair(name)
        found = wg.geometric_mean(a, a.power(2.0), floor=0.0)
        torch.testing.assert_close(found.dense(), a.power(1.5).dense())
        torch.testing.assert_close(
            wg.geometric_mean(a, a.power(-1), floor=0.0).dense(), torch.eye(len(a.dense())).double()
        )

    def test_rank_deficient_operands_have_a_mean(self, name):
        symmetry, params = CASES[name]
        a, b = (wg.orbit_moment(symmetry, {n: p + i for n, p in params.items()}) for i in range(2))
        found = wg.geometric_mean(a, b)
        assert torch.isfinite(found.dense()).all()
        floored = {
            key: block
            + 1e-6 * block.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(block.shape[-1])
            for key, block in a.blocks.items()
        }
        x, y = found.dense(), wg.Commutant(a.isotypic, floored)
        square = x @ torch.linalg.inv(y.dense()) @ x
        torch.testing.assert_close(square, b.dense(), rtol=0, atol=1e-4 * float(b.dense().norm()))

    def test_zero_gives_zero(self, name):
        a, b = self.pair(name)
        assert not wg.geometric_mean(a.scale(0.0), b).dense().any()
        assert wg.geometric_mean(b, a.scale(0.0)).dense().norm() < 1e-7


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("h .", (4, 4), {"h": P}), (". h", (4, 4), {"h": P})),  # the same blocks, on other axes
        (("h .", (4, 4), {"h": P}), ("h .", (4, 3), {"h": P})),
        (("h .", (4, 4), {"h": P}), ("h .", (4, 4), {"h": wg.SignedPermutation()})),
        (
            ("h .", (4, 4), {"h": R}),
            ("h .", (4, 4), {"h": wg.Conjugated(R, torch.linalg.qr(normal(4, 4))[0])}),
        ),
        (
            ("h[2] .", (2, 2, 4), {"h": R}),
            (".[2] h", (2, 2, 4), {"h": R}),
        ),  # cut between other axes than a matrix is
        (("h .", (4, 4), {"h": P}), (". k", (4, 4), {"k": R})),
    ],
)
def test_refused_where_blocks_of_one_key_mean_different_things(first, second):
    a, b = (
        commutant(Symmetry.parse({"w": words}, **groups), {"w": normal(*shape)}, seed=0)
        for words, shape, groups in (first, second)
    )
    with pytest.raises(ValueError, match="expected two orbit averages with one symmetry"):
        wg.geometric_mean(a, b)


def test_rows_and_columns_of_a_convolution_are_a_kronecker_product():
    params = {"w": normal(3, 2, 2)}
    a = commutant(Symmetry.parse({"w": "h .[2]"}, h=R), params, 0)
    b = commutant(Symmetry.parse({"w": ". k[2]"}, k=R), params, 9)
    found = wg.geometric_mean(a, b)
    assert isinstance(found, wg.Kronecker)
    torch.testing.assert_close(found.dense() @ found.dense(), a.dense() @ b.dense())


def test_mean_of_stacks():
    a, b = (x @ x.mT for x in (normal(3, 4, 6), normal(3, 4, 6, seed=1)))
    torch.testing.assert_close(mean_of(a, b), torch.stack([mean(x, y) for x, y in zip(a, b, strict=True)]))
    with pytest.raises(ValueError, match="mean_of: the matrix has entries that are not finite"):
        mean_of(a, torch.full_like(b, torch.nan))
