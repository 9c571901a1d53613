"""How long a step is made, leaf by leaf."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

__all__ = ["AdamWScale", "FixedScale", "Natural", "Scaling", "Spectral"]


class Scaling(ABC):
    """What a preconditioned direction is multiplied with before the learning rate.

    Attributes:
        of_adam: whether it uses ``adam_rms``, which costs Adam's second moments.
    """

    of_adam: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, direction: Tensor, adam_rms: Tensor) -> Tensor:
        """The scaled direction of one leaf.

        Args:
            direction: of any shape.
            adam_rms: the root mean square of Adam's step on this leaf, a 0-d tensor; one unless ``of_adam``.
        """


def _to_norm(direction: Tensor, norm: float | Tensor) -> Tensor:
    """The multiple of this Frobenius norm; zero stays zero."""
    return direction * (norm / direction.norm().clamp(min=1e-30))


@final
@dataclass(frozen=True)
class AdamWScale(Scaling):
    """Every leaf's step gets the RMS of AdamW's step, so that AdamW's learning rate and schedule carry over.

    That is ``RMS(u / (sqrt(v) + eps))`` with the momentum ``u`` of the block and the running mean ``v`` of ``g^2``, entry by
    entry: near one while gradients agree, falling as noise averages out. Grafting (Agarwal et al. 2020,
    https://arxiv.org/abs/2002.11803); it keeps Adam's second moments. Blocks that divide every entry by its own root mean
    square, in whatever basis, have that length by themselves, and need no squares.

    Args:
        factor: multiplies it, where blocks want another rate than the parameters that AdamW steps. Default 1.

    Raises:
        ValueError: if ``factor`` is not positive and finite.

    >>> import torch
    >>> AdamWScale()(torch.tensor([3.0, -3.0]), torch.tensor(0.5))
    tensor([ 0.5000, -0.5000])
    """

    factor: float = 1.0
    of_adam: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.factor < float("inf"):
            raise ValueError(f"AdamWScale: factor is {self.factor}, expected a finite number > 0")

    def __call__(self, direction: Tensor, adam_rms: Tensor) -> Tensor:
        return _to_norm(direction, self.factor * direction.numel() ** 0.5 * adam_rms)


@final
@dataclass(frozen=True)
class FixedScale(Scaling):
    """Every leaf's step has the same RMS.

    Liu et al. 2025, section 2.2, https://arxiv.org/abs/2502.16982 (``match_rms_adamw`` of ``torch.optim.Muon``).

    Args:
        rms: of the step at a learning rate of one. Default 0.2: what they find for AdamW in long training, 0.2 to 0.4.

    Raises:
        ValueError: if ``rms`` is not positive and finite.

    >>> import torch
    >>> FixedScale()(torch.tensor([3.0, -3.0]), torch.tensor(0.5))
    tensor([ 0.2000, -0.2000])
    """

    rms: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.rms < float("inf"):
            raise ValueError(f"FixedScale: rms is {self.rms}, expected a finite number > 0")

    def __call__(self, direction: Tensor, adam_rms: Tensor) -> Tensor:
        return _to_norm(direction, self.rms * direction.numel() ** 0.5)


@final
@dataclass(frozen=True)
class Spectral(Scaling):
    r"""The root mean square of the singular values becomes ``sqrt(max(1, rows / columns))``.

    For the orthogonal directions of Muon that is the spectral norm, and the scale of ``torch.optim.Muon`` by default
    (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/); learning rates are about those of Muon, 0.02.

    >>> import torch
    >>> Spectral()(3 * torch.eye(2), torch.tensor(1.0))
    tensor([[1., 0.],
            [0., 1.]])
    """

    def __call__(self, direction: Tensor, adam_rms: Tensor) -> Tensor:
        rows = direction.shape[0] if direction.ndim else 1
        columns = direction.numel() // max(rows, 1)
        return _to_norm(direction, min(rows, columns) ** 0.5 * max(1.0, rows / max(columns, 1)) ** 0.5)


@final
@dataclass(frozen=True)
class Natural(Scaling):
    """The inverse root as it is: RMS about one for gradients that the moment has seen, less for what momentum averages out.

    The scale of Adam, where the group is that of sign flips. Where few steps are behind a block, single directions come out long;
    damping bounds them.

    >>> import torch
    >>> Natural()(torch.tensor([3.0]), torch.tensor(1.0))
    tensor([3.])
    """

    def __call__(self, direction: Tensor, adam_rms: Tensor) -> Tensor:
        return direction
