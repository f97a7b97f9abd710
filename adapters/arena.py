"""Memory that the gateway receives into and that workers of the same host read from, so that payload does not travel.

The server makes one arena; each worker process inherits its descriptor and maps it read-only. A slab goes back to the pool when
the last view on it is gone.
"""

from __future__ import annotations

import mmap
import os
import weakref

import numpy as np
from scanside.engine.errors import PeerError

__all__ = ["SLAB_BYTES", "Arena", "ArenaView", "Span"]

Span = tuple[int, int]
"""Offset and length in bytes of a part of the arena."""

SLAB_BYTES = 2 << 20
"""Receive memory at a time: small, so that it is still in the cache when it is read."""
ARENA_BYTES = 256 << 20
"""Address space; memory is used as far as slabs are lent at the same time."""


class Arena:
    """Lends slabs of shared memory. For one process; any thread may call it.

    The memory has no name, belongs to the processes that hold its descriptor and is gone with the last of them.
    """

    def __init__(self, size: int = ARENA_BYTES, slab_bytes: int = SLAB_BYTES) -> None:
        self.size, self.slab_bytes = size // slab_bytes * slab_bytes, slab_bytes
        self.fd = os.memfd_create("scanside-arena", os.MFD_CLOEXEC)
        """To be inherited by workers."""
        os.ftruncate(self.fd, self.size)
        self._memory = mmap.mmap(self.fd, self.size)
        self._base = np.frombuffer(self._memory, np.uint8).__array_interface__["data"][0]
        self._free = list(range(self.size - slab_bytes, -1, -slab_bytes))

    @property
    def lent(self) -> int:
        """Slabs that someone still has a view on."""
        return self.size // self.slab_bytes - len(self._free)

    def lend(self, size: int) -> memoryview:
        """Writable memory of at least `size` bytes: a slab, or private memory where `size` is larger or none is left.

        The slab used last comes first, since it is most likely still in the cache.
        """
        if size > self.slab_bytes or not self._free:
            return np.empty(max(size, self.slab_bytes), np.uint8).data
        offset = self._free.pop()
        slab = np.frombuffer(self._memory, np.uint8, self.slab_bytes, offset)
        weakref.finalize(slab, self._free.append, offset).atexit = False
        return slab.data

    def span(self, view: memoryview) -> Span | None:
        """Where in the arena a contiguous view lies; None when it lies elsewhere."""
        offset = np.frombuffer(view, np.uint8).__array_interface__["data"][0] - self._base
        return (offset, view.nbytes) if 0 <= offset < self.size else None

    def spans(self, views: list[memoryview]) -> list[Span] | None:
        """The same for several views, those that join made one; None when one of them lies elsewhere."""
        found: list[Span] = []
        for view in views:
            span = self.span(view)
            if span is None:
                return None
            if found and found[-1][0] + found[-1][1] == span[0]:
                found[-1] = found[-1][0], found[-1][1] + span[1]
            else:
                found.append(span)
        return found

    def close(self) -> None:
        """Give the descriptor back. The memory stays as long as views on it do."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


class ArenaView:
    """A worker's view on the arena with the descriptor `fd`, read-only."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        os.close(fd)
        self._view = memoryview(self._memory)

    def view(self, span: Span) -> memoryview:
        """The bytes of a span. Raises `PeerError` when it reaches beyond the arena."""
        offset, length = span
        if offset + length > len(self._view):
            raise PeerError(f"payload at {offset} + {length} bytes lies beyond the arena of {len(self._view)} bytes")
        return self._view[offset : offset + length]
