"""The server as a whole: start, drain, stop; workers that die; what it refuses to do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scanside.adapters import mrd
from scanside.adapters.server import ServeOptions, Server
from scanside.engine.errors import ConfigError

Connect = Callable[..., Any]
Scans = Callable[..., Any]
CONFIG = mrd.encode_config_file("default")
CLOSE = mrd.encode_close()
FEW = 3
"""Sessions that the server of these tests takes at the same time."""
PROGRAM = """
import sys
from pathlib import Path
from scanside.adapters.server import ServeOptions, Server
server = Server(ServeOptions(port=0, metrics_port=None, threads=1, config_folders=(Path(sys.argv[1]),)))
server.start()
print(f"port {server.port}", flush=True)
server.wait()
server.stop()
"""


class Process:
    """A server in a process of its own, so that it can be sent signals."""

    def __init__(self, folder: Path) -> None:
        words = [sys.executable, "-c", PROGRAM, str(folder)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        lines = iter(self.process.stdout.readline, "")
        self.port = next(int(line.split()[1]) for line in lines if line.startswith("port "))
        self._reader = threading.Thread(target=lambda: [None for _ in lines], daemon=True)
        self._reader.start()

    def worker(self) -> int:
        """Process id of the worker."""
        pid = self.process.pid
        children = {
            entry for task in Path(f"/proc/{pid}/task").iterdir() for entry in (task / "children").read_text().split()
        }
        return next(
            int(child) for child in children if b"adapters.worker" in Path(f"/proc/{child}/cmdline").read_bytes()
        )

    def stop(self) -> None:
        """End it, if it still runs."""
        self.process.terminate()
        self.process.wait(10)
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server of its own that takes few sessions; its worker gets killed, and in the last test it is told to end."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "mri").mkdir()
    (folder / "mri" / "cartesian.toml").write_text(f'aliases = ["default"]\n[limits]\nsessions = {FEW}\n')
    running = Process(folder)
    yield running
    running.stop()


def test_sessions_beyond_the_limit_are_told_to_come_back(alone: Process, connect: Connect, scan_bytes: Scans) -> None:
    scan = scan_bytes(32, 4, 1, 2)
    held = [connect(alone.port).send(CONFIG, mrd.encode_header(scan.xml), *scan.messages[:32]) for _ in range(FEW)]
    for wire in held:
        wire.until(lambda wire=wire: bool(wire.images))
    refused = connect(alone.port).send(scan.session("default")).finish()
    assert refused.closed_properly
    assert not refused.images
    assert "limit" in refused.texts[-1]
    for wire in held:
        wire.send(*scan.messages[32:], CLOSE).finish()
        assert len(wire.images) == 2
    assert len(connect(alone.port).send(scan.session("default")).finish().images) == 2


def test_a_worker_that_is_killed_is_replaced(alone: Process, connect: Connect, scan_bytes: Scans) -> None:
    scan = scan_bytes(32, 4, 1, 2)
    wire = connect(alone.port).send(CONFIG, mrd.encode_header(scan.xml), *scan.messages[:40])
    wire.until(lambda: bool(wire.images))
    killed = alone.worker()
    os.kill(killed, signal.SIGKILL)
    wire.send(*scan.messages[40:], CLOSE).finish(10)
    assert wire.closed_properly
    assert "worker" in wire.texts[-1]
    after = connect(alone.port).send(scan.session("default")).finish(60)
    assert len(after.images) == 2
    assert alone.worker() != killed


def test_a_signal_lets_scans_end_and_then_the_server(alone: Process, connect: Connect, scan_bytes: Scans) -> None:
    """Of three clients one ends by itself after the signal, one never does, and one has not said anything."""
    scan = scan_bytes(32, 4, 1, 2)
    start = CONFIG + mrd.encode_header(scan.xml)
    ending, endless = (connect(alone.port).send(start, *scan.messages[:40]) for _ in range(2))
    silent = connect(alone.port)
    for wire in (ending, endless):
        wire.until(lambda wire=wire: bool(wire.images))
    for _ in range(5):  # as of one who is impatient, or of a shell that tells the whole group
        alone.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", alone.port), timeout=1).close()
    ending.send(*scan.messages[40:], CLOSE).finish()
    assert len(ending.images) == 2
    assert not ending.texts
    endless.finish()
    assert len(endless.images) == 2, "what had arrived is reconstructed"
    assert "shutting down" in endless.texts[-1]
    assert endless.closed_properly
    assert silent.finish().ended
    assert alone.process.wait(10) == 0


def test_a_port_that_is_taken_is_named(server: Server) -> None:
    with pytest.raises(ConfigError, match=rf"{server.port}.*another server"), Server(ServeOptions(port=server.port)):
        pass


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (ServeOptions(port=0, workers=0), "workers"),
        (ServeOptions(port=0, default_config="nonsense"), "unknown configuration"),
        (ServeOptions(port=0, config_folders=(Path("/no/such/folder"),)), "no such folder"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: ServeOptions, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Server(options)


@pytest.mark.parametrize("host", ["192.0.2.1", "", "::"])
def test_the_network_is_not_let_in_by_accident(host: str) -> None:
    with pytest.raises(ConfigError, match="insecure"):
        Server(ServeOptions(port=0, host=host)).start()


def test_readiness_and_liveness(server: Server) -> None:
    assert server.live()
    assert server.ready() == (True, {"worker": True, "gateway": True, "accepting": True})


def test_what_fails_to_end_does_not_keep_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads would keep the process from ending."""
    before = set(threading.enumerate())
    server = Server(ServeOptions(port=0, metrics_port=0, threads=1, spool=None))
    server.start()
    http = server._http
    assert http is not None
    ended = http.stop

    def failing() -> None:
        ended()
        raise OSError("the log is gone")

    monkeypatch.setattr(http, "stop", failing)
    with pytest.raises(OSError, match="the log is gone"):
        server.stop()
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not left & {"scanside-broker", "gateway", "workers"}
