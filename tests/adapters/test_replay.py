"""Workers that are killed while scans run: each scan goes on with the next worker, and its images come once, all of them."""

from __future__ import annotations

import os
import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from scanside.adapters import mrd
from scanside.adapters.files.ismrmrd import header_xml
from scanside.adapters.local_server import LocalServer
from scanside.adapters.recovery import Recovery
from scanside.adapters.spooling import in_use, spool_files
from scanside.engine.simulation.scan import simulate_scan

Connect = Callable[..., Any]
Scans = Callable[..., Any]
CLOSE = mrd.encode_close()
pytestmark = pytest.mark.timeout(400)  # a worker takes seconds to start, several on a busy machine
PATIENCE = 120.0
"""Seconds until a worker is replaced on a busy machine."""
SLOW = (
    '<configuration><stream><gadget><property name="scanside.config" value="mri/l1_espirit"/>'
    '<property name="reconstruction.iterations" value="1500"/></gadget></stream></configuration>'
)

NOISE_QUESTION = (
    "<gadgetronStreamConfiguration><gadget><name>N</name><classname>NoiseSummaryGadget</classname><property>"
    "<name>noise_file</name><value>GadgetronNoiseCovarianceMatrix_noise/1</value></property></gadget></gadgetronStreamConfiguration>"
)


def start(scan: Any, count: int) -> bytes:
    """Configuration, header and the first readouts."""
    config = mrd.encode_config_file("mri/cartesian")
    return config + mrd.encode_header(scan.xml) + b"".join(scan.messages[:count])


def numbers(wire: Any) -> list[int]:
    return [int(image.header["image_index"]) for image in wire.images]


def soon(condition: Callable[[], object], seconds: float = PATIENCE) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class Spooling:
    """A server in a process of its own that loses its worker again and again."""

    def __init__(self, server: LocalServer, folder: Path, worker_of: Callable[[int], int]) -> None:
        self.port, self._server, self.folder, self._worker_of = server.wait_ready(), server, folder, worker_of

    def get(self, path: str) -> str:
        """What the server answers over HTTP, whatever its status."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._server.metrics_port}{path}", timeout=30) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            return str(error.read().decode())

    @property
    def files(self) -> list[Path]:
        return spool_files(self.folder)

    @property
    def worker(self) -> int:
        """Process id of the worker; 0 while there is none."""
        return self._worker_of(self._server.pid)

    @property
    def ready(self) -> bool:
        return '"ready":true' in self.get("/readyz")

    def kill(self) -> None:
        os.kill(self.worker, signal.SIGKILL)

    def wait_for_another(self, worker: int) -> None:
        """Until the successor of the worker that was killed takes sessions."""
        assert soon(lambda: self.worker not in (0, worker))
        time.sleep(0.5)  # the bus hears of the end of the one before the start of the other
        assert soon(lambda: self.ready)


@pytest.fixture(scope="module")
def server_of_its_own(tmp_path_factory: pytest.TempPathFactory, worker_of: Callable[[int], int]) -> Iterator[Spooling]:
    folder = tmp_path_factory.mktemp("spool")
    with LocalServer(["--threads", "1", "--spool", str(folder)]) as running:
        yield Spooling(running, folder, worker_of)


@pytest.fixture
def spooling(server_of_its_own: Spooling) -> Spooling:
    """The server, ready, with nothing in its spool."""
    assert soon(lambda: server_of_its_own.ready)
    for path in server_of_its_own.files:
        path.unlink()
    return server_of_its_own


@pytest.fixture
def expected(spooling: Spooling, connect: Connect, scan_bytes: Scans) -> list[np.ndarray]:
    """The images of the scan when nothing happens."""
    return [
        image.pixels
        for image in connect(spooling.port).send(scan_bytes(32, 4, 1, 3).session("mri/cartesian")).finish().images
    ]


def test_noise_measurements_outlive_the_worker(spooling: Spooling, connect: Connect) -> None:
    measured = simulate_scan(16, 3, 1, 0, noise_readouts=8)
    header = msgspec.structs.replace(measured.header, measurement_id="noise/1")
    lines = [mrd.encode_acquisitions(batch) for batch in measured.readouts(1)]
    session = [mrd.encode_config_file("mri/cartesian"), mrd.encode_header(header_xml(header)), *lines, CLOSE]
    assert connect(spooling.port).send(b"".join(session)).finish().closed_properly
    question = mrd.encode_config_text(NOISE_QUESTION) + CLOSE
    before = mrd.dependency(connect(spooling.port).send(question).finish().frames[0])
    worker = spooling.worker
    spooling.kill()
    spooling.wait_for_another(worker)
    after = mrd.dependency(connect(spooling.port).send(question).finish().frames[0])
    assert (before["status"], before["channels"]) == (["success"], ["3"])
    assert after == before


@pytest.mark.parametrize(("sent", "images"), [(0, 0), (20, 0), (32, 1), (70, 2), (96, 3)])
def test_a_scan_survives_its_worker(
    spooling: Spooling,
    connect: Connect,
    scan_bytes: Scans,
    expected: list[np.ndarray],
    sent: int,
    images: int,
) -> None:
    scan = scan_bytes(32, 4, 1, 3)
    wire = connect(spooling.port).send(start(scan, sent))
    wire.until(lambda: len(wire.images) == images)
    spooling.kill()
    wire.send(*scan.messages[sent:], CLOSE).finish(PATIENCE)
    assert numbers(wire) == [1, 2, 3]
    assert wire.closed_properly
    assert all("replaced" in text for text in wire.texts)
    for image, whole in zip(wire.images, expected, strict=True):
        np.testing.assert_allclose(image.pixels, whole, rtol=1e-5, atol=1e-6 * float(whole.max()))
    assert soon(lambda: not spooling.files)


def test_scans_go_on_live_and_survive_another_worker(spooling: Spooling, connect: Connect, scan_bytes: Scans) -> None:
    scan, before = scan_bytes(32, 4, 1, 3), resumed(spooling)
    wires = [connect(spooling.port).send(start(scan, 10 + number)) for number in range(3)]
    assert soon(lambda: len(spooling.files) == 3)
    spooling.kill()
    for number, wire in enumerate(wires):
        wire.send(*scan.messages[10 + number : 40])
        wire.until(lambda wire=wire: bool(wire.images), PATIENCE)
    assert soon(lambda: resumed(spooling) == before + 3)  # until then a death would be blamed on who is being replayed
    spooling.kill()
    for wire in wires:
        wire.send(*scan.messages[40:], CLOSE)
        assert numbers(wire.finish(PATIENCE)) == [1, 2, 3], wire.texts
        assert wire.closed_properly
    assert resumed(spooling) == before + 6


def resumed(spooling: Spooling) -> int:
    """Sessions that have gone on after a replay so far."""
    found = re.findall(r'sessions_replayed_total{outcome="resumed"} (\d+)', spooling.get("/metrics"))
    return int(found[0]) if found else 0


def test_a_scan_that_ends_every_worker_fails_and_takes_nobody_with_it(
    spooling: Spooling, connect: Connect, scan_bytes: Scans
) -> None:
    scan = scan_bytes(32, 4, 1, 3)
    neighbor = connect(spooling.port).send(start(scan, 40))
    neighbor.until(lambda: bool(neighbor.images))
    poison, bad = scan_bytes(128, 8, 2, 1), connect(spooling.port)
    session = poison.session("mri/cartesian").removeprefix(mrd.encode_config_file("mri/cartesian"))
    bad.send(mrd.encode_config_text(SLOW), session)
    for _ in range(2):  # while it computes, which takes many times as long
        worker, before = spooling.worker, processor_time(spooling.worker)
        assert soon(lambda worker=worker, before=before: processor_time(worker) > before + 0.5)
        spooling.kill()
        spooling.wait_for_another(worker)
    bad.finish(PATIENCE)
    assert "worker" in bad.texts[-1]
    assert not bad.images
    assert bad.closed_properly
    neighbor.send(*scan.messages[40:], CLOSE).finish(PATIENCE)
    assert numbers(neighbor) == [1, 2, 3]
    assert soon(lambda: len(spooling.files) == 1 and not in_use(spooling.files[0]))


def processor_time(pid: int) -> float:
    """Seconds that a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")


def test_a_client_that_leaves_while_its_scan_waits_for_a_worker_costs_nothing(
    spooling: Spooling, connect: Connect, scan_bytes: Scans
) -> None:
    scan = scan_bytes(32, 4, 1, 3)
    wire, other = (connect(spooling.port).send(start(scan, 40)) for _ in range(2))
    for each in (wire, other):
        each.until(lambda each=each: bool(each.images))
    spooling.kill()
    wire.until(lambda: bool(wire.texts))
    wire.close()
    other.send(*scan.messages[40:], CLOSE).finish(PATIENCE)
    assert numbers(other) == [1, 2, 3]
    assert soon(lambda: len(spooling.files) == 1)


def test_a_damaged_spool_file_is_not_replayed(spooling: Spooling, connect: Connect, scan_bytes: Scans) -> None:
    scan = scan_bytes(32, 4, 1, 3)
    wire = connect(spooling.port).send(start(scan, 40))
    wire.until(lambda: bool(wire.images))
    (path,) = spooling.files
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff\x00\xff\x00")
    spooling.kill()
    wire.finish(PATIENCE)
    assert "damaged" in wire.texts[-1]
    assert numbers(wire) == [1]
    assert wire.closed_properly


class _Session:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def resume(self) -> None:
        self.log.append(self.name)


def test_sessions_are_taken_up_one_at_a_time_in_their_order() -> None:
    log: list[str] = []
    recovery, (a, b, c) = Recovery(), (_Session(log, name) for name in "abc")
    for session in (a, b, c):
        recovery.enter(session)
    assert (log, len(recovery)) == (["a"], 3)
    assert [recovery.is_suspect(session) for session in (a, b, c)] == [True, False, False]
    recovery.leave(b)
    assert log == ["a"]
    recovery.leave(a)
    assert log == ["a", "c"]
    recovery.leave(c)
    recovery.leave(c)
    recovery.enter(a)
    assert (log, len(recovery)) == (["a", "c", "a"], 1)
