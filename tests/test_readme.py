"""The README says what is true: its code runs, its files exist, its table names what is exported."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import weingarten as wg

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_code_runs_and_finds_wrong_labels(capsys: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = datasets.load_digits(return_X_y=True)
    names = {
        "torch": torch,
        "wg": wg,
        "replace": replace,
        "partial": partial,
        "pixels": pixels,
        "labels": labels,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for code in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
            exec(code, names)
    found = re.search(r"(\d+)% of the 100 most suspect labels are wrong", capsys.readouterr().out)
    assert found is not None
    assert int(found[1]) >= 85  # 40 of 100 by chance


def test_library_example_is_short() -> None:
    first = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert first is not None
    assert sum(bool(line.strip()) for line in first[1].splitlines()) <= 15


def test_table_names_what_is_exported() -> None:
    table = README[README.index("## What exists") :]
    cells = re.findall(r"^\| (.*?) \|", table, flags=re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert len(named) >= 15
    assert named <= set(wg.__all__)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"])
def test_links_to_files_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith(("http", "mailto"))]
    assert all(((ROOT / page).parent / link).exists() for link in links), links
