"""Layer-wise estimators against KFAC by its definition, for every way of using parameters and every kind of loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import weingarten as wg
from tests.cases import initialised, integers, normal
from tests.kfac_oracle import Expected, Hand, factors, root
from tests.uses import CONVOLUTIONS, MATRICES, Kind
from tests.uses_entrywise import ATTENTION, ENTRYWISE, NORMS
from weingarten import reference
from weingarten.tree import Space

KINDS: dict[str, Kind] = {**MATRICES, **CONVOLUTIONS, **ENTRYWISE, **NORMS, **ATTENTION}
N, CLASSES = 4, 3
RANDOM = torch.tensor([0.5, 2.0, 1.3, 0.1], dtype=torch.float64)
ZEROS = torch.tensor([1.5, 0.0, 2.0, 0.7], dtype=torch.float64)
BY_CLASS = torch.tensor([0.5, 2.0, 0.7], dtype=torch.float64)
POSITIVE = torch.tensor([[3.0], [0.2], [1.0]], dtype=torch.float64)


class Under(nn.Module):
    """A layer, and a head that sees positions up to each one, without those that the mask leaves out."""

    def __init__(self, kind: Kind, width: int) -> None:
        super().__init__()
        self.layer, self.kind, self.width = kind.layer(), kind, width

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        z = self.layer(x, mask) if self.kind.masked else self.layer(x)
        if (
            self.kind.channels
        ):  # not by movedim: for one datum PyTorch's batch_norm takes its gradient's strides the wrong way
            z = torch.stack(z.reshape(*z.shape[:2], -1).unbind(2), 1)
        h = torch.tanh(z.reshape(len(x), -1, self.width)) * mask[..., None]
        return (
            h @ normal(self.width, CLASSES, seed=3) + (h.cumsum(1) - h) @ normal(self.width, CLASSES, seed=4)
        ).mT


def by_hand(kind: Kind, width: int) -> Callable[[Hand, tuple[Tensor, Tensor]], Tensor]:
    """The same for one datum: outputs ``(classes, T)``, position by position."""

    def model(hand: Hand, inputs: tuple[Tensor, Tensor]) -> Tensor:
        x, mask = inputs
        h = torch.tanh(kind.by_hand(hand, x, mask) if kind.masked else kind.by_hand(hand, x))
        columns, before = [], torch.zeros(width, dtype=h.dtype)
        for t in range(len(h)):
            now = h[t] * float(mask[t])
            columns.append(now @ normal(width, CLASSES, seed=3) + before @ normal(width, CLASSES, seed=4))
            before = before + now
        return torch.stack(columns, 1)

    return model


@dataclass(frozen=True)
class Setting:
    """A loss and how data come.

    ``elements(output, target)`` is the sum of one datum's losses by PyTorch, ``weigh(target)`` what its valid elements weigh on
    average, ``number(targets)`` what the mean divides by.
    """

    loss: wg.Loss
    target: str
    elements: Callable[[Tensor, Tensor], Tensor]
    weigh: Callable[[Tensor], float]
    number: Callable[[Tensor], float]
    weights: Tensor | None = None
    uneven: bool = False
    ignored: bool = False
    padded: bool = False


def entropy(**options) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda z, y: functional.cross_entropy(z[None], y[None], reduction="sum", **options)


def any_valid(y: Tensor) -> float:
    return float((y != -100).any())


def class_mean(y: Tensor) -> float:
    valid = [float(BY_CLASS[c]) for c in y.tolist() if c != -100]
    return sum(valid) / max(1, len(valid))


def smoothed_mean(y: Tensor) -> float:
    valid = [0.8 * float(BY_CLASS[c]) + 0.2 * float(BY_CLASS.mean()) for c in y.tolist() if c != -100]
    return sum(valid) / max(1, len(valid))


def valid(y: Tensor) -> Tensor:
    return y[y != -100]


SETTINGS: dict[str, Setting] = {
    "labels": Setting(wg.CrossEntropy(), "labels", entropy(), any_valid, lambda y: len(valid(y))),
    "class weights": Setting(
        wg.CrossEntropy(weight=BY_CLASS),
        "labels",
        entropy(weight=BY_CLASS),
        class_mean,
        lambda y: float(BY_CLASS[valid(y)].sum()),
        weights=RANDOM,
        uneven=True,
        ignored=True,
        padded=True,
    ),
    "smoothed": Setting(
        wg.CrossEntropy(weight=BY_CLASS, label_smoothing=0.2, reduction="sum"),
        "labels",
        entropy(weight=BY_CLASS, label_smoothing=0.2),
        smoothed_mean,
        lambda y: 1.0,
        weights=ZEROS,
        ignored=True,
    ),
    "ignored": Setting(
        wg.CrossEntropy(), "labels", entropy(), any_valid, lambda y: len(valid(y)), ignored=True
    ),
    "soft labels": Setting(
        wg.CrossEntropy(reduction="sum"), "soft", entropy(), lambda y: float(y.sum(0).mean()), lambda y: 1.0,
        uneven=True, padded=True,
    ),
    "squared error": Setting(
        wg.MSE(), "values", lambda z, y: ((z - y) ** 2).sum(), lambda y: 1.0, lambda y: y.numel(), weights=ZEROS, uneven=True
    ),
    "binary": Setting(
        wg.BinaryCrossEntropy(reduction="sum"),
        "binary",
        lambda z, y: functional.binary_cross_entropy_with_logits(z, y, reduction="sum"),
        lambda y: 1.0,
        lambda y: 1.0,
        weights=RANDOM,
        padded=True,
    ),
    "weight of positives": Setting(
        wg.BinaryCrossEntropy(pos_weight=POSITIVE),
        "binary",
        lambda z, y: functional.binary_cross_entropy_with_logits(z, y, pos_weight=POSITIVE, reduction="sum"),
        lambda y: float((POSITIVE * y + 1 - y).mean()),
        lambda y: y.numel(),
        uneven=True,
        padded=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    objective: wg.Objective
    kind: Kind
    setting: Setting
    batch: wg.Batch

    @property
    def params(self) -> dict[str, Tensor]:
        return self.objective.params()

    def batches(self) -> list[wg.Batch]:
        pieces = (slice(0, 1), slice(1, N)) if self.setting.uneven else (slice(0, N),)
        x, mask = self.batch.inputs
        w = self.batch.weights
        return [wg.Batch((x[p], mask[p]), self.batch.targets[p], None if w is None else w[p]) for p in pieces]

    def expected(self, empirical: bool = False, reduce: bool = False) -> Expected:
        setting, targets, data = self.setting, self.batch.targets, []
        for n in range(N):
            y, weight = targets[n], 1.0 if self.batch.weights is None else float(self.batch.weights[n])

            def columns(z: Tensor, y: Tensor = y) -> list[Tensor]:
                def value(at: Tensor) -> Tensor:
                    return setting.elements(at, y)

                if empirical:
                    return [torch.autograd.functional.jacobian(value, z)]
                h = torch.autograd.functional.hessian(value, z)
                return root(h.reshape(z.numel(), z.numel()), z.shape)

            inputs = tuple(part[n] for part in self.batch.inputs)
            data.append((inputs, columns, weight, weight * setting.weigh(y)))
        params = {name.removeprefix("layer."): p for name, p in self.params.items()}
        model = by_hand(self.kind, self.objective.model.width)
        return factors(model, params, data, setting.number(targets), reduce)


def problem(name: str, setting_name: str) -> Problem:
    kind, setting = KINDS[name], SETTINGS[setting_name]
    x = integers(kind.tokens, N, *kind.shape) if kind.tokens else normal(N, *kind.shape)
    hand = Hand(dict(initialised(kind.layer().double()).named_parameters()))
    with torch.no_grad():
        positions, width = (kind.by_hand(hand, x[0], None) if kind.masked else kind.by_hand(hand, x[0])).shape
    mask = torch.ones(N, positions, dtype=torch.bool)
    if setting.padded:
        mask[1, -1] = mask[2, 0] = False
    model = initialised(Under(kind, width))
    if hasattr(model.layer, "set_statistics"):
        model.layer.set_statistics()
    batch = wg.Batch((x, mask), target(setting, positions), setting.weights)
    return Problem(wg.Objective(model, setting.loss), kind, setting, batch)


def target(setting: Setting, positions: int) -> Tensor:
    if setting.target == "values":
        return normal(N, CLASSES, positions, seed=1)
    if setting.target == "soft":
        return torch.tensor([1.0, 0.5, 2.0, 0.7])[:, None, None] * normal(
            N, CLASSES, positions, seed=1
        ).softmax(1)
    if setting.target == "binary":
        return integers(2, N, CLASSES, positions, seed=1).double()
    labels = integers(CLASSES, N, positions, seed=1)
    if setting.ignored:
        labels[0, -1] = labels[1, 0] = labels[2, -1] = -100
        if positions > 1:
            labels[3] = -100
    return labels


EVERY = [pytest.param(k, s, id=f"{k} - {s}") for k in KINDS for s in SETTINGS]


@pytest.mark.parametrize(("name", "setting"), EVERY)
def test_every_use_and_loss(name, setting):
    p = problem(name, setting)
    check_hand(p)
    check_factors(p, wg.KFAC(wg.Exact()), p.expected())
    check_factors(p, wg.KFAC(wg.Empirical()), p.expected(empirical=True))
    check_spectrum_and_diagonal(p)


@pytest.mark.parametrize("setting", ["class weights", "squared error"])
@pytest.mark.parametrize("name", KINDS)
def test_reduce(name, setting):
    p = problem(name, setting)
    check_factors(p, wg.KFAC(wg.Exact(), wg.Reduce()), p.expected(reduce=True))


def check_hand(p: Problem) -> None:
    """The hand-written model is the model."""
    model = by_hand(p.kind, p.objective.model.width)
    hand = Hand({name.removeprefix("layer."): leaf for name, leaf in p.params.items()})
    found = torch.stack([model(hand, (x, mask)) for x, mask in zip(*p.batch.inputs, strict=True)])
    torch.testing.assert_close(found.detach(), p.objective.model.eval()(*p.batch.inputs).detach())


def check_factors(p: Problem, estimator: wg.KFAC, expected: Expected) -> None:
    found = wg.estimate(estimator, p.objective, p.batches())
    blocks = {tuple(leaf.removeprefix("layer.") for leaf in b.space.shapes): b for b in found.blocks}
    assert {frozenset(b) for b in blocks} == {frozenset(b) for b in expected.sums}
    for leaves, sums in expected.sums.items():
        block = blocks[next(b for b in blocks if set(b) == set(leaves))]
        names = [f"layer.{leaf}" for leaf in leaves]
        torch.testing.assert_close(in_order(block, names), expected.dense(leaves, p.kind.table in leaves))
        if isinstance(block, wg.Kronecker):
            for group in range(len(block.inputs)):
                for kept, mean in zip(
                    (block.outputs, block.inputs), expected.means(leaves, group), strict=True
                ):
                    torch.testing.assert_close(kept[group], mean.diagonal() if kept.ndim == 2 else mean)
        else:
            assert {term for _, term in sums} == {0, 1}


def in_order(block: wg.Curvature, names: list[str]) -> Tensor:
    """The dense block with its leaves in this order."""
    numbers = {}
    for name, piece in zip(
        block.space.shapes,
        torch.arange(block.space.size).split([s.numel() for s in block.space.shapes.values()]),
        strict=True,
    ):
        numbers[name] = piece
    order = torch.cat([numbers[name] for name in names])
    return block.dense()[order][:, order]


def check_spectrum_and_diagonal(p: Problem) -> None:
    dense, space = reference.dense_ggn(p.objective, [p.batch], p.params), Space.of(p.params)
    found = wg.estimate(wg.Diagonal(), p.objective, p.batches())
    torch.testing.assert_close(space.flatten(found.diag()), dense.diagonal())
    for block in wg.estimate(wg.EKFAC(wg.Exact()), p.objective, p.batches()).blocks:
        expected = torch.zeros_like(block.spectrum)
        for entry in torch.ones_like(expected).nonzero():
            unit = torch.zeros_like(expected)
            unit[tuple(entry)] = 1
            v = space.zeros() | block.layout.split(block.rotate_back(unit))
            v = space.flatten(v)
            expected[tuple(entry)] = v @ dense @ v
        torch.testing.assert_close(block.spectrum, expected)
