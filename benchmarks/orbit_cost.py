"""What the orbit average of a gradient costs, next to the gradient itself, on a character GPT.

4 layers, d = 128, 4 heads, a context of 128 and a batch of 16: 2,048 tokens. The symmetry is inferred and planned.
An estimate is gather and Gram of the gradient, an application is gather, product and scatter. Times are wall times on
one thread; repetitions of the parts are interleaved, and ratios are medians over repetitions.

    python -m benchmarks.orbit_cost [--quick] [--json PATH]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.character_gpt import CONTEXT, GPT
from benchmarks.environment import report
from weingarten.operators import Commutant, gram
from weingarten.symmetry import Isotypic, Plan, infer_symmetry, plan

SUMS = {
    "gather, Gram and scatter": ("gather", "Gram", "scatter"),
    "estimate and apply": ("estimate", "apply"),
}
BATCH, CHARACTERS = 16, 65


def clock(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Case:
    """A model, its gradient, its planned symmetry, and the parts that are timed."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.model = GPT(CHARACTERS)
        self.tokens = torch.randint(CHARACTERS, (BATCH, CONTEXT), generator=generator)
        self.targets = torch.randint(CHARACTERS, (BATCH, CONTEXT), generator=generator)
        self.infer_seconds = clock(self.infer)
        self.plan_seconds = clock(self.choose)
        self.gradient = self.forward_backward()
        self.isotypic = Isotypic(self.plan.symmetry, self.gradient)
        self.moment = self.estimate()

    def infer(self) -> None:
        self.symmetry = infer_symmetry(self.model, self.tokens[:2])

    def choose(self) -> None:
        self.plan: Plan = plan(self.symmetry)

    def forward_backward(self) -> dict[str, Tensor]:
        self.model.zero_grad()
        functional.cross_entropy(self.model(self.tokens).flatten(0, 1), self.targets.flatten()).backward()
        return {name: p.grad for name, p in self.model.named_parameters()}

    def estimate(self) -> Commutant:
        return Commutant(self.isotypic, gram(self.isotypic, self.isotypic.gather(self.gradient)))

    def parts(self) -> dict[str, Callable[[], Any]]:
        coordinates = self.isotypic.gather(self.gradient)
        return {
            "forward and backward": self.forward_backward,
            "gather": lambda: self.isotypic.gather(self.gradient),
            "Gram": lambda: gram(self.isotypic, coordinates),
            "scatter": lambda: self.isotypic.scatter(coordinates),
            "estimate": self.estimate,
            "apply": lambda: self.moment.apply(self.gradient),
            "square root of the blocks": lambda: self.moment.power(0.5),
        }


def measure(case: Case, repetitions: int) -> dict[str, list[float]]:
    calls = case.parts()
    for call in calls.values():  # warm-up
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            if name != "square root of the blocks" or len(found[name]) < 3:
                found[name].append(clock(call))
    return found


def cut(seconds: dict[str, list[float]], length: int) -> dict[str, list[float]]:
    return {name: values[:length] for name, values in seconds.items()}


def ratio(seconds: dict[str, list[float]], names: tuple[str, ...]) -> float:
    """The sum of some parts over the gradient of the same repetition, median."""
    sums = (sum(values) for values in zip(*(seconds[name] for name in names), strict=True))
    return statistics.median(t / b for t, b in zip(sums, seconds["forward and backward"], strict=True))


def counted(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def checks(case: Case) -> dict[str, Any]:
    """Times of inference and planning, and what was counted over what the plan predicted."""
    sizes = {str(key): [block.shape[0], block.shape[-1]] for key, block in case.moment.blocks.items()}
    expected = {str(key): [block.count, block.multiplicity] for key, block in case.isotypic.blocks.items()}
    flops = counted(case.estimate)
    size = sum(b.numel() * b.element_size() for b in case.moment.blocks.values())
    return {
        "infer_seconds": round(case.infer_seconds, 3),
        "plan_seconds": round(case.plan_seconds, 3),
        "largest_block": case.plan.cost.largest,
        "blocks_as_predicted": sizes == expected,
        "flops_over_predicted": round(flops / case.plan.cost.gram_flops, 4),
        "bytes_over_predicted": round(size / case.plan.cost.bytes, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", type=Path, help="where to write all results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    case = Case()
    print(case.plan, "\n")
    seconds = measure(case, 7 if arguments.quick else 31)
    shares = {name: ratio(cut(seconds, len(values)), (name,)) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(
            f"{name:26} {1e3 * statistics.median(values):9.2f} ms {100 * shares[name]:7.1f} % of a gradient"
        )
    together = {name: ratio(seconds, names) for name, names in SUMS.items()}
    for name, value in together.items():
        print(f"{name:42} {100 * value:7.1f} % of a gradient")
    summary = {
        "orbit_over_gradient": round(together["gather, Gram and scatter"], 4),
        "estimate_and_apply_over_gradient": round(together["estimate and apply"], 4),
        **checks(case),
    }
    details = {
        "seconds": seconds,
        "shares": shares,
        "plan": str(case.plan).splitlines(),
        "quick": arguments.quick,
    }
    report(summary, details, arguments.json)


if __name__ == "__main__":
    main()
