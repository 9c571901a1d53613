"""Means and spreads over seeds, and the words that go with them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from weingarten.applications.clean.rivals import ACCURACY, AUROC
from weingarten.applications.clean.seed import SeedResult
from weingarten.applications.clean.source import Source

__all__ = ["Spread", "Summary", "summarise"]


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation (NaN for one value) and the values."""

    mean: float
    deviation: float
    values: list[float]

    @staticmethod
    def of(values: Iterable[float | None]) -> Spread | None:
        """None if there is no value."""
        known = [value for value in values if value is not None and math.isfinite(value)]
        if not known:
            return None
        return Spread(
            statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else float("nan"), known
        )


@dataclass(frozen=True)
class Summary:
    """All that the report shows.

    Attributes:
        values: plain values for ``summary.json``; the last line of the command is its ``line``.
    """

    source: Source
    results: list[SeedResult]
    labels: pd.DataFrame
    accuracy: dict[str, Spread]
    auroc: dict[str, Spread]
    seconds: dict[str, Spread]
    cost: dict[str, Spread]
    notes: list[str]
    values: dict[str, Any]


def summarise(
    source: Source,
    request: Mapping[str, Any],
    settings: Mapping[str, Any],
    results: list[SeedResult],
    labels: pd.DataFrame,
    seconds: float,
) -> Summary:
    """Brings the seeds together."""
    accuracy, ranking = _spreads(results, "accuracy", ACCURACY), _spreads(results, "auroc", AUROC)
    times = _spreads(
        results,
        "seconds",
        ["cleaned", "trusted", "both", "all", "confidence", "kept", "true", "logistic", "total"],
    )
    cost = _spreads(results, "cost", dict.fromkeys(key for r in results for key in r.values["cost"]))
    line: dict[str, float | None] = {
        "auroc": _mean(ranking, "cleaned"),
        "accuracy": _mean(accuracy, "cleaned"),
    }
    line |= {f"accuracy_{key}": _mean(accuracy, key) for key in ("all", "trusted", "both", "true")}
    line["seconds"] = round(seconds, 2)
    notes = [*_explain(source, results), *source.train.notes]
    notes += [
        note
        for table in (source.trusted, source.held_out)
        if table is not None
        for note in table.notes
        if note not in notes
    ]
    notes += list(dict.fromkeys(note for r in results for note in r.values["notes"]))
    first = results[0].values
    values = {
        "line": line,
        "data": source.train.name,
        "classes": source.classes,
        "counts": first["counts"],
        "seeds": [r.seed for r in results],
        "judged": len(labels),
        "suspects": int((labels["suspect"] == "yes").sum()),
        "threshold": first["threshold"],
        "threshold_reason": first["threshold_reason"],
        "accuracy": {key: vars(spread) for key, spread in accuracy.items()},
        "auroc": {key: vars(spread) for key, spread in ranking.items()},
        "precision": _mean_of(results, "precision"),
        "recall": _mean_of(results, "recall"),
        "suggested_right": _mean_of(results, "suggested_right"),
        "seconds": {key: vars(spread) for key, spread in times.items()},
        "cost": {key: vars(spread) for key, spread in cost.items()},
        "request": dict(request),
        "settings": dict(settings),
        "notes": notes,
    }
    return Summary(source, results, labels, accuracy, ranking, times, cost, notes, values)


def _explain(source: Source, results: list[SeedResult]) -> list[str]:
    """What a reader has to know about the splits."""
    counts, seeds, notes = results[0].values["counts"], len(results), []
    if source.trusted is None:
        notes.append(
            f"No trusted file was given: {counts['trusted']} rows of {source.train.name}, some of each "
            "class, were taken as trusted. "
            "Their labels are assumed right, are not judged, and steer all the rest; wrong labels among "
            "them mislead the method."
        )
    if counts["held_out"] and source.held_out is None:
        origin = source.trusted if source.held_out_from == "trusted" else source.train
        assert origin is not None
        notes.append(
            f"{counts['held_out']} rows of {origin.name} were held out to measure accuracy on, and used "
            "for nothing else."
        )
        if source.noise is None and source.held_out_from == "train":
            notes.append(
                "The held-out labels are as given and may be wrong too, which lowers every accuracy; "
                "a file of checked rows (--held-out FILE) measures better."
            )
    if not counts["held_out"]:
        notes.append("No rows were held out, so no accuracy is known.")
    if seeds > 1 and source.noise is not None:
        notes.append(
            f"Each of {seeds} seeds draws its own split, noise and initial network; labels.csv and the "
            f"model are those of seed {results[0].seed}."
        )
    elif seeds > 1:
        drawn = (
            "the initial network"
            if source.trusted is not None
            else "the trusted rows and the initial network"
        )
        notes.append(
            f"Each of {seeds} seeds draws {drawn}. In labels.csv weight, score and probability are means over the seeds "
            "that trained on the row, and a row is suspect if its mean score is above the threshold. The model is that "
            f"of seed {results[0].seed}."
        )
    return notes


def _spreads(results: list[SeedResult], part: str, keys: Iterable[str]) -> dict[str, Spread]:
    found = {key: Spread.of(result.values[part].get(key) for result in results) for key in keys}
    return {key: spread for key, spread in found.items() if spread is not None}


def _mean(spreads: Mapping[str, Spread], key: str) -> float | None:
    return round(spreads[key].mean, 4) if key in spreads else None


def _mean_of(results: list[SeedResult], key: str) -> float | None:
    spread = Spread.of(result.values.get(key) for result in results)
    return None if spread is None else spread.mean
