"""Taking a curvature leaves no trace in the model or in PyTorch's global state, also when something raises in the middle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import _get_current_function_mode_stack

import weingarten as wg
from tests.cases import generator, initialised, normal
from tests.estimators.architectures import (
    DATA,
    LABELS,
    TORCH,
    resnet,
)

ESTIMATORS = {
    "KFAC": wg.KFAC(),
    "exact": wg.KFAC(wg.Exact()),
    "EKFAC": wg.EKFAC(wg.Exact()),
    "diagonal": wg.Diagonal(),
}
NAMES = [
    "ResNet, batch norm",
    "nn.TransformerEncoder, batch_first=True, norm_first=False",
    "GPT, positions from a table",
    "ViT",
]


def everything(model: nn.Module) -> dict[str, Any]:
    """What a pass could change."""
    hooks = (
        "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called", "_state_dict_hooks", "_parameters", "_buffers", "_modules",
    )  # fmt: skip
    found: dict[str, Any] = {
        "random": torch.get_rng_state(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dtype": torch.get_default_dtype(),
        "modes": len(_get_current_function_mode_stack()),
        "kernels": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
    }
    for name, module in model.named_modules():
        found[f"{name} hooks"] = [[(k, id(v)) for k, v in getattr(module, h).items()] for h in hooks]
        found[f"{name} attributes"] = sorted(vars(module))
        found[f"{name} training"] = module.training
    for name, p in model.named_parameters():
        found[name] = (id(p), p.requires_grad, p._version, type(p), len(p._backward_hooks or ()))
        found[f"{name} values"] = p.detach().clone()
        found[f"{name} gradient"] = None if p.grad is None else p.grad.clone()
    for name, b in model.named_buffers():
        found[name] = (id(b), b._version)
        found[f"{name} values"] = b.clone()
    return found


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]
        assert same, name


def prepared(model: nn.Module) -> nn.Module:
    """In mixed modes, with gradients on some parameters, a frozen one and a hook of the user's."""
    model = initialised(model).train()
    modules = list(model.modules())
    for module in modules[::3]:
        module.training = False
    parameters = list(model.parameters())
    for p in parameters[::2]:
        p.grad = torch.ones_like(p)
    parameters[1].requires_grad_(False)
    modules[0].register_forward_hook(lambda module, args, out: None)
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_no_trace_on_success(name, kind):
    case = TORCH[name]
    model = prepared(case.model())
    objective = wg.Objective(model, wg.CrossEntropy())
    before = everything(model)
    wg.estimate(ESTIMATORS[kind], objective, [case.batch()])
    assert_same(before, everything(model))


@pytest.mark.parametrize(
    "around", [torch.no_grad, torch.inference_mode, lambda: sdpa_kernel(SDPBackend.MATH)]
)
@pytest.mark.parametrize("name", NAMES)
def test_called_where_gradients_are_off(name, around):
    case = TORCH[name]
    objective = case.objective()
    for estimator in ESTIMATORS.values():
        expected = wg.estimate(estimator, objective, [case.batch()]).diag()
        with around():
            before = everything(objective.model)
            found = wg.estimate(estimator, objective, [case.batch()])
            assert_same(before, everything(objective.model))
        torch.testing.assert_close(found.diag(), expected)


def test_data_made_in_inference_mode():
    objective = TORCH["ViT"].objective()
    for fisher in (wg.Exact(), wg.Empirical()):
        with torch.inference_mode():
            x, y = normal(DATA, 1, 4, 4), LABELS.clone()
            found = wg.estimate(wg.KFAC(fisher), objective, [(x, y)])
        expected = wg.estimate(wg.KFAC(fisher), objective, [TORCH["ViT"].batch()])
        torch.testing.assert_close(found.diag(), expected.diag())


# --------------------------------------------------------------------------------------------------------- interruptions


class Fails(Exception):
    pass


class Break(torch.autograd.Function):
    """Raises in its backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        raise Fails


class Trap(nn.Module):
    """Passes its input on, until it is set."""

    act: Callable[[Tensor], Tensor] = staticmethod(lambda x: x)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


def interrupt(x: Tensor) -> Tensor:
    raise KeyboardInterrupt


def fail(x: Tensor) -> Tensor:
    raise Fails


def trapped() -> nn.Module:
    net = resnet(nn.BatchNorm2d)
    return nn.Sequential(*net[:4], nn.Dropout(0.1), Trap(), *net[4:])


class LossThatFails(wg.CrossEntropy):
    """Has elements, and no columns."""

    def root(self, output: Tensor, target: Tensor) -> Any:
        raise Fails

    def sample(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        raise Fails


def run_step(objective: wg.Objective, batch: wg.Batch) -> None:
    kfac, params = wg.KFAC(), objective.params()
    kfac.step(kfac.init(objective, params), objective, params, batch, generator())


RUNS: dict[str, Callable[[wg.Objective, wg.Batch], Any]] = {
    **{name: (lambda o, b, e=e: wg.estimate(e, o, [b])) for name, e in ESTIMATORS.items()},
    "KFAC.step": run_step,
    "otherwise": lambda o, b: wg.estimate(wg.KFAC(otherwise=wg.Diagonal()), o, [b]),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("fault", ["forward", "interrupt", "backward", "loss", "data"])
def test_no_trace_when_something_raises(run, fault):
    model = prepared(trapped())
    for module in model.modules():
        module.training = False if run == "KFAC.step" else module.training
    (trap,) = [module for module in model.modules() if isinstance(module, Trap)]
    acts = {"forward": fail, "interrupt": interrupt, "backward": Break.apply}
    trap.act = acts.get(fault, Trap.act)
    x = normal(DATA, 2, 4, 4) * (torch.nan if fault == "data" else 1)
    objective = wg.Objective(model, LossThatFails() if fault == "loss" else wg.CrossEntropy())
    expected = {"interrupt": KeyboardInterrupt, "data": ValueError}.get(fault, Fails)
    before = everything(model)
    with pytest.raises(expected):
        RUNS[run](objective, wg.Batch(x, LABELS))
    assert_same(before, everything(model))
    trap.act = Trap.act
    assert_trains(model, normal(DATA, 2, 4, 4))


def assert_trains(model: nn.Module, x: Tensor) -> None:
    """One step of gradient descent, as if nothing had been."""
    model.train()
    model.zero_grad()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    torch.manual_seed(0)
    loss = nn.functional.cross_entropy(model(x), LABELS)
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    optimiser.step()
