"""Peak memory of a training step and of factor passes on one model, each in a process of its own.

Every pass is run by a fork of this process, which must not have run a backward pass yet. A child runs its pass on two rows, so
that code and thread pools are loaded, sets the kernel's high-water mark of resident memory back to what is resident, runs the
pass on the whole batch and reads the mark. This counts everything, also what libraries allocate outside of PyTorch. Linux only.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import weingarten as wg
from benchmarks.kfac_models import Case
from benchmarks.kfac_ours import factors, fixed, in_loop_step, size
from benchmarks.kfac_peers import PEERS, peers, quietly, reason
from benchmarks.peak_memory import CLEAR, extra_peak, keep_trim

Make = Callable[[Case], Callable[[], Any]]
Bytes = dict[str, int | str]  # a string is the reason why there is no number


def measured(make: Make, case: Case) -> tuple[int, Any]:
    """Bytes that one call on the whole batch needs, and what it returns; a first call on two rows loads code and threads."""
    keep_trim()
    make(case.first(2))()
    return extra_peak(make(case))


def of_step(case: Case) -> Callable[[], Any]:
    return fixed(case.gradient)()


def of_factors(case: Case) -> Callable[[], Any]:
    return factors(wg.KFAC(), case)()


def of_step_with_factors(case: Case) -> Callable[[], Any]:
    return in_loop_step(wg.KFAC(), case)()


def of_peer(name: str) -> Make:
    def make(case: Case) -> Callable[[], Any]:
        prepare = peers(case, {name: ("factors",)})[f"{name}: factors"]
        if isinstance(prepare, str):
            raise NotImplementedError(prepare)
        return prepare()

    return make


def child(pipe: Connection, key: str, make: Make, case: Case) -> None:
    with quietly():
        try:
            peak, result = measured(make, case)
        except Exception as error:  # a peer that cannot treat the model
            pipe.send({key: str(error) if isinstance(error, NotImplementedError) else reason(error)})
            return
        found: Bytes = {key: peak}
        if make is of_factors:
            found["size of the factors"] = size(wg.KFAC().read(result))
        pipe.send(found)


def forked(key: str, make: Make, case: Case) -> Bytes:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender, key, make, case))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:  # the child was killed
        return {key: "failed"}
    finally:
        process.join()


def measure_memory(case: Case, names: list[str]) -> Bytes:
    """Bytes by pass: our own passes and the factor passes of the named peers; empty where there is no Linux kernel to ask."""
    if not CLEAR.exists():
        return {}
    with quietly():
        for name in names:
            try:
                PEERS[name](case)  # imports the peer, so that its children need not
            except Exception as error:
                print(f"{name} on {case.name}: {reason(error)}")
    passes: dict[str, Make] = {
        "step": of_step,
        "factors": of_factors,
        "step with factors": of_step_with_factors,
    }
    passes |= {name: of_peer(name) for name in names}
    found: Bytes = {}
    for key, make in passes.items():
        found |= forked(key, make, case)
    return found
