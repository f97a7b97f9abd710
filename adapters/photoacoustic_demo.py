"""`scanside demo --pat`: a photoacoustic scan streamed at its pace through a real server in its own processes, and what came.

The scan is simulated, with blood of known oxygen saturation, or read from a file.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
from rich.color import Color
from rich.console import Console, Group
from rich.live import Live
from rich.style import Style
from rich.text import Text
from scanside.engine.messages import Image, PhotoacousticFrame, PhotoacousticHeader
from scanside.engine.simulation.photoacoustic import LiveScan

from .commands.output import console, milliseconds, progress_bar, table
from .commands.photoacoustic import Arrivals, paced
from .commands.results import Latency, Output
from .files.photoacoustic import open_recording
from .files.png import Panel, panel_figure, robust_window, write_png
from .local_server import LocalServer
from .photoacoustic_sender import PhotoacousticSender

__all__ = ["PhotoacousticDemo", "run_photoacoustic_demo", "thumbnail"]

_WAVELENGTHS = (750e-9, 850e-9)
_MOST_SIMULATED = 100
"""Frames that are simulated; then they begin again: the tip has gone round once at 25 frames a second."""
_MOST_STORED = 200
_KEPT = 50
"""Newest images that are written."""
_THUMBNAIL = 56
"""Columns of the live picture in a terminal."""
_REFRESH = 10


class PhotoacousticDemo(msgspec.Struct, frozen=True, kw_only=True):
    """What is streamed, how, and where the results go. config: by default pat/ubp for the simulation and pat/das for a file."""

    out: Path = Path("scanside-demo")
    file: Path | None = None
    geometry: Path | None = None
    config: str | None = None
    rate: float = 25.0
    frames: int = 250
    elements: int = 256
    samples: int = 2030


class _Source(msgspec.Struct, frozen=True, eq=False):
    name: str
    header: PhotoacousticHeader
    frames: Sequence[PhotoacousticFrame]
    truth: np.ndarray | None = None


def run_photoacoustic_demo(options: PhotoacousticDemo) -> int:
    """Run the demonstration and write its results; returns the exit code, 1 when no image came back.

    Raises ConfigError for unusable settings or files, DeviceLost or DeadlineMissed when the server does not start or answer.
    """
    out, errors, arrivals = console(), console(stderr=True), Arrivals(_KEPT)
    output = Output(file=options.out / "images.h5", png=options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    with LocalServer(["--bus", "tcp://127.0.0.1:*"]) as server:
        out.print(
            "starting a server on a free port and " + ("reading the file" if options.file else "simulating the scan")
        )
        source = _stored(options) if options.file else _simulated(options, errors)
        server.wait_ready()
        config = options.config or ("pat/das" if options.file else "pat/ubp")
        sender = PhotoacousticSender(server.bus, source.header, config=config, on_image=arrivals)
        with sender:
            seconds = _stream(options, source, sender, arrivals, errors)
    for note in sender.notes:
        errors.print(note, markup=False)
    if not arrivals.count:
        errors.print("scanside demo: no image came back")
        return 1
    (options.out / "images.h5").unlink(missing_ok=True)
    _report(options, source, arrivals, seconds, out)
    for line in output.write(arrivals.images):
        out.print(line, markup=False)
    return 0


def _simulated(options: PhotoacousticDemo, errors: Console) -> _Source:
    scan = LiveScan(
        elements=options.elements, samples=options.samples, rate_hz=options.rate, wavelengths_m=_WAVELENGTHS, noise=0.01
    )
    count = min(options.frames, _MOST_SIMULATED)
    with progress_bar(errors, "frames simulated") as progress:
        frames = list(progress.track(map(scan.frame, range(count)), total=count, description="simulation"))
    name = f"simulated vessels, {options.elements} elements, {' and '.join(f'{w * 1e9:.0f}' for w in _WAVELENGTHS)} nm"
    return _Source(name, scan.header, frames, scan.picture)


def _stored(options: PhotoacousticDemo) -> _Source:
    with open_recording(options.file or Path(), options.geometry) as recording:
        return _Source(str(options.file), recording.header, list(itertools.islice(recording.frames(), _MOST_STORED)))


def _numbered(source: _Source, count: int) -> Iterator[PhotoacousticFrame]:
    for number, frame in zip(range(count), itertools.cycle(source.frames)):
        yield msgspec.structs.replace(frame, seq=number, shot=number)


def _stream(
    options: PhotoacousticDemo, source: _Source, sender: PhotoacousticSender, arrivals: Arrivals, errors: Console
) -> float:
    """Send everything at its pace, with the live picture in a terminal and in live.png; returns how long it took, in s."""
    begun = shown = time.monotonic()
    with Live(console=errors, refresh_per_second=_REFRESH, transient=True, auto_refresh=False) as live:
        for frame in paced(_numbered(source, options.frames), options.rate):
            sender.send_frame(frame)
            if time.monotonic() - shown > 1 / _REFRESH and arrivals.images and errors.is_terminal:
                shown = time.monotonic()
                picture = _pressure(arrivals.images)[-1].pixels[0, 0]
                live.update(Group(thumbnail(picture), Text(f"frame {frame.seq + 1}, {arrivals}")), refresh=True)
    return time.monotonic() - begun


def thumbnail(image: np.ndarray, columns: int = _THUMBNAIL) -> Text:
    """A picture of gray half blocks for a terminal; what is negative is black."""
    step = max(1, -(-image.shape[1] // columns))
    rows = image.shape[0] // (2 * step) * 2 * step
    width = image.shape[1] // step * step
    small = np.maximum(image[:rows, :width], 0).reshape(rows // step, step, width // step, step).mean(axis=(1, 3))
    gray = np.clip(255 * small / robust_window(small)[1], 0, 255).astype(int)
    text = Text()
    for upper, lower in zip(gray[::2], gray[1::2], strict=True):
        for a, b in zip(upper.tolist(), lower.tolist(), strict=True):
            text.append("▀", Style(color=Color.from_rgb(a, a, a), bgcolor=Color.from_rgb(b, b, b)))
        text.append("\n")
    return text


def _pressure(images: Sequence[Image]) -> list[Image]:
    return [image for image in images if image.meta["ImageComment"] == ["pressure"]]


def _report(options: PhotoacousticDemo, source: _Source, arrivals: Arrivals, seconds: float, out: Console) -> None:
    latency = Latency.of(arrivals.latencies)
    last = _pressure(arrivals.images)[-1]
    method = last.meta["scanside_method"][0].upper()
    head = f"{method}, {milliseconds(latency.p50)}" if latency else method
    write_png(options.out / "last.png", np.maximum(last.pixels[0, 0], 0))
    path = options.out / "photoacoustic.png"
    _picture(path, source, last, head, arrivals.images)
    rows = table("", "")
    rows.show_header = False
    rows.add_row("frames", f"{options.frames} of {source.header.elements} x {source.header.samples} in {seconds:.2f} s")
    rows.add_row("images", str(arrivals.count))
    if latency is not None:
        rows.add_row("latency", f"{latency} (frame handed over to image whole)")
        frame = 1 / options.rate
        on_time = sum(value <= frame for value in arrivals.latencies)
        rows.add_row("on time", f"{on_time} of {len(arrivals.latencies)} before the next frame ({milliseconds(frame)})")
    out.print(f"\n{source.name}", markup=False)
    out.print(rows)
    out.print(f"the last picture is in {path}", markup=False)


def _picture(path: Path, source: _Source, last: Image, head: str, images: Sequence[Image]) -> None:
    """What was simulated, what came back, and oxygen saturation where it was unmixed."""
    plane = np.maximum(last.pixels[0, 0], 0)
    panels = [Panel(head, plane, f"{last.meta['scanside_wavelength_nm'][0]} nm, shot {last.meta['scanside_shot'][0]}")]
    if source.truth is not None and source.truth.shape == plane.shape:
        panels.insert(0, Panel("initial pressure", source.truth, "simulated"))
    saturation = [image for image in images if image.meta["ImageComment"] == ["saturation"]]
    if saturation:
        found = np.nan_to_num(saturation[-1].pixels[0, 0])
        panels.append(Panel("oxygen saturation", found, "0 (dark) to 1 (bright)", window=(0.0, 1.0), colors="inferno"))
    panel_figure(path, panels)
