"""Columns of image files: pixels against the arrays they were drawn from, sizes, colours, and every mistake in the input."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.applications.encoders import drawings
from tests.applications.tables import QUICK, brief
from weingarten import cli
from weingarten.applications.clean import Job, Request, UserError, load_model, run
from weingarten.applications.clean import job as job_module
from weingarten.applications.clean.data import split
from weingarten.applications.clean.images import Images
from weingarten.applications.clean.source import load


@pytest.fixture(autouse=True)
def quick():
    with brief():
        yield


def read(*paths):
    """Reader and pixels of a column."""
    column = pd.Series([str(path) for path in paths], name="file")
    reader = Images.fit(column, "t.csv")
    reader.inspect(column, "t.csv")
    return reader, reader.read(column)


def test_pixels_are_those_that_were_drawn(tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, size=(3, 4), dtype=np.uint8)
    colour = rng.integers(0, 256, size=(3, 4, 3), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(colour).save(tmp_path / "colour.png")
    reader, pixels = read(tmp_path / "grey.png")
    assert (reader.height, reader.width, reader.colour) == (3, 4, False)
    np.testing.assert_array_equal(pixels, grey.reshape(1, -1))
    reader, pixels = read(tmp_path / "grey.png", tmp_path / "colour.png")
    assert reader.colour
    np.testing.assert_array_equal(pixels[1], colour.reshape(-1))
    np.testing.assert_array_equal(pixels[0].reshape(3, 4, 3), grey[..., None].repeat(3, axis=2))
    np.testing.assert_array_equal(reader.picture(str(tmp_path / "colour.png")), colour)


def test_sizes_meet_at_the_smallest_and_large_ones_are_reduced(tmp_path):
    for name, size in {"a": (8, 6), "b": (4, 12), "c": (200, 300)}.items():
        Image.new("L", size, 90).save(tmp_path / f"{name}.png")
    reader, pixels = read(tmp_path / "a.png", tmp_path / "b.png")
    assert (reader.width, reader.height) == (4, 6)
    assert (pixels == 90).all()
    column = pd.Series([str(tmp_path / "c.png")], name="file")
    assert (Images.fit(column, "t").width, Images.fit(column, "t").height) == (64, 64)


def test_what_is_transparent_is_white_and_photographs_stand_upright(tmp_path):
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read(tmp_path / "clear.png")[1] == 255).all()
    turned, exif = Image.new("L", (5, 2)), Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    reader, _ = read(tmp_path / "turned.jpg")
    assert (reader.width, reader.height) == (2, 5)


@pytest.fixture
def job(tmp_path):
    drawings(tmp_path).to_csv(tmp_path / "t.csv", index=False)
    request = Request(str(tmp_path / "t.csv"), "side", images="file", noise="symmetric:0.2")
    return Job(request, QUICK, seeds=1, output=tmp_path / "out")


def test_run_on_images_shows_them_and_the_model_predicts(job, tmp_path, monkeypatch):
    summary = run(job)
    assert summary["counts"]["features"] == 35
    assert any("5 rows of 7 pixels, in grey" in note for note in summary["notes"])
    report = (job.output / "report.html").read_text()
    suspects = (pd.read_csv(job.output / "labels.csv")["suspect"] == "yes").sum()
    assert 0 < report.count('<figure><img alt="row ') <= suspects
    monkeypatch.chdir(tmp_path)  # paths are relative to the working directory now
    model, frame = load_model(job.output), drawings(tmp_path)
    assert model.logits(frame).shape == (40, 2)
    assert np.mean(np.array(model.predict(frame)) == frame["side"]) > 0.9


def test_pixels_share_one_scale_and_second_tables_lie_elsewhere(job, tmp_path):
    (tmp_path / "more").mkdir()
    drawings(tmp_path / "more", 20, seed=1, size=(14, 10), mode="RGB").to_csv(
        tmp_path / "more" / "v.csv", index=False
    )
    request = replace(job.request, noise=None, trusted=str(tmp_path / "more" / "v.csv"), held_out="0")
    source = load(request)
    assert any("20 of 20 images of v.csv had another size" in note for note in source.trusted.notes)
    parts = split(source, 0, 0)
    assert parts.trusted_x.shape == (20, 35)
    (column,) = parts.encoding.columns
    assert len(set(column.scale)) == 1
    raw = torch.from_numpy(source.readers["file"].read(source.train.features["file"])).float()
    torch.testing.assert_close(parts.x, (raw - raw.mean(0)) / raw.std(0, correction=0).mean())


def test_changed_pictures_are_other_data(job, tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "write_report", lambda folder, summary: None)
    run(job)
    Image.new("L", (7, 5), 3).save(tmp_path / "pictures" / "4.png")
    with pytest.raises(UserError, match="holds results of other settings"):
        run(job)


def bad_inputs():
    """(what is done to the pictures, arguments, what the message holds)"""

    def broken(folder):
        content = (folder / "3.png").read_bytes()
        (folder / "3.png").write_bytes(content[:-30])

    def missing_value(folder):
        frame = pd.read_csv("t.csv")
        frame.loc[6, "file"] = None
        frame.to_csv("t.csv", index=False)

    def numbers(folder):
        pd.read_csv("t.csv").assign(file=range(40)).to_csv("t.csv", index=False)

    def deep(folder):
        Image.fromarray(np.zeros((5, 7), dtype=np.float32)).save(folder / "2.tiff")
        frame = pd.read_csv("t.csv").replace("pictures/2.png", "pictures/2.tiff")
        frame.to_csv("t.csv", index=False)

    images = ["--images", "file"]
    return {
        "missing file": (lambda f: (f / "5.png").unlink(), images, "row 5 of t.csv: no such image: "),
        "no image": (lambda f: (f / "5.png").write_text("x"), images, "5.png is no readable image"),
        "broken image": (broken, images, "3.png is no readable image (image file is truncated"),
        "other pixels": (deep, images, "has pixels of mode F, expected 8 bits"),
        "missing value": (
            missing_value,
            images,
            "is empty or missing in 1 rows (6), expected paths of image",
        ),
        "numbers": (numbers, images, "--images: 'file' of t.csv holds int values"),
        "no column": (None, ["--images", "fil"], "--images: t.csv has no column 'fil'; did you mean 'file'?"),
        "label": (None, ["--images", "side"], "--images: 'side' is the column of --label too"),
        "unread": (None, [], "if they are images, read them with --images file"),
    }


@pytest.mark.parametrize("case", bad_inputs())
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, case):
    change, arguments, message = bad_inputs()[case]
    monkeypatch.chdir(tmp_path)
    drawings(tmp_path).to_csv("t.csv", index=False)
    if change:
        change(tmp_path / "pictures")
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(cli.app, ["clean", "t.csv", "--label", "side", "--output", "out", *arguments])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert message in line
    assert result.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before
