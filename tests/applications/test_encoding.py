"""How numeric columns and vectors are scaled."""

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_digits

from weingarten.applications.clean.encoding import Encoding
from weingarten.applications.clean.reader import Reader


def scales(frame):
    return {column.name: column.scale for column in Encoding.fit(frame).columns}


def test_columns_of_one_unit_share_their_mean_scale_and_others_keep_their_own():
    pixels = pd.DataFrame(load_digits().data).rename(columns=str)
    varying = [name for name in pixels if pixels[name].nunique() > 1]
    found = scales(pixels.assign(age=np.linspace(1, 90, len(pixels))))
    assert len({found[name] for name in varying}) == 1
    assert found[varying[0]] == pytest.approx(pixels[varying].std(ddof=0).mean())
    assert found["age"] == pytest.approx(np.linspace(1, 90, len(pixels)).std())
    encoded = Encoding.fit(pixels).apply(pixels)
    assert encoded.abs().max() < 5  # a rarely lit border pixel alone would be at 42 standard deviations


def test_columns_of_different_ranges_or_few_columns_are_scaled_one_by_one():
    rng = np.random.default_rng(0)
    different = pd.DataFrame({f"c{i}": rng.normal(size=50) for i in range(20)})
    few = pd.DataFrame(load_digits().data[:, 18:24])
    for frame in (different, few):
        assert list(scales(frame).values()) == pytest.approx(list(frame.std(ddof=0)))
    zero = pd.DataFrame({f"c{i}": np.r_[0.0, rng.exponential(10.0**i, size=50)] for i in range(20)})
    assert list(scales(zero).values()) == pytest.approx(list(zero.std(ddof=0)))


class Fixed(Reader):
    """Gives the vectors it was made with."""

    one_unit = False

    def __init__(self, vectors):
        self.vectors = vectors

    def inspect(self, column, file):
        return []

    def prepare(self, cache, progress):
        pass

    def read(self, column):
        return self.vectors

    def picture(self, value):
        return None

    def digest(self):
        return ""

    def to_json(self):
        return {}


def test_dead_units_of_an_encoder_are_not_blown_up():
    """One at 1e-9 and one at 1e-33, as MiniLM has them; what varies a thousand times less than the rest still counts."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 4)) * [1.0, 1e-3, 1e-9, 1e-33]
    frame = pd.DataFrame({"text": ["a"] * 50})
    encoded = Encoding.fit(frame, {"text": Fixed(vectors)}).apply(frame)
    assert encoded[:, :2].std(0, correction=0).tolist() == pytest.approx([1.0, 1.0], rel=1e-4)
    assert encoded[:, 2:].abs().max() < 1e-8
    constant = Encoding.fit(frame, {"text": Fixed(np.ones((50, 4)))}).apply(frame)
    assert not constant.any()
