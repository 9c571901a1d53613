"""Training an encoder and its head on labels that may be distributions over the classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from weingarten.applications.clean.finetune.network import TextNetwork
from weingarten.bilevel.sampling import seeded_by
from weingarten.solvers import DivergenceError

__all__ = ["Tuning"]

LARGEST_GRADIENT = 1.0
WINDOW = 32
"""Batches' worth of rows that are sorted by length at a time."""


@dataclass(frozen=True)
class Tuning:
    """AdamW on mini-batches, its rates rising from zero in the first tenth of the steps and falling to zero in the rest.

    Minimises the weighted mean of ``-sum_c q_n(c) log p(c | x_n)``, with dropout as the encoder has it and gradients clipped to
    length one. A batch holds texts of similar length. Rates and batches are those in use for encoders of this kind (Devlin et
    al. 2019, https://arxiv.org/abs/1810.04805), the head's is higher since it starts from less.

    Args:
        passes: through all rows.
        rate: of the encoder, at its highest.
        head_rate: of the head.
        weight_decay: of AdamW.
        batch_size: rows in a step.
        progress: called with the number of rows after each step.
    """

    passes: int = 1
    rate: float = 5e-5
    head_rate: float = 1e-3
    weight_decay: float = 1e-2
    batch_size: int = 32
    progress: Callable[[int], None] = field(default=lambda rows: None, compare=False, repr=False)

    def fit(self, network: nn.Module, x: Tensor, soft: Tensor, weights: Tensor, seed: int) -> nn.Module:
        """The network, trained in place on rows with numbers (N,), soft labels (N, C) and weights (N,).

        Raises:
            DivergenceError: if a gradient is not finite.
        """
        assert isinstance(network, TextNetwork)
        total, weights = self.passes * -(-len(x) // self.batch_size), weights / weights.mean()
        encoder = [p for p in network.encoder.parameters() if p.requires_grad]
        groups = [
            {"params": encoder, "lr": self.rate},
            {"params": list(network.head.parameters()), "lr": self.head_rate},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=self.weight_decay)
        warm = max(1, total // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, (total - step) / (total - warm + 1))
        )
        with seeded_by(seed):  # dropout
            network.train()
            for rows in self._batches(network, x, torch.Generator().manual_seed(seed)):
                losses = functional.cross_entropy(network(x[rows]), soft[rows], reduction="none")
                optimizer.zero_grad()
                (losses * weights[rows]).mean().backward()
                length = nn.utils.clip_grad_norm_(network.parameters(), LARGEST_GRADIENT)
                if not bool(torch.isfinite(length)):
                    raise DivergenceError(
                        f"clean: training the encoder {network.reader.name}: a gradient is not finite; leave it "
                        "frozen (--layers head), or take another encoder"
                    )
                optimizer.step()
                schedule.step()
                self.progress(len(rows))
        return network.eval()

    def _batches(self, network: TextNetwork, x: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        lengths = torch.tensor([len(network.rows.tokens[i]) for i in x.tolist()])
        for _ in range(self.passes):
            order = torch.randperm(len(x), generator=generator)
            windows = order.split(self.batch_size * WINDOW)
            batches = [
                batch
                for window in windows
                for batch in window[lengths[window].argsort(stable=True)].split(self.batch_size)
            ]
            yield from (batches[i] for i in torch.randperm(len(batches), generator=generator).tolist())
