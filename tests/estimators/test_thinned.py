"""``KFAC(rows=...)``: factors from some of the rows are those from all rows in the mean."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weingarten as wg
from tests.cases import WEIGHTS, N, initialised, integers, normal
from weingarten.estimators.layerwise import Thinning
from weingarten.layers.rows import DenseRows, OneHotRows, every


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(self.table(x)))).mT


IMAGES = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(75, 2))
CASES = {
    "positions": (initialised(Tokens()), integers(4, N, 8), integers(2, N, 8)),
    "data": (
        initialised(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))),
        normal(N, 3),
        integers(2, N),
    ),
    "images": (initialised(IMAGES), normal(N, 2, 5, 5), integers(2, N)),
}


def factors(case: str, stride: int, start: float, monkeypatch, weights=None):
    model, x, y = CASES[case]
    monkeypatch.setattr(Thinning, "_stride", lambda self, number: stride)
    monkeypatch.setattr(Thinning, "drawn", staticmethod(lambda rows, generator: Thinning(rows, start)))
    curvature = wg.estimate(
        wg.KFAC(wg.Empirical()), wg.Objective(model, wg.CrossEntropy()), [wg.Batch(x, y, weights)]
    )
    return [f for block in curvature.blocks for f in (block.inputs, block.outputs)]


@pytest.mark.parametrize(("case", "stride"), [("positions", 2), ("positions", 4), ("data", 5), ("images", 5)])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_the_mean_over_starts_is_the_whole(case, stride, weights, monkeypatch):
    """All starts together see every row once, so that sums over rows are those of all rows."""
    whole = factors(case, 1, 0.0, monkeypatch, weights)
    some = [factors(case, stride, (i + 0.5) / stride, monkeypatch, weights) for i in range(stride)]
    for i, expected in enumerate(whole):
        found = torch.stack([f[i] for f in some])
        if i % 2 or weights is None:  # output factors are sums over a fixed M
            torch.testing.assert_close(found.mean(0), expected)
    if case != "positions":
        assert not torch.allclose(some[0][1], whole[1], rtol=1e-2)


def test_rows_and_their_weights_go_together():
    values, weight = normal(1, 4, 6, 3), normal(1, 4, 6) ** 2
    rows, kept = DenseRows(values).thinned(weight, 1, 3)
    torch.testing.assert_close(rows.values, values[:, :, [1, 4]])
    torch.testing.assert_close(kept, weight[:, :, [1, 4]])
    rows, kept = DenseRows(values[:, :, :1]).thinned(weight[:, :, :1], 1, 2)
    torch.testing.assert_close(rows.values, values[:, [1, 3], :1])
    table = OneHotRows(integers(3, 4, 6), 3, torch.float64)
    assert table.thinned(weight, 1, 3) == (table, weight)
    assert every((2, 1), 7, 100) == (slice(1, None, 2), slice(None))


def test_how_many_rows_are_kept():
    thin = Thinning(10, 0.0)
    kept, share = thin.gradients(normal(1, 1, 4, 25, 2))
    assert kept.shape == (1, 1, 4, 3, 2)
    assert share == 12 / 100
    assert thin.gradients(normal(1, 1, 2, 2, 2))[1] == 1.0


def test_refusals():
    with pytest.raises(ValueError, match=r"rows is 0 with Expand\(\), expected >= 1"):
        wg.KFAC(rows=0)
    with pytest.raises(ValueError, match=r"rows is 8 with Reduce\(\)"):
        wg.KFAC(sharing=wg.Reduce(), rows=8)
