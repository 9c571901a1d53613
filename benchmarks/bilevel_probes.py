"""Single hypergradients in mid-training: error against the dense solution, milliseconds, products, peak memory."""

from __future__ import annotations

import time
from typing import Any

import torch

import weingarten as wg
from benchmarks.bilevel_methods import METHODS
from benchmarks.bilevel_protocol import Probe
from benchmarks.bilevel_trials import ROWS, methods_of
from benchmarks.peak_memory import tensor_peak
from weingarten import tree

__all__ = ["probed"]

MOST = 3000
"""Parameters up to which the GGN is solved densely."""


def exact(probe: Probe, damping: float) -> wg.Hypergradient | None:
    """With the dense GGN of the mixed batch at the same damping; None for too many parameters."""
    if sum(p.numel() for p in probe.params.values()) > MOST:
        return None
    return wg.Implicit(solver=wg.Direct(), preconditioner=None, damping=damping)(
        probe.problem, probe.params, probe.hparams, probe.batches
    )


def measured(method: wg.HypergradientMethod, probe: Probe, truth: wg.Hypergradient | None) -> dict[str, Any]:
    """One call, after one that is not timed; another for the most memory of its tensors."""
    arguments = (probe.problem, probe.params, probe.hparams, probe.batches)
    method(*arguments)
    start = time.process_time()
    found = method(*arguments)
    entry = {"milliseconds": round(1000 * (time.process_time() - start), 2), "products": found.products}
    entry["megabytes"] = round(tensor_peak(lambda: method(*arguments)) / 1e6, 2)
    if truth is not None:
        size, other = float(tree.norm(truth.value)), float(tree.norm(found.value))
        entry["cosine"] = round(float(tree.dot(found.value, truth.value)) / max(size * other, 1e-30), 4)
        entry["error"] = float(
            f"{float(tree.norm(tree.sub(found.value, truth.value))) / max(size, 1e-30):.3g}"
        )
    return entry


def probed(row: str, seed: int = 0) -> dict[str, Any]:
    """Every method of a row at its probe, by one thread; a refusal stands in place of numbers."""
    torch.set_num_threads(1)
    probe, damping = ROWS[row].probe(seed), ROWS[row].dampings[0]
    truth, symmetry = exact(probe, damping), ROWS[row].symmetry()
    found: dict[str, Any] = {}
    for name in methods_of(row):
        try:
            found[name] = measured(METHODS[name].make(damping, symmetry), probe, truth)
        except (ValueError, wg.DivergenceError) as error:
            found[name] = {"refused": " ".join(str(error).split())[:160]}
    return {"parameters": sum(p.numel() for p in probe.params.values()), "damping": damping, "methods": found}
