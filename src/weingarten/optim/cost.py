"""Flops and bytes of one step: of Symo's routes by counting, of its rivals by formula."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from weingarten.optim.moment import Moment
from weingarten.optim.roots import Task
from weingarten.optim.symo import Symo

__all__ = [
    "MomentCost",
    "StepCost",
    "adamw_cost",
    "moment_cost",
    "muon_cost",
    "route_costs",
    "soap_cost",
    "total",
]

EIGH = 11.0
"""Flops of a root by ``eigh``, over ``m^3``: 9 for the eigendecomposition (Golub and Van Loan, Matrix Computations, section 8.3),
2 for putting it together again."""

PRODUCTS = 6.0 * 22
"""The same by ``by_iteration``, which a GPU takes for inverse square roots from m = 512 on: three products in each of about 22
iterations, since the smallest eigenvalue, above 1e-3 / m of the norm, grows by 9/4 each time."""

QR = 2 + 8 / 3
"""Flops of ``qr(S Q)`` over ``m^3``: the product, and Householder's R and Q of 4/3 each."""

_FLOAT32 = 4
_ADAMW, _MUON, _SOAP, _BLOCK, _GRAM = 14, 12, 14, 24, 4  # entry by entry: counted by hand, per entry


@dataclass(frozen=True)
class MomentCost:
    """What a moment costs.

    Attributes:
        accumulate: flops of matrix products in ``accumulate`` and ``measure``, each step.
        precondition: the same in ``precondition``.
        factorise: flops of one refresh.
        state: bytes.
        grams: entries of the matrices that are factorised.
        largest: size of the largest of them.
    """

    accumulate: int
    precondition: int
    factorise: float
    state: int
    grams: int
    largest: int


@dataclass(frozen=True)
class StepCost:
    """What one optimiser step costs.

    Attributes:
        products: flops of matrix products; a multiply-add counts two, as in PyTorch's counter.
        factorise: flops of factorisations, divided by the steps between them.
        entrywise: flops on single entries, about.
        state: bytes that are kept from step to step.
        entries: of the parameters.
        largest: size of the largest matrix that is factorised.

    >>> adamw_cost((768, 64)) + muon_cost((64, 64)) == total([muon_cost((64, 64)), adamw_cost((768, 64))])
    True
    """

    products: float
    factorise: float
    entrywise: float
    state: int
    entries: int
    largest: int = 0

    @property
    def flops(self) -> float:
        """All of them."""
        return self.products + self.factorise + self.entrywise

    @property
    def traffic(self) -> int:
        """Bytes that a step must move in float32: state and parameters are read and written, gradients read."""
        return 2 * self.state + 3 * _FLOAT32 * self.entries

    def __add__(self, other: StepCost) -> StepCost:
        """Of both together."""
        return StepCost(
            self.products + other.products,
            self.factorise + other.factorise,
            self.entrywise + other.entrywise,
            self.state + other.state,
            self.entries + other.entries,
            max(self.largest, other.largest),
        )


def total(costs: Sequence[StepCost]) -> StepCost:
    """Of all together; of nothing, zero."""
    return sum(costs, StepCost(0.0, 0.0, 0.0, 0, 0))


def moment_cost(moment: Moment, leaves: Mapping[str, Tensor], gpu: bool = False) -> MomentCost:
    """What a moment costs, counted: its own code runs on fake tensors under PyTorch's flop counter, so nothing is computed.

    Nothing is said twice: a new moment has its cost without a word about it.

    Args:
        moment: any.
        leaves: its parameters, on any device, meta included.
        gpu: whether large inverse square roots take :data:`PRODUCTS` rather than :data:`EIGH`.

    >>> from weingarten.optim.moment import one_sided
    >>> leaf = torch.zeros(8, 3)
    >>> moment_cost(one_sided("w", leaf, 0), {"w": leaf})
    MomentCost(accumulate=144, precondition=144, factorise=297.0, state=72, grams=9, largest=3)
    """
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        gradients = {
            name: torch.empty(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
            for name, p in leaves.items()
        }
        state = moment.init()
        moment.accumulate(state, gradients, 0.5)
        moment.measure(state, gradients, 0.5)
        accumulate = counter.get_total_flops()
        moment.precondition(state, gradients, 1e-8)
        precondition = counter.get_total_flops() - accumulate
        refreshed = dict(state)
        tasks = moment.tasks(refreshed)
        before = counter.get_total_flops()
        moment.accumulate(refreshed, gradients, 0.5)
        moment.measure(refreshed, gradients, 0.5)
        carried = (
            counter.get_total_flops() - before - accumulate
        )  # what a refresh leaves for ``measure`` to do
    return MomentCost(
        accumulate,
        precondition,
        carried + sum(_factorise(task, gpu) for task in tasks),
        sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, Tensor)),
        sum(task.moment.numel() for task in tasks),
        max((task.moment.shape[-1] for task in tasks), default=0),
    )


def _factorise(task: Task, gpu: bool) -> float:
    count, m, _ = task.moment.shape
    if task.exponent is None:
        return count * m**3 * QR
    return count * m**3 * (PRODUCTS if gpu and m >= 512 and task.exponent == -0.5 else EIGH)


def route_costs(optimizer: Symo, gpu: bool = False) -> list[StepCost]:
    """The cost of each of an optimiser's routes; routes that look the same are counted once.

    State are the moment, momentum, and with a scaling of AdamW's the running squares.

    Args:
        optimizer: before or after its first step, of a model on any device.
        gpu: as for :func:`moment_cost`.

    >>> model = torch.nn.Linear(64, 64, bias=False, device="meta")
    >>> from weingarten.optim import OneSide
    >>> route_costs(Symo(model, symmetry=OneSide()))[0].products == 2 * 2 * 64**3
    True
    """
    found, known = [], dict[object, StepCost]()
    params = {
        name: p
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }
    for route in optimizer.routes:
        leaves = {name: params[name] for name in route.leaves}
        key = (route.adamw, str(route.moment), tuple(p.shape for p in leaves.values()))
        if key not in known:
            cost, n = moment_cost(route.moment, leaves, gpu), sum(p.numel() for p in leaves.values())
            averages = 2 if route.needs_squares(optimizer.scaling) else 1
            size = max(_FLOAT32, *(p.element_size() for p in leaves.values()))
            known[key] = StepCost(
                cost.accumulate + cost.precondition,
                cost.factorise / optimizer.refresh,
                _ADAMW * n if route.adamw else _BLOCK * n + _GRAM * cost.grams,
                cost.state + averages * size * n,
                n,
                cost.largest,
            )
        found.append(known[key])
    return found


def adamw_cost(shape: Sequence[int]) -> StepCost:
    """AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101): 14 flops and 8 bytes for each entry.

    >>> adamw_cost((10, 10)).state
    800
    """
    n = prod(shape)
    return StepCost(0, 0, _ADAMW * n, 2 * _FLOAT32 * n, n)


def muon_cost(shape: Sequence[int], steps: int = 5) -> StepCost:
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) on a matrix (rows, all else), and its momentum.

    An iteration of Newton and Schulz, ``X <- a X + (b A + c A^2) X`` with ``A = X X^T``, costs ``4 a^2 b + 2 a^3`` with
    ``a <= b`` the sides.

    Args:
        shape: of a weight with two axes or more.
        steps: iterations.

    >>> muon_cost((64, 128)).products == 5 * (4 * 64**2 * 128 + 2 * 64**3)
    True
    """
    a, b = sorted((shape[0], prod(shape[1:])))
    return StepCost(steps * (4 * a * a * b + 2 * a**3), 0, _MUON * a * b, _FLOAT32 * a * b, a * b)


def soap_cost(shape: Sequence[int], limit: int = 10_000, refresh: int = 10) -> StepCost:
    """SOAP (Vyas et al. 2024, https://arxiv.org/abs/2409.11321) on a matrix (rows, all else); on a vector, AdamW.

    For each side of length s that is at most ``limit``, of n entries: the Gram matrix, the rotations of gradient and momentum and
    the one back, ``2 n s`` flops each; every ``refresh`` steps ``qr(S Q)``; and the Gram matrix and its basis are kept.

    Args:
        shape: of the weight.
        limit: a longer side keeps its own basis.
        refresh: steps between two factorisations.

    >>> soap_cost((64, 128)).products == 8 * 64 * 128 * (64 + 128)
    True
    """
    if len(shape) < 2:
        return adamw_cost(shape)
    n = prod(shape)
    sides = [side for side in (shape[0], prod(shape[1:])) if side <= limit]
    grams = sum(side**2 for side in sides)
    return StepCost(
        sum(8 * n * side for side in sides),
        sum(QR * side**3 for side in sides) / refresh,
        _SOAP * n + _GRAM * grams,
        2 * _FLOAT32 * (n + grams),
        n,
    )
