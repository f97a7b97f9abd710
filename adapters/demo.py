"""`scanside demo`: a scan streamed at a scanner's pace through a real server in its own processes, and what came of it.

The scan is simulated, so that there is a true image to compare with, or read from a file. A second session asks the same
server for the zero-filled images, which show what the reconstruction adds; with a learned prior, a third one for those of
L1-ESPIRiT, which is what the prior has to beat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from scanside.engine.config import ConfigStore
from scanside.engine.errors import ConfigError, DeliveryError
from scanside.engine.evaluation import Scores, evaluate
from scanside.engine.messages import AcquisitionBatch, Image
from scanside.engine.simulation.scan import SimulatedScan, simulate_scan
from scanside.engine.streaming.triggers import ReadoutKind, kinds

from .client import Arrival, ScanClient, config_text
from .commands.output import console, milliseconds, table
from .commands.results import Latency, Output
from .files.ismrmrd import ScanFile, header_xml, open_scan
from .files.png import Panel, comparison_figure, robust_window
from .local_server import LocalServer

__all__ = ["DemoOptions", "run_demo"]

_BATCH = 8
"""Readouts encoded at a time; the display moves in these steps."""
_CALIBRATION_LINES, _NOISE, _NOISE_READOUTS, _MOTION_DEGREES = 24, 0.005, 4, 6.0
_SKULL = 0.5
"""White, relative to the brightest: the skull of the phantom is four times as bright as the brain inside."""
_NAMES = {"sense": "SENSE", "cg_sense": "CG-SENSE", "grappa": "GRAPPA", "l1_espirit": "L1-ESPIRiT", "prior": "online"}
_IMAGES = 1
"""Series of what the system made; others hold originals, deviations and previews."""
_SERIES_STEP = 100
"""A series that is full is followed by the one of this number more."""
_BAR = "mri/l1_espirit"
"""What a learned prior is compared with."""


class DemoOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What is streamed, how, and where the results go. interval: s between readouts."""

    out: Path = Path("scanside-demo")
    file: Path | None = None
    config: str = "default"
    matrix: int = 256
    coils: int = 8
    acceleration: int = 4
    frames: int = 12
    interval: float = 0.003


class _Source(msgspec.Struct, frozen=True, eq=False):
    """A scan that can be played more than once. reference: (repetitions, slices, y, x) where the truth is known."""

    name: str
    xml: bytes
    batches: Callable[[], Iterator[AcquisitionBatch]]
    readouts: int
    reference: np.ndarray | None = None


class _Played(msgspec.Struct, eq=False):
    """What one session gave. sent: imaging and calibration readouts."""

    images: list[Image] = []
    latencies: list[float] = []
    texts: list[str] = []
    sent: int = 0
    late: int = 0

    def take(self, arrival: Arrival) -> None:
        """Keep what came; runs in the receiving thread."""
        if isinstance(arrival.item, Image):
            if int(arrival.item.header["image_series_index"]) % _SERIES_STEP == _IMAGES:
                self.images.append(arrival.item)
                self.latencies.append(np.nan if arrival.latency is None else arrival.latency)
        elif isinstance(arrival.item, str):
            self.texts.append(arrival.item)

    @property
    def measured(self) -> list[float]:
        """The latencies that are known."""
        return [value for value in list(self.latencies) if np.isfinite(value)]


def run_demo(options: DemoOptions) -> int:
    """Run the demonstration and write its results; returns the exit code, 1 when no image came back.

    Raises ConfigError for unusable settings, DeviceLost or DeliveryError when the server does not start or breaks off.
    """
    out, errors = console(), console(stderr=True)
    config = ConfigStore().get(options.config).name
    output = Output(file=options.out / "images.h5", png=options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    with LocalServer() as server, _opened(options.file) as scan:
        out.print("starting a server on a free port and " + ("opening the file" if scan else "simulating the scan"))
        source = _simulated(options) if scan is None else _stored(options, scan)
        port = server.wait_ready()
        played = _play(port, source, config, {}, options.interval, errors)
        plain = _play(port, source, config, {"reconstruction.method": "zero_filled"}, 0.0, errors)
        generative = bool(played.images) and "scanside_generative" in played.images[-1].meta
        bar = _play(port, source, _BAR, {}, 0.0, errors) if generative else None
    for text in played.texts:
        errors.print(text, markup=False)
    if not played.images or not plain.images:
        errors.print("scanside demo: no image came back")
        return 1
    (options.out / "images.h5").unlink(missing_ok=True)
    _report(options, source, played, plain, bar, out)
    for line in output.write(played.images, source.xml):
        out.print(line, markup=False)
    return 0


def _opened(file: Path | None) -> AbstractContextManager[ScanFile | None]:
    return nullcontext() if file is None else open_scan(file)


def _simulated(options: DemoOptions) -> _Source:
    try:
        scan = simulate_scan(
            options.matrix,
            options.coils,
            options.acceleration,
            min(_CALIBRATION_LINES, options.matrix // 2),
            repetitions=options.frames,
            noise=_NOISE,
            noise_readouts=_NOISE_READOUTS,
            motion_degrees=_MOTION_DEGREES,
        )
    except ValueError as error:
        raise ConfigError(f"the scan cannot be simulated: {error}") from None
    return _Source(_title(scan), header_xml(scan.header), lambda: scan.readouts(_BATCH), len(scan), scan.reference)


def _title(scan: SimulatedScan) -> str:
    side, coils = scan.reference.shape[-1], len(scan.maps)
    return f"simulated head, {side} x {side}, {coils} coils, R = {scan.header.encodings[0].acceleration[0]}"


def _stored(options: DemoOptions, scan: ScanFile) -> _Source:
    return _Source(str(options.file), scan.xml, lambda: scan.batches(_BATCH), len(scan))


def _play(
    port: int, source: _Source, config: str, overrides: dict[str, str], interval: float, errors: Console
) -> _Played:
    """One session with the server. Raises DeliveryError or StreamError when it breaks off."""
    played = _Played()
    name = f"every {1e3 * interval:g} ms" if interval else overrides.get("reconstruction.method", config)
    with _display(errors) as display, ScanClient(port=port, timeout=60.0, on_arrival=played.take) as client:
        task = display.add_task(name.replace("_", "-"), total=source.readouts, live="")
        client.configure_text(config_text(config, overrides))
        client.header(source.xml)
        for batch in source.batches():
            client.acquisitions(batch, interval)
            played.sent += int((kinds(batch.headers["flags"]) <= ReadoutKind.CALIBRATION).sum())
            display.update(task, completed=client.readouts, live=_live(played))
        client.end_scan()
        for _ in client.arrivals():
            pass  # everything went to `take`
        display.update(task, live=_live(played))
        played.late = client.late
    if not client.closed:
        raise DeliveryError("the server ended the connection without CLOSE; run `scanside serve` to see why")
    return played


def _display(where: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[live]}"),
        console=where,
        disable=not where.is_terminal,
    )


def _live(played: _Played) -> str:
    latency = Latency.of(played.measured)
    if latency is None:
        return f"{len(played.images)} images"
    return f"{len(played.images)} images, last {milliseconds(played.measured[-1])}, p50 {milliseconds(latency.p50)}"


# --- what came of it ---------------------------------------------------------------------------------------------------------


class _Judged(msgspec.Struct, frozen=True, eq=False):
    """An image beside its truth, on the scale of the truth. scores: mean over all frames; None without a truth."""

    picture: np.ndarray
    truth: np.ndarray | None
    last: Scores | None
    mean: Scores | None


def _report(
    options: DemoOptions, source: _Source, played: _Played, plain: _Played, bar: _Played | None, out: Console
) -> None:
    method = _method(played.images[-1])
    ours = _judge(source, played.images)
    others = {"zero-filled": _judge(source, plain.images)}
    if bar is not None and bar.images:
        others[_method(bar.images[-1])] = _judge(source, bar.images)
    latency = Latency.of(played.measured)
    head = f"{method}, {milliseconds(played.measured[-1])}" if played.measured else method
    path = options.out / "comparison.png"
    if ours.truth is not None:
        panels = [Panel(name, judged.picture, _caption(judged)) for name, judged in {**others, head: ours}.items()]
        low, high = robust_window(ours.truth)
        reference = Panel("reference", ours.truth, source.name.partition(", ")[2])
        comparison_figure(path, reference, panels, window=(low, _SKULL * high))
    else:
        alike = {name: _fitted(judged.picture, ours.picture) for name, judged in others.items()}
        panels = [Panel(name, picture, "below: what differs") for name, picture in alike.items()]
        comparison_figure(path, Panel(head, ours.picture), panels)
    rows = table("", *(f">{name}" for name in (*others, method)))
    _add_scores(rows.add_row, [judged.mean for judged in (*others.values(), ours)])
    out.print(f"\n{source.name}", markup=False)
    if ours.mean is not None:
        out.print(rows)
    _figures(options, source, played, latency, out)
    out.print(f"the comparison is in {path}", markup=False)


def _figures(options: DemoOptions, source: _Source, played: _Played, latency: Latency | None, out: Console) -> None:
    rows = table("", "")
    rows.show_header = False
    frames = len(played.images)
    rows.add_row("images", f"{frames}, from {source.readouts} readouts, of which {played.late} went out late")
    if latency is not None:
        rows.add_row("latency", f"{latency} (last readout handed over to image whole)")
        frame = played.sent / frames * options.interval
        on_time = sum(value <= frame for value in played.measured)
        if options.interval:
            rows.add_row("on time", f"{on_time} of {frames} before the next frame was measured ({milliseconds(frame)})")
    if source.reference is not None:
        lines = source.reference.shape[-2] * frames
        rows.add_row("net acceleration", f"{lines / played.sent:.2f} with calibration lines")
    out.print(rows)


def _add_scores(add: Callable[..., None], means: Sequence[Scores | None]) -> None:
    scores = [mean for mean in means if mean is not None]
    if len(scores) < len(means):
        return
    add("PSNR", *(f"{mean.psnr:.1f} dB" for mean in scores))
    add("SSIM", *(f"{mean.ssim:.3f}" for mean in scores))
    add("NRMSE", *(f"{mean.nrmse:.3f}" for mean in scores))
    add("HFEN", *(f"{mean.hfen:.2f}" for mean in scores))


def _judge(source: _Source, images: list[Image]) -> _Judged:
    """Compare every image with its truth, where there is one of its size."""
    pairs = [(image, _truth(source, image)) for image in images]
    scored = [(_fitted(_picture(image), truth), truth) for image, truth in pairs if truth is not None]
    if not scored or len(scored) < len(images):
        return _Judged(_picture(images[-1]), None, None, None)
    scores = [evaluate(truth, picture) for picture, truth in scored]
    mean = Scores(*np.mean([msgspec.structs.astuple(score) for score in scores], axis=0).tolist())
    return _Judged(*scored[-1], scores[-1], mean)


def _truth(source: _Source, image: Image) -> np.ndarray | None:
    if source.reference is None:
        return None
    truth = np.abs(source.reference[int(image.header["repetition"]), int(image.header["slice"])])
    return truth if truth.shape == image.pixels.shape[-2:] else None


def _picture(image: Image) -> np.ndarray:
    """The magnitude of the middle slice of the first channel."""
    return np.asarray(np.abs(image.pixels[0, image.pixels.shape[1] // 2]))


def _fitted(picture: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The picture times the factor that brings it closest to the truth: gray levels of MRI have no unit."""
    energy = float(np.vdot(picture, picture))
    return picture * (float(np.vdot(picture, truth)) / energy) if energy > 0 else picture


def _caption(judged: _Judged) -> str:
    scores = judged.last
    return "" if scores is None else f"{scores.psnr:.1f} dB, SSIM {scores.ssim:.2f}, NRMSE {scores.nrmse:.2f}"


def _method(image: Image) -> str:
    word = image.meta.get("scanside_method", ["reconstruction"])[0]
    return _NAMES.get(word, word.replace("_", " "))
