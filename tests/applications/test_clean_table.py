import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from tests.applications.tables import flowers
from weingarten.applications.clean.classifier import FORMAT, Classifier, load_model
from weingarten.applications.clean.data import split, stratified
from weingarten.applications.clean.encoding import Encoding
from weingarten.applications.clean.errors import UserError
from weingarten.applications.clean.network import build_network, describe_network, network_from
from weingarten.applications.clean.source import Request, load
from weingarten.applications.clean.table import matched, read_table


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "flowers.csv"
    flowers().to_csv(path, index=False)
    return path


def test_csv_and_parquet_read_alike(csv, tmp_path):
    flowers().to_parquet(tmp_path / "flowers.parquet")
    a, b = (read_table(str(p), "TRAIN", "species") for p in (csv, tmp_path / "flowers.parquet"))
    assert list(a.features) == list(b.features) == ["length", "width", "count", "colour", "wild"]
    assert (a.labels == b.labels).all()
    torch.testing.assert_close(
        Encoding.fit(a.features).apply(a.features), Encoding.fit(b.features).apply(b.features)
    )
    assert any("length: 2 missing" in note for note in a.notes)
    assert any("colour: 1 missing" in note for note in a.notes)


def test_encoding_is_scikit_learns(csv):
    features = read_table(str(csv), "TRAIN", "species").features
    encoded = Encoding.fit(features).apply(features).numpy()
    length = features["length"].fillna(features["length"].median())
    np.testing.assert_allclose(
        encoded[:, 0], StandardScaler().fit_transform(length.to_frame())[:, 0], atol=1e-6
    )
    colour = OneHotEncoder().fit_transform(features[["colour"]].fillna("(missing)")).toarray()
    np.testing.assert_array_equal(encoded[:, 3:7], colour)
    assert encoded.shape == (120, 8)


def test_encoding_survives_json_and_new_values(csv):
    features = read_table(str(csv), "TRAIN", "species").features
    encoding = Encoding.fit(features)
    assert Encoding.from_json(encoding.to_json()) == encoding
    new = features.head(1).assign(colour="violet", length=np.nan)
    row = encoding.apply(new)[0]
    assert row[3:7].tolist() == [0, 0, 0, 0]
    assert torch.isfinite(row).all()
    with pytest.raises(ValueError, match=r"lacks the columns \['width'\]"):
        encoding.apply(features.drop(columns="width"))


def test_column_missing_in_every_training_row_is_constant():
    encoding = Encoding.fit(pd.DataFrame({"x": [np.nan, np.nan]}))
    assert encoding.apply(pd.DataFrame({"x": [np.nan, 0.0]})).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            [f"scan_{i}.png" for i in range(40)],
            "'x'.*file paths.*--images x.*--drop x",
        ),
        (
            [f"the flower {i} is nice" for i in range(40)],
            "'x'.*holds text.*--text x --encoder FOLDER.*--drop x",
        ),
        ([f"id{i}" for i in range(40)], "'x'.*40 different values in 40 rows.*--drop x"),
        (pd.date_range("2020-01-01", periods=40), "'x'.*holds dates"),
        ([[1, 2]] * 40, "'x'.*holds (list|ndarray) values"),
        ([None] * 40, "'x'.*is empty"),
        ([np.inf, *range(39)], "'x'.*has 1 infinite values"),
    ],
)
def test_unusable_column_is_refused_by_name(tmp_path, values, message):
    path = tmp_path / "t.parquet"
    pd.DataFrame({"x": values, "z": range(40), "label": [0, 1] * 20}).to_parquet(path)
    with pytest.raises(UserError, match=message):
        read_table(str(path), "TRAIN", "label")
    assert list(read_table(str(path), "TRAIN", "label", ["x"]).features) == ["z"]


def test_identifier_is_remarked_upon(tmp_path):
    pd.DataFrame({"id": range(40), "z": np.arange(40) % 7, "label": [0, 1] * 20}).to_csv(
        tmp_path / "t.csv", index=False
    )
    (note,) = read_table(str(tmp_path / "t.csv"), "TRAIN", "label").notes
    assert "--drop id" in note


def test_classes_are_ordered_by_value(tmp_path):
    pd.DataFrame({"z": np.arange(40) % 7, "label": [9.0, 10.0] * 20}).to_csv(tmp_path / "t.csv", index=False)
    source = load(Request(str(tmp_path / "t.csv"), "label"))
    assert source.classes == ["9", "10"]


def test_second_table_is_put_in_order(csv, tmp_path):
    table = read_table(str(csv), "TRAIN", "species")
    frame = flowers(30, seed=1)[["species", "wild", "colour", "count", "width", "length"]].assign(
        more=range(30)
    )
    frame.to_csv(tmp_path / "trusted.csv", index=False)
    other = matched(read_table(str(tmp_path / "trusted.csv"), "--trusted", "species"), table, "--trusted")
    assert list(other.features) == list(table.features)
    assert any("more" in note for note in other.notes)


def test_stratified_draws_every_class():
    y = np.array([0] * 95 + [1] * 4 + [2])
    drawn, others = stratified(y, np.arange(100), 10, np.random.default_rng(0))
    assert np.bincount(y[drawn]).tolist() == [8, 1, 1]
    assert sorted([*drawn, *others]) == list(range(100))


def test_parts_do_not_overlap_and_follow_the_seeds(csv):
    source = load(Request(str(csv), "species"))
    first, again, other = split(source, 0, 0), split(source, 0, 0), split(source, 1, 0)
    assert len(first.rows) + len(first.trusted_y) + len(first.held_y) == 120
    assert torch.equal(first.rows, again.rows)
    assert not torch.equal(first.rows, other.rows)
    assert torch.equal(first.held_y, other.held_y)  # held out by the base seed
    assert first.truth is None
    noisy = split(load(Request(str(csv), "species", noise="pair:0.3")), 1, 0)
    assert noisy.truth is not None
    assert int((noisy.truth != noisy.given).sum()) == round(0.3 * len(noisy.given))


def test_trusted_file_lends_its_rows_to_measuring(csv, tmp_path):
    flowers(30, seed=1).to_csv(tmp_path / "trusted.csv", index=False)
    flowers(9, seed=2).to_csv(tmp_path / "held.csv", index=False)
    request = Request(str(csv), "species", trusted=str(tmp_path / "trusted.csv"))
    parts = split(load(request), 0, 0)
    assert [len(parts.given), len(parts.trusted_y), len(parts.held_y)] == [120, 20, 10]
    parts = split(load(Request(**{**vars(request), "held_out": str(tmp_path / "held.csv")})), 0, 0)
    assert [len(parts.given), len(parts.trusted_y), len(parts.held_y)] == [120, 30, 9]
    parts = split(load(Request(**{**vars(request), "noise": "pair:0.3"})), 0, 0)
    assert [len(parts.given), len(parts.trusted_y), len(parts.held_y)] == [96, 30, 24]


@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_network_is_described_and_saved(tmp_path, model):
    features = flowers().drop(columns="species")
    encoding = Encoding.fit(features)
    network = build_network(model, encoding.width, 5, 3, seed=1)
    assert describe_network(network_from(describe_network(network))) == describe_network(network)
    saved = Classifier(network, encoding, ["a", "b", "c"])
    saved.save(tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(loaded.logits(features), saved.logits(features))
    assert loaded.predict(features) == saved.predict(features)
    assert set(loaded.predict(features)) <= {"a", "b", "c"}


def test_strange_layer_is_refused_by_name():
    with pytest.raises(TypeError, match="BatchNorm1d"):
        describe_network(torch.nn.Sequential(torch.nn.BatchNorm1d(3)))


def test_model_of_another_format_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match=f"format 99, expected {FORMAT}"):
        load_model(tmp_path)
