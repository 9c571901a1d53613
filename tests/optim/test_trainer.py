"""Symo under Hugging Face's Trainer: a run resumed from its checkpoint, with the files the trainer itself writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import weingarten as wg
from tests.optim import two_ranks

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

X, Y = (a.float() for a in two_ranks.data())


class Fit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = two_ranks.build().float()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.net(x)
        return {"loss": (out - labels).square().mean(), "logits": out}


def run(folder: Path, resume: Path | None = None) -> nn.Module:
    model = Fit()
    optimizer = wg.Symo(model.net, 0.02, example_inputs=X[:2], refresh=3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    arguments = transformers.TrainingArguments(
        folder, max_steps=6, save_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=2,
        max_grad_norm=0.1, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    data = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_run_resumed_from_its_checkpoint_is_the_same_bit_for_bit(tmp_path):
    whole = run(tmp_path / "whole")
    saved = tmp_path / "whole" / "checkpoint-3"
    assert torch.load(saved / "optimizer.pt", weights_only=True)["state"]
    again = run(tmp_path / "again", saved)
    start = Fit()
    for p, q, s in zip(whole.parameters(), again.parameters(), start.parameters(), strict=True):
        assert torch.equal(p, q)
        assert not torch.equal(p, s)
