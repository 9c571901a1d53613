"""What one hypergradient of all layers of a BERT costs: time and peak memory of every method, as ratios to the identity.

The model has the architecture of MiniLM-L6 (22.6 million parameters, all trained) and six classes; the outer variables are
weights of the rows of the inner batch, 32 tokens each. A sample is ten outer steps in a row, since a curvature is kept for
ten, or one step of a method that keeps nothing. Times are of one thread. Methods with tens of products would take minutes a step
and are left out, as is the orbit average, whose symmetry is another benchmark's subject.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

import weingarten as wg
from benchmarks.bilevel_methods import METHODS
from benchmarks.kfac_models import bert
from benchmarks.peak_memory import CLEAR, extra_peak, keep_trim

__all__ = ["KEPT", "costs", "ratios"]

KEPT = 10
TOKENS, CLASSES, VOCABULARY = 32, 6, 30522
DAMPING = 1e-2
REPEATED = ("identity", "KFAC")
"""Methods whose ratio is claimed: several samples, in turns."""
LONG = (*REPEATED, "KFAC, length")
"""Methods that are worth less or more in ten steps than in one."""

Step = Callable[[], Any]


def weighted(hparams: wg.TreeLike, batch: wg.Batch) -> wg.Batch:
    return replace(batch, weights=hparams["weight"][batch.rows].sigmoid())


def setting(rows: int) -> tuple[wg.Problem, wg.Tree, wg.Tree, wg.Batches]:
    """The problem with its parameters, outer variables and batches; equal in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = bert().model.eval()
    generator = torch.Generator().manual_seed(1)
    objective = wg.Objective(model, wg.CrossEntropy())
    problem = wg.Problem(wg.Level(objective, weighted, wg.L2(1e-3)), wg.Level(objective))
    batches = [
        wg.Batch(
            torch.randint(1000, VOCABULARY, (rows, TOKENS), generator=generator),
            torch.randint(CLASSES, (rows,), generator=generator),
            rows=torch.arange(rows),
        )
        for _ in range(2)
    ]
    return problem, objective.params(), {"weight": torch.zeros(rows)}, wg.Batches(batches[0], batches[1])


def kept(name: str) -> wg.HypergradientMethod:
    """The method, keeping its curvature for ten calls."""
    method = METHODS[name].make(DAMPING, None)
    return replace(method, refresh=KEPT) if isinstance(method, wg.Implicit) else method


def outer_steps(name: str, count: int, arguments: tuple[Any, ...]) -> wg.Hypergradient:
    """``count`` hypergradients in a row, each with the state of the one before."""
    method, state, generator = kept(name), None, torch.Generator().manual_seed(0)
    for _ in range(count):
        found = method(*arguments, state, generator)
        state = found.state
    return found


def seconds(name: str, count: int, arguments: tuple[Any, ...]) -> float:
    """CPU-seconds of one step of ``count``."""
    start = time.process_time()
    outer_steps(name, count, arguments)
    return (time.process_time() - start) / count


def extrapolated(name: str, arguments: tuple[Any, ...]) -> float:
    """CPU-seconds of one step of ten, from two: the other eight are taken to be like the second."""
    one, both = seconds(name, 1, arguments), 2 * seconds(name, 2, arguments)
    return (one + (KEPT - 1) * (both - one)) / KEPT


def _child(pipe: Connection, name: str, rows: int) -> None:
    keep_trim()
    torch.set_num_threads(1)
    arguments = setting(rows)
    small = [
        wg.Batch(b.inputs[:2], b.targets[:2], rows=b.rows[:2])
        for b in (arguments[3].outer, arguments[3].mixed)
    ]
    outer_steps("identity", 1, (*arguments[:3], wg.Batches(*small)))  # loads code and threads
    pipe.send(extra_peak(lambda: outer_steps(name, 2 if name in LONG else 1, arguments).residual)[0])


def peak(name: str, rows: int) -> int | None:
    """Bytes beyond model and data of one step, or of two of which the first estimates the curvature; None without Linux."""
    if not CLEAR.exists():
        return None
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, name, rows))
    process.start()
    sender.close()
    try:
        return int(receiver.recv())
    except EOFError:
        return None
    finally:
        process.join()


def costs(repetitions: int, names: tuple[str, ...], rows: int = 64) -> dict[str, dict[str, Any]]:
    """Milliseconds of a step and bytes, by method, for batches of so many rows; without repetitions from two steps, once."""
    memory = {name: peak(name, rows) for name in names}  # first, since a fork must not follow a backward pass
    arguments = setting(rows)
    outer_steps("identity", 1, arguments)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names if repetitions == 0 else ():
        times[name].append(extrapolated(name, arguments) if name in LONG[1:] else seconds(name, 1, arguments))
    for repetition in range(repetitions):
        for name in names:
            if name in REPEATED or repetition == 0:
                times[name].append(seconds(name, KEPT if name in LONG else 1, arguments))
    return {
        name: {"milliseconds": [round(1000 * t, 1) for t in times[name]], "peak_bytes": memory[name]}
        for name in names
    }


def ratios(found: dict[str, dict[str, Any]], name: str = "KFAC") -> dict[str, Any]:
    """Time and memory of the method over the identity's: medians and spread of the repetitions' ratios."""
    pairs = zip(found[name]["milliseconds"], found["identity"]["milliseconds"], strict=False)
    time_ratios = [mine / base for mine, base in pairs]
    memory = [found[key]["peak_bytes"] for key in (name, "identity")]
    return {
        "time": round(statistics.median(time_ratios), 3),
        "time_spread": [round(min(time_ratios), 3), round(max(time_ratios), 3)],
        "memory": None if None in memory else round(memory[0] / memory[1], 3),
    }
