"""One rank of two: ``python two_ranks.py RANK STORE OUT`` trains on its half of the data and saves what it has."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import weingarten as wg


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (4, 3))


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int = 6) -> wg.Symo:
    optimizer = wg.Symo(model, lr=0.02, example_inputs=x[:2], refresh=2)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return optimizer


if __name__ == "__main__":
    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    together = torch.distributed.FileStore(store, 2)
    torch.distributed.init_process_group("gloo", store=together, rank=rank, world_size=2)
    model = build()
    x, y = data()
    optimizer = train(DistributedDataParallel(model), x[rank::2], y[rank::2])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, out)
    torch.distributed.destroy_process_group()
