"""`scanside send`: plays a stored scan to a server, at once or at the pace of a scanner, and collects what comes back."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import Progress
from scanside.adapters import mrd
from scanside.adapters.client import Arrival, Dependency, ScanClient
from scanside.adapters.files.ismrmrd import ScanFile, open_scan
from scanside.engine.errors import DeliveryError
from scanside.engine.messages import Image

from .output import console, milliseconds, progress_bar, table
from .results import Latency, Output, describe_image

__all__ = ["SendOptions", "ask", "ask_dependency", "send_file"]

_BATCH = 16
"""Readouts encoded at a time; the progress moves in these steps."""
_NO_HEADER = b"Dummy XML header"
"""What image-only sessions send in place of a header, as python-ismrmrd-server's client does."""


class SendOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to send, where to, and what to do with the answer."""

    host: str = "127.0.0.1"
    port: int = 9002
    file: Path = Path()
    group: str = "dataset"
    output: Output = Output()
    config: str = "default"
    config_file: Path | None = None
    """Configuration text to send in place of the name."""
    parameters: Mapping[str, str] = {}
    """Sent as a FIRE or OpenRecon console does; the answer comes in that dialect."""
    loops: int = 1
    timeout: float = 10.0
    """Longest silence in s."""
    interval: float = 0.0
    """Between readouts in s; 0 sends at once."""
    bits: int = 0
    waveforms: bool = False
    dicom: Path | None = None
    """Folder for DICOM files that come back."""
    verbose: bool = False


class _Basket:
    """Takes what comes back, in the receiving thread."""

    def __init__(self, options: SendOptions, out: Console, errors: Console) -> None:
        self._options, self._out, self._errors = options, out, errors
        self._lock = threading.Lock()
        self.images: list[Image] = []
        self.latencies: list[float] = []
        self.dicoms: list[mrd.Dicom] = []
        self.others = 0

    def take(self, arrival: Arrival) -> None:
        item = arrival.item
        with self._lock:
            if isinstance(item, Image):
                self._image(item, arrival.latency)
            elif isinstance(item, str):
                self._errors.print(item, markup=False)
            elif isinstance(item, mrd.Dicom):
                self.dicoms.append(item)
            else:
                self.others += 1

    def _image(self, image: Image, latency: float | None) -> None:
        self.images.append(image)
        if latency is not None:
            self.latencies.append(latency)
        if self._options.verbose:
            header = image.header
            when = "" if latency is None else f", {milliseconds(latency)} after its last readout"
            self._out.print(
                f"image {int(header['image_index'])} of series {int(header['image_series_index'])}: "
                f"{describe_image(image)}{when}",
                markup=False,
            )


def send_file(options: SendOptions) -> int:
    """Send a file `loops` times; returns the exit code, 1 when no image came back or the server did not say CLOSE.

    Raises ConfigError for a wrong file or name, DeliveryError when there is no server or it goes silent, PeerError when it
    ends the session.
    """
    options.output.check()
    out, errors = console(), console(stderr=True)
    code = 0
    with open_scan(options.file, options.group) as scan:
        for _ in range(options.loops):
            code = max(code, _one_session(options, scan, out, errors))
    return code


def ask(host: str, port: int, question: str, timeout: float) -> None:
    """Print the server's answer to a question, e.g. "gadgetron::version"."""
    with ScanClient(host, port, timeout=timeout) as client:
        answer = client.query(question)
        client.end_scan()
        for _ in client.arrivals():
            pass
    console().file.write(f"{answer}\n")


def ask_dependency(options: SendOptions) -> int:
    """Send the configuration alone and print the answer about a noise measurement; exit code 1 when there is none."""
    found = 0
    with _client(options, None) as client:
        _configure(client, options)
        client.end_scan()
        for arrival in client.arrivals():
            if isinstance(arrival.item, Dependency):
                found += 1
                for name, values in arrival.item.meta.items():
                    console().file.write(f"{name} = {', '.join(values)}\n")
    if not found:
        console(stderr=True).print("scanside send: the server has no answer about a dependency")
    return 0 if found else 1


def _client(options: SendOptions, basket: _Basket | None) -> ScanClient:
    return ScanClient(
        options.host,
        options.port,
        timeout=options.timeout,
        bits=options.bits,
        on_arrival=None if basket is None else basket.take,
    )


def _configure(client: ScanClient, options: SendOptions) -> None:
    if options.config_file is not None:
        client.configure_text(options.config_file.read_bytes())
    else:
        client.configure(options.config)


def _one_session(options: SendOptions, scan: ScanFile, out: Console, errors: Console) -> int:
    basket = _Basket(options, out, errors)
    with progress_bar(errors) as progress, _client(options, basket) as client, _kept(options, scan, basket, out):
        begun = time.monotonic()
        _send_scan(client, options, scan, progress)
        for _ in client.arrivals():
            pass  # the basket has them
        seconds = time.monotonic() - begun
    _summary(options, client, basket, seconds, out)
    if not client.closed:
        errors.print("scanside send: the server ended the connection without CLOSE, which means that it failed")
        return 1
    if not basket.images and not basket.dicoms:
        errors.print("scanside send: no image came back", markup=False)
        return 1
    return 0


@contextlib.contextmanager
def _kept(options: SendOptions, scan: ScanFile, basket: _Basket, out: Console) -> Iterator[None]:
    """Write what has come back, also when the session breaks off."""
    try:
        yield
    finally:
        group = options.output.group or datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")
        output = msgspec.structs.replace(options.output, group=group)
        for line in (*output.write(basket.images, scan.xml), *_write_dicoms(options.dicom, basket.dicoms)):
            out.print(line, markup=False)


def _send_scan(client: ScanClient, options: SendOptions, scan: ScanFile, progress: Progress) -> None:
    task = progress.add_task(f"{options.file.name} to {options.host}:{options.port}", total=len(scan) or None)
    _configure(client, options)
    client.header(scan.xml or _NO_HEADER)
    if options.parameters:
        client.parameters(options.parameters)
    for record in scan.waveforms() if options.waveforms else ():
        client.waveform(record)
    for image in scan.images():
        client.image(image)
    for batch in scan.batches(_BATCH) if len(scan) else ():
        client.acquisitions(batch, options.interval)
        progress.update(task, completed=client.readouts)
    client.end_scan()


def _summary(options: SendOptions, client: ScanClient, basket: _Basket, seconds: float, out: Console) -> None:
    rows = table("", "", title=None)
    rows.show_header = False
    rows.add_row("sent", f"{client.readouts} readouts, {client.bytes_sent / 1e6:.1f} MB in {seconds:.2f} s")
    if options.interval:
        rows.add_row("pace", f"{milliseconds(options.interval)} between readouts, {client.late} late")
    kinds = sorted({describe_image(image) for image in basket.images})
    rows.add_row("images", f"{len(basket.images)}{': ' if kinds else ''}{', '.join(kinds)}")
    if basket.others:
        rows.add_row("other messages", str(basket.others))
    latency = Latency.of(basket.latencies)
    if latency is not None:
        rows.add_row("latency", f"{latency} (last readout handed over to image whole)")
    out.print(rows)


def _write_dicoms(folder: Path | None, items: list[mrd.Dicom]) -> list[str]:
    """Write DICOM files under the last part of the names that the server gave, numbered where they repeat."""
    if not items:
        return []
    if folder is None:
        return [f"{len(items)} DICOM files came back and were not kept; give --dicom FOLDER to keep them"]
    folder.mkdir(parents=True, exist_ok=True)
    for number, item in enumerate(items):
        name = Path(item.name.replace("\\", "/")).name or "image"
        if name in (".", "..") or "\0" in name:
            raise DeliveryError(f"the server calls a DICOM file {item.name!r}, which is no name for a file")
        path = folder / name
        if path.exists():
            path = folder / f"{path.stem}_{number:04d}{path.suffix}"
        path.write_bytes(item.data)
    return [f"{len(items)} DICOM files in {folder}/"]
