"""Which message of the bus goes where: the broker's rules, without its sockets.

Frames go on as they came; only envelopes are read. What one peer does wrong costs that peer's sessions and is counted by its
reason. docs/wire.md says what each message means.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence

import msgspec
import zmq
from scanside.engine.errors import PeerError, StreamError
from scanside.engine.limits import Limits

from .envelope import (
    LINK,
    Adjust,
    Adjusted,
    Credit,
    Data,
    Direction,
    End,
    Envelope,
    Failed,
    Hello,
    Nack,
    Note,
    Open,
    Opened,
    Ping,
    Pong,
    Reason,
    Refused,
    Result,
    Stats,
    check_payload,
    cost,
    decode,
    encode,
    numbered,
    shorten,
)

__all__ = ["BrokerStatus", "BrokerTimes", "Frames", "Peer", "Router", "WorkerStatus"]

WORKERS = 256
"""Workers at the same time."""
REMEMBERED = 1024
"""Sessions that are over and whose late messages are known to be just that."""

Frames = Sequence[bytes | zmq.Frame]


class BrokerTimes(msgspec.Struct, frozen=True, kw_only=True):
    """How long the broker waits, in s."""

    ping: float = 1.0
    """Between two pings."""
    expiry: float = 20.0
    """A peer that leaves a ping unanswered for this long is lost."""
    first_worker: float = 30.0
    """How long a session waits for the first worker to come up."""


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One worker as the broker sees it."""

    identity: bytes
    name: str
    device: str
    capacity: int
    sessions: int


class BrokerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The broker at one moment. `counts` only ever grow: how often something happened, by a fixed word."""

    workers: tuple[WorkerStatus, ...]
    sessions: int
    waiting: int
    """Sessions among these that wait for the first worker."""
    counts: dict[str, int]


class Peer:
    """Someone with an identity: a worker when `hello` is set, a producer otherwise."""

    def __init__(self, identity: bytes) -> None:
        self.identity = identity
        self.hello: Hello | None = None
        self.sessions: dict[str, _Session] = {}
        self.unanswered: float | None = None
        """Time of the oldest ping that got no answer."""
        self.backlog: deque[Frames] = deque()
        """What the socket does not take yet."""
        self.backlog_bytes = 0


class _Session:
    """A session between a producer and a worker; either may be missing, before its start or after a loss."""

    def __init__(self, request: Open, producer: Peer) -> None:
        self.request = request
        self.producer: Peer | None = producer
        self.worker: Peer | None = None
        self.up, self.down = Direction(), Direction()
        self.credit = 0
        self.opened = False
        self.since = time.monotonic()
        self.published = 0

    @property
    def key(self) -> str:
        """The session id."""
        return self.request.session

    @property
    def over(self) -> bool:
        """Whether both sides have said `end`."""
        return self.up.ended and self.down.ended


class Router:
    """The registry of workers and sessions. `send(peer, frames)` and `publish(topic, count, frames)` move what it decides on.

    Only the producer called `lender` may refer to payload in the arena: others could read what belongs to its sessions.
    """

    def __init__(
        self,
        send: Callable[[Peer, Frames], None],
        publish: Callable[[bytes, int, Frames], None],
        limits: Limits,
        times: BrokerTimes,
        lender: bytes,
    ) -> None:
        self._lender = lender
        self.peers: dict[bytes, Peer] = {}
        self._send, self._publish, self._limits, self._times = send, publish, limits, times
        self.observe: Callable[[Open, Envelope | None], None] = lambda _request, _envelope: None
        """Called with all that belongs to a session, data and what its worker says, and with None when it is over."""
        self._sessions: dict[str, _Session] = {}
        self._waiting: dict[str, _Session] = {}
        self._over: OrderedDict[str, None] = OrderedDict()
        self._counts: Counter[str] = Counter()
        self._published: Counter[bytes] = Counter()
        self._pinged = time.monotonic()
        self._link_count = 0

    # What arrives

    def receive(self, identity: bytes, frames: list[zmq.Frame]) -> None:
        """Handle one message from the peer called `identity`: envelope and payload frames. Raises nothing for what is in it."""
        peer = self.peers.get(identity)
        if peer is not None:
            peer.unanswered = None
        session = LINK
        try:
            envelope = decode(frames[0].buffer if frames else b"", self._limits)
            session = envelope.session
            check_payload(envelope, [len(frame) for frame in frames[1:]], self._limits)
            self._handle(identity, envelope, frames)
        except StreamError as error:
            self._blame(identity, session, error)

    def _handle(self, identity: bytes, envelope: Envelope, frames: Frames) -> None:
        if isinstance(envelope, Hello):
            self._hello(self._peer(identity), envelope)
        elif isinstance(envelope, Open):
            self._open(self._peer(identity), envelope)
        elif isinstance(envelope, Adjust):
            self._adjust(identity, envelope)
        elif envelope.session == LINK:
            self._link(envelope)
        else:
            self._in_session(identity, envelope, frames)

    def _link(self, envelope: Envelope) -> None:
        if isinstance(envelope, Failed):
            self._counts["peer_failed"] += 1
        elif not isinstance(envelope, Pong):
            raise PeerError("only the broker sends ping")

    def _in_session(self, identity: bytes, envelope: Envelope, frames: Frames) -> None:
        session = self._sessions.get(envelope.session)
        if session is None:
            if envelope.session not in self._over:
                raise PeerError(f"session {envelope.session} is not open")
        elif session.producer is not None and session.producer.identity == identity:
            self._from_producer(session, envelope, frames)
        elif session.worker is not None and session.worker.identity == identity:
            self._from_worker(session, envelope, frames)
        else:
            raise PeerError("the session belongs to another connection")

    def _peer(self, identity: bytes) -> Peer:
        return self.peers.setdefault(identity, Peer(identity))

    # Workers

    def _hello(self, peer: Peer, hello: Hello) -> None:
        if peer.hello is None and peer.sessions:
            raise PeerError("a connection that opened sessions cannot become a worker")
        if peer.hello is None and len(self._workers()) >= WORKERS:
            raise PeerError(f"{WORKERS} workers are connected, there can be no more")
        self._fail_all(peer, "device", f"worker {hello.name} started anew")
        peer.hello = hello
        self._counts["hello"] += 1
        for session in list(self._waiting.values()):
            self._assign(session)

    def _workers(self) -> list[tuple[Peer, Hello]]:
        return [(peer, peer.hello) for peer in list(self.peers.values()) if peer.hello is not None]

    def _assign(self, session: _Session) -> None:
        """Give a session to the worker with the largest free share of its capacity, or refuse it."""
        self._waiting.pop(session.key, None)
        config = session.request.config
        able = [(p, h) for p, h in self._workers() if not h.configs or config in h.configs]
        free = [(1 - len(p.sessions) / h.capacity, p) for p, h in able if len(p.sessions) < h.capacity]
        if not able:
            self._refuse(session, "config", f"no worker has the configuration {config!r}")
        elif not free:
            self._refuse(session, "busy", "every worker is full; try again when a scan has ended")
        else:
            worker = max(free, key=lambda pair: pair[0])[1]
            session.worker = worker
            worker.sessions[session.key] = session
            self._send(worker, [encode(session.request)])

    # Sessions

    def _open(self, peer: Peer, request: Open) -> None:
        if peer.hello is not None:
            raise PeerError("a worker cannot open sessions")
        if request.session in self._sessions or request.session in self._over:
            raise PeerError(f"session id {request.session} was used before; take 16 random bytes for each session")
        session = _Session(request, peer)
        session.up.check(request)
        full = len(self._sessions) >= self._limits.sessions
        self._sessions[session.key] = peer.sessions[session.key] = session
        if full:
            text = f"{self._limits.sessions} sessions are open, which is the limit (limits.sessions); try again later"
            self._refuse(session, "busy", text)
        elif self._workers():
            self._assign(session)
        else:
            self._waiting[session.key] = session

    def _from_producer(self, session: _Session, envelope: Envelope, frames: Frames) -> None:
        session.up.check(envelope)
        if isinstance(envelope, Data):
            self._charge(session, envelope)
        elif not isinstance(envelope, (End, Failed)):
            raise PeerError(f"a producer does not send {type(envelope).__name__.lower()}")
        if session.worker is not None:
            self._send(session.worker, frames)
        elif isinstance(envelope, End):
            self._tell_producer(session, End(session=session.key, complete=False))
        if isinstance(envelope, Failed):
            self._counts["failed.producer"] += 1
        if session.over or isinstance(envelope, Failed):
            self._forget(session)

    def _charge(self, session: _Session, data: Data) -> None:
        if data.shared and (session.producer is None or session.producer.identity != self._lender):
            raise PeerError("payload in the arena is for the gateway of the same server only; send payload frames")
        if session.credit <= 0:
            raise PeerError(f"data without credit ({session.credit} bytes); wait for `opened` or `credit`")
        session.credit -= cost(data.bytes)
        self.observe(session.request, data)

    def _from_worker(self, session: _Session, envelope: Envelope, frames: Frames) -> None:
        session.down.check(envelope)
        match envelope:
            case Opened(credit=credit) if not session.opened:
                session.opened, session.credit = True, credit
                self._counts["opened"] += 1
            case Credit(bytes=size):
                session.credit += size
            case Result() | Stats() | Note():
                self._show(session, envelope, frames)
            case Nack():
                self._counts["nack"] += 1
            case End() | Failed():
                self._counts[type(envelope).__name__.lower()] += 1
            case Refused() if not session.opened:
                self._counts[type(envelope).__name__.lower()] += 1
            case _:
                raise PeerError(f"a worker does not send {type(envelope).__name__.lower()} here")
        self.observe(session.request, envelope)
        if session.producer is not None:
            self._send(session.producer, frames)
        if session.over or isinstance(envelope, (Failed, Refused)):
            self._forget(session)

    def _adjust(self, identity: bytes, envelope: Adjust) -> None:
        """Pass a change on to the workers of one session, or of all photoacoustic ones, and say to how many."""
        meant = [
            (session.worker, session.key)
            for session in self._sessions.values()
            if session.worker is not None
            and session.request.adapter == "pat"
            and envelope.session in (LINK, session.key)
        ]
        for worker, key in meant:
            self._send(worker, [encode(msgspec.structs.replace(envelope, session=key))])
        self._counts["adjusted"] += len(meant)
        peer = self.peers.get(identity) or Peer(identity)
        self._send(peer, [encode(numbered(Adjusted(sessions=len(meant)), 0))])

    def _show(self, session: _Session, envelope: Envelope, frames: Frames) -> None:
        if isinstance(envelope, Result):
            self._publish(b"image." + session.key.encode(), session.published, frames)
            session.published += 1
        else:
            topic = type(envelope).__name__.lower().encode()
            self._publish(topic, self._published[topic], frames)
            self._published[topic] += 1

    # How sessions end without their peers' doing

    def _tell_producer(self, session: _Session, envelope: Envelope) -> None:
        if session.producer is not None:
            self._send(session.producer, [encode(session.down.take(envelope))])

    def _tell_worker(self, session: _Session, envelope: Envelope) -> None:
        if session.worker is not None:
            self._send(session.worker, [encode(session.up.take(envelope))])

    def _refuse(self, session: _Session, reason: Reason, text: str) -> None:
        self._counts[f"refused.{reason}"] += 1
        self._tell_producer(session, Refused(session=session.key, reason=reason, text=text))
        self._forget(session)

    def _fail(self, session: _Session, reason: Reason, text: str) -> None:
        self._counts[f"failed.{reason}"] += 1
        failed = Failed(session=session.key, reason=reason, text=shorten(text))
        self._tell_producer(session, failed)
        self._tell_worker(session, failed)
        self._forget(session)

    def _fail_all(self, peer: Peer, reason: Reason, text: str) -> None:
        for session in list(peer.sessions.values()):
            self._fail(session, reason, text)

    def _forget(self, session: _Session) -> None:
        self._sessions.pop(session.key, None)
        self._waiting.pop(session.key, None)
        self._over[session.key] = None
        self.observe(session.request, None)
        if len(self._over) > REMEMBERED:
            self._over.popitem(last=False)
        for peer in (session.producer, session.worker):
            if peer is not None:
                peer.sessions.pop(session.key, None)
                self.idle(peer)

    def idle(self, peer: Peer) -> None:
        """Forget a peer that has no session, no backlog and is no worker."""
        if not (peer.hello or peer.sessions or peer.backlog):
            self.peers.pop(peer.identity, None)

    def _blame(self, identity: bytes, key: str, error: StreamError) -> None:
        """Make the sender of a wrong message pay: with one session where the message names one of its own, else with all."""
        self._counts[f"malformed.{error.reason}"] += 1
        peer = self.peers.get(identity) or Peer(identity)
        reason: Reason = "limit" if error.reason == "limit" else "protocol"
        if key in peer.sessions:
            self._fail(peer.sessions[key], reason, str(error))
            return
        if key == LINK:
            self._fail_all(peer, reason, f"its connection sent something else that is wrong: {error}")
            peer.hello = None
        failed = Failed(session=key, reason=reason, text=shorten(str(error)))
        self._send(peer, [encode(numbered(failed, 0))])
        self.idle(peer)

    def lost(self, identity: bytes, why: str) -> None:
        """A peer is gone: its producers get `failed`, reason `device`, its workers `end` with `complete` false."""
        peer = self.peers.pop(identity, None)
        if peer is None:
            return
        peer.backlog.clear()
        self._counts["lost.worker" if peer.hello else "lost.producer"] += 1
        for session in list(peer.sessions.values()):
            if session.worker is peer:
                session.worker = None
                self._fail(session, "device", f"the worker went away: {why}")
            else:
                self._orphan(session)

    def _orphan(self, session: _Session) -> None:
        session.producer = None
        if session.worker is None:
            self._forget(session)
        elif not session.up.ended:
            self._tell_worker(session, End(session=session.key, complete=False))

    # What time brings

    def tick(self, *, drained: bool) -> None:
        """Ping everyone when it is due, and give up what waited for too long.

        `drained`: everything that has arrived was handled, so that silence is the peer's and not our own delay.
        """
        now = time.monotonic()
        for session in list(self._waiting.values()):
            if now - session.since > self._times.first_worker:
                text = f"no worker came up within {self._times.first_worker:g} s; see the log of the workers"
                self._refuse(session, "busy", text)
        if now - self._pinged >= self._times.ping:
            self._pinged = now
            for peer in list(self.peers.values()):
                self._check_up(peer, now, drained=drained)

    def pause(self) -> float:
        """Seconds until `tick` has something to do."""
        ends = [session.since + self._times.first_worker for session in self._waiting.values()]
        return max(0.0, min([self._pinged + self._times.ping, *ends]) - time.monotonic())

    def _check_up(self, peer: Peer, now: float, *, drained: bool) -> None:
        if drained and peer.unanswered is not None and now - peer.unanswered > self._times.expiry:
            self.lost(peer.identity, f"no answer for {self._times.expiry:g} s")
            return
        if peer.unanswered is None:
            peer.unanswered = now
        self._send(peer, [encode(numbered(Ping(), self._link_count))])
        self._link_count += 1

    def status(self) -> BrokerStatus:
        """A snapshot; any thread may ask."""
        workers = tuple(
            WorkerStatus(
                identity=p.identity, name=h.name, device=h.device, capacity=h.capacity, sessions=len(p.sessions)
            )
            for p, h in self._workers()
        )
        return BrokerStatus(
            workers=workers, sessions=len(self._sessions), waiting=len(self._waiting), counts=dict(self._counts)
        )
