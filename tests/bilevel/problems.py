"""Small bilevel problems in float64 with answers that can be computed another way."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

import weingarten as wg
from weingarten.bilevel.resolve import Level64, minimise

ROWS = 12


@dataclass(frozen=True)
class Case:
    problem: wg.Problem
    params: dict[str, Tensor]
    hparams: dict[str, Tensor]
    batches: wg.Batches

    def __iter__(self):
        """The arguments of a hypergradient method."""
        return iter((self.problem, self.params, self.hparams, self.batches))


def by_row(hparams, batch):
    """Each datum weighs sigmoid of its outer variable."""
    return replace(batch, weights=torch.sigmoid(hparams["w"][batch.rows]))


def decay(hparams):
    return hparams["log_c"].exp()


def coupling(params, hparams):
    """An outer penalty: the direct term."""
    return 0.3 * (hparams["w"] ** 2).sum() + hparams["log_c"].sin()


def data(rows=ROWS, features=4, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, classes, (rows,), generator=generator)


def network(seed=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def outer_variables():
    return {
        "w": torch.linspace(-1, 1, ROWS, dtype=torch.float64),
        "log_c": torch.tensor(0.05, dtype=torch.float64).log(),
    }


@lru_cache
def _classification() -> Case:
    objective = wg.Objective(network(), wg.CrossEntropy())
    problem = wg.Problem(wg.Level(objective, by_row, wg.L2(decay)), wg.Level(objective, penalty=coupling))
    x, y = data()
    train = wg.Batch(x, y, rows=torch.arange(ROWS))
    held = wg.Batch(*data(7, seed=3))
    hparams = outer_variables()
    start = {name: p.clone() for name, p in objective.params().items()}
    params = minimise(Level64(problem.inner, train), start, hparams, 1e-11, 300)
    return Case(problem, params, hparams, wg.Batches(held, train))


def classification() -> Case:
    """An MLP at a minimum of a weighted cross-entropy with weight decay."""
    return copy.deepcopy(_classification())


def ridge() -> Case:
    """Weighted ridge regression at its minimum."""
    objective = wg.Objective(lambda params, x: x @ params["theta"], wg.MSE())
    problem = wg.Problem(wg.Level(objective, by_row, wg.L2(decay)), wg.Level(objective, penalty=coupling))
    x, _ = data()
    y = torch.randn(ROWS, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    xv, _ = data(6, seed=7)
    yv = torch.randn(6, 1, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    hparams = outer_variables()
    weights, c = torch.sigmoid(hparams["w"]), hparams["log_c"].exp()
    hessian = 2 / ROWS * x.T @ (weights[:, None] * x) + c * torch.eye(4, dtype=torch.float64)
    theta = torch.linalg.solve(hessian, 2 / ROWS * x.T @ (weights[:, None] * y))
    batches = wg.Batches(wg.Batch(xv, yv), wg.Batch(x, y, rows=torch.arange(ROWS)))
    return Case(problem, {"theta": theta}, hparams, batches)


def ridge_hypergradient(case: Case, damping: float = 0.0) -> dict[str, Tensor]:
    """By hand: no automatic differentiation."""
    x, y = case.batches.mixed.inputs, case.batches.mixed.targets
    xv, yv = case.batches.outer.inputs, case.batches.outer.targets
    theta, w, c = case.params["theta"], case.hparams["w"], case.hparams["log_c"].exp()
    s = torch.sigmoid(w)
    hessian = 2 / len(x) * x.T @ (s[:, None] * x) + (c + damping) * torch.eye(4, dtype=torch.float64)
    q = torch.linalg.solve(hessian, 2 / len(xv) * xv.T @ (xv @ theta - yv))
    mixed = 2 / len(x) * (s * (1 - s)) * ((x @ theta - y) * (x @ q))[:, 0]
    return {"w": 0.6 * w - mixed, "log_c": case.hparams["log_c"].cos() - c * (theta * q).sum()}


def flat(values) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in values.values()])


def relative_error(found, expected) -> float:
    found, expected = (v if isinstance(v, Tensor) else flat(v) for v in (found, expected))
    return float((found - expected).norm() / expected.norm())


def cosine(found, expected) -> float:
    found, expected = (v if isinstance(v, Tensor) else flat(v) for v in (found, expected))
    return float(found @ expected / found.norm() / expected.norm())


def same(x, y) -> bool:
    """Bit for bit, through dicts."""
    if isinstance(x, Tensor):
        return torch.equal(x, y)
    return x.keys() == y.keys() and all(same(x[name], y[name]) for name in x)
