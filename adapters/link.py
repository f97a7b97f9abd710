"""One end of the bus that is not the broker: a DEALER that sends and receives checked envelopes."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import zmq
from scanside.engine.errors import StreamError
from scanside.engine.limits import DEFAULT_LIMITS, Limits

from .envelope import (
    LINK,
    Adjust,
    Direction,
    Envelope,
    Failed,
    Open,
    Ping,
    Pong,
    Refused,
    check_payload,
    decode,
    encode,
    numbered,
    shorten,
)
from .sockets import Outbox, configure, receive_frames, send_frames

__all__ = ["Bytes", "Link", "Received", "Station", "frames_of"]

Bytes = bytes | bytearray | memoryview
"""A payload frame. From 64 KiB it is sent without a copy, so it must not change afterwards."""
BATCH = 64
"""Messages that are received before anything else gets its turn."""


class Received(NamedTuple):
    """A message that arrived; the payload are read-only views on the memory that ZeroMQ received into."""

    envelope: Envelope
    payload: list[memoryview]


def frames_of(payload: Sequence[Bytes]) -> list[memoryview]:
    """Payload frames as views on bytes. Raises `TypeError` for memory that is not contiguous."""
    return [memoryview(part).cast("B") for part in payload]


class _Session:
    __slots__ = ("inbound", "outbound")

    def __init__(self) -> None:
        self.inbound, self.outbound = Direction(), Direction()


class Link:
    """A DEALER with its sessions. Never blocks and never drops: what cannot go out yet waits, in order. One thread only."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        *,
        identity: bytes = b"",
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.socket = configure(context.socket(zmq.DEALER), limits)
        if identity:
            self.socket.setsockopt(zmq.IDENTITY, identity)
        self.socket.setsockopt(zmq.IMMEDIATE, 1)  # queue nothing for a connection that is not there
        self.socket.connect(endpoint)
        self.sessions: dict[str, _Session] = {}
        self.heard = time.monotonic()
        """When the broker was last heard of."""
        self.limits = limits
        self._waiting: deque[list[Bytes]] = deque()
        self._count = 0

    @property
    def waiting(self) -> bool:
        """Whether messages wait because the socket takes no more."""
        return bool(self._waiting)

    def post(self, envelope: Envelope, payload: Sequence[Bytes] = ()) -> bool:
        """Number and send a message; false, and nothing is sent, when its session is over.

        Raises `PeerError` or `LimitExceeded` when the payload is not what the envelope says or is too large.
        """
        frames = frames_of(payload)
        check_payload(envelope, [part.nbytes for part in frames], self.limits)
        if envelope.session == LINK or isinstance(envelope, Adjust):
            ready: Envelope = numbered(envelope, self._count)
            self._count += 1
        else:
            session = self._outbound(envelope)
            if session is None:
                return False
            ready = session.outbound.take(envelope)
            self._close_if_over(ready, session)
        self._waiting.append([encode(ready), *frames])
        self.flush()
        return True

    def _outbound(self, envelope: Envelope) -> _Session | None:
        if isinstance(envelope, Open):
            self.sessions[envelope.session] = _Session()
        session = self.sessions.get(envelope.session)
        return None if session is None or (session.outbound.ended and not isinstance(envelope, Failed)) else session

    def _close_if_over(self, envelope: Envelope, session: _Session) -> None:
        both = session.inbound.ended and session.outbound.ended
        if both or isinstance(envelope, (Failed, Refused)):
            self.sessions.pop(envelope.session, None)

    def flush(self) -> bool:
        """Send what waits, as far as the socket takes it; true when nothing waits any more."""
        while self._waiting:
            try:
                send_frames(self.socket, self._waiting[0])
            except zmq.Again:
                return False
            self._waiting.popleft()
        return True

    def receive(self) -> Received | None:
        """The next message for this end, or `None` when there is none. Pings are answered here.

        A message that breaks the protocol comes out as `failed`, and ends its session on both sides.
        """
        while True:
            try:
                frames = receive_frames(self.socket)
            except zmq.Again:
                return None
            self.heard = time.monotonic()
            received = self._check(frames)
            if received is not None:
                return received

    def _check(self, frames: list[zmq.Frame]) -> Received | None:
        session = LINK
        try:
            envelope = decode(frames[0].buffer, self.limits)
            session = envelope.session
            check_payload(envelope, [len(frame) for frame in frames[1:]], self.limits)
            return self._accept(envelope, [frame.buffer for frame in frames[1:]])
        except StreamError as error:
            failed = Failed(session=session, reason="protocol", text=shorten(str(error)))
            self.post(failed)
            return Received(failed, [])

    def _accept(self, envelope: Envelope, payload: list[memoryview]) -> Received | None:
        if isinstance(envelope, Ping):
            self.post(Pong())
            return None
        if envelope.session == LINK or isinstance(envelope, Adjust):
            return Received(envelope, payload)
        if isinstance(envelope, Open):
            self.sessions.setdefault(envelope.session, _Session())
        session = self.sessions.get(envelope.session)
        if session is None:  # still on its way when the session was over
            return None
        session.inbound.check(envelope)
        self._close_if_over(envelope, session)
        return Received(envelope, payload)

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


class Station:
    """A link of one thread, the one that polls, into which every thread may post."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self._outbox: Outbox[tuple[Envelope, Sequence[Bytes]]] = Outbox()
        self._owner = 0
        self._for_input, self._for_room = zmq.Poller(), zmq.Poller()
        self._for_input.register(link.socket, zmq.POLLIN)
        self._for_input.register(self._outbox.fd, zmq.POLLIN)
        self._for_room.register(link.socket, zmq.POLLIN | zmq.POLLOUT)

    def adopt(self) -> None:
        """Make the calling thread the one that polls, before anything is posted."""
        self._owner = threading.get_ident()

    def post(
        self,
        envelope: Envelope,
        payload: Sequence[Bytes] = (),
        timeout: float | None = None,
        *,
        wake: bool = True,
    ) -> None:
        """Send a message, after everything that this thread posted before. Messages of a session that is over are dropped.

        Without `wake` the polling thread is left asleep, and the message goes with the next one. Threads other than the polling
        one wait while the bus takes no more (policy `block`), and get an `EngineError` after `timeout` seconds. The polling
        thread never waits.
        """
        if threading.get_ident() == self._owner:
            self._empty_outbox()
            self.link.post(envelope, payload)
        else:
            frames = frames_of(payload)  # what is wrong is the caller's error, not that of the polling thread
            check_payload(envelope, [part.nbytes for part in frames], self.link.limits)
            self._outbox.put((envelope, frames), timeout, wake=wake)

    def _empty_outbox(self) -> None:
        for envelope, payload in self._outbox.take():
            self.link.post(envelope, payload)

    def poll(self, timeout: float) -> list[Received]:
        """Send what was posted and return what arrived, in order.

        Waits up to `timeout` seconds for a message; returns early, perhaps with nothing, when another thread posts or wakes it.
        """
        if timeout > 0:
            self._wait(timeout)
        if self.link.flush():  # while the socket takes no more, the outbox fills up and its producers wait
            self._empty_outbox()
        return self._drain()

    def _wait(self, timeout: float) -> None:
        poller = self._for_room if self.link.waiting else self._for_input
        poller.poll(math.ceil(timeout * 1e3))

    def wake(self) -> None:
        """Let `poll` return early; any thread may call this."""
        self._outbox.wake()

    def _drain(self) -> list[Received]:
        received: list[Received] = []
        while len(received) < BATCH:
            message = self.link.receive()
            if message is None:
                break
            received.append(message)
        return received

    def close(self) -> None:
        """Close the socket; what was posted and not sent yet is dropped."""
        self._outbox.close()
        self.link.close()
