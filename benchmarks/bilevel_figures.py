"""Figures of the bilevel benchmark: the metric of every method by row, outer loss against seconds, the gain on TREC."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import rcParams
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from benchmarks.bilevel_methods import METHODS
from benchmarks.bilevel_trials import ROWS

__all__ = ["draw"]

OURS, RIVAL = "#c8385a", "#6b7a8f"
TITLES = {
    "cleaned": "cleaned by weingarten",
    "cleaned, no loop": "the same without hypergradients",
    "cleaned, the loop's": "the same with the loop's noise model",
    "logistic regression on trusted": "trusted, logistic regression",
    "trusted": "trusted, network",
    "both": "weak and trusted",
    "all": "weak labels as given",
    "kept": "what cleanlab keeps",
    "true": "true labels (out of reach)",
}


def metrics(details: dict[str, Any], path: Path) -> None:
    """A panel a row: mean and standard error over the seeds, curvature methods of ours in red."""
    tables = details["tables"]
    figure, grid = panels(len(tables), 3.3, 3.0)
    for number, (axes, (row, lines)) in enumerate(zip(grid, tables.items(), strict=True)):
        names = list(METHODS)[::-1]
        for place, name in enumerate(names):
            if name not in lines:
                continue
            entry, color = lines[name], OURS if METHODS[name].ours else RIVAL
            if entry["metric"] is None:
                without = "refused" if entry["refused"] else "diverged"
                axes.text(0.02, place, without, transform=axes.get_yaxis_transform(), va="center", fontsize=7)
                continue
            axes.errorbar(
                entry["metric"], place, xerr=entry["standard_error"], fmt="o", color=color, ms=4, lw=1.2
            )
        axes.set_yticks(range(len(names)), names if number % 4 == 0 else [""] * len(names), fontsize=8)
        axes.set_ylim(-0.7, len(names) - 0.3)
        axes.tick_params(axis="x", labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_title(row, fontsize=10, loc="left", fontweight="bold")
        axes.set_xlabel(ROWS[row].metric, fontsize=8)
        axes.grid(axis="x", color="#e5e5e5")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


CURVES = {
    "identity": ("#6b7a8f", "-"),
    "one step": ("#6b7a8f", ":"),
    "CG 10": ("#2f6fa8", "-"),
    "KFAC": ("#c8385a", "-"),
    "KFAC, 3 steps": ("#c8385a", "--"),
    "orbit, 3 steps": ("#e08a1e", "-"),
}
"""Methods whose outer loss is drawn, with colour and line."""


def panels(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A grid of at most four columns."""
    columns = min(4, count)
    rows = -(-count // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, constrained_layout=True
    )
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, list(grid.flat[:count])


def curves(details: dict[str, Any], path: Path) -> None:
    """A panel a row: the outer loss against CPU-seconds at the methods' best settings, median of the seeds that have one."""
    trials = details["trials"]
    figure, grid = panels(len(trials), 3.3, 2.5)
    for axes, (row, methods) in zip(grid, trials.items(), strict=True):
        times = np.linspace(0, ROWS[row].seconds, 60)
        for name, (color, style) in CURVES.items():
            found = [r for r in methods.get(name, []) if r.get("curve")]
            if not found:
                continue
            lines = [np.interp(times, *np.transpose(r["curve"]), left=np.nan, right=np.nan) for r in found]
            known = ~np.isnan(lines).any(axis=0)
            axes.plot(times[known], np.median(lines, axis=0)[known], style, color=color, lw=1.4, label=name)
        axes.set_title(row, fontsize=10, loc="left", fontweight="bold")
        axes.set_xlabel("CPU-seconds", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supylabel("outer loss", fontsize=9)
    handles = [
        Line2D([], [], color=color, linestyle=style, label=name) for name, (color, style) in CURVES.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(CURVES), frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def cleaning(details: dict[str, Any], path: Path) -> None:
    """Accuracy on checked questions that were not trusted, by method and number of trusted questions."""
    sizes = dict(sorted(details["cleaning"].items(), key=lambda pair: int(pair[0])))
    figure, grid = plt.subplots(
        1,
        len(sizes),
        figsize=(3.2 * len(sizes) + 1.6, 2.6),
        squeeze=False,
        sharey=True,
        constrained_layout=True,
    )
    for axes, (size, entry) in zip(grid[0], sizes.items(), strict=True):
        names = [name for name in TITLES if name in entry["accuracy"]][::-1]
        for place, name in enumerate(names):
            values = [split["accuracy"][name] for split in details["cleaning_splits"][size]]
            color = OURS if name.startswith("cleaned") else "#c9ced6" if name == "true" else RIVAL
            axes.barh(place, statistics.mean(values), color=color, height=0.62)
            axes.plot(values, [place] * len(values), ".", color="#222222", ms=4)
        axes.set_yticks(range(len(names)), [TITLES[name] for name in names], fontsize=8)
        axes.set_title(f"{size} trusted", fontsize=10, loc="left", fontweight="bold")
        axes.set_xlabel("accuracy", fontsize=8)
        axes.set_xlim(0.3, 0.95)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def draw(details: dict[str, Any], folder: Path) -> None:
    """All figures as SVG."""
    rcParams.update({"svg.hashsalt": "weingarten", "svg.fonttype": "none", "font.family": "DejaVu Sans"})
    folder.mkdir(parents=True, exist_ok=True)
    if details["tables"]:
        metrics(details, folder / "bilevel_metrics.svg")
        curves(details, folder / "bilevel_outer_loss.svg")
    if details["cleaning"]:
        cleaning(details, folder / "bilevel_trec.svg")
