"""What one connection sends to its session on the bus: bytes as received, no more than credit allows, then the end.

What is sent is spooled too. When the worker goes away, a new session gets first what the spool has of the scan, then what has
been held since.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from scanside.engine.config import Value

from .bus import AsyncPort
from .envelope import Envelope, Opened
from .files.spool import RECORD_BYTES, SpoolRecord, open_spool
from .mrd_framing import Frame
from .spooling import SpoolLog

__all__ = ["BATCH_BYTES", "BATCH_FRAMES", "PIECE_BYTES", "Feed"]

PIECE_BYTES = RECORD_BYTES
"""Larger messages travel on the bus in pieces of this size."""
BATCH_FRAMES = 128
"""Pieces of one bus message."""
BATCH_BYTES = 8 << 20
"""A bus message is full with this much. Each one wakes four threads and costs as much as half a megabyte of readouts does."""

AHEAD = 2
"""With so many messages unconsumed, more data waits until there is a full message or one of them is consumed."""


class _Request(NamedTuple):
    config: str
    dialect: str
    received: int
    parameters: Mapping[str, Value]


class Feed:
    """The way from a connection to its session. Keeps what there is no credit for; drops nothing until the session is over."""

    def __init__(self, port: AsyncPort) -> None:
        self._port = port
        self._held: deque[SpoolRecord] = deque()
        self._again: deque[SpoolRecord] = deque()
        self._source: Iterator[SpoolRecord] | None = None
        self._request: _Request | None = None
        self._opened = self._ending = self._ended = False
        self._complete = True
        self._sent = self._goal = (
            0  # pieces since the start of the scan: that went out, and that have to come from the spool
        )
        self.session = ""
        """Id on the bus; empty before the session, after it and while it waits to be opened anew."""
        self.held_bytes = 0
        self.log: SpoolLog | None = None
        """The spool file of the session."""
        self.broken = ""
        """Why a session that was opened anew cannot go on."""

    def __len__(self) -> int:
        """Pieces that wait for credit."""
        return len(self._held)

    @property
    def started(self) -> bool:
        """Whether a session was asked for and is not over."""
        return self._request is not None

    @property
    def replaying(self) -> bool:
        """Whether what was received before a worker went away still has to be sent again."""
        return self._sent < self._goal

    @property
    def settled(self) -> bool:
        """Whether the worker has used everything that an earlier one had been sent. Never after the end was sent."""
        return self._opened and not self.replaying and not self._ending and not self._port.unconsumed(self.session)

    @property
    def replayable(self) -> bool:
        """Whether everything that was sent is in the spool, or will be soon."""
        return not max(self._goal, self._sent) or (self.log is not None and not self.log.lost)

    def open(self, config: str, dialect: str, received: int, parameters: Mapping[str, Value]) -> str:
        """Ask for a session; returns its id. `received`: time in ns."""
        self._request = _Request(config, dialect, received, parameters)
        return self._ask(self._request)

    def _ask(self, request: _Request) -> str:
        config, dialect, received, parameters = request
        self.session = self._port.open(
            config, dialect=dialect, peer="scanner", received=received, parameters=parameters
        )
        return self.session

    def suspend(self) -> None:
        """The worker went away: hold everything until `restart`."""
        self.session = ""
        self._goal = max(self._goal, self._sent)
        self._sent = 0
        self._opened = self._ended = False
        self._source = None
        self._again.clear()

    def restart(self) -> str:
        """Ask for a new session in the place of the one that was suspended; returns its id."""
        return self._ask(self._request) if self._request is not None else ""

    def put(self, frame: Frame, received: int) -> None:
        """Take a frame that was received at `received` ns; `flush` sends it."""
        for piece in _pieces(frame, received):
            self._held.append(piece)
            self.held_bytes += len(piece.view)
            if self.log is not None:
                self.log.append(*piece)

    def take(self, envelope: Envelope) -> None:
        """Hear of new credit, the first of which says that the session is open."""
        if isinstance(envelope, Opened):
            self._opened = True
        self.flush()

    def end(self, *, complete: bool) -> None:
        """Nothing more comes: say so after what is held. The first call decides whether the scan is complete."""
        if not self._ending:
            self._ending, self._complete = True, complete
        self.flush()

    def flush(self) -> None:
        """Send what is held as far as credit goes, then the end. What need not be sent at once waits for more."""
        while self._port.credit(self.session) > 0 and self._due():
            self._send(self._again if self.replaying else self._held)
        # a session that waits for a worker would be over at once
        if self._ending and self._opened and not self._held and not self.replaying and not self._ended:
            self._ended = True
            self._port.end(self.session, complete=self._complete)

    def _due(self) -> bool:
        """Whether something can be sent that the worker could use: a busy one takes one large message for less than many."""
        if self.replaying:
            return self._refill()
        few = self._port.unconsumed(self.session) < AHEAD
        return bool(self._held) and (few or self.held_bytes >= BATCH_BYTES or self._ending)

    def _refill(self) -> bool:
        """Fetch from the spool what the next message takes; false while it is not there, and for good with `broken`."""
        log = self.log
        if log is None or log.lost:
            self.broken = "not all of the scan had been spooled"
        if log is None or self.broken or log.written < self._goal:
            return False
        try:
            self._source = self._source or open_spool(log.path).records()
        except OSError as error:
            self.broken = f"its spool file cannot be read: {error.strerror}"
            return False
        size = sum(len(piece.view) for piece in self._again)
        while size < BATCH_BYTES and self._sent + len(self._again) < self._goal:
            piece = next(self._source, None)
            if piece is None:
                self.broken = "its spool file is damaged"
                return False
            self._again.append(piece)
            size += len(piece.view)
        return True

    def _send(self, queue: deque[SpoolRecord]) -> None:
        batch: list[SpoolRecord] = []
        size = 0
        while queue and len(batch) < BATCH_FRAMES and (not batch or size + len(queue[0].view) <= BATCH_BYTES):
            batch.append(queue.popleft())
            size += len(batch[-1].view)
        if queue is self._held:
            self.held_bytes -= size
        messages = max(1, sum(piece.messages for piece in batch))
        views = [piece.view for piece in batch]
        self._port.send(self.session, views, messages=messages, received=batch[-1].received)
        self._sent += len(batch)
        if not self.replaying:
            self._source = None

    def abandon(self) -> None:
        """The peer is gone: end the session wherever it is."""
        if self.session and not self._ended:
            self._port.end(self.session, complete=False)
        self.close()

    def close(self) -> None:
        """The session is over: forget what was held for it."""
        self.session, self._ended = "", True
        self._request = self._source = None
        self._held.clear()
        self._again.clear()
        self.held_bytes = 0


def _pieces(frame: Frame, received: int) -> Iterator[SpoolRecord]:
    """A frame as it travels: a run of messages cut between them, and a long message in parts."""
    view, count = frame.view, frame.count
    share = max(1, BATCH_BYTES // frame.size)
    while count > share:
        yield SpoolRecord(view[: share * frame.size], share, received)
        view, count = view[share * frame.size :], count - share
    while len(view) > PIECE_BYTES:
        yield SpoolRecord(view[:PIECE_BYTES], 0, received)
        view = view[PIECE_BYTES:]
    yield SpoolRecord(view, count, received)
