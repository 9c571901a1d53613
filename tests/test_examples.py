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


def test_weight_decays(tmp_path):
    contrast, right, loss = main_of("weight_decays.py")(str(tmp_path / "figure.png"), steps=20)
    assert contrast > 0.3  # noise decays more than pixels; both start alike
    assert right > 0.4  # from 0.3 towards 1.5
    assert loss < 1.8  # with the rates of the start: 2.0
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_auxiliary_task(tmp_path):
    right, (opening, company, random) = main_of("auxiliary_task.py")(str(tmp_path / "figure.png"), steps=100)
    assert right > 0.7  # without auxiliary rows: 0.63
    assert company > 10 * max(opening, random)


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


def test_few_shot(tmp_path, capsys):
    pytest.importorskip("sklearn")
    error, gain = main_of("few_shot.py")(str(tmp_path / "few_shot.png"), steps=20)
    assert error < 0.9  # of what a random start makes of new sines
    assert gain > 0  # accuracy on new classes of digits
    assert (tmp_path / "few_shot.png").stat().st_size > 10_000
    assert "accuracy on new classes" in capsys.readouterr().out


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


def test_robustness(tmp_path, capsys):
    path = tmp_path / "robustness.png"
    assert (
        main_of("robustness.py")(path, steps=12) > 0.02
    )  # of 950 test digits, 19 more than random changes cost
    assert path.stat().st_size > 0
    assert "learned weights" in capsys.readouterr().out
