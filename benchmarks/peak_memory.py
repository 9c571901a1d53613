"""The most memory that one call needs: of the process, as the kernel counts it (Linux only), or of tensors, as PyTorch does."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

__all__ = ["CLEAR", "extra_peak", "keep_trim", "tensor_peak"]

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
M_MMAP_THRESHOLD = -3  # of malloc.h


def keep_trim() -> None:
    """From here on large tensors go back to the system when they are freed: malloc's threshold is fixed."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**17)


def extra_peak(call: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes above what is resident when it starts, and what the call returns."""
    gc.collect()
    CLEAR.write_text("5")
    before = status("VmRSS")
    result = call()
    return status("VmHWM") - before, result


def status(name: str) -> int:
    """A line of the kernel's account of this process, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def tensor_peak(call: Callable[[], Any]) -> int:
    """Bytes of tensors that the call makes and that live at once: for small models, of which the system tells nothing."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return int(peak)
