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


def test_clean_images(tmp_path):
    pytest.importorskip("matplotlib")
    before, after, ranking = main_of("clean_images.py")(tmp_path / "figure.png", steps=12)
    assert after > before  # half of the labels are wrong
    assert ranking > 0.85  # 0.5 by chance
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_long_tail(tmp_path):
    pytest.importorskip("matplotlib")
    before, after = main_of("long_tail.py")(tmp_path / "figure.png", steps=12)
    assert after > before + 0.02
    assert (tmp_path / "figure.png").stat().st_size > 0
