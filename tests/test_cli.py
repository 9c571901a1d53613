import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tests.applications.tables import brief, flowers
from weingarten import cli
from weingarten.applications.clean import job as job_module
from weingarten.applications.clean import seed as seed_module
from weingarten.bilevel import CheckpointError
from weingarten.solvers import DivergenceError

QUICK = ["--model", "linear", "--method", "identity", "--steps", "3", "--seeds", "1"]
KEYS = ["auroc", "accuracy", "accuracy_all", "accuracy_trusted", "accuracy_both", "accuracy_true", "seconds"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flowers().to_csv("t.csv", index=False)
    with brief():
        yield tmp_path


def weingarten(*arguments):
    return CliRunner().invoke(cli.app, ["clean", *arguments])


def write(name, frame):
    frame.to_csv(name, index=False)


def test_clean_prints_a_table_the_report_and_one_line_of_json(place):
    result = weingarten("t.csv", "--label", "species", "--noise", "pair:0.3", "--output", "out", *QUICK)
    assert result.exit_code == 0, result.output
    *_, report, line = result.stdout.strip().splitlines()
    assert "out/report.html" in report
    found = json.loads(line)
    assert list(found) == KEYS
    assert all(isinstance(value, float) for value in found.values())
    assert "the trusted part alone" in result.stdout
    assert (place / "out" / "report.html").exists()


def test_unknown_figures_are_null(place):
    result = weingarten("t.csv", "--label", "species", "--held-out", "0", *QUICK)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert [key for key in KEYS if found[key] is None] == KEYS[:-1]
    assert (place / "runs" / "clean" / "labels.csv").exists()


def bad_inputs():
    """(what is done first, arguments, what the message holds)"""
    frame = flowers()
    few = frame.iloc[:30]
    csv = ["t.csv", "--label", "species"]
    return {
        "no file": (None, ["nothing.csv", "--label", "x"], "TRAIN: no such file: nothing.csv"),
        "folder": (lambda: os.mkdir("d.csv"), ["d.csv", "--label", "x"], "TRAIN: d.csv is a folder"),
        "ending": (
            lambda: write("t.xlsx", frame),
            ["t.xlsx", "--label", "x"],
            "ends in '.xlsx', expected .csv or .parquet",
        ),
        "empty": (lambda: open("e.csv", "w").close(), ["e.csv", "--label", "x"], "e.csv is empty"),
        "no rows": (
            lambda: write("e.csv", frame.head(0)),
            ["e.csv", "--label", "species"],
            "e.csv has no rows",
        ),
        "no table": (
            lambda: write("t.parquet", frame),
            ["t.parquet", "--label", "x"],
            "no readable parquet table",
        ),
        "no label": (None, ["t.csv"], "--label: none given for t.csv"),
        "no column": (None, ["t.csv", "--label", "specis"], "no column 'specis'; did you mean 'species'?"),
        "no dropped column": (None, [*csv, "--drop", "id"], "--drop: t.csv has no column 'id'"),
        "NaN label": (
            lambda: write("n.csv", frame.assign(species=frame["species"].where(frame.index % 50 != 3))),
            ["n.csv", "--label", "species"],
            "NaN in 3 rows (3, 53, 103)",
        ),
        "one class": (
            lambda: write("o.csv", frame.assign(species="a")),
            ["o.csv", "--label", "species"],
            "one class only ('a')",
        ),
        "numbers": (None, ["t.csv", "--label", "width"], "expected classes"),
        "class missing": (
            lambda: write("v.csv", few[few["species"] != "rose"]),
            [*csv, "--trusted", "v.csv"],
            "--trusted: v.csv has no row of class 'rose'",
        ),
        "class missing from a split": (
            None,
            [*csv, "--trusted-size", "2"],
            "so a class would be missing; expected at least 3",
        ),
        "unknown class": (
            lambda: write("v.csv", few.replace("rose", "rosa")),
            [*csv, "--trusted", "v.csv"],
            "has the label 'rosa'",
        ),
        "trusted larger": (
            lambda: write("v.csv", flowers(200)),
            [*csv, "--trusted", "v.csv"],
            "200 rows and TRAIN 120, expected fewer",
        ),
        "trusted size larger": (
            None,
            [*csv, "--trusted-size", "200"],
            "200 trusted and 24 held-out rows are more than 120",
        ),
        "trusted twice": (
            lambda: write("v.csv", few),
            [*csv, "--trusted", "v.csv", "--trusted-size", "20"],
            "--trusted-size: found together with --trusted",
        ),
        "trusted lacks": (
            lambda: write("v.csv", few.drop(columns="width")),
            [*csv, "--trusted", "v.csv"],
            "--trusted: v.csv lacks 'width'",
        ),
        "trusted other kind": (
            lambda: write("v.csv", few.assign(width="wide")),
            [*csv, "--trusted", "v.csv"],
            "column 'width' of v.csv holds text",
        ),
        "text column": (
            lambda: write("x.csv", frame.assign(story=[f"once upon a time {i}" for i in range(120)])),
            ["x.csv", "--label", "species"],
            "'story' of x.csv holds text",
        ),
        "held out too much": (None, [*csv, "--held-out", "119"], "more than 120 rows of data can spare"),
        "method": (
            None,
            [*csv, "--method", "magic"],
            "--method: unknown method 'magic', expected one of identity",
        ),
        "model": (None, [*csv, "--model", "tree"], "--model: unknown model 'tree'"),
        "noise": (None, [*csv, "--noise", "pair"], "--noise: 'pair' has no number"),
        "damping": (None, [*csv, "--damping", "-1"], "--damping: found -1.0"),
        "steps": (None, [*csv, "--steps", "0"], "--steps: found 0"),
        "seconds": (None, [*csv, "--seconds", "nan"], "--seconds: found nan"),
        "seeds": (None, [*csv, "--seeds", "0"], "--seeds: found 0"),
        "label of digits": (
            None,
            ["digits", "--label", "x"],
            "--label and --drop: found with the built-in 'digits'",
        ),
    }


@pytest.mark.parametrize("case", bad_inputs())
def test_bad_input(place, case):
    prepare, arguments, message = bad_inputs()[case]
    if prepare:
        prepare()
    before = sorted(place.rglob("*"))
    result = weingarten("--output", "out", *arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert result.stdout == ""
    assert sorted(place.rglob("*")) == before


def test_output_that_is_not_ours_is_left_alone(place):
    (place / "out").mkdir()
    (place / "out" / "thesis.txt").write_text("years of work")
    result = weingarten("t.csv", "--label", "species", "--output", "out", "--overwrite", *QUICK)
    assert result.exit_code == 2
    assert "out exists and was not made by weingarten clean" in result.stderr
    assert [p.name for p in (place / "out").iterdir()] == ["thesis.txt"]
    result = weingarten("t.csv", "--label", "species", "--output", "t.csv", *QUICK)
    assert "t.csv is a file" in result.stderr
    assert result.exit_code == 2


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_what_may_not_be_read_or_written(place, monkeypatch):
    def denied(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.open", denied)
        result = weingarten("t.csv", "--label", "species", "--output", "out", *QUICK)
    assert result.exit_code == 2
    assert "t.csv may not be read; change its permissions" in result.stderr
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    result = weingarten("t.csv", "--label", "species", "--output", "a/b", *QUICK)
    assert result.exit_code == 2
    assert "may not be written to" in result.stderr
    assert not (place / "a").exists()


def test_interrupt_says_how_to_go_on(place, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    arguments = ["t.csv", "--label", "species", "--output", "my out", *QUICK]
    monkeypatch.setattr(sys, "argv", ["weingarten", "clean", *arguments])
    with monkeypatch.context() as patch:
        patch.setattr(seed_module, "compete", interrupted)
        result = weingarten(*arguments)
    assert result.exit_code == 130
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("interrupted: 0 of 1 seeds finished and saved; go on with: weingarten clean t.csv")
    assert "'my out'" in line
    assert line.endswith("--resume")
    assert not (place / "my out").exists()
    assert weingarten(*arguments, "--resume").exit_code == 0


def test_version_and_help():
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("weingarten ")
    help_text = CliRunner().invoke(cli.app, ["clean", "--help"]).stdout
    assert "--noise" in help_text


@pytest.mark.parametrize("name", ["typer", "sklearn"])
def test_missing_extra_is_named(name):
    code = f"import sys; sys.modules[{name!r}] = None; import weingarten.cli"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    line, *others = result.stderr.strip().splitlines()
    assert others == []
    assert line.startswith(f"error: the command line needs {name!r}")
    assert "pip install 'weingarten[cli,data,plots]'" in line


@pytest.mark.parametrize("error", [CheckpointError, DivergenceError])
def test_what_learning_raises_is_one_line(place, monkeypatch, error):
    def fails(*args, **kwargs):
        raise error("it went\nwrong")

    monkeypatch.setattr(seed_module, "clean_labels", fails)
    result = weingarten("t.csv", "--label", "species", "--output", "out", *QUICK)
    assert result.exit_code == 1
    assert result.stderr.strip().splitlines()[-1] == "error: it went wrong"
    assert {p.name for p in place.iterdir()} == {"t.csv"}


def test_full_disk_is_one_line(place, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job_module, "write_report", fails)
    result = weingarten("t.csv", "--label", "species", "--output", "out", *QUICK)
    assert result.exit_code == 1
    assert "No space left on device; what was finished is kept, go on with: weingarten" in result.stderr
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert weingarten("t.csv", "--label", "species", "--output", "out", "--resume", *QUICK).exit_code == 0
