"""The report's figures, as bytes."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

from weingarten.applications.clean.rivals import ACCURACY
from weingarten.applications.clean.summary import Spread, Summary

__all__ = ["accuracy_bars", "histograms", "learning_curves", "overview", "picture"]

OURS, RIVAL, LIGHT, WRONG, RIGHT, INK = "#1f6f8b", "#a9b4bf", "#dde3e9", "#d1495b", "#7fb7be", "#22303c"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8b97a3",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": "#51606e",
    "ytick.color": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.hashsalt": "weingarten",
}
NO_DATE: Any = {"Date": None, "Creator": None}
NO_NAME: Any = {"Software": None}
Axes = Any


@contextmanager
def _figure(
    width: float, height: float, panels: int, widths: list[float] | None = None
) -> Iterator[tuple[Figure, list[Axes]]]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False, width_ratios=widths)[0]
        yield figure, list(axes)


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata=NO_DATE)
    return "data:image/svg+xml;base64," + b64encode(buffer.getvalue()).decode()


def accuracy_bars(summary: Summary) -> str:
    """Held-out accuracy of the cleaned model and its rivals, as a data URI."""
    with _figure(7.6, 0.42 * len(summary.accuracy) + 0.9, 1) as (figure, axes):
        _draw_bars(axes[0], summary.accuracy)
        return _svg(figure)


def histograms(summary: Summary) -> str:
    """Scores with their threshold, and weights, as a data URI."""
    with _figure(9.2, 3.1, 2) as (figure, axes):
        _draw_scores(axes[0], summary)
        rows = summary.results[0].rows
        _draw_histogram(axes[1], rows["weight"], _wrong(summary), np.linspace(0, 1, 31))
        axes[1].set(title="Weights", xlabel="weight in training")
        return _svg(figure)


def learning_curves(summary: Summary) -> str | None:
    """Losses and trusted accuracy against seconds, one line per seed, as a data URI; None if no steps were recorded."""
    histories = [result.values["history"] for result in summary.results if result.values["history"]]
    panels = {
        "Trusted loss": "outer_loss",
        "Weighted training loss": "inner_loss",
        "Trusted accuracy (cross-fitted)": "trusted_accuracy",
    }
    panels = {
        title: key
        for title, key in panels.items()
        if any(key in step for history in histories for step in history)
    }
    if not panels:
        return None
    with _figure(3.2 * len(panels), 2.6, len(panels)) as (figure, axes):
        for axis, (title, key) in zip(axes, panels.items(), strict=True):
            for history in histories:
                points = [
                    (step.get("seconds", i), step[key])
                    for i, step in enumerate(history)
                    if step.get(key) is not None
                ]
                axis.plot(
                    *zip(*points, strict=True), color=OURS, alpha=0.75, linewidth=1.4
                ) if points else None
            axis.set(title=title, xlabel="seconds")
            axis.title.set_fontsize(10)
            axis.grid(axis="y", color="#eceff2")
            axis.margins(x=0.02)
        return _svg(figure)


def overview(summary: Summary) -> bytes:
    """Accuracies beside the histogram of scores, as PNG."""
    with _figure(11, 3.6, 2, [1.25, 1]) as (figure, axes):
        if summary.accuracy:
            _draw_bars(axes[0], summary.accuracy, "Held-out accuracy")
        else:
            axes[0].set_axis_off()
        _draw_scores(axes[1], summary)
        FigureCanvasAgg(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130, metadata=NO_NAME)
        return buffer.getvalue()


def picture(pixels: np.ndarray) -> str:
    """A small picture as a data URI: greys (H, W), from their smallest, black, to their largest; or colours (H, W, 3), 0..255."""
    buffer = io.BytesIO()
    grey = pixels.ndim == 2
    imsave(buffer, pixels.astype(float) if grey else pixels, cmap="gray", format="png", metadata=NO_NAME)
    return "data:image/png;base64," + b64encode(buffer.getvalue()).decode()


def _draw_bars(axis: Axes, accuracy: dict[str, Spread], title: str = "") -> None:
    keys = sorted(accuracy, key=lambda key: (key == "true", -accuracy[key].mean), reverse=True)
    colours = {"cleaned": OURS, "true": LIGHT}
    means = [accuracy[key].mean for key in keys]
    errors = [0.0 if np.isnan(accuracy[key].deviation) else accuracy[key].deviation for key in keys]
    axis.barh(range(len(keys)), means, color=[colours.get(key, RIVAL) for key in keys], height=0.68)
    axis.errorbar(means, range(len(keys)), xerr=errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
    for y, (mean, error) in enumerate(zip(means, errors, strict=True)):
        axis.text(
            min(1.0, mean + error) + 0.012,
            y,
            f"{mean:.3f}",
            va="center",
            fontsize=9,
            weight="bold" if keys[y] == "cleaned" else "normal",
        )
    axis.set_yticks(range(len(keys)), [ACCURACY[key] for key in keys])
    axis.get_yticklabels()[keys.index("cleaned")].set_weight("bold")
    axis.tick_params(axis="y", length=0)
    axis.set(title=title, xlim=(0, 1.1))
    axis.set_xticks(np.linspace(0, 1, 6))


def _draw_scores(axis: Axes, summary: Summary) -> None:
    result = summary.results[0]
    score = result.rows["score"].double()
    low, high = float(score.min()), float(score.max())
    _draw_histogram(axis, score, _wrong(summary), np.linspace(low, high if high > low else low + 1, 31))
    threshold = result.values["threshold"]
    if threshold is not None:
        axis.axvline(threshold, color=INK, linewidth=1.2, linestyle="--")
        right = threshold - low < 0.75 * (high - low)
        where, offset = ("left", (5, 0)) if right else ("right", (-5, 0))
        text = "suspect →" if right else "← not suspect"
        place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axis.annotate(text, (threshold, 0.9), xytext=offset, ha=where, fontsize=9, **place)
    axis.set(title="Scores", xlabel="how likely the given label is wrong")


def _draw_histogram(axis: Axes, values: Tensor, wrong: Tensor | None, bins: np.ndarray) -> None:
    values = values.double()
    if wrong is None:
        axis.hist(values.numpy(), bins=bins, color=OURS)
    else:
        parts = [values[~wrong].numpy(), values[wrong].numpy()]
        axis.hist(parts, bins=bins, stacked=True, color=[RIGHT, WRONG], label=["label right", "label wrong"])
        axis.legend(
            loc="lower right",
            bbox_to_anchor=(1.02, 0.98),
            ncols=2,
            fontsize=9,
            columnspacing=1,
            handlelength=1.2,
        )
    axis.set_ylabel("rows")


def _wrong(summary: Summary) -> Tensor | None:
    rows = summary.results[0].rows
    return torch.ne(rows["given"], rows["truth"]) if "truth" in rows else None
