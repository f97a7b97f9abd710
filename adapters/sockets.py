"""What all sockets of the bus share: queue policies, the rule on binds, options, and a folder for local sockets."""

from __future__ import annotations

import contextlib
import enum
import ipaddress
import os
import queue
import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import zmq
from scanside.engine.errors import ConfigError, EngineError
from scanside.engine.limits import Limits

__all__ = [
    "QUEUE_MESSAGES",
    "VIEWER_MESSAGES",
    "Outbox",
    "Policy",
    "SocketFolder",
    "check_bind",
    "configure",
    "receive_frames",
    "send_frames",
    "terminate",
]

QUEUE_MESSAGES = 1024
"""High-water mark of producers, workers and the broker. Credit bounds the bytes."""
VIEWER_MESSAGES = 16
"""High-water mark of viewers."""
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 2_000, 10_000
LONGEST_PATH = 107
"""Bytes of the path of a Unix socket on Linux."""

_NOW, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)

T = TypeVar("T")


class Policy(enum.StrEnum):
    """What a full queue does."""

    BLOCK = "block"
    """Its producer waits."""
    LATEST = "latest"
    """The newest wins, what it replaces is counted."""
    REFUSE = "refuse"
    """Its producer gets an error at once."""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def check_bind(endpoint: str, *, insecure: bool = False, keys: object | None = None) -> None:
    """Refuse to open a socket to the network without protection.

    `inproc`, `ipc` and loopback addresses may always be bound, everything else with CURVE `keys` or when `insecure` is asked
    for. Raises `ConfigError`, also for endpoints that are not of the form transport://address.
    """
    transport, found, address = endpoint.partition("://")
    if not found or transport not in ("inproc", "ipc", "tcp") or not address:
        raise ConfigError(f"cannot bind {endpoint!r}: expected inproc://NAME, ipc://PATH or tcp://ADDRESS:PORT")
    if transport != "tcp" or insecure or keys is not None:
        return
    host, _, port = address.rpartition(":")
    if not (_is_loopback(host) and re.fullmatch(r"\d{1,5}|\*", port)):
        raise ConfigError(
            f"refusing to bind {endpoint}: it can be reached from other hosts, and the bus would trust whoever connects; "
            "give CURVE keys, bind tcp://127.0.0.1:PORT, or say --insecure on a network that is closed"
        )


def configure(socket: zmq.Socket[bytes], limits: Limits, *, queue_messages: int = QUEUE_MESSAGES) -> zmq.Socket[bytes]:
    """Set the options that every socket of the bus has, and return the socket."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, queue_messages)
    socket.setsockopt(zmq.RCVHWM, queue_messages)
    socket.setsockopt(zmq.MAXMSGSIZE, max(limits.bus_frame_bytes, limits.envelope_bytes))
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)
    return socket


def send_frames(socket: zmq.Socket[bytes], frames: Sequence[bytes | bytearray | memoryview | zmq.Frame]) -> None:
    """Send a message without waiting, large frames without a copy. Raises `zmq.Again` when the socket takes no more.

    For a fifth of what pyzmq's `send_multipart` costs.
    """
    last = len(frames) - 1
    for number, frame in enumerate(frames):
        socket.send(frame, _MORE if number < last else _NOW, copy=False, track=False)


def receive_frames(socket: zmq.Socket[bytes]) -> list[zmq.Frame]:
    """Receive a message without waiting and without a copy. Raises `zmq.Again` when there is none."""
    frames = [socket.recv(_NOW, copy=False, track=False)]
    while frames[-1].more:
        frames.append(socket.recv(_NOW, copy=False, track=False))
    return frames


def terminate(context: zmq.Context[zmq.Socket[bytes]], timeout: float = 10.0) -> None:
    """Terminate a context. Raises `EngineError` when a socket of it is still open after `timeout` seconds."""
    thread = threading.Thread(target=context.term, name="scanside-term", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise EngineError(f"the ZeroMQ context did not end within {timeout:g} s; a socket of it was not closed")


class SocketFolder:
    """A folder for `ipc` sockets that only its owner can enter."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="scanside-")  # made with mode 0700
        self.path = Path(self._folder.name)

    def endpoint(self, name: str) -> str:
        """The endpoint of the socket called `name`. Raises `ConfigError` where its path would be too long."""
        path = str(self.path / name)
        if len(os.fsencode(path)) > LONGEST_PATH:
            raise ConfigError(
                f"path of a local socket {path} is over {LONGEST_PATH} bytes; set TMPDIR to a shorter folder"
            )
        return f"ipc://{path}"

    def remove(self) -> None:
        """Delete the folder and the sockets in it."""
        self._folder.cleanup()


class Outbox(Generic[T]):
    """What other threads hand to the one that owns a socket (policy `block`); `fd` becomes readable for its poller."""

    def __init__(self, size: int = QUEUE_MESSAGES) -> None:
        self._queue: queue.Queue[T] = queue.Queue(size)
        self._lock = threading.RLock()  # a signal handler may call `wake` while this thread is in it
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def put(self, item: T, timeout: float | None = None, *, wake: bool = True) -> None:
        """Hand over an item; waits while the outbox is full. Raises `EngineError` after `timeout` s or when it is closed.

        Without `wake` it is taken with the next item that has it.
        """
        try:
            self._queue.put(item, timeout=timeout)
        except queue.Full:
            raise EngineError(f"the bus did not take a message within {timeout:g} s") from None
        if wake:
            self.wake()

    def wake(self) -> None:
        """Make `fd` readable. Raises `EngineError` when the outbox is closed."""
        with self._lock:
            if self.fd < 0:
                raise EngineError("this end of the bus is closed")
            os.eventfd_write(self.fd, 1)

    def take(self) -> Iterator[T]:
        """All items that wait, in order; to be called by the owner of the socket."""
        with contextlib.suppress(BlockingIOError):  # nobody woke us since the last time; items may be left from then
            os.eventfd_read(self.fd)
        while True:
            try:
                yield self._queue.get_nowait()
            except queue.Empty:
                return

    def close(self) -> None:
        """Give the descriptor back; what still waits is dropped."""
        with self._lock:
            fd, self.fd = self.fd, -1
            if fd >= 0:
                os.close(fd)
