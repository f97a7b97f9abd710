"""Ends of the bus for other programs: a producer of raw data, and a viewer of what comes out. Both have blocking calls."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Self

import zmq
from scanside.engine.errors import (
    DeadlineMissed,
    DeviceLost,
    EngineError,
    LimitExceeded,
    PeerError,
    ScansideError,
    StreamError,
    TruncatedMessage,
)
from scanside.engine.limits import DEFAULT_LIMITS, Limits

from .envelope import (
    LINK,
    Adapter,
    Adjust,
    Adjusted,
    Credit,
    Data,
    End,
    Envelope,
    Failed,
    Nack,
    Note,
    Open,
    Opened,
    Refused,
    Result,
    check_payload,
    cost,
    decode,
    new_session,
)
from .link import Bytes, Link, Received, Station
from .sockets import VIEWER_MESSAGES, Policy, configure

__all__ = ["Producer", "Published", "Subscriber", "Value", "payload_size"]

Value = str | int | float | bool
"""Of a parameter."""
UNREAD_RESULTS = 64
"""Results that a producer keeps before `send` waits for someone to read them."""
NOTES = 100
"""Notes that a producer keeps; the newest (policy `latest`)."""
TOPICS = 1024
"""Topics whose counts a viewer follows."""
TURN = 0.5
"""Longest wait of one turn of a producer's thread, in s."""
SILENCE = 20.0
"""A producer that has a session and hears nothing for so many seconds gives it up."""


def payload_size(payload: Sequence[Bytes]) -> int:
    """Bytes of all frames together."""
    return sum(memoryview(part).nbytes for part in payload)


def _error(envelope: Failed | Refused) -> ScansideError:
    kinds: dict[str, type[StreamError] | type[DeviceLost]] = {
        "device": DeviceLost,
        "protocol": PeerError,
        "limit": LimitExceeded,
        "truncated": TruncatedMessage,
    }
    kind = kinds.get(envelope.reason)
    return kind(envelope.text) if kind else EngineError(f"{envelope.reason}: {envelope.text}")


class Producer:
    """Sends raw data of one session at a time and receives its images; may be used from several threads.

    A thread of its own keeps the session alive while the caller acquires. Nothing is dropped: `send` waits while there is no
    credit, and while 64 results are unread, so read `results` in another thread or after `end`.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self._link = Link(context or zmq.Context.instance(), endpoint, limits=limits)
        self._station = Station(self._link)
        self._changed = threading.Condition()
        self._session = LINK
        self._credit = 0
        self._since = 0.0
        self._opened = self._over = self._closing = False
        self._error: ScansideError | None = None
        self._results: deque[Received] = deque()
        self._adjusted: deque[int] = deque(maxlen=NOTES)
        self.returned = 0
        """Credit that came back in this session: it comes in the order of the messages, so it says what was used."""
        self.asked_again: deque[tuple[int, int]] = deque(maxlen=NOTES)
        """Photoacoustic frames that the worker misses, first and last of each gap."""
        self.notes: deque[Note] = deque(maxlen=NOTES)
        """What the worker wants the operator to know, newest last."""
        self._thread = threading.Thread(target=self._run, name="scanside-producer", daemon=True)
        self._thread.start()

    @property
    def credit(self) -> int:
        """Bytes that may be sent before the worker has consumed something."""
        return self._credit

    @property
    def session(self) -> str:
        """Id of the session, in hexadecimal digits."""
        return self._session

    def open(
        self,
        config: str,
        *,
        adapter: Adapter = "mrd",
        dialect: str = "",
        parameters: Mapping[str, Value] | None = None,
        timeout: float = 60.0,
    ) -> None:
        """Start a session and wait until a worker has accepted it; the fields are those of `Open`.

        Raises the error that the refusal stands for, `DeadlineMissed` after `timeout` seconds, `EngineError` while a session
        is open.
        """
        with self._changed:
            if self._session != LINK and not self._over:
                raise EngineError("a session is open; end it and read its results first")
            self._session, self._credit, self._error = new_session(), 0, None
            self._opened = self._over = False
            self._since = time.monotonic()
            self._results.clear()
            self.asked_again.clear()
            self.returned = 0
        request = Open(
            session=self._session, config=config, adapter=adapter, dialect=dialect, parameters=dict(parameters or {})
        )
        self._station.post(request, timeout=timeout)
        if not self._wait(lambda: self._opened, timeout):
            self._station.post(
                Failed(session=self._session, reason="deadline", text="nobody accepted the session in time")
            )
            self._finish(None)
            raise DeadlineMissed(f"the session was not opened within {timeout:g} s; is `scanside serve` running?")

    def wait_credit(self, timeout: float | None = None) -> bool:
        """Wait until something may be sent; false after `timeout` seconds. Raises what ended the session."""
        return self._wait(lambda: self._credit > 0 and len(self._results) < UNREAD_RESULTS, timeout)

    def send(
        self,
        payload: Sequence[Bytes],
        *,
        messages: int = 1,
        received: int | None = None,
        policy: Policy = Policy.BLOCK,
        timeout: float | None = None,
    ) -> None:
        """Send payload frames; those from 64 KiB go without a copy and must not change afterwards.

        `messages`: how many are in the payload; `received`: time in ns of its last byte, now by default; give 0 where the clock
        is not the worker's. Without credit, and while 64 results are unread, `block` waits and `refuse` does not. Raises
        `DeadlineMissed` when that was in vain, or what ended the session.
        """
        size = payload_size(payload)
        when = time.monotonic_ns() if received is None else received
        with self._changed:
            if not self.wait_credit(0 if policy is Policy.REFUSE else timeout):
                raise DeadlineMissed(
                    f"no credit ({self._credit} bytes), {len(self._results)} results unread; nothing was sent"
                )
            self._credit -= cost(size)
        data = Data(session=self._session, bytes=size, messages=messages, received=when)
        self._station.post(data, payload, timeout)

    def adjust(self, values: Mapping[str, Value], *, everyone: bool = False) -> None:
        """Change how this session, or with `everyone` all photoacoustic ones, reconstruct from now on; see `Adjust`."""
        self._station.post(Adjust(session=LINK if everyone else self._session, parameters=dict(values)))

    def wait_adjusted(self, timeout: float) -> int:
        """To how many sessions the change was passed on. Raises `DeadlineMissed` when the broker does not answer."""
        with self._changed:
            if not self._changed.wait_for(lambda: bool(self._adjusted), timeout):
                raise DeadlineMissed(f"no answer within {timeout:g} s; is `scanside serve --bus` running?")
            return self._adjusted.popleft()

    def end(self, *, complete: bool = True) -> None:
        """Say that no more data follows. Results still arrive until the worker is done."""
        self._station.post(End(session=self._session, complete=complete))

    def results(self, timeout: float | None = None) -> Iterator[tuple[Result, list[memoryview]]]:
        """Results in order until the worker is done, as envelope and MRD messages.

        Raises `DeadlineMissed` when none comes for `timeout` seconds, or what ended the session.
        """
        while True:
            if not self._wait(lambda: bool(self._results) or (self._over and self._error is None), timeout):
                raise DeadlineMissed(f"no result for {timeout:g} s")
            with self._changed:
                if not self._results:
                    return
                envelope, payload = self._results.popleft()
                self._changed.notify_all()
            if isinstance(envelope, Result):
                yield envelope, payload

    def _wait(self, holds: Callable[[], bool], timeout: float | None) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: holds() or self._over or self._closing, timeout)
            if holds():
                return True
            if self._error is not None:
                raise self._error
            if self._over or self._closing:
                raise EngineError("the session is over" if self._over else "the producer is closed")
            return False

    def _run(self) -> None:
        self._station.adopt()
        while not self._closing:
            for received in self._station.poll(TURN):
                self._take(received)
            self._check_silence()

    def _take(self, received: Received) -> None:
        envelope = received.envelope
        if isinstance(envelope, Adjusted):
            with self._changed:
                self._adjusted.append(envelope.sessions)
                self._changed.notify_all()
            return
        if envelope.session != self._session:
            return
        with self._changed:
            match envelope:
                case Opened(credit=size):
                    self._opened, self._credit = True, size
                case Credit(bytes=size):
                    self._credit += size
                    self.returned += size
                case Nack(first=first, last=last):
                    self.asked_again.append((first, last))
                case Result():
                    self._results.append(received)
                case Note():
                    self.notes.append(envelope)
                case End():
                    self._finish(None)
                case Failed() | Refused():
                    self._finish(_error(envelope))
            self._changed.notify_all()

    def _finish(self, error: ScansideError | None) -> None:
        self._over, self._error, self._credit = True, error, 0

    def _check_silence(self) -> None:
        with self._changed:
            silent = time.monotonic() - max(self._link.heard, self._since)
            if self._session != LINK and not self._over and silent > SILENCE:
                self._finish(DeviceLost(f"nothing was heard from the broker for {SILENCE:g} s"))
                self._changed.notify_all()

    def close(self) -> None:
        """Stop the thread and close the socket. A session that is still open ends as incomplete."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._station.wake()
            self._thread.join()
        self._station.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Published(NamedTuple):
    """What a viewer gets; the payload are read-only views."""

    topic: str
    envelope: Envelope
    payload: list[memoryview]


class Subscriber:
    """A viewer. It never slows the broker: of images that come faster than `poll` is called only the newest is kept.

    `topics`: prefixes, e.g. "image." for the images of all sessions, "stats", "note". `fileno` may be watched by an event loop,
    which then calls `poll(0)`; it tells of a change only once, and `poll` takes everything that is there.
    """

    def __init__(
        self,
        endpoint: str,
        topics: Sequence[str],
        *,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self._limits = limits
        self._socket = configure(
            (context or zmq.Context.instance()).socket(zmq.SUB), limits, queue_messages=VIEWER_MESSAGES
        )
        for topic in topics:
            self._socket.setsockopt_string(zmq.SUBSCRIBE, topic)
        self._socket.connect(endpoint)
        self._next: OrderedDict[str, int] = OrderedDict()
        self.missed = 0
        """Messages that were published and that `poll` did not return: not sent for want of room, or replaced by a newer one."""

    def fileno(self) -> int:
        """Descriptor that becomes readable when something changes."""
        return int(self._socket.fileno())

    def poll(self, timeout: float) -> list[Published]:
        """Wait up to `timeout` seconds; return what arrived, of each session only the newest image (policy `latest`).

        Raises `PeerError` or `LimitExceeded` for a message that docs/wire.md does not allow.
        """
        if not self._socket.poll(math.ceil(timeout * 1e3)):
            return []
        found: list[Published] = []
        newest: dict[str, int] = {}
        for item in iter(self._receive, None):
            place = newest.get(item.topic)
            if place is not None:
                found[place] = item
                self.missed += 1
                continue
            if isinstance(item.envelope, Result):
                newest[item.topic] = len(found)
            found.append(item)
        return found

    def _receive(self) -> Published | None:
        try:
            topic, count, envelope, *payload = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        except ValueError:
            raise PeerError("a published message has a topic, a count and an envelope; something is missing") from None
        name = topic.bytes.decode("ascii", "replace")
        self._notice(name, int.from_bytes(count.bytes, "little"))
        opened = decode(envelope.buffer, self._limits)
        check_payload(opened, [len(frame) for frame in payload], self._limits)
        return Published(name, opened, [frame.buffer for frame in payload])

    def _notice(self, topic: str, count: int) -> None:
        self.missed += max(0, count - self._next.pop(topic, count))
        self._next[topic] = count + 1
        if len(self._next) > TOPICS:
            self._next.popitem(last=False)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
