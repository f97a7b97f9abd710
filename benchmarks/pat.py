"""Photoacoustics, live: latency and losses of streams through a real server, and measured data streamed as int16.

    python benchmarks/pat.py [--seconds 60] [--rates 25 100] [--prior 64 128] [--data DIR] [--json FILE] [--write]

256 elements x 2030 samples of int16 at 40 MHz, 256 x 256 pixels over 25 mm, simulated vessels with noise, sent by
`PhotoacousticSender` over TCP on loopback to `scanside serve` on the same processor, CRC-32C on every frame. Latency is from
handing the frame to the bus until its image is whole at the device. Rate 0 sends as fast as the server takes frames. `--prior`
streams from such numbers of elements through pat/online as well, with a deadline and as many pixels along a side. `--data` is the
folder with `pat/three_spheres_512x2000.npz`; that row is left out where it is absent.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
from report import Table, machine, update_document
from scanside.adapters.commands.photoacoustic import Arrivals, paced
from scanside.adapters.local_server import LocalServer
from scanside.adapters.photoacoustic_sender import ArrivedImage, PhotoacousticSender
from scanside.engine.baselines.photoacoustic import LiveBeamformer
from scanside.engine.messages import PhotoacousticFrame, PhotoacousticHeader
from scanside.engine.simulation.photoacoustic import LiveScan

CONFIGS = ("pat/das", "pat/ubp")
DISTINCT = 20
"""Different frames, sent in turn."""
DEADLINE_MS = 40
PRIOR = "pat/online"
WARM = 25
"""First frames, whose latency is left out: the server allocates."""
FULL_SCALE = 32000
VIEW = (-0.016, 0.016, -0.016, 0.016)
BAND = (150e3, 3.5e6)


def endless(frames: list[PhotoacousticFrame], count: int) -> Iterator[PhotoacousticFrame]:
    """The frames in turn, numbered on."""
    for number, frame in zip(range(count), itertools.cycle(frames)):
        yield msgspec.structs.replace(frame, seq=number, shot=number)


class Screen(Arrivals):
    """Counts the images that a learned prior made, and those that say that they kept their deadline."""

    def __init__(self) -> None:
        super().__init__(kept=1)
        self.learned = self.kept = 0

    def __call__(self, arrived: ArrivedImage) -> None:
        """Take one image."""
        super().__call__(arrived)
        self.learned += "scanside_generative" in arrived.image.meta
        self.kept += arrived.image.meta.get("scanside_deadline") == ["met"]


def live(
    bus: str,
    header: PhotoacousticHeader,
    frames: list[PhotoacousticFrame],
    config: str,
    rate: float,
    seconds: float,
    parameters: dict[str, str] | None = None,
) -> dict[str, object]:
    """Stream for some seconds; returns what the table shows."""
    arrivals, load = Screen(), os.getloadavg()[0]
    count = round((rate or 100) * seconds)
    begun = time.monotonic()
    with PhotoacousticSender(
        bus, header, config=config, parameters=parameters, checksum=True, on_image=arrivals
    ) as sender:
        for frame in paced(endless(frames, count), rate):
            sender.send_frame(frame)
        sent = time.monotonic() - begun
    wall = time.monotonic() - begun
    missing = count - arrivals.count
    p50, p95, p99 = 1e3 * np.percentile(arrivals.latencies[WARM:], (50, 95, 99))
    row = {"config": config, "rate": rate, "frames": count, "images": arrivals.count, "lost": missing, "load": load}
    row |= {"p50": p50, "p95": p95, "p99": p99, "max": 1e3 * max(arrivals.latencies[WARM:])}
    row |= {"sent_per_second": count / sent, "images_per_second": arrivals.count / wall, "notes": sender.notes}
    row |= {"learned": arrivals.learned, "kept": arrivals.kept, "elements": header.elements}
    print(row, flush=True)
    return row


def with_prior(bus: str, elements: int, seconds: float) -> dict[str, object]:
    """A ring of so many elements at 25 frames/s through the online system, with as many pixels along a side."""
    scan = LiveScan(elements=elements)
    header = msgspec.structs.replace(scan.header, pixels=(elements, elements))
    frames = [scan.frame(number) for number in range(DISTINCT)]
    return live(bus, header, frames, PRIOR, 25, seconds, {"reconstruction.deadline_ms": str(DEADLINE_MS)})


def quantization(bus: str, path: Path) -> dict[str, float]:
    """Measured spheres: the image of int16 samples off the wire against that of the stored numbers, without a wire."""
    signals = np.load(path)["sinogram"]
    angles = 2 * np.pi * np.arange(len(signals)) / len(signals)
    positions = 1460 * 1500 / 50e6 * np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1)
    header = PhotoacousticHeader(
        stream="0" * 32,
        elements=signals.shape[0],
        samples=signals.shape[1],
        positions_m=positions,
        sampling_rate_hz=50e6,
        wavelengths_m=(800e-9,),
        field_of_view_m=VIEW,
        pixels=(256, 256),
    )
    arrivals = Arrivals()
    parameters = {"photoacoustic.band_hz": "150e3,3.5e6"}
    with PhotoacousticSender(bus, header, config="pat/das", parameters=parameters, on_image=arrivals) as sender:
        sender.send(np.rint(signals * FULL_SCALE).astype(np.int16))
    beamformer = LiveBeamformer(positions, None, 50e6, pixels=(256, 256), field_of_view_m=VIEW, band_hz=BAND)
    offline = beamformer.image(np.ascontiguousarray(signals, np.float32)).astype(np.float64)
    streamed = arrivals.images[-1].pixels[0, 0] / FULL_SCALE
    difference = np.abs(streamed - offline)
    return {
        "largest_difference": float(difference.max() / np.abs(offline).max()),
        "correlation": float(np.corrcoef(streamed.ravel(), offline.ravel())[0, 1]),
        "half_step": 0.5 / FULL_SCALE / float(np.abs(offline).max()),
    }


def report(results: dict[str, object]) -> str:
    """The results as a Markdown section."""
    table = Table(
        "configuration", "frames/s", "frames", "images", "lost", "p50 ms", "p95 ms", "p99 ms", "max ms", "load"
    )
    for row in results["rows"]:
        rate = f"{row['rate']:g}" if row["rate"] else f"unpaced, {row['images_per_second']:.0f}"
        times = [f"{row[name]:.1f}" for name in ("p50", "p95", "p99", "max")]
        table.add(row["config"], rate, row["frames"], row["images"], row["lost"], *times, f"{row['load']:.2f}")
    text = (
        f"{table}\n\n256 elements x 2030 samples, int16, 256 x 256 pixels, one wavelength, band-pass included; device, server "
        "and worker on the same cores, over TCP on loopback with CRC-32C. Latency is from handing a frame over until its image "
        "is whole at the device; unpaced it is that of a queue of 8 MiB. Load is the one-minute average before each case."
    )
    if results.get("prior"):
        text += prior_report(results["prior"])
    found = results.get("quantization")
    if found:
        text += (
            "\n\nMeasured three-spheres data (512 x 2000), streamed as int16, against the image of the stored float32 numbers: "
            f"largest difference {100 * found['largest_difference']:.4f} % of the brightest pixel, correlation "
            f"{found['correlation']:.8f}; half a count of one sample is {100 * found['half_step']:.4f} %."
        )
    return text + "\n"


def prior_report(rows: list[dict[str, object]]) -> str:
    """Table of the streams through the online system."""
    table = Table(
        "elements", "pixels", "frames", "images", "lost", "by the prior", "p50 ms", "p95 ms", "p99 ms", "load"
    )
    for row in rows:
        times = [f"{row[name]:.1f}" for name in ("p50", "p95", "p99")]
        share = f"{100 * row['learned'] / row['images']:.1f} %"
        pixels = f"{row['elements']} x {row['elements']}"
        table.add(
            row["elements"], pixels, row["frames"], row["images"], row["lost"], share, *times, f"{row['load']:.2f}"
        )
    return (
        f"\n\n{table}\n\n`{PRIOR}` at 25 frames/s with a deadline of {DEADLINE_MS} ms from the last byte of a shot on. "
        "A shot that the prior would not be done with in time gets its delay-and-sum image, marked."
    )


def main() -> None:
    """Command line."""
    root = Path(__file__).resolve().parent.parent
    data = Path(os.environ.get("SCANSIDE_DATA", root.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rates", type=float, nargs="+", default=[25, 100, 0])
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS))
    parser.add_argument("--prior", type=int, nargs="*", default=[64, 128, 256], help="numbers of elements")
    parser.add_argument("--threads", type=int, default=0, help="of the worker; 0: all cores")
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="update docs/benchmarks.md")
    arguments = parser.parse_args()
    scan = LiveScan()
    frames = [scan.frame(number) for number in range(DISTINCT)]
    spheres = arguments.data / "pat" / "three_spheres_512x2000.npz"
    results: dict[str, object] = {"machine": machine(), "rows": []}
    with LocalServer(["--bus", "tcp://127.0.0.1:*", "--threads", str(arguments.threads)]) as server:
        server.wait_ready()
        results["rows"] = [
            live(server.bus, scan.header, frames, config, rate, arguments.seconds)
            for config in arguments.configs
            for rate in arguments.rates
        ]
        results["prior"] = [with_prior(server.bus, elements, arguments.seconds / 3) for elements in arguments.prior]
        if spheres.exists():
            results["quantization"] = quantization(server.bus, spheres)
    section = report(results)
    print(section)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    if arguments.write:
        update_document(root / "docs" / "benchmarks.md", "Photoacoustics, live", section, results["machine"])


if __name__ == "__main__":
    main()
