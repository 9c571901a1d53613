"""One seed of a run: split, clean, compete; kept on disk once it is done."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weingarten.applications.clean.classifier import Classifier, restore
from weingarten.applications.clean.data import Parts, split
from weingarten.applications.clean.finetune import fine_tune
from weingarten.applications.clean.folder import read_tensors, write_json, write_tensors
from weingarten.applications.clean.network import accuracy
from weingarten.applications.clean.reader import Reader
from weingarten.applications.clean.recipe import Cleaned, Settings, clean_labels
from weingarten.applications.clean.rivals import auroc, compete
from weingarten.applications.clean.source import Source

__all__ = ["SeedResult", "run_seed"]

CLEANING, TUNING = 0.75, 0.9
"""The share of a seed's progress bar that cleaning gets, the rivals get the rest; and the share of both that fine-tuning gets."""


@dataclass(frozen=True)
class SeedResult:
    """What one seed found.

    Attributes:
        rows: per training row, each (N,): ``row`` in the table, ``given``, ``weight``, ``score``, ``suspect``, ``suggested``,
            ``probability`` (N, C), and ``truth`` where it is known.
        values: numbers and words: ``accuracy``, ``auroc``, ``seconds``, ``history``, ``cost``, ``notes``, ``threshold`` ...
        classifier: the cleaned model.
    """

    seed: int
    rows: dict[str, Tensor]
    values: dict[str, Any]
    classifier: Classifier

    @staticmethod
    def load(folder: Path, readers: Mapping[str, Reader]) -> SeedResult | None:
        """A finished seed's result, or None if it was not finished."""
        if not (folder / "result.json").exists():
            return None
        values = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return SeedResult(
            values["seed"], read_tensors(folder / "rows.safetensors"), values, restore(folder, readers)
        )


def run_seed(
    source: Source,
    settings: Settings,
    seed: int,
    base_seed: int,
    folder: Path,
    resume: bool,
    progress: Callable[[float, str], None],
) -> SeedResult:
    """The seed's result, stored in the folder, or read from it if it was finished before."""
    found = SeedResult.load(folder, source.readers)
    if found is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    start, whole = time.perf_counter(), 1.0 if settings.layers == "head" else 1 - TUNING
    parts, classes = split(source, seed, base_seed), len(source.classes)
    checkpoint = folder / "recipe.checkpoint"
    cleaned = clean_labels(
        parts.x, parts.given, parts.trusted_x, parts.trusted_y, classes, settings, seed, checkpoint=checkpoint,
        resume=resume and checkpoint.exists(), progress=lambda part, text: progress(whole * CLEANING * part, text),
    )  # fmt: skip
    cleaning = time.perf_counter() - start
    results = compete(
        parts,
        settings.model,
        settings.hidden,
        classes,
        seed,
        lambda part, text: progress(whole * (CLEANING + (1 - CLEANING) * part), text),
    )
    results.seconds["cleaned"] = cleaning
    if len(parts.held_y):
        results.accuracy["cleaned"] = accuracy(cleaned.model, parts.held_x, parts.held_y)
    head, encoding = cleaned.model, parts.encoding
    if settings.layers != "head":
        tuned = fine_tune(
            parts, cleaned, results, settings, classes, seed, folder,
            lambda part, text: progress(whole + TUNING * part, text),
        )  # fmt: skip
        cleaned, results, head, encoding = tuned.cleaned, tuned.results, tuned.head, tuned.encoding
    rows, values = _rows(parts, cleaned), _values(parts, cleaned)
    values["accuracy"] = results.accuracy
    values["auroc"] |= results.auroc
    values["notes"] += results.notes
    values |= {
        "seed": seed,
        "seconds": results.seconds | {"total": time.perf_counter() - start},
    }
    write_tensors(folder / "rows.safetensors", rows)
    Classifier(head, encoding, source.classes).save(folder)
    write_json(folder / "result.json", values)  # last: it says that the others are whole
    result = SeedResult.load(folder, source.readers)
    assert result is not None
    return result


def _rows(parts: Parts, cleaned: Cleaned) -> dict[str, Tensor]:
    rows = {
        "row": parts.rows,
        "given": parts.given,
        "weight": cleaned.weight,
        "score": cleaned.score,
        "suspect": cleaned.suspect,
    }
    rows |= {"suggested": cleaned.suggested, "probability": cleaned.probability}
    return rows if parts.truth is None else rows | {"truth": parts.truth}


def _values(parts: Parts, cleaned: Cleaned) -> dict[str, Any]:
    values: dict[str, Any] = {
        "counts": {
            "train": len(parts.given),
            "trusted": len(parts.trusted_y),
            "held_out": len(parts.held_y),
            "features": parts.x.shape[1],
        },
        "threshold": cleaned.threshold,
        "threshold_reason": cleaned.threshold_reason,
        "auroc": {},
        "history": cleaned.history,
        "cost": dict(cleaned.cost),
        "notes": list(cleaned.notes),
    }
    if parts.truth is not None:
        wrong = parts.given != parts.truth
        suspect = cleaned.suspect.bool()
        hits = float((wrong & suspect).sum())
        values["auroc"]["cleaned"] = auroc(cleaned.score, wrong)
        values["counts"]["wrong"] = int(wrong.sum())
        values["precision"] = hits / max(1, int(suspect.sum()))
        values["recall"] = hits / max(1, int(wrong.sum()))
        values["suggested_right"] = float((cleaned.suggested == parts.truth)[wrong].float().mean())
    return values


def stacked(results: list[SeedResult], key: str, rows: int) -> tuple[Tensor, Tensor]:
    """Sum over seeds of one per-row tensor, scattered to the table's rows, and how many seeds had each row."""
    first = results[0].rows[key]
    total, count = (
        torch.zeros(rows, *first.shape[1:], dtype=torch.float64),
        torch.zeros(rows, dtype=torch.float64),
    )
    for result in results:
        index = result.rows["row"]
        total.index_add_(0, index, result.rows[key].double())
        count.index_add_(0, index, torch.ones(len(index), dtype=torch.float64))
    return total, count
