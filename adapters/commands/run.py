"""`scanside run`: a stored scan to images, without a server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scanside.adapters.files.ismrmrd import ScanFile, open_scan
from scanside.adapters.mrd_header import parse_header
from scanside.engine.config import ConfigStore, SystemConfig, with_overrides
from scanside.engine.errors import StreamError
from scanside.engine.messages import EndOfScan, Event, FrameKey, FrameStats, Image, Message, Note
from scanside.engine.streaming.session import Session

from .output import console, milliseconds, progress_bar, table
from .results import Output, describe_image

__all__ = ["RunOptions", "run_file"]

_BATCH = 64
"""Readouts per step; the progress moves in these steps."""
_STYLES = {"error": "red", "warning": "yellow", "info": "dim", "debug": "dim"}


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to reconstruct, how, and where to put it."""

    file: Path
    group: str = "dataset"
    output: Output = Output()
    config: str = "default"
    overrides: Mapping[str, str] = {}
    folders: Sequence[Path] = ()
    threads: int = 0
    """Of torch; 0 leaves its own choice."""


def run_file(options: RunOptions) -> int:
    """Reconstruct a file; returns the exit code, 1 when no image came of it.

    Raises ConfigError for a wrong file, name or value, StreamError for a file that is no usable scan.
    """
    options.output.check()
    config = with_overrides(ConfigStore(options.folders).get(options.config), options.overrides, source="-P")
    if options.threads:
        torch.set_num_threads(options.threads)
    errors, frames, images, method = console(stderr=True), _frames_table(), list[Image](), "-"
    with open_scan(options.file, options.group) as scan, progress_bar(errors) as progress:
        for event in _events(scan, config, progress):
            if isinstance(event, Image):
                images.append(event)
                method = event.meta.get("scanside_method", ["-"])[0]
            elif isinstance(event, FrameStats):
                _add_row(frames, event, method)
                method = "-"  # a frame that failed has no image, so no method
            elif isinstance(event, Note):
                errors.print(f"{event.level}: {event.text}", style=_STYLES[event.level], markup=False)
        xml = scan.xml
    return _report(options, frames, images, xml, errors)


def _report(options: RunOptions, frames: Table, images: list[Image], xml: bytes, errors: Console) -> int:
    out = console()
    if frames.row_count:
        out.print(frames)
    for line in options.output.write(images, xml):
        out.print(line, markup=False)
    if not images:
        errors.print(f"scanside run: no image came of {options.file} with {options.config}", markup=False)
        return 1
    sizes = ", ".join(sorted({describe_image(image) for image in images}))
    out.print(f"{len(images)} images, {sizes}", markup=False)
    return 0


def _events(scan: ScanFile, config: SystemConfig, progress: Progress) -> Iterator[Event]:
    """Everything the engine makes of the scan. A readout that cannot be used ends it, with what has come reconstructed."""
    session = Session(config)
    task = progress.add_task(config.name, total=len(scan))
    messages = _messages(scan, config)
    complete = True
    for message in messages:
        try:
            yield from session.feed(message)
        except StreamError as error:
            if session.header is None:
                raise
            yield Note("error", str(error))
            complete = False
            break
        progress.update(task, completed=sum(session.counts.values()))
    yield from session.feed(EndOfScan(complete=complete))


def _messages(scan: ScanFile, config: SystemConfig) -> Iterator[Message]:
    if scan.xml:
        yield parse_header(scan.xml, config.limits)
    yield from scan.images()
    if len(scan):
        yield from scan.batches(_BATCH)


def _frames_table() -> Table:
    return table("frame", "method", "outcome", ">net R", ">readouts", "trigger", "stages")


def _add_row(frames: Table, stats: FrameStats, method: str) -> None:
    stages = ", ".join(f"{name} {milliseconds(seconds)}" for name, seconds in stats.stages.items())
    outcome = f"{stats.outcome} ({stats.reason.replace('_', ' ')})" if stats.reason else stats.outcome
    frames.add_row(
        _name(stats.key), method, outcome, f"{stats.acceleration:.2f}", str(stats.readouts), stats.trigger, stages
    )


def _name(key: FrameKey) -> str:
    """The counters that are not 0, with repetition and slice always there."""
    rest = "".join(
        f" {name} {value}" for name in ("contrast", "phase", "set", "encoding") if (value := getattr(key, name))
    )
    return f"repetition {key.repetition} slice {key.slice}{rest}"
