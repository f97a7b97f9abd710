"""What keeping scans on disk costs while they run, and how long a scan stands still when its worker is killed.

    python benchmarks/spool.py [--folder DIR] [--json FILE] [--write]

The cases are those of `streaming.py` with 8 coils, each without and with a spool, one after the other in one run.
`--folder`: where the spool lies. `--write` puts the tables into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import tempfile
import time
from pathlib import Path

from report import Table, machine, update_document
from scanside.adapters import mrd
from scanside.adapters.files.ismrmrd import open_scan
from scanside.adapters.logs import configure_logging
from scanside.adapters.mrd_framing import Framer
from scanside.adapters.server import ServeOptions, Server
from streaming import generate, measure

CASES = (
    # name, frames, pace in ms per readout, repetitions, configuration
    ("3 ms per readout", 1, 3.0, 16, "default.xml"),
    ("unpaced", 20, 0.0, 2, "default.xml"),
    ("receive only", 20, 0.0, 2, "null"),
)
COILS = 8
PATIENCE = 40.0
"""Seconds after which something has gone wrong."""
PACE = 0.001
"""Seconds between the readouts of the scan whose worker is killed."""
KILLED_AFTER = (256, 1280)
"""Readouts after which the worker is killed."""


def lost(server: Server) -> float:
    """Sessions that went on without their spool file."""
    registry = server.metrics.registry
    values = (registry.get_sample_value("scanside_spool_lost_total", {"reason": word}) for word in ("behind", "disk"))
    return sum(value or 0 for value in values)


def cost(tools: Path, scans: Path, spool: Path) -> list[dict[str, object]]:
    """All cases without and with a spool."""
    rows: list[dict[str, object]] = []
    plain = ServeOptions(port=0, metrics_port=None)
    kept = ServeOptions(port=0, metrics_port=None, spool=spool, spool_bytes=10**11)
    with Server(plain) as without, Server(kept) as with_spool:
        for name, frames, pace, repetitions, config in CASES:
            scan = generate(scans, COILS, frames)
            for word, server in (("off", without), ("on", with_spool)):
                before = lost(server)
                figures = measure(tools, scan, server.port, config, pace, repetitions)
                rows.append({"case": name, "spool": word, **figures, "lost": lost(server) - before})
                print(rows[-1], flush=True)
    return rows


def worker() -> int:
    """Process id of the one worker that is a child of this process."""
    for entry in Path("/proc/self/task").glob("*/children"):
        for child in entry.read_text().split():
            if b"adapters.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    raise SystemExit("there is no worker")


def stand_still(scans: Path, spool: Path) -> list[dict[str, float]]:
    """Kill the worker after so many readouts; seconds until there is another one, and until its first new image."""
    rows = []
    with open_scan(generate(scans, COILS, 20)) as file:
        xml, messages = file.xml, [mrd.encode_acquisitions(batch) for batch in file.batches(1)]
    with Server(ServeOptions(port=0, metrics_port=None, spool=spool, spool_bytes=10**11)) as server:
        for count in KILLED_AFTER:
            with socket.create_connection(("127.0.0.1", server.port)) as sock:
                framer = Framer()
                sock.settimeout(PATIENCE)
                sock.sendall(mrd.encode_config_file("default.xml") + mrd.encode_header(xml))
                for first in range(0, count, 256):
                    for message in messages[first : first + 256]:
                        sock.sendall(message)
                        time.sleep(PACE)
                    images(sock, framer, 1)
                os.kill(worker(), signal.SIGKILL)
                killed = time.monotonic()
                sock.sendall(b"".join(messages[count : count + 256]))
                wait_until(server, ready=False)
                wait_until(server, ready=True)
                ready = time.monotonic()
                images(sock, framer, 1)
                rows.append({"readouts": count, "worker_s": ready - killed, "replay_s": time.monotonic() - ready})
                print(rows[-1], flush=True)
    return rows


def wait_until(server: Server, *, ready: bool) -> None:
    """Wait until the server is ready, or is not."""
    deadline = time.monotonic() + PATIENCE
    while server.ready()[0] != ready:
        if time.monotonic() > deadline:
            raise SystemExit(f"the server was not {'ready' if ready else 'without a worker'} within {PATIENCE:g} s")
        time.sleep(0.001)


def images(sock: socket.socket, framer: Framer, count: int) -> None:
    """Wait for so many images."""
    found = 0
    while found < count:
        data = sock.recv(1 << 20)
        if not data:
            raise SystemExit("the server closed the connection")
        frames = framer.feed(data)
        found += sum(frame.count for frame in frames if frame.id == mrd.MessageId.IMAGE)


def report(results: dict[str, object]) -> str:
    """The results as a Markdown section."""
    table = Table(
        "case", "spool", "p50 ms", "p95 ms", "p99 ms", "images", "readouts/s", "sessions without file", "load"
    )
    for row in results["cost"]:
        times = [f"{row[key]:.1f}" if key in row else "-" for key in ("p50", "p95", "p99")]
        number = f"{row['images']:.0f}" if "images" in row else "-"
        rate, load = f"{row['readouts_per_second']:.0f}", f"{row['load']:.2f}"
        table.add(row["case"], row["spool"], *times, number, rate, f"{row['lost']:.0f}", load)
    killed = Table("readouts kept", "MB", "until there is a worker, s", "until the next image, s")
    for row in results["killed"]:
        size = row["readouts"] * (342 + 512 * COILS * 8) / 1e6
        killed.add(f"{row['readouts']:.0f}", f"{size:.0f}", f"{row['worker_s']:.2f}", f"{row['replay_s']:.2f}")
    return (
        f"{table}\n\n256 x 256, 8 coils, 2x readout oversampling: 33 kB per readout. Unpaced, the client sends faster than any "
        "scanner, and client, server, worker and the writing of files share the two cores; a session for which the disk is too "
        "slow goes on without its file. Receive only keeps nothing.\n\n"
        f"A worker killed in the middle of such a scan, by SIGKILL:\n\n{killed}\n\n"
        "The second time is that of the replay and of the next image; the images that the client had are not sent again.\n"
    )


def main() -> None:
    """Command line."""
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tools", type=Path, default=root.parent / "shared" / "tools", help="folder of bench_mrd_client.py"
    )
    parser.add_argument("--folder", type=Path, help="folder of the spool; without it a temporary one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="update docs/benchmarks.md")
    arguments = parser.parse_args()
    configure_logging("error")
    with tempfile.TemporaryDirectory() as folder:
        spool = arguments.folder or Path(folder) / "spool"
        costs = cost(arguments.tools, Path(folder), spool)
        results = {"machine": machine(), "cost": costs, "killed": stand_still(Path(folder), spool)}
    section = report(results)
    print(section)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    if arguments.write:
        update_document(root / "docs" / "benchmarks.md", "Spool", section, results["machine"])


if __name__ == "__main__":
    main()
