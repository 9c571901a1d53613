"""Figures of the secant benchmark: cosines and lengths along training, cosines against the size of the largest block.

python -m benchmarks.secant_figures JSON FOLDER
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

STYLES: dict[str, dict[str, Any]] = {
    "exact Hessian": {"color": "#222222", "linestyle": ":"},
    "KFAC": {"color": "#9467bd", "marker": "D"},
    "OrbitFisher": {"color": "#d1495b", "marker": "s"},
    "H_g over steps": {"color": "#1f6f8b", "marker": "^"},
    "H_g": {"color": "#2ca6d8", "marker": "o"},
    "H_g uncoupled": {"color": "#2ca6d8", "marker": "o", "linestyle": "--", "markerfacecolor": "white"},
    "H_pd": {"color": "#2e8b57", "marker": "v"},
    "Shampoo": {"color": "#e08e1b", "marker": "P"},
    "diagonal of the GGN": {"color": "#777777", "marker": "x"},
    "diagonal |g|": {"color": "#777777", "marker": "+", "linestyle": "--"},
    "identity": {"color": "#aaaaaa"},
    "Hessian at the centre": {"color": "#b5651d", "linestyle": "-."},
}


def along_training(details: dict[str, Any], path: Path) -> None:
    """A panel for each network and kind of displacement; medians over seeds, and quartiles of H_g."""
    curves = details["curves"]
    figure = Figure(figsize=(11.5, 3.0 * len(curves)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(curves), 2, sharey=True, squeeze=False)
    for row, (name, directions) in zip(grid, curves.items(), strict=True):
        for axes, (direction, stops) in zip(row, directions.items(), strict=True):
            places = range(len(stops))
            for key, style in STYLES.items():
                values = [stop[key]["median"] for stop in stops.values()]
                axes.plot(places, values, label=key, linewidth=1.3, markersize=4.5, **style)
            bounds = [stop["H_g"]["quartiles"] for stop in stops.values()]
            axes.fill_between(places, *zip(*bounds, strict=True), color=STYLES["H_g"]["color"], alpha=0.2)
            axes.set_xticks(places, list(stops))
            axes.set_title(f"{name}, {direction} directions", loc="left", fontsize=10, fontweight="bold")
            axes.grid(axis="y", color="#e5e5e5")
            axes.set(ylim=(-0.15, 1.03), xlabel="training loss" if row is grid[-1] else "")
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("cosine")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=9, frameon=False)
    figure.savefig(path, metadata=None if path.suffix == ".png" else {"Date": None})


def against_block(details: dict[str, Any], path: Path) -> None:
    """Every group is a point, its label above the best estimate; medians over seeds."""
    rows = details["knob"]
    cases = dict.fromkeys(row["case"] for row in rows)
    block = {case: next(row["block"] for row in rows if row["case"] == case) for case in cases}
    figure = Figure(figsize=(8.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    tops: dict[str, float] = {}
    for key in ("OrbitFisher", "H_g over steps", "H_g"):
        points = {case: statistics.median(row[key] for row in rows if row["case"] == case) for case in cases}
        ordered = sorted(cases, key=lambda case: (block[case], points[case]))
        axes.plot(
            [block[c] for c in ordered],
            [points[c] for c in ordered],
            label=key,
            linewidth=1.3,
            markersize=5,
            **STYLES[key],
        )
        tops = {case: max(tops.get(case, 0.0), points[case]) for case in cases}
    _label(axes, block, tops)
    axes.set_xscale("log")
    axes.set(
        xlabel="columns of the largest block",
        ylabel="cosine, median over seeds",
        ylim=(0, 1.2),
        xlim=(0.8, 8000),
    )
    axes.set_title(
        "The knob: tanh MLP at loss 0.41, random directions", loc="left", fontsize=10, fontweight="bold"
    )
    axes.grid(axis="y", color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    figure.savefig(path, metadata=None if path.suffix == ".png" else {"Date": None})


def lengths(details: dict[str, Any], path: Path) -> None:
    """How long the estimated change is next to the true one: what cosines do not show near a minimum."""
    stops = details["lengths"]["tanh MLP"]["random"]
    figure = Figure(figsize=(8.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, style in STYLES.items():
        if key not in ("identity", "Hessian at the centre"):
            axes.plot(
                list(stops),
                [stop[key]["median"] for stop in stops.values()],
                label=key,
                linewidth=1.3,
                markersize=5,
                **style,
            )
    axes.set_yscale("log")
    axes.set(xlabel="training loss", ylabel="|H v| / |g' - g|, median over seeds")
    axes.set_title("Lengths: tanh MLP, random directions", loc="left", fontsize=10, fontweight="bold")
    axes.grid(axis="y", color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    figure.savefig(path, metadata=None if path.suffix == ".png" else {"Date": None})


def _label(axes: Any, block: dict[str, int], tops: dict[str, float]) -> None:
    """Names of groups where there is room, plans last."""
    labelled: list[int] = []
    for case in sorted(block, key=lambda c: (c.startswith("plan"), block[c])):
        if all(max(block[case], other) > 1.35 * min(block[case], other) for other in labelled):
            place = (block[case], tops[case])
            axes.annotate(
                case, place, (2, 8), textcoords="offset points", rotation=60, fontsize=8, color="#444444"
            )
            labelled.append(block[case])


def draw(details: dict[str, Any], folder: Path) -> None:
    """All figures as SVG, the same bytes every time."""
    rcParams.update({"svg.hashsalt": "weingarten", "svg.fonttype": "none", "font.family": "DejaVu Sans"})
    folder.mkdir(parents=True, exist_ok=True)
    along_training(details, folder / "secant_training.svg")
    against_block(details, folder / "secant_knob.svg")
    lengths(details, folder / "secant_length.svg")


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
