"""Does AdamW's learning rate carry over to Symo, at every width?

A residual MLP on handwritten digits with noise, 64 to 512 wide, in PyTorch's own parametrisation and initialisation. Symo and
AdamW train with the same rates (half-decades), schedule, weight decay, batches and seeds; what counts is the loss on digits
left out, at the end, averaged over seeds. `same_best_rate`: at every width Symo's best rate is AdamW's; `symo_at_adamws_rate`
is what Symo loses at AdamW's best rate. Best rates at the end of the grid are named, since they say little.

    python -m benchmarks.width_transfer [--quick] [--json PATH]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import weingarten as wg
from benchmarks.environment import report

WIDTHS, SEEDS, STEPS, BATCH, NOISE = (64, 128, 256, 512), 2, 120, 64, 0.3
RATES = tuple(10 ** (k / 2) for k in range(-7, -1))  # 3e-4 to 1e-1
BETAS, DECAY = (0.9, 0.95), 0.01

Row = dict[str, Any]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.relu(self.up(self.norm(x))))


def network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, width), Block(width), Block(width), nn.LayerNorm(width), nn.Linear(width, 10)
    )


def symo(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return wg.Symo(model, lr, example_inputs=torch.zeros(2, 64), adamw_betas=BETAS, weight_decay=DECAY)


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr, BETAS, weight_decay=DECAY)


METHODS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {"Symo": symo, "AdamW": adamw}


def digits() -> tuple[Tensor, Tensor]:
    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = images.float()[order] / 16
    return (images - images.mean()) / images.std(), labels[order]


def train(method: str, width: int, rate: float, seed: int, steps: int) -> float:
    """The loss on 297 digits left out; infinite if the run diverges."""
    images, labels = digits()
    torch.manual_seed(seed)
    model = network(width)
    generator = torch.Generator().manual_seed(seed)
    optimizer = METHODS[method](model, rate)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warm, (1 + math.cos(math.pi * t / steps)) / 2)
    )
    for _ in range(steps):
        rows = torch.randint(1500, (BATCH,), generator=generator)
        noise = NOISE * torch.randn(BATCH, 64, generator=generator)
        loss = functional.cross_entropy(model(images[rows] + noise), labels[rows])
        if not bool(loss.isfinite()):
            return math.inf
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = float(functional.cross_entropy(model(images[1500:]), labels[1500:]))
    return found if math.isfinite(found) else math.inf


def sweep(widths: tuple[int, ...], rates: tuple[float, ...], seeds: int, steps: int) -> list[Row]:
    rows = []
    for width in widths:
        for method in METHODS:
            start = time.process_time()
            losses = [[train(method, width, rate, seed, steps) for seed in range(seeds)] for rate in rates]
            means = [statistics.fmean(some) for some in losses]
            at = means.index(min(means))
            row = {"width": width, "method": method, "losses": losses, "means": means, "best_rate": rates[at]}
            row |= {"at_end_of_grid": at in (0, len(rates) - 1), "seconds": time.process_time() - start}
            rows.append(row)
            cells = " ".join(f"{mean:8.3f}{'*' if i == at else ' '}" for i, mean in enumerate(means))
            print(f"{width:5} {method:6} {cells} {row['seconds']:7.1f} s", flush=True)
    return rows


def summarise(rows: list[Row], widths: tuple[int, ...]) -> dict[str, Any]:
    best = {name: [r["best_rate"] for r in rows if r["method"] == name] for name in METHODS}
    apart = [2 * math.log10(a / b) for a, b in zip(best["Symo"], best["AdamW"], strict=True)]
    means = {(r["method"], r["width"]): r["means"] for r in rows}
    at = [means["Symo", w][RATES.index(rate)] for w, rate in zip(widths, best["AdamW"], strict=True)]
    spread = {name: 2 * math.log10(max(found) / min(found)) for name, found in best.items()}
    return {
        "widths": list(widths),
        "best_rates": best,
        "same_best_rate": best["Symo"] == best["AdamW"],
        "most_half_decades_apart": round(max(map(abs, apart))),
        "half_decades_over_widths": {name: round(value) for name, value in spread.items()},
        "at_end_of_grid": [f"{r['method']} {r['width']}" for r in rows if r["at_end_of_grid"]],
        "symo_at_adamws_rate": at,
        "best_losses": {name: [min(r["means"]) for r in rows if r["method"] == name] for name in METHODS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two widths, one seed, fewer steps")
    parser.add_argument("--json", type=Path, help="where to write the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    widths, seeds, steps = ((64, 128), 1, 60) if arguments.quick else (WIDTHS, SEEDS, STEPS)
    print("width method", " ".join(f"{rate:8.1e} " for rate in RATES), "   time")
    rows = sweep(widths, RATES, seeds, steps)
    report(summarise(rows, widths), {"rates": list(RATES), "steps": steps, "rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
