"""The table of judged labels."""

from __future__ import annotations

from statistics import fmean

import pandas as pd
import torch
from torch import Tensor

from weingarten.applications.clean.seed import SeedResult, stacked
from weingarten.applications.clean.source import Source

__all__ = ["label_table"]


def label_table(source: Source, results: list[SeedResult]) -> pd.DataFrame:
    """One line per judged row of the training table.

    ``row`` counts from 0 at the first row below the header. Where noise was put in, each seed has labels of its own and
    the table is the first seed's. Otherwise weight, score and probability are means over the seeds that trained on the row,
    and a row is suspect if its mean score is above the seeds' mean threshold. Rows that were trusted or held out in every
    seed are not listed.
    """
    if source.noise is not None or len(results) == 1:
        return _of_one(source, results[0])
    size = len(source.train)
    count = stacked(results, "weight", size)[1]
    rows = torch.nonzero(count > 0)[:, 0]
    mean = {
        key: stacked(results, key, size)[0][rows]
        / count[rows].view(-1, *[1] * (results[0].rows[key].dim() - 1))
        for key in ("given", "weight", "score", "probability")
    }
    threshold = fmean(result.values["threshold"] for result in results)
    given = mean["given"].round().long()
    suspect = (mean["score"] > threshold) & (mean["probability"].argmax(1) != given)
    return _frame(
        source,
        {"row": rows, "suspect": suspect, **mean, "given": given},
        threshold,
        results[0].values["threshold_reason"],
        [
            f"mean score {score:.4g} of {n:.0f} seeds"
            for score, n in zip(mean["score"], count[rows], strict=True)
        ],
    )


def _of_one(source: Source, result: SeedResult) -> pd.DataFrame:
    threshold, why = result.values["threshold"], result.values["threshold_reason"]
    scores = [f"score {score:.4g}" for score in result.rows["score"]]
    return _frame(source, result.rows, threshold, why, scores)


def _frame(
    source: Source, rows: dict[str, Tensor], threshold: float, why: str, scores: list[str]
) -> pd.DataFrame:
    suggested = rows["suggested"] if "suggested" in rows else rows["probability"].argmax(1)
    chosen = rows["probability"].gather(1, suggested[:, None])[:, 0]
    suspect = rows["suspect"].bool().tolist()
    columns = {
        "row": rows["row"].numpy(),
        "given": _names(source, rows["given"]),
        "weight": rows["weight"].double().numpy().round(6),
        "score": rows["score"].double().numpy().round(6),
        "suspect": ["yes" if bad else "no" for bad in suspect],
        "reason": [
            _reason(text, bool(above), bad, f"the threshold {threshold:.4g} ({why})")
            for text, above, bad in zip(scores, rows["score"] > threshold, suspect, strict=True)
        ],
        "suggested": _names(source, suggested),
        "probability": chosen.double().numpy().round(6),
    }
    if "truth" in rows:
        columns["truth"] = _names(source, rows["truth"])
    return pd.DataFrame(columns)


def _reason(score: str, above: bool, suspect: bool, threshold: str) -> str:
    if above and not suspect:
        return f"{score} is above {threshold}; but no other label is more likely"
    return f"{score} is {'above' if above else 'not above'} {threshold}"


def _names(source: Source, codes: Tensor) -> list[str]:
    return [source.classes[code] for code in codes.tolist()]
