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

from scanside.engine.config import ConfigStore
from scanside.engine.limits import DEFAULT_LIMITS, Limits

from .bus import AsyncPort
from .connection import Connection, ConnectionOptions, Phase
from .envelope import Envelope, Result
from .metrics import Metrics
from .recovery import Recovery
from .spooling import Spool

__all__ = ["ConnectionOptions", "Gateway", "listen"]

WATCH_SECONDS = 0.25
STOP_WATCH_SECONDS = 0.02
BACKLOG = 128
SEND_BYTES = 1 << 20
"""Send buffer asked for, so that an image of 256 KiB goes out in one piece however slowly the network takes it."""
IDLE_CONNECTIONS = 64
"""Connections beyond the limit on sessions, for those that ask, wait or say good-bye."""


def listen(host: str, port: int) -> socket.socket:
    """Listening socket; an empty `host` or `::` takes both IPv6 and IPv4, 0 any free port. Raises `OSError`."""
    if host in ("", "::") and socket.has_dualstack_ipv6():
        listening = socket.create_server(("::", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
    else:
        family, _, _, _, address = socket.getaddrinfo(
            "0.0.0.0" if host in ("", "::") else host,  # noqa: S104 - asked for
            port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
        )[0]
        listening = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    if listening.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < SEND_BYTES:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
    return listening


class Gateway:
    """Accepts scanners and connects each of them to a session on the bus. All methods belong to the loop's thread."""

    def __init__(
        self,
        store: ConfigStore,
        port: AsyncPort,
        metrics: Metrics,
        answer: Callable[[str], str],
        *,
        options: ConnectionOptions | None = None,
        limits: Limits = DEFAULT_LIMITS,
        spool: Spool | None = None,
    ) -> None:
        self.store, self.port, self.metrics, self.answer = store, port, metrics, answer
        self.options = options or ConnectionOptions()
        self.limits = limits
        self.spool = spool
        self.recovery = Recovery()
        self.connections: set[Connection] = set()
        self.sessions: dict[str, Connection] = {}
        """Connections by the session that they have on the bus."""
        self._server: asyncio.Server | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen on `host`:`port` (see `listen`); returns the port."""
        loop = asyncio.get_running_loop()
        listening = listen(host, port)
        self._server = await loop.create_server(lambda: Connection(self), sock=listening, backlog=BACKLOG)
        self._watcher = loop.create_task(self._watch())
        self.metrics.watch_queue("gateway", self.waiting)
        return int(listening.getsockname()[1])

    async def stop(self, sessions_seconds: float = 0.0, images_seconds: float = 1.0) -> None:
        """Stop listening, let sessions end, and close every connection.

        A session has `sessions_seconds` to end by itself. After that it is cut off: what it had received is reconstructed,
        for which it has `images_seconds` more, and its peer is told.
        """
        if self._server is None or self._watcher is None:
            return
        self._server.close()
        await self._until(lambda: not any(c.busy for c in self.connections), sessions_seconds)
        for connection in list(self.connections):
            connection.fail("the server is shutting down", "shutdown", linger=False)
            if connection.phase is Phase.DRAINING:
                connection.drop()
        await self._until(lambda: not self.connections, images_seconds)
        for connection in list(self.connections):
            connection.abort()
        await self._until(lambda: not self.connections, images_seconds)
        self._watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watcher
        await self._server.wait_closed()

    @staticmethod
    async def _until(condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            await asyncio.sleep(STOP_WATCH_SECONDS)

    def deliver(self, envelope: Envelope, payload: list[memoryview]) -> None:
        """Take a message of the bus for one of the connections."""
        connection = self.sessions.get(envelope.session)
        if connection is not None:
            connection.from_bus(envelope, payload)
        elif isinstance(envelope, Result) and (envelope.image or envelope.series):
            self.metrics.dropped("mrd", "gone")

    def waiting(self) -> int:
        """Pieces of received data that wait for credit; any thread may ask."""
        return sum(len(connection.feed) for connection in list(self.connections))

    def joined(self, connection: Connection) -> None:
        """A connection was accepted."""
        self.connections.add(connection)
        most = self.limits.sessions + IDLE_CONNECTIONS
        if len(self.connections) > most:
            connection.fail(f"the server is busy: {most} connections are open; try again later", "busy", linger=False)

    def left(self, connection: Connection) -> None:
        """A connection is gone."""
        self.connections.discard(connection)
        self.sessions.pop(connection.feed.session, None)
        self.recovery.leave(connection)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = time.monotonic()
            for connection in list(self.connections):
                connection.check_time(now)
