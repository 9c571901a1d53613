"""What is timed of this library, and the plain PyTorch that two of its parts are held against.

A quantity is a function that prepares one measurement, untimed, and returns the call that is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import weingarten as wg
from benchmarks.kfac_models import Case

DAMPING = 1e-3
ROWS = 512  # of the 2,048 tokens of gpt and the 1,024 of bert, where factors are thinned

Prepare = Callable[[], Callable[[], Any]]


def seconds(prepare: Prepare) -> float:
    """CPU time of one call."""
    call = prepare()
    start = time.process_time()
    call()
    return time.process_time() - start


def fixed(call: Callable[[], Any]) -> Prepare:
    """A call that needs no preparation."""
    return lambda: call


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def updated(estimator: wg.Estimator, case: Case) -> Any:
    """The state after one batch."""
    params = case.objective.params()
    state = estimator.init(case.objective, params)
    return estimator.update(state, case.objective, params, case.batch, generator())


def factors(estimator: wg.Estimator, case: Case, first: bool = False) -> Prepare:
    """One update with empty sums; ``first`` of a new state, which also has to find out how the model uses its parameters."""
    objective, params, batch = case.objective, case.objective.params(), case.batch
    known: Any = updated(
        estimator, case.first(3)
    )  # how the model uses its parameters does not depend on the rows

    def prepare() -> Callable[[], Any]:
        state: Any = estimator.init(objective, params)
        draws = generator()
        if not first:
            state.structure = known.structure
        return lambda: estimator.update(state, objective, params, batch, draws)

    return prepare


def in_loop_step(estimator: wg.KFAC, case: Case) -> Prepare:
    """Loss, gradient and factors of one training step."""
    objective, params, batch = case.objective, case.objective.params(), case.batch
    known = updated(estimator, case.first(3))

    def prepare() -> Callable[[], Any]:
        state, draws = estimator.init(objective, params), generator()
        state.structure = known.structure
        return lambda: estimator.step(state, objective, params, batch, draws)

    return prepare


def in_loop_extra(step: float, gradient: float) -> float:
    """What factors add to a training step, over the gradient alone."""
    return (step - gradient) / gradient


def ekfac(case: Case) -> Prepare:
    """The second pass: the spectrum of one batch in fixed bases."""
    estimator, objective, params, batch = wg.EKFAC(), case.objective, case.objective.params(), case.batch
    state = estimator.finish(updated(estimator, case))
    return lambda: lambda: estimator.update(state, objective, params, batch, generator())


def kroneckers(curvature: wg.Curvature) -> list[wg.Kronecker]:
    assert isinstance(curvature, wg.BlockDiagonal)
    blocks = [block for block in curvature.blocks if isinstance(block, wg.Kronecker)]
    assert len(blocks) == len(curvature.blocks)
    return blocks


def size(curvature: wg.Curvature) -> int:
    """Bytes of the factors."""
    pairs = [(block.inputs, block.outputs) for block in kroneckers(curvature)]
    return sum(f.numel() * f.element_size() for pair in pairs for f in pair)


def mean_of_diagonal(factor: Tensor) -> Tensor:
    """Of each matrix of a stack; a factor of two dimensions is a stack of diagonals."""
    return (factor if factor.ndim == 2 else factor.diagonal(dim1=-2, dim2=-1)).mean(-1)


def plus(factor: Tensor, shift: Tensor) -> Tensor:
    if factor.ndim == 2:
        return factor + shift[:, None]
    return factor + shift[:, None, None] * torch.eye(factor.shape[-1], dtype=factor.dtype)


def shifted(block: wg.Kronecker) -> tuple[Tensor, Tensor]:
    """The factors with the shifts of ``FactoredPower``."""
    a, b = mean_of_diagonal(block.inputs), mean_of_diagonal(block.outputs)
    pi = (a.clamp(min=1e-30) / b.clamp(min=1e-30)).sqrt()
    return plus(block.inputs, pi * DAMPING**0.5), plus(block.outputs, DAMPING**0.5 / pi)


def plain_inverse(matrices: list[Tensor]) -> list[Tensor]:
    """Cholesky and the inverse from it, nothing else; a diagonal is divided into one."""
    return [
        m.reciprocal() if m.ndim == 2 else torch.cholesky_inverse(torch.linalg.cholesky(m)) for m in matrices
    ]


def plain_products(terms: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    """``G W A`` of every layer."""
    results = []
    for g, w, a in terms:
        right = w * a.unsqueeze(-2) if a.ndim == 2 else w @ a
        results.append(right * g.unsqueeze(-1) if g.ndim == 2 else g @ right)
    return results


def ours(case: Case) -> dict[str, Prepare]:
    """All quantities of this library, ``gradient`` first."""
    curvature = wg.KFAC().read(updated(wg.KFAC(), case))
    inverse = curvature.map(wg.FactoredPower(-1, DAMPING))
    gradient = case.gradient()
    matrices = [matrix for block in kroneckers(curvature) for matrix in shifted(block)]
    terms = [
        (block.outputs, block.layout.merge({n: gradient[n] for n in block.space.shapes}), block.inputs)
        for block in kroneckers(inverse)
    ]
    calls = {
        "gradient": fixed(case.gradient),
        "factors": factors(wg.KFAC(), case),
        "first_factors": factors(wg.KFAC(), case, first=True),
        "inverse": fixed(lambda: curvature.map(wg.FactoredPower(-1, DAMPING))),
        "cholesky": fixed(lambda: plain_inverse(matrices)),
        "apply": fixed(lambda: inverse.apply(gradient)),
        "gwa": fixed(lambda: plain_products(terms)),
        "ekfac": ekfac(case),
    }
    calls["step"] = in_loop_step(wg.KFAC(), case)
    if case.name in ("gpt", "bert"):
        thinned = wg.KFAC(rows=ROWS)
        calls |= {"thinned_factors": factors(thinned, case), "thinned_step": in_loop_step(thinned, case)}
    if case.name == "mlp":
        calls["exact"] = factors(wg.KFAC(wg.Exact()), case)
    return calls
