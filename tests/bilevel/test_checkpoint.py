from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

import weingarten as wg
from tests.bilevel.runs import ADAM, METHODS, ROWS, SGD, XV, YV, X, Y, equal, run
from weingarten.bilevel import Callback, checkpoint

ROOT = Path(__file__).resolve().parents[2]
STEPS = 7


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Stop(Exception):
    pass


def fail_at(step) -> Callback:
    def callback(event):
        if event.step == step:
            raise Stop

    return callback


OPTIMIZERS = dict.fromkeys(METHODS, ADAM) | {"warm-start": SGD, "f2sa": SGD, "identity": SGD}


@pytest.mark.parametrize("name", list(METHODS))
def test_resumed_equals_uninterrupted_bit_for_bit_wherever_it_stopped(name, tmp_path):
    options = {"inner_optimizer": OPTIMIZERS[name]}
    whole = run(METHODS[name], **options)
    for step in range(1, STEPS):
        file = tmp_path / f"{step}.pt"
        with pytest.raises(Stop):  # a crash after the step, so that the checkpoint is that of the step before
            run(METHODS[name], checkpoint=file, checkpoint_every=1, callbacks=[fail_at(step)], **options)
        stopped = run(METHODS[name], checkpoint=file, callbacks=[lambda e, s=step: e.step == s], **options)
        assert stopped.step == step
        resumed = run(METHODS[name], checkpoint=file, **options)
        assert resumed.completed
        assert equal(resumed, whole)
        assert equal(run(METHODS[name], checkpoint=file, **options), whole)  # nothing is left to do


def test_resumed_many_times_with_checkpoints_in_between(tmp_path):
    file = tmp_path / "folder" / "run.pt"
    for step in (2, 3, 5):
        run(
            METHODS["kept-factors"],
            checkpoint=file,
            checkpoint_every=2,
            callbacks=[lambda e, s=step: e.step == s],
        )
    assert equal(run(METHODS["kept-factors"], checkpoint=file), run(METHODS["kept-factors"]))
    assert os.listdir(file.parent) == ["run.pt"]


def test_resume_works_with_an_optimizer_that_keeps_lists(tmp_path):
    file, lbfgs = tmp_path / "run.pt", partial(torch.optim.LBFGS, lr=0.1, max_iter=3)
    run(METHODS["identity"], inner_optimizer=lbfgs, checkpoint=file, callbacks=[lambda e: e.step == 3])
    resumed = run(METHODS["identity"], inner_optimizer=lbfgs, checkpoint=file)
    assert equal(resumed, run(METHODS["identity"], inner_optimizer=lbfgs))


@pytest.mark.parametrize(
    "source",
    [
        wg.FromDataset(TensorDataset(X, Y), 6),
        wg.Batch(X[2:9], Y[2:9], rows=torch.arange(2, 9)),
        (X, Y),
        wg.Rows(X, Y, 6, weights=torch.rand(ROWS)),
    ],
    ids=["dataset", "batch", "tuple", "weighted"],
)
def test_resume_works_with_every_kind_of_source(source, tmp_path):
    file, options = tmp_path / "run.pt", {"inner_data": source, "curvature_data": None, "steps": 4}
    whole = run(METHODS["kept-factors"], **options)
    run(METHODS["kept-factors"], checkpoint=file, callbacks=[lambda event: event.step == 2], **options)
    assert equal(run(METHODS["kept-factors"], checkpoint=file, **options), whole)


@pytest.fixture
def saved(tmp_path):
    file = tmp_path / "run.pt"
    run(METHODS["kept-factors"], checkpoint=file, callbacks=[lambda event: event.step == 2])
    return file


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 8}, "steps: found 7, expected 8"),
        ({"seed": 4}, "seed: found 3, expected 4"),
        ({"inner_steps": 3}, "inner_steps: found 2, expected 3"),
        ({"inner_optimizer": SGD}, "inner optimizer: found Adam .* expected SGD"),
        (
            {"outer_optimizer": partial(torch.optim.Adam, lr=0.5)},
            "outer optimizer: found .*0.02.*expected .*0.5",
        ),
        ({"hparams": {"w": torch.zeros(12), "log_c": torch.zeros(())}}, r"hparams: found w \(12,\) float64"),
        (
            {"method": wg.make_method("kfac-length", refresh=2)},
            "hypergradient: found .*refresh=3.* expected .*refresh=2",
        ),
        ({"inner_data": wg.Rows(XV, YV, 4)}, "inner data: found Rows.*expected Rows"),
        ({"curvature_data": None}, "curvature data: found .*expected None"),
        ({"project": None}, "project: found .*Box"),
        ({"dropout": 0.1}, "inner model: found .*p=0.3.* expected .*p=0.1"),
    ],
)
def test_other_settings_are_refused(saved, options, match):
    options = {"method": METHODS["kept-factors"]} | options
    with pytest.raises(
        wg.CheckpointError, match=r"(?s)run.pt belongs to a run with other settings .*" + match
    ):
        run(options.pop("method"), checkpoint=saved, **options)
    assert run(METHODS["kept-factors"], checkpoint=saved).completed  # the file is as it was


def test_without_resume_the_run_starts_anew(saved):
    seen = []
    run(METHODS["kept-factors"], checkpoint=saved, resume=False, callbacks=[lambda e: seen.append(e.step)])
    assert seen == list(range(1, STEPS + 1))


def test_broken_files_give_one_error_that_names_the_file(saved, tmp_path):
    whole = saved.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:size])
        with pytest.raises(wg.CheckpointError, match=r"run.pt: found no whole checkpoint") as error:
            run(METHODS["kept-factors"], checkpoint=saved)
        assert "\n" not in str(error.value)
    saved.write_text("text")
    with pytest.raises(wg.CheckpointError, match=r"run.pt: found no whole checkpoint"):
        run(METHODS["kept-factors"], checkpoint=saved)
    torch.save({"weights": torch.ones(2)}, saved)
    with pytest.raises(wg.CheckpointError, match=r"run.pt: found no whole checkpoint \(KeyError\)"):
        run(METHODS["kept-factors"], checkpoint=saved)
    torch.save({"format": 99, "settings": {}, "content": {}}, saved)
    with pytest.raises(wg.CheckpointError, match=rf"run.pt: found format 99, expected {checkpoint.FORMAT};"):
        run(METHODS["kept-factors"], checkpoint=saved)


def test_files_hold_tensors_and_plain_containers_only(saved):
    found = torch.load(saved, weights_only=True)
    assert found["content"]["state"]["fields"]["inverse"] is None
    assert found["content"]["state"]["fields"]["anchor"]["fields"]["batch"]["fields"]["rows"].shape == (10,)


def test_a_write_that_fails_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def full(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        run(METHODS["kept-factors"], checkpoint=saved, checkpoint_every=1)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert equal(run(METHODS["kept-factors"], checkpoint=saved), run(METHODS["kept-factors"]))
    assert os.listdir(saved.parent) == ["run.pt"]


@dataclass(frozen=True)
class WithState(wg.HypergradientMethod):
    """A method of a user's own."""

    initial: object

    def __call__(self, problem, params, hparams, batches, state=None, generator=None):
        found = wg.make_method("identity")(problem, params, hparams, batches)
        return replace(found, state=self.initial if state is None else state)


def test_state_of_other_methods(tmp_path):
    plain = WithState({"count": 1, "parts": (torch.ones(2), [None, "text"], 0.5)})
    file = tmp_path / "run.pt"
    run(plain, checkpoint=file, callbacks=[lambda event: event.step == 2])
    states = []
    run(plain, checkpoint=file, callbacks=[lambda event: states.append(event.hypergradient.state)])
    assert repr(states[0]) == repr(plain.initial)
    with pytest.raises(TypeError, match="the method's state holds a object, expected tensors"):
        run(WithState(object()), checkpoint=tmp_path / "other.pt")


def test_views_do_not_take_their_whole_storage_along():
    assert checkpoint.encode(torch.zeros(1000)[:2]).untyped_storage().nbytes() == 8


def test_descriptions_are_the_same_in_every_process():
    class Penalty:
        pass

    for value in (
        lambda x: x,
        partial(torch.optim.Adam, lr=1),
        Penalty(),
        wg.Implicit(),
        torch.nn.Linear(2, 3),
    ):
        assert "0x" not in checkpoint.describe(value)


INTERRUPTED = """
import sys, torch
torch.set_num_threads(1)
from tests.bilevel.runs import METHODS, run
print("ready", flush=True)
def tell(event):
    if event.step == 3:
        print(event.step, flush=True)
run(METHODS["kept-factors"], steps=100000, checkpoint=sys.argv[1], callbacks=[tell])
"""


def launch(*arguments):
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "CUDA_VISIBLE_DEVICES": "",  # workers are forked, which a process that has met a GPU cannot do
    }
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_sigint_from_outside_then_resume(tmp_path):
    file = tmp_path / "run.pt"
    process = launch("-c", INTERRUPTED, str(file))
    assert process.stdout.readline() == "ready\n"
    assert process.stdout.readline() == "3\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert f"saved to {file}; to go on, call solve again with the same arguments" in errors
    found = torch.load(file, weights_only=True)["content"]["step"]
    assert found >= 3
    stop = found + 2
    resumed = run(
        METHODS["kept-factors"], steps=100000, checkpoint=file, callbacks=[lambda e: e.step == stop]
    )
    whole = run(METHODS["kept-factors"], steps=100000, callbacks=[lambda e: e.step == stop])
    assert equal(resumed, whole)


@pytest.mark.slow
def test_killed_twenty_times_while_it_writes(tmp_path):
    """Workers of one warm process are killed at random moments; the last one must end where an uninterrupted run ends."""
    process = launch("-m", "tests.bilevel.killing", str(tmp_path / "run.pt"), "20")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    report = json.loads(output.splitlines()[-1])
    assert report["errors"] == []
    assert report["kills"] == 20
    assert report["equal"]
    assert report["resumed"] >= 15
    assert report["during_writes"] >= 3  # kills that left an unfinished file behind
