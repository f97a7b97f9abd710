"""What one connection sends to its session on the bus: bytes as received, no more than credit allows, then the end."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from scanside.engine.config import Value

from .bus import AsyncPort
from .envelope import Envelope, Opened
from .mrd_framing import Frame

__all__ = ["BATCH_BYTES", "BATCH_FRAMES", "PIECE_BYTES", "Feed"]

PIECE_BYTES = 16 << 20
"""Larger messages travel on the bus in pieces of this size."""
BATCH_FRAMES = 128
"""Pieces of one bus message."""
BATCH_BYTES = 2 << 20
"""A bus message is full with this much: what a worker can use while it is still in the processor's cache."""

AHEAD = 2
"""With so many messages unconsumed, more data waits until there is a full message or one of them is consumed."""


class _Piece(NamedTuple):
    view: memoryview
    messages: int
    """Complete messages in it; 0 for a piece that is not the last of its message."""
    received: int


class Feed:
    """The way from a connection to its session. Keeps what there is no credit for; drops nothing until the session is over."""

    def __init__(self, port: AsyncPort) -> None:
        self._port = port
        self._held: deque[_Piece] = deque()
        self._opened = self._ending = self._ended = False
        self._complete = True
        self.session = ""
        """Id on the bus; empty before the session and after it."""
        self.held_bytes = 0

    def __len__(self) -> int:
        """Pieces that wait for credit."""
        return len(self._held)

    def open(self, config: str, dialect: str, received: int, parameters: Mapping[str, Value]) -> str:
        """Ask for a session; returns its id. `received`: time in ns."""
        port = self._port
        self.session = port.open(config, dialect=dialect, peer="scanner", received=received, parameters=parameters)
        return self.session

    def put(self, frame: Frame, received: int) -> None:
        """Take a frame that was received at `received` ns; `flush` sends it."""
        view, count = frame.view, frame.count
        self.held_bytes += len(view)
        share = max(1, BATCH_BYTES // frame.size)
        while count > share:  # a run of messages, which are cut between them
            self._held.append(_Piece(view[: share * frame.size], share, received))
            view, count = view[share * frame.size :], count - share
        while len(view) > PIECE_BYTES:
            self._held.append(_Piece(view[:PIECE_BYTES], 0, received))
            view = view[PIECE_BYTES:]
        self._held.append(_Piece(view, count, received))

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
        while self._held and self._port.credit(self.session) > 0 and self._is_due():
            self._send()
        # a session that waits for a worker would be over at once
        if self._ending and self._opened and not self._held and not self._ended:
            self._ended = True
            self._port.end(self.session, complete=self._complete)

    def _is_due(self) -> bool:
        """Whether the worker could use more: a busy one takes one large message for less than many small ones."""
        return self._port.unconsumed(self.session) < AHEAD or self.held_bytes >= BATCH_BYTES or self._ending

    def _send(self) -> None:
        batch: list[_Piece] = []
        size = 0
        while self._held and len(batch) < BATCH_FRAMES and (not batch or size + len(self._held[0].view) <= BATCH_BYTES):
            batch.append(self._held.popleft())
            size += len(batch[-1].view)
        self.held_bytes -= size
        messages = max(1, sum(piece.messages for piece in batch))
        views = [piece.view for piece in batch]
        self._port.send(self.session, views, messages=messages, received=batch[-1].received)

    def abandon(self) -> None:
        """The peer is gone: end the session wherever it is."""
        if self.session and not self._ended:
            self._port.end(self.session, complete=False)
        self.close()

    def close(self) -> None:
        """The session is over: forget what was held for it."""
        self.session, self._ended = "", True
        self._held.clear()
        self.held_bytes = 0
