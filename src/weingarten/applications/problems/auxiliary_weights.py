"""How much auxiliary tasks weigh beside the one that counts, as outer variables."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor, nn

from weingarten.bilevel import L2, Level, Problem, Rows, Source
from weingarten.losses import CrossEntropy
from weingarten.objective import Batch, Objective
from weingarten.tree import Tree, TreeLike

__all__ = ["AuxiliaryWeights", "Joined", "OwnClasses", "masked_rows"]

NEVER = -1e4
"""A logit whose softmax is zero in float32 and in float64."""


@final
@dataclass(frozen=True)
class AuxiliaryWeights:
    r"""Find how much each sort of auxiliary row should weigh for the main task to generalise best.

    .. math::
        g = \mathrm{mean}_{\text{main}}\, \ell_n + \mathrm{mean}_{\text{auxiliary}}\, e^{\lambda_{s(n)}} \ell_n
            + \tfrac{c}{2} |\theta|^2, \qquad f = \mathrm{mean}_{\text{held out, main}}\, \ell_n

    with s(n) the sort of row n. Tasks share the model and one cross-entropy over all their classes, of which each row sees its
    own task's only (:class:`OwnClasses`): GGN and KFAC are those of a classifier. Weights of auxiliary tasks by implicit
    hypergradients: Navon et al. 2021, https://arxiv.org/abs/2007.02693.

    A batch's inputs are pairs ``(x, sort)``, with ``sort (N,)`` 0 for rows of the main task and 1 ... K for auxiliary ones; its
    targets are classes of the main task, 0 ... C - 1, or C + those of the auxiliary one. Each mean runs over the rows of its task
    in the batch.

    Args:
        model: from x to logits ``(N, C + V)``, C classes of the main task and V of the auxiliary one.
        classes: C.
        sorts: K, the number of outer variables.
        weight: of every sort at the start, > 0.
        decay: c, the weight decay.

    Raises:
        ValueError: if ``classes`` or ``sorts`` is below one, or ``weight`` is not positive and finite.

    >>> task = AuxiliaryWeights(nn.Linear(3, 2 + 4), classes=2, sorts=3)
    >>> task.start()["log_weight"]
    tensor([0., 0., 0.])
    """

    model: nn.Module
    classes: int
    sorts: int = 1
    weight: float = 1.0
    decay: float = 1e-4

    def __post_init__(self) -> None:
        if self.classes < 1 or self.sorts < 1 or not 0 < self.weight < float("inf"):
            raise ValueError(
                f"AuxiliaryWeights: classes is {self.classes}, sorts {self.sorts} and weight {self.weight}, expected two numbers "
                ">= 1 and a positive one"
            )

    def problem(self) -> Problem:
        """Both levels, on one module: parameters are named ``model.<name>``."""
        objective = Objective(OwnClasses(self.model, self.classes), CrossEntropy())
        return Problem(Level(objective, self.weighted, L2(self.decay)), Level(objective))

    def start(self) -> Tree:
        """``log_weight`` (K,), the logarithms of the weights."""
        like = next(self.model.parameters()).detach()
        return {"log_weight": like.new_full((self.sorts,), math.log(self.weight))}

    def weighted(self, hparams: TreeLike, batch: Batch) -> Batch:
        """The inner level's batch: weights of its rows."""
        sort = batch.inputs[1]
        main = sort == 0
        count = max(int(main.sum()), 1), max(int((~main).sum()), 1)
        weight = hparams["log_weight"].exp()[(sort - 1).clamp_min(0)] * (len(sort) / count[1])
        return replace(batch, weights=torch.where(main, len(sort) / count[0], weight))


@final
class OwnClasses(nn.Module):
    """Logits of which each row keeps its own task's: the first C where ``sort`` is 0, the others elsewhere.

    Args:
        model: from x to logits ``(N, C + V)``.
        classes: C.

    >>> logits = OwnClasses(nn.Identity(), classes=1)(torch.zeros(2, 3), torch.tensor([0, 1])).softmax(1)
    >>> logits
    tensor([[1.0000, 0.0000, 0.0000],
            [0.0000, 0.5000, 0.5000]])
    """

    def __init__(self, model: nn.Module, classes: int) -> None:
        super().__init__()
        self.model, self.classes = model, classes

    def forward(self, x: Tensor, sort: Tensor) -> Tensor:
        """Logits ``(N, C + V)``, -10,000 where they are another task's."""
        logits = self.model(x)
        first = torch.arange(logits.shape[1], device=logits.device) < self.classes
        own: Tensor = torch.where((sort == 0)[:, None] == first, logits, NEVER)
        return own


@final
class Joined(Source):
    """Batches of the main task's rows followed by the auxiliary task's, each drawn by itself.

    Args:
        main: with pairs (x, sort) as inputs.
        auxiliary: the same; its rows are numbered after those of ``main``.

    >>> sort = torch.tensor([0, 0]), torch.tensor([1, 2, 1])
    >>> joined = Joined(*(Rows((torch.eye(3)[s], s), s, batch_size=2) for s in sort))
    >>> joined.draw(torch.Generator().manual_seed(0)).inputs[1]
    tensor([0, 0, 1, 1])
    """

    def __init__(self, main: Rows, auxiliary: Rows) -> None:
        self.main, self.auxiliary = main, auxiliary

    def draw(self, generator: torch.Generator) -> Batch:
        first, second = self.main.draw(generator), self.auxiliary.draw(generator)
        assert first.rows is not None
        assert second.rows is not None
        return Batch(
            tuple(torch.cat(pair) for pair in zip(first.inputs, second.inputs, strict=True)),
            torch.cat([first.targets, second.targets]),
            rows=torch.cat([first.rows, second.rows + self.main.size]),
        )

    def __repr__(self) -> str:
        """Part of the fingerprint of a checkpoint."""
        return f"Joined({self.main!r}, {self.auxiliary!r})"


def masked_rows(tokens: Tensor, mask: int, known: Tensor) -> tuple[Tensor, Tensor]:
    """Every sentence once for each of its known tokens, which is masked and to be predicted.

    Args:
        tokens: ``(N, L)`` token numbers.
        mask: the number that stands for a masked token.
        known: ``(V,)`` bool, which tokens can be asked for; not padding, nor what stands for rare words.

    Returns:
        Tokens ``(M, L)`` with one mask each, and the tokens masked ``(M,)``.

    >>> known = torch.tensor([False, False, True, True])
    >>> masked_rows(torch.tensor([[2, 3, 0]]), mask=1, known=known)
    (tensor([[1, 3, 0],
            [2, 1, 0]]), tensor([2, 3]))
    """
    row, place = known[tokens].nonzero(as_tuple=True)
    found = tokens[row].clone()
    hidden = found[torch.arange(len(row)), place]
    found[torch.arange(len(row)), place] = mask
    return found, hidden
