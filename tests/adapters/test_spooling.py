"""The writer of spool files on real disks: what it keeps, what it removes, and what it does when the disk gives out."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scanside.adapters import mrd
from scanside.adapters.files.spool import RECORD_BYTES, SpoolClosing, SpoolFacts, open_spool
from scanside.adapters.server import ServeOptions, Server
from scanside.adapters.spooling import QUEUE_BYTES, Spool, SpoolOptions, in_use, spool_files
from scanside.engine.errors import ConfigError

Connect = Callable[..., Any]
Scans = Callable[..., Any]
WELL = SpoolClosing(outcome="complete", images=1)
CONFIG, CLOSE = mrd.encode_config_file("mri/cartesian"), mrd.encode_close()


def facts(number: int = 0) -> SpoolFacts:
    return SpoolFacts(session=f"{number:032x}", started=10**18 + number * 10**9, monotonic=0, config="mri/sense")


def soon(condition: Callable[[], object], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def lost() -> list[str]:
    """Reasons for which sessions went on without their files."""
    return []


@pytest.fixture
def spool(tmp_path: Path, lost: list[str]) -> Iterator[Spool]:
    made = Spool(SpoolOptions(folder=tmp_path / "spool", floor=0), lost.append)
    made.start()
    yield made
    made.stop()


def interned(text: str) -> bool:
    """Whether the interpreter keeps a string of this text in its table."""
    copy = "".join(list(text))
    return sys.intern(copy) is not copy


def fill(spool: Spool, number: int, pieces: int = 3, size: int = 1000) -> Any:
    log = spool.begin(facts(number))
    for piece in range(pieces):
        log.append(memoryview(bytes([piece % 256]) * size), 1, 100 + piece)
    return log


# --- what is kept ------------------------------------------------------------------------------------------------------------


def test_what_is_handed_over_is_in_the_file_in_order_and_only_its_owner_can_read_it(spool: Spool) -> None:
    log = fill(spool, 1, 700)
    assert soon(lambda: log.written == 700)
    reader = open_spool(log.path)
    assert [bytes(record.view) for record in reader.records()] == [bytes([n % 256]) * 1000 for n in range(700)]
    assert (reader.facts, reader.fault, reader.closing) == (facts(1), None, None)
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(log.path.parent.stat().st_mode) == 0o700
    assert in_use(log.path)


@pytest.mark.parametrize("keep", [True, False])
def test_the_file_of_a_session_that_is_over_is_closed_or_removed(spool: Spool, keep: bool) -> None:
    log = fill(spool, 2)
    log.end(WELL, keep=keep)
    assert soon(lambda: log.written == 3 and not (log.path.exists() and in_use(log.path)))
    assert log.path.exists() == keep
    if keep:
        reader = open_spool(log.path)
        assert len(list(reader.records())) == 3
        assert (reader.closing, reader.fault) == (WELL, None)


def test_a_session_without_data_leaves_no_file(spool: Spool) -> None:
    log = spool.begin(facts())
    log.end(WELL, keep=True)
    spool.stop()
    assert not spool_files(spool.options.folder)


def test_stopping_writes_what_waits(spool: Spool) -> None:
    log = fill(spool, 3, 50, 100_000)
    spool.stop()
    assert len(list(open_spool(log.path).records())) == 50
    assert not in_use(log.path)


def test_files_of_old_sessions_make_room_and_those_in_use_do_not(tmp_path: Path, lost: list[str]) -> None:
    old = Spool(SpoolOptions(folder=tmp_path, floor=0))
    old.start()
    for number in range(4):
        fill(old, number).end(WELL, keep=True)
    held = fill(old, 0x20)
    assert soon(lambda: held.written == 3 and not any(map(in_use, spool_files(tmp_path)[:4])))
    size = held.path.stat().st_size
    new = Spool(SpoolOptions(folder=tmp_path, floor=0, limit=3 * size + size // 2), lost.append)
    new.start()
    left = [path.name[-33 - len(".scanspool") + 1 :][:32] for path in spool_files(tmp_path)]
    assert [int(name, 16) for name in left] == [2, 3, 0x20]
    assert new.status().trouble == ""
    new.stop()
    tight = Spool(SpoolOptions(folder=tmp_path, floor=0, limit=size // 2))
    tight.start()
    assert spool_files(tmp_path) == [held.path], "what is being written stays, whatever its size"
    assert "the limit is" in tight.status().trouble
    assert tight.status().used == held.path.stat().st_size
    for each in (tight, old):
        each.stop()


# --- when the disk gives out -------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--no-spool"):
        Spool(SpoolOptions(folder=tmp_path / "file")).start()


def test_too_little_free_space_is_told(tmp_path: Path) -> None:
    spool = Spool(SpoolOptions(folder=tmp_path, floor=1 << 62))
    spool.start()
    assert "make room" in spool.status().trouble
    assert spool.status().free > 0
    spool.stop()


def test_a_writer_that_is_too_slow_costs_the_file_and_stalls_nobody(tmp_path: Path, lost: list[str]) -> None:
    spool = Spool(SpoolOptions(folder=tmp_path), lost.append)  # its threads were not started: as slow as can be
    log, view = spool.begin(facts()), memoryview(bytes(RECORD_BYTES))
    for _ in range(QUEUE_BYTES // RECORD_BYTES):
        log.append(view, 1, 0)
    assert log.lost == ""
    log.append(view, 1, 0)
    log.append(view, 1, 0)
    assert (log.lost, lost, len(spool)) == ("behind", ["behind"], QUEUE_BYTES // RECORD_BYTES)
    assert spool.status().behind
    spool.start()
    assert soon(lambda: not spool.status().behind)
    spool.stop()


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file of this process may grow beyond 256 KiB: writing fails as on a full disk, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_no_more_costs_the_file_until_it_takes_again(
    spool: Spool, lost: list[str], full_disk: None
) -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))
    log, small = fill(spool, 5, 40, 10_000), fill(spool, 6)
    assert soon(lambda: log.lost and small.written == 3)
    assert (log.lost, small.lost, lost) == ("disk", "", ["disk"])
    reader = open_spool(log.path)
    whole = list(reader.records())
    assert len(whole) < 40
    assert all(bytes(record.view) == bytes([n]) * 10_000 for n, record in enumerate(whole))
    log.end(WELL, keep=False)
    assert soon(lambda: not log.path.exists())


SCAN_WITH_A_FULL_DISK = """
import resource, sys
from pathlib import Path
from scanside.adapters.server import ServeOptions, Server
server = Server(ServeOptions(port=0, metrics_port=0, threads=1, spool=Path(sys.argv[1])))
server.start()
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
print(f"port {server.port}", flush=True)
server.wait()
print("lost", server.metrics.registry.get_sample_value("scanside_spool_lost_total", {"reason": "disk"}), flush=True)
server.stop()
"""


def test_a_scan_goes_on_while_the_disk_takes_no_more(tmp_path: Path, connect: Connect, scan_bytes: Scans) -> None:
    words = [sys.executable, "-c", SCAN_WITH_A_FULL_DISK, str(tmp_path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        port = next(int(line.split()[1]) for line in process.stdout if line.startswith("port "))
        scan = scan_bytes(64, 4, 1, 3)
        wire = connect(port).send(scan.session("mri/cartesian")).finish()
        assert len(wire.images) == 3
        assert not wire.texts
        process.send_signal(signal.SIGTERM)
        assert "lost 1.0" in process.stdout.read()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


# --- in the server -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spooling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("spool")
    with Server(ServeOptions(port=0, metrics_port=0, threads=1, spool=folder)) as running:
        yield running


def kept(server: Server) -> list[Path]:
    assert server.options.spool is not None
    return spool_files(server.options.spool)


def test_the_file_of_a_scan_goes_when_its_images_are_out(spooling: Server, connect: Connect, scan_bytes: Scans) -> None:
    scan = scan_bytes(32, 4, 1, 2)
    wire = connect(spooling.port).send(CONFIG, mrd.encode_header(scan.xml), *scan.messages[:40])
    assert soon(lambda: len(kept(spooling)) == 1)
    wire.send(*scan.messages[40:], CLOSE).finish()
    assert len(wire.images) == 2
    assert soon(lambda: not kept(spooling))


def test_the_file_of_a_scan_that_was_cut_off_or_failed_stays(
    spooling: Server, connect: Connect, scan_bytes: Scans
) -> None:
    scan = scan_bytes(32, 4, 1, 2)
    start = CONFIG + mrd.encode_header(scan.xml) + b"".join(scan.messages[:40])
    connect(spooling.port).send(start, scan.messages[40][:100]).half_close().finish()
    connect(spooling.port).send(start, b"\xe7\x03 no message").finish()
    assert soon(lambda: len(kept(spooling)) == 2 and not any(map(in_use, kept(spooling))))
    found = []
    for path in kept(spooling):
        reader = open_spool(path)
        sent = b"".join(bytes(record.view) for record in reader.records())
        assert sent == mrd.encode_header(scan.xml) + b"".join(scan.messages[:40])
        assert reader.fault is None
        found.append((reader.closing.outcome, reader.closing.images, "999" in reader.closing.text))
        path.unlink()
    assert sorted(found) == [("failed", 2, True), ("incomplete", 2, False)]


def test_a_query_and_a_scan_that_is_only_received_leave_nothing(
    spooling: Server, connect: Connect, scan_bytes: Scans
) -> None:
    connect(spooling.port).send(scan_bytes().session("mri/receive")).finish()
    connect(spooling.port).send(mrd.encode_query(mrd.Query(1, "gadgetron::version")), CLOSE).finish()
    assert spooling.ready()[1]["spool"]
    assert not kept(spooling)


def test_a_full_spool_takes_no_scan_and_says_what_to_do(tmp_path: Path, connect: Connect, scan_bytes: Scans) -> None:
    scan = scan_bytes()
    with Server(ServeOptions(port=0, threads=1, metrics_port=None, spool=tmp_path, spool_bytes=1)) as server:
        wire = connect(server.port).send(CONFIG, mrd.encode_header(scan.xml), scan.messages[0])
        assert soon(lambda: not server.ready()[0])
        assert server.ready()[1]["spool"] is False
        refused = connect(server.port).send(scan.session("mri/cartesian")).finish()
        assert not refused.images
        assert "--spool-limit" in refused.texts[-1]
        wire.send(*scan.messages[1:], CLOSE).finish()
        assert len(wire.images) == 1, "a scan that was accepted goes on"
        assert soon(lambda: server.ready()[0])


def test_raw_data_can_be_kept(tmp_path: Path, connect: Connect, scan_bytes: Scans) -> None:
    scan = scan_bytes()
    with Server(ServeOptions(port=0, threads=1, metrics_port=None, spool=tmp_path, keep_raw=True)) as server:
        assert len(connect(server.port).send(scan.session("mri/cartesian")).finish().images) == 1
    (path,) = spool_files(tmp_path)
    reader = open_spool(path)
    assert sum(record.messages for record in reader.records()) == 1 + len(scan.messages)
    assert reader.closing == WELL
    assert os.access(path, os.R_OK)


def test_names_of_files_leave_nothing_in_the_interpreter(spool: Spool) -> None:
    """Its table of interned strings would grow by megabytes with names that are used once."""
    log = fill(spool, 77)
    log.end(WELL, keep=False)
    assert soon(lambda: len(spool) == 0 and not os.path.exists(log._file))  # noqa: PTH110 - a Path would intern the name
    assert not interned(log._file.rpartition("/")[2])
    assert interned("keep")
