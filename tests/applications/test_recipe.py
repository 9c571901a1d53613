"""The learning recipe of `weingarten clean`, on small parts of digits."""

from functools import lru_cache

import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional

from weingarten.applications.clean.final import Final
from weingarten.applications.clean.levels import row_weight
from weingarten.applications.clean.network import accuracy, build_network
from weingarten.applications.clean.noise import Noise
from weingarten.applications.clean.recipe import Cleaned, Settings, clean_labels
from weingarten.applications.clean.rivals import auroc
from weingarten.bilevel import METHODS, Interrupted

CLASSES, GIVEN = 4, 240


@lru_cache
def digits(given=GIVEN, trusted=24):
    x, y = load_digits(n_class=CLASSES, return_X_y=True)
    x, y = torch.from_numpy(x).float() / 8 - 1, torch.from_numpy(y).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, truth = x[order], y[order]
    parts = torch.split(torch.arange(len(y)), [given, trusted, len(y) - given - trusted])
    noisy = Noise("pair", 0.4).apply(truth[parts[0]], x[parts[0]], CLASSES, seed=0)
    return x, truth, noisy, parts


def clean(settings, features=slice(None), **rest) -> Cleaned:
    x, truth, noisy, (a, b, _) = digits()
    x = x[:, features]
    return clean_labels(x[a], noisy, x[b], truth[b], CLASSES, settings, seed=3, **rest)


@lru_cache
def cleaned() -> Cleaned:
    return clean(Settings(steps=30, hidden=16))


def equal(a: Cleaned, b: Cleaned) -> bool:
    pairs = [(a.weight, b.weight), (a.score, b.score), (a.probability, b.probability)]
    pairs += list(zip(a.model.parameters(), b.model.parameters(), strict=True))
    return all(torch.equal(s, t) for s, t in pairs)


def without_time(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def test_it_beats_training_on_the_trusted_rows_alone_and_on_all_rows():
    x, truth, noisy, (a, b, held) = digits()
    found = accuracy(cleaned().model, x[held], truth[held])
    rivals = []
    for rows, labels in ((x[b], truth[b]), (torch.cat([x[a], x[b]]), torch.cat([noisy, truth[b]]))):
        network = build_network("mlp", x.shape[1], 16, CLASSES, 0)
        soft = functional.one_hot(labels, CLASSES).float()
        rivals.append(
            accuracy(Final().fit(network, rows, soft, torch.ones(len(rows)), 0), x[held], truth[held])
        )
    assert found > 0.96
    assert found > max(rivals) + 0.02


def test_it_ranks_the_wrong_labels_first_and_suspects_most_of_them():
    _, truth, noisy, (a, _, _) = digits()
    wrong = noisy != truth[a]
    assert auroc(cleaned().score, wrong) > 0.99
    assert (cleaned().suspect == wrong).float().mean() > 0.95
    assert (cleaned().suggested == truth[a])[wrong].float().mean() > 0.9


def test_what_it_returns_has_the_promised_shapes_and_ranges():
    found, n = cleaned(), GIVEN
    assert found.weight.shape == found.score.shape == found.suspect.shape == found.suggested.shape == (n,)
    assert found.probability.shape == (n, CLASSES)
    assert ((found.weight >= 0) & (found.weight <= 1)).all()
    assert ((found.score >= 0) & (found.score <= 1)).all()
    assert torch.allclose(found.probability.sum(1), torch.ones(n))
    another = found.suggested != digits()[2]
    assert torch.equal(found.suspect, (found.score > found.threshold) & another)
    assert [row["step"] for row in found.history] == [float(i) for i in range(1, 31)]
    assert set(found.history[0]) == {
        "step", "seconds", "outer_loss", "inner_loss", "trusted_accuracy", "damping"
    }  # fmt: skip
    assert found.history[-1]["outer_loss"] < found.history[0]["outer_loss"]
    assert found.cost["curvature products"] == 30


def test_it_is_deterministic_and_does_not_touch_the_global_generator():
    settings = Settings(steps=3, hidden=8)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = clean(settings)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert equal(first, clean(settings))


def test_an_interrupted_run_resumes_to_the_same_result(tmp_path):
    settings, path = Settings(steps=14, hidden=8), tmp_path / "recipe.checkpoint"

    def interrupt(part, text):
        if text.startswith("step 12 "):
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        clean(settings, checkpoint=path, progress=interrupt)
    resumed = clean(settings, checkpoint=path, resume=True)
    whole = clean(settings)
    assert equal(resumed, whole)
    assert without_time(resumed.history) == without_time(whole.history)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(method):
    few = slice(18, 22) if method == "exact" else slice(None)  # a dense matrix needs few parameters
    found = clean(Settings(method=method, steps=2, hidden=4, damping=0.1), features=few)
    assert torch.isfinite(found.score).all()
    assert found.weight.unique().numel() > 1


def test_labels_need_not_be_corrected():
    found = clean(Settings(steps=20, hidden=16, correct_labels=False))
    _, truth, noisy, (a, _, _) = digits()
    assert ((found.weight >= 0) & (found.weight <= 1)).all()
    assert auroc(-found.weight, noisy != truth[a]) > 0.8


def test_time_is_a_limit():
    found = clean(Settings(steps=50, hidden=8, seconds=1e-3))
    assert len(found.history) == 1


def test_progress_rises_to_one():
    parts = []
    clean(Settings(steps=2, hidden=8), progress=lambda part, text: parts.append(part))
    assert parts == sorted(parts)
    assert parts[-1] == 1.0


def test_large_data_runs_in_mini_batches(monkeypatch):
    monkeypatch.setattr("weingarten.applications.clean.task.BATCH", 64)
    found = clean(Settings(steps=4, hidden=8))
    assert torch.isfinite(found.score).all()
    untouched = found.weight == row_weight({"weight": torch.tensor(2.0)})
    assert 0 < untouched.sum() < len(untouched)  # rows in no batch keep their weight
