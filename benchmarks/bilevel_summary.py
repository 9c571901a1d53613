"""What the trials of the bilevel benchmark say: tables by row, and on how many tasks curvature is ahead."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.bilevel_methods import METHODS
from benchmarks.bilevel_trials import GROUPS, ROWS, Find, Record, final, methods_of, value

__all__ = ["ahead", "compared", "line_of", "printed", "tasks_ahead"]

Lines = dict[str, dict[str, Any]]
PLAIN = ("identity", "one step")
"""What a curvature method must be better than by more than two pooled standard errors."""


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard error."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(
        values
    ) > 1 else math.nan


def line(row: str, method: str, find: Find) -> dict[str, Any] | None:
    """The line of a method at its best setting; None while a trial is missing."""
    records = [find(trial) for trial in final(row, method, find)]
    if not records or any(record is None for record in records):
        return None
    return line_of(method, [record for record in records if record is not None])


def line_of(method: str, records: list[Record]) -> dict[str, Any]:
    """Mean and standard error over the seeds of one setting, and what it cost."""
    values = [value(record) for record in records]
    lost = sum(math.isinf(v) for v in values)
    mean, error = (math.nan, math.nan) if lost else spread(values)
    extra = {key: [record["extra"].get(key) for record in records] for key in records[0]["extra"]}
    return {
        "metric": None if lost else round(mean, 4),
        "standard_error": None if lost else round(error, 4),
        "values": [None if math.isinf(v) else round(v, 5) for v in values],
        "diverged": lost,
        "rate": records[0]["rate"],
        "damping": records[0]["damping"] if METHODS[method].damped else None,
        "steps": round(statistics.mean(record["steps"] for record in records), 1),
        "products": round(statistics.mean(record["products"] for record in records), 1),
        "extra": {key: round(statistics.mean(v), 4) for key, v in extra.items() if None not in v},
        "refused": next((record["refused"] for record in records if "refused" in record), None),
    }


def compared(rows: Iterable[str], find: Find) -> dict[str, Lines]:
    """The finished methods of every row that has some."""
    found = {row: {name: line(row, name, find) for name in methods_of(row)} for row in rows}
    kept = {
        row: {name: entry for name, entry in lines.items() if entry is not None}
        for row, lines in found.items()
    }
    return {row: lines for row, lines in kept.items() if lines}


def paired(mine: list[float], other: list[float]) -> float:
    """The mean difference in units of its standard error: a seed has the same data for every method."""
    mean, error = spread([a - b for a, b in zip(mine, other, strict=True)])
    return round(mean / error, 2) if error else math.copysign(math.inf, mean) if mean else 0.0


def ahead(lines: Lines) -> dict[str, Any]:
    """Whether the best curvature method is within one standard error of the best, and ahead of the plain ones by over two.

    The lead over the plain ones is in paired standard errors; ``pooled`` has it in those of two independent means.
    """
    known = {name: entry for name, entry in lines.items() if entry["metric"] is not None}
    ours = [name for name in known if METHODS[name].ours]
    if not ours:
        return {"ours": None, "best": None, "tied_with_best": False, "beyond_plain": False, "gaps": {}}

    def metric(name: str) -> float:
        return float(known[name]["metric"])

    mine, top = max(ours, key=metric), max(known, key=metric)
    plain = [name for name in PLAIN if name in known]
    gaps = {name: paired(known[mine]["values"], known[name]["values"]) for name in plain}
    pooled = {
        name: round((metric(mine) - metric(name)) / size, 2)
        for name in plain
        if (size := math.hypot(known[mine]["standard_error"], known[name]["standard_error"]))
    }
    lost = [
        name for name in PLAIN if name in lines and name not in known
    ]  # diverged: nothing to be better than
    return {
        "ours": mine,
        "best": top,
        "tied_with_best": metric(mine) >= metric(top) - known[top]["standard_error"],
        "beyond_plain": all(gap > 2 for gap in gaps.values()) and bool(gaps or lost),
        "gaps": gaps,
        "pooled": pooled,
    }


def tasks_ahead(tables: dict[str, Lines]) -> dict[str, Any]:
    """Of tasks 1 to 4, those on which the claim holds in every row that was measured, and the same by row."""
    verdicts = {row: ahead(lines) for row, lines in tables.items()}
    held = {row: v["tied_with_best"] and v["beyond_plain"] for row, v in verdicts.items()}
    tied = {row: v["tied_with_best"] for row, v in verdicts.items()}
    first = {group: [row for row in rows if row in held] for group, rows in list(GROUPS.items())[:4]}
    return {
        "tasks_ahead": sum(bool(rows) and all(held[row] for row in rows) for rows in first.values()),
        "tasks_tied_with_best": sum(bool(rows) and all(tied[row] for row in rows) for rows in first.values()),
        "tasks": len(first),
        "rows_ahead": sum(held.values()),
        "rows_tied_with_best": sum(tied.values()),
        "rows": len(held),
        "verdicts": verdicts,
    }


def printed(tables: dict[str, Lines]) -> str:
    """A Markdown table a row."""
    parts = []
    for row, lines in tables.items():
        parts.append(f"{row}: {ROWS[row].metric}, {ROWS[row].seconds:g} CPU-seconds a trial\n")
        parts.append(
            "| method | metric | rate | damping | outer steps | products |\n|---|---|---|---|---|---|"
        )
        for name, entry in sorted(lines.items(), key=lambda pair: -(pair[1]["metric"] or -math.inf)):
            cell = (
                ("refused" if entry["refused"] else "diverged")
                if entry["metric"] is None
                else f"{entry['metric']:.3f} ± {entry['standard_error']:.3f}"
            )
            damping = "" if entry["damping"] is None else f"{entry['damping']:g}"
            title = f"**{name}**" if METHODS[name].ours else name
            parts.append(
                f"| {title} | {cell} | {entry['rate']:g} | {damping} | {entry['steps']:g} | {entry['products']:g} |"
            )
        parts.append("")
    return "\n".join(parts)
