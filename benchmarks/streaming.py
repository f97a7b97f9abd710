"""Latency and throughput of the server beside python-ismrmrd-server, in one run, by a neutral load client.

    python benchmarks/streaming.py [--peer DIR --peer-python PYTHON] [--coils 8 16 32] [--json FILE] [--write]

Scans come from `ismrmrd_generate_cartesian_shepp_logan` (Debian package ismrmrd-tools): 256 x 256, 2x readout oversampling.
The load client is `bench_mrd_client.py` in the folder given by --tools. Latency is from the hand-over of a frame's last
readout to the kernel until the image is whole at the client. `--peer` is a checkout of python-ismrmrd-server; it is started
with its own stock settings on loopback. `--write` puts the table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from report import Table, machine, update_document
from scanside.adapters.logs import configure_logging
from scanside.adapters.server import ServeOptions, Server

CASES = (
    # name, frames, pace in ms per readout, repetitions, configuration
    ("3 ms per readout", 1, 3.0, 40, "image"),
    ("1 ms per readout", 20, 1.0, 2, "image"),
    ("unpaced", 20, 0.0, 5, "image"),
    ("receive only", 20, 0.0, 5, "null"),
)


def generate(folder: Path, coils: int, frames: int) -> Path:
    """Make a scan of `frames` repetitions; returns its file."""
    path = folder / f"scan_{coils}_{frames}.h5"
    if not path.exists():
        command = ["ismrmrd_generate_cartesian_shepp_logan", "-m", "256", "-c", str(coils), "-o", str(path)]
        subprocess.run(command + (["-r", str(frames)] if frames > 1 else []), check=True, stdout=subprocess.DEVNULL)
    return path


def measure(tools: Path, scan: Path, port: int, config: str, pace: float, repetitions: int) -> dict[str, float]:
    """Run the load client once and read its summary."""
    command = [sys.executable, str(tools / "bench_mrd_client.py"), str(scan), "--port", str(port), "--config", config]
    command += ["--pace-ms", str(pace), "--reps", str(repetitions), "-q"]
    before = os.getloadavg()[0]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900).stdout
    if "# errors: []" not in output:
        raise SystemExit(f"the load client reports errors:\n{output}")
    found = {"load": before}
    latency = re.search(r"p50 ([\d.]+) p95 ([\d.]+) p99 ([\d.]+) max ([\d.]+) \(n=(\d+)\)", output)
    if latency:
        found |= dict(zip(("p50", "p95", "p99", "max", "images"), map(float, latency.groups()), strict=True))
    found["readouts_per_second"] = float(re.search(r"median: (\d+) acq/s", output)[1])
    return found


@contextlib.contextmanager
def peer_server(folder: Path, python: str) -> Iterator[int]:
    """python-ismrmrd-server on a free port of the loopback interface."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [python, "main.py", "-H=127.0.0.1", f"-p={port}"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.1)
        time.sleep(1)
        yield port
    finally:
        process.terminate()
        process.wait()


def resident() -> float:
    """Resident memory of this process and the workers together, in MiB."""
    total = 0
    for entry in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            text = entry.read_text()
            parent = re.search(r"PPid:\s+(\d+)", text)
            if (parent and int(parent[1]) == os.getpid()) or entry.parent.name == str(os.getpid()):
                found = re.search(r"VmRSS:\s+(\d+)", text)
                total += int(found[1]) if found else 0
    return total / 1024


def memory_over_frames(server: Server, tools: Path, folder: Path) -> list[float]:
    """Resident memory in MiB before and after each of ten sessions of 20 frames."""
    scan = generate(folder, 8, 20)
    measure(tools, scan, server.port, "default.xml", 0, 2)
    series = [resident()]
    for _ in range(10):
        measure(tools, scan, server.port, "default.xml", 0, 1)
        series.append(resident())
    return series


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """All cases for scanside and, with --peer, for the peer directly after each."""
    rows: list[dict[str, object]] = []
    configure_logging("warning")
    spool = None if arguments.no_spool else folder / "spool"
    options = ServeOptions(port=0, metrics_port=0, threads=arguments.threads, spool=spool)
    with Server(options) as server, contextlib.ExitStack() as stack:
        servers = {"scanside": (server.port, "default.xml")}
        if arguments.peer:
            port = stack.enter_context(peer_server(arguments.peer, arguments.peer_python))
            servers["python-ismrmrd-server"] = (port, "simplefft")
        for coils in arguments.coils:
            for name, frames, pace, repetitions, config in CASES:
                scan = generate(folder, coils, frames)
                for who, (port, plain) in servers.items():
                    if who != "scanside" and coils not in arguments.peer_coils:
                        continue
                    used = plain if config == "image" else config
                    count = max(2, round(repetitions * arguments.effort))
                    figures = measure(arguments.tools, scan, port, used, pace, count)
                    rows.append({"server": who, "coils": coils, "case": name, **figures})
                    print(rows[-1], flush=True)
        memory = memory_over_frames(server, arguments.tools, folder)
    return {"machine": machine(), "rows": rows, "memory_mib": memory}


def report(results: dict[str, object]) -> str:
    """The results as a Markdown section."""
    table = Table("server", "coils", "case", "p50 ms", "p95 ms", "p99 ms", "images", "readouts/s", "load")
    for row in results["rows"]:
        times = [f"{row[key]:.1f}" if key in row else "-" for key in ("p50", "p95", "p99")]
        images = f"{row['images']:.0f}" if "images" in row else "-"
        table.add(
            row["server"],
            row["coils"],
            row["case"],
            *times,
            images,
            f"{row['readouts_per_second']:.0f}",
            f"{row['load']:.2f}",
        )
    memory = results["memory_mib"]
    return (
        f"{table}\n\n256 x 256, 2x readout oversampling, root sum of squares of all coils on both sides; "
        "ours sends float32, the peer 16-bit integers. "
        "Unpaced latency is that of a queue: the client sends faster than anyone reconstructs. "
        f"Load is the one-minute average before each case.\n\nResident memory of server and worker over 200 further frames: "
        f"{memory[0]:.0f} MiB before, {memory[-1]:.0f} MiB after (largest {max(memory):.0f}).\n"
    )


def main() -> None:
    """Command line."""
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tools", type=Path, default=root.parent / "shared" / "tools", help="folder of bench_mrd_client.py"
    )
    parser.add_argument("--peer", type=Path, help="checkout of python-ismrmrd-server")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peer's requirements")
    parser.add_argument("--coils", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--peer-coils", type=int, nargs="+", default=[8], help="coils with which the peer runs too")
    parser.add_argument("--threads", type=int, default=0, help="threads of the worker; 0: all cores")
    parser.add_argument("--no-spool", action="store_true", help="keep nothing on disk while scans run")
    parser.add_argument("--effort", type=float, default=1.0, help="scales the number of repetitions")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="update docs/benchmarks.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = run(arguments, Path(folder))
    section = report(results)
    print(section)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    if arguments.write:
        update_document(root / "docs" / "benchmarks.md", "Streaming", section, results["machine"])


if __name__ == "__main__":
    main()
