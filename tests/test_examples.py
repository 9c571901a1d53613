"""The examples run, and learn."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def main_of(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / name))["main"]


def test_natural_gradient(capsys):
    assert main_of("natural_gradient.py")() < 0.05  # gradient descent with momentum at its best rate: 0.08
    assert "step   0" in capsys.readouterr().out


def test_plain_loop(capsys):
    assert main_of("symo_loop.py")(epochs=2) > 0.7  # ten classes
    assert "0.weight" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_trainer_of_hugging_face():
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    first, last = main_of("symo_trainer.py")(steps=30)
    assert last < 0.8 * first


@pytest.mark.filterwarnings("ignore:::pytorch_lightning", "ignore:::lightning_fabric")
def test_trainer_of_lightning(capsys):
    pytest.importorskip("pytorch_lightning")
    assert main_of("symo_lightning.py")(epochs=2) > 0.7  # ten classes
    assert "0.weight" in capsys.readouterr().out


def test_robustness(tmp_path, capsys):
    path = tmp_path / "robustness.png"
    assert (
        main_of("robustness.py")(path, steps=12) > 0.02
    )  # of 950 test digits, 19 more than random changes cost
    assert path.stat().st_size > 0
    assert "learned weights" in capsys.readouterr().out
