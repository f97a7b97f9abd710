"""What a healthy scan feels of misbehaving peers on the same server: its latency beside each fault, and without.

    python benchmarks/acceptance_neighbor.py [--rows "5 grammar" ...] [--json FILE] [--write]

A healthy scanner in a process of its own sends frames without a pause, a readout every 0.5 ms. Beside it, seconds of quiet and
seconds with a fault take turns, the faults of one run in turn as well: peers that misbehave in the ways of that row come one
after another, at most ten a second. They have the lowest priority, since in life they have a processor of their own. Latency
is from the hand-over of a frame's last readout until its image is whole. The rise is that of the 99th percentile; its interval
holds 95 % of 2000 samples that draw seconds anew. Where it reaches both sides of 10 %, the rise is not resolved. Two rows are
for comparison: `nothing` has no peers at all, `healthy` has peers that send a whole scan and do nothing wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import multiprocessing
import os
import sys
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import torch
from acceptance_faults import Faults
from acceptance_parts import WatchedServer, probe
from report import Table, machine, update_document
from scanside.adapters.client import ScanClient
from scanside.adapters.files.ismrmrd import header_xml
from scanside.engine.messages import Image
from scanside.engine.simulation.scan import simulate_scan

__all__ = ["Neighbor"]

MATRIX, COILS, INTERVAL = 32, 8, 0.0005
"""Of the neighbor's frames; seconds between readouts."""
SESSION_FRAMES, FIRST_FRAMES = 200, 2
"""Frames of a session of the neighbor; at its beginning, what is set up once counts as well and is left out."""
ROUNDS, WINDOW, SETTLE, PERIOD = 12, 1.0, 0.05, 0.1
"""Faulty windows for each row; their length; what is left out at their beginning; between two peers. In s."""
SAMPLES, LEVEL, MOST = 2000, 0.99, 10.0
"""Of the interval; the percentile; the rise of it that is allowed, percent."""
NOTHING, HEALTHY = "nothing", "healthy"

Frames = list[tuple[float, float]]
"""Arrival on the monotonic clock and latency, s; NaN for a frame that was never sent."""


def neighbor(port: int, stop: Event, answers: multiprocessing.Queue[tuple[int, Frames, list[str]]]) -> None:
    """A healthy scanner in a process of its own: session after session until it is stopped."""
    torch.set_num_threads(1)
    gc.disable()  # pauses of its own are none of the server
    scan = simulate_scan(MATRIX, COILS, 1, 0, repetitions=SESSION_FRAMES, noise_readouts=0)
    batches, xml = list(scan.readouts(MATRIX)), header_xml(scan.header)
    sent, frames, texts = 0, Frames(), list[str]()
    while not stop.is_set():
        with ScanClient(port=port, timeout=30.0) as client:
            client.configure("mri/cartesian")
            client.header(xml)
            for batch in batches:
                client.acquisitions(batch, INTERVAL)
                sent += 1
                if stop.is_set():
                    break
            client.end_scan()
            for place, arrival in enumerate(client.arrivals()):
                if not isinstance(arrival.item, Image):
                    texts.append(str(arrival.item))
                else:
                    known = arrival.latency is not None and place >= FIRST_FRAMES
                    frames.append((arrival.at, arrival.latency if known else float("nan")))
    answers.put((sent, frames, texts))


class Neighbor:
    """A context manager: a neighbor scans while the block runs; `sent`, `frames` and `texts` are known after it."""

    def __init__(self, port: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._stop, self._answers = context.Event(), context.Queue()
        self._process = context.Process(target=neighbor, args=(port, self._stop, self._answers))
        self.sent, self.frames, self.texts = 0, Frames(), list[str]()

    def __enter__(self) -> Neighbor:
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.sent, self.frames, self.texts = self._answers.get(timeout=60)
        self._process.join()

    @property
    def lost(self) -> int:
        """Frames that were sent and did not come back."""
        return self.sent - len(self.frames)


# --- the other peers ---------------------------------------------------------------------------------------------------------


def misbehave(port: int, sessions: list[list[bytes]], pause: float, until: float, first: int) -> int:
    """Peers one after another until a time of the monotonic clock; returns how many there have been, `first` included."""
    count, due = first, time.monotonic()
    while (due := max(due, time.monotonic())) < until - PERIOD:
        probe(port, sessions[count % len(sessions)], pause=pause)
        count, due = count + 1, due + PERIOD
        time.sleep(max(0.0, due - time.monotonic()))
    return count


def peers(rows: list[str], port: int, begin: float, counted: multiprocessing.Queue[list[int]]) -> None:
    """All peers of all rows, in a process of lowest priority: a quiet window, then one with the fault, row after row."""
    os.nice(19)
    sessions = [sessions_of(row) for row in rows]
    counts = [0] * len(rows)
    for number, start in enumerate(_starts(begin, len(rows))):
        row = number % len(rows)
        time.sleep(max(0.0, start - time.monotonic()))
        if rows[row] != NOTHING:
            counts[row] = misbehave(port, *sessions[row], start + WINDOW, counts[row])
    counted.put(counts)


def _starts(begin: float, rows: int) -> list[float]:
    """When the windows with faults begin; each has a quiet one before it."""
    return [begin + (2 * number + 1) * WINDOW for number in range(ROUNDS * rows)]


def sessions_of(row: str) -> tuple[list[list[bytes]], float]:
    """What the peers of a row send, piece by piece, and the pause between the pieces, s."""
    faults = Faults()
    whole = faults.whole()
    if row == "2 slow loris":
        return [[whole[0] + whole[1], *(bytes([byte]) for byte in whole[2][:8])]], 0.1
    if row == "3, 4 splits":
        opening, *lines = whole
        cut = [line[at : at + 997] for line in lines for at in range(0, len(line), 997)]
        return [[opening, *cut]], 0.0005
    if row in (HEALTHY, NOTHING):
        return [whole], 0.0005
    return faults.sessions()[row], 0.0


# --- the comparison ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """One fault; percentiles 50, 95 and 99 in ms, the rise of the last with its interval in percent."""

    name: str
    peers: int
    frames: tuple[int, int]
    quiet: tuple[float, float, float]
    beside: tuple[float, float, float]
    rise: float
    interval: tuple[float, float]
    lost: int
    texts: int

    @property
    def verdict(self) -> str:
        """In words."""
        if self.lost or self.texts:
            return "FAIL"
        if self.interval[0] > MOST:
            return "rises"
        return "at most 10 %" if self.interval[1] <= MOST else "not resolved"


def compare(port: int, rows: list[str]) -> list[Row]:
    """Measure some rows in one run, which share their quiet windows."""
    context = multiprocessing.get_context("spawn")
    counted: multiprocessing.Queue[list[int]] = context.Queue()
    with Neighbor(port) as healthy:
        begin = time.monotonic() + 7.0  # both processes have loaded what they need, and the neighbor scans
        starts = _starts(begin, len(rows))
        context.Process(target=peers, args=(rows, port, begin, counted)).start()
        time.sleep(starts[-1] + WINDOW - time.monotonic())
    counts = counted.get(timeout=60)
    quiet = _windows(healthy.frames, [start - WINDOW for start in starts])
    faulty = [_windows(healthy.frames, starts[place :: len(rows)]) for place in range(len(rows))]
    lost = healthy.lost, len(healthy.texts)
    return [_row(*values, quiet, lost) for values in zip(rows, counts, faulty, strict=True)]


def _row(name: str, count: int, beside: list[np.ndarray], quiet: list[np.ndarray], lost: tuple[int, int]) -> Row:
    rng = np.random.default_rng(0)
    draws = [_rise(_drawn(quiet, rng), _drawn(beside, rng)) for _ in range(SAMPLES)]
    low, high = np.quantile(draws, [0.025, 0.975])
    sizes = (sum(map(len, quiet)), sum(map(len, beside)))
    ends = _percentiles(quiet), _percentiles(beside)
    return Row(name, count, sizes, *ends, _rise(quiet, beside), (float(low), float(high)), *lost)


def _windows(frames: Frames, starts: list[float]) -> list[np.ndarray]:
    """Latencies by window, s."""
    at, latency = np.array(frames).T
    return [latency[(at >= start + SETTLE) & (at < start + WINDOW) & np.isfinite(latency)] for start in starts]


def _drawn(windows: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    return [windows[place] for place in rng.integers(len(windows), size=len(windows))]


def _rise(quiet: list[np.ndarray], beside: list[np.ndarray]) -> float:
    before, after = (np.quantile(np.concatenate(windows), LEVEL) for windows in (quiet, beside))
    return float(100 * (after / before - 1))


def _percentiles(windows: list[np.ndarray]) -> tuple[float, float, float]:
    low, middle, high = 1e3 * np.quantile(np.concatenate(windows), [0.5, 0.95, LEVEL])
    return float(low), float(middle), float(high)


# --- command line ------------------------------------------------------------------------------------------------------------


def report(rows: list[dict[str, object]]) -> str:
    """The rows as Markdown."""
    table = Table(
        "fault", "peers", "frames", "alone p50, p95, p99 ms", "beside it, ms", "p99", "95 %", "lost", "result"
    )
    for values in rows:
        row = Row(**values)
        alone, beside = (", ".join(f"{value:.2f}" for value in part) for part in (row.quiet, row.beside))
        low, high = row.interval
        frames = f"{row.frames[0]} + {row.frames[1]}"
        cells = f"{row.rise:+.0f} %", f"{low:+.0f} to {high:+.0f} %", row.lost, row.verdict
        table.add(row.name, row.peers, frames, alone, beside, *cells)
    explained = " ".join((__doc__ or "").split("\n\n", 2)[2].split())
    return f"{table}\n\n`benchmarks/acceptance_neighbor.py`. {explained}\n"


def main() -> int:
    """Command line."""
    names = [NOTHING, HEALTHY, "2 slow loris", "3, 4 splits", *Faults().sessions()]
    names.sort(key=lambda name: int(name.split(" ")[0].strip(",")) if name[0].isdigit() else 0)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", choices=names, default=names, metavar="ROW", help=", ".join(names))
    parser.add_argument("--json", type=Path, help="file of rows, which is added to: for measuring in parts")
    parser.add_argument("--write", action="store_true", help="update docs/acceptance.md")
    arguments = parser.parse_args()
    kept = arguments.json is not None and arguments.json.exists()
    rows = {row["name"]: row for row in json.loads(arguments.json.read_text())} if kept else {}
    if arguments.rows:
        with WatchedServer() as server:
            port = server.wait_ready()
            for row in compare(port, arguments.rows):
                rows[row.name] = dataclasses.asdict(row)
                print(rows[row.name], row.verdict, flush=True)
    found = [rows[name] for name in names if name in rows]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1))
    if arguments.write:
        path = Path(__file__).resolve().parent.parent / "docs" / "acceptance.md"
        update_document(path, "A neighbor's latency beside each fault", report(found), machine())
    return int(any(Row(**row).verdict == "FAIL" for row in found))


if __name__ == "__main__":
    sys.exit(main())
