"""A run that is killed again and again: forks workers from one warm process and prints one line of JSON.

python -m tests.bilevel.killing FILE KILLS
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import weingarten as wg
from tests.bilevel.runs import METHODS, equal, run

METHOD = METHODS["kept-factors"]


def main(file: Path, kills: int) -> dict[str, object]:
    torch.set_num_threads(1)
    delays = random.Random(0)  # the same delays every time
    run(METHOD, steps=5)  # warm
    slow_down_the_disk(
        per_step(file) / 2
    )  # about half of the time is spent in writes, however busy the machine is
    step_seconds = per_step(file)
    steps = 20 * kills  # more than all workers together get to
    partial = file.with_name(file.name + ".partial")
    errors, resumed, during_writes, truncated, done, last = [], 0, 0, 0, 0, 0
    while done < kills:
        resumed += file.exists()
        before = partial.stat().st_mtime_ns if partial.exists() else None
        worker = fork(file, steps)
        time.sleep(delays.uniform(0.5, 8) * step_seconds)
        os.kill(worker, signal.SIGKILL)
        _, status = os.waitpid(worker, 0)
        if not os.WIFSIGNALED(status):
            errors.append(f"worker {done} ended by itself with {status}")
            break
        done += 1
        if partial.exists() and partial.stat().st_mtime_ns != before:
            during_writes += 1
            truncated += not whole_checkpoint(partial)
        if file.exists():
            step = torch.load(file, weights_only=True)["content"]["step"]
            if step < last:
                errors.append(f"worker {done} went back from step {last} to {step}")
            last = step
    final = run(METHOD, steps=steps, checkpoint=file, callbacks=[lambda event: event.step >= last + 3])
    whole = run(METHOD, steps=steps, callbacks=[lambda event: event.step == final.step])
    return {
        "kills": done,
        "resumed": resumed,
        "during_writes": during_writes,
        "truncated": truncated,
        "steps": last,
        "equal": equal(final, whole),
        "errors": errors,
    }


def per_step(file: Path) -> float:
    """Seconds of a step with its checkpoint."""
    start = time.perf_counter()
    run(METHOD, steps=20, checkpoint=file.with_name("timing.pt"), checkpoint_every=1, resume=False)
    return (time.perf_counter() - start) / 20


def whole_checkpoint(file: Path) -> bool:
    try:
        torch.load(file, weights_only=True)
    except Exception:
        return False
    return True


def slow_down_the_disk(seconds: float) -> None:
    """A flush takes a while, as it does on a real disk, so that many kills hit a write; a write is still what it is."""
    flush = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(seconds)
        flush(descriptor)
        time.sleep(seconds)

    os.fsync = slow


def fork(file: Path, steps: int) -> int:
    """A worker that runs with a checkpoint after every step; an error of its own ends it with status 3."""
    worker = os.fork()
    if worker:
        return worker
    try:
        run(METHOD, steps=steps, checkpoint=file, checkpoint_every=1)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(3)
    os._exit(0)


if __name__ == "__main__":
    assert wg.__version__
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
