"""The broker's sockets and its thread: one ROUTER between producers and workers, one PUB for viewers.

What is routed where is decided in `routing`; here frames are moved, without a copy.
"""

from __future__ import annotations

import math
import struct
import threading
import uuid
from collections.abc import Callable, Sequence
from typing import Self

import zmq
from scanside.engine.errors import EngineError
from scanside.engine.limits import DEFAULT_LIMITS, Limits

from .envelope import Envelope, Open
from .routing import BrokerStatus, BrokerTimes, Frames, Peer, Router
from .sockets import (
    VIEWER_MESSAGES,
    Outbox,
    SocketFolder,
    check_bind,
    configure,
    receive_frames,
    send_frames,
    terminate,
)

__all__ = ["BACKLOG_BYTES", "COUNT", "INPROC", "INPROC_VIEWERS", "Broker"]

INPROC = "inproc://bus"
"""Where producers of the same process connect, through the broker's context."""
INPROC_VIEWERS = "inproc://viewers"
BACKLOG_BYTES = 256 << 20
"""A producer for which more waits than this does not read, and counts as gone."""
COUNT = struct.Struct("<Q")
"""Second frame of what viewers get."""
BATCH = 256
"""Messages that are handled before anything else gets its turn."""
BEHIND_MS = 2
"""How long one turn of the loop waits while messages wait for a full connection; otherwise until a ping is due."""


class Broker:
    """Routes sessions between producers and workers, and shows viewers what comes out; in a thread of its own.

    `binds`: further endpoints of the ROUTER beside `inproc` and `ipc`, e.g. "tcp://127.0.0.1:9100". Raises `ConfigError`
    for one that other hosts can reach unless `insecure` is set; see `check_bind`.
    """

    def __init__(
        self,
        *,
        binds: Sequence[str] = (),
        insecure: bool = False,
        limits: Limits = DEFAULT_LIMITS,
        times: BrokerTimes | None = None,
    ) -> None:
        for endpoint in binds:
            check_bind(endpoint, insecure=insecure)
        self._binds = tuple(binds)
        self._folder = SocketFolder()
        self.endpoint = self._folder.endpoint("bus")
        """Where workers and producers of this host connect."""
        self.viewers = self._folder.endpoint("viewers")
        """Where viewers of this host connect."""
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        """For sockets of the same process; close them before `stop`."""
        self.bound: tuple[str, ...] = ()
        """The endpoints of `binds` with the ports that they got."""
        self.lender = b"gateway-" + uuid.uuid4().hex.encode()
        """Identity of the one producer whose payload may lie in the arena; keep it within this process."""
        self._router = Router(self._send, self._publish, limits, times or BrokerTimes(), lender=self.lender)
        self._socket = configure(self.context.socket(zmq.ROUTER), limits)
        self._viewers = configure(self.context.socket(zmq.PUB), limits, queue_messages=VIEWER_MESSAGES)
        self._commands: Outbox[bytes] = Outbox()
        self._behind: dict[bytes, Peer] = {}
        self._unreachable: dict[bytes, str] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="scanside-broker")

    # For any thread

    def start(self) -> Self:
        """Bind the sockets and start the thread. Raises `zmq.ZMQError` when an endpoint is taken; nothing stays open then."""
        try:
            self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self._socket.setsockopt(zmq.ROUTER_HANDOVER, 0)
            self._socket.bind(INPROC)
            self._socket.bind(self.endpoint)
            self._viewers.bind(INPROC_VIEWERS)
            self._viewers.bind(self.viewers)
            self.bound = tuple(self._bind(endpoint) for endpoint in self._binds)
        except zmq.ZMQError:
            self._close()
            self._release(10.0)
            raise
        self._thread.start()
        return self

    def _bind(self, endpoint: str) -> str:
        self._socket.bind(endpoint)
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def stop(self, timeout: float = 10.0) -> None:
        """Stop the thread, close the sockets, remove their folder and terminate the context.

        Raises `EngineError` when something of it takes longer than `timeout` seconds.
        """
        if self._thread.ident is None:
            self._close()
        else:
            self._stopping = True
            if self._thread.is_alive():
                self._commands.wake()
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise EngineError(f"the broker did not stop within {timeout:g} s")
        self._release(timeout)

    def _release(self, timeout: float) -> None:
        self._commands.close()
        self._folder.remove()
        terminate(self.context, timeout)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def observe(self, watch: Callable[[Open, Envelope | None], None]) -> None:
        """Let `watch` see the envelopes of all sessions, in the broker's thread; see `Router.observe`. Before `start`."""
        self._router.observe = watch

    def worker_lost(self, identity: bytes) -> None:
        """Say that the process of a worker has ended; its producers are told once all that it sent before is through."""
        self._commands.put(identity)

    @property
    def alive(self) -> bool:
        """Whether the broker's thread runs."""
        return self._thread.is_alive()

    def status(self) -> BrokerStatus:
        """Workers, number of sessions and counts at this moment."""
        return self._router.status()

    # In the broker's thread

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._commands.fd, zmq.POLLIN)
        try:
            while not self._stopping:
                ready = dict(poller.poll(BEHIND_MS if self._behind else math.ceil(1e3 * self._router.pause())))
                self._turn(commanded=self._commands.fd in ready)
        finally:
            self._close()

    def _turn(self, *, commanded: bool) -> None:
        drained = self._drain()
        if drained and commanded:
            for identity in self._commands.take():
                self._router.lost(identity, "its process ended")
        for peer in list(self._behind.values()):
            self._catch_up(peer)
        while self._unreachable:  # telling one peer may find that another is gone, too
            self._router.lost(*self._unreachable.popitem())
        self._router.tick(drained=drained)

    def _drain(self) -> bool:
        for _ in range(BATCH):
            try:
                identity, *frames = receive_frames(self._socket)
            except zmq.Again:
                return True
            self._router.receive(identity.bytes, frames)
        return False

    def _send(self, peer: Peer, frames: Frames) -> None:
        if peer.backlog or not self._try(peer, frames):
            self._put_back(peer, frames)

    def _try(self, peer: Peer, frames: Frames) -> bool:
        """Whether the message needs no further care: it was sent, or its receiver is gone."""
        try:
            send_frames(self._socket, [peer.identity, *frames])
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._unreachable[peer.identity] = "its connection is closed"
        return True

    def _put_back(self, peer: Peer, frames: Frames) -> None:
        peer.backlog.append(frames)
        peer.backlog_bytes += sum(len(frame) for frame in frames)
        self._behind[peer.identity] = peer
        if peer.backlog_bytes > BACKLOG_BYTES and peer.hello is None:  # what waits for a worker is bounded by credit
            self._unreachable[peer.identity] = "it does not read"

    def _catch_up(self, peer: Peer) -> None:
        while peer.backlog and self._try(peer, peer.backlog[0]):
            peer.backlog_bytes -= sum(len(frame) for frame in peer.backlog.popleft())
        if not peer.backlog:
            del self._behind[peer.identity]
            self._router.idle(peer)

    def _publish(self, topic: bytes, count: int, frames: Frames) -> None:
        send_frames(self._viewers, [topic, COUNT.pack(count), *frames])

    def _close(self) -> None:
        self._socket.close()
        self._viewers.close()
