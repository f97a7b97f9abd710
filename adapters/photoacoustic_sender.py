"""The device's side of a photoacoustic stream: sends frames to a scanside server as they are measured, and loses none.

::

    with PhotoacousticSender("tcp://127.0.0.1:9003", header, on_image=show) as sender:
        for samples in device:                       # (elements, samples), int16
            sender.send(samples, timestamp_s=clock())

`send` waits while the server is behind. When a connection or a worker is lost it opens a new session and sends again what was
not used; when the server misses a frame it gets it again. docs/wire.md says the same in bytes, for other languages.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import msgspec
import numpy as np
import zmq
from scanside.engine.errors import DeadlineMissed, DeviceLost, PeerError, ScansideError
from scanside.engine.limits import DEFAULT_LIMITS, Limits
from scanside.engine.messages import Image, PhotoacousticFrame, PhotoacousticHeader

from . import mrd
from .clients import Producer, Value
from .envelope import cost
from .link import Bytes
from .mrd_framing import Framer
from .mrd_lengths import MessageId
from .photoacoustic import encode_end, encode_frame, encode_header

__all__ = ["ArrivedImage", "PhotoacousticSender"]

KEPT_BYTES = 64 << 20
"""Frames that are kept to be sent again when the server asks for them, used or not."""
SHOTS = 4096
"""Shots whose time of sending is remembered."""
_PAUSE = 0.2
"""Between two attempts to connect again, in s."""


class ArrivedImage(msgspec.Struct, frozen=True, eq=False):
    """An image that came back. latency: s since the last frame of its shot was handed over; None for one sent long before."""

    image: Image
    latency: float | None


class _Sent(msgspec.Struct, eq=False):
    """A frame that may have to be sent again. upto: credit spent in this session when it was out; 0 for one of an earlier."""

    seq: int
    buffers: list[Bytes]
    size: int
    upto: int = 0


class PhotoacousticSender:
    """Sends one stream; a context manager that opens a session and, in the end, waits until everything was imaged.

    endpoint: the bus of a server, `scanside serve --bus`. config: the configuration that shall reconstruct. parameters: values
    of it by dotted path. checksum: send a CRC-32C with each frame. patience: s for which a lost connection is tried again.
    on_image: called in a thread of the sender with each image, must not raise; without it images only go to viewers. Raises
    DeadlineMissed when nobody answers, and what the server says when it refuses the stream.
    """

    def __init__(
        self,
        endpoint: str,
        header: PhotoacousticHeader,
        *,
        config: str = "pat/das",
        parameters: Mapping[str, Value] | None = None,
        checksum: bool = False,
        patience: float = 30.0,
        on_image: Callable[[ArrivedImage], None] | None = None,
        limits: Limits = DEFAULT_LIMITS,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        self.header = header
        self.frames_sent = self.reconnections = self.sent_again = 0
        self._head = encode_header(header)
        self._config, self._parameters = config, dict(parameters or {})
        self._checksum, self._patience, self._on_image = checksum, patience, on_image
        self._producer = Producer(endpoint, limits=limits, context=context)
        self._kept: deque[_Sent] = deque()
        self._kept_bytes = self._spent = 0
        self._next, self._last = 0, -1
        self._times: OrderedDict[int, float] = OrderedDict()
        self._reader: threading.Thread | None = None
        self._error: ScansideError | None = None

    def __enter__(self) -> Self:
        try:
            self._open(self._patience)
        except BaseException:
            self._producer.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._finish(complete=kind is None)
        finally:
            self._producer.close()
            self._stop_reading()

    @property
    def notes(self) -> list[str]:
        """What the server wants the operator to know, oldest first; the newest 100."""
        return [note.text for note in self._producer.notes]

    @property
    def unused(self) -> int:
        """Frames under way: sent, and not used by the server so far."""
        returned = self._producer.returned
        return sum(sent.upto > returned for sent in self._kept)

    def send(self, samples: np.ndarray, *, timeout: float | None = None, **fields: Any) -> None:  # noqa: ANN401 - see below
        """Send the samples of a shot, (elements, samples) of int16 or uint16, or some elements of it from `first_element` on.

        fields: those of `PhotoacousticFrame`, such as wavelength, timestamp_s, pulse_energy_joule, flags; `seq` and `shot`
        count by themselves. The array may be used again when the call returns. Raises PeerError for samples that do not fit
        the header, DeadlineMissed when the server takes nothing for `timeout` s.
        """
        fields = {"seq": self._next, "shot": fields.get("seq", self._next)} | fields
        self.send_frame(PhotoacousticFrame(samples=np.asarray(samples), **fields), timeout=timeout)

    def send_frame(self, frame: PhotoacousticFrame, *, timeout: float | None = None) -> None:
        """Send a frame with its own numbers; a number that is left out is a frame that the device has lost."""
        self._check(frame)
        head, raw = encode_frame(frame, checksum=self._checksum, host_ns=time.monotonic_ns())
        sent = _Sent(frame.seq, [head, bytes(raw)], len(head) + len(raw))
        self._keep(sent)
        self._again_if_asked(timeout)
        self._times[frame.shot] = time.monotonic()
        if len(self._times) > SHOTS:
            self._times.popitem(last=False)
        self._post(sent, timeout)
        self.frames_sent += 1
        self._next, self._last = max(self._next, frame.seq + 1), max(self._last, frame.seq)

    def adjust(self, **values: Value) -> None:
        """Change how the stream is reconstructed from now on: speed_of_sound, delay_samples, averages, autofocus."""
        self._producer.adjust(values)

    def _check(self, frame: PhotoacousticFrame) -> None:
        shape, header = frame.samples.shape, self.header
        fits = len(shape) == 2 and shape[1] == header.samples and 0 < shape[0] <= header.elements - frame.first_element
        if not fits or frame.samples.dtype.newbyteorder("=") != np.dtype(header.data_type):
            raise PeerError(
                f"samples are {frame.samples.dtype} {shape} from element {frame.first_element} on; "
                f"the header says {header.data_type} ({header.elements}, {header.samples})"
            )

    # The session

    def _open(self, timeout: float) -> None:
        self._producer.open(self._config, adapter="pat", parameters=self._parameters, timeout=timeout)
        self._spent, self._error = 0, None
        self._reader = threading.Thread(target=self._read, name="photoacoustic-images", daemon=True)
        self._reader.start()
        self._producer.send([self._head], received=0, timeout=timeout)
        self._spent += cost(len(self._head))

    def _post(self, sent: _Sent, timeout: float | None) -> None:
        while True:
            try:
                self._producer.send(sent.buffers, received=time.monotonic_ns(), timeout=timeout)
            except DeviceLost as lost:
                self._reconnect(lost, sent)
                continue
            self._spent += cost(sent.size)
            sent.upto = self._spent
            return

    def _reconnect(self, lost: DeviceLost, current: _Sent) -> None:
        """Open a new session and send what the old one had not used. Raises `lost` when that fails for too long."""
        deadline = time.monotonic() + self._patience
        returned = self._producer.returned
        waiting = [sent for sent in self._kept if sent.upto > returned and sent is not current]
        self._stop_reading()
        while True:
            try:
                self._open(max(0.1, deadline - time.monotonic()))
                for sent in self._kept:
                    sent.upto = 0
                for sent in waiting:
                    self._producer.send(sent.buffers, received=time.monotonic_ns(), timeout=self._patience)
                    self._spent += cost(sent.size)
                    sent.upto = self._spent
                    self.sent_again += 1
                self.reconnections += 1
                return
            except (DeviceLost, DeadlineMissed):
                if time.monotonic() > deadline:
                    raise lost from None
                time.sleep(_PAUSE)

    def _keep(self, sent: _Sent) -> None:
        self._kept.append(sent)
        self._kept_bytes += sent.size
        returned = self._producer.returned
        while self._kept_bytes > KEPT_BYTES and self._kept[0].upto <= returned and self._kept[0] is not sent:
            self._kept_bytes -= self._kept.popleft().size

    def _again_if_asked(self, timeout: float | None) -> None:
        """Send again what the server misses, where it is still there; a frame that never was cannot be."""
        while self._producer.asked_again:
            first, last = self._producer.asked_again.popleft()
            for sent in [sent for sent in self._kept if first <= sent.seq <= last and sent.upto]:
                self._post(sent, timeout)
                self.sent_again += 1

    def _finish(self, *, complete: bool) -> None:
        """End the stream and wait for its last images."""
        end = [encode_end(self._last, self.frames_sent)]
        while True:
            try:
                if complete:
                    self._again_if_asked(self._patience)
                    self._producer.send(end, received=0, timeout=self._patience)
                self._producer.end(complete=complete)
            except DeviceLost as lost:
                self._reconnect(lost, _Sent(-1, [], 0))
                continue
            except ScansideError:
                if complete:
                    raise
            self._stop_reading()
            if isinstance(self._error, DeviceLost) and complete and self.unused:
                lost_again, self._error = self._error, None
                self._reconnect(lost_again, _Sent(-1, [], 0))
                continue
            if self._error is not None and complete:
                raise self._error
            return

    # Images

    def _stop_reading(self) -> None:
        if self._reader is not None:
            self._reader.join()
            self._reader = None

    def _read(self) -> None:
        """Take what comes back until the session is over; runs in a thread."""
        try:
            for _, payload in self._producer.results():
                if self._on_image is not None:
                    self._arrive(b"".join(payload), time.monotonic())
        except ScansideError as error:
            self._error = error

    def _arrive(self, data: bytes, now: float) -> None:
        if self._on_image is None:
            return
        for frame in Framer().feed(data):
            if frame.id == MessageId.IMAGE:
                image = mrd.image(frame)
                sent = self._times.get(int(image.meta.get("scanside_shot", ["-1"])[0]))
                self._on_image(ArrivedImage(image, None if sent is None else now - sent))
