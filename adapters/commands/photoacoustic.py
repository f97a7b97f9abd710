"""`scanside send --pat` and `scanside tune`: a stored photoacoustic scan played at its pace, and a running one adjusted."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
from rich.console import Console
from scanside.adapters.cli_parts import BUS
from scanside.adapters.clients import Producer
from scanside.adapters.files.photoacoustic import Recording, open_recording
from scanside.adapters.photoacoustic_sender import ArrivedImage, PhotoacousticSender
from scanside.engine.config import Value
from scanside.engine.errors import ConfigError
from scanside.engine.messages import Image, PhotoacousticFrame

from .output import console, milliseconds, progress_bar, table
from .results import Latency, Output, describe_image

__all__ = ["Arrivals", "SendOptions", "paced", "send_recording", "tune"]

_KEPT = 1000
"""Images that are kept to be written; the newest."""


class SendOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to send, where to, and what to do with the answer. rate: frames per second, 0 as fast as the server takes them."""

    file: Path
    geometry: Path | None = None
    bus: str = BUS
    config: str = "pat/das"
    parameters: Mapping[str, str] = {}
    rate: float = 25.0
    loops: int = 1
    checksum: bool = True
    output: Output = Output()
    timeout: float = 10.0
    verbose: bool = False


class Arrivals:
    """Takes images in the sender's thread: the newest, their latencies, and how many came."""

    def __init__(self, kept: int = _KEPT) -> None:
        self._lock = threading.Lock()
        self._kept = kept
        self.images: list[Image] = []
        self.latencies: list[float] = []
        self.count = 0

    def __call__(self, arrived: ArrivedImage) -> None:
        """Take one image."""
        with self._lock:
            self.count += 1
            self.images.append(arrived.image)
            del self.images[: -self._kept]
            if arrived.latency is not None:
                self.latencies.append(arrived.latency)

    def __str__(self) -> str:
        with self._lock:
            latency = Latency.of(self.latencies)
            last = milliseconds(self.latencies[-1]) if self.latencies else ""
        return f"{self.count} images" + (f", last {last}, p50 {milliseconds(latency.p50)}" if latency else "")


def send_recording(options: SendOptions) -> int:
    """Play a recording to a server; returns the exit code, 1 when no image came back.

    Raises ConfigError for a wrong file or name, DeadlineMissed when there is no server, PeerError when it refuses the stream.
    """
    if options.rate < 0 or options.loops < 1:
        raise ConfigError(f"rate is {options.rate}, loops {options.loops}; frames per second from 0 and loops from 1")
    options.output.check()
    out, errors, arrivals = console(), console(stderr=True), Arrivals()
    begun = time.monotonic()
    with open_recording(options.file, options.geometry) as recording, progress_bar(errors, "frames") as progress:
        if not len(recording):
            raise ConfigError(f"{options.file} holds no frames")
        task = progress.add_task(f"{options.file.name} to {options.bus}", total=len(recording) * options.loops)
        sender = PhotoacousticSender(
            options.bus,
            recording.header,
            config=options.config,
            parameters=dict(options.parameters),
            checksum=options.checksum,
            patience=options.timeout,
            on_image=arrivals,
        )
        with sender:
            for frame in paced(_looped(recording, options.loops), options.rate):
                sender.send_frame(frame)
                progress.update(task, advance=1, description=str(arrivals))
    return _report(options, sender, arrivals, time.monotonic() - begun, out, errors)


def _looped(recording: Recording, loops: int) -> Iterator[PhotoacousticFrame]:
    """The frames again and again, numbered on."""
    first = last = -1
    for _ in range(loops):
        offset = last + 1
        for frame in recording.frames():
            first = frame.seq if first < 0 else first
            last = offset + frame.seq - first
            yield msgspec.structs.replace(frame, seq=last, shot=offset + frame.shot - first)


def paced(frames: Iterator[PhotoacousticFrame], rate: float) -> Iterator[PhotoacousticFrame]:
    """Frames at `rate` per second, by an absolute schedule, so that delays do not add up; at once for 0."""
    begun = time.monotonic()
    for number, frame in enumerate(frames):
        wait = begun + number / rate - time.monotonic() if rate else 0.0
        if wait > 0:
            time.sleep(wait)
        yield frame


def _report(
    options: SendOptions, sender: PhotoacousticSender, arrivals: Arrivals, seconds: float, out: Console, errors: Console
) -> int:
    for note in sender.notes:
        errors.print(note, markup=False)
    rows = table("", "", title=None)
    rows.show_header = False
    size = sender.frames_sent * 2 * sender.header.elements * sender.header.samples / 1e6
    rows.add_row("sent", f"{sender.frames_sent} frames, {size:.1f} MB in {seconds:.2f} s")
    if sender.reconnections or sender.sent_again:
        rows.add_row("again", f"{sender.reconnections} reconnections, {sender.sent_again} frames sent again")
    kinds = sorted({describe_image(image) for image in arrivals.images})
    rows.add_row("images", f"{arrivals.count}{': ' if kinds else ''}{', '.join(kinds)}")
    latency = Latency.of(arrivals.latencies)
    if latency is not None:
        rows.add_row("latency", f"{latency} (last frame of a shot handed over to image whole)")
    out.print(rows)
    for line in options.output.write(arrivals.images):
        out.print(line, markup=False)
    if not arrivals.count:
        errors.print("scanside send: no image came back")
        return 1
    return 0


def tune(bus: str, values: Mapping[str, Value], timeout: float) -> int:
    """Change how all running photoacoustic streams are reconstructed; returns the exit code, 1 when there is none.

    Raises ConfigError for nothing to change, DeadlineMissed when no server answers.
    """
    if not values:
        raise ConfigError("nothing to change; give --speed-of-sound, --delay, --averages or --autofocus")
    producer = Producer(bus)
    try:
        producer.adjust(values, everyone=True)
        count = producer.wait_adjusted(timeout)
    finally:
        producer.close()
    if not count:
        console(stderr=True).print("scanside tune: there is no photoacoustic stream to adjust")
        return 1
    console().print(f"passed on to {count} stream{'s' if count > 1 else ''}; its console says what came of it")
    return 0
