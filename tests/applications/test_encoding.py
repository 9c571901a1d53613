"""How numeric columns are scaled."""

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_digits

from weingarten.applications.clean.encoding import Encoding


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
