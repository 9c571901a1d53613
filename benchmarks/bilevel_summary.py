"""What the trials of the bilevel benchmark say: tables by row, and on how many tasks curvature is ahead."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.bilevel_methods import METHODS
from benchmarks.bilevel_protocol import MORE_SEEDS, spread
from benchmarks.bilevel_trials import GROUPS, ROWS, Find, Record, final, methods_of, value

__all__ = [
    "ahead",
    "averages",
    "compared",
    "line_of",
    "on_average",
    "overview",
    "printed",
    "tasks_ahead",
    "unseen",
    "within_one_error",
]

Lines = dict[str, dict[str, Any]]
PLAIN = ("identity", "one step")
"""What a curvature method must be better than by more than two pooled standard errors."""


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
    """Every method of the rows that are finished."""
    tables: dict[str, Lines] = {}
    for row in rows:
        found = {name: line(row, name, find) for name in methods_of(row)}
        lines = {name: entry for name, entry in found.items() if entry is not None}
        if len(lines) == len(found):
            tables[row] = lines
    return tables


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


def unseen(lines: Lines) -> dict[str, Any] | None:
    """The lead over the plain methods on the seeds after the first eight, of the method of ours that was best on these eight.

    None where there are no such seeds, or one of the methods diverged.
    """
    values = {name: entry["values"] for name, entry in lines.items() if METHODS[name].ours or name in PLAIN}
    seen, ours = len(MORE_SEEDS), [name for name in values if METHODS[name].ours]
    if not ours or any(None in v or len(v) <= seen for v in values.values()):
        return None
    mine = max(ours, key=lambda name: statistics.mean(values[name][:seen]))
    return {
        "ours": mine,
        "metric": {
            name: round(statistics.mean(v[seen:]), 4) for name, v in values.items() if name in (mine, *PLAIN)
        },
        "gaps": {name: paired(values[mine][seen:], values[name][seen:]) for name in PLAIN if name in values},
    }


def within_one_error(tables: dict[str, Lines]) -> dict[str, list[int]]:
    """In how many rows each method, held fixed, is within one standard error of the best, of how many that it finished."""
    found = {}
    for name in METHODS:
        rows = [lines for lines in tables.values() if lines.get(name, {}).get("metric") is not None]
        level = 0
        for lines in rows:
            best = max(
                (line for line in lines.values() if line["metric"] is not None),
                key=lambda line: line["metric"],
            )
            level += lines[name]["metric"] >= best["metric"] - best["standard_error"]
        found[name] = [level, len(rows)]
    return found


def on_average(tables: list[Lines]) -> Lines:
    """Methods that finished every one of the tables, each with the mean of its values over them, seed by seed."""
    lines: Lines = {}
    for name in tables[0]:
        values = [lines_of[name]["values"] for lines_of in tables if name in lines_of]
        if len(values) < len(tables) or any(None in v for v in values):
            continue
        means = [statistics.mean(v) for v in zip(*values, strict=True)]
        mean, error = spread(means)
        lines[name] = {"metric": round(mean, 4), "standard_error": round(error, 4), "values": means}
    return lines


def averages(tables: dict[str, Lines]) -> dict[str, Lines]:
    """The means over a task's rows, so that one method serves all; of tasks 1 to 4 whose rows are measured and share a metric."""
    return {
        task: on_average([tables[row] for row in rows])
        for task, rows in list(GROUPS.items())[:4]
        if rows and len({ROWS[row].metric for row in rows}) == 1 and all(row in tables for row in rows)
    }


def tasks_ahead(tables: dict[str, Lines]) -> dict[str, Any]:
    """Of tasks 1 to 4, those on which the claim holds in every row that was measured, and the same by row."""
    verdicts = {row: ahead(lines) for row, lines in tables.items()}
    held = {row: v["tied_with_best"] and v["beyond_plain"] for row, v in verdicts.items()}
    tied = {row: v["tied_with_best"] for row, v in verdicts.items()}
    means = {task: (lines, ahead(lines)) for task, lines in averages(tables).items()}
    first = {group: [row for row in rows if row in held] for group, rows in list(GROUPS.items())[:4]}
    return {
        "tasks_ahead": sum(bool(rows) and all(held[row] for row in rows) for rows in first.values()),
        "tasks_tied_with_best": sum(bool(rows) and all(tied[row] for row in rows) for rows in first.values()),
        "tasks_ahead_on_average": sum(v["tied_with_best"] and v["beyond_plain"] for _, v in means.values()),
        "tasks": len(first),
        "rows_ahead": sum(held.values()),
        "rows_tied_with_best": sum(tied.values()),
        "rows": len(held),
        "averages": {
            task: verdict
            | {"metric": {name: [e["metric"], e["standard_error"]] for name, e in lines.items()}}
            for task, (lines, verdict) in means.items()
        },
        "verdicts": {row: verdict | {"unseen": unseen(tables[row])} for row, verdict in verdicts.items()},
    }


def cell(entry: dict[str, Any] | None) -> str:
    """Mean and standard error, or why there are none."""
    if entry is None:
        return ""
    if entry["metric"] is None:
        return "refused" if entry["refused"] else "diverged"
    return f"{entry['metric']:.3f} ± {entry['standard_error']:.3f}"


def printed(tables: dict[str, Lines]) -> str:
    """A Markdown table a row."""
    parts = []
    for row, lines in tables.items():
        parts.append(f"{row}: {ROWS[row].metric}, {ROWS[row].seconds:g} CPU-seconds a trial\n")
        parts.append(
            "| method | metric | rate | damping | outer steps | products |\n|---|---|---|---|---|---|"
        )
        for name, entry in sorted(lines.items(), key=lambda pair: -(pair[1]["metric"] or -math.inf)):
            damping = "" if entry["damping"] is None else f"{entry['damping']:g}"
            title = f"**{name}**" if METHODS[name].ours else name
            parts.append(
                f"| {title} | {cell(entry)} | {entry['rate']:g} | {damping} | {entry['steps']:g} | {entry['products']:g} |"
            )
        parts.append("")
    return "\n".join(parts)


def overview(tables: dict[str, Lines]) -> str:
    """One Markdown table, a line each: the plain methods, the best other one, the best of ours, its lead over the plain ones."""
    parts = [
        "| row | identity | one step | best other method | best curvature method | lead, paired (pooled) |",
        "|---|---|---|---|---|---|",
    ]
    for row, lines in tables.items():
        verdict = ahead(lines)
        known = [name for name, entry in lines.items() if entry["metric"] is not None]
        others = [name for name in known if not METHODS[name].ours and name not in PLAIN]
        best = max(others, key=lambda name: lines[name]["metric"], default=None)
        leads = [
            f"{gap:.1f} ({verdict['pooled'].get(name, math.nan):.1f})"
            for name, gap in verdict["gaps"].items()
        ]
        cells = [cell(lines.get(name)) for name in PLAIN]
        cells += [f"{name}: {cell(lines[name])}" if name else "" for name in (best, verdict["ours"])]
        mark = "**" * (verdict["tied_with_best"] and verdict["beyond_plain"])
        parts.append(f"| {mark}{row}{mark} | {' | '.join(cells)} | {', '.join(leads)} |")
    return "\n".join(parts)
