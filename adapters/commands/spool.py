"""`scanside spool`: what servers have kept of scans, listed, reconstructed, exported, removed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import msgspec
import torch
from scanside.adapters import mrd
from scanside.adapters.files.ismrmrd import write_images, write_scan
from scanside.adapters.files.noise import NOISE_FOLDER, NoiseFiles
from scanside.adapters.files.spool import SUFFIX, SpoolReader, open_spool
from scanside.adapters.mrd_framing import Frame, Framer
from scanside.adapters.mrd_header import parse_header
from scanside.adapters.mrd_lengths import MessageId
from scanside.adapters.scan import Reply, scan_for
from scanside.adapters.spooling import default_folder, in_use, spool_files
from scanside.engine.config import ConfigStore, Value
from scanside.engine.errors import ConfigError, StreamError
from scanside.engine.limits import DEFAULT_LIMITS
from scanside.engine.messages import AcquisitionBatch, Image, WaveformRecord

from .output import console, table
from .results import Output, describe_image

__all__ = ["ReplayOptions", "clean_files", "export_file", "list_files", "replay_file"]

DAY = 86400.0


class ReplayOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Which file to reconstruct, how, and where to put the images. config: None takes that of the session."""

    file: str
    folder: Path | None = None
    output: Output = Output()
    config: str | None = None
    overrides: Mapping[str, str] = {}
    folders: Sequence[Path] = ()
    threads: int = 0


def list_files(folder: Path | None, *, check: bool) -> None:
    """Print one row per file; with `check` all of each file is read and compared with its checksums."""
    where, out = folder or default_folder(), console()
    rows = table("begun", "session", "configuration", "state", ">messages", ">MB")
    for path in spool_files(where):
        reader = open_spool(path)
        messages = sum(record.messages for record in reader.records(check=check))
        facts, state, size = reader.facts, _state(path, reader), path.stat().st_size / 1e6
        if facts is None:
            rows.add_row("-", path.name, "-", state, "-", f"{size:.1f}")
        else:
            begun = datetime.fromtimestamp(facts.started / 1e9).astimezone()
            rows.add_row(
                f"{begun:%Y-%m-%d %H:%M:%S}", facts.session[:8], facts.config, state, str(messages), f"{size:.1f}"
            )
    if rows.row_count:
        out.print(rows)
    else:
        out.print(f"nothing is kept in {where}", markup=False)


def _state(path: Path, reader: SpoolReader) -> str:
    if in_use(path):
        return "running"
    if reader.fault is not None:
        return f"damaged at byte {reader.fault.offset}: {reader.fault.text}"
    return "cut off" if reader.closing is None else reader.closing.outcome


def replay_file(options: ReplayOptions) -> int:
    """Reconstruct what a file has; returns the exit code, 1 when no image came of it.

    Raises ConfigError for a wrong file, name or value, StreamError for a file of which nothing can be read.
    """
    options.output.check()
    if options.threads:
        torch.set_num_threads(options.threads)
    out, errors, images = console(), console(stderr=True), list[Image]()
    path, store, xml = _find(options.file, options.folder), ConfigStore(options.folders), b""
    reader = _opened(path)
    noise = NoiseFiles(path.parent / NOISE_FOLDER)
    for reply in _replies(reader, store, options, noise):
        for frame in Framer().feed(b"".join(reply.buffers)):
            if frame.id == MessageId.IMAGE:
                images.append(mrd.image(frame))
            elif frame.id == MessageId.TEXT:
                errors.print(mrd.text(frame), markup=False)
        if reply.failed:
            errors.print(reply.text, markup=False)
    for frame in _frames(reader):
        if frame.id == MessageId.HEADER:
            xml = mrd.text(frame).encode()
            break
    for line in options.output.write(images, xml):
        out.print(line, markup=False)
    if not images:
        errors.print(f"scanside spool: no image came of {path.name}", markup=False)
        return 1
    out.print(f"{len(images)} images, {', '.join(sorted({describe_image(image) for image in images}))}", markup=False)
    return 0


def _replies(reader: SpoolReader, store: ConfigStore, options: ReplayOptions, noise: NoiseFiles) -> Iterator[Reply]:
    """What the server's worker would have answered."""
    facts = reader.facts
    if facts is None:
        return
    parameters: dict[str, Value] = {**facts.parameters, **options.overrides}
    threads = options.threads or len(os.sched_getaffinity(0))
    scan = scan_for(store, options.config or facts.config, parameters, facts.dialect, noise, threads)
    yield from scan.take(_frames(reader), time.monotonic())
    _report(reader)
    closing = reader.closing
    yield from scan.end(complete=closing is not None and closing.outcome == "complete")


def export_file(file: str, folder: Path | None, target: Path, group: str) -> int:
    """Write the readouts and waveforms of a file, or the images of a session that had only these, as ISMRMRD.

    Returns the exit code. Raises as `replay_file`, and DeliveryError when the target cannot be written.
    """
    Output(file=target, group=group).check()
    reader, out = _opened(_find(file, folder)), console()
    header = next((frame for frame in _frames(reader) if frame.id == MessageId.HEADER), None)
    xml = b"" if header is None else mrd.text(header).encode()
    if xml.lstrip("\ufeff \t\r\n".encode()).startswith(b"<"):
        waveforms: list[WaveformRecord] = []
        scan = parse_header(xml, DEFAULT_LIMITS)
        count = write_scan(target, scan, _readouts(reader, waveforms), group, waveforms)
        out.print(f"{count} readouts and {len(waveforms)} waveforms in {target}, group {group!r}", markup=False)
    else:
        images = [mrd.image(frame) for frame in _frames(reader) if frame.id == MessageId.IMAGE]
        count = write_images(target, images, group, xml) if images else 0
        out.print(f"{count} images in {target}, group {group!r}", markup=False)
    _report(reader)
    return 0 if count else 1


def _readouts(reader: SpoolReader, waveforms: list[WaveformRecord]) -> Iterator[AcquisitionBatch]:
    """The readouts, while waveforms are put aside."""
    for frame in _frames(reader):
        if frame.id == MessageId.ACQUISITION:
            yield mrd.acquisitions(frame, 0.0)
        elif frame.id == MessageId.WAVEFORM:
            waveforms.append(mrd.waveform(frame))


def clean_files(folder: Path | None, days: float | None) -> None:
    """Remove files that no server is writing and that were begun `days` ago or earlier. Raises ConfigError without days."""
    if days is None:
        raise ConfigError("say what to remove: --older-than DAYS, or --all")
    count = size = 0
    for path in spool_files(folder or default_folder()):
        facts = open_spool(path).facts
        begun = path.stat().st_mtime if facts is None else facts.started / 1e9
        if time.time() - begun >= days * DAY and not in_use(path):
            count, size = count + 1, size + path.stat().st_size
            path.unlink()
    console().print(f"{count} files removed, {size / 1e6:.1f} MB", markup=False)


def _find(file: str, folder: Path | None) -> Path:
    """The file that is meant. Raises ConfigError when it is none or more than one."""
    path = Path(file)
    if path.is_file():
        return path
    where = folder or default_folder()
    files = {path: path.name.removesuffix(SUFFIX).rpartition("-")[2] for path in spool_files(where)}
    found = [path for path, session in files.items() if session.startswith(file) or path.name == file]
    if len(found) != 1:
        what = f"{len(found)} files match" if found else "there is no such file, and no session begins like that"
        raise ConfigError(f"{file}: {what} in {where}; `scanside spool list` shows what there is")
    return found[0]


def _opened(path: Path) -> SpoolReader:
    reader = open_spool(path)
    if reader.facts is None:
        fault = reader.fault
        raise StreamError(f"{path.name} cannot be read: {fault.text if fault else 'it is empty'}", offset=0)
    return reader


def _frames(reader: SpoolReader) -> Iterator[Frame]:
    """The messages of the session."""
    framer = Framer()
    for record in reader.records():
        yield from framer.feed(record.view)


def _report(reader: SpoolReader) -> None:
    """Say where a file is damaged, once it was read."""
    if reader.fault is not None:
        console(stderr=True).print(
            f"damaged at byte {reader.fault.offset}: {reader.fault.text}; what stands before is used", markup=False
        )
