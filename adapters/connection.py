"""One TCP connection of a scanner: what it may do when, and how it ends.

::

    TAKING ──CLOSE, end of stream, failure──► ENDING ──the worker has sent everything──► DRAINING ──peer's CLOSE──► CLOSED
       └───────────────── no session to wait for ────────────────────────────────────────┘

A failure is told after the images of what had arrived before it, and the socket stays open until the peer has said CLOSE:
closing it under a client that still sends would reset the connection, and with it the text that says what is wrong.

When a worker process goes away, TAKING and ENDING go on: another one is sent what the first had, and what the peer has got
already is left out.
"""

from __future__ import annotations

import asyncio
import enum
import socket
import time
from collections import Counter
from typing import TYPE_CHECKING, Literal

import msgspec
import structlog
from scanside.engine.errors import StreamError
from scanside.engine.messages import FrameStats

from . import mrd
from .arena import SLAB_BYTES
from .envelope import Credit, End, Envelope, Failed, Opened, Refused, Result, Stats
from .feed import Feed
from .files.spool import SpoolClosing, SpoolFacts
from .grammar import Action, Answer, Begin, Failure, Finish, Forward, Grammar, Role, Stage, reply_text
from .mrd_framing import Frame, Framer
from .mrd_lengths import MessageId
from .scan import NOISE, ROLE

if TYPE_CHECKING:
    from .gadgetron import Gateway

__all__ = ["Connection", "ConnectionOptions", "Phase"]

_log = structlog.get_logger("gateway")

HOLD_BYTES = 8 << 20
"""Received data kept while a session is not open yet or has no credit; reading stops beyond it."""
DISCARD_BYTES = 1 << 16
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
"""A host that vanished is noticed after a minute, and not after the two hours that are the system's default."""
REPLAYS = 3
"""Workers that one session may lose, for whatever reason."""
_ACQUISITION = int(MessageId.ACQUISITION)
_STATS = (-1, -1)
"""Stands for statistics where an image would have the numbers of its series and itself."""


class ConnectionOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How connections are treated; times in s."""

    dialect: Literal["auto", "gadgetron", "fire"] = "auto"
    default_config: str | None = None
    """Configuration for names that are not installed; None refuses them."""
    failure: Literal["close", "abort"] = "close"
    """How a failed scan ends: with CLOSE, or with the end of the stream alone, which FIRE takes as the sign of failure."""
    handshake_seconds: float = 10.0
    """From connection to header."""
    message_seconds: float = 30.0
    """For one message to arrive as a whole."""
    idle_seconds: float = 0.0
    """Without any data after the header; 0 waits for ever, since scans pause."""
    drain_seconds: float = 5.0
    """For the peer's CLOSE after a failure."""
    stall_seconds: float = 120.0
    """For a peer that takes nothing of what waits for it."""


class Phase(enum.Enum):
    """Where a connection stands."""

    TAKING = "taking"
    """Messages are taken."""
    ENDING = "ending"
    """No more are taken; the worker makes what can be made of those that were."""
    DRAINING = "draining"
    """Everything is said; what the peer still sends is thrown away until its CLOSE."""
    CLOSED = "closed"
    """The socket closes as soon as everything written is out."""


class Connection(asyncio.BufferedProtocol):
    """One TCP connection of a scanner; asyncio calls it on the loop of its gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway, self._options = gateway, gateway.options
        self._framer = Framer(gateway.limits, slab_bytes=SLAB_BYTES, allocate=gateway.port.buffer)
        options = self._options
        self._grammar = Grammar(gateway.store, gateway.answer, dialect=options.dialect, default=options.default_config)
        self.feed = Feed(gateway.port)
        self._transport: asyncio.Transport | None = None
        self._begin: Begin | None = None
        self._discards = False
        self._verdict = ""
        self._outcome: Literal["complete", "incomplete", "failed"] = "complete"
        self._lingers = True
        self._received = time.monotonic_ns()
        self._phase, self._since = Phase.TAKING, time.monotonic()
        self._message_offset, self._message_since = -1, self._since
        self._scrap = memoryview(b"")
        self._paused = self._clogged = False
        self._unsent, self._unsent_since = 0, self._since
        self._written = 0.0
        self._delivered: Counter[tuple[int, int]] = Counter()
        self._skipped: Counter[tuple[int, int]] = Counter()
        self._images = self._replays = 0

    @property
    def phase(self) -> Phase:
        """Where the connection stands."""
        return self._phase

    @property
    def busy(self) -> bool:
        """Whether a session is under way."""
        return self._begin is not None and self._phase in (Phase.TAKING, Phase.ENDING)

    def _enter(self, phase: Phase) -> None:
        self._phase, self._since = phase, time.monotonic()

    # --- from the socket ---------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin: no delay for small packets, and a probe for peers that vanished."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - a stream server makes no other kind
        self._transport = transport
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # not every system has them
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._gateway.joined(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the framer knows better
        """Where the next bytes go: straight into the memory that the messages are used from."""
        if not self._deaf:
            return self._framer.buffer()
        if not self._scrap:
            self._scrap = memoryview(bytearray(DISCARD_BYTES))
        return self._scrap

    @property
    def _deaf(self) -> bool:
        """Whether what arrives cannot mean anything any more."""
        return self._framer.failure is not None or self._grammar.closed

    def buffer_updated(self, nbytes: int) -> None:
        """Frame what arrived and act on it."""
        if self._deaf:
            return
        self._received = time.monotonic_ns()
        readouts = 0
        try:
            for frame in self._framer.advance(nbytes):
                if frame.id == _ACQUISITION:
                    readouts += frame.count
                self._handle(frame)
            if self._framer.failure is not None and not self._grammar.closed:
                raise self._framer.failure
        except StreamError as error:
            # a peer that never said anything meaningful will not say CLOSE either
            self.fail(str(error), error.reason, linger=self._framer.offset > 0)
        except Exception as error:  # noqa: BLE001 - a defect of ours costs this session, and its peer is told
            _log.exception("connection failed")
            self.fail(f"internal error: {type(error).__name__}: {error}", "engine")
        self._gateway.metrics.received("mrd", nbytes, readouts)
        self.feed.flush()
        self._regulate()

    def check_time(self, now: float) -> None:
        """End what takes too long; `now` in s of the monotonic clock."""
        options = self._options
        if self._stalls(now):
            _log.warning("peer does not read", seconds=options.stall_seconds)
            self.abort()
        elif self._phase is Phase.DRAINING:
            if now - self._since > options.drain_seconds:
                self.drop()
        elif self._phase is Phase.TAKING:
            self._check_input(now)
        if self.feed.replaying:
            self.feed.flush()
            self._check_feed()

    def _check_input(self, now: float) -> None:
        options = self._options
        if self._grammar.stage < Stage.RUNNING and now - self._since > options.handshake_seconds:
            self._time_out(f"no ISMRMRD header within {options.handshake_seconds:g} s of the connection")
        elif self._sticks(now):
            self._time_out(f"a message took longer than {options.message_seconds:g} s to arrive")
        elif options.idle_seconds and now - self._received / 1e9 > options.idle_seconds and not self._paused:
            self._time_out(f"nothing arrived for {options.idle_seconds:g} s")

    def _time_out(self, text: str) -> None:
        self.fail(text, "timeout", linger=False)

    def _sticks(self, now: float) -> bool:
        """Whether the message that is arriving has been arriving for too long. Our own back-pressure does not count."""
        if not self._framer.pending or self._paused or self._framer.offset != self._message_offset:
            self._message_offset, self._message_since = self._framer.offset, now
        return now - self._message_since > self._options.message_seconds

    def _stalls(self, now: float) -> bool:
        """Whether the peer has taken nothing for too long of what waits for it."""
        unsent = self._transport.get_write_buffer_size() if self._transport is not None else 0
        if not unsent or unsent != self._unsent:
            self._unsent, self._unsent_since = unsent, now
        return now - self._unsent_since > self._options.stall_seconds

    def eof_received(self) -> bool:
        """The peer sends no more. Without CLOSE before it the scan is incomplete, but what came is still reconstructed."""
        if self._phase is Phase.TAKING:
            if self._framer.pending:
                self._gateway.metrics.message_rejected("truncated")
                _log.warning("truncated", offset=self._framer.offset, received=self._framer.pending)
            self._finish(complete=False)
        self._grammar.close()
        if self._phase is Phase.DRAINING:
            self.drop()
        return self._phase is Phase.ENDING

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone, for whatever reason: tell the worker and forget."""
        if exc is not None:
            _log.info("connection lost", error=str(exc))
        if self._phase in (Phase.TAKING, Phase.ENDING) and self._outcome == "complete":
            self._outcome = "incomplete"
        self._enter(Phase.CLOSED)
        self._gateway.left(self)
        self.feed.abandon()
        if self.feed.log is not None:
            well = self._outcome == "complete" and exc is None
            closing = SpoolClosing(outcome=self._outcome, images=self._images, text=self._verdict)
            self.feed.log.end(closing, keep=not well)
        if self._begin is not None:
            self._gateway.metrics.session_closed(self._outcome)

    def pause_writing(self) -> None:
        """The peer does not take its images: stop taking its data."""
        self._clogged = True
        self._regulate()

    def resume_writing(self) -> None:
        """The peer takes images again."""
        self._clogged = False
        self._regulate()

    def _regulate(self) -> None:
        """Read the socket only while there is room for what comes. What is thrown away needs no room."""
        transport = self._transport
        if transport is None or transport.is_closing() or self._grammar.closed:
            return
        full = self._phase is Phase.TAKING and (self._clogged or self.feed.held_bytes >= HOLD_BYTES)
        if full and not self._paused:
            transport.pause_reading()
        elif self._paused and not full:
            transport.resume_reading()
        self._paused = full

    # --- what frames cause -------------------------------------------------------------------------------------------------

    def _handle(self, frame: Frame) -> None:
        for action in self._grammar.react(frame):
            self._act(action)

    def _act(self, action: Action) -> None:
        if isinstance(action, Forward):
            if not self._discards:
                if not self.feed.started:
                    self._open()
                self.feed.put(action.frame, self._received)
        elif isinstance(action, Answer):
            self._write([action.data])
        elif isinstance(action, Begin):
            self._begin = action
            self._discards = self._gateway.store.get(action.config).reconstruction.method == "none"
            self._gateway.metrics.session_opened()
            self._check_spool()
        elif isinstance(action, Failure):
            self.fail(action.text, action.reason)
        elif isinstance(action, Finish):
            self._finish(complete=True)

    def _open(self) -> None:
        begin = self._begin
        if begin is not None:
            parameters = {**begin.overrides, ROLE: begin.role.value, NOISE: begin.noise_id}
            dialect = self._grammar.dialect.value
            session = self.feed.open(begin.config, dialect, self._received, parameters)
            self._gateway.sessions[session] = self
            spool = self._gateway.spool
            if spool is not None:
                now, clock = time.time_ns(), time.monotonic_ns()
                self.feed.log = spool.begin(
                    SpoolFacts(
                        session=session,
                        started=now,
                        monotonic=clock,
                        config=begin.config,
                        dialect=dialect,
                        parameters=parameters,
                    )
                )

    def _check_spool(self) -> None:
        """Refuse a scan that could not be kept."""
        spool = self._gateway.spool
        trouble = spool.status().trouble if spool is not None and not self._discards else ""
        if trouble:
            self.fail(f"no scan can be taken: {trouble}; or start the server with --no-spool", "busy")

    def _finish(self, *, complete: bool) -> None:
        """The peer is done. Where there is no session there is nothing to wait for."""
        if self._phase is Phase.DRAINING:
            self.drop()
        if self._phase is not Phase.TAKING:
            return
        if self._begin is not None and self._begin.role is Role.NOISE and not self.feed.started:
            self._open()
        if not complete:
            self._outcome = "incomplete"
        self._end(complete=complete)

    def _end(self, *, complete: bool) -> None:
        self._enter(Phase.ENDING)
        if self.feed.started:
            self.feed.end(complete=complete)
        else:
            self._conclude()

    def fail(self, text: str, reason: str, *, linger: bool = True) -> None:
        """End the session for a reason that the peer is told. What it sent before is still reconstructed and sent back.

        linger: whether to wait for the peer's CLOSE afterwards, for the drain time at most.
        """
        if self._phase is not Phase.TAKING:
            return
        self._condemn(text, reason)
        self._lingers = linger
        self._end(complete=False)

    def _condemn(self, text: str, reason: str) -> None:
        _log.warning("session failed", reason=reason, error=text)
        self._gateway.metrics.message_rejected(reason)
        self._outcome, self._verdict = "failed", self._verdict or text
        self._grammar.fail()

    # --- from the bus ------------------------------------------------------------------------------------------------------

    def from_bus(self, envelope: Envelope, payload: list[memoryview]) -> None:
        """Act on a message of the session."""
        if isinstance(envelope, Result):
            if self._is_new((envelope.series, envelope.image)):
                self._deliver(envelope, payload)
        elif isinstance(envelope, Opened | Credit):
            self.feed.take(envelope)
            self._check_feed()
            self._regulate()
        elif isinstance(envelope, Stats):
            if self._is_new(_STATS):
                self._record(envelope.stats)
        elif isinstance(envelope, Failed) and envelope.reason == "device" and self._suspend(envelope.text):
            return
        elif isinstance(envelope, Refused | Failed):
            self._condemn(envelope.text, envelope.reason)
            self._conclude()
        elif isinstance(envelope, End):
            self._conclude()

    def _is_new(self, what: tuple[int, int]) -> bool:
        """Whether the peer has not got this already, from a worker that went away afterwards."""
        if self._skipped[what] > 0:
            self._skipped[what] -= 1
            return False
        self._delivered[what] += 1
        return True

    def _deliver(self, result: Result, payload: list[memoryview]) -> None:
        self._write(payload)
        self._written = time.monotonic()
        if result.image or result.series:
            self._images += 1
            self._gateway.metrics.delivered("mrd")

    # --- when a worker goes away ---------------------------------------------------------------------------------------------

    def _suspend(self, why: str) -> bool:
        """Wait for another worker; false when the session cannot be taken up again."""
        recovery, feed = self._gateway.recovery, self.feed
        guilty = recovery.is_suspect(self)
        if guilty or not feed.replayable or self._replays >= REPLAYS:
            _log.error("session is not replayed", replays=self._replays, again=guilty, spooled=feed.replayable)
            self._gateway.metrics.session_replayed("failed" if guilty else "impossible")
            return False
        _log.warning("session is replayed", why=why)
        self._gateway.sessions.pop(feed.session, None)
        self._replays += 1
        feed.suspend()
        if self._grammar.role is Role.SCAN:
            text = (
                "the reconstruction process ended and is replaced; what had arrived of this scan is reconstructed again"
            )
            self._write([reply_text("warning", text, self._grammar.dialect)])
        recovery.enter(self)
        return True

    def resume(self) -> None:
        """Ask for a new session in the place of the one whose worker went away."""
        self._skipped = Counter(self._delivered)
        self._gateway.sessions[self.feed.restart()] = self

    def _check_feed(self) -> None:
        """See whether a session that was taken up again is all right, or never will be."""
        if self.feed.broken and self._phase in (Phase.TAKING, Phase.ENDING):
            self._condemn(f"the worker went away, and the scan cannot be replayed: {self.feed.broken}", "device")
            self._conclude()
        elif self._gateway.recovery.is_suspect(self) and self.feed.settled:
            self._recovered()

    def _recovered(self) -> None:
        self._gateway.metrics.session_replayed("resumed")
        self._gateway.recovery.leave(self)

    def _record(self, stats: FrameStats) -> None:
        self._gateway.metrics.record_frame(stats, self._written)
        latency_ms = round((self._written - stats.received) * 1e3, 2)
        _log.info("frame", outcome=stats.outcome, trigger=stats.trigger, latency_ms=latency_ms)

    # --- to the socket -----------------------------------------------------------------------------------------------------

    def _write(self, buffers: list[memoryview] | list[bytes]) -> None:
        transport = self._transport
        if transport is not None and not transport.is_closing() and self._phase in (Phase.TAKING, Phase.ENDING):
            transport.write(buffers[0] if len(buffers) == 1 else b"".join(buffers))  # one packet train per image

    def _conclude(self) -> None:
        """Everything of the session was sent: say what went wrong, then CLOSE, and leave once the peer has said CLOSE too."""
        self._gateway.sessions.pop(self.feed.session, None)
        if self._gateway.recovery.is_suspect(self) and not self._verdict:
            self._recovered()
        self._gateway.recovery.leave(self)
        self.feed.close()
        scan = self._grammar.role is Role.SCAN
        if self._verdict and scan:
            self._write([reply_text("error", self._verdict, self._grammar.dialect)])
        elif self._verdict and self._grammar.role is Role.EXTERNAL:
            self._write([mrd.encode_error(self._verdict)])
        if self._verdict and scan and self._options.failure == "abort":
            self._hang_up()
        else:
            self._write([mrd.encode_close()])
        self._enter(Phase.DRAINING)
        if self._grammar.closed or not self._lingers:
            self.drop()
        self._regulate()

    def _hang_up(self) -> None:
        """End our direction of the stream; the other one stays open for what the peer still sends."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write_eof()

    def drop(self) -> None:
        """Close the socket once everything written is out."""
        self._enter(Phase.CLOSED)
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close the socket at once."""
        if self._transport is not None:
            self._transport.abort()
