"""The report: one HTML file that needs nothing else."""

from __future__ import annotations

import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from sklearn.feature_selection import f_classif

from weingarten.applications.clean import figures
from weingarten.applications.clean.final import Final
from weingarten.applications.clean.finetune import ROUNDS as TUNED_ROUNDS
from weingarten.applications.clean.rivals import ACCURACY, AUROC
from weingarten.applications.clean.rounds import Rounds
from weingarten.applications.clean.summary import Spread, Summary

__all__ = ["render", "write_report"]

MOST_SUSPECT = 24
ROWS_PER_MISTAKE = 3
KEY_COLUMNS = 6
LONGEST_TEXT = 400
RIVALS = (
    f"Every rival uses the same kind of network and Adam for {Final.steps} steps, and chooses its weight decay, and whether to "
    "mix rows as the cleaned model does, by the trusted rows."
)
TUNED = {"last": "the last block", "all": "all layers"}
TUNED_RIVALS = (
    "Every rival trains the same part of the encoder and the same kind of model, with the same rates and batches. Those that "
    "learn given labels stop when a pass does not serve the trusted rows better than the one before."
)


def write_report(folder: Path, summary: Summary) -> None:
    """Write ``report.html`` and ``overview.png``."""
    (folder / "report.html").write_text(render(summary), encoding="utf-8")
    (folder / "overview.png").write_bytes(figures.overview(summary))


def render(summary: Summary) -> str:
    """The report as text."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["spread"] = _spread
    environment.filters["thousands"] = lambda n: f"{n:,}".replace(",", "\u202f")
    template = environment.from_string(
        files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    return template.render(
        summary=summary,
        values=summary.values,
        cards=_cards(summary),
        done=_what_was_done(summary),
        accuracy=_ranked(summary.accuracy, ACCURACY),
        auroc=_ranked(summary.auroc, AUROC),
        several=len(summary.results) > 1,
        bars=figures.accuracy_bars(summary) if summary.accuracy else None,
        histograms=figures.histograms(summary),
        curves=figures.learning_curves(summary),
        suspects=_suspects(summary),
        cost=_cost(summary),
        settings=_settings(summary),
    )


def _spread(spread: Spread, digits: int = 3) -> str:
    if all(value == round(value) for value in spread.values) and spread.mean >= 1:
        digits = 0 if spread.mean == round(spread.mean) else 1
    mean = f"{spread.mean:.{digits}f}"
    return mean if math.isnan(spread.deviation) else f"{mean} ± {spread.deviation:.{digits}f}"


def _ranked(spreads: dict[str, Spread], names: dict[str, str]) -> list[tuple[str, str, Spread]]:
    """Key, name and figure, best first; what nobody can have (true labels) last."""
    keys = sorted(spreads, key=lambda key: (key == "true", -spreads[key].mean))
    return [(key, names[key], spreads[key]) for key in keys]


def _cards(summary: Summary) -> list[tuple[str, str, str]]:
    """Figure, what it is, and what to compare it with."""
    cards, counts = [], summary.values["counts"]
    rivals = {key: s for key, s in summary.accuracy.items() if key not in ("cleaned", "frozen", "true")}
    if "cleaned" in summary.accuracy and rivals:
        best = max(rivals, key=lambda key: rivals[key].mean)
        cards.append(
            (
                f"{summary.accuracy['cleaned'].mean:.3f}",
                "held-out accuracy",
                f"best rival: {rivals[best].mean:.3f}, {ACCURACY[best]}",
            )
        )
    if "cleaned" in summary.auroc:
        others = {key: s for key, s in summary.auroc.items() if key != "cleaned"}
        best = max(others, key=lambda key: others[key].mean)
        cards.append(
            (
                f"{summary.auroc['cleaned'].mean:.4f}",
                "AUROC of the ranking",
                f"best rival: {others[best].mean:.4f}, {AUROC[best]}",
            )
        )
    share = summary.values["suspects"] / max(1, len(summary.labels))
    truth = (
        f"{counts['wrong']} of {counts['train']} labels are wrong"
        if "wrong" in counts
        else f"{share:.0%} of {len(summary.labels)} judged rows"
    )
    cards.append((str(summary.values["suspects"]), "suspect labels", truth))
    seconds = summary.values["line"]["seconds"]
    cards.append(
        (
            f"{seconds:.0f} s",
            "in all",
            f"{len(summary.results)} seed{'s' * (len(summary.results) > 1)}, rivals included",
        )
    )
    return cards


def _what_was_done(summary: Summary) -> list[str]:
    source, counts, settings = summary.source, summary.values["counts"], summary.values["settings"]
    noise = (
        f" To see whether wrong labels are found, {source.noise.describe()} on purpose."
        if source.noise
        else ""
    )
    origin = f"from {source.trusted.name}" if source.trusted is not None else f"split off {source.train.name}"
    held = (
        f" {counts['held_out']} rows were held out to measure accuracy and seen by nothing else."
        if counts["held_out"]
        else ""
    )
    data = (
        f"The table {source.train.name} has {len(source.train)} rows in {len(source.classes)} classes. "
        f"{counts['train']} rows "
        f"({counts['features']} numbers each, {_coded(summary)}) were judged.{noise} "
        f"{counts['trusted']} rows "
        f"{origin} are trusted: their labels are taken as right.{held}"
    )
    return [data, *_recipe(settings), RIVALS if settings["layers"] == "head" else TUNED_RIVALS]


def _recipe(settings: dict[str, Any]) -> list[str]:
    """How the model was cleaned, in words."""
    network = (
        "a linear model"
        if settings["model"] == "linear"
        else f"a network with one hidden layer of {settings['hidden']} units"
    )
    weights = (
        f"{network.capitalize()} is trained on the judged rows, each with a weight between 0 and 1, and the weights are changed "
        "so that the trained model does better on trusted rows it has not seen: a row that teaches the model something wrong "
        "loses weight. How the trained model answers to each weight, the hypergradient, needs the curvature of the training "
        f"loss; here by the method {settings['method']}."
    )
    first = (
        "How often each class is given each label is first read off a network that has seen the trusted rows alone, and then "
        "learned on in the same way as the weights. Of the two the one counts that served held-back trusted rows better."
    )
    taught = (
        "The cleaned model is a fresh network. It learns the trusted rows first and then all rows, in "
        f"{Rounds.rounds} rounds: each round replaces a given label by what the network so far and the learned mistakes "
        "together take it to mean, and rows for which that is unclear count less. A row whose label is corrected still "
        "teaches something and may keep most of its weight; what tells wrong labels apart is the score."
    )
    weighed = "The cleaned model is a fresh network, trained on the judged rows with these weights and on the trusted rows."
    tuned = (
        f"Then a fresh model of this kind was trained together with {TUNED.get(settings['layers'])} of the encoder in the same "
        f"way: on the trusted rows first, then in {TUNED_ROUNDS} rounds, with the weights and the mistakes found before. "
        "Of an encoder in training its last layer alone is read."
    )
    if not settings["correct_labels"]:
        return [weights, weighed]
    return [weights, first, taught, *([tuned] if settings["layers"] != "head" else [])]


def _coded(summary: Summary) -> str:
    readers = summary.source.readers
    read = [f"column {name} turned into numbers as said below" for name in readers]
    others = [name for name in summary.source.train.features if name not in readers]
    return ", ".join([*read, *(["columns standardised or one-hot coded"] if others else [])])


def _settings(summary: Summary) -> list[tuple[str, Any]]:
    values = {**summary.values["request"], **summary.values["settings"]}
    named = [
        (key.replace("_", " "), "auto" if value is None else value)
        for key, value in values.items()
        if value not in ([], ())
    ]
    unset = {"label", "trusted", "noise", "held out", "trusted size"}
    absent = {
        ("text", "auto"),
        ("encoder", "auto"),
        ("images", "auto"),
        ("device", "auto"),
        ("layers", "head"),
    }
    named = [pair for pair in named if pair not in absent]
    named = [(key, "default" if key in unset and value == "auto" else value) for key, value in named]
    return [*named, ("seeds", ", ".join(map(str, summary.values["seeds"])))]


def _cost(summary: Summary) -> list[tuple[str, str]]:
    words = {
        "cleaned": "cleaning",
        "confidence": "cross-validation",
        "kept": "rival: what cleanlab keeps, with cross-validation",
        "logistic": "logistic regression on the trusted part",
        "total": "one seed in all",
    }
    parts = [
        (words.get(key, f"rival: {ACCURACY.get(key, key)}") + ", seconds", _spread(s, 2))
        for key, s in summary.seconds.items()
    ]
    return [(key.replace("_", " "), _spread(s, 2)) for key, s in summary.cost.items()] + parts


def _suspects(summary: Summary) -> dict[str, Any]:
    """The most suspect rows of each mistake, with pictures or with the columns that tell the classes apart best."""
    table = summary.labels[summary.labels["suspect"] == "yes"].sort_values(
        "score", ascending=False, kind="stable"
    )
    place = table.groupby(
        ["given", "suggested"]
    ).cumcount()  # so that one frequent mistake does not fill the page
    table = table.iloc[np.argsort(place.to_numpy() >= ROWS_PER_MISTAKE, kind="stable")].head(MOST_SUSPECT)
    table = table.sort_values("score", ascending=False, kind="stable")
    features, readers = summary.source.train.features, summary.source.readers
    rows = table.to_dict("records")
    pictures = [summary.source.picture(row["row"]) for row in rows]
    columns: list[str] = []
    if any(pixels is not None for pixels in pictures):
        for row, pixels in zip(rows, pictures, strict=True):
            row["picture"] = figures.picture(pixels) if pixels is not None else ""
    elif rows:
        columns = [*readers, *(name for name in _key_columns(summary) if name not in readers)]
        for row in rows:
            found = {name: features[name].iloc[row["row"]] for name in columns}
            row["values"] = {
                name: _cut(value, LONGEST_TEXT) if name in readers else _short(value)
                for name, value in found.items()
            }
    return {
        "rows": rows,
        "columns": columns,
        "texts": list(readers),
        "pictures": any("picture" in row for row in rows),
        "truth": "truth" in table.columns,
    }


def _key_columns(summary: Summary) -> list[str]:
    encoding = summary.results[0].classifier.encoding
    labels = summary.labels
    encoded = encoding.apply(summary.source.train.features.iloc[labels["row"].to_numpy()]).numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        telling = np.nan_to_num(f_classif(encoded[:, encoded.std(0) > 0], labels["given"])[0], posinf=1e30)
    strength = np.zeros(encoding.width)
    strength[encoded.std(0) > 0] = telling
    ends = np.cumsum([column.width for column in encoding.columns])
    best = {
        c.name: strength[end - c.width : end].max() for c, end in zip(encoding.columns, ends, strict=True)
    }
    chosen = set(sorted(best, key=lambda name: -best[name])[:KEY_COLUMNS])
    return [column.name for column in encoding.columns if column.name in chosen]


def _short(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return "missing" if math.isnan(value) else f"{value:.4g}"
    return _cut(str(value), 40)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
