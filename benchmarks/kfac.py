"""What KFAC costs, in units of one gradient: factors, inverses, products, eigenvalue corrections, memory; and what others take.

mlp    784-512-512-10 with ReLU, 512 rows.
cnn    stem and residual blocks of 16, 32, 64 channels (batch normalisation in evaluation mode), 128 images 3x32x32.
gpt    4 layers, width 256, 4 heads, 16 sequences of 128 characters, a loss at every token.
bert   the architecture of MiniLM-L6 with a head of 6 classes, 16 sequences of 64 tokens.

Random weights and data, float32, one thread. Every time is CPU time over that of one forward and backward pass of plain PyTorch
on the same batch (loss and gradient of every parameter) in the same repetition; all calls are interleaved in one process.
Reported are medians and quartiles. Peers treat linear and convolutional layers only, this library all layers of these models.

factors        Monte-Carlo factors of the batch, stand-alone, by a state that has seen a batch before
first_factors  the same by a new state, which first finds out how the model uses its parameters
thinned_factors, thinned_in_loop
               factors and in_loop with KFAC(rows=512), for the two models with thousands of tokens
in_loop        what factors add to a training step that computes loss and gradient anyway
inverse        both factors of every layer inverted, factored damping
apply          the inverse times one gradient
ekfac          the second pass of EKFAC over the batch, bases given
exact          factors from every column of the loss Hessian
inverse_over_cholesky, apply_over_gwa
               the same over torch.linalg.cholesky with torch.cholesky_inverse of factors shifted beforehand, and over
               ``G @ W @ A`` of weights merged with their biases beforehand
peak_over_step peak memory of the factor pass less the factors themselves, over the peak of a training step

    python -m benchmarks.kfac [--quick] [--json PATH] [--models mlp cnn gpt bert]
"""

from __future__ import annotations

import argparse
import gc
import operator
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import report
from benchmarks.kfac_memory import measure_memory
from benchmarks.kfac_models import MODELS, Case, build
from benchmarks.kfac_ours import Prepare, in_loop_extra, ours, seconds
from benchmarks.kfac_peers import FULL, QUANTITIES, QUICK, SETTINGS, covered, peers, quietly, reason

Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Effort:
    """How long to measure one model."""

    budget: float  # seconds of wall time after the warm-up
    least: int  # repetitions
    slow: float  # seconds: what takes longer is measured by its first call alone
    memory_of_peers: bool


THINNED = ["thinned_factors", "thinned_in_loop"]
REPEATED = ("gradient", "step", "factors", "thinned_step", "thinned_factors")  # however slow
QUICKLY, FULLY = Effort(1.5, 2, 0.7, False), Effort(20.0, 7, 3.0, True)


def measure(calls: dict[str, Prepare | str], effort: Effort) -> tuple[Samples, dict[str, str]]:
    """Seconds by name, interleaved; and who failed why."""
    failed = {name: call for name, call in calls.items() if isinstance(call, str)}
    ready: dict[str, Prepare] = {}
    samples: Samples = {}
    for name, call in calls.items():  # warm-up
        if isinstance(call, str):
            continue
        try:
            first = seconds(call)
        except Exception as error:  # a peer that meets a layer it cannot treat
            if ":" not in name:
                raise
            failed[name] = reason(error)
            continue
        if first > effort.slow and name not in REPEATED:
            samples[name] = [first]
        else:
            ready[name], samples[name] = call, []
    gc.freeze()  # so that collections between the calls take little time
    stop = time.perf_counter() + effort.budget
    while time.perf_counter() < stop or len(samples["gradient"]) < effort.least:
        for name, call in ready.items():
            gc.collect()
            samples[name].append(seconds(call))
    return samples, failed


def over(
    samples: Samples,
    name: str,
    unit: str = "gradient",
    ratio: Callable[[float, float], float] = operator.truediv,
) -> list[float]:
    """Ratios within repetitions, or of the medians where one of the two was too slow to be repeated."""
    values, units = samples[name], samples[unit]
    if len(values) != len(units):
        return [ratio(float(np.median(values)), float(np.median(units)))]
    return [ratio(a, b) for a, b in zip(values, units, strict=True)]


def ratios(samples: Samples) -> Samples:
    """All that is reported of times, by name."""
    found = {name: over(samples, name) for name in samples if name != "gradient"}
    found["inverse_over_cholesky"] = over(samples, "inverse", "cholesky")
    found["apply_over_gwa"] = over(samples, "apply", "gwa")
    for step, name in (("step", "in_loop"), ("thinned_step", "thinned_in_loop")):
        if step in samples:
            found[name] = over(samples, step, ratio=in_loop_extra)
    return found


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = (round(float(q), 4) for q in np.quantile(values, [0.25, 0.5, 0.75]))
    return {"median": middle, "lower": low, "upper": high, "repetitions": len(values)}


def run(case: Case, wanted: dict[str, tuple[str, ...]], effort: Effort) -> dict[str, Any]:
    """All times of one model."""
    with quietly():
        calls: dict[str, Prepare | str] = {**ours(case), **peers(case, wanted)}
        samples, failed = measure(calls, effort)
    parameters = list(case.model.parameters())
    return {
        "gradient_seconds": spread(samples["gradient"]),
        "ratios": {name: spread(values) for name, values in ratios(samples).items()},
        "unsupported": failed,
        "parameters": sum(p.numel() for p in parameters),
        "parameters_of_peers": sum(p.numel() for p in covered(case.model)),
    }


def summarise(name: str, found: dict[str, Any]) -> dict[str, float | None]:
    """The flat summary of one model; ``None`` where there is no such call."""
    rows, memory = found["ratios"], found["memory_bytes"]

    def median(key: str) -> float | None:
        return rows[key]["median"] if key in rows else None

    keys = [
        "factors",
        "first_factors",
        "in_loop",
        "inverse",
        "inverse_over_cholesky",
        "apply",
        "apply_over_gwa",
        "ekfac",
    ]
    keys += {"mlp": ["exact"], "gpt": THINNED, "bert": THINNED}.get(name, [])
    summary = {f"{name}_{key}": median(key) for key in keys}
    found["best_peers"] = {}
    for quantity in QUANTITIES:
        rivals = {key: row["median"] for key, row in rows.items() if key.endswith(f": {quantity}")}
        best = min(rivals, key=rivals.__getitem__, default=None)
        found["best_peers"][quantity] = best
        summary[f"{name}_peer_{quantity}"] = None if best is None else rivals[best]
    summary[f"{name}_peak_over_step"] = (
        round((memory["factors"] - memory["size of the factors"]) / memory["step"], 4) if memory else None
    )
    return summary


def print_model(name: str, found: dict[str, Any]) -> None:
    print(f"\n{name}: one gradient takes {1e3 * found['gradient_seconds']['median']:.1f} ms of CPU time")
    print(f"{'':32} {'over a gradient':>15} {'quartiles':>18} {'calls':>6}")
    for key, row in found["ratios"].items():
        quartiles = f"{row['lower']:.3f} .. {row['upper']:.3f}"
        print(f"{key:32} {row['median']:15.3f} {quartiles:>18} {row['repetitions']:6d}")
    for key, why in found["unsupported"].items():
        print(f"{key:32} {why}")
    for key, value in found["memory_bytes"].items():
        shown = value if isinstance(value, str) else f"{value / 2**20:.1f} MiB"
        print(f"{'memory: ' + key:32} {shown:>15}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and peers, two minutes")
    parser.add_argument("--json", type=Path, help="where to write all results")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    effort = QUICKLY if arguments.quick else FULLY
    cases = {name: build(name) for name in arguments.models}
    wanted = {name: QUICK[name] if arguments.quick else FULL for name in cases}
    memory = {  # first: this process must not have run a backward pass
        name: measure_memory(case, list(wanted[name]) if effort.memory_of_peers else [])
        for name, case in cases.items()
    }
    summary: dict[str, float | None] = {}
    details: dict[str, Any] = {}
    for name in arguments.models:
        details[name] = {**run(cases.pop(name), wanted[name], effort), "memory_bytes": memory[name]}
        summary |= summarise(name, details[name])
        print_model(name, details[name])
    more = {"settings": SETTINGS, "quick": arguments.quick}
    report(summary, {"models": details, **more}, arguments.json)


if __name__ == "__main__":
    main()
