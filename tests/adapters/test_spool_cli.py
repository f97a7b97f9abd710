"""What a server has kept: listed, reconstructed without it, exported, removed."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scanside.adapters import mrd
from scanside.adapters.commands.results import Output
from scanside.adapters.commands.spool import ReplayOptions, clean_files, export_file, list_files, replay_file
from scanside.adapters.files.ismrmrd import open_scan
from scanside.adapters.files.spool import SpoolClosing, SpoolEncoder, SpoolFacts
from scanside.adapters.local_server import LocalServer
from scanside.adapters.spooling import spool_files
from scanside.engine.errors import ConfigError, StreamError
from scanside.engine.evaluation import nrmse
from scanside.engine.headers import WAVEFORM_HEADER
from scanside.engine.messages import Image, WaveformRecord

Connect = Callable[..., Any]
Scans = Callable[..., Any]
SESSION = "3f2a" + "0" * 28
WELL = SpoolClosing(outcome="complete", images=2)


def keep(
    folder: Path,
    messages: list[bytes],
    closing: SpoolClosing | None = WELL,
    *,
    session: str = SESSION,
    days: float = 0,
    config: str = "mri/cartesian",
) -> Path:
    """A spool file as the server leaves it."""
    begun = time.time_ns() - round(days * 86400e9)
    encoder = SpoolEncoder()
    data = encoder.begin(SpoolFacts(session=session, started=begun, monotonic=1, config=config))
    for message in messages:
        data += encoder.head(message, 1, 2) + message
    if closing is not None:
        data += encoder.close(closing)
    path = folder / f"{begun}-{session}.scanspool"
    path.write_bytes(data)
    return path


@pytest.fixture
def messages(scan_bytes: Scans) -> list[bytes]:
    """Header and readouts of a scan of two images, with a waveform in between."""
    scan, header = scan_bytes(32, 4, 1, 2), np.zeros((), WAVEFORM_HEADER)
    header["channels"], header["number_of_samples"], header["waveform_id"] = 2, 3, 1
    waveform = WaveformRecord(header=header, samples=np.arange(6, dtype=np.uint32).reshape(2, 3))
    return [mrd.encode_header(scan.xml), *scan.messages[:10], mrd.encode_waveform(waveform), *scan.messages[10:]]


def images(path: Path) -> list[Image]:
    with open_scan(path) as file:
        return list(file.images())


def test_a_scan_is_reconstructed_from_what_was_kept(tmp_path: Path, messages: list[bytes], scan_bytes: Scans) -> None:
    path = keep(tmp_path, messages)
    for name, config in (("3f2a", None), (str(path), "mri/sense"), (path.name, None)):
        out = tmp_path / f"{config is None}{name[-6:]}.h5"
        assert replay_file(ReplayOptions(file=name, folder=tmp_path, output=Output(file=out), config=config)) == 0
        found = images(out)
        assert [int(image.header["repetition"]) for image in found] == [0, 1]
        assert nrmse(scan_bytes(32, 4, 1, 2).reference, found[0].pixels[0, 0], fit_scale=True) < 0.05


def test_of_a_damaged_file_what_stands_before_the_fault_is_used(
    tmp_path: Path, messages: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    path = keep(tmp_path, messages)
    data = bytearray(path.read_bytes())
    data[3 * len(data) // 4] ^= 4
    path.write_bytes(data)
    out = tmp_path / "out.h5"
    assert replay_file(ReplayOptions(file="3f", folder=tmp_path, output=Output(file=out))) == 0
    said = capsys.readouterr().err
    assert "damaged at byte" in said
    assert "cut off" in said
    first, second = images(out)
    assert first.meta["scanside_outcome"] == ["complete"]
    assert second.meta["scanside_outcome"] != ["complete"]
    assert export_file("3f", tmp_path, tmp_path / "raw.h5", "dataset") == 0
    with open_scan(tmp_path / "raw.h5") as file:
        assert 32 <= len(file) < 64
    list_files(tmp_path, check=True)
    assert "damaged at byte" in capsys.readouterr().out


def test_raw_data_is_exported_as_it_came(tmp_path: Path, messages: list[bytes], scan_bytes: Scans) -> None:
    keep(tmp_path, messages)
    out = tmp_path / "raw.h5"
    assert export_file("3f2a", tmp_path, out, "dataset") == 0
    scan = scan_bytes(32, 4, 1, 2)
    with open_scan(out) as file:
        assert file.xml == scan.xml
        again = [mrd.encode_acquisitions(batch) for batch in file.batches(1)]
        (waveform,) = file.waveforms()
    assert again == scan.messages
    assert waveform.samples.tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ConfigError, match="already has a group"):
        export_file("3f2a", tmp_path, out, "dataset")


def test_the_list_says_how_each_scan_ended(
    tmp_path: Path, messages: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    list_files(tmp_path, check=False)
    assert "nothing is kept" in capsys.readouterr().out
    keep(tmp_path, messages, days=3)
    keep(tmp_path, messages, None, session="a" * 32, days=2)
    keep(tmp_path, messages, SpoolClosing(outcome="failed", text="x"), session="b" * 32, days=1)
    running = keep(tmp_path, messages, None, session="c" * 32)
    with running.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        list_files(tmp_path, check=False)
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split("  ")[1].strip() for row in rows] == ["3f2a0000", "aaaaaaaa", "bbbbbbbb", "cccccccc"]
    for row, state in zip(rows, ("complete", "cut off", "failed", "running"), strict=True):
        assert state in row
        assert "66" in row.split()


def test_cleaning_takes_what_is_old_and_leaves_what_runs(
    tmp_path: Path, messages: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    old, young, running = (keep(tmp_path, messages, session=s * 32, days=d) for s, d in (("a", 9), ("b", 1), ("c", 9)))
    with pytest.raises(ConfigError, match="--all"):
        clean_files(tmp_path, None)
    with running.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        clean_files(tmp_path, 7)
        assert sorted(spool_files(tmp_path)) == sorted([young, running])
        clean_files(tmp_path, 0)
        assert spool_files(tmp_path) == [running]
    assert not old.exists()
    assert "1 files removed" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "says"), [("7", "no session begins"), ("", "2 files match")])
def test_a_file_that_is_not_there_or_not_one_is_told(
    tmp_path: Path, messages: list[bytes], name: str, says: str
) -> None:
    for session in ("a" * 32, "b" * 32):
        keep(tmp_path, messages, session=session)
    with pytest.raises(ConfigError, match=says):
        replay_file(ReplayOptions(file=name, folder=tmp_path))


def test_a_file_of_another_kind_is_told(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"\xff\xd8 not a scan at all")
    with pytest.raises(StreamError, match="no spool file"):
        replay_file(ReplayOptions(file=str(path)))


def test_from_a_server_that_is_killed_to_images(tmp_path: Path, connect: Connect, scan_bytes: Scans) -> None:
    """The power goes in the middle of a scan: what had arrived is there afterwards, and becomes images."""
    scan, folder, out = scan_bytes(32, 4, 1, 3), tmp_path / "spool", tmp_path / "out.h5"
    with LocalServer(["--spool", str(folder), "--threads", "1"]) as server:
        start = mrd.encode_config_file("mri/cartesian") + mrd.encode_header(scan.xml)
        wire = connect(server.wait_ready()).send(start, *scan.messages[:70])
        wire.until(lambda: len(wire.images) == 2)
        deadline = time.monotonic() + 20
        while sum(path.stat().st_size for path in spool_files(folder)) < 70 * len(scan.messages[0]):
            assert time.monotonic() < deadline
        subprocess.run(["kill", "-KILL", str(server.pid)], check=True)
    program = [sys.executable, "-m", "scanside.adapters.cli", "spool"]
    said = subprocess.run([*program, "list", "--spool", str(folder)], check=True, capture_output=True, text=True).stdout
    assert "cut off" in said
    (path,) = spool_files(folder)
    subprocess.run([*program, "replay", str(path), "-o", str(out)], check=True, capture_output=True)
    assert len(images(out)) == 3
