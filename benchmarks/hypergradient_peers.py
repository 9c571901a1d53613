"""Outside references in the same process: TorchOpt's conjugate gradients and curvlinops' KFAC."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import weingarten as wg
from weingarten import tree
from weingarten.bilevel.implicit import mixed_product, outer_gradients

if TYPE_CHECKING:
    from benchmarks.hypergradient import Setting

Call = Callable[[], tuple[Tensor, int]]


def peers(case: Setting, damping: float) -> dict[str, Call]:
    """The peers that can be imported; what is missing is said once."""
    found: dict[str, Call] = {}
    for name, make in (("TorchOpt cg 10", torchopt_cg), ("curvlinops kfac", curvlinops_kfac)):
        try:
            found[name] = make(case, damping)
        except ImportError as error:
            print(f"{name}: left out ({error})")
    return found


def finish(case: Setting, q: dict[str, Tensor]) -> Tensor:
    """The mixed derivative, the same for all."""
    return -mixed_product(case.level, case.params, case.hparams, case.batches.mixed, q)["weight"]


def torchopt_cg(case: Setting, damping: float) -> Call:
    from torchopt.linalg import cg

    def call() -> tuple[Tensor, int]:
        _, b, _ = outer_gradients(case.problem.outer, case.params, case.hparams, case.batches.outer)
        data = [case.level.transform(case.hparams, case.batches.for_curvature)]
        operator = wg.GGN(case.level.objective, data, case.params)
        products = 0

        def product(v: dict[str, Tensor]) -> dict[str, Tensor]:
            nonlocal products
            products += 1
            return tree.axpy(damping, v, operator.apply(v))

        q = cg(product, b, maxiter=10, rtol=1e-6)
        return finish(case, q), products

    return call


def curvlinops_kfac(case: Setting, damping: float) -> Call:
    from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

    model = case.level.objective.model
    assert isinstance(model, torch.nn.Module)
    parameters = [dict(model.named_parameters())[name] for name in case.params]
    batch = case.batches.for_curvature

    def call() -> tuple[Tensor, int]:
        _, b, _ = outer_gradients(case.problem.outer, case.params, case.hparams, case.batches.outer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            factors = KFACLinearOperator(
                model,
                torch.nn.CrossEntropyLoss(),
                parameters,
                [(batch.inputs, batch.targets)],
                check_deterministic=False,
                separate_weight_and_bias=False,
            )
            inverse = KFACInverseLinearOperator(factors, damping=damping, use_heuristic_damping=True)
            q = inverse @ [b[name] for name in case.params]
        return finish(case, dict(zip(case.params, q, strict=True))), 0

    return call
