"""Kronfluence's factors, eigendecompositions, corrections and products on one batch, without its files and loaders."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kfac_models import Case
from benchmarks.kfac_ours import DAMPING, Prepare, fixed


def sampled_loss(output: Tensor) -> Tensor:
    """Cross-entropy at labels drawn from the model, classes in dimension 1."""
    with torch.no_grad():
        rows = output.softmax(1).movedim(1, -1)
        labels = torch.multinomial(rows.reshape(-1, rows.shape[-1]), 1).reshape(rows.shape[:-1])
    return functional.cross_entropy(output, labels, reduction="sum")


def kronfluence(case: Case) -> dict[str, Callable[[], Prepare]]:
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.factor.config import FactorConfig
    from kronfluence.factor.eigen import perform_eigendecomposition
    from kronfluence.module import utils
    from kronfluence.module.tracked_module import ModuleMode, TrackedModule
    from kronfluence.task import Task
    from kronfluence.utils.constants import COVARIANCE_FACTOR_NAMES
    from kronfluence.utils.state import State

    class Labels(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
            return sampled_loss(model(batch))

        def compute_measurement(self, batch: Any, model: Any) -> Tensor:
            raise NotImplementedError

    task, state = Labels(), State(cpu=True)
    model = prepare_model(copy.deepcopy(case.model), task)
    arguments = FactorArguments(strategy="ekfac", eigendecomposition_dtype=torch.float32)
    utils.update_factor_args(model, arguments)
    names = utils.get_tracked_module_names(model)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        task.compute_train_loss(case.inputs, model, sample=True).backward()

    def covariance() -> Callable[[], Any]:
        utils.set_mode(model, ModuleMode.COVARIANCE, release_memory=True)
        return run

    @cache
    def covariances() -> dict[str, Any]:
        covariance()()
        return {
            name: utils.load_factors(model, name, tracked_module_names=names, cpu=True)
            for name in COVARIANCE_FACTOR_NAMES
        }

    def decompose() -> Callable[[], Any]:
        fresh = copy.deepcopy(covariances())  # it divides its argument in place
        return lambda: perform_eigendecomposition(fresh, model, state, arguments, disable_tqdm=True)

    @cache
    def eigen() -> dict[str, Any]:
        return decompose()()

    def correct() -> Callable[[], Any]:
        bases = eigen()  # before the mode is set: it runs in another
        utils.set_mode(model, ModuleMode.LAMBDA, release_memory=True)
        for name, values in bases.items():
            utils.set_factors(model, factor_name=name, factors=values)
        return run

    def apply() -> Prepare:
        config, scores = FactorConfig.CONFIGS["kfac"], ScoreArguments(damping_factor=DAMPING)
        terms = []
        for module in model.modules():
            if isinstance(module, TrackedModule):
                storage = {name: values[module.name] for name, values in eigen().items()}
                out, inside = (len(storage[f"{side}_eigenvalues"]) for side in ("gradient", "activation"))
                config.prepare(storage, scores, torch.device("cpu"))
                terms.append((torch.randn(1, out, inside), storage))
        return fixed(lambda: [config.precondition_gradient(g, storage) for g, storage in terms])

    return {
        "factors": lambda: covariance,
        "inverse": lambda: decompose,
        "apply": apply,
        "ekfac": lambda: correct,
    }
