"""Columns of texts: vectors against one text at a time, the cache, the saved model, and every mistake in the input."""

import json
import shutil
import socket
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from tests.applications.encoders import make_encoder, questions
from tests.applications.tables import brief
from weingarten import cli
from weingarten.applications.clean import UserError, load_model, run, texts
from weingarten.applications.clean import seed as seed_module
from weingarten.applications.clean.encoder import Encoder

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def quick():
    with brief():
        yield


def block(model, number):
    """What a block of the encoder gives, whatever the model says of its hidden states."""
    kept = []
    hook = model.encoder.layer[number].register_forward_hook(lambda module, args, output: kept.append(output))
    return kept, hook


def test_vector_is_made_of_the_normalised_means_of_two_layers_over_the_tokens_of_the_text_alone(encoder):
    found = Encoder.load(encoder)
    some = ["who is the king", "a", "where is the river in the city of the queen", "zebra"] * 20
    vectors = found.encode(some)
    for text, vector in zip(some[:4], vectors, strict=False):
        ids = found.tokenizer(text, truncation=True, max_length=12)["input_ids"]
        kept, hook = block(found.model, 0)
        with torch.no_grad():
            last = found.model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        hook.remove()
        middle = (kept[0] if isinstance(kept[0], torch.Tensor) else kept[0][0])[0].mean(0)
        expected = torch.cat([middle / middle.norm(), last / last.norm()])
        torch.testing.assert_close(torch.from_numpy(vector), expected, atol=1e-6, rtol=1e-5)
    assert vectors.shape == (80, 16)
    assert found.lengths(some[:2]) == [6, 3]  # [CLS] and [SEP] count
    assert not found.model.training
    assert not any(p.requires_grad for p in found.model.parameters())


def test_limit_is_the_smaller_of_tokenizer_and_positions(tmp_path):
    wide = make_encoder(tmp_path / "wide", positions=30)
    assert Encoder.load(wide).limit == 30
    settings = json.loads((wide / "tokenizer_config.json").read_text())
    (wide / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 9}))
    assert Encoder.load(wide).limit == 9


def test_run_on_texts_shows_them_and_needs_no_network(job, encoder, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    frame = questions()
    frame.loc[5, "question"] = "where is the city of the king in the year 1 2 3 1 2 3"
    frame.to_csv(job.request.train, index=False)
    seen = []
    summary = run(
        replace(job, request=replace(job.request, noise="pair:0.3")),
        lambda done, part, text: seen.append((done + part, text)),
    )
    assert [part for part, _ in seen] == sorted(part for part, _ in seen)
    assert (0.3, "texts 60 of 60") in seen
    assert summary["counts"]["features"] == 17  # the number beside the text is a feature, too
    assert not (job.output / "vectors").exists()
    report = (job.output / "report.html").read_text()
    note = "1 of 60 texts of q.csv were truncated: they are longer than the 12 tokens"
    assert any(note in found for found in summary["notes"])
    assert note in report
    labels = pd.read_csv(job.output / "labels.csv")
    suspects = labels[labels["suspect"] == "yes"].sort_values("score", ascending=False)
    assert len(suspects)
    assert frame["question"][suspects["row"].iloc[0]] in report
    assert str(encoder.parent) not in (job.output / "config.json").read_text()


def test_dropped_columns_are_no_features(job, brief_report):
    assert run(replace(job, request=replace(job.request, drop=("length",))))["counts"]["features"] == 16


def test_saved_model_predicts_with_its_encoder_and_refuses_others(job, brief_report, encoder, tmp_path):
    run(job)
    model = load_model(job.output, encoder=encoder)
    new = questions(20, seed=3).drop(columns="kind")
    logits = model.logits(new)
    assert logits.shape == (20, 2)
    torch.testing.assert_close(model.logits(new.iloc[::-1]), logits.flip(0), atol=1e-5, rtol=1e-4)
    assert (model.logits(new.assign(question="who is the king")) - logits).abs().max() > 1e-3
    assert set(model.predict(new)) <= {"person", "place"}
    assert model.logits(new.head(0)).shape == (0, 2)
    with pytest.raises(ValueError, match=r"reads texts by the encoder tiny .*expected encoder="):
        load_model(job.output)
    other = make_encoder(tmp_path / "tiny", seed=1)
    with pytest.raises(ValueError, match=r"encoder: .* has the digest .*, expected the encoder tiny"):
        load_model(job.output, encoder=other)


@pytest.fixture
def encoded(monkeypatch):
    """How many texts were encoded in each call."""
    original, calls = Encoder.encode, []

    def counted(self, some, *args):
        calls.append(len(some))
        return original(self, some, *args)

    monkeypatch.setattr(Encoder, "encode", counted)
    return calls


def test_interrupted_encoding_goes_on_to_the_same_labels(job, brief_report, monkeypatch, encoded):
    monkeypatch.setattr(texts, "CHUNK", 16)
    run(replace(job, output=job.output.with_name("whole")))
    assert encoded == [1, 16, 16, 16, 12]  # one text to try the encoder

    def interrupt(done, part, text):
        if text == "texts 40 of 60":
            raise KeyboardInterrupt

    monkeypatch.setattr("weingarten.applications.clean.encoder.BATCH", 8)
    with pytest.raises(KeyboardInterrupt):
        run(job, interrupt)
    partial = job.output.with_name("out.partial")
    assert {p.suffix for p in (partial / "vectors").iterdir()} == {".safetensors"}
    assert len(list((partial / "vectors").iterdir())) == 2
    assert not job.output.exists()
    del encoded[:]
    run(replace(job, resume=True))
    assert encoded == [1, 16, 12]
    whole = job.output.with_name("whole")
    assert (job.output / "labels.csv").read_bytes() == (whole / "labels.csv").read_bytes()


def test_resumed_seeds_do_not_encode_again(job, brief_report, monkeypatch, encoded):
    with monkeypatch.context() as patch:

        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        patch.setattr(seed_module, "compete", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(job)
    assert encoded == [1, 60]
    run(replace(job, resume=True))
    assert encoded == [1, 60, 1]


def test_another_encoder_is_another_setting(job, brief_report, tmp_path):
    run(job)
    other = make_encoder(tmp_path / "tiny", seed=1)
    moved = shutil.copytree(job.request.encoder, tmp_path / "moved")
    run(replace(job, request=replace(job.request, encoder=str(moved))))  # the same files elsewhere
    with pytest.raises(UserError, match="holds results of other settings"):
        run(replace(job, request=replace(job.request, encoder=str(other))))


def break_encoder(folder, **changes):
    """A copy of the encoder with files left out (None) or replaced by text."""
    for name, text in changes.items():
        path = folder / {"config": "config.json", "weights": "model.safetensors"}.get(name, name)
        path.unlink() if text is None else path.write_text(text)


def bad_inputs():
    """(what is done to the copy of the encoder or to the table, arguments, what the message holds)"""
    text, encoder = ["--text", "question"], ["--encoder", "e"]
    both = [*text, *encoder]

    def table(column, row, value):
        def change(folder):
            frame = questions()
            frame[column] = frame[column].astype(object)
            frame.loc[row, column] = value
            frame.to_csv("q.csv", index=False)

        return change

    def lacking(folder):
        for name in ("tokenizer.json", "vocab.txt"):
            (folder / name).unlink()

    def weights(folder):
        from safetensors.torch import load_file, save_file

        found = load_file(folder / "model.safetensors")
        kept = {name: value for name, value in found.items() if "layer.1.output" not in name}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})

    return {
        "no folder": (None, [*text, "--encoder", "nowhere"], "--encoder: no such folder: nowhere"),
        "file": (None, [*text, "--encoder", "q.csv"], "--encoder: q.csv is a file, expected a folder"),
        "no config": (lambda f: break_encoder(f, config=None), both, "--encoder: e has no config.json"),
        "no weights": (lambda f: break_encoder(f, weights=None), both, "--encoder: e has no weights"),
        "no tokenizer": (lacking, both, "--encoder: e has no tokenizer"),
        "other config": (
            lambda f: break_encoder(f, config='{"model_type": "magic"}'),
            both,
            "--encoder: e holds no usable encoder",
        ),
        "broken weights": (lambda f: break_encoder(f, weights="no"), both, "e holds no usable encoder"),
        "part of the weights": (weights, both, "--encoder: the weights of e lack encoder.layer.1.output"),
        "no encoder": (None, text, "--text: found 'question' without an encoder"),
        "no text": (None, encoder, "--encoder: found without --text"),
        "unknown device": (
            None,
            [*both, "--device", "gpu"],
            "--device: found 'gpu', which torch cannot use here",
        ),
        "absent device": (None, [*both, "--device", "cuda:99"], "--device: found 'cuda:99', which torch"),
        "device of nothing": (
            None,
            [*both, "--device", "meta"],
            "--device: found 'meta', which torch cannot",
        ),
        "device alone": (
            None,
            ["--drop", "question", "--device", "cuda"],
            "--device: found 'cuda' without --text",
        ),
        "both": (None, [*both, "--images", "length"], "--text and --images: found together"),
        "no column": (
            None,
            ["--text", "questions", *encoder],
            "no column 'questions'; did you mean 'question'?",
        ),
        "label": (None, ["--text", "kind", *encoder], "--text: 'kind' is the column of --label too"),
        "dropped": (None, [*both, "--drop", "question"], "--text: 'question' is the column of --drop too"),
        "numbers": (
            None,
            ["--text", "length", *encoder, "--drop", "question"],
            "'length' of q.csv holds float values",
        ),
        "missing text": (
            table("question", 7, None),
            both,
            "is empty or missing in 1 rows (7), expected texts",
        ),
        "empty text": (table("question", 9, "  "), both, "is empty or missing in 1 rows (9), expected texts"),
        "noise": (None, [*both, "--noise", "pair:0.001"], "moves none of"),
    }


@pytest.mark.parametrize("case", bad_inputs())
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, encoder, case):
    change, arguments, message = bad_inputs()[case]
    monkeypatch.chdir(tmp_path)
    questions().to_csv("q.csv", index=False)
    copy = shutil.copytree(encoder, tmp_path / "e")
    if change:
        change(copy)
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(cli.app, ["clean", "q.csv", "--label", "kind", "--output", "out", *arguments])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert result.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_texts_of_the_built_in_data_are_refused():
    result = CliRunner().invoke(cli.app, ["clean", "digits", "--text", "x", "--encoder", "e"])
    assert result.exit_code == 2
    assert "--text: found with the built-in 'digits'" in result.stderr


def test_missing_transformers_is_named(job, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        UserError, match=r"transformers is not installed; run: pip install 'weingarten\[text\]'"
    ):
        run(job)
    assert not job.output.with_name("out.partial").exists()


def test_values_that_are_not_finite_are_refused(job, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(job.request.encoder, tmp_path / "broken")
    found = load_file(folder / "model.safetensors")
    name = next(name for name in found if name.endswith("word_embeddings.weight"))
    found[name] = torch.full_like(found[name], np.nan)
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="not finite"):
        run(replace(job, request=replace(job.request, encoder=str(folder))))
