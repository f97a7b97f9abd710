"""The scanner's side of a connection: sends stored or simulated scans to any server that speaks MRD version 1.

One thread receives while the caller sends, as scanners do. The client notes when the last readout of each frame was handed
to the kernel and when each image was whole, so that latency is measured where a scanner would feel it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Self
from xml.sax.saxutils import escape

import msgspec
import numpy as np
from scanside.engine.config import Value
from scanside.engine.errors import DeliveryError, PeerError, StreamError
from scanside.engine.limits import DEFAULT_LIMITS, Limits
from scanside.engine.messages import AcquisitionBatch, Image, WaveformRecord
from scanside.engine.streaming.triggers import ReadoutKind, runs

from . import mrd
from .mrd_framing import Frame, Framer
from .mrd_lengths import MessageId

__all__ = ["Arrival", "Dependency", "ScanClient", "config_text"]

_COUNTERS = ("slice", "contrast", "phase", "repetition", "set")
"""Counters that an image has in common with the readouts of its frame."""
_PATIENCE = 1.0
"""Seconds in which a server that broke the connection may still tell why."""

_Key = tuple[int, ...]


class Dependency(msgspec.Struct, frozen=True):
    """Answer to a question for the noise measurement that a scan depends on."""

    meta: dict[str, list[str]]


class Arrival(msgspec.Struct, frozen=True, eq=False):
    """Something the server sent; a plain string is a text for the operator.

    at: monotonic time in s at which it was whole. latency: of an image, s since the last readout of its frame was handed to
    the kernel; None where no readout with its counters was sent.
    """

    item: Image | str | mrd.Response | mrd.Dicom | Dependency | AcquisitionBatch | WaveformRecord
    at: float
    latency: float | None = None


def config_text(name: str, overrides: Mapping[str, Value] | None = None) -> str:
    """A Gadgetron chain that asks a scanside server for configuration `name`, with values replaced by dotted path."""
    values = {"scanside.config": name, **(overrides or {})}
    properties = "".join(
        f"<property><name>{escape(path)}</name><value>{escape(str(value))}</value></property>"
        for path, value in values.items()
    )
    return f"<configuration><stream><gadget><name>scanside</name>{properties}</gadget></stream></configuration>"


class ScanClient:
    """One session with a server; a context manager that connects and hangs up.

    timeout: s to connect, and the longest silence of a server that is waited for. bits: 1 to 32 sends acquisitions in
    NHLBI compression of so many bits per float, 0 sends them as they are. on_arrival: called in the receiving thread with
    everything that comes, and must not raise; without it, things wait for `arrivals`.

    readouts, bytes_sent, bytes_received: so far. late: readouts that went out more than one interval after their time.
    closed: the server said CLOSE. Every method that sends raises PeerError when the server has ended the session (with its
    last words) and DeliveryError when it takes no data.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 9002,
        *,
        timeout: float = 10.0,
        bits: int = 0,
        limits: Limits = DEFAULT_LIMITS,
        on_arrival: Callable[[Arrival], None] | None = None,
    ) -> None:
        self.host, self.port, self.timeout, self.bits = host, port, timeout, bits
        self.readouts = self.bytes_sent = self.bytes_received = self.late = 0
        self.closed = False
        self._limits, self._on_arrival = limits, on_arrival
        self._socket: socket.socket | None = None
        self._receiver: threading.Thread | None = None
        self._changed = threading.Condition()
        self._arrived: deque[Arrival] = deque()
        self._answers: dict[int, str] = {}
        self._asked = 0
        self._over = False
        self._hung_up = False
        self._ended = False
        self._failure: StreamError | None = None
        self._last_words = ""
        self._handed: dict[_Key, float] = {}
        self._due = 0.0

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.hang_up()

    def connect(self) -> None:
        """Open the connection. Raises DeliveryError when there is no server."""
        try:
            self._socket = socket.create_connection((self.host, self.port), self.timeout)
        except OSError as error:
            raise DeliveryError(
                f"no server answers at {self.host}:{self.port} ({error}); start one with `scanside serve -p {self.port}`"
            ) from None
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._receiver = threading.Thread(target=self._receive, args=(self._socket,), name="scan-client", daemon=True)
        self._receiver.start()

    def hang_up(self) -> None:
        """Close the connection, whatever is still under way; what has arrived stays."""
        sock, self._socket = self._socket, None
        if sock is None:
            return
        self._hung_up = True
        with contextlib.suppress(OSError):  # the server may have been faster
            sock.shutdown(socket.SHUT_RDWR)
        if self._receiver is not None:
            self._receiver.join()
        sock.close()

    # --- sending -----------------------------------------------------------------------------------------------------------

    def configure(self, name: str) -> None:
        """Ask for the configuration that the server knows as `name`. Raises ConfigError for a name over 1023 bytes."""
        self._send(mrd.encode_config_file(name))

    def configure_text(self, text: str | bytes) -> None:
        """Send a whole configuration; `config_text` makes one."""
        self._send(mrd.encode_config_text(text))

    def header(self, xml: str | bytes) -> None:
        """Send the header of the scan; bytes go out unchanged."""
        self._send(mrd.encode_header(xml))

    def text(self, sentence: str) -> None:
        """Send a text."""
        self._send(mrd.encode_text(sentence))

    def parameters(self, values: Mapping[str, Value]) -> None:
        """Send parameters as a FIRE or OpenRecon console does, after the header; the server answers in that dialect then."""
        self.text(json.dumps({"parameters": dict(values)}))

    def acquisitions(self, batch: AcquisitionBatch, interval: float = 0.0) -> None:
        """Send readouts; `interval` s apart, by a schedule that runs on from one call to the next, or at once."""
        messages = _Messages(batch, self.bits)
        for part, kind in runs(batch.headers):
            key = _key(batch.headers[part.start]["idx"]) if kind is ReadoutKind.IMAGING else None
            for start, stop in _pieces(part, single=interval > 0):
                self._pace(interval)
                self._send(messages.span(start, stop))
                if key is not None:
                    self._handed[key] = time.monotonic()
                self.readouts += stop - start

    def waveform(self, record: WaveformRecord) -> None:
        """Send a waveform."""
        self._send(mrd.encode_waveform(record))

    def image(self, item: Image) -> None:
        """Send an image, as image-only sessions do."""
        self._send(*mrd.encode_image(item))

    def query(self, text: str) -> str:
        """Ask the server a question, e.g. "gadgetron::version", and wait for its answer."""
        self._asked += 1
        number = self._asked
        self._send(mrd.encode_query(mrd.Query(number, text)))
        with self._changed:
            while number not in self._answers:
                if self._over:
                    raise self._ending()
                self._wait(f"an answer to {text!r}", self.timeout)
            return self._answers.pop(number)

    def end_scan(self) -> None:
        """Say that no more data follows; the server goes on sending until its own CLOSE. Once is enough."""
        if not self._ended:
            self._ended = True
            self._send(mrd.encode_close())

    # --- receiving ---------------------------------------------------------------------------------------------------------

    def arrivals(self, timeout: float | None = None) -> Iterator[Arrival]:
        """What the server sends, in its order, until its end; `closed` says whether that end was a CLOSE.

        Raises DeliveryError after `timeout` s of silence (the client's own without it), StreamError for what is no MRD
        message.
        """
        while True:
            with self._changed:
                while not self._arrived and not self._over:
                    self._wait("the server's CLOSE", self.timeout if timeout is None else timeout)
                if not self._arrived:
                    break
                item = self._arrived.popleft()
            yield item
        if self._failure is not None:
            raise self._failure

    def _wait(self, what: str, timeout: float) -> None:
        """Wait for the next sign of the server; the condition is held."""
        before = self.bytes_received
        if not self._changed.wait(timeout) and self.bytes_received == before:
            raise DeliveryError(
                f"{self.host}:{self.port} was silent for {timeout:g} s while {what} was awaited; allow it more time"
            )

    def _receive(self, sock: socket.socket) -> None:
        """Runs in its own thread until the server is done or the caller hangs up."""
        framer = Framer(self._limits)
        try:
            while not self.closed:
                try:
                    nbytes = sock.recv_into(framer.buffer())
                except TimeoutError:  # the timeout of the socket is for sending
                    continue
                if not nbytes:
                    break
                at = time.monotonic()
                self.bytes_received += nbytes
                for frame in framer.advance(nbytes):
                    self._take(frame, at)
            if not self.closed and not self._hung_up:
                framer.finish()
        except StreamError as error:
            self._failure = error
        except OSError as error:
            if not self._hung_up:
                self._last_words = self._last_words or str(error)
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def _take(self, frame: Frame, at: float) -> None:
        if frame.id == MessageId.CLOSE:
            self.closed = True
            return
        arrival = self._arrival(frame, at)
        if isinstance(arrival.item, str):
            self._last_words = arrival.item
        with self._changed:
            if isinstance(arrival.item, mrd.Response):
                self._answers[arrival.item.correlation] = arrival.item.text
            elif self._on_arrival is None:
                self._arrived.append(arrival)
            self._changed.notify_all()
        if self._on_arrival is not None:
            self._on_arrival(arrival)

    def _arrival(self, frame: Frame, at: float) -> Arrival:
        if frame.id == MessageId.IMAGE:
            image = mrd.image(frame)
            handed = self._handed.get(_key(image.header))
            return Arrival(image, at, None if handed is None else at - handed)
        if frame.id == MessageId.ACQUISITION:
            return Arrival(mrd.acquisitions(frame, at), at)
        if frame.id == MessageId.DEPENDENCY:
            return Arrival(Dependency(mrd.dependency(frame)), at)
        decode = _DECODERS.get(frame.id)
        if decode is None:
            raise PeerError(f"message {frame.id} has no place in what a server sends to a client", offset=frame.offset)
        return Arrival(decode(frame), at)

    # --- helpers -----------------------------------------------------------------------------------------------------------

    def _send(self, *buffers: bytes | memoryview) -> None:
        sock = self._socket
        if sock is None:
            raise DeliveryError("not connected; call connect() or use the client in a `with` block")
        if self._over:
            raise self._ending()
        try:
            for buffer in buffers:
                sock.sendall(buffer)
                self.bytes_sent += len(buffer)
        except TimeoutError:
            raise DeliveryError(
                f"{self.host}:{self.port} took no data for {self.timeout:g} s; is it still running?"
            ) from None
        except OSError as error:
            with self._changed:
                self._changed.wait_for(lambda: self._over, _PATIENCE)
            raise self._ending(str(error)) from None

    def _ending(self, otherwise: str = "it gave no reason") -> StreamError:
        """Why the session is over, in the server's own words where it had any."""
        return self._failure or PeerError(f"the server ended the session: {self._last_words or otherwise}")

    def _pace(self, interval: float) -> None:
        """Wait until the next readout is due."""
        if not interval:
            return
        now = time.monotonic()
        self._due = self._due + interval if self._due else now
        if self._due > now:
            time.sleep(self._due - now)
        elif now - self._due > interval:
            self.late += 1


class _Messages:
    """The wire form of a batch, readout by readout without copies where all have one size."""

    def __init__(self, batch: AcquisitionBatch, bits: int) -> None:
        if bits:
            parts = [mrd.encode_compressed(_part(batch, index), bits) for index in range(len(batch))]
            ends = np.cumsum([0, *map(len, parts)])
            self._bytes, self._ends = memoryview(b"".join(parts)), ends
        else:
            self._bytes = memoryview(mrd.encode_acquisitions(batch))
            self._ends = np.arange(len(batch) + 1) * (len(self._bytes) // max(len(batch), 1))

    def span(self, start: int, stop: int) -> memoryview:
        return self._bytes[self._ends[start] : self._ends[stop]]


def _part(batch: AcquisitionBatch, index: int) -> AcquisitionBatch:
    part = slice(index, index + 1)
    trajectory = None if batch.trajectory is None else batch.trajectory[part]
    return AcquisitionBatch(headers=batch.headers[part], samples=batch.samples[part], trajectory=trajectory)


def _pieces(part: slice, *, single: bool) -> Iterator[tuple[int, int]]:
    """What goes out in one call: one readout, or a run without its last, whose hand-over starts the clock."""
    if single:
        yield from ((index, index + 1) for index in range(part.start, part.stop))
        return
    if part.stop - part.start > 1:
        yield part.start, part.stop - 1
    yield part.stop - 1, part.stop


def _key(record: np.void | np.ndarray) -> _Key:
    return tuple(int(record[name]) for name in _COUNTERS)


_DECODERS: dict[int, Callable[[Frame], str | mrd.Response | mrd.Dicom | WaveformRecord]] = {
    MessageId.TEXT: mrd.text,
    MessageId.ERROR: mrd.error,
    MessageId.RESPONSE: mrd.response,
    MessageId.DICOM: mrd.dicom,
    MessageId.WAVEFORM: mrd.waveform,
}
