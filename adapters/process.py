"""Settings of a process that decide its speed more than any code in it: the allocator and the interpreter's thread switch."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["SWITCH_SECONDS", "tune_process"]

SWITCH_SECONDS = 0.0001
"""A thread that has something to send waits no longer than this for one that computes."""
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
"""Parameters of glibc's mallopt (malloc.h)."""


def tune_process() -> bool:
    """Keep freed memory with the process instead of mapping each array anew, and switch threads quickly.

    Without the former every buffer of some MiB costs a page fault per 4 KiB. Returns whether the allocator could be told;
    it can with glibc.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # one arena: with one per thread, each session's thread would keep memory that no other one can use
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 << 20))
    accepted = [mallopt(name, value) for name, value in settings]
    return accepted == [1] * len(settings)
