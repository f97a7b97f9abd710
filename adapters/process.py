"""Settings of a process that decide its speed more than any code in it: allocator, thread pools, collector, thread switch.

An allocator that gives memory back pays a page fault for each 4 KiB of every array of tens of MiB (a test counts them; the
default network, whose arrays are smaller, does not). Idle threads that spin take a core from those that work: with one core taken
by another process, torch runs a network four times as fast when they sleep, for a fifth more on an idle machine
(`benchmarks/runtimes.py`). The collector walks through everything that torch loaded.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Sequence

__all__ = ["ENVIRONMENT", "MALLOC", "SWITCH_SECONDS", "require_environment", "settle_collector", "tune_process"]

ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
}
"""Read when a process starts: idle threads of OpenMP sleep instead of spinning."""
SWITCH_SECONDS = 0.0001
"""A thread that has something to send waits no longer than this for one that computes."""
MALLOC = {
    "M_ARENA_MAX": (-8, 1),
    "M_MMAP_MAX": (-4, 0),
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 64 << 20),
}
"""Number (malloc.h) and value of the parameters of glibc's mallopt: freed memory stays with the process, in one arena, since
with one per thread each session's thread would keep memory that no other one can use."""
_COLLECTOR = (50_000, 20, 100)
_MARK = "SCANSIDE_STARTED"


def tune_process() -> bool:
    """Keep freed memory with the process instead of mapping each array anew, and switch threads quickly.

    Returns whether the allocator could be told; it can with glibc.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    accepted = [mallopt(number, value) for number, value in MALLOC.values()]
    return accepted == [1] * len(MALLOC)


def require_environment(module: str, arguments: Sequence[str]) -> None:
    """Start this process again as `python -m module arguments` when it lacks a setting that is read at the start only.

    What the environment already says stands. Returns when there is nothing to do.
    """
    if _MARK in os.environ or all(name in os.environ for name in ENVIRONMENT):
        return
    environment = {**ENVIRONMENT, **os.environ, _MARK: "1"}
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment)  # noqa: S606 - our own interpreter


def settle_collector() -> None:
    """Take what is loaded by now out of the garbage collector's rounds, and have fewer of them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECTOR)
