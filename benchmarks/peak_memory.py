"""The most memory that one call needs beyond what is resident before it, as the kernel counts it. Linux only."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["CLEAR", "extra_peak", "keep_trim"]

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
