"""Which layers of an encoder to read: logistic regression on trusted rows alone, on the five sorts of text of `clean_texts`.

Means over a text's tokens of the states of some layers of MiniLM, each scaled to length one, side by side and standardised. 100
and 400 rows (200 and 400 of the twenty newsgroups) are trusted, three draws; weak labels play no part.

    python -m benchmarks.clean_layers [--json PATH]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from benchmarks.bilevel_trec import encoder_folder, texts
from benchmarks.clean_texts import READ, TRUSTED, table
from benchmarks.environment import report
from weingarten.applications.clean.data import stratified
from weingarten.applications.clean.encoder import Encoder

LAYERS = {
    "last": (6,), "5 and last": (5, 6), "middle and last": (3, 6), "embeddings and last": (0, 6),
    "embeddings, middle, last": (0, 3, 6), "last four": (3, 4, 5, 6), "all": tuple(range(7)),
}  # fmt: skip
DRAWS, BATCH = range(3), 64
DECAY = 1e-2
"""What the command first trains on trusted rows with."""


@torch.inference_mode()
def states(encoder: Encoder, words: list[str]) -> np.ndarray:
    """Means of every layer's states (N, L + 1, D), each of length one."""
    tokens, found = encoder.tokens(words), []
    order = np.argsort([len(row) for row in tokens], kind="stable")
    for start in range(0, len(words), BATCH):
        rows = [tokens[i] for i in order[start : start + BATCH]]
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        ids = pad_sequence(rows, batch_first=True, padding_value=encoder.tokenizer.pad_token_id)
        hidden = encoder.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        sums = torch.stack([(state * mask[..., None]).sum(1) for state in hidden], 1)
        found.append(normalize(sums, dim=2).numpy())
    return np.concatenate(found)[np.argsort(order)]


def read(name: str) -> tuple[list[str], np.ndarray]:
    """Texts and their true classes; of TREC the checked ones."""
    if name == "TREC":
        return texts("valid")
    rows = table(name)
    return rows["text"].tolist(), pd.factorize(rows["label"], sort=True)[0]


def accuracies(x: np.ndarray, y: np.ndarray, trusted: int) -> list[float]:
    """On the other rows, one for each draw of the trusted ones."""
    found = []
    for seed in DRAWS:
        rows, others = stratified(y, np.arange(len(y)), trusted, np.random.default_rng(seed))
        model = LogisticRegression(max_iter=500, C=1 / (DECAY * trusted)).fit(x[rows], y[rows])
        found.append(round(float(model.score(x[others], y[others])), 4))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where the results go")
    arguments = parser.parse_args()
    encoder, lines = Encoder.load(encoder_folder()), {}
    for name in ("TREC", *READ):
        words, y = read(name)
        vectors = states(encoder, words)
        for trusted in (TRUSTED[name], 400):
            values = {
                layers: accuracies(
                    StandardScaler().fit_transform(vectors[:, which].reshape(len(y), -1)), y, trusted
                )
                for layers, which in LAYERS.items()
            }
            lines[f"{name}, {trusted} trusted"] = values
            print(name, trusted, {key: round(statistics.mean(v), 3) for key, v in values.items()}, flush=True)
    means = {line: {key: round(statistics.mean(v), 4) for key, v in of.items()} for line, of in lines.items()}
    report(means, {"accuracy": lines}, arguments.json)


if __name__ == "__main__":
    main()
