"""One scan on the inside of a worker: MRD messages in, MRD messages out, with the engine's session in between."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping

import msgspec
import numpy as np
from scanside.engine.config import ConfigStore, SystemConfig, Value, with_overrides
from scanside.engine.errors import ConfigError, PeerError, ScansideError
from scanside.engine.headers import AcquisitionFlag, has_flag
from scanside.engine.messages import (
    AcquisitionBatch,
    EndOfScan,
    Event,
    FrameStats,
    Image,
    Message,
    MissingFrames,
    Note,
    Parameters,
)
from scanside.engine.streaming.session import NoiseStore, Session

from . import mrd
from .grammar import Dialect, Role, parse_parameters, reply_text
from .mrd_composite import bucket
from .mrd_framing import Frame
from .mrd_header import parse_header
from .mrd_lengths import MessageId

__all__ = ["NOISE", "ROLE", "Reply", "Scan", "scan_for"]

# msgpack interns the keys that it unpacks; one that is kept here does not enter the interpreter's table anew each time
ROLE, NOISE = sys.intern("scanside.role"), sys.intern("scanside.noise")
"""Parameters of a bus session that say what it is for, and which noise measurement it asks about."""

Buffers = list[bytes | memoryview]

BUFFERS_REFUSAL = (
    "message 1023 (buffers, of BucketToBufferGadget) is not supported, since sorting and averaging in it cannot be undone; "
    "put this node before that gadget in the chain, so that it gets acquisitions (1008) or buckets (1050)"
)


class Reply(msgspec.Struct, frozen=True, eq=False):
    """What a scan gives back: bytes for the peer, or the statistics of a frame.

    `series` and `image` number an image, and are 0 for everything else.
    """

    buffers: Buffers
    stats: FrameStats | None = None
    series: int = 0
    image: int = 0
    note: Note | None = None
    """For the operator's console on the bus, where it is not in `buffers`."""
    missing: MissingFrames | None = None
    """Photoacoustic frames to be sent again."""
    failed: str = ""
    """Fixed word for why the session cannot go on, and the sentence that says so."""
    text: str = ""


class Scan:
    """Decodes the messages of one session, feeds the engine and encodes what comes back in the peer's dialect."""

    def __init__(
        self,
        config: SystemConfig,
        store: ConfigStore,
        noise: NoiseStore,
        *,
        role: Role = Role.SCAN,
        noise_id: str = "",
        dialect: Dialect = Dialect.GADGETRON,
        threads: int = 1,
    ) -> None:
        self._config, self._store, self._noise = config, store, noise
        self._role, self._noise_id, self._dialect, self._threads = role, noise_id, dialect, threads
        self._session = self._new_session()
        self._headerless = False
        self._images = 0
        self._readouts = 0
        self._failed = False

    def _new_session(self) -> Session:
        fire = self._dialect is Dialect.FIRE
        return Session(self._config, fire=fire, noise=self._noise, solver_threads=self._threads)

    def take(self, frames: Iterable[Frame], received: float) -> Iterator[Reply]:
        """Work through frames in their order. What cannot be used ends the scan, and the reply says why."""
        for frame in frames:
            if self._failed:
                return
            try:
                yield from self._take(frame, received)
            except ScansideError as error:
                self._failed = True
                yield from self._salvage()
                yield Reply([], failed=error.reason, text=str(error))

    def end(self, *, complete: bool) -> Iterator[Reply]:
        """The peer is done: reconstruct what is left and sum up."""
        if self._role is Role.NOISE:
            yield Reply([mrd.encode_dependency(self._noise_answer())])
            return
        if self._failed:
            return
        try:
            yield from self._feed(EndOfScan(complete=complete))
        except ScansideError as error:
            yield Reply([], failed=error.reason, text=str(error))
            return
        if self._readouts and not self._images and self._config.reconstruction.method != "none":
            counts = ", ".join(f"{count} {name}" for name, count in sorted(self._session.counts.items()))
            yield from self._say(Note("warning", f"the scan ended with no image; received: {counts or 'nothing'}"))

    def _salvage(self) -> Iterator[Reply]:
        """Images of what had arrived before an error."""
        try:
            yield from self._feed(EndOfScan())
        except ScansideError as error:
            yield from self._say(Note("error", str(error)))

    def _take(self, frame: Frame, received: float) -> Iterator[Reply]:
        if frame.id == MessageId.ACQUISITION:
            if self._headerless:
                raise PeerError("acquisitions cannot be reconstructed without an ISMRMRD header", offset=frame.offset)
            batch = mrd.acquisitions(frame, received)
            self._readouts += len(batch)
            yield from self._feed(batch)
        elif frame.id == MessageId.IMAGE:
            yield from self._feed(mrd.image(frame))
        elif frame.id == MessageId.WAVEFORM:
            yield from self._feed(mrd.waveform(frame))
            if self._role is Role.EXTERNAL:  # the next node of the chain may want it
                yield Reply([frame.view])
        elif frame.id == MessageId.HEADER:
            yield from self._header(frame)
        elif frame.id == MessageId.TEXT:
            yield from self._parameters(mrd.text(frame))
        elif self._role is Role.EXTERNAL and frame.id == MessageId.BUCKET:
            yield from self._bucket(frame, received)
        elif self._role is Role.EXTERNAL and frame.id == MessageId.IMAGE_ARRAY:
            self._images += 1
            yield Reply([frame.view])
        elif frame.id == MessageId.RECON_DATA:
            raise PeerError(BUFFERS_REFUSAL, offset=frame.offset)
        else:
            raise PeerError(
                f"{self._config.name} takes acquisitions and images, not message {frame.id}", offset=frame.offset
            )

    def _bucket(self, frame: Frame, received: float) -> Iterator[Reply]:
        """Readouts that another node of the chain has gathered. Calibration readouts that are imaging ones too come as these."""
        content = bucket(frame)
        for part in (content.calibration, content.imaging):
            for batch in part.batches(received):
                both = np.asarray(has_flag(batch.headers["flags"], AcquisitionFlag.IS_PARALLEL_CALIBRATION_AND_IMAGING))
                if part is content.calibration and both.any():
                    batch = _subset(batch, ~both)
                if len(batch):
                    self._readouts += len(batch)
                    yield from self._feed(batch)

    def _header(self, frame: Frame) -> Iterator[Reply]:
        text = mrd.text(frame)
        if not text.lstrip("\ufeff \t\r\n").startswith("<"):
            self._headerless = True  # image sessions come with placeholders such as "Dummy XML header"
            yield from self._say(Note("info", "no ISMRMRD header; only images can be passed on"))
            return
        yield from self._feed(parse_header(text.encode(), self._config.limits))

    def _parameters(self, text: str) -> Iterator[Reply]:
        try:
            values = parse_parameters(text)
        except PeerError as error:  # the scan is worth more than its parameters
            yield from self._say(Note("error", f"{error}; the parameters are ignored"))
            return
        chosen = str(values.pop("customconfig", "") or values.get("config", "") or "")
        values.pop("config", None)
        if chosen and not self._readouts:
            self._config = self._store.get(chosen)
            header, self._session = self._session.header, self._new_session()
            if header is not None:
                yield from self._feed(header)
        yield from self._feed(Parameters(values))

    def _feed(self, message: Message) -> Iterator[Reply]:
        for event in self._session.feed(message):
            yield from self._encode(event)

    def _encode(self, event: Event) -> Iterator[Reply]:
        if isinstance(event, Image):
            self._images += 1
            header = event.header
            yield Reply(
                mrd.encode_image(self._portable(event)),
                series=int(header["image_series_index"]),
                image=max(1, int(header["image_index"])),
            )
        elif isinstance(event, FrameStats):
            yield Reply([], stats=event)
        elif isinstance(event, Note):
            yield from self._say(event)
        elif isinstance(event, AcquisitionBatch):
            yield Reply([mrd.encode_acquisitions(event)])
        else:
            yield Reply([mrd.encode_waveform(event)])

    def _portable(self, image: Image) -> Image:
        """Gadgetron's reader of images from external nodes has no 16-bit signed type and would lose all images."""
        if self._role is not Role.EXTERNAL or image.pixels.dtype != np.int16:
            return image
        return Image(header=image.header, pixels=image.pixels.astype(np.int32), meta=image.meta)

    def _say(self, note: Note) -> Iterator[Reply]:
        if self._role is Role.SCAN:
            yield Reply([reply_text(note.level, note.text, self._dialect)])

    def _noise_answer(self) -> dict[str, list[str]]:
        model = self._noise.get(self._noise_id)
        return {"status": ["failed"]} if model is None else model.dependency_answer()


def scan_for(
    store: ConfigStore, config: str, parameters: Mapping[str, Value], dialect: str, noise: NoiseStore, threads: int
) -> Scan:
    """The scan of a session of the bus; the words are those of its `open`.

    Raises ConfigError for a name, key or value that is not possible, ValueError for a role or dialect that is none.
    """
    values = dict(parameters)
    role, noise_id = Role(str(values.pop(ROLE, Role.SCAN))), str(values.pop(NOISE, ""))
    chosen = with_overrides(store.get(config), values, source="parameters of the session")
    if chosen.kind != "mri":
        raise ConfigError(f"{chosen.name} is for photoacoustic streams, not for MRI; choose another, e.g. default")
    spoken = Dialect(dialect or Dialect.GADGETRON)
    return Scan(chosen, store, noise, role=role, noise_id=noise_id, dialect=spoken, threads=threads)


def _subset(batch: AcquisitionBatch, chosen: np.ndarray) -> AcquisitionBatch:
    trajectory = None if batch.trajectory is None else batch.trajectory[chosen]
    return AcquisitionBatch(
        headers=batch.headers[chosen], samples=batch.samples[chosen], trajectory=trajectory, received=batch.received
    )
