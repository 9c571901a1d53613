"""How often a small curvature batch turns the hypergradient around."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

import weingarten as wg
from weingarten import tree

if TYPE_CHECKING:
    from benchmarks.hypergradient import Setting


@dataclass(frozen=True)
class TextbookCG(wg.Solver):
    """Conjugate gradients that go on through negative curvature, as most public loops do."""

    steps: int

    def solve(self, operator: wg.Operator, b: tree.TreeLike, x0: tree.TreeLike | None = None) -> wg.Solution:
        x, r, p = tree.zeros_like(b), dict(b), dict(b)
        rr = tree.dot(r, r)
        for _ in range(self.steps):
            product = operator.apply(p)
            alpha = rr / tree.dot(p, product)
            x, r = tree.axpy(alpha, p, x), tree.axpy(-alpha, product, r)
            new = tree.dot(r, r)
            p, rr = tree.axpy(new / rr, p, r), new
        return wg.Solution(x, self.steps, float("nan"), converged=False)


def reversals(case: Setting, draws: int, damping: float, size: int = 128) -> dict[str, list[float]]:
    """Cosine to the truth with the curvature of one small batch, draw by draw, the same batches for all."""

    def iterated(solver: wg.Solver, operator: type[wg.Operator] = wg.GGN) -> wg.Implicit:
        return wg.Implicit(operator, solver, None, damping)

    rivals = {
        "default": wg.Implicit(damping=damping),
        "cg 10, GGN": iterated(wg.CG(10)),
        "cg 10, Hessian": iterated(wg.CG(10), wg.Hessian),
        "textbook cg 10, Hessian": iterated(TextbookCG(10), wg.Hessian),
        "textbook cg 50, Hessian": iterated(TextbookCG(50), wg.Hessian),
    }
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[float]] = {name: [] for name in rivals}
    mixed = case.batches.mixed
    for _ in range(draws):
        rows = torch.randperm(len(mixed.targets), generator=generator)[:size]
        part = wg.Batch(mixed.inputs[rows], mixed.targets[rows], rows=rows)
        for name, method in rivals.items():
            batches = replace(case.batches, curvature=part)
            value = method(case.problem, case.params, case.hparams, batches, generator=generator).value[
                "weight"
            ]
            found[name].append(float(torch.nn.functional.cosine_similarity(value, case.truth, dim=0)))
    return found


def print_reversals(found: dict[str, list[float]]) -> None:
    print("\ncurvature from 128 rows, in mid-training: cosine to the truth over the draws")
    for name, cosines in found.items():
        mean, deviation, turned = (
            statistics.mean(cosines),
            statistics.stdev(cosines),
            sum(c < 0 for c in cosines),
        )
        print(f"{name:24} {mean:.2f} +- {deviation:.2f}, reversed {turned} of {len(cosines)}")
