"""How far to rotate, scale and shift training images, as outer variables."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor, nn

from weingarten.bilevel import L2, Level, Problem, Rows, Source
from weingarten.losses import CrossEntropy, Loss
from weingarten.objective import Batch, Objective
from weingarten.tree import Tree, TreeLike

__all__ = ["TRANSFORMS", "AugmentationRange", "Jittered", "warp"]

TRANSFORMS = ("rotation", "scale", "down", "right")
"""In radians, in natural logarithms, in pixels, in pixels."""


@final
@dataclass(frozen=True)
class AugmentationRange:
    r"""Find the ranges of augmentation under which training generalises best.

    .. math::
        g = \mathrm{mean}_n\, \ell\big(\theta;\; T(e^{h} \odot \epsilon_n)\, x_n,\; y_n\big), \qquad
        f = \mathrm{loss}_{\text{held out}}(\theta)

    with T(a) an image's rotation, scaling and shift by a, and noise :math:`\epsilon_n` uniform on :math:`[-1, 1]^4`, drawn with
    the batch (:class:`Jittered`), so that g is a function of h. Held-out images stay as they are. Benton et al. 2020,
    https://arxiv.org/abs/2010.11882 learn such ranges on the training data with a regulariser; Hataya et al. 2020,
    https://arxiv.org/abs/2006.07965 by hypergradients.

    The mixed derivative runs through pixel values. They come from bilinear interpolation written out in operations that can be
    differentiated twice, which ``torch.nn.functional.grid_sample`` cannot.

    Args:
        model: takes images ``(N, H, W)``.
        ranges: of :data:`TRANSFORMS` at the start, all > 0. Small by default: held-out data then widens what it wants wider.
        decay: weight decay of the inner level, which makes its minimum one.
        loss: of both levels.

    Raises:
        ValueError: if there are not four ranges, all positive and finite.

    >>> task = AugmentationRange(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), ranges=(0.1, 0.1, 1.0, 1.0))
    >>> {name: round(float(h.exp()), 2) for name, h in task.start().items()}
    {'rotation': 0.1, 'scale': 0.1, 'down': 1.0, 'right': 1.0}
    """

    model: nn.Module
    ranges: tuple[float, float, float, float] = (0.05, 0.05, 0.3, 0.3)
    decay: float = 1e-3
    loss: Loss = CrossEntropy()  # noqa: RUF009 - a frozen dataclass

    def __post_init__(self) -> None:
        if len(self.ranges) != len(TRANSFORMS) or not all(0 < r < float("inf") for r in self.ranges):
            raise ValueError(
                f"AugmentationRange: ranges is {self.ranges}, expected four positive numbers, of {', '.join(TRANSFORMS)}"
            )

    def problem(self) -> Problem:
        """Both levels; only the inner one warps."""
        objective = Objective(self.model, self.loss)
        return Problem(Level(objective, self.augmented, L2(self.decay)), Level(objective))

    def start(self) -> Tree:
        """The logarithms of the ranges, 0-d, by the names of :data:`TRANSFORMS`."""
        like = next(self.model.parameters()).detach()
        return {name: like.new_tensor(math.log(r)) for name, r in zip(TRANSFORMS, self.ranges, strict=True)}

    def augmented(self, hparams: TreeLike, batch: Batch) -> Batch:
        """The inner level's batch: from inputs (images, noise) of :class:`Jittered` to warped images.

        Raises:
            TypeError: if the inputs are not such a pair.
        """
        if not isinstance(batch.inputs, tuple | list) or len(batch.inputs) != 2:
            raise TypeError(
                f"AugmentationRange: found inputs of type {type(batch.inputs).__name__}, expected a pair (images, noise); draw "
                "the inner data from Jittered(rows)"
            )
        images, noise = batch.inputs
        amounts = noise * torch.stack([hparams[name].exp() for name in TRANSFORMS])
        return replace(batch, inputs=warp(images, *amounts.unbind(1)))


@final
class Jittered(Source):
    """Rows whose inputs are pairs of images and fresh noise ``(N, 4)``, uniform on [-1, 1].

    Args:
        rows: images and labels.

    >>> source = Jittered(Rows(torch.zeros(5, 8, 8), torch.zeros(5, dtype=torch.long), batch_size=2))
    >>> images, noise = source.draw(torch.Generator().manual_seed(0)).inputs
    >>> noise.shape
    torch.Size([2, 4])
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def draw(self, generator: torch.Generator) -> Batch:
        batch = self.rows.draw(generator)
        images = batch.inputs
        noise = torch.rand(len(images), len(TRANSFORMS), generator=generator, dtype=images.dtype)
        return replace(batch, inputs=(images, (2 * noise - 1).to(images.device)))

    def __repr__(self) -> str:
        """Part of the fingerprint of a checkpoint."""
        return f"Jittered({self.rows!r})"


def warp(images: Tensor, rotation: Tensor, scale: Tensor, down: Tensor, right: Tensor) -> Tensor:
    r"""Turn images about their centre, enlarge and shift them: ``x'(p) = x(e^{-s} R(-a)(p - t))``, zero outside, bilinear.

    Piecewise smooth in all arguments: differentiable but where a sampled place crosses a pixel's centre.

    Args:
        images: ``(N, H, W)``.
        rotation: a ``(N,)``, in radians, from down towards right.
        scale: s ``(N,)``, logarithm of the magnification.
        down: ``(N,)``, in pixels.
        right: ``(N,)``, in pixels.

    >>> image, still = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]), torch.zeros(1)
    >>> warp(image, still, still, still + 1, still)
    tensor([[[0., 0.],
             [0., 1.]]])
    """
    _, height, width = images.shape
    y = torch.arange(height, dtype=images.dtype, device=images.device) - (height - 1) / 2
    x = torch.arange(width, dtype=images.dtype, device=images.device) - (width - 1) / 2
    y, x = y.reshape(1, -1, 1) - down.reshape(-1, 1, 1), x.reshape(1, 1, -1) - right.reshape(-1, 1, 1)
    cos, sin = ((-scale).exp() * f(rotation) for f in (torch.cos, torch.sin))
    cos, sin = cos.reshape(-1, 1, 1), sin.reshape(-1, 1, 1)
    return _bilinear(images, cos * y + sin * x + (height - 1) / 2, cos * x - sin * y + (width - 1) / 2)


def _bilinear(images: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Values at the places ``(N, H, W)`` in pixels."""
    top, left = y.detach().floor(), x.detach().floor()
    down, right = y - top, x - left
    return (
        (1 - down) * (1 - right) * _pixels(images, top, left)
        + (1 - down) * right * _pixels(images, top, left + 1)
        + down * (1 - right) * _pixels(images, top + 1, left)
        + down * right * _pixels(images, top + 1, left + 1)
    )


def _pixels(images: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Values at whole places, zero outside."""
    n, height, width = images.shape
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    place = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
    found = images.reshape(n, -1).gather(1, place.long().reshape(n, -1)).reshape(y.shape)
    return found * inside
