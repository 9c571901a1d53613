"""Symo under Lightning's trainer: checkpoints, accumulation, clipping and precision are those of a plain loop."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weingarten as wg
from tests.optim import two_ranks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("pytorch_lightning")

pytestmark = pytest.mark.filterwarnings("ignore:::pytorch_lightning", "ignore:::lightning_fabric")
X, Y = (a.float() for a in two_ranks.data())
CLIP = 0.05


def batches() -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=4)


def symo(model: nn.Module) -> wg.Symo:
    return wg.Symo(model, 0.02, example_inputs=X[:2], refresh=3)


class Fit(lightning.LightningModule):
    """Two batches of four an epoch, a rate that falls every step; remembers the dtype that the network computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.net = two_ranks.build().float()
        self.computed: set[torch.dtype] = set()

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        out = self.net(batch[0])
        self.computed.add(out.dtype)
        return (out.float() - batch[1]).square().mean()

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = symo(self.net)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(epochs: int, ckpt_path: Path | None = None, **settings: Any) -> Fit:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "accelerator": "cpu",
    }
    module = Fit()
    trainer = lightning.Trainer(max_epochs=epochs, **{"enable_checkpointing": False, **quiet, **settings})
    trainer.fit(module, batches(), ckpt_path=ckpt_path)
    return module


def plain(epochs: int, accumulate: int = 1, clip: float | None = None) -> nn.Module:
    model = two_ranks.build().float()
    optimizer = symo(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    for _ in range(epochs):
        for number, (x, y) in enumerate(batches()):
            ((model(x) - y).square().mean() / accumulate).backward()
            if (number + 1) % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    return model


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"accumulate": 2}, {"accumulate_grad_batches": 2}),
        ({"clip": CLIP}, {"gradient_clip_val": CLIP}),
    ],
)
def test_a_fit_is_the_plain_loop(ours, theirs):
    found = fit(3, **theirs)
    assert equal(found.net, plain(3, **ours))
    assert not equal(found.net, plain(3)) or not ours  # the setting does something


def test_a_fit_resumed_from_its_checkpoint_is_the_same_bit_for_bit(tmp_path):
    every = lightning.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole = fit(5, callbacks=[every], enable_checkpointing=True)
    saved = tmp_path / "epoch=1.ckpt"
    assert torch.load(saved, weights_only=True)["optimizer_states"]
    assert equal(fit(5, ckpt_path=saved).net, whole.net)


def test_mixed_precision_computes_in_bfloat16_and_steps_in_float32():
    assert fit(1).computed == {torch.float32}
    mixed = fit(3, precision="bf16-mixed")
    assert mixed.computed == {torch.bfloat16}
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    start, full = two_ranks.build().float(), plain(3)
    for p, q, s in zip(mixed.parameters(), full.parameters(), start.parameters(), strict=True):
        moved = (q - s).detach()
        assert float((p - q).detach().norm()) < 0.2 * float(
            moved.norm()
        )  # single entries may change their sign


def test_bfloat16_parameters_keep_float32_state_over_a_checkpoint(tmp_path):
    every = lightning.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    settings = {"precision": "bf16-true", "callbacks": [every], "enable_checkpointing": True}
    whole = fit(5, **settings)
    assert {p.dtype for p in whole.parameters()} == {torch.bfloat16}
    again = fit(5, ckpt_path=tmp_path / "epoch=1.ckpt", precision="bf16-true")
    assert equal(again.net, whole.net)
    state = again.trainer.optimizers[0].state_dict()["state"]
    assert {v.dtype for entry in state.values() for v in entry.values() if isinstance(v, Tensor)} == {
        torch.float32
    }
