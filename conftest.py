"""One thread per test process, and three warnings of torch's own left out."""

from __future__ import annotations

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Applies to every test and doctest, wherever it lies."""
    torch.set_num_threads(1)
    # forward-mode AD scripts its decompositions on first use; the warning is torch's own business
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    # once per process, for an even kernel with padding="same", which the cases hold on purpose
    config.addinivalue_line(
        "filterwarnings", "ignore:Using padding='same' with even kernel lengths:UserWarning"
    )
    # where the first product on a GPU is one of a backward pass, which has a thread of its own
    config.addinivalue_line(
        "filterwarnings", "ignore:Attempting to run cuBLAS, but there was no current CUDA context:UserWarning"
    )
