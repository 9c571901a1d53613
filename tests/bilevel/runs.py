"""Small runs of the loop, the same in every process."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

import weingarten as wg
from tests.bilevel.problems import ROWS, by_row, data, decay, outer_variables

X, Y = data()
XV, YV = data(9, seed=3)

METHODS = {
    "kept-factors": wg.make_method("kfac-length", refresh=3),
    "kept-ekfac": wg.make_method("ekfac", refresh=4),
    "warm-start": wg.Implicit(solver=wg.CG(2), preconditioner=wg.KFAC(), refresh=2, warm_start=True),
    "unrolled": wg.Unrolled(2, wg.Adam(0.05)),
    "sama": wg.SAMA(),
    "f2sa": wg.F2SA(),
    "identity": wg.make_method("identity"),
}

ADAM = partial(torch.optim.Adam, lr=0.02)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def network(seed=1, dropout=0.3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 3)).double()


def run(method, steps=7, inner_optimizer=ADAM, outer_optimizer=ADAM, dropout=0.3, **options):
    """Mini-batches everywhere, several inner steps, dropout, a projection."""
    model = network(dropout=dropout)
    objective = wg.Objective(model, wg.CrossEntropy())
    problem = wg.Problem(wg.Level(objective, by_row, wg.L2(decay)), wg.Level(objective))
    settings = {
        "hparams": outer_variables(),
        "inner_data": wg.Rows(X, Y, batch_size=8),
        "outer_data": wg.Rows(XV, YV, batch_size=5),
        "curvature_data": wg.Rows(X, Y, batch_size=ROWS - 2),
        "inner_steps": 2,
        "project": {"w": wg.Box(-0.9, 0.9)},
        "seed": 3,
    } | options
    return wg.solve(problem, method, inner_optimizer, outer_optimizer, steps, **settings)


def equal(first: wg.Outcome, second: wg.Outcome) -> bool:
    """Bit for bit, all but the seconds."""
    columns = [name for name in first.history.columns() if name != "seconds"]
    return (
        all(torch.equal(first.params[name], second.params[name]) for name in first.params)
        and all(torch.equal(first.hparams[name], second.hparams[name]) for name in first.hparams)
        and all(repr(first.history.column(name)) == repr(second.history.column(name)) for name in columns)
    )
