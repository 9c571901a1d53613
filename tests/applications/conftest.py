"""Fixtures of several test modules of this folder."""

from __future__ import annotations

import pytest

from weingarten.applications.clean import job as job_module


@pytest.fixture
def brief_report(monkeypatch):
    """For tests of the folder: figures take a second."""

    def write(folder, summary):
        (folder / "report.html").write_text("")
        (folder / "overview.png").write_text("")

    monkeypatch.setattr(job_module, "write_report", write)
