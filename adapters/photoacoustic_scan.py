"""A photoacoustic stream on the inside of a worker: PAT1 in, ISMRMRD images out, with the engine's session in between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from scanside.engine.config import SystemConfig, Value
from scanside.engine.errors import ScansideError
from scanside.engine.messages import (
    Adjustment,
    EndOfScan,
    FrameStats,
    Image,
    MissingFrames,
    Note,
    PhotoacousticEvent,
    PhotoacousticFrame,
    PhotoacousticHeader,
    PhotoacousticMessage,
)
from scanside.engine.streaming.photoacoustic import PhotoacousticSession

from . import mrd, photoacoustic
from .photoacoustic_recorder import Recorder
from .scan import Reply

__all__ = ["PhotoacousticScan"]


class PhotoacousticScan:
    """Decodes the messages of one session, records them where that is wanted, feeds the engine and encodes what comes back.

    `record`: folder for recordings; `threads`: of the processor, for one image.
    """

    def __init__(self, config: SystemConfig, *, threads: int = 1, record: Path | None = None) -> None:
        self._limits = config.limits
        self._session = PhotoacousticSession(config, threads=threads)
        self._recorder = None if record is None else Recorder(record)
        self._header: PhotoacousticHeader | None = None
        self._failed = False

    def take(self, payload: Sequence[memoryview], received: float) -> Iterator[Reply]:
        """Work through the messages of one `data` envelope. What cannot be used ends the scan, and the reply says why."""
        if self._failed:
            return
        try:
            for message in photoacoustic.decode(payload, received, self._header, self._limits):
                yield from self._message(message)
        except ScansideError as error:
            self._failed = True
            yield from self._salvage()
            yield Reply([], failed=error.reason, text=str(error))

    def adjust(self, values: Mapping[str, Value]) -> Iterator[Reply]:
        """Let the session go on with other values."""
        if not self._failed:
            yield from self._feed(Adjustment(dict(values)))

    def end(self, *, complete: bool) -> Iterator[Reply]:
        """The producer is done: image what is left, close the recording and sum up."""
        if self._failed:
            return
        try:
            yield from self._feed(EndOfScan(complete=complete))
        except ScansideError as error:
            yield Reply([], failed=error.reason, text=str(error))
        yield from self._close()

    def close(self) -> None:
        """Close the recording where no end came."""
        if self._recorder is not None:
            self._recorder.close()

    def _message(self, message: PhotoacousticMessage) -> Iterator[Reply]:
        if isinstance(message, PhotoacousticHeader):
            self._header = message
            if self._recorder is not None:
                self._recorder.start(message)
        elif isinstance(message, PhotoacousticFrame) and message.intact and self._recorder is not None:
            self._recorder.add(message)
        yield from self._feed(message)

    def _salvage(self) -> Iterator[Reply]:
        """Images of what had arrived before an error."""
        try:
            yield from self._feed(EndOfScan())
        except ScansideError as error:
            yield Reply([], note=Note("error", str(error)))
        yield from self._close()

    def _close(self) -> Iterator[Reply]:
        if self._recorder is None:
            return
        self._recorder.close()
        for text in self._recorder.told():
            yield Reply([], note=Note("info", text))

    def _feed(self, message: PhotoacousticMessage) -> Iterator[Reply]:
        for event in self._session.feed(message):
            yield _encode(event)


def _encode(event: PhotoacousticEvent) -> Reply:
    if isinstance(event, Image):
        header = event.header
        return Reply(
            mrd.encode_image(event),
            series=int(header["image_series_index"]),
            image=int(header["image_index"]),
        )
    if isinstance(event, FrameStats):
        return Reply([], stats=event)
    if isinstance(event, MissingFrames):
        return Reply([], missing=event)
    return Reply([], note=event)
