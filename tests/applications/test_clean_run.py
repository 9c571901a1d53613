import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.applications.tables import QUICK, brief, flowers
from weingarten.applications.clean import Job, Request, UserError, finished_seeds, load_model, run
from weingarten.applications.clean import job as job_module
from weingarten.applications.clean import seed as seed_module
from weingarten.applications.clean.seed import SeedResult, stacked

FILES = {
    "labels.csv",
    "model.safetensors",
    "config.json",
    "report.html",
    "overview.png",
    "summary.json",
    "settings.json",
}
COLUMNS = ["row", "given", "weight", "score", "suspect", "reason", "suggested", "probability"]


@pytest.fixture(autouse=True)
def quick():
    with brief():
        yield


@pytest.fixture
def job(tmp_path):
    flowers().to_csv(tmp_path / "flowers.csv", index=False)
    return Job(Request(str(tmp_path / "flowers.csv"), "species"), QUICK, seeds=2, output=tmp_path / "out")


class Loads(HTMLParser):
    """Everything a page would load, and the headings of its sections."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.sections = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.loads += [found[key] for key in ("src", "href", "srcset", "data") if key in found]
        self.sections += [found["id"]] if tag == "section" else []


def check_report(text, sections):
    page = Loads(text)
    assert [load[:40] for load in page.loads if not load.startswith("data:image/")] == []
    assert not re.search(r"url\(|@import|<script|<link", text)
    assert page.sections == sections


def test_run_on_a_table_of_ones_own(job):
    seen = []
    summary = run(job, lambda done, part, text: seen.append(done + part))
    assert seen == sorted(seen)
    assert seen[-1] == 2
    assert {p.name for p in job.output.iterdir()} == FILES
    assert not job.output.with_name("out.partial").exists()
    assert summary == json.loads((job.output / "summary.json").read_text())
    assert summary["line"]["auroc"] is None
    assert summary["line"]["accuracy_true"] is None
    assert 0 <= summary["line"]["accuracy"] <= 1
    text = (job.output / "report.html").read_text()
    check_report(text, ["done", "accuracy", "scores", "curves", "suspects", "cost", "settings"])
    assert "assumed right" in text  # what taking trusted rows from the file means
    assert "the trusted part alone" in text
    assert "2 missing values" in text
    labels = pd.read_csv(job.output / "labels.csv")
    assert list(labels) == COLUMNS
    frame = flowers()
    assert (labels["given"] == frame["species"].iloc[labels["row"]].to_numpy()).all()
    assert labels["row"].is_unique
    assert labels["weight"].between(0, 1).all()
    assert set(labels["suspect"]) <= {"yes", "no"}


def test_run_where_the_truth_is_known(job):
    job = replace(job, request=replace(job.request, noise="pair:0.3"), seeds=1)
    summary = run(job)
    assert 0.5 < summary["line"]["auroc"] <= 1
    assert summary["counts"]["wrong"] == round(0.3 * summary["counts"]["train"])
    labels = pd.read_csv(job.output / "labels.csv")
    assert list(labels) == [*COLUMNS, "truth"]
    assert (labels["truth"] == flowers()["species"].iloc[labels["row"]].to_numpy()).all()
    assert (labels["given"] != labels["truth"]).sum() == summary["counts"]["wrong"]
    text = (job.output / "report.html").read_text()
    check_report(text, ["done", "accuracy", "auroc", "scores", "curves", "suspects", "cost", "settings"])
    assert "±" not in text  # one seed has no spread
    assert "then all rows, in 5 rounds" in text


def test_saved_model_predicts_what_was_measured(job, brief_report):
    summary = run(replace(job, request=replace(job.request, held_out="0"), seeds=1))
    assert summary["line"]["accuracy"] is None
    model, labels, frame = load_model(job.output), pd.read_csv(job.output / "labels.csv"), flowers()
    logits = model.logits(frame.iloc[labels["row"]])
    assert logits.shape == (len(labels), 3)
    assert torch.isfinite(logits).all()
    assert set(model.predict(frame)) <= set(frame["species"])


def test_pictures_are_shown_for_digits(tmp_path):
    settings = replace(QUICK, correct_labels=False)
    job = Job(Request(noise="symmetric:0.3", held_out="300"), settings, seeds=1, output=tmp_path / "digits")
    run(job)
    text = (job.output / "report.html").read_text()
    assert text.count('<figure><img alt="row ') == 24
    assert "rounds" not in text  # nothing is corrected here
    assert "judged rows with these weights" in text
    check_report(text, ["done", "accuracy", "auroc", "scores", "curves", "suspects", "cost", "settings"])


def test_interrupted_run_goes_on_to_the_same_labels(job, monkeypatch, brief_report):
    run(replace(job, output=job.output.with_name("whole")))
    original, calls = seed_module.clean_labels, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(seed_module, "clean_labels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(job)
    assert not job.output.exists()
    assert finished_seeds(job) == 1
    with pytest.raises(UserError, match="go on with --resume"):
        run(job)
    with pytest.raises(UserError, match=r"other settings \(steps\)"):
        run(replace(job, settings=replace(QUICK, steps=7), resume=True))
    run(replace(job, resume=True))
    assert len(calls) == 3  # the finished seed was not done again
    assert (job.output / "labels.csv").read_bytes() == (
        job.output.with_name("whole") / "labels.csv"
    ).read_bytes()


def test_resume_of_a_finished_run_gives_its_results(job, monkeypatch, brief_report):
    job = replace(job, seeds=1)
    summary = run(job)
    monkeypatch.setattr(job_module, "run_seed", None)
    assert run(replace(job, resume=True)) == summary


def test_resume_of_a_run_killed_at_once(job, brief_report):
    job = replace(job, seeds=1, resume=True)
    partial = job.output.with_name("out.partial")
    partial.mkdir()
    (partial / "settings.json.partial").write_text('{"made')
    run(job)
    assert {p.name for p in job.output.iterdir()} == FILES


def test_run_killed_between_the_two_moves_loses_nothing(job, brief_report):
    job = replace(job, seeds=1)
    run(job)
    job.output.rename(job.output.with_name("out.old"))
    run(job)
    assert {p.name for p in job.output.parent.iterdir()} == {"flowers.csv", "out"}


def test_failure_leaves_nothing_but_finished_seeds(job, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr(seed_module, "clean_labels", fails)
    with pytest.raises(RuntimeError):
        run(job)
    assert {p.name for p in job.output.parent.iterdir()} == {"flowers.csv"}


def test_other_settings_replace_results_only_when_asked(job, brief_report):
    job = replace(job, seeds=1)
    run(job)
    run(job)  # the same settings: the same results
    other = replace(job, settings=replace(QUICK, steps=4))
    with pytest.raises(UserError, match="--overwrite"):
        run(other)
    run(replace(other, overwrite=True))
    assert json.loads((job.output / "summary.json").read_text())["settings"]["steps"] == 4


def test_template_is_part_of_the_package():
    assert (Path(job_module.__file__).parent / "report.html.j2").exists()


def test_several_seeds_are_averaged_over_those_that_trained_on_the_row(job, brief_report):
    job = replace(job, seeds=3)
    run(job)
    labels = pd.read_csv(job.output / "labels.csv").set_index("row")
    doubted = labels["score"].gt(0.5) & labels["suggested"].ne(labels["given"])
    assert (labels["suspect"].eq("yes") == doubted).all()
    counts = labels["reason"].str.extract(r"of (\d) seeds")[0].astype(int)
    assert set(counts) <= {1, 2, 3}
    assert counts.max() == 3  # most rows are trusted by no seed


def test_stacked_sums_and_counts_by_row():
    results = [
        SeedResult(0, {"row": torch.tensor([0, 2]), "score": torch.tensor([1.0, 2.0])}, {}, None),
        SeedResult(1, {"row": torch.tensor([2, 3]), "score": torch.tensor([4.0, 8.0])}, {}, None),
    ]
    total, count = stacked(results, "score", 5)
    assert total.tolist() == [1, 0, 6, 8, 0]
    assert count.tolist() == [1, 0, 2, 1, 0]


def test_small_data_uses_one_thread_and_puts_it_back(job, brief_report, monkeypatch):
    seen = []
    original = seed_module.clean_labels

    def watched(*args, **kwargs):
        seen.append(torch.get_num_threads())
        return original(*args, **kwargs)

    monkeypatch.setattr(seed_module, "clean_labels", watched)
    torch.set_num_threads(2)
    run(replace(job, seeds=1))
    assert seen == [1]
    assert torch.get_num_threads() == 2
