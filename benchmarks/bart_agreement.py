"""The same reconstruction by BART and by scanside, with the same settings: image quality, agreement and time.

    python benchmarks/bart_agreement.py [--threads 1] [--data FOLDER] [--json FILE] [--only CASE] [--write]

Cases: the Shepp-Logan phantom of `bart phantom` (256 x 256, 8 coils, noise of 1 % of the brightest pixel) with a
two-dimensional and a line mask, and, where the scanner data are at hand, a fully sampled 4-coil brain with published masks.
The reference is the noise-free, fully sampled image combined with the coil maps in use. Both sides get the maps of
`bart ecalib`, but for the rows named "own maps", where ours come from scanside's ESPIRiT.
Both programs take the scale of the threshold from the center of the data, by the same rule and to the same value, and turn the
image by the same random shifts before each threshold. BART 0.8 thresholds an image of zeros first and ends on a gradient step
from the extrapolated image; ours is run one iteration less and ended so too. What is left between them is the border: BART
mirrors the image, our wavelets are periodic. The PSNR depends on the last shifts. So L1-ESPIRiT with shifts is run with five
numbers of iterations around the one that is named; the table has the mean and the standard deviation of both sides.

Seconds are the best of three. Those of BART are of the whole program, which takes about 0.2 s to start and to plan its
transforms; ours are of the call in a running process, as a session makes it.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from bart import Bart, wavelet_shifts
from numpy.typing import NDArray
from report import Table, machine, update_document
from scanside.engine.baselines.combine import sense_combine, zero_filled
from scanside.engine.baselines.l1 import gradient_step, l1_espirit_steps
from scanside.engine.baselines.sense import cg_sense
from scanside.engine.operators import CartesianSense, Fourier, Wavelet

Array = NDArray[np.complex64]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A method with its name, the options of `bart pics` and ours."""

    name: str
    command: str
    kind: str
    weight: float
    iterations: int
    shifts: bool = True


SETTINGS = [
    Setting("CG-SENSE, r 0.005, 30 it.", "-l2 -r0.005 -i30", "cg", 0.005, 30),
    Setting("CG-SENSE, r 0.05, 30 it.", "-l2 -r0.05 -i30", "cg", 0.05, 30),
    Setting("L1-ESPIRiT, 0.005, 100 it., no shifts", "-n -R W:3:0:0.005 -i100", "l1", 0.005, 100, shifts=False),
    Setting("L1-ESPIRiT, 0.005, 100 it.", "-R W:3:0:0.005 -i100", "l1", 0.005, 100),
]
"""What is compared."""
ENDS = (-4, -2, 0, 2, 4)
"""Iterations more or less, where the image depends on random shifts."""
BORDER = 3
"""BART counts the filters from so many pixels further on."""
SCALES = 5
"""Of BART's wavelets, 256 pixels wide."""
REAL_MASKS = ("hggdp_cart_025", "poisson_4")


@dataclasses.dataclass(frozen=True)
class Case:
    """One scan: fully sampled k-space without added noise, what was measured, and where."""

    name: str
    full: Array
    measured: Array
    mask: NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; psnr in dB, times in s, `distance` = |ours - BART's| / |BART's|."""

    case: str
    method: str
    psnr: float
    psnr_bart: float | None
    difference: float | None
    distance: float | None
    seconds: float
    seconds_bart: float | None
    spread: float = 0.0
    spread_bart: float = 0.0


def main() -> None:
    """Run all cases, print the table, write JSON where asked for."""
    options = _options()
    torch.set_num_threads(options.threads)
    rows = _kept(options.json, options.only)
    with tempfile.TemporaryDirectory() as folder:
        bart = Bart(Path(folder), options.threads)
        for case in _cases(bart, options.data):
            if options.only not in case.name:
                continue
            for row in _rows(case, bart):
                rows.append(row)
                _print(row, header=len(rows) == 1)
    state = {"threads": options.threads, "cores": os.cpu_count(), "load_average": os.getloadavg()}
    print(f"{options.threads} threads of {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    if options.write:
        document = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
        update_document(document, "Agreement with BART", _section(rows, options.threads), machine())
    if options.json:
        Path(options.json).write_text(
            json.dumps({**state, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1)
        )


def _kept(path: str | None, only: str) -> list[Row]:
    """The rows of other cases, where the benchmark is run in parts."""
    if not (path and only and Path(path).exists()):
        return []
    rows = [Row(**row) for row in json.loads(Path(path).read_text())["rows"]]
    return [row for row in rows if only not in row.case]


def _section(rows: list[Row], threads: int) -> str:
    """The rows as a Markdown section."""
    table = Table("case", "method", "PSNR dB", "BART dB", "difference", "distance", "s", "BART s")
    for row in rows:
        theirs = ("", "", "", "")
        if row.psnr_bart is not None:
            quality = _with_spread(row.psnr_bart, row.spread_bart)
            theirs = (quality, f"{row.difference:+.2f}", f"{row.distance:.1e}", f"{row.seconds_bart:.2f}")
        ours = _with_spread(row.psnr, row.spread)
        table.add(row.case, row.method, ours, *theirs[:3], f"{row.seconds:.3f}", theirs[3])
    explained = " ".join((__doc__ or "").split("\n\n", 2)[2].split())
    return f"{table}\n\n`benchmarks/bart_agreement.py`. {explained} {threads} threads, load {os.getloadavg()[0]:.1f}.\n"


def _with_spread(mean: float, spread: float) -> str:
    return f"{mean:.2f} ± {spread:.2f}" if spread else f"{mean:.2f}"


def _options() -> argparse.Namespace:
    default = Path(os.environ.get("SCANSIDE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of either side")
    parser.add_argument("--data", type=Path, default=default, help="folder of scanner data")
    parser.add_argument("--json", help="file to write the rows to")
    parser.add_argument(
        "--only", default="", help="cases whose name has this; with --json, the others stay as they are there"
    )
    parser.add_argument("--write", action="store_true", help="update docs/benchmarks.md")
    return parser.parse_args()


def _cases(bart: Bart, data: Path) -> Iterator[Case]:
    rng = np.random.default_rng(1)
    bart("phantom -x256 -k -s8 full")
    full = bart.read("full")
    for name, mask in (("phantom, 2-D mask", _points_mask(rng)), ("phantom, line mask", _lines_mask(rng))):
        yield _case(name, full, mask, rng, noise=0.01)
    images, masks = data / "mri/4h_GE_4coil_images.npz", data / "mri/masks.npz"
    if not (images.exists() and masks.exists()):
        print(f"no brain: {images} or {masks} is absent")
        return
    brain = np.load(images)["coil_images"][:, None]
    kspace = Fourier(brain.shape)(torch.from_numpy(brain)).numpy()
    for name in REAL_MASKS:
        mask = _with_center(np.load(masks)[name])
        yield _case(f"brain, {name}", kspace, mask, rng, noise=0.0)


def _case(name: str, full: Array, mask: NDArray[np.bool_], rng: np.random.Generator, noise: float) -> Case:
    brightest = float(zero_filled(torch.from_numpy(full)).max())
    sigma = noise * brightest / math.sqrt(2)
    added = sigma * (rng.standard_normal(full.shape) + 1j * rng.standard_normal(full.shape))
    net = mask.size / mask.sum()
    return Case(f"{name}, R {net:.2f}", full, ((full + added) * mask).astype(np.complex64), mask)


def _points_mask(rng: np.random.Generator) -> NDArray[np.bool_]:
    y, x = np.mgrid[-1:1:256j, -1:1:256j]
    return _with_center(rng.random((256, 256)) < 0.85 * np.clip(1 - np.hypot(y, x), 0, 1) ** 2 + 0.08)


def _lines_mask(rng: np.random.Generator) -> NDArray[np.bool_]:
    y = np.linspace(-1, 1, 256)
    return _with_center(np.repeat(rng.random((256, 1)) < 0.5 * (1 - np.abs(y[:, None])) ** 2 + 0.02, 256, axis=1))


def _with_center(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask with the 24 x 24 points (or 24 lines) that the maps are calibrated on."""
    mask = mask.astype(bool)
    lines = bool((mask == mask[:, :1]).all())
    mask[116:140, slice(None) if lines else slice(116, 140)] = True
    return mask


def _rows(case: Case, bart: Bart) -> Iterator[Row]:
    bart.write("measured", case.measured)
    bart("ecalib -m1 -r24 -c0 measured maps")
    maps, data = torch.from_numpy(bart.read("maps").copy()), torch.from_numpy(case.measured)
    truth = _truth(case, maps)
    zero, seconds = _best(lambda: zero_filled(data, maps))
    yield Row(case.name, "zero-filled", _psnr(zero, truth), None, None, None, seconds, None)
    for setting in SETTINGS:
        if setting.kind == "l1" and setting.shifts:
            yield _varied(case, setting, bart, data, maps, truth)
            continue
        seconds_bart = min(bart(f"pics -S {setting.command} measured maps image") for _ in range(3))
        theirs = torch.from_numpy(bart.read("image")[0])
        ours, seconds = _best(lambda chosen=setting: _ours(chosen, data, maps, case.mask))
        quality, quality_bart = _psnr(ours, truth), _psnr(theirs, truth)
        distance = float((ours - theirs).norm() / theirs.norm())
        difference = quality - quality_bart
        yield Row(case.name, setting.name, quality, quality_bart, difference, distance, seconds, seconds_bart)
    yield from _own_maps(case, data)


def _varied(
    case: Case, setting: Setting, bart: Bart, data: torch.Tensor, maps: torch.Tensor, truth: torch.Tensor
) -> Row:
    """Mean and standard deviation where the result depends on random shifts."""
    ours, theirs, distances, times, bart_times = [], [], [], [], []
    for more in ENDS:
        count = setting.iterations + more
        command = setting.command.replace(f"-i{setting.iterations}", f"-i{count}")
        bart_times.append(bart(f"pics -S {command} measured maps image"))
        other = torch.from_numpy(bart.read("image")[0])
        start = time.perf_counter()
        image = _ours(dataclasses.replace(setting, iterations=count), data, maps, case.mask)
        times.append(time.perf_counter() - start)
        ours.append(_psnr(image, truth))
        theirs.append(_psnr(other, truth))
        distances.append(float((image - other).norm() / other.norm()))
    mean, mean_bart = float(np.mean(ours)), float(np.mean(theirs))
    spreads = float(np.std(ours, ddof=1)), float(np.std(theirs, ddof=1))
    distance = float(np.mean(distances))
    return Row(
        case.name, setting.name, mean, mean_bart, mean - mean_bart, distance, min(times), min(bart_times), *spreads
    )


def _own_maps(case: Case, data: torch.Tensor) -> Iterator[Row]:
    """The first and the last setting with our own coil maps, the seconds with those of the maps."""
    from scanside.engine.preparation.coil_maps import espirit

    shape = (1, *case.mask.shape)
    maps, seconds = _best(lambda: espirit(data[:, :, 116:140, 116:140].contiguous(), shape, crop=0.0))
    truth = _truth(case, maps)
    for setting in (SETTINGS[0], SETTINGS[-1]):
        ours, more = _best(lambda chosen=setting: _ours(chosen, data, maps, case.mask))
        yield Row(case.name, f"{setting.name} own maps", _psnr(ours, truth), None, None, None, seconds + more, None)


def _ours(setting: Setting, data: torch.Tensor, maps: torch.Tensor, mask: NDArray[np.bool_]) -> torch.Tensor:
    operator, count, weight = CartesianSense(maps, torch.from_numpy(mask)), setting.iterations, setting.weight
    if setting.kind == "cg":
        return cg_sense(operator, data, iterations=count, regularization=weight)
    wavelet, step = Wavelet(operator.domain, wavelet="db2", levels=SCALES), gradient_step(operator, data)
    turns = wavelet_shifts(SCALES) if setting.shifts else itertools.repeat((0, 0))
    shifts = ((y + BORDER, x + BORDER) for y, x in turns)
    steps = l1_espirit_steps(
        operator, data, weight=weight, iterations=count - 1, wavelet=wavelet, step=step, shifts=shifts
    )
    before, image = collections.deque(steps, maxlen=2)
    ahead = torch.lerp(before, image, 1 + _momentum(count))
    return ahead + step * (operator.H(data) - operator.gram(ahead))


def _momentum(iterations: int) -> float:
    """How much FISTA adds of the last change, after so many iterations of BART."""
    time, factor = 1.0, 0.0
    for _ in range(iterations):
        following = (1 + math.sqrt(1 + 4 * time**2)) / 2
        time, factor = following, (time - 1) / following
    return factor


def _truth(case: Case, maps: torch.Tensor) -> torch.Tensor:
    full = torch.from_numpy(case.full)
    return sense_combine(Fourier(full.shape).H(full), maps)


def _psnr(image: torch.Tensor, truth: torch.Tensor) -> float:
    """Of magnitudes, the peak being that of the reference, in dB."""
    mean = float((image.abs() - truth.abs()).square().mean())
    return 10 * math.log10(float(truth.abs().max()) ** 2 / mean)


def _best(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    seconds = math.inf
    for _ in range(3):
        start = time.perf_counter()
        result = call()
        seconds = min(seconds, time.perf_counter() - start)
    return result, seconds


def _print(row: Row, *, header: bool) -> None:
    if header:
        print(f"{'case':32} {'method':38} {'PSNR':>6} {'BART':>6} {'diff':>6} {'dist':>8} {'s':>7} {'s BART':>7}")
    theirs = ["", "", "", ""]
    if row.psnr_bart is not None:
        numbers = f"{row.psnr_bart:.2f} {row.difference:+.2f} {row.distance:.1e} {row.seconds_bart:.2f}"
        theirs = numbers.split()
    print(
        f"{row.case:32} {row.method:38} {row.psnr:6.2f} {theirs[0]:>6} {theirs[1]:>6} {theirs[2]:>8} "
        f"{row.seconds:7.3f} {theirs[3]:>7}"
    )


if __name__ == "__main__":
    main()
