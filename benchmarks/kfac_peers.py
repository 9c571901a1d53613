"""Other libraries on the same models, each at its fastest settings, in the same process.

What is measured is the work on the one batch: factors, then their inverse (or eigendecomposition, where that is how a library
inverts), its application to one gradient, and the eigenvalue correction in given bases. Construction is left outside.
All of them treat linear and convolutional layers only: no embedding, no normalisation.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from benchmarks.kfac_kronfluence import kronfluence
from benchmarks.kfac_models import Case
from benchmarks.kfac_ours import DAMPING, Prepare, fixed

QUANTITIES = ("factors", "inverse", "apply", "ekfac")
Setups = dict[str, Callable[[], Prepare]]  # by quantity; raises where a library cannot do it

SETTINGS = {
    "curvlinops": "fisher_type=mc, mc_samples=1, kfac_approx=expand, separate_weight_and_bias=False, "
    "check_deterministic=False, num_data and num_per_example_loss_terms given, use_heuristic_damping=True (Cholesky); "
    "other layers' parameters left out",
    "kronfluence": "parameters frozen by prepare_model, sampled labels, all types float32 (eigendecomposition_dtype too); "
    "called below the Analyzer: no data loader, no files",
    "laplace curvlinops": "CurvlinopsGGN(stochastic=True).kron; other layers' parameters frozen",
    "laplace backpack": "BackPackGGN(stochastic=True).kron",
    "laplace asdl": "AsdlGGN(stochastic=True).kron; other layers' parameters frozen",
}


class UnsupportedError(Exception):
    """What a library cannot do, known beforehand."""


def covered(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of linear and convolutional layers."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return [p for module in layers for p in module.parameters()]


def curvlinops(case: Case) -> Setups:
    from curvlinops import EKFACLinearOperator, KFACInverseLinearOperator, KFACLinearOperator

    params = covered(case.model)

    def make(kind: Any) -> Any:
        return kind(
            case.model,
            nn.CrossEntropyLoss(),
            params,
            [(case.inputs, case.targets)],
            check_deterministic=False,
            fisher_type="mc",
            mc_samples=1,
            kfac_approx="expand",
            num_per_example_loss_terms=case.targets[0].numel(),
            separate_weight_and_bias=False,
            num_data=len(case.targets),
        )

    @cache
    def measured() -> Any:
        operator = make(KFACLinearOperator)
        operator.compute_kronecker_factors()
        return operator

    def new_inverse() -> Any:
        return KFACInverseLinearOperator(measured(), damping=DAMPING, use_heuristic_damping=True)

    def inverse() -> Prepare:
        names = list(measured()._mapping)

        def prepare() -> Callable[[], Any]:
            fresh = new_inverse()
            return lambda: [fresh._compute_or_get_cached_inverse(name) for name in names]

        return prepare

    def apply() -> Prepare:
        kept, gradient = new_inverse(), [torch.randn_like(p) for p in params]
        kept @ gradient  # fills its cache
        return fixed(lambda: kept @ gradient)

    def ekfac() -> Prepare:
        if case.targets.ndim > 1:
            raise UnsupportedError("EKFAC refuses several losses per datum")
        operator = make(EKFACLinearOperator)
        operator.compute_kronecker_factors()
        operator._compute_eigenvectors()

        def prepare() -> Callable[[], Any]:
            operator._corrected_eigenvalues.clear()
            return operator.compute_eigenvalue_correction

        return prepare

    def factors() -> Prepare:
        return lambda: make(KFACLinearOperator).compute_kronecker_factors

    return {"factors": factors, "inverse": inverse, "apply": apply, "ekfac": ekfac}


def laplace(backend: str) -> Callable[[Case], Setups]:
    """A backend of laplace-torch; the Laplace object itself only sums what it returns over batches."""

    def build(case: Case) -> Setups:
        from laplace import curvature

        if backend != "CurvlinopsGGN" and case.targets.ndim > 1:
            raise UnsupportedError("the backend expects classes in the last dimension")
        if backend == "BackPackGGN" and not isinstance(case.model, nn.Sequential):
            raise UnsupportedError("BackPACK extends plain sequences of layers")
        model = copy.deepcopy(case.model)
        kept = {id(p) for p in covered(model)}
        for p in model.parameters():
            p.requires_grad_(id(p) in kept)
        interface = getattr(curvature, backend)(model, "classification", stochastic=True)

        def kron() -> Any:
            model.zero_grad()
            return interface.kron(case.inputs, case.targets, N=len(case.targets))[1]

        def apply() -> Prepare:
            found = kron()
            size = sum(math.prod(len(f) for f in factors) for factors in found.kfacs)
            decomposed, flat = found.decompose() + torch.tensor(DAMPING), torch.randn(size)
            return fixed(lambda: decomposed.bmm(flat, exponent=-1))

        def ekfac() -> Prepare:
            raise UnsupportedError("laplace-torch has no EKFAC")

        return {
            "factors": lambda: fixed(kron),
            "inverse": lambda: fixed(kron().decompose),
            "apply": apply,
            "ekfac": ekfac,
        }

    return build


PEERS: dict[str, Callable[[Case], Setups]] = {
    "curvlinops": curvlinops,
    "kronfluence": kronfluence,
    "laplace curvlinops": laplace("CurvlinopsGGN"),
    "laplace backpack": laplace("BackPackGGN"),
    "laplace asdl": laplace("AsdlGGN"),
}

# For --quick: those that were ever the fastest of the peers, and that do not take ten seconds.
QUICK: dict[str, dict[str, tuple[str, ...]]] = {
    "mlp": {"curvlinops": QUANTITIES, "kronfluence": ("factors",), "laplace asdl": ("factors",)},
    "cnn": {"curvlinops": QUANTITIES, "kronfluence": ("factors",), "laplace asdl": ("factors",)},
    "gpt": {"curvlinops": QUANTITIES, "kronfluence": ("factors", "ekfac")},
    "bert": {"curvlinops": ("factors", "inverse", "apply"), "kronfluence": ("factors",)},
}
FULL: dict[str, tuple[str, ...]] = dict.fromkeys(PEERS, QUANTITIES)


@contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def peers(case: Case, wanted: dict[str, tuple[str, ...]]) -> dict[str, Prepare | str]:
    """``"peer: quantity"`` to what is timed, or to the reason why there is nothing to time."""
    found: dict[str, Prepare | str] = {}
    for name, quantities in wanted.items():
        with quietly():
            found |= {f"{name}: {quantity}": value for quantity, value in attempt(name, case, quantities)}
    return found


def attempt(name: str, case: Case, quantities: tuple[str, ...]) -> Iterator[tuple[str, Prepare | str]]:
    """Set up the quantities of one peer; whatever it raises on a model that it cannot treat becomes the reason."""
    try:
        setups = PEERS[name](case)
    except Exception as error:
        yield from ((quantity, reason(error)) for quantity in quantities)
        return
    for quantity in quantities:
        try:
            yield quantity, setups[quantity]()
        except Exception as error:
            yield quantity, reason(error)


def reason(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    kind = "" if isinstance(error, UnsupportedError) else f"{type(error).__name__}: "
    return f"unsupported: {kind}{first}"[:200]
