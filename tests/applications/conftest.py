"""Fixtures of several test modules of this folder."""

from __future__ import annotations

import pytest

from tests.applications.encoders import make_encoder, questions
from tests.applications.tables import QUICK
from weingarten.applications.clean import Job, Request
from weingarten.applications.clean import job as job_module


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """The folder of a tiny encoder."""
    pytest.importorskip("transformers")
    return make_encoder(tmp_path_factory.mktemp("encoders") / "tiny")


@pytest.fixture
def job(tmp_path, encoder):
    """Questions to clean."""
    questions().to_csv(tmp_path / "q.csv", index=False)
    request = Request(str(tmp_path / "q.csv"), "kind", text="question", encoder=str(encoder))
    return Job(request, QUICK, seeds=1, output=tmp_path / "out")


@pytest.fixture
def brief_report(monkeypatch):
    """For tests of the folder: figures take a second."""

    def write(folder, summary):
        (folder / "report.html").write_text("")
        (folder / "overview.png").write_text("")

    monkeypatch.setattr(job_module, "write_report", write)
