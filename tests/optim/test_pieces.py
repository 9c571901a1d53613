"""Long sides are split in equal pieces: the same steps as if every piece were a matrix of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import weingarten as wg
from tests.cases import normal
from weingarten.optim import BothSides, Natural, OneSide
from weingarten.optim.moment import OrbitMoment, one_sided
from weingarten.reference_orbit import orbit_average

SETTINGS = {"scaling": Natural(), "refresh": 2, "weight_decay": 0.1}
STEPS = 50


def train(named: dict[str, Tensor], choice, gradients) -> dict[str, Tensor]:
    params = {name: nn.Parameter(p.clone()) for name, p in named.items()}
    optimizer = wg.Symo(list(params.items()), 0.02, choice, **SETTINGS)
    for step in range(STEPS):
        for name, g in gradients(step).items():
            params[name].grad = g
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}


@pytest.mark.parametrize(
    ("shape", "axis", "pieces"),
    [((9, 8), 1, 2), ((6, 7), 0, 3), ((40, 6, 2, 2), 1, 3), ((12, 4, 2, 2), 0, 2)],
)
def test_one_side_of_pieces_is_one_side_of_each(shape, axis, pieces):
    """Along the shorter side, so that of every piece the same side stays the shorter one."""
    w = normal(*shape)

    def cut(x: Tensor) -> dict[str, Tensor]:
        return {str(i): piece.contiguous() for i, piece in enumerate(x.chunk(pieces, axis))}

    def noise(step: int) -> Tensor:
        return normal(*shape, seed=step + 1)

    block = w.shape[axis] // pieces * (w.shape[2:].numel() if axis == 1 else 1)
    whole = train({"w": w}, OneSide(max_block=block), lambda step: {"w": noise(step)})
    parts = train(cut(w), OneSide(), lambda step: cut(noise(step)))
    assert float((whole["w"] - w).abs().max()) > 0.05
    torch.testing.assert_close(whole["w"], torch.cat(list(parts.values()), axis))
    unsplit = train({"w": w}, OneSide(), lambda step: {"w": noise(step)})
    assert not torch.allclose(whole["w"], unsplit["w"])


def test_both_sides_of_pieces_is_shampoo_with_a_factor_for_every_strip():
    """``L_i`` of the strip of rows i over all columns, ``R_j`` of the strip of columns j over all rows."""
    w, (rows, columns), (b1, b2) = normal(6, 8), (2, 2), (0.9, 0.95)
    left, right, momentum = [0.0] * rows, [0.0] * columns, torch.zeros(6, 8, dtype=torch.float64)
    expected = w.clone()

    def root(s: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(s)
        return (vectors * (values + 1e-3 * values.mean()) ** -0.25) @ vectors.mT

    for step in range(STEPS):
        g = normal(6, 8, seed=step + 1)
        left = [b2 * s + (1 - b2) * x @ x.mT / 8 for s, x in zip(left, g.chunk(rows, 0), strict=True)]
        right = [b2 * s + (1 - b2) * x.mT @ x / 6 for s, x in zip(right, g.chunk(columns, 1), strict=True)]
        momentum = b1 * momentum + (1 - b1) * g
        u = (b1 * momentum + (1 - b1) * g) / (1 - b1 ** (step + 2))
        weight = 1 - b2 ** (step + 1)
        if step == 0 or step % 2 == 1:
            sides = [torch.block_diag(*(root(s / weight) for s in side)) for side in (left, right)]
        expected = expected - 0.02 * (0.1 * expected + sides[0] @ u @ sides[1])
    found = train({"w": w}, BothSides(max_block=4), lambda step: {"w": normal(6, 8, seed=step + 1)})
    torch.testing.assert_close(found["w"], expected)


def test_pieces_are_the_orbit_average_under_sign_flips_of_pieces():
    """The dense average of the enumerated group: signed permutations of the rows for rotations, signs of two pieces."""
    g = {"w": normal(3, 4)}
    words = wg.Symmetry.parse({"w": "r (s .)"}, {"s": 2}, r=wg.SignedPermutation(), s=wg.Signs())
    average = orbit_average(torch.outer(g["w"].flatten(), g["w"].flatten()), words, g)
    moment = one_sided("w", g["w"], 0, pieces=2)
    assert isinstance(moment, OrbitMoment)
    state = moment.init()
    moment.accumulate(state, g, 0.0)
    blocks = torch.block_diag(*state["gram.0"])
    torch.testing.assert_close(average, torch.kron(torch.eye(3, dtype=torch.float64), blocks))


def test_sides_that_cannot_be_split_go_to_adamw():
    def plan(shape, choice) -> str:
        return str(wg.Symo([("w", nn.Parameter(torch.zeros(shape)))], symmetry=choice)).splitlines()[1]

    assert "1250 x 20000" in plan((5000, 5000), OneSide())  # four pieces, three do not fit
    assert "AdamW" in plan((2113, 2113), OneSide())  # a prime
    assert "AdamW" in plan((2113, 3), BothSides())
    assert "1733 x 29" in plan((29 * 1733, 1), BothSides())
    assert "AdamW" in plan((200, 2, 5, 5), OneSide(max_block=24))  # one channel is too long
