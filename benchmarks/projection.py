"""Photoacoustic and CT kernels: time on the processor beside torch and, where it is installed, PATATO, in one run.

    python -m benchmarks.projection --patato /path/to/its/bin/python --document docs/benchmarks.md

PATATO runs in an environment of its own (pip install patato), on the same frame, geometry and pixels; compiling is left out
of its times. `torch` is the same sum by torch alone, which is what remains where no compiler was at hand.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from report import Table, machine, update_document
from scanside.engine.baselines.photoacoustic import LiveBeamformer
from scanside.engine.baselines.tomography import filtered_back_projection
from scanside.engine.operators.photoacoustic_geometry import DetectorArray, PixelGrid, TimeAxis, ring_positions
from scanside.engine.operators.tomography import BeamGeometry, even_angles
from scanside.kernels import native, tomography
from scanside.kernels import photoacoustic as pat

__all__ = ["main"]

ELEMENTS, SAMPLES, RATE, SPEED, RADIUS, VIEW = 256, 2030, 40e6, 1500.0, 0.0405, 0.025
PIXELS = (256, 256)
TORCH_REPEATS = 3
Row = dict[str, object]
PATATO = """
import sys, time, json
import numpy as np
from patato.recon.backprojection_reference import ReferenceBackprojection
data = np.load(sys.argv[1])
scan = ReferenceBackprojection()
def run():
    frame = data["frame"].astype(np.float32)[None]
    return np.asarray(scan.reconstruct(frame, RATE, data["positions"], (N, N, 1), (VIEW, VIEW, 0.0), SPEED))
image, times = run(), []
for _ in range(int(sys.argv[2])):
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)
np.save(sys.argv[3], image.squeeze())
print(json.dumps(times))
"""


def timed(call: Callable[[], object], repeats: int) -> list[float]:
    """Times in ms after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return times[1:]


def row(case: str, path: str, times: list[float], note: str = "") -> Row:
    """One line of the table."""
    return {"case": case, "path": path, "median": statistics.median(times), "least": min(times), "note": note}


def ring() -> np.ndarray:
    """Positions of 256 elements on 270 degrees."""
    return ring_positions(ELEMENTS, RADIUS, span=1.5 * np.pi, first=-0.25 * np.pi)


def shot() -> np.ndarray:
    """A frame of some points and noise, int16."""
    rng, positions = np.random.default_rng(0), ring()
    signals = rng.normal(size=(ELEMENTS, SAMPLES)) * 200
    for point in rng.uniform(-0.4, 0.4, (20, 2)) * VIEW:
        arrival = np.linalg.norm(positions - [*point, 0], axis=1)[:, None] * RATE / SPEED
        signals += 4000 * np.exp(-(((np.arange(SAMPLES) - arrival) / 4) ** 2))
    return signals.astype(np.int16)


def without_kernels(call: Callable[[], object]) -> list[float]:
    """Times of the path that needs no compiler."""
    os.environ[native.VARIABLE] = "torch"
    native.library.cache_clear()
    try:
        return timed(call, TORCH_REPEATS)
    finally:
        del os.environ[native.VARIABLE]
        native.library.cache_clear()


def photoacoustic(repeats: int, threads: int) -> tuple[list[Row], np.ndarray]:
    """Rows for one frame to one image, and the image of delay-and-sum."""
    frame, rows = shot(), []
    half = VIEW / 2 * PIXELS[0] / (PIXELS[0] - 1)  # PATATO's pixel centers lie at the ends of its field of view
    settings = {"pixels": PIXELS, "field_of_view_m": (-half, half, -half, half), "threads": threads}
    for method, band in (("das", None), ("ubp", None), ("das", (0.15e6, 8e6)), ("ubp", (0.15e6, 8e6))):
        live = LiveBeamformer(ring(), None, RATE, method=method, band_hz=band, **settings)
        name = f"{method.upper()}, int16 frame to image" + (", with band-pass" if band else "")
        rows.append(row(name, "compiled", timed(lambda live=live: live.image(frame), repeats)))
    live = LiveBeamformer(ring(), None, RATE, **settings)
    rows.append(row(rows[0]["case"], "torch", without_kernels(lambda: live.image(frame))))
    table = DetectorArray.at(ring()).table(
        PixelGrid.over(PIXELS, settings["field_of_view_m"]), TimeAxis(RATE, SAMPLES), dimensions=1
    )
    image = torch.randn(1, *PIXELS)
    rows.append(row("adjoint of DAS", "compiled", timed(lambda: pat.scatter(image, *table, SAMPLES), repeats)))
    rows.append(row("adjoint of DAS", "torch", without_kernels(lambda: pat.scatter(image, *table, SAMPLES))))
    return rows, live.image(frame).copy()


def patato(python: str, repeats: int, ours: np.ndarray) -> Row:
    """PATATO's plain delay-and-sum on the same frame, and how its image correlates with ours."""
    code = PATATO.replace("RATE", repr(RATE)).replace("SPEED", repr(SPEED)).replace("VIEW", repr(VIEW))
    with tempfile.TemporaryDirectory() as folder:
        data, image = Path(folder) / "data.npz", Path(folder) / "image.npy"
        np.savez(data, frame=shot(), positions=ring())
        words = [python, "-c", code.replace("N, N", f"{PIXELS[0]}, {PIXELS[1]}"), str(data), str(repeats), str(image)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        theirs = np.load(image)
    times = [1000 * t for t in json.loads(done.stdout.splitlines()[-1])]
    likeness = max(float(np.corrcoef(side.ravel(), ours.ravel())[0, 1]) for side in (theirs, theirs.T))
    return row("DAS, int16 frame to image", "PATATO 0.7.0", times, f"correlation with ours {likeness:.4f}")


def tomographic(repeats: int) -> list[Row]:
    """Rows for 512 x 512 pixels and 720 x 720 rays of a fan."""
    scan = BeamGeometry((512, 512), 0.5, even_angles(720), 720, 1.0, 500.0, 500.0)
    image, sinogram = torch.rand(512, 512), torch.rand(720, 720)
    cases: dict[str, Callable[[], object]] = {
        "fan projector (Joseph)": lambda: tomography.project(image, scan.views, 720, 0.5, 0.5),
        "its adjoint": lambda: tomography.adjoint(sinogram, scan.views, 512, 512, 0.5, 0.5),
        "filtered back-projection": lambda: filtered_back_projection(sinogram, scan),
    }
    rows = [row(name, "compiled", timed(call, repeats)) for name, call in cases.items()]
    name = "fan projector (Joseph)"
    return [*rows, row(name, "torch", without_kernels(cases[name]))]


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patato", help="Python of an environment that has PATATO")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--document", type=Path, help="Markdown file whose section is replaced")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    rows, image = photoacoustic(options.repeats, options.threads)
    if options.patato:
        rows.insert(5, patato(options.patato, options.repeats, image))
    rows += tomographic(options.repeats)
    table = Table("case", "path", "median ms", "least ms", "")
    for line in rows:
        table.add(line["case"], line["path"], f"{line['median']:.1f}", f"{line['least']:.1f}", line["note"])
    found = native.library()
    text = f"""{table}

PAT: {ELEMENTS} elements on 270 degrees, {SAMPLES} samples at 40 MS/s, {PIXELS[0]} x {PIXELS[1]} pixels over 25 mm, float32;
linear interpolation here, truncation to the sample before in PATATO. CT: 512 x 512 pixels, 720 views x 720 bins.
Kernels: {found.level if found else "none"}, {options.threads} threads;
{options.repeats} runs, {TORCH_REPEATS} of torch's; one-minute load average before: {load:.2f}."""
    print(text)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    if options.document:
        update_document(options.document, "Projection kernels", text, machine())


if __name__ == "__main__":
    main()
