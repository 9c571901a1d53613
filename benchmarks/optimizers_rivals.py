"""The optimisers that are compared, each at its strongest sensible setting, and the groups of the ablation.

Every factory takes a model, example inputs, a learning rate and a weight decay. Convolution kernels are given to Muon, SOAP and
Shampoo as matrices (channels out, all else).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import weingarten as wg
from weingarten.groups import Rotation, Signs
from weingarten.optim import Axes, BothSides, Eigenbases, OneSide, Polar, architecture

Factory = Callable[[nn.Module, Tensor, float, float], torch.optim.Optimizer]


class Together(torch.optim.Optimizer):
    """Optimisers that step together, on matrix views of kernels; one list of groups for one schedule.

    Args:
        parts: constructed over disjoint parameters.
        views: kernels, and the matrices of the same memory which stand for them in a part.
    """

    def __init__(
        self, parts: list[torch.optim.Optimizer], views: list[tuple[nn.Parameter, nn.Parameter]]
    ) -> None:
        self.parts, self.views = parts, views
        self.param_groups = [group for part in parts for group in part.param_groups]

    @property
    def state(self) -> dict[Any, Any]:
        return {p: s for part in self.parts for p, s in part.state.items()}

    def step(self, closure: None = None) -> None:
        for kernel, matrix in self.views:
            matrix.grad = kernel.grad.flatten(1)
        for part in self.parts:
            part.step()


def as_matrices(model: nn.Module) -> tuple[dict[str, nn.Parameter], list[tuple[nn.Parameter, nn.Parameter]]]:
    """Parameters by name, kernels as matrices, and the pairs of both."""
    found, views = dict(model.named_parameters()), []
    for name, p in found.items():
        if p.ndim > 2:
            found[name] = nn.Parameter(p.data.flatten(1))
            views.append((p, found[name]))
    return found, views


def ends(model: nn.Module) -> set[str]:
    """Embeddings and classifiers, which Muon leaves to AdamW (Jordan et al. 2024)."""
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return tables | {name for name, _ in model.named_parameters() if name.startswith("head.")}


def orthogonal(
    grad: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float, **_: Any
) -> Tensor:
    """torch.optim.Muon's Newton-Schulz iteration in float32.

    Without units for bfloat16, in which it comes, it would take 36 times longer on a processor like ours.
    """
    a, b, c = coefficients
    tall = grad.size(0) > grad.size(1)
    x = grad.mT if tall else grad
    x = x / x.norm().clamp(min=eps)
    for _step in range(steps):
        square = x @ x.mT
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def inverse_root(matrix: Tensor, power: float, ridge: float = 1e-6) -> Tensor:
    """``(A + ridge |A| I)^(-1/power)`` by eigh.

    ScalableShampoo's own SVD has no ridge and blows up directions it has not seen; its Schur-Newton iteration has one,
    and takes three times as long.
    """
    values, vectors = torch.linalg.eigh(matrix)
    top = values[..., -1:].clamp(min=1e-30)
    return (vectors * (values.clamp(min=0) + ridge * top).pow(-1 / power).unsqueeze(-2)) @ vectors.mT


def adamw(model: nn.Module, inputs: Tensor, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=weight_decay)


def muon(model: nn.Module, inputs: Tensor, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    from torch.optim import _muon

    _muon._zeropower_via_newtonschulz = orthogonal
    params, views = as_matrices(model)
    excluded = ends(model)
    matrices = [p for name, p in params.items() if p.ndim == 2 and name not in excluded]
    others = [p for name, p in params.items() if p.ndim != 2 or name in excluded]
    first = torch.optim.Muon(
        matrices,
        lr,
        weight_decay=weight_decay,
        momentum=0.95,
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )
    return Together(
        [first, torch.optim.AdamW(others, lr, betas=(0.9, 0.95), weight_decay=weight_decay)], views
    )


def soap(model: nn.Module, inputs: Tensor, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP

    params, views = as_matrices(model)
    first = SOAP(
        list(params.values()),
        lr,
        betas=(0.95, 0.95),
        weight_decay=weight_decay,
        precondition_frequency=10,
        max_precondition_dim=2048,
    )
    return Together([first], views)


def shampoo(model: nn.Module, inputs: Tensor, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    from pytorch_optimizer import ScalableShampoo
    from pytorch_optimizer.optimizer.utils import preconditioner
    from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

    preconditioner.compute_power_svd = inverse_root
    params, views = as_matrices(model)
    first = ScalableShampoo(
        list(params.values()),
        lr,
        betas=(0.9, 0.95),
        moving_average_for_momentum=True,
        weight_decay=weight_decay,
        decoupled_weight_decay=True,
        start_preconditioning_step=10,
        preconditioning_compute_steps=10,
        block_size=1024,
        shape_interpretation=False,
        graft_type=LayerWiseGrafting.RMSPROP,
        use_svd=True,
    )
    return Together([first], views)


@dataclass(frozen=True)
class Symo:
    """Ours, with the keywords of ``wg.Symo``; ``group`` makes the symmetry from model and inputs, None infers it."""

    keywords: dict[str, Any] = field(default_factory=dict)
    group: Callable[[nn.Module, Tensor], Any] | None = None

    def __call__(
        self, model: nn.Module, inputs: Tensor, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        if self.group is None:
            more = {"example_inputs": inputs, **self.keywords}
        else:
            more = {"symmetry": self.group(model, inputs), **self.keywords}
        return wg.Symo(model, lr=lr, weight_decay=weight_decay, **more)


def choice(value: Any) -> Callable[[nn.Module, Tensor], Any]:
    """A choice for all weights that are neither embeddings nor classifiers, as ``wg.Symo`` takes it."""

    def group(model: nn.Module, inputs: Tensor) -> Any:
        excluded = ends(model)
        return lambda name, leaf: None if name in excluded else value

    return group


def uncoupled(model: nn.Module, inputs: Tensor) -> Any:
    """The architecture's group, every weight with blocks of its own."""
    return architecture(model, inputs).uncoupled()


@dataclass(frozen=True)
class Method:
    """An optimiser.

    Attributes:
        title: of figures and tables.
        make: the factory.
        settings: what distinguishes it in the cache, with the rate; change it when the factory changes.
        shift: added to the decimal logarithms of the rates, where its natural scale is another.
    """

    title: str
    make: Factory
    settings: str
    shift: float = 0.0


def defaults() -> str:
    """The signature of ``wg.Symo``: trials with other defaults are other trials."""
    return str(inspect.signature(wg.Symo.__init__))


METHODS = {
    "symo": Method("Symo", Symo(), defaults()),
    "muon": Method("Muon + AdamW", muon, "momentum 0.95, match_rms_adamw, float32; AdamW 0.9, 0.95"),
    "soap": Method("SOAP", soap, "betas 0.95, 0.95, every 10 steps, sides up to 2048"),
    "shampoo": Method(
        "Shampoo",
        shampoo,
        "scalable, betas 0.9, 0.95, from step 10 every 10, blocks of 1024, RMSProp grafting, eigh",
    ),
    "adamw": Method("AdamW", adamw, "betas 0.9, 0.95"),
}

# Groups on the same code and with the same length of steps. The lines of the ablation are these and "symo".
VARIANTS = {
    "rotations": (
        "rotations of both sides: one scale a weight",
        Symo(group=choice(Axes(Rotation(), Rotation()))),
    ),
    "signs": ("sign flips (Adam's)", Symo(group=choice(Axes(Signs(), Signs())))),
    "polar": (
        "rotations of one side, of this step's momentum (Muon's)",
        Symo({"betas": (0.95, 0.0)}, choice(Polar())),
    ),
    "one side": ("rotations of one side, averaged over steps", Symo(group=choice(OneSide()))),
    "both sides": ("rotations of either side (Shampoo's)", Symo(group=choice(BothSides()))),
    "uncoupled": ("the architecture's, whole inverse root, leaf by leaf", Symo(group=uncoupled)),
    "coupled": ("the architecture's, whole inverse root, coupled", Symo(group=architecture)),
    "narrow": ("adapted, blocks up to 64: the residual stream keeps its basis", Symo({"max_block": 64})),
    "wide": ("adapted, blocks up to 512: hidden units turned too", Symo({"max_block": 512})),
    "eigenbases": ("eigenbases of both sides (SOAP's)", Symo(group=choice(Eigenbases()))),
    "carried": ("the same, spectrum carried along", Symo(group=choice(Eigenbases(carry=True)))),
}
ABLATION = {
    f"symo: {name}": Method(title, make, f"{name}; {make.keywords}; {defaults()}")
    for name, (title, make) in VARIANTS.items()
}


def method(name: str) -> Method:
    return METHODS[name] if name in METHODS else ABLATION[name]


def tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors inside lists, dicts and objects, each once."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    else:
        inside = value.values() if isinstance(value, dict) else getattr(value, "__dict__", {}).values()
        for item in value if isinstance(value, (list, tuple)) else inside:
            yield from tensors(item, seen)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Memory of the state, each storage once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _state(optimizer)}
    return sum(found.values())


def _state(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    seen: set[int] = set()
    for state in optimizer.state.values():
        yield from tensors(state, seen)
