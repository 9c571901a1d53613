"""Small tables and settings for the tests of `clean`."""

from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch

from weingarten.applications.clean import Settings, rivals

QUICK = Settings(model="linear", method="identity", steps=3)


def flowers(rows=120, seed=0):
    """Three separable classes with numeric, categorical and incomplete columns."""
    rng = np.random.default_rng(seed)
    y = np.arange(rows) % 3
    frame = pd.DataFrame(
        {
            "length": y * 2.0 + rng.normal(size=rows),
            "width": -y + rng.normal(size=rows) * 0.5,
            "count": rng.integers(0, 9, size=rows),
            "colour": np.array(["red", "green", "blue"])[(y + (rng.random(rows) < 0.2)) % 3],
            "wild": rng.random(rows) < 0.5,
            "species": np.array(["setosa", "iris", "rose"])[y],
        }
    )
    frame.loc[[3, 7], "length"] = np.nan
    frame.loc[[5], "colour"] = None
    return frame


@contextmanager
def brief():
    """Rivals that train for a moment on one thread: for tests of everything around them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with patch.object(rivals, "TRAININGS", [replace(t, steps=5) for t in rivals.TRAININGS[::3]]):
        yield
    torch.set_num_threads(threads)
