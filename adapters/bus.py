"""The ends of the bus: producers and gateways, workers, viewers. docs/wire.md is the reference of what they exchange.

::

    with Broker() as broker:                             # in `scanside serve`
        port = AsyncPort(broker.context, on_message)     # the gateway, on an asyncio loop
    port = WorkerPort(endpoint, ...)                     # an engine worker, one thread
    with Producer(endpoint) as producer:                 # any program that has raw data, blocking
    Subscriber(endpoint, topics)                         # viewers
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import zmq
from scanside.engine.errors import EngineError
from scanside.engine.limits import DEFAULT_LIMITS, Limits
from scanside.engine.messages import FrameStats

from .arena import Arena
from .broker import INPROC, INPROC_VIEWERS, Broker
from .clients import Producer, Published, Subscriber, Value, payload_size
from .envelope import (
    Adapter,
    Credit,
    Data,
    End,
    Envelope,
    Failed,
    Hello,
    Level,
    Nack,
    Note,
    Open,
    Opened,
    Reason,
    Refused,
    Result,
    Stats,
    cost,
    new_session,
    shorten,
)
from .link import Bytes, Link, Received, Station, frames_of
from .routing import BrokerStatus, BrokerTimes, WorkerStatus
from .sockets import Policy, check_bind

__all__ = [
    "INPROC",
    "INPROC_VIEWERS",
    "AsyncPort",
    "Broker",
    "BrokerStatus",
    "BrokerTimes",
    "Policy",
    "Producer",
    "Published",
    "Received",
    "Subscriber",
    "WorkerPort",
    "WorkerStatus",
    "check_bind",
]

Context = zmq.Context[zmq.Socket[bytes]]

_INPUT, _EITHER = int(zmq.POLLIN), int(zmq.POLLIN | zmq.POLLOUT)
BATCH = 64
"""Messages that one turn of the asyncio loop handles."""
SILENCE = 20.0
"""A worker that hears nothing for so many seconds says hello again."""


class WorkerPort:
    """A worker's end. One thread polls, every thread may send.

    `capacity`: sessions at the same time; `configs`: names of the configurations it has, empty for all. `identity` is what
    `Broker.worker_lost` takes. Call `poll` at least every few seconds: that is what keeps the worker alive for the broker.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        name: str,
        device: str,
        capacity: int,
        configs: Sequence[str] = (),
        identity: bytes | None = None,
        context: Context | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.identity = identity or b"worker-" + uuid.uuid4().hex.encode()
        self._hello = Hello(name=name, device=device, capacity=capacity, configs=tuple(configs))
        self._link = Link(context or zmq.Context.instance(), endpoint, identity=self.identity, limits=limits)
        self._station = Station(self._link)
        self._station.adopt()
        self._station.post(self._hello)

    def poll(self, timeout: float) -> list[Received]:
        """Wait up to `timeout` seconds and return what arrived: `Open`, `Data`, `End`, `Failed`.

        Returns early, perhaps with nothing, when another thread sends. When the broker has been silent for 20 s,
        each session gets an incomplete `End` here, and the worker says hello again.
        """
        received = self._station.poll(timeout)
        if not received and time.monotonic() - self._link.heard > SILENCE:
            return self._start_anew()
        return received

    def wake(self) -> None:
        """Let `poll` return early; any thread and any signal handler may call this. Raises `EngineError` once it is closed."""
        self._station.wake()

    def _start_anew(self) -> list[Received]:
        ended = [Received(End(session=session, complete=False), []) for session in self._link.sessions]
        self._link.sessions.clear()
        self._link.heard = time.monotonic()
        self._station.post(self._hello)
        return ended

    def accept(self, session: str, *, credit: int, shared: bool = False) -> None:
        """Answer `Open`: the producer may send `credit` bytes, and with `shared` may leave them in the server's arena."""
        self._station.post(Opened(session=session, credit=credit, shared=shared))

    def refuse(self, session: str, reason: Reason, text: str) -> None:
        """Answer `Open` with no."""
        self._station.post(Refused(session=session, reason=reason, text=shorten(text)))

    def grant_credit(self, consumed: Data) -> None:
        """Give back what a `Data` message cost, once its bytes are consumed."""
        self._station.post(Credit(session=consumed.session, bytes=cost(consumed.bytes)))

    def send_result(
        self,
        session: str,
        payload: Sequence[Bytes],
        *,
        messages: int = 1,
        final: bool = True,
        series: int = 0,
        image: int = 0,
        received: int = 0,
        timeout: float | None = None,
    ) -> None:
        """Send MRD messages to the peer of a session; the fields are those of `Result`, times in ns.

        Frames from 64 KiB go without a copy and must not change afterwards. A thread other than the polling one
        waits while the bus is full and gets an `EngineError` after `timeout` seconds. What is sent for a session that is over
        is dropped.
        """
        result = Result(
            session=session,
            bytes=payload_size(payload),
            messages=messages,
            final=final,
            series=series,
            image=image,
            received=received,
            handed=time.monotonic_ns(),
        )
        self._station.post(result, payload, timeout)

    def send_stats(self, session: str, stats: FrameStats) -> None:
        """Send what a frame cost, with whatever is sent next: nobody waits for it."""
        self._station.post(Stats(session=session, stats=stats), wake=False)

    def send_note(self, session: str, level: Level, text: str) -> None:
        """Send a sentence for the operator's console."""
        self._station.post(Note(session=session, level=level, text=shorten(text)))

    def ask_again(self, session: str, first: int, last: int) -> None:
        """Ask for photoacoustic frames that are missing; see `Nack`."""
        self._station.post(Nack(session=session, first=first, last=last))

    def end(self, session: str, *, complete: bool = True) -> None:
        """Say that everything of a session was sent; `complete` is false when something of it is missing."""
        self._station.post(End(session=session, complete=complete))

    def fail(self, session: str, reason: Reason, text: str) -> None:
        """End a session at once, in both directions."""
        self._station.post(Failed(session=session, reason=reason, text=shorten(text)))

    def close(self) -> None:
        """Close the socket. What has not left yet is dropped, so wait for the producers' `End` before."""
        self._station.close()


class _Ledger:
    """Credit of one session, and the views on payload that the worker may still have to read."""

    __slots__ = ("_lent", "_returned", "credit", "shared")

    def __init__(self, credit: int, *, shared: bool) -> None:
        self.credit, self.shared = credit, shared
        self._lent: deque[tuple[int, Sequence[memoryview]]] = deque()
        self._returned = 0

    @property
    def unconsumed(self) -> int:
        return len(self._lent)

    def spend(self, cost: int, views: Sequence[memoryview]) -> None:
        self.credit -= cost
        self._lent.append((cost, views))

    def earn(self, size: int) -> None:
        """A worker gives back what it has consumed in the order in which it came."""
        self.credit += size
        self._returned += size
        while self._lent and self._lent[0][0] <= self._returned:
            self._returned -= self._lent.popleft()[0]


class AsyncPort:
    """A gateway's end: many sessions on one socket, on the asyncio loop that runs when it is made.

    `on_message(envelope, payload)` is called for `Opened`, `Credit`, `Result`, `Stats`, `Note`, `End`, `Failed` and `Refused`, in
    order; it must not block. The payload are views that stay valid as long as someone holds them. All methods belong to the
    loop's thread. Payload that lies in `arena` stays there for workers that can read it;
    `identity` is then the broker's `lender`.
    """

    def __init__(
        self,
        context: Context,
        on_message: Callable[[Envelope, list[memoryview]], None],
        *,
        endpoint: str = INPROC,
        limits: Limits = DEFAULT_LIMITS,
        arena: Arena | None = None,
        identity: bytes = b"",
    ) -> None:
        self._on_message = on_message
        self._arena = arena
        self._ledgers: dict[str, _Ledger] = {}
        self._link = Link(context, endpoint, identity=identity, limits=limits)
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.Handle | None = None
        self._loop.add_reader(self._link.socket.fileno(), self._turn)

    def credit(self, session: str) -> int:
        """Bytes that may be sent in a session; 0 or less: wait for `Credit`. 0 for a session that is over or not opened yet."""
        ledger = self._ledgers.get(session)
        return ledger.credit if ledger is not None and session in self._link.sessions else 0

    def unconsumed(self, session: str) -> int:
        """Messages of a session that its worker has not given back yet."""
        ledger = self._ledgers.get(session)
        return 0 if ledger is None else ledger.unconsumed

    def buffer(self, size: int) -> memoryview:
        """Memory of at least `size` bytes to receive into, from which `send` need not copy."""
        return np.empty(size, np.uint8).data if self._arena is None else self._arena.lend(size)

    def open(
        self,
        config: str,
        *,
        adapter: Adapter = "mrd",
        dialect: str = "",
        peer: str = "",
        received: int = 0,
        parameters: Mapping[str, Value] | None = None,
    ) -> str:
        """Ask for a session and return its id. The answer is `Opened` or `Refused`; the fields are those of `Open`."""
        request = Open(
            session=new_session(),
            config=config,
            adapter=adapter,
            dialect=dialect,
            peer=peer,
            received=received,
            parameters=dict(parameters or {}),
        )
        self._post(request)
        return request.session

    def send(self, session: str, payload: Sequence[Bytes], *, messages: int, received: int) -> None:
        """Send payload without a copy (from 64 KiB); it must not change afterwards. Dropped when the session is over.

        `received`: time in ns at which the last byte was read. Raises `EngineError` without credit: read no more from the peer
        until `credit` is above zero (policy `block`).
        """
        if session not in self._link.sessions:
            return
        ledger = self._ledgers.get(session)
        if ledger is None or ledger.credit <= 0:
            raise EngineError(f"no credit in session {session}; wait for `Credit` before sending more")
        views = frames_of(payload)
        size = sum(view.nbytes for view in views)
        spans = self._arena.spans(views) if self._arena is not None and ledger.shared else None
        data = Data(session=session, bytes=size, messages=messages, received=received, shared=tuple(spans or ()))
        self._post(data, () if spans else views)
        ledger.spend(cost(size), views if spans else ())

    def end(self, session: str, *, complete: bool = True) -> None:
        """Say that no more data follows; results still arrive until the worker's `End`."""
        self._post(End(session=session, complete=complete))

    def fail(self, session: str, reason: Reason, text: str) -> None:
        """End a session at once, in both directions."""
        self._post(Failed(session=session, reason=reason, text=shorten(text)))

    def _post(self, envelope: Envelope, payload: Sequence[Bytes] = ()) -> None:
        self._link.post(envelope, payload)
        self._forget_if_over(envelope.session)
        self._look_again()

    def _look_again(self) -> None:
        """ZeroMQ's descriptor tells of a change only once, and sending may swallow that: look at the events later in any case."""
        if self._again is None and int(self._link.socket.getsockopt(zmq.EVENTS)) & self._interest():
            self._again = self._loop.call_soon(self._turn)

    def _interest(self) -> int:
        return _EITHER if self._link.waiting else _INPUT

    def _turn(self) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again = None
        self._link.flush()
        for _ in range(BATCH):
            received = self._link.receive()
            if received is None:
                break
            self._count(received.envelope)
            self._on_message(*received)
            if self._link.socket.closed:
                return
        self._look_again()

    def _count(self, envelope: Envelope) -> None:
        match envelope:
            case Opened(session=session, credit=size, shared=shared):
                self._ledgers[session] = _Ledger(size, shared=shared)
            case Credit(session=session, bytes=size) if session in self._ledgers:
                self._ledgers[session].earn(size)
        self._forget_if_over(envelope.session)

    def _forget_if_over(self, session: str) -> None:
        if session not in self._link.sessions:
            self._ledgers.pop(session, None)

    def close(self) -> None:
        """Close the socket. The broker then tells the workers that the sessions left open are incomplete."""
        if self._again is not None:
            self._again.cancel()
        if not self._link.socket.closed:
            self._loop.remove_reader(self._link.socket.fileno())
            self._link.close()
