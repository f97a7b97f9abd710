"""Shared by the tests on real sockets: one running server, a bare client, and scans as the bytes that travel."""

from __future__ import annotations

import functools
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from scanside.adapters import mrd
from scanside.adapters.files.ismrmrd_xml import header_xml
from scanside.adapters.mrd_framing import Frame, Framer
from scanside.adapters.server import ServeOptions, Server
from scanside.engine.messages import Image
from scanside.engine.simulation.scan import simulate_scan

os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")
CLOSE = int(mrd.MessageId.CLOSE)


class ScanBytes:
    """A simulated scan as messages: header XML, noise readouts, readouts one by one, and the image that should come out."""

    def __init__(self, matrix: int, coils: int, acceleration: int, repetitions: int) -> None:
        scan = simulate_scan(matrix, coils, acceleration, 16, repetitions=repetitions, noise_readouts=0, noise=1e-4)
        self.header = scan.header
        self.xml = header_xml(scan.header)
        self.messages = [mrd.encode_acquisitions(batch) for batch in scan.readouts(1)]
        self.reference = np.abs(scan.reference[0, 0])

    def session(self, config: str) -> bytes:
        """The whole session of a client."""
        return (
            mrd.encode_config_file(config) + mrd.encode_header(self.xml) + b"".join(self.messages) + mrd.encode_close()
        )


class Wire:
    """A client that knows no protocol: sends bytes, and collects the frames that come back until the stream ends."""

    def __init__(self, port: int, *, receive_bytes: int = 0) -> None:
        self.socket = socket.socket()
        if receive_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.settimeout(20)
        self.socket.connect(("127.0.0.1", port))
        self.frames: list[Frame] = []
        self.ended = False
        """Whether the server closed the stream in order."""
        self._framer = Framer()

    def send(self, *parts: bytes) -> Wire:
        """Send everything at once."""
        self.socket.sendall(b"".join(parts))
        return self

    def half_close(self) -> Wire:
        """Send no more."""
        self.socket.shutdown(socket.SHUT_WR)
        return self

    def finish(self, seconds: float = 20) -> Wire:
        """Collect everything until the server closes the stream."""
        return self.until(lambda: False, seconds)

    def until(self, done: Callable[[], bool], seconds: float = 20) -> Wire:
        """Collect until `done`, or until the server closes the stream."""
        deadline = time.monotonic() + seconds
        while not done() and not self.ended:
            self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
            data = self.socket.recv(1 << 20)
            if data:
                self.frames += [single for frame in self._framer.feed(data) for single in frame.split()]
            else:
                self.ended = True
        return self

    @property
    def ids(self) -> list[int]:
        """Ids of what came, in order."""
        return [frame.id for frame in self.frames]

    @property
    def texts(self) -> list[str]:
        """What the console would show."""
        return [mrd.text(frame) for frame in self.frames if frame.id == mrd.MessageId.TEXT]

    @property
    def images(self) -> list[Image]:
        """Images that came."""
        return [mrd.image(frame) for frame in self.frames if frame.id == mrd.MessageId.IMAGE]

    @property
    def closed_properly(self) -> bool:
        """Whether there was exactly one CLOSE, nothing after it, and then the end of the stream."""
        return self.ended and self.ids.count(CLOSE) == 1 and self.ids[-1] == CLOSE and not self._framer.pending

    def close(self) -> None:
        """Hang up."""
        self.socket.close()


def worker_of(pid: int) -> int:
    """Process id of the first worker that the server in process `pid` has; 0 where it has none."""
    children = {
        entry for task in Path(f"/proc/{pid}/task").iterdir() for entry in (task / "children").read_text().split()
    }
    found = (int(child) for child in children if b"adapters.worker" in Path(f"/proc/{child}/cmdline").read_bytes())
    return next(found, 0)


@pytest.fixture(scope="session", name="worker_of")
def _worker_of() -> Callable[[int], int]:
    return worker_of


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server on free ports, one for all tests."""
    options = ServeOptions(port=0, metrics_port=0, threads=1, handshake_seconds=1.0, drain_seconds=2.0)
    with Server(options) as running:
        yield running


@pytest.fixture
def connect(server: Server) -> Iterator[Callable[..., Wire]]:
    """Makes bare clients of `server`, or of another port, and hangs all of them up in the end."""
    made: list[Wire] = []

    def make(port: int | None = None, *, receive_bytes: int = 0) -> Wire:
        made.append(Wire(server.port if port is None else port, receive_bytes=receive_bytes))
        return made[-1]

    yield make
    for wire in made:
        wire.close()


@pytest.fixture(scope="session")
def scan_bytes() -> Callable[..., ScanBytes]:
    """Simulated scans as bytes: a function of matrix, coils, acceleration and repetitions."""

    @functools.cache
    def make(matrix: int = 32, coils: int = 4, acceleration: int = 1, repetitions: int = 1) -> ScanBytes:
        return ScanBytes(matrix, coils, acceleration, repetitions)

    return make
