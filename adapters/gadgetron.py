"""Scanners' side of the server: TCP connections that speak MRD version 1 in the dialects of Gadgetron, FIRE and OpenRecon.

A connection frames what arrives and hands the bytes on as they are; decoding happens in a worker. It reads its socket only
while its session has credit, so that a slow worker slows the scanner down and nothing is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from typing import Literal

import msgspec
import structlog
from scanside.engine.config import ConfigStore
from scanside.engine.errors import StreamError
from scanside.engine.limits import DEFAULT_LIMITS, Limits
from scanside.engine.messages import FrameStats

from . import mrd
from .bus import AsyncPort
from .envelope import Credit, End, Envelope, Failed, Opened, Refused, Result, Stats
from .grammar import Action, Answer, Begin, Failure, Finish, Forward, Grammar, Role, reply_text
from .metrics import Metrics
from .mrd_framing import Frame, Framer
from .mrd_lengths import MessageId
from .scan import NOISE, ROLE

__all__ = ["Gateway", "GatewayOptions"]

_log = structlog.get_logger("gateway")

HOLD_BYTES = 8 << 20
"""Received data kept while a session is not open yet or has no credit; reading stops beyond it."""
PIECE_BYTES = 16 << 20
"""Larger messages travel on the bus in pieces of this size."""
BATCH_FRAMES = 128
"""Frames of one bus message."""
WATCH_SECONDS = 0.25
DISCARD_BYTES = 1 << 16


class GatewayOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How connections are treated; times in s."""

    dialect: Literal["auto", "gadgetron", "fire"] = "auto"
    default_config: str | None = None
    """Configuration for names that are not installed; None refuses them."""
    failure: Literal["close", "abort"] = "close"
    """How a failed session ends: with CLOSE, or with a closed socket alone, which FIRE takes as the sign of failure."""
    handshake_seconds: float = 10.0
    """From connection to header."""
    message_seconds: float = 30.0
    """For one message to arrive as a whole."""
    idle_seconds: float = 0.0
    """Without any data after the header; 0 waits for ever, since scans pause."""
    drain_seconds: float = 5.0
    """For the peer's CLOSE after a failure."""


class Gateway:
    """Accepts scanners and connects each of them to a session on the bus."""

    def __init__(
        self,
        store: ConfigStore,
        port: AsyncPort,
        metrics: Metrics,
        answer: Callable[[str], str],
        *,
        options: GatewayOptions | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.store, self.port, self.metrics, self.answer = store, port, metrics, answer
        self.options = options or GatewayOptions()
        self.limits = limits
        self.connections: set[Connection] = set()
        self.sessions: dict[str, Connection] = {}
        self._server: asyncio.Server | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen on `host`:`port` (0: any free one); returns the port."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self), host or None, port, backlog=128)
        self._watcher = loop.create_task(self._watch())
        address = self._server.sockets[0].getsockname()
        return int(address[1])

    async def stop(self) -> None:
        """Stop listening and close every connection."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        if self._server is not None:
            self._server.close()
            for connection in list(self.connections):
                connection.fail("the server is shutting down", "shutdown")
                connection.drop()
            await self._server.wait_closed()

    def deliver(self, envelope: Envelope, payload: list[memoryview]) -> None:
        """Take a message of the bus for one of the connections."""
        connection = self.sessions.get(envelope.session)
        if connection is not None:
            connection.from_bus(envelope, payload)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = time.monotonic()
            for connection in list(self.connections):
                connection.check_time(now)


class Connection(asyncio.BufferedProtocol):
    """One TCP connection of a scanner."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway, self._options = gateway, gateway.options
        self._framer = Framer(gateway.limits)
        self._grammar = Grammar(
            gateway.store,
            gateway.answer,
            dialect=self._options.dialect,
            default=self._options.default_config,
        )
        self._transport: asyncio.Transport | None = None
        self._begin: Begin | None = None
        self._session = ""
        self._discards = False
        self._held: list[memoryview] = []
        self._held_bytes = self._held_messages = 0
        self._received = 0
        self._opened = self._progress = self._message = time.monotonic()
        self._message_offset = -1
        self._confirmed = False
        self._ending = False
        self._end_sent = False
        self._said_close = False
        self._verdict = ""
        self._failed_at = 0.0
        self._scrap = memoryview(bytearray(0))
        self._written = 0.0
        self._paused = self._clogged = False
        self._outcome = "empty"

    # --- from the socket ---------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin: no delay for small packets, and a probe for peers that vanished."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - a stream server makes no other kind
        self._transport = transport
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._gateway.connections.add(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the framer knows better
        """Where the next bytes go: straight into the memory that the messages are used from."""
        if self._framer.failure is None:
            return self._framer.buffer()
        if not len(self._scrap):
            self._scrap = memoryview(bytearray(DISCARD_BYTES))
        return self._scrap

    def buffer_updated(self, nbytes: int) -> None:
        """Frame what arrived and act on it."""
        self._received = time.monotonic_ns()
        self._progress = self._received / 1e9
        if self._framer.failure is not None:
            return
        try:
            frames = self._framer.advance(nbytes)
            for frame in frames:
                self._handle(frame)
            if self._framer.failure is not None:
                raise self._framer.failure
        except StreamError as error:
            self.fail(str(error), error.reason)
        self._gateway.metrics.received("mrd", nbytes, 0)
        self._flush()

    def check_time(self, now: float) -> None:
        """End what takes too long; `now` in s of the monotonic clock."""
        options = self._options
        if self._verdict and not self._failed_at:
            return  # the worker still makes images of what had arrived
        if self._failed_at:
            if now - self._failed_at > options.drain_seconds:
                self.drop()
        elif not self._grammar.header_seen and now - self._opened > options.handshake_seconds:
            self.fail(f"no ISMRMRD header within {options.handshake_seconds:g} s of the connection", "timeout")
        elif self._stuck(now):
            self.fail(f"a message took longer than {options.message_seconds:g} s to arrive", "timeout")
        elif options.idle_seconds and now - self._progress > options.idle_seconds and not self._grammar.closed:
            self.fail(f"nothing arrived for {options.idle_seconds:g} s", "timeout")

    def _stuck(self, now: float) -> bool:
        """Whether the message that is arriving has been arriving for too long. Our own back-pressure does not count."""
        if not self._framer.pending or self._paused or self._framer.offset != self._message_offset:
            self._message_offset, self._message = self._framer.offset, now
        return now - self._message > self._options.message_seconds

    def eof_received(self) -> bool:
        """The peer sends no more. Without CLOSE before it the scan is incomplete, but what came is still reconstructed."""
        if self._failed_at or self._begin is None:
            return False
        if self._grammar.closed or self._verdict:
            return not self._said_close
        try:
            self._framer.finish()
        except StreamError as error:
            _log.warning("truncated", error=str(error))
            self._gateway.metrics.message_rejected(error.reason)
        self._grammar.closed = True
        self._finish(complete=False)
        return bool(self._session)

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone, for whatever reason: tell the worker and forget."""
        if exc is not None:
            _log.info("connection lost", error=str(exc))
        if self._session and not self._end_sent:
            self._gateway.port.end(self._session, complete=False)
        self._release()
        self._gateway.connections.discard(self)

    def pause_writing(self) -> None:
        """The peer does not take its images: stop taking its data."""
        self._clogged = True
        self._regulate()

    def resume_writing(self) -> None:
        """The peer takes images again."""
        self._clogged = False
        self._regulate()

    # --- what frames cause -------------------------------------------------------------------------------------------------

    def _handle(self, frame: Frame) -> None:
        for action in self._grammar.react(frame):
            self._act(action)

    def _act(self, action: Action) -> None:
        if isinstance(action, Forward):
            self._forward(action.frame)
        elif isinstance(action, Answer):
            self._write([action.data])
        elif isinstance(action, Begin):
            self._begin = action
            self._outcome = "complete"
            self._discards = self._gateway.store.get(action.config).reconstruction.method == "none"
            self._gateway.metrics.session_opened()
        elif isinstance(action, Failure):
            self.fail(action.text, action.reason)
        elif isinstance(action, Finish):
            self._finish(complete=True)

    def _forward(self, frame: Frame) -> None:
        if frame.id == MessageId.ACQUISITION:
            self._gateway.metrics.received("mrd", 0, frame.count)
        if self._discards:
            return
        if not self._session:
            self._open()
        for start in range(0, len(frame.view), PIECE_BYTES):
            self._held.append(frame.view[start : start + PIECE_BYTES])
        self._held_bytes += len(frame.view)
        self._held_messages += frame.count

    def _open(self) -> None:
        begin = self._begin
        if begin is None:
            return
        parameters = {**begin.overrides, ROLE: begin.role.value, NOISE: begin.noise_id}
        self._session = self._gateway.port.open(
            begin.config,
            dialect=self._grammar.dialect.value,
            peer="scanner",
            received=self._received,
            parameters=parameters,
        )
        self._gateway.sessions[self._session] = self

    def _finish(self, *, complete: bool) -> None:
        """The peer is done. Without a session there is nothing to wait for."""
        if self._failed_at:
            self.drop()
            return
        if self._verdict:
            return
        if self._begin is not None and self._begin.role is Role.NOISE:
            self._open()
        if not self._session:
            self._close()
            return
        if not complete:
            self._outcome = "incomplete"
        self._ending = True
        self._flush()

    def _flush(self) -> None:
        """Send what is held as far as credit goes, then the end."""
        port = self._gateway.port
        while self._held and port.credit(self._session) > 0:
            payload, self._held = self._held[:BATCH_FRAMES], self._held[BATCH_FRAMES:]
            messages = max(1, len(payload) if self._held else self._held_messages)
            self._held_messages -= min(messages, self._held_messages)
            self._held_bytes -= sum(map(len, payload))
            port.send(self._session, payload, messages=messages, received=self._received)
        if self._ending and self._confirmed and not self._held and self._session and not self._end_sent:
            self._end_sent = True
            port.end(self._session, complete=self._outcome == "complete")
        self._regulate()

    def _regulate(self) -> None:
        """Read the socket only while there is room for what comes."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        full = (self._clogged or self._held_bytes >= HOLD_BYTES) and not self._verdict
        if full and not self._paused:
            transport.pause_reading()
        elif self._paused and not full:
            transport.resume_reading()
        self._paused = full

    # --- from the bus ------------------------------------------------------------------------------------------------------

    def from_bus(self, envelope: Envelope, payload: list[memoryview]) -> None:
        """Act on a message of the session."""
        if isinstance(envelope, Result):
            self._write(payload)
            self._written = time.monotonic()
            if envelope.image or envelope.series:
                self._gateway.metrics.delivered("mrd")
        elif isinstance(envelope, Opened | Credit):
            self._confirmed = True
            self._flush()
        elif isinstance(envelope, Stats):
            self._record(envelope.stats)
        elif isinstance(envelope, Refused | Failed):
            self._session_over()
            self._verdict = ""
            self.fail(envelope.text, envelope.reason)
        elif isinstance(envelope, End):
            self._ended()

    def _record(self, stats: FrameStats) -> None:
        self._gateway.metrics.record_frame(stats, self._written)
        _log.info("frame", outcome=stats.outcome, trigger=stats.trigger, latency_ms=self._latency_ms(stats))

    def _latency_ms(self, stats: FrameStats) -> float:
        return round((self._written - stats.received) * 1e3, 2)

    def _ended(self) -> None:
        """The worker has sent all there is."""
        self._session_over()
        if self._verdict:
            self._pronounce()
        else:
            self._close()

    def _session_over(self) -> None:
        self._gateway.sessions.pop(self._session, None)
        self._session, self._ending = "", True
        self._held, self._held_bytes = [], 0

    # --- to the socket -----------------------------------------------------------------------------------------------------

    def _write(self, buffers: list[memoryview] | list[bytes]) -> None:
        transport = self._transport
        if transport is None or transport.is_closing() or self._said_close:
            return
        for data in buffers:
            transport.write(data)

    def _close(self) -> None:
        """CLOSE, then the end of the connection once the peer has said CLOSE too."""
        self._write([mrd.encode_close()])
        self._said_close = True
        if self._grammar.closed:
            self.drop()
        else:
            self._failed_at = self._failed_at or time.monotonic()

    def fail(self, text: str, reason: str) -> None:
        """End the session for a reason that the peer is told. What it sent before is still reconstructed and sent back.

        Further data is discarded until the peer's CLOSE, or for the drain time.
        """
        if self._failed_at or self._said_close or self._verdict:
            return
        _log.warning("session failed", reason=reason, error=text)
        self._gateway.metrics.message_rejected(reason)
        self._outcome, self._verdict = "failed", text
        self._grammar.failed = True
        if self._session:
            self._ending = True
            self._flush()
        else:
            self._pronounce()

    def _pronounce(self) -> None:
        """Tell the peer why its session failed, and end it as the configured dialect of failure has it."""
        self._failed_at = time.monotonic()
        if self._grammar.role is Role.SCAN:
            self._write([reply_text("error", self._verdict, self._grammar.dialect)])
        elif self._grammar.role is Role.EXTERNAL:
            self._write([mrd.encode_error(self._verdict)])
        if self._options.failure == "abort":
            self.drop()
        else:
            self._close()
        self._regulate()

    def drop(self) -> None:
        """Close the socket once everything written is out."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.close()

    def _release(self) -> None:
        self._gateway.sessions.pop(self._session, None)
        if self._begin is not None:
            self._gateway.metrics.session_closed(self._outcome)
            self._begin = None
