"""Cleaning texts with the encoder on a GPU, where there is one."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch

from tests.applications.encoders import questions
from tests.applications.tables import QUICK, brief
from weingarten.applications.clean import load_model, run
from weingarten.applications.clean.encoder import Encoder
from weingarten.applications.clean.finetune import run as run_module

pytest.importorskip("transformers")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)


def test_vectors_are_those_of_the_cpu(encoder):
    texts = questions(100)["question"].tolist()
    here, there = (Encoder.load(encoder, device=device).encode(texts) for device in ("cpu", "auto"))
    assert Encoder.load(encoder, device="auto").device.type == "cuda"
    assert abs(here - there).max() < 1e-5


def test_trained_encoder_is_used_on_the_cpu_afterwards(job, brief_report, monkeypatch):
    """And the GPU's global generator is not touched."""
    monkeypatch.setattr(run_module, "SEEN", 60)
    job = replace(
        job,
        settings=replace(QUICK, layers="all"),
        request=replace(job.request, device="cuda"),
        output=job.output,
    )
    before = torch.cuda.get_rng_state()
    with brief():
        found = run(job)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert found["accuracy"]["cleaned"]["mean"] > 0.5
    model = load_model(job.output)
    assert next(model.encoding.columns[0].reader.encoder.model.parameters()).device.type == "cpu"
    labels = pd.read_csv(job.output / "labels.csv")
    table = questions().iloc[labels["row"]]
    given = pd.Series(model.predict(table))
    assert (given == labels["suggested"]).mean() > 0.98
