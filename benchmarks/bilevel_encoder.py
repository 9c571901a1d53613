"""What training the encoder gains on TREC: `weingarten clean --layers`, against rivals that train the same layers.

Given are the 5,033 training questions with their weak labels, trusted are some of the 500 checked ones, and accuracy is measured
on the rest of these. Every run is the whole command: reading, encoding, cleaning with the frozen encoder, training it, rivals,
report. It uses all cores, and a GPU for the encoder if there is one; the two are separate lines of the result.

    python -m benchmarks.bilevel_encoder [--json PATH] [--layers last all] [--trusted 100] [--splits 0 1 2]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.bilevel_cleaning import over_the_best_rival
from benchmarks.bilevel_trec import DATA, checked, encoder_folder, texts
from benchmarks.environment import report
from weingarten.applications.clean import Job, Request, Settings, run

READS = "middle and last"
"""Layers that cleaning with the frozen encoder reads, before it is trained; earlier runs read the last alone."""


def tables(trusted: int, split: int, folder: Path) -> tuple[Path, Path, Path]:
    """CSV files of the questions with weak labels, of the trusted ones, and of those to measure on."""
    words, _ = texts("train")
    checked_words, checked_labels = texts("valid")
    trusted_rows, held = (rows.numpy() for rows in checked(split, trusted))
    frames = {
        "weak": pd.DataFrame({"question": words, "kind": np.load(DATA / "hard_labels.npy")}),
        "trusted": pd.DataFrame(
            {"question": [checked_words[i] for i in trusted_rows], "kind": checked_labels[trusted_rows]}
        ),
        "held": pd.DataFrame({"question": [checked_words[i] for i in held], "kind": checked_labels[held]}),
    }
    paths = []
    for name, frame in frames.items():
        paths.append(folder / f"{name}.csv")
        frame.astype({"kind": str}).to_csv(paths[-1], index=False)
    return paths[0], paths[1], paths[2]


def device() -> str:
    """What the encoder runs on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def once(layers: str, trusted: int, split: int) -> dict[str, Any]:
    """Accuracies on the held-out questions, AUROC of the ranking of wrong labels by the truth, and seconds of the whole."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weak, right, held = tables(trusted, split, folder)
        encoder = str(encoder_folder())
        request = Request(
            str(weak), "kind", trusted=str(right), held_out=str(held), text="question", encoder=encoder
        )
        settings = Settings(model="linear", layers=layers)
        start = time.perf_counter()
        found = run(Job(request, settings, seeds=1, seed=split, output=folder / "out"))
        seconds = time.perf_counter() - start
        labels = pd.read_csv(folder / "out" / "labels.csv")
    _, truth = texts("train")
    wrong = labels["given"].to_numpy() != truth[labels["row"]]
    return {
        "layers": layers,
        "reads": READS,
        "trusted": trusted,
        "split": split,
        "device": device(),
        "torch": torch.__version__,
        "accuracy": {key: round(value["mean"], 4) for key, value in found["accuracy"].items()},
        "auroc": round(float(roc_auc_score(wrong, labels["score"])), 4),
        "seconds": round(seconds, 1),
        "parts": {key: round(value["mean"], 1) for key, value in found["seconds"].items()},
    }


def kind_of(entry: dict[str, Any]) -> tuple[str, int, str, str]:
    """What runs on several splits have in common."""
    return entry["layers"], entry["trusted"], entry["device"], entry["reads"]


def summary(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over splits, by layers that are trained and read, number of trusted questions and device."""
    lines = {}
    for kind in sorted({kind_of(e) for e in entries}):
        same = [e for e in entries if kind_of(e) == kind]
        mean = {key: statistics.mean(e["accuracy"][key] for e in same) for key in same[0]["accuracy"]}
        lines[f"{kind[0]}, {kind[1]} trusted, {kind[2]}, first reads {kind[3]}"] = {
            "splits": len(same),
            "accuracy": {key: round(value, 4) for key, value in mean.items()},
            **over_the_best_rival(mean),
            "auroc": round(statistics.mean(e["auroc"] for e in same), 4),
            "seconds": round(statistics.mean(e["seconds"] for e in same), 1),
        }
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="results; those that are there already are kept and joined")
    parser.add_argument("--layers", nargs="+", default=["last", "all"])
    parser.add_argument("--trusted", nargs="+", type=int, default=[100])
    parser.add_argument("--splits", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    entries: list[dict[str, Any]] = []
    if arguments.json is not None and arguments.json.exists():
        entries = json.loads(arguments.json.read_text())["runs"]
    known = {(*kind_of(e), e["split"]) for e in entries}
    for split in arguments.splits:
        for trusted in arguments.trusted:
            for layers in arguments.layers:
                if (layers, trusted, device(), READS, split) not in known:
                    entries.append(once(layers, trusted, split))
                    print(json.dumps(entries[-1]), flush=True)
                    report(summary(entries), {"runs": entries}, arguments.json)


if __name__ == "__main__":
    main()
