"""Latency of the online system as a scanner feels it, and what computing in half precision changes in the image.

    python benchmarks/online_latency.py [--frames 20] [--evaluations 4 8] [--write]

A simulated head, 256 x 256, 8 coils, every 4th line, streamed through `scanside serve`, a readout each 3 ms, frame after frame.
Each system is run twice: with 24 calibration lines in each frame, which data consistency takes for data (conjugate gradients),
and with them in the first frame only (closed form from then on). Latency is from the hand-over of a frame's last readout to
the kernel until the image is whole at the client. The first frames, in which coil maps are made, are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from report import Table, machine, update_document
from scanside.adapters.client import Arrival, ScanClient, config_text
from scanside.adapters.commands.results import Latency
from scanside.adapters.files.ismrmrd import header_xml
from scanside.adapters.local_server import LocalServer
from scanside.adapters.process import tune_process
from scanside.engine.config import ConfigStore, SystemConfig, Value, with_overrides
from scanside.engine.evaluation import psnr
from scanside.engine.headers import AcquisitionFlag
from scanside.engine.messages import AcquisitionBatch, EndOfScan, Image
from scanside.engine.simulation.scan import SimulatedScan, simulate_scan
from scanside.engine.streaming.session import IMAGES, Session

MATRIX, COILS, ACCELERATION, CALIBRATION, WARM = 256, 8, 4, 24, 3
SYSTEM, PLAIN = "mri/online", "mri/cartesian"
NETWORKS = (("torch", "float32"), ("torch", "bfloat16"), ("openvino", "float32"), ("openvino", "bfloat16"))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--evaluations", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--interval", type=float, default=3.0, help="ms between readouts")
    parser.add_argument("--runtimes", nargs="+", default=["auto", "torch"], help="of the network")
    parser.add_argument("--write", action="store_true", help="update docs/benchmarks.md")
    options = parser.parse_args()
    tune_process()
    scan = _scan(options.frames + WARM)
    scans = {"each frame": scan, "first frame": _without_later_calibration(scan)}
    table = Table("system", "calibration", "NFE", "runtime", "p50 ms", "p95 ms", "worst ms", "images", "load")
    with tempfile.TemporaryDirectory() as folder:
        _write_systems(Path(folder), options.runtimes)
        with LocalServer(["--configs", folder]) as server:
            port = server.wait_ready()
            for name, overrides in _cases(options):
                _play(
                    port, _scan(1), name, overrides, 0.0
                )  # the first session of a process chooses what runs the network
                for where, streamed in scans.items():
                    images = _play(port, streamed, name, overrides, options.interval / 1e3)
                    table.add(name if name == PLAIN else SYSTEM, where, *_figures(images))
                    print(f"{name} {where}: {_figures(images)}", flush=True)
    section = f"{table}\n\n{_explained()}\n\n{_precisions(scan)}\n"
    print(section)
    if options.write:
        document = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
        update_document(document, "Latency of the online system", section, machine())


def _scan(frames: int) -> SimulatedScan:
    return simulate_scan(MATRIX, COILS, ACCELERATION, CALIBRATION, repetitions=frames, noise_readouts=4)


def _without_later_calibration(scan: SimulatedScan) -> SimulatedScan:
    """The same scan without the lines that are there for calibration only, but in the first frame."""
    only = AcquisitionFlag.IS_PARALLEL_CALIBRATION.bit
    noise, first, *rest = scan.batches
    return dataclasses.replace(scan, batches=(noise, first, *(_kept(batch, only) for batch in rest)))


def _kept(batch: AcquisitionBatch, unwanted: int) -> AcquisitionBatch:
    here = (batch.headers["flags"] & np.uint64(unwanted)) == 0
    return AcquisitionBatch(headers=batch.headers[here], samples=batch.samples[here])


def _write_systems(folder: Path, runtimes: Sequence[str]) -> None:
    """The system once per runtime, which cannot be chosen from the wire."""
    text = resources.files("scanside.configs.mri").joinpath("online.toml").read_text("utf-8")
    (folder / "mri").mkdir()
    for runtime in runtimes:
        own = "\n".join(line for line in text.splitlines() if not line.startswith("aliases"))
        (folder / "mri" / f"online_{_word(runtime)}.toml").write_text(f'{own}\n[runtime]\nruntime = "{runtime}"\n')


def _word(runtime: str) -> str:
    return runtime.replace("-", "_")


def _cases(options: argparse.Namespace) -> list[tuple[str, dict[str, Value]]]:
    cases: list[tuple[str, dict[str, Value]]] = [(PLAIN, {})]
    for runtime in options.runtimes:
        cases += [(f"mri/online_{_word(runtime)}", {"sampler.levels": n}) for n in options.evaluations]
    return cases


def _play(
    port: int, scan: SimulatedScan, name: str, overrides: dict[str, Value], interval: float
) -> list[tuple[Image, float]]:
    """One session; images with their latency in s."""
    found: list[tuple[Image, float]] = []

    def take(arrival: Arrival) -> None:
        if isinstance(arrival.item, Image) and arrival.latency is not None:
            found.append((arrival.item, arrival.latency))

    with ScanClient(port=port, timeout=120.0, on_arrival=take) as client:
        client.configure_text(config_text(name, overrides))
        client.header(header_xml(scan.header))
        for batch in scan.readouts(8):
            client.acquisitions(batch, interval)
        client.end_scan()
        for _ in client.arrivals():
            pass  # everything went to `take`
    return found[WARM:]


def _figures(images: list[tuple[Image, float]]) -> list[str]:
    latency = Latency.of([taken for _, taken in images])
    if latency is None:
        raise SystemExit("no image came back")
    meta = images[-1][0].meta
    evaluations = meta.get("scanside_network_evaluations", ["0"])[0]
    runtime = " ".join(meta.get("scanside_runtime", [])[:2])
    times = [f"{1e3 * value:.1f}" for value in (latency.p50, latency.p95, latency.worst)]
    return [evaluations, runtime, *times, str(latency.count), f"{os.getloadavg()[0]:.2f}"]


def _explained() -> str:
    words = " ".join((__doc__ or "").split("\n\n", 2)[2].split())
    shared = (
        ""
        if os.sched_getscheduler(0) == os.SCHED_OTHER
        else " At real-time priority (`chrt -f 10`): the machine was shared."
    )
    return f"`benchmarks/online_latency.py`. {words} Load is the one-minute average after each case.{shared}"


def _precisions(scan: SimulatedScan) -> str:
    """One frame by each runtime and precision that is here: its distance from the image of torch in float32."""
    truth = np.abs(scan.reference[0, 0])
    table = Table("runtime", "precision", "distance from torch float32", "PSNR to the truth, dB")
    exact: np.ndarray | None = None
    for runtime, precision in NETWORKS:
        wanted = {"runtime.runtime": runtime, "runtime.precision": precision}
        image = _frame(scan, with_overrides(ConfigStore().get(SYSTEM), wanted, source="benchmark"))
        if image is None:
            table.add(runtime, precision, "-", "not here")
            continue
        exact = image if exact is None else exact
        scaled = image * (np.vdot(image, truth) / np.vdot(image, image))
        distance = np.linalg.norm(image - exact) / np.linalg.norm(exact)
        table.add(runtime, precision, f"{distance:.1e}", f"{psnr(truth, scaled):.2f}")
    return f"{table}\n\nThe first frame of the same scan, {ConfigStore().get(SYSTEM).sampler.levels} evaluations."


def _frame(scan: SimulatedScan, config: SystemConfig) -> np.ndarray | None:
    """The first image, (y, x), or None where this runtime is not here."""
    session = Session(config)
    found = list(session.feed(scan.header))
    for batch in scan.batches[:2]:
        found += session.feed(batch)
    found += session.feed(EndOfScan())
    image = next(item for item in found if isinstance(item, Image) and item.header["image_series_index"] == IMAGES)
    return image.pixels[0, 0].astype(np.float64) if "scanside_generative" in image.meta else None


if __name__ == "__main__":
    main()
