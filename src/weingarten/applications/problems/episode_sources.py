"""Episodes to learn to learn from: sine waves, and few-shot classification from classes of examples."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from weingarten.applications.problems.meta_loop import Episodes, EpisodeSource
from weingarten.objective import Batch

__all__ = ["FewShot", "Sines", "rotated_digits", "signal_classes", "signals"]


@final
@dataclass(frozen=True)
class Sines(EpisodeSource):
    r"""Regression on ``a sin(x - p)`` with amplitude a in [0.1, 5], phase p in [0, pi] and x in [-5, 5], all uniform.

    Finn et al. 2017, https://arxiv.org/abs/1703.03400. Inputs and targets are (N, B, 1) and (N, 1, B).

    Args:
        shots: rows of the support; default 10, as there.
        queries: rows of the query.

    >>> Sines(shots=5).draw(3, torch.Generator().manual_seed(0)).support.inputs.shape
    torch.Size([5, 3, 1])
    """

    shots: int = 10
    queries: int = 10

    def draw(self, episodes: int, generator: torch.Generator) -> Episodes:
        amplitude = 0.1 + 4.9 * torch.rand(episodes, generator=generator)
        phase = pi * torch.rand(episodes, generator=generator)
        x = 10 * torch.rand(self.shots + self.queries, episodes, generator=generator) - 5
        y = amplitude * torch.sin(x - phase)
        support, query = (
            Batch(inputs[..., None], targets[:, None])
            for inputs, targets in zip(
                x.split([self.shots, self.queries]), y.split([self.shots, self.queries]), strict=True
            )
        )
        return Episodes(support, query)


@final
class FewShot(EpisodeSource):
    r"""Classification among ``ways`` classes that are drawn anew, and numbered anew, for each episode.

    Inputs are (N, B, ...) and targets (N, B), with N = ways x shots for the support, ways x queries for the query; row n has
    class n mod ways.

    Args:
        examples: (classes, examples of each, ...).
        ways: classes per episode.
        shots: rows per class in the support.
        queries: rows per class in the query, none of which is in the support.

    Raises:
        ValueError: if there are fewer classes than ways, or fewer examples than shots and queries.

    >>> source = FewShot(torch.zeros(6, 4, 2), ways=3, shots=1, queries=2)
    >>> drawn = source.draw(5, torch.Generator().manual_seed(0))
    >>> drawn.support.inputs.shape, drawn.query.targets.shape
    (torch.Size([3, 5, 2]), torch.Size([6, 5]))
    """

    def __init__(self, examples: Tensor, ways: int = 5, shots: int = 1, queries: int = 5) -> None:
        if len(examples) < ways or examples.shape[1] < shots + queries:
            raise ValueError(
                f"FewShot: examples has {len(examples)} classes of {examples.shape[1]}, expected at least {ways} of "
                f"{shots + queries}; lower ways, shots or queries"
            )
        self.examples, self.ways, self.shots, self.queries = examples, ways, shots, queries

    def draw(self, episodes: int, generator: torch.Generator) -> Episodes:
        classes, examples = self.examples.shape[:2]
        chosen = torch.rand(episodes, classes, generator=generator).argsort(1)[:, : self.ways]
        keys = torch.rand(episodes, self.ways, examples, generator=generator)
        rows = keys.topk(self.shots + self.queries).indices  # (B, ways, shots + queries)
        found = self.examples[chosen[..., None], rows].movedim((2, 1), (0, 1)).contiguous()
        targets = torch.arange(self.ways)[None, :, None].expand(found.shape[:3])
        support, query = (
            Batch(x.flatten(0, 1), y.flatten(0, 1))
            for x, y in zip(
                found.split([self.shots, self.queries]),
                targets.split([self.shots, self.queries]),
                strict=True,
            )
        )
        return Episodes(support, query)


def rotated_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits turned by 0, 90, 180 and 270 degrees, each turn of a digit being a class of its own.

    One class of each digit is kept for meta-testing: digit d turned by 90 (d mod 4) degrees. Some classes have a near twin among
    the others: 0, 1 and 8 look alike turned by 180 degrees, and so do 6 and 9.

    Returns:
        Examples for meta-training (30, 174, 64) and for meta-testing (10, 174, 64), in [0, 1].

    Raises:
        ModuleNotFoundError: without scikit-learn.
    """
    from sklearn.datasets import load_digits

    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    images = images.float().reshape(-1, 8, 8) / 16
    size = int(labels.bincount().min())
    digits = torch.stack([images[labels == digit][:size] for digit in range(10)])
    turned = torch.stack([digits.rot90(turns, (2, 3)) for turns in range(4)], dim=1).flatten(3)
    kept = torch.arange(4) == torch.arange(10)[:, None] % 4
    return turned[~kept], turned[kept]


TEMPLATES = (
    (0, 3, 6, 7, 7, 6, 5, 5, 6, 6, 3, 0),
    (0, -4, -4, -3, -2, -1, 0, 1, 2, 3, 2, 0),
    (0, 4, 6, 5, 2, -1, -4, -6, -6, -2, 2, 0),
    (0, 5, 6, 3, 0, 1, 4, 5, 3, 0, -3, 0),
    (0, -2, -4, -6, -7, -7, 3, 4, 0, 0, 2, 0),
    (0, -6, -6, -6, -5, 2, 4, 5, 3, 0, -1, 0),
    (0, -3, -5, -6, -7, -6, -1, -3, -5, -5, -2, 0),
    (0, 6, 6, 5, 4, 3, 2, 1, 0, -1, -2, 0),
    (0, -4, -4, 2, 5, 2, -3, -6, -3, 2, 3, 0),
    (0, -5, -6, -3, 2, 1, 1, 0, 0, -1, -2, 0),
)
"""Ten short curves, drawn for this file, none of which is its own mirror image; heights in units of 1/4 of the signals' scale."""


def signals(templates: Tensor, examples: int, generator: torch.Generator, length: int = 40) -> Tensor:
    r"""Random signals of the kind of MNIST-1D: a template is padded, shifted, scaled, sheared and made noisy.

    After Greydanus and Kobak 2020, https://arxiv.org/abs/2011.14439, with curves and settings of our own: a template takes up 1/4
    to 2/5 of the signal, anywhere; its height is multiplied by a normal number of mean 1 and standard deviation 0.2, and it is
    tilted by a slope of standard deviation 0.3; correlated noise has standard deviation 0.15, and white noise 0.02.

    Args:
        templates: (classes, points), of a scale of one.
        examples: signals per class.
        generator: of all draws.
        length: of a signal.

    Returns:
        (classes, examples, length).

    >>> signals(torch.ones(2, 12), 3, torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3, 40])
    """
    classes, points = templates.shape
    shape = (classes, examples, 1)
    width = length * (0.25 + 0.15 * torch.rand(shape, generator=generator))
    place = (torch.arange(length) - (length - width) * torch.rand(shape, generator=generator)) / width
    index = (place * (points - 1)).clamp(0, points - 1)
    low = index.floor().long().clamp(max=points - 2)
    table = templates[:, None].expand(-1, examples, -1)
    value = torch.lerp(table.gather(2, low), table.gather(2, low + 1), index - low)
    tilt = 0.3 * torch.randn(shape, generator=generator) * (2 * place - 1)
    height = 1 + 0.2 * torch.randn(shape, generator=generator)
    inside = (place >= 0) & (place <= 1)
    clean = torch.where(inside, height * value + tilt, 0.0)
    kernel = torch.exp(-0.5 * (torch.arange(-6, 7) / 2.0) ** 2)
    kernel = kernel / kernel.norm()
    white = torch.randn(classes * examples, 1, length + 12, generator=generator)
    rough = functional.conv1d(white, kernel[None, None]).reshape(classes, examples, length)
    return clean + 0.15 * rough + 0.02 * torch.randn(clean.shape, generator=generator)


def signal_classes(examples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Signals of ten templates, each also reversed, upside down and both, every variant being a class of its own.

    Templates 3, 4 and 7 are kept for meta-testing.

    Returns:
        Examples for meta-training (28, examples, 40) and for meta-testing (12, examples, 40).
    """
    base = torch.tensor(TEMPLATES) / 4
    variants = torch.stack([base, base.flip(1), -base, -base.flip(1)], dim=1)
    train, test = variants[[0, 1, 2, 5, 6, 8, 9]].flatten(0, 1), variants[[3, 4, 7]].flatten(0, 1)
    return signals(train, examples, generator), signals(test, examples, generator)
