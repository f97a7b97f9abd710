"""Cuts a byte stream of MRD version 1 into messages without copying them.

The framer owns its receive memory: large slabs that are filled once and never overwritten, so that every message can
be used where it was received. Consecutive acquisitions of one shape come out as one frame, which makes their headers
and samples strided arrays with no work per message.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
from scanside.engine.errors import StreamError, TruncatedMessage
from scanside.engine.limits import DEFAULT_LIMITS, Limits

from .mrd_lengths import (
    ACQUISITION_FIELDS,
    ACQUISITION_START,
    COMPRESSED,
    ID_BYTES,
    Length,
    MessageId,
    acquisition_size,
    length_rule,
)

__all__ = ["SLAB_BYTES", "Frame", "Framer"]

SLAB_BYTES = 4 << 20
"""Default size of one slab of receive memory."""
MARGIN_BYTES = 64 << 10
"""A slab with less room than this is left: smaller receives cost more than carrying a partial message over."""
ACQUISITION = int(MessageId.ACQUISITION)  # the class attribute is slow to reach, and this runs per message
SINGLY = 16
"""Acquisitions of a run that are compared one by one before whole arrays are compared."""

# The fields that decide whether an acquisition continues a run, for many messages at once.
_PROBE = np.dtype(
    {
        "names": ["id", "flags", "samples", "channels", "dimensions"],
        "formats": ["<u2", "<u8", "<u2", "<u2", "<u2"],
        "offsets": [0, 4, 36, 40, 178],
        "itemsize": ACQUISITION_START,
    }
)


class Frame(msgspec.Struct, frozen=True, eq=False):
    """One message, or a run of consecutive acquisitions of one shape.

    id: message id; view: read-only bytes of all messages, ids included; count: how many messages of equal size;
    offset: byte offset in the stream of the first one.
    """

    id: int
    view: memoryview
    count: int
    offset: int

    @property
    def size(self) -> int:
        """Bytes of one message with its id."""
        return len(self.view) // self.count

    @property
    def body(self) -> memoryview:
        """What follows the id of the first message."""
        return self.view[ID_BYTES : self.size]

    def split(self) -> list[Frame]:
        """The messages of a run one by one."""
        size = self.size
        starts = range(0, len(self.view), size)
        return [Frame(self.id, self.view[at : at + size], 1, self.offset + at) for at in starts]


def _private(size: int) -> memoryview:
    return np.empty(size, np.uint8).data


class Framer:
    """Incremental cutter of one direction of a session; does no input or output itself.

    Fill `buffer()` and call `advance()`, or hand bytes that are already in memory to `feed()`; both return the
    messages that are complete. Messages that stand before a broken one are returned first and the error is kept in
    `failure`: the next call raises it. When nothing precedes the broken message the error is raised at once. After an
    error the stream cannot be resumed. `allocate` gives writable memory of at least so many bytes for a slab.

    Errors: PeerError (unknown id, malformed field), LimitExceeded (declared size above its limit, raised from the
    length field, before the rest of the message is received), TruncatedMessage (`finish` inside a message). Each
    carries the byte offset of the message.
    """

    def __init__(
        self,
        limits: Limits = DEFAULT_LIMITS,
        *,
        slab_bytes: int = SLAB_BYTES,
        allocate: Callable[[int], memoryview] = _private,
    ) -> None:
        self.limits = limits
        self._allocate = allocate
        self.failure: StreamError | None = None
        self._slab_bytes = slab_bytes
        self._margin = max(1, min(MARGIN_BYTES, slab_bytes // 8))
        self._slab = memoryview(b"")
        self._start = self._end = 0  # of the bytes in the slab that belong to no complete message yet
        self._origin = 0  # offset in the stream of the slab's first byte
        self._need = ID_BYTES  # bytes of the current message without which nothing more can be said about it
        self._length: Length | None = None  # rule that is at work on the current message
        self._size = 0  # of the current message, once its rule has returned
        self._shape = (-1, -1, -1)  # samples, channels, trajectory dimensions of the last acquisition
        self._shape_size = 0

    @property
    def offset(self) -> int:
        """Byte offset in the stream of the first byte that belongs to no complete message."""
        return self._origin + self._start

    @property
    def pending(self) -> int:
        """Bytes received of a message that is not complete."""
        return self._end - self._start

    def buffer(self) -> memoryview:
        """Writable memory for what is received next, at least one byte; valid until the next call of any method."""
        self._check()
        room = len(self._slab) - self._end
        if room < self._margin or self._start + self._need > len(self._slab):
            self._renew()
        return self._slab[self._end :]

    def advance(self, nbytes: int) -> list[Frame]:
        """Take note that `nbytes` were written to `buffer()`; returns the messages that are complete now."""
        self._check()
        if not 0 <= nbytes <= len(self._slab) - self._end:
            raise ValueError(f"advance by {nbytes} bytes, but the buffer has {len(self._slab) - self._end}")
        self._end += nbytes
        frames: list[Frame] = []
        self._start = self._cut(self._slab, self._start, self._end, self._origin, frames)
        return frames

    def feed(self, data: bytes | bytearray | memoryview) -> list[Frame]:
        """The messages that `data` completes.

        Whole messages in `data` are used where they lie: the caller must not change it afterwards. Only what belongs
        to a message that began in an earlier call, or ends in a later one, is copied.
        """
        self._check()
        view = memoryview(data).cast("B")
        frames: list[Frame] = []
        if not self.pending:
            used = self._cut(view, 0, len(view), self.offset, frames)
            self._origin += used
            view = view[used:]
        while len(view) and self.failure is None:
            room = self.buffer()
            nbytes = min(len(room), len(view))
            room[:nbytes] = view[:nbytes]
            frames += self._advance_after(frames, nbytes)
            view = view[nbytes:]
        return frames

    def finish(self) -> None:
        """Say that the stream has ended. Raises TruncatedMessage when it ended inside a message."""
        self._check()
        if self.pending:
            what = "an unfinished id"
            if self.pending >= ID_BYTES:
                ident = int.from_bytes(self._slab[self._start : self._start + ID_BYTES], "little")
                what = f"{self.pending} of at least {self._need} bytes of message {ident} ({MessageId(ident).name})"
            raise TruncatedMessage(f"the peer went away inside a message, after {what}", offset=self.offset)

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _advance_after(self, before: list[Frame], nbytes: int) -> list[Frame]:
        """`advance`, except that an error waits for the next call when there are frames before it."""
        try:
            return self.advance(nbytes)
        except StreamError:
            if not before:
                raise
            return []

    def _renew(self) -> None:
        """Begin a new slab that has room for the current message, and carry over what there is of it."""
        have = self.pending
        slab = self._allocate(max(self._slab_bytes, max(self._need, have) + self._margin))
        slab[:have] = self._slab[self._start : self._end]
        self._origin += self._start
        self._slab, self._start, self._end = slab, 0, have

    def _cut(self, view: memoryview, start: int, end: int, origin: int, frames: list[Frame]) -> int:
        """Append the complete messages of `view[start:end]`; returns where the first incomplete one starts."""
        try:
            while end - start >= self._need:
                ident, size, count = self._next(view, start, end, origin)
                if not count:
                    break
                stop = start + size * count
                frames.append(Frame(ident, view[start:stop].toreadonly(), count, origin + start))
                start = stop
        except StreamError as error:
            self.failure = error
            if not frames:
                raise
        return start

    def _next(self, view: memoryview, start: int, end: int, origin: int) -> tuple[int, int, int]:
        """Id, size and number of the messages that start at `start`; the number is 0 when the first is not complete."""
        have = end - start
        if self._length is None and not self._size:
            if have >= ACQUISITION_START:
                ident, flags, *shape = ACQUISITION_FIELDS.unpack_from(view, start)
                if ident == ACQUISITION and not flags & COMPRESSED:
                    return self._acquisitions(view, start, end, origin, (shape[0], shape[1], shape[2]))
            ident = view[start] | view[start + 1] << 8
            self._length = length_rule(ident, self.limits, origin + start)
            self._need = next(self._length)
        self._measure(view, start, end)
        if not self._size or have < self._size:
            return 0, 0, 0
        size, self._size, self._need = self._size, 0, ID_BYTES
        return view[start] | view[start + 1] << 8, size, 1

    def _measure(self, view: memoryview, start: int, end: int) -> None:
        """Let the rule of the current message read the length fields that have arrived."""
        try:
            while self._length is not None and end - start >= self._need:
                self._need = self._length.send(view[start:end])
        except StopIteration as known:
            self._length = None
            self._size = self._need = known.value

    def _acquisitions(
        self, view: memoryview, start: int, end: int, origin: int, shape: tuple[int, int, int]
    ) -> tuple[int, int, int]:
        if shape != self._shape:
            self._shape_size = acquisition_size(*shape, self.limits, origin + start)
            self._shape = shape
        size = self._shape_size
        whole = (end - start) // size
        self._need = ID_BYTES if whole else size
        return ACQUISITION, size, _run(view, start, size, whole, shape)


def _run(view: memoryview, start: int, size: int, whole: int, shape: tuple[int, int, int]) -> int:
    """How many of the `whole` slots of `size` bytes hold acquisitions of the first one's shape, without a gap."""
    count = min(whole, 1)
    while count < min(whole, SINGLY):
        ident, flags, *other = ACQUISITION_FIELDS.unpack_from(view, start + count * size)
        if ident != ACQUISITION or flags & COMPRESSED or tuple(other) != shape:
            return count
        count += 1
    # Windows that grow keep the cost in proportion to the run, whatever follows it.
    window = SINGLY
    while count < whole:
        window = min(8 * window, whole - count)
        same = _matches(view, start + count * size, size, window, shape)
        if not same.all():
            return count + int(same.argmin())
        count += window
    return count


def _matches(view: memoryview, start: int, size: int, count: int, shape: tuple[int, int, int]) -> np.ndarray:
    rows = np.ndarray((count,), _PROBE, view, start, (size,))
    same: np.ndarray = (rows["id"] == ACQUISITION) & (rows["flags"] & np.uint64(COMPRESSED) == 0)
    for name, value in zip(("samples", "channels", "dimensions"), shape, strict=True):
        same &= rows[name] == value
    return same
