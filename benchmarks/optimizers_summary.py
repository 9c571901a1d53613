"""From trials to figures: means with standard errors, and when a method reaches AdamW's final loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.optimizers_protocol import Find, ablated, compared
from benchmarks.optimizers_rivals import method
from benchmarks.optimizers_trials import Record, Trial, final
from benchmarks.optimizers_workloads import WORKLOADS

Row = dict[str, Any]


def crossing(axis: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """Where a loss first gets down to the target, interpolated linearly between evaluations; None if it never does."""
    if losses and losses[0] <= target:
        return float(axis[0])
    for i in range(1, len(losses)):
        if losses[i] <= target:
            share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
            return axis[i - 1] + share * (axis[i] - axis[i - 1])
    return None


def mean(values: Iterable[float | None]) -> float | None:
    """None if one is missing."""
    found = list(values)
    return (
        None
        if not found or any(v is None or not math.isfinite(v) for v in found)
        else statistics.fmean(v for v in found if v is not None)
    )


def standard_error(values: Iterable[float | None]) -> float | None:
    found = list(values)
    if mean(found) is None or len(found) < 2:
        return None
    return statistics.stdev(v for v in found if v is not None) / len(found) ** 0.5


def seconds_axis(record: Record) -> list[float]:
    """CPU-seconds at every evaluation, without evaluation and set-up."""
    curve = record["curve"]
    return [a + b for a, b in zip(curve["gradient_seconds"], curve["optimizer_seconds"], strict=True)]


def _reached(record: Record, target: float) -> tuple[float | None, float | None]:
    curve = record["curve"]
    return crossing(curve["step"], curve["loss"], target), crossing(
        seconds_axis(record), curve["loss"], target
    )


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def row(key: str, records: Sequence[Record], target: float | None) -> Row:
    """One line of a workload's table.

    Args:
        key: of the method.
        records: a trial for each seed.
        target: AdamW's final loss; None while that is not known. AdamW itself reaches it at the end, by definition.
    """
    first = records[0]
    if key == "adamw":
        reached = [(first["steps"], seconds_axis(r)[-1]) for r in records]
    else:
        reached = [(None, None) if target is None else _reached(r, target) for r in records]
    losses = [final(r) for r in records]
    gradient, optimizer = (sum(r[f"{part}_seconds"] for r in records) for part in ("gradient", "optimizer"))
    steps = sum(r["curve"]["step"][-1] for r in records)
    return {
        "lr": first["lr"],
        "weight_decay": first["weight_decay"],
        "loss": _rounded(mean(losses), 5),
        "loss_se": _rounded(standard_error(losses), 5),
        "steps_to_adamw": _rounded(mean(steps for steps, _ in reached), 1),
        "seconds_to_adamw": _rounded(mean(seconds for _, seconds in reached), 2),
        "seconds_to_adamw_se": _rounded(standard_error(seconds for _, seconds in reached), 2),
        "gradient_ms": round(1e3 * gradient / max(1, steps), 2),
        "optimizer_ms": round(1e3 * optimizer / max(1, steps), 2),
        "optimizer_over_gradient": round(optimizer / gradient, 4),
        "setup_seconds": round(statistics.median(r["setup_seconds"] for r in records), 2),
        "state_bytes": first["state_bytes"],
    }


def finished(names: Iterable[str], keys: Iterable[str], find: Find) -> dict[str, dict[str, list[Trial]]]:
    """Trials on all seeds by workload and method, of those that are complete."""
    found: dict[str, dict[str, list[Trial]]] = {}
    keys = list(keys)
    for name in names:
        for key in keys:
            trials = list(compared(name, key, find)[1])
            if trials and all(find(trial) is not None for trial in trials):
                found.setdefault(name, {})[key] = trials
    return found


def rows_of(done: dict[str, dict[str, list[Trial]]], find: Find) -> dict[str, dict[str, Row]]:
    """Tables by workload and method."""
    tables: dict[str, dict[str, Row]] = {}
    for name, methods in done.items():
        records = {key: [r for t in trials if (r := find(t))] for key, trials in methods.items()}
        target = mean(final(r) for r in records["adamw"]) if "adamw" in records else None
        tables[name] = {key: row(key, found, target) for key, found in records.items()}
    return tables


def ablation_of(keys: Iterable[str], find: Find) -> list[Row]:
    """The better of two rates for every group, in the order of the table."""
    found = []
    for key in keys:
        records = [r for trial in ablated(key, find) if (r := find(trial))]
        if not records:
            continue
        best = min(records, key=final)
        found.append(
            {
                "method": key,
                "title": method(key).title,
                "lr": best["lr"],
                "loss": None if best["diverged"] else best["final"],
                "loss_by_rate": {f"{r['lr']:.4g}": r["final"] for r in records},
                "optimizer_over_gradient": round(best["optimizer_seconds"] / best["gradient_seconds"], 4),
                "state_bytes": best["state_bytes"],
            }
        )
    return found


def _over(a: float | None, b: float | None, digits: int = 4) -> float | None:
    return None if a is None or not b else round(a / b, digits)


def best_in_seconds(rows: dict[str, Row], key: str = "symo") -> bool:
    """Whether a method is the fastest to AdamW's final loss, or within 2 % or one pooled standard error of it."""
    reached = {k: r for k, r in rows.items() if r["seconds_to_adamw"] is not None}
    if key not in reached:
        return False
    fastest, own = min(reached.values(), key=lambda r: r["seconds_to_adamw"]), reached[key]
    pooled = math.hypot(fastest["seconds_to_adamw_se"] or 0.0, own["seconds_to_adamw_se"] or 0.0)
    best = fastest["seconds_to_adamw"]
    return bool(own["seconds_to_adamw"] <= max(1.02 * best, best + pooled))


def summary_of(tables: dict[str, dict[str, Row]]) -> dict[str, Any]:
    """The keys that claims refer to; None where trials are missing."""
    rows = tables.get("gpt", {})
    nothing: Row = dict.fromkeys(
        ("loss", "loss_se", "steps_to_adamw", "seconds_to_adamw", "optimizer_over_gradient", "state_bytes")
    )
    symo, adamw, muon = (rows.get(key, nothing) for key in ("symo", "adamw", "muon"))
    summary: dict[str, Any] = {
        "symo_over_adamw_steps": _over(symo["steps_to_adamw"], adamw["steps_to_adamw"]),
        "symo_over_adamw_seconds": _over(symo["seconds_to_adamw"], adamw["seconds_to_adamw"]),
    }
    for key in ("symo", "muon", "adamw", "soap", "shampoo"):
        found = rows.get(key, nothing)
        summary |= {f"{key}_loss": found["loss"], f"{key}_loss_se": found["loss_se"]}
    below = None
    if None not in (symo["loss"], muon["loss"], symo["loss_se"], muon["loss_se"]):
        below = _over(muon["loss"] - symo["loss"], math.hypot(symo["loss_se"], muon["loss_se"]), 2)
    return summary | {
        "symo_below_muon_in_se": below,
        "optimizer_over_gradient": symo["optimizer_over_gradient"],
        "workloads_best_in_seconds": sum(best_in_seconds(t) for t in tables.values() if "symo" in t),
        "workloads": len([name for name in WORKLOADS if "symo" in tables.get(name, {})]),
        "state_over_adamw": _over(symo["state_bytes"], adamw["state_bytes"]),
    }
