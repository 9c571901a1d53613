"""Figures of the optimiser benchmark: losses against steps and CPU-seconds, the sweep of rates, the ablation.

python -m benchmarks.optimizers_figures JSON FOLDER
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.optimizers_protocol import ABLATION_STEPS
from benchmarks.optimizers_rivals import METHODS
from benchmarks.optimizers_summary import seconds_axis
from benchmarks.optimizers_workloads import WORKLOADS

STYLES: dict[str, dict[str, Any]] = {
    "adamw": {"color": "#777777", "marker": "o"},
    "shampoo": {"color": "#e08e1b", "marker": "P"},
    "soap": {"color": "#2e8b57", "marker": "v"},
    "muon": {"color": "#9467bd", "marker": "D"},
    "symo": {"color": "#d1495b", "marker": "s"},
}
FIRST_SECONDS = 0.05  # panels against time begin at this share of AdamW's
SKIPPED = 0.2  # panels begin at the loss of the slowest method after this share of the steps


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _dress(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.grid(axis="y", color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)


def _handles(grid: Any) -> tuple[list[Any], list[str]]:
    """Of the legend: every method once, whichever panel it is in."""
    found = {}
    for axes in grid.flat:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True)) | found
    return list(found.values()), list(found)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata=None if path.suffix == ".png" else {"Date": None})


def _spread(curves: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Means over trials, and standard errors."""
    points = list(zip(*curves, strict=True))
    return [statistics.fmean(p) for p in points], [
        statistics.stdev(p) / len(p) ** 0.5 if len(p) > 1 else 0.0 for p in points
    ]


def _lines(row: Any, methods: dict[str, list[dict[str, Any]]]) -> None:
    """All methods in both panels of a workload, which begin where the slowest one is after a fifth of its steps."""
    tops, bottoms, ends = [], [], {}
    for key in (key for key in STYLES if key in methods):
        records = methods[key]
        means, errors = _spread([r["curve"]["loss"] for r in records])
        seconds, _ = _spread([seconds_axis(r) for r in records])
        tops.append(means[round(SKIPPED * len(means))])
        bottoms.append(min(means))
        ends[key] = seconds[-1]
        color = STYLES[key]["color"]
        for axes, places in zip(row, (records[0]["curve"]["step"], seconds), strict=True):
            axes.plot(places, means, color=color, label=METHODS[key].title, linewidth=1.3)
            low, high = zip(*((m - e, m + e) for m, e in zip(means, errors, strict=True)), strict=True)
            axes.fill_between(places, low, high, color=color, alpha=0.2, linewidth=0)
            if key == "adamw":
                axes.axhline(means[-1], color=color, linewidth=0.8, linestyle=":")
    if ends:
        room = 0.05 * (max(tops) - min(bottoms))
        row[0].set_ylim(min(bottoms) - room, max(tops) + room)
        row[1].set_ylim(row[0].get_ylim())
        _logarithmic(row[1], FIRST_SECONDS * ends.get("adamw", min(ends.values())), 1.1 * max(ends.values()))


def _logarithmic(axes: Any, first: float, last: float) -> None:
    axes.set_xscale("log")
    axes.set_xlim(first, last)
    ticks = [m * 10.0**k for k in range(-2, 5) for m in (1, 2, 5) if first <= m * 10.0**k <= last]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def curves(details: dict[str, Any], path: Path) -> None:
    """A row for each workload: against steps, and against CPU-seconds; means over seeds with standard errors."""
    found = details["trials"]
    figure, grid = _figure(len(found), 2, (10.5, 2.9 * len(found)))
    for row, (name, methods) in zip(grid, found.items(), strict=True):
        _lines(row, {k: rs for k, rs in methods.items() if not any(r["diverged"] for r in rs)})
        for axes, label in zip(row, ("steps", "CPU-seconds"), strict=True):
            _dress(axes, WORKLOADS[name].title)
            axes.set_xlabel(label)
        row[0].set_ylabel("validation loss")
    figure.legend(*_handles(grid), loc="outside right upper", frameon=False, fontsize=9)
    _save(figure, path)


def sweeps(details: dict[str, Any], path: Path) -> None:
    """Final loss of the tuning trials against the rate, at the first weight decay."""
    found = {name: methods for name, methods in details["tuning"].items() if any(methods.values())}
    figure, grid = _figure(1, max(1, len(found)), (3.1 * max(1, len(found)) + 1.5, 3.1))
    for axes, (name, methods) in zip(grid[0], found.items(), strict=False):
        workload, finals = WORKLOADS[name], []
        for key in (key for key in STYLES if methods.get(key)):
            records = [
                r for r in methods[key] if r["weight_decay"] == workload.decays[0] and not r["diverged"]
            ]
            records.sort(key=lambda r: r["lr"])
            values = [r["final"] for r in records]
            finals.append(sorted(values))
            label = {"label": METHODS[key].title, "linewidth": 1.3, "markersize": 4.5}
            axes.plot([r["lr"] for r in records], values, **STYLES[key], **label)
        lowest = min((values[0] for values in finals if values), default=0.0)
        third = max((values[min(2, len(values) - 1)] for values in finals if values), default=1.0)
        axes.set_xscale("log")
        axes.set_ylim(lowest - 0.05 * (third - lowest), third + 0.05 * (third - lowest))
        _dress(axes, workload.title)
        axes.set_xlabel("peak learning rate")
    grid[0][0].set_ylabel(f"validation loss, seed {next(_seeds(details), '')}")
    figure.legend(*_handles(grid), loc="outside right upper", frameon=False, fontsize=9)
    _save(figure, path)


def _seeds(details: dict[str, Any]) -> Any:
    return (r["seed"] for methods in details["tuning"].values() for rs in methods.values() for r in rs)


def ablation(details: dict[str, Any], path: Path) -> None:
    """The best loss of every group, and what its optimiser costs."""
    rows = [row for row in details["ablation"] if row["loss"] is not None][::-1]
    figure, grid = _figure(1, 2, (9.5, 0.34 * len(rows) + 1.2))
    left, right = grid[0]
    labels = [row["title"] for row in rows]
    colors = [STYLES["symo"]["color"] if row["method"] == "symo" else "#2ca6d8" for row in rows]
    left.scatter([row["loss"] for row in rows], range(len(rows)), c=colors, s=36, zorder=3)
    right.barh(range(len(rows)), [row["optimizer_over_gradient"] for row in rows], color=colors, height=0.55)
    left.set_yticks(range(len(rows)), labels)
    right.set_yticks(range(len(rows)), [""] * len(rows))
    left.set_xlabel(f"validation loss after {ABLATION_STEPS} steps")
    right.set_xlabel("optimiser's time over the gradient's")
    for axes, title in ((left, "GPT, better of two rates"), (right, "cost")):
        _dress(axes, title)
        axes.grid(axis="x", color="#e5e5e5")
        axes.set_axisbelow(True)
        axes.set_ylim(-0.6, len(rows) - 0.4)
    _save(figure, path)


def draw(details: dict[str, Any], folder: Path) -> None:
    """All figures as SVG, the same bytes every time; those without trials are left out."""
    rcParams.update({"svg.hashsalt": "weingarten", "svg.fonttype": "none", "font.family": "DejaVu Sans"})
    folder.mkdir(parents=True, exist_ok=True)
    if details["trials"]:
        curves(details, folder / "optimizers_curves.svg")
        sweeps(details, folder / "optimizers_rates.svg")
    if details["ablation"]:
        ablation(details, folder / "optimizers_ablation.svg")


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
