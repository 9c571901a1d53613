"""The models, batches and losses that the tests share: literal tables, float64, explicit seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import weingarten as wg

N = 5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed))


def integers(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, high, shape, generator=generator(seed))


def initialised(model: nn.Module, seed: int = 7) -> nn.Module:
    """The model in float64 with parameters and running statistics from the seed, none of them special."""
    g = generator(seed)
    model = model.double()
    for p in model.parameters():
        p.data = 0.5 * torch.randn(p.shape, dtype=torch.float64, generator=g)
    for name, b in model.named_buffers():
        if "running" in name:
            b.copy_(0.5 + torch.rand(b.shape, dtype=torch.float64, generator=g))
    return model


class Head(nn.Module):
    """A layer, a fixed smooth non-linearity, and all positions flattened to one output row, in which positions mix."""

    def __init__(self, layer: nn.Module, mix: float = 0.7) -> None:
        super().__init__()
        self.layer, self.mix = layer, mix

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x)).flatten(1)
        return h + self.mix * h.flip(1)

    def columns(self, z: Tensor, weight: Tensor | float) -> list[Tensor]:
        """By hand, the gradients in one datum's ``z`` (the layer's output) of the columns of a squared error's Hessian root."""
        slope, size, found = 1 - torch.tanh(z) ** 2, z.numel(), []
        for k in range(size):
            g = torch.zeros(size, dtype=z.dtype)
            g[k] += 1
            g[size - 1 - k] += self.mix
            found.append((2 * weight) ** 0.5 * g.reshape(z.shape) * slope)
        return found


class Attention(nn.Module):
    """One head of fused attention between projections, averaged over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        mixed = functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return self.out(mixed).mean(1)


class TwoInputs(nn.Module):
    """Takes keyword arguments, one of which is optional."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor, flag: bool | None = None) -> Tensor:
        return self.out(torch.tanh(self.a(left) + self.b(right)))


class Tied(nn.Module):
    """A token model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.mix = nn.Linear(3, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(x)))).mT


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for first, second in pairwise(widths):
        layers += [nn.Linear(first, second), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, stride=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(2, 2, 2),
        nn.BatchNorm2d(2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(2, 3),
    )


def bilinear(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """A model that is a function of a parameter dict."""
    return torch.tanh(x @ params["first"]) @ params["second"]


# --------------------------------------------------------------------------------------------------------------------
# layers: name -> (layer, inputs). One position each where the name says so, so that KFAC of one datum is exact.
# --------------------------------------------------------------------------------------------------------------------
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "Linear one position": (lambda: nn.Linear(3, 2), normal(N, 3)),
    "Linear one position, no bias": (lambda: nn.Linear(3, 2, bias=False), normal(N, 3)),
    "Linear one position, extra axis": (lambda: nn.Linear(3, 2), normal(N, 1, 3)),
    "Linear two positions": (lambda: nn.Linear(3, 2), normal(N, 2, 3)),
    "Linear 2 x 2 positions": (lambda: nn.Linear(2, 2), normal(N, 2, 2, 2)),
    "Conv1d one position": (lambda: nn.Conv1d(2, 3, 3), normal(N, 2, 3)),
    "Conv1d stride padding dilation": (
        lambda: nn.Conv1d(2, 3, 2, stride=2, padding=1, dilation=2),
        normal(N, 2, 5),
    ),
    "Conv1d same, even kernel": (lambda: nn.Conv1d(2, 2, 2, padding="same"), normal(N, 2, 3)),
    "Conv1d circular": (lambda: nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"), normal(N, 2, 3)),
    "Conv2d one position": (lambda: nn.Conv2d(2, 3, (2, 3)), normal(N, 2, 2, 3)),
    "Conv2d one position, groups": (lambda: nn.Conv2d(4, 6, 2, groups=2), normal(N, 4, 2, 2)),
    "Conv2d one position, groups, no bias": (
        lambda: nn.Conv2d(4, 4, 2, groups=4, bias=False),
        normal(N, 4, 2, 2),
    ),
    "Conv2d stride padding dilation": (
        lambda: nn.Conv2d(2, 2, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
        normal(N, 2, 3, 3),
    ),
    "Conv2d same dilation": (lambda: nn.Conv2d(1, 2, 2, padding="same", dilation=2), normal(N, 1, 2, 3)),
    "Conv2d valid": (lambda: nn.Conv2d(1, 2, 2, padding="valid"), normal(N, 1, 2, 3)),
    "Conv2d reflect": (lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), normal(N, 1, 2, 3)),
    "Conv2d replicate, asymmetric": (
        lambda: nn.Conv2d(1, 2, (2, 3), padding=(0, 1), padding_mode="replicate"),
        normal(N, 1, 2, 3),
    ),
    "Conv2d groups, positions": (lambda: nn.Conv2d(4, 2, 2, groups=2), normal(N, 4, 2, 3)),
    "Embedding one position": (lambda: nn.Embedding(4, 3), integers(4, N)),
    "Embedding one position, extra axis": (lambda: nn.Embedding(4, 3), integers(4, N, 1)),
    "Embedding repeated tokens": (lambda: nn.Embedding(3, 2), integers(3, N, 4)),
    "Embedding padding": (lambda: nn.Embedding(4, 2, padding_idx=1), integers(4, N, 3)),
    "LayerNorm one position": (lambda: nn.LayerNorm(4), normal(N, 4)),
    "LayerNorm one position, no bias": (lambda: nn.LayerNorm(4, bias=False), normal(N, 4)),
    "LayerNorm one position, two axes": (lambda: nn.LayerNorm((2, 2)), normal(N, 2, 2)),
    "LayerNorm positions": (lambda: nn.LayerNorm(3), normal(N, 2, 3)),
    "BatchNorm1d one position": (lambda: nn.BatchNorm1d(3), normal(N, 3)),
    "BatchNorm1d positions": (lambda: nn.BatchNorm1d(3), normal(N, 3, 2)),
    "BatchNorm2d positions": (lambda: nn.BatchNorm2d(2), normal(N, 2, 2, 2)),
    "BatchNorm3d positions": (lambda: nn.BatchNorm3d(2), normal(N, 2, 1, 2, 2)),
}


@dataclass(frozen=True)
class Problem:
    """A model, a loss, and data in uneven batches with weights; ``params`` for models that are functions."""

    model: Callable[[], Any]
    loss: wg.Loss
    inputs: Any
    targets: Tensor
    params: dict[str, Tensor] | None = None
    kfac: bool = True  # whether KFAC accepts the model

    def objective(self) -> wg.Objective:
        model = self.model()
        return wg.Objective(initialised(model) if isinstance(model, nn.Module) else model, self.loss)

    def at(self, objective: wg.Objective) -> dict[str, Tensor]:
        return objective.params() if self.params is None else self.params

    def whole(self, weights: Tensor | None = None) -> wg.Batch:
        return wg.Batch(self.inputs, self.targets, weights)

    def batches(self, weights: Tensor | None = None) -> list[wg.Batch]:
        """The same data as three batches of different sizes."""
        return [rows(self.whole(weights), slice(a, b)) for a, b in ((0, 1), (1, 3), (3, N))]


def rows(batch: wg.Batch, piece: Any) -> wg.Batch:
    def take(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: take(v) for name, v in value.items()}
        return tuple(map(take, value)) if isinstance(value, tuple) else value[piece]

    return wg.Batch(
        take(batch.inputs), batch.targets[piece], None if batch.weights is None else batch.weights[piece]
    )


WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.3, 0.1], dtype=torch.float64)

PROBLEMS: dict[str, Problem] = {
    "mlp": Problem(lambda: mlp(3, 4, 3), wg.CrossEntropy(), normal(N, 3), integers(3, N)),
    "mlp, squared error": Problem(lambda: mlp(3, 4, 2), wg.MSE(), normal(N, 3), normal(N, 2, seed=1)),
    "mlp, soft labels": Problem(
        lambda: mlp(3, 3, 3), wg.CrossEntropy(), normal(N, 3), 0.7 * normal(N, 3, seed=1).softmax(1)
    ),
    "mlp, binary": Problem(
        lambda: mlp(3, 4, 2), wg.BinaryCrossEntropy(), normal(N, 3), integers(2, N, 2).double()
    ),
    "positions, ignored": Problem(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), Transpose()),
        wg.CrossEntropy(ignore_index=1, label_smoothing=0.1),
        normal(N, 2, 3),
        integers(3, N, 2),
    ),
    "conv net": Problem(conv_net, wg.CrossEntropy(), normal(N, 1, 4, 4), integers(3, N)),
    "attention": Problem(Attention, wg.CrossEntropy(), normal(N, 3, 3), integers(2, N)),
    "dict inputs": Problem(
        TwoInputs, wg.CrossEntropy(), {"left": normal(N, 3), "right": normal(N, 2, seed=1)}, integers(3, N)
    ),
    "tuple inputs": Problem(
        TwoInputs, wg.CrossEntropy(), (normal(N, 3), normal(N, 2, seed=1)), integers(3, N)
    ),
    "norm and dropout": Problem(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 2)),
        wg.MSE(),
        normal(N, 3),
        normal(N, 2, seed=1),
    ),
    "tokens": Problem(
        lambda: nn.Sequential(nn.Embedding(4, 2, padding_idx=0), nn.Tanh(), nn.Linear(2, 3), Transpose()),
        wg.CrossEntropy(),
        integers(4, N, 3),
        integers(3, N, 3, seed=1),
    ),
    "tied": Problem(Tied, wg.CrossEntropy(), integers(4, N, 2), integers(4, N, 2, seed=1), kfac=False),
    "function": Problem(
        lambda: bilinear,
        wg.CrossEntropy(),
        normal(N, 3),
        integers(2, N),
        params={"first": normal(3, 4, seed=3), "second": normal(4, 2, seed=4)},
        kfac=False,
    ),
}


class Transpose(nn.Module):
    """Classes to dimension 1."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mT


# name -> (loss, output, target): a loss per kind of target
LOSSES: dict[str, tuple[wg.Loss, Tensor, Tensor]] = {
    "cross-entropy": (wg.CrossEntropy(), normal(N, 3), integers(3, N)),
    "cross-entropy, ignored": (wg.CrossEntropy(ignore_index=2), normal(N, 3), torch.tensor([0, 2, 1, 2, 0])),
    "cross-entropy, default ignored": (wg.CrossEntropy(), normal(N, 3), torch.tensor([0, -100, 1, 2, 0])),
    "cross-entropy, smoothed": (wg.CrossEntropy(label_smoothing=0.2), normal(N, 3), integers(3, N)),
    "cross-entropy, soft": (wg.CrossEntropy(), normal(N, 3), normal(N, 3, seed=1).softmax(1)),
    "cross-entropy, soft of mass 2": (wg.CrossEntropy(), normal(N, 3), 2 * normal(N, 3, seed=1).softmax(1)),
    "cross-entropy, positions": (wg.CrossEntropy(ignore_index=0), normal(N, 3, 2), integers(3, N, 2)),
    "cross-entropy, positions smoothed": (
        wg.CrossEntropy(ignore_index=0, label_smoothing=0.3),
        normal(N, 3, 2),
        integers(3, N, 2),
    ),
    "cross-entropy, images": (wg.CrossEntropy(), normal(2, 3, 2, 2), integers(3, 2, 2, 2)),
    "cross-entropy, soft images": (
        wg.CrossEntropy(),
        normal(2, 3, 2, 2),
        normal(2, 3, 2, 2, seed=1).softmax(1),
    ),
    "cross-entropy, many classes": (wg.CrossEntropy(), normal(2, 70), integers(70, 2)),
    "cross-entropy, class weights": (
        wg.CrossEntropy(weight=[0.5, 2.0, 0.0], ignore_index=1),
        normal(N, 3),
        torch.tensor([0, 1, 0, 2, 0]),
    ),
    "cross-entropy, class weights smoothed": (
        wg.CrossEntropy(weight=[0.5, 2.0, 0.7], label_smoothing=0.3),
        normal(N, 3, 2),
        torch.tensor([[0, 1], [2, -100], [-100, -100], [1, 1], [2, 0]]),
    ),
    "cross-entropy, class weights of soft labels": (
        wg.CrossEntropy(weight=[0.5, 2.0, 0.7]),
        normal(2, 3, 2, 2),
        normal(2, 3, 2, 2, seed=1).softmax(1),
    ),
    "cross-entropy, soft smoothed": (
        wg.CrossEntropy(weight=[0.5, 2.0, 0.7], label_smoothing=0.2),
        normal(N, 3),
        2 * normal(N, 3, seed=1).softmax(1),
    ),
    "cross-entropy, sum": (
        wg.CrossEntropy(weight=[0.5, 2.0, 0.7], ignore_index=0, reduction="sum"),
        normal(N, 3),
        torch.tensor([0, 1, 0, 2, 1]),
    ),
    "squared error": (wg.MSE(), normal(N, 3), normal(N, 3, seed=1)),
    "squared error, sum": (wg.MSE(reduction="sum"), normal(N, 3), normal(N, 3, seed=1)),
    "squared error, scalars": (wg.MSE(), normal(N), normal(N, seed=1)),
    "squared error, many outputs": (wg.MSE(), normal(2, 7, 10), normal(2, 7, 10, seed=1)),
    "binary": (wg.BinaryCrossEntropy(), normal(N, 2), integers(2, N, 2).double()),
    "binary, soft": (wg.BinaryCrossEntropy(), normal(N, 2, 2), normal(N, 2, 2, seed=1).sigmoid()),
    "binary, weights": (
        wg.BinaryCrossEntropy(weight=[[0.5], [2.0]], pos_weight=[3.0, 0.2]),
        normal(N, 2, 2),
        normal(N, 2, 2, seed=1).sigmoid(),
    ),
    "binary, weight of positives, scalars": (
        wg.BinaryCrossEntropy(pos_weight=3.0),
        normal(N),
        integers(2, N).double(),
    ),
    "binary, sum": (
        wg.BinaryCrossEntropy(weight=torch.tensor([0.5, 2.0]), reduction="sum"),
        normal(N, 2),
        integers(2, N, 2).double(),
    ),
}
