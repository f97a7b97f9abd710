"""Recording of live streams to IPASC files, in a thread of its own: a slow disk never holds up a receive loop."""

from __future__ import annotations

import queue
import threading
from datetime import UTC, datetime
from pathlib import Path

import structlog
from scanside.engine.errors import DeliveryError
from scanside.engine.messages import PhotoacousticFrame, PhotoacousticHeader

from .files.ipasc import IpascWriter

__all__ = ["Recorder"]

_log = structlog.get_logger("recorder")

QUEUE_FRAMES = 64
"""Frames that wait for the disk; when there are more, the session waits, and with it its producer's credit."""
CLOSE_SECONDS = 60.0

_Item = PhotoacousticHeader | PhotoacousticFrame | None


class Recorder:
    """Writes what it is given to files in a folder, a new one for each header. All methods belong to one thread.

    A file that cannot be written ends the recording, not the session; `told` says so.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._queue: queue.Queue[_Item] = queue.Queue(QUEUE_FRAMES)
        self._told: list[str] = []
        self._thread: threading.Thread | None = None

    def start(self, header: PhotoacousticHeader) -> None:
        """Begin a file. The same header again changes nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
            self._thread.start()
        self._queue.put(header)

    def add(self, frame: PhotoacousticFrame) -> None:
        """Hand a frame over; waits while the queue is full."""
        self._queue.put(frame)

    def close(self) -> None:
        """Write everything and close the file."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(CLOSE_SECONDS)
            self._thread = None

    def told(self) -> list[str]:
        """What came of it, a sentence per file; to be asked after `close`."""
        return self._told

    def _run(self) -> None:
        writer: IpascWriter | None = None
        header: PhotoacousticHeader | None = None
        frames, broken = 0, False
        for item in iter(self._queue.get, None):
            try:
                if isinstance(item, PhotoacousticHeader):
                    if header is None or item.details != header.details:
                        self._finish(writer, frames)
                        header, writer, frames = item, self._open(item), 0
                elif isinstance(item, PhotoacousticFrame) and writer is not None and not broken:
                    writer.add(item)
                    frames += 1
            except (DeliveryError, OSError) as error:
                broken = True
                self._told.append(f"the recording broke off after {frames} frames: {error}")
                _log.error("recording broke off", frames=frames)  # the error may name a file
        self._finish(writer, frames)

    def _open(self, header: PhotoacousticHeader) -> IpascWriter:
        self._folder.mkdir(parents=True, exist_ok=True)
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        return IpascWriter(self._folder / f"{stamp}_{header.stream}.hdf5", header)

    def _finish(self, writer: IpascWriter | None, frames: int) -> None:
        if writer is not None:
            try:
                writer.close()
                self._told.append(f"{frames} frames recorded in {writer.path.name}")
            except OSError as error:
                self._told.append(f"the recording could not be closed: {error}")
