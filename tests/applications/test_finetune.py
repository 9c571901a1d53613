"""Training the encoder together with the head: what is trained, what is kept, and the model that is left."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional
from typer.testing import CliRunner

from tests.applications.encoders import questions
from tests.applications.tables import QUICK, brief
from weingarten import cli
from weingarten.applications.clean import UserError, load_model, run
from weingarten.applications.clean.data import split
from weingarten.applications.clean.encoding import Encoding
from weingarten.applications.clean.finetune import run as run_module
from weingarten.applications.clean.finetune.network import (
    TextNetwork,
    TextRows,
    by_last_layer,
    encoder_of,
    texts_in,
)
from weingarten.applications.clean.finetune.tuning import Tuning
from weingarten.applications.clean.source import load
from weingarten.applications.clean.texts import Texts
from weingarten.solvers import DivergenceError

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(run_module, "SEEN", 60)
    with brief():
        yield


@pytest.fixture
def job(job):
    return replace(job, settings=replace(QUICK, layers="all"))


@pytest.fixture
def parts(job, tmp_path):
    source = load(job.request)
    source.prepare(tmp_path / "vectors", lambda part, text: None)
    return by_last_layer(split(source, 0, 0))


def test_an_encoder_that_is_trained_is_read_by_its_last_layer_alone(job, tmp_path):
    source = load(job.request)
    source.prepare(tmp_path / "vectors", lambda part, text: None)
    both = split(source, 0, 0)
    last = by_last_layer(both)
    assert [c.width for c in both.encoding.columns] == [16, 1]
    assert [c.width for c in last.encoding.columns] == [8, 1]
    for name, frame in (("x", "train"), ("trusted_x", "trusted"), ("held_x", "held")):
        assert torch.equal(getattr(last, name), getattr(both, name)[:, 8:])
        again = last.encoding.apply(both.frames[frame])  # by reading the texts
        torch.testing.assert_close(again, getattr(last, name), atol=1e-5, rtol=1e-4)


def frozen(rows):
    return encoder_of(texts_in(rows.encoding)).model


def network(parts, trained="all"):
    rows, numbered = TextRows.of(parts)
    torch.manual_seed(3)
    return TextNetwork(rows, nn.Linear(parts.x.shape[1], 2), trained).eval(), numbered


def test_untrained_network_is_the_head_on_the_features_of_the_frozen_encoder(parts):
    model, numbered = network(parts)
    for x, numbers in (
        (parts.x, numbered.x),
        (parts.trusted_x, numbered.trusted_x),
        (parts.held_x, numbered.held_x),
    ):
        assert len(x) == len(numbers)
        torch.testing.assert_close(model(numbers), model.head(x), atol=1e-4, rtol=1e-4)


def test_order_and_number_of_rows_do_not_matter(parts):
    model, numbered = network(parts)
    many = numbered.x.repeat(4)  # more than a batch
    order = torch.randperm(len(many), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(many)[order], model(many[order]), atol=1e-5, rtol=1e-4)
    assert model(numbered.x[:0]).shape == (0, 2)


@pytest.mark.parametrize("trained", ["last", "all"])
def test_gradient_is_that_of_reading_one_text_at_a_time(parts, trained):
    """In float64, against tokens one by one and finite differences of one weight."""
    rows, numbered = TextRows.of(parts)
    rows = replace(rows, features=rows.features.double())
    frozen(rows).double()
    try:
        model = TextNetwork(rows, nn.Linear(parts.x.shape[1], 2).double(), trained).eval()
        y, x = parts.given[:7], numbered.x[:7]

        def one_by_one():
            return sum(functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]) for i in range(7)) / 7

        loss = functional.cross_entropy(model(x), y)
        torch.testing.assert_close(loss, one_by_one(), atol=1e-12, rtol=1e-10)
        loss.backward()
        weight = next(p for name, p in model.named_parameters() if "layer.1.output.dense.weight" in name)
        slope, step = weight.grad[2, 3].item(), 1e-5
        with torch.no_grad():
            weight[2, 3] += step
            higher = one_by_one()
            weight[2, 3] -= 2 * step
            assert (higher - one_by_one()) / (2 * step) == pytest.approx(slope, rel=1e-5)
    finally:
        frozen(rows).float()


def changed(before, after):
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("trained", ["last", "all"])
def test_training_changes_what_was_asked_for_and_nothing_else(parts, trained):
    model, numbered = network(parts, trained)
    before, kept = state(model), state(frozen(model.rows))
    onehot = functional.one_hot(parts.given, 2).float()
    Tuning(passes=2).fit(model, numbered.x, onehot, torch.ones(len(onehot)), 0)
    found = changed(before, state(model))
    assert {"head.weight", "head.bias"} <= found
    inner = {name for name in found if name.startswith("encoder.")}
    last = {name for name in before if "encoder.layer.1." in name}
    if trained == "last":
        assert inner <= last
        assert len(inner) > len(last) - 3  # of keys' biases softmax knows nothing
    else:
        assert any("word_embeddings" in name for name in inner)
        assert any("encoder.layer.0." in name for name in inner)
    assert changed(kept, state(frozen(model.rows))) == set()
    assert not model.training


def test_training_lowers_the_loss_and_follows_the_weights(parts):
    model, numbered = network(parts)
    half, wrong = len(parts.given) // 2, 1 - parts.given
    labels = torch.cat([parts.given[:half], wrong[half:]])
    weights = (torch.arange(len(labels)) < half).float()  # the wrong ones count nothing
    onehot = functional.one_hot(labels, 2).float()
    Tuning(passes=30, rate=1e-3, head_rate=1e-2).fit(model, numbered.x, onehot, weights, 0)
    with torch.no_grad():
        right = (model(numbered.x).argmax(1) == parts.given).float()
    assert right[:half].mean() > 0.9
    assert right[half:].mean() > 0.7


def test_training_is_deterministic_and_does_not_touch_the_global_generator(parts):
    onehot = functional.one_hot(parts.given, 2).float()
    torch.manual_seed(5)
    before, states = torch.get_rng_state(), []
    for _ in range(2):
        rows, numbered = TextRows.of(parts)
        head = nn.Linear(parts.x.shape[1], 2)
        head.load_state_dict({"weight": torch.zeros_like(head.weight), "bias": torch.zeros(2)})
        torch.set_rng_state(before)
        model = TextNetwork(rows, head, "all")
        Tuning().fit(model, numbered.x, onehot, torch.ones(len(onehot)), 1)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(state(model))
    assert changed(*states) == set()


def test_gradients_that_are_not_finite_end_it_by_name(parts):
    model, numbered = network(parts)
    with torch.no_grad():
        model.head.weight[0, 0] = float("inf")
    onehot = functional.one_hot(parts.given, 2).float()
    with pytest.raises(
        DivergenceError, match=r"training the encoder tiny: a gradient is not finite; leave it"
    ):
        Tuning().fit(model, numbered.x, onehot, torch.ones(len(onehot)), 0)


@pytest.fixture
def whole(job):
    """A run to the end."""
    return run(replace(job, request=replace(job.request, noise="pair:0.3")))


def test_run_compares_networks_of_one_size_and_keeps_the_frozen_one(whole, job):
    assert set(whole["accuracy"]) == {"cleaned", "frozen", "trusted", "all", "both", "kept", "true"}
    assert set(whole["seconds"]) >= {"cleaned", "trusted", "all", "both", "kept", "true", "total"}
    assert whole["cost"]["fine-tuning seconds"]["mean"] > 0
    assert whole["counts"]["features"] == 17
    assert whole["settings"]["layers"] == "all"
    report = (job.output / "report.html").read_text()
    assert "trained together with all layers of the encoder" in report
    assert "Every rival trains the same part of the encoder" in report
    assert "cleaned, the encoder as it was" in report


def test_saved_model_carries_its_encoder(whole, job, encoder):
    labels = pd.read_csv(job.output / "labels.csv")
    model = load_model(job.output)
    frame = questions()
    probability = model.logits(frame.drop(columns="kind")).softmax(1)[labels["row"].tolist()]
    torch.testing.assert_close(
        probability.max(1).values, torch.tensor(labels["probability"]).float(), atol=1e-4, rtol=1e-3
    )
    assert model.predict(frame) != []
    with pytest.raises(ValueError, match=r"expected none: this model has an encoder of its own"):
        load_model(job.output, encoder=encoder)
    assert {path.name for path in job.output.iterdir()} == {
        "config.json", "encoder", "labels.csv", "model.safetensors", "overview.png", "report.html", "settings.json",
        "summary.json",
    }  # fmt: skip


def test_saving_an_encoder_prints_nothing(parts, tmp_path, capfd):
    encoder_of(texts_in(parts.encoding)).save(tmp_path / "encoder")
    assert capfd.readouterr() == ("", "")


def trainings(monkeypatch):
    """Seeds of the trainings that were done."""
    original, calls = Tuning.fit, []

    def counted(self, network, x, soft, weights, seed):
        calls.append(seed)
        return original(self, network, x, soft, weights, seed)

    monkeypatch.setattr(Tuning, "fit", counted)
    return calls


def test_run_that_is_interrupted_again_and_again_goes_on_to_the_same_labels(job, brief_report, monkeypatch):
    """In the first round, the second, the first rival and a later one; seeds tell the trainings apart."""
    calls = trainings(monkeypatch)
    whole = run(replace(job, output=job.output.with_name("whole")))
    total, original = len(calls), Tuning.fit
    del calls[:]
    for most in (1, 1, 3, 5):
        with monkeypatch.context() as patch:
            before = len(calls)

            def interrupted(self, *arguments, before=before, most=most):
                if len(calls) == before + most:
                    raise KeyboardInterrupt
                return original(self, *arguments)

            patch.setattr(Tuning, "fit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(replace(job, resume=job.output.with_name("out.partial").exists()))
        assert not job.output.exists()
    found = run(replace(job, resume=True))
    assert total <= len(calls) <= total + 4  # passes of a rival that was broken off are repeated
    labels = [(folder / "labels.csv").read_bytes() for folder in (job.output, job.output.with_name("whole"))]
    assert labels[0] == labels[1]
    assert found["accuracy"] == whole["accuracy"]


def test_progress_only_rises_and_reaches_the_report(job, brief_report):
    seen = []
    run(job, lambda done, part, text: seen.append((done + part, text)))
    assert [part for part, _ in seen] == sorted(part for part, _ in seen)
    assert {"encoder", "rival: encoder, all", "rival: encoder, kept"} <= {text for _, text in seen}


def test_encoder_without_a_list_of_blocks_has_no_last_one(parts):
    rows, _ = TextRows.of(parts)
    column = texts_in(rows.encoding)
    bare = replace(column, reader=Texts(replace(encoder_of(column), model=nn.Linear(2, 2))))
    with pytest.raises(UserError, match=r"--layers: tiny has no list of blocks, so none is its last"):
        TextNetwork(replace(rows, encoding=Encoding((bare,))), nn.Linear(9, 2), "last")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "some"], "--layers: found 'some', expected one of head, last, all"),
        (["--layers", "all"], "--layers: found 'all' without texts, expected --text and --encoder"),
        (["--layers", "last", "--no-correct-labels"], "--layers: found 'last' "),
    ],
)
def test_bad_options_are_one_line(job, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, ["clean", "q.csv", "--label", "kind", "--output", "o", *arguments])
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert message in line
    assert not (tmp_path / "o").exists()
