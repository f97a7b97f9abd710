"""The compiled kernels beside what a user would take instead: torch, scipy and numpy, BART, PATATO and ASTRA.

    python benchmarks/kernels.py [--threads 2] [--runs 24] [--only mri pat ct] [--json FILE] [--write]

Each row's contenders take turns, run by run, so that a passing disturbance meets all alike. `CASES` lists what is measured;
an entry yields rows, and every part of the project adds its own. `SCANSIDE_PEERS` names the Python of an environment that has
PATATO and ASTRA (`projection_cases.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import scipy.fft
import torch
from bart_agreement import Bart
from projection_cases import Case, Peer, photoacoustic, tomographic
from report import Table, machine, update_document
from scanside.adapters.process import tune_process
from scanside.engine.baselines.sense import cg_sense, lattice_columns
from scanside.engine.operators import CartesianSense
from scanside.engine.samplers.consistency import _Folded
from scanside.engine.simulation.coils import coil_maps
from scanside.engine.simulation.phantom import shepp_logan
from scanside.kernels import coil_matrix, fft, native, sense
from scanside.kernels.kspace_step import KspaceStep

ROOT = Path(__file__).resolve().parent.parent
MATRIX = 256
WARM = 3
SETTLED = 0.3
"""Seconds: OpenMP's threads wait actively for 0.2 s by default."""
Row = dict[str, object]
Work = Callable[[], object]


def medians(contenders: dict[str, Work], runs: int) -> dict[str, float]:
    """Median seconds of each, taking turns; after another program's turn its threads may spin, so each then waits first."""
    rest = SETTLED if any(isinstance(work, Peer) for work in contenders.values()) else 0.0
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(WARM + runs):
        for name, work in contenders.items():
            time.sleep(rest)
            begun = time.perf_counter()
            work()
            if turn >= WARM:
                taken[name].append(time.perf_counter() - begun)
    return {name: statistics.median(times) for name, times in taken.items()}


def row(what: str, contenders: dict[str, Work], runs: int, target: float | None, floor: str) -> Row:
    """One line of the table: the first contender is ours, the others are compared with it. target: ms."""
    found = medians(contenders, runs)
    ours, *others = found
    return {
        "what": what,
        "ms": 1e3 * found[ours],
        "target": target,
        "floor": floor,
        "peers": {name: 1e3 * found[name] for name in others},
    }


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))


def fourier(runs: int) -> Iterator[Row]:
    """A batch of transforms along each axis."""
    x = random(8, MATRIX, MATRIX)
    array = x.numpy()
    for axis, name in ((1, "columns"), (2, "rows")):
        contenders = {
            "ours": lambda axis=axis: fft.apply(x, axis),
            "torch": lambda axis=axis: torch.fft.fft(x, dim=axis),
            "scipy": lambda axis=axis: scipy.fft.fft(array, axis=axis, workers=torch.get_num_threads()),
            "numpy": lambda axis=axis: np.fft.fft(array, axis=axis),
        }
        yield row(f"FFT, {name}, 8 x 256 x 256", contenders, runs, None, "21 MFLOP, 8.4 MB")


def masks(coils: int) -> Iterator[tuple[str, torch.Tensor, float, str]]:
    """Name, mask, target in ms and floor, for the gram of so many coils."""
    generator = torch.Generator().manual_seed(1)
    plane = torch.rand(MATRIX, MATRIX, generator=generator) < 0.25
    lines = torch.rand(MATRIX, 1, generator=generator) < 0.25
    planes_target, lines_target = {8: (1.1, 0.8), 16: (2.1, 1.5), 32: (4.3, 3.1)}[coils]
    mega, mb = 11.4 * coils, 0.524 * coils
    yield "2-D mask", plane, planes_target, f"{mega:.0f} MFLOP, {6 * mb + 1.6:.0f} MB"
    yield "line mask", lines, lines_target, f"{6.15 * coils:.0f} MFLOP, {mb + 1:.0f} MB"


def grams(runs: int) -> Iterator[Row]:
    """A^H A beside a chain of torch.fft with everything shifted beforehand, and beside scipy and numpy."""
    x = random(1, MATRIX, MATRIX)
    for coils in (8, 16, 32):
        maps = random(coils, 1, MATRIX, MATRIX) / MATRIX / coils**0.5
        for name, mask, target, floor in masks(coils):
            axes = (-2, -1) if mask.shape[1] > 1 else (-2,)
            kernel = sense.planes(maps) if mask.shape[1] > 1 else sense.lines(maps, -2)
            weights, factor = kernel.real_weights(mask), mask.to(maps.dtype)
            conjugate, arrays = maps.conj().resolve_conj(), (maps.numpy(), factor.numpy(), x.numpy())

            def by_torch(maps=maps, conjugate=conjugate, factor=factor, axes=axes):
                kspace = torch.fft.fftn(maps * x, dim=axes).mul_(factor)
                return (conjugate * torch.fft.ifftn(kspace, dim=axes, norm="forward")).sum(0)

            def by_numpy(library, arrays=arrays, axes=axes, **options):
                maps_, factor_, x_ = arrays
                kspace = library.fftn(maps_ * x_, axes=axes, **options) * factor_
                return (maps_.conj() * library.ifftn(kspace, axes=axes, norm="forward", **options)).sum(0)

            contenders = {
                "ours": lambda kernel=kernel, weights=weights: kernel.gram(weights, x),
                "torch": by_torch,
                "scipy": lambda call=by_numpy: call(scipy.fft, workers=torch.get_num_threads()),
                "numpy": lambda call=by_numpy: call(np.fft),
            }
            yield row(f"A^H A, 256 x 256, {coils} coils, {name}", contenders, runs, target, floor)


def kspace_steps(runs: int) -> Iterator[Row]:
    """Data put in their place in the k-space of every coil, beside chains that are shifted beforehand; a step over maps."""
    for coils in (8, 16):
        x = random(coils, 1, MATRIX, MATRIX)
        for name, mask, _, _ in masks(coils):
            axes = (-2, -1) if mask.shape[1] > 1 else (-2,)
            data = x.flip(-1) * mask
            arrays = x.numpy(), mask.numpy(), data.numpy()
            step = KspaceStep(data, mask, axes)

            def by_torch(x=x, mask=mask, data=data, axes=axes):
                return torch.fft.ifftn(torch.where(mask, data, torch.fft.fftn(x, dim=axes)), dim=axes)

            def by_scipy(arrays=arrays, axes=axes):
                x_, mask_, data_ = arrays
                workers = torch.get_num_threads()
                kspace = np.where(mask_, data_, scipy.fft.fftn(x_, axes=axes, workers=workers))
                return scipy.fft.ifftn(kspace, axes=axes, workers=workers)

            contenders = {"ours": lambda step=step, x=x: step(x), "torch": by_torch, "scipy": by_scipy}
            mega, mb = (10.5 if len(axes) == 2 else 5.2) * coils, 1.57 * coils
            what = f"k-space step, 256 x 256, {coils} coils, {name}"
            yield row(what, contenders, runs, None, f"{mega:.0f} MFLOP, {mb:.0f} MB")
            kernel = sense.planes(x / MATRIX) if len(axes) == 2 else sense.lines(x / MATRIX**0.5, -2)
            weights, image = kernel.real_weights(mask), x[0]
            contenders = {
                "ours": lambda k=kernel, w=weights, image=image: k.descend(w, image, image, 1.0),
                "our A^H A, torch": lambda k=kernel, w=weights, image=image: image + (image - k.gram(w, image)),
            }
            yield row(f"step over maps, 256 x 256, {coils} coils, {name}", contenders, runs, None, "A^H A and 1 MB")


def proximal(runs: int) -> Iterator[Row]:
    """Every fourth line: the exact solution beside 10 iterations of conjugate gradients."""
    maps, right = unit_maps(8), random(1, MATRIX, MATRIX)
    folded = _Folded(lattice_columns(maps, (4, 1), (0, 0), (-2,)), (4, 1))
    mask = torch.zeros(MATRIX, 1, dtype=torch.bool)
    mask[::4] = True
    gram = CartesianSense(maps, mask, (-2,)).gram
    contenders = {
        "ours": lambda: folded.solve(right, 0.05),
        "our CG, 10 it.": lambda: gram.solve(right, iterations=10, regularization=0.05),
    }
    yield row("proximal solution, every 4th line, 256 x 256", contenders, runs, 0.08, "0.8 MFLOP, 3.4 MB")


def low_rank(runs: int) -> Iterator[Row]:
    """A coil x coil matrix for every pixel, beside einsum."""
    coils = 8
    rows, columns = coil_matrix.triangle(coils)
    matrices = random(len(rows), MATRIX, MATRIX)
    full = torch.zeros(coils, coils, MATRIX, MATRIX, dtype=torch.complex64)
    full[columns, rows], full[rows, columns] = matrices.conj(), matrices
    x = random(coils, MATRIX, MATRIX)
    contenders = {
        "ours": lambda: coil_matrix.apply(matrices, x),
        "torch": lambda: torch.einsum("cdyx,dyx->cyx", full, x),
    }
    yield row("coil matrix per pixel, 8 coils, 256 x 256", contenders, runs, None, "34 MFLOP, 27 MB")


def unit_maps(coils: int) -> torch.Tensor:
    """Simulated maps with sum |maps|^2 = 1."""
    maps = torch.from_numpy(coil_maps(coils).image((MATRIX, MATRIX))).to(torch.complex64)[:, None]
    return maps / maps.abs().square().sum(0).sqrt().clamp_min(1e-6)


def psnr(image: torch.Tensor, truth: torch.Tensor) -> float:
    """Of magnitudes, data range 1."""
    error = (image.abs() - truth.abs()).square().mean()
    return float(-10 * torch.log10(error))


def reconstructions(runs: int) -> Iterator[Row]:
    """30 iterations of CG-SENSE, adjoint and set-up of the operator included, beside BART's whole program."""
    truth = torch.from_numpy(shepp_logan().image((MATRIX, MATRIX))).to(torch.complex64)[None]
    truth, maps = truth / truth.abs().max(), unit_maps(8)
    for name, mask, _, _ in masks(8):
        wide = mask.expand(MATRIX, MATRIX).clone()
        middle = slice(MATRIX // 2 - 12, MATRIX // 2 + 12)
        wide[middle, middle if mask.shape[1] > 1 else slice(None)] = True
        operator = CartesianSense(maps, wide)
        data = operator(truth)
        data = torch.where(wide, data + 0.01 * random(*data.shape) * data.abs().mean(), 0)

        def ours(wide=wide, data=data):
            return cg_sense(CartesianSense(maps, wide), data, iterations=30, regularization=0.005)

        contenders: dict[str, Work] = {"ours": ours}
        quality = f"PSNR {psnr(ours(), truth):.2f} dB"
        with tempfile.TemporaryDirectory() as folder:
            if shutil.which("bart"):
                bart = Bart(Path(folder), torch.get_num_threads())
                bart.write("k", data.numpy())
                bart.write("s", maps.numpy())
                contenders["BART, whole program"] = lambda bart=bart: bart("pics -S -l2 -r0.005 -i30 k s o")
                contenders["BART, whole program"]()
                quality += f", BART {psnr(torch.from_numpy(bart.read('o')[0]), truth):.2f} dB"
            yield row(f"CG-SENSE, 30 iterations, 8 coils, {name}", contenders, min(runs, 10), 40, quality)


def rows_of(cases: Callable[[], Iterator[Case]]) -> Callable[[int], Iterator[Row]]:
    """Measures cases that are described elsewhere."""

    def measured(runs: int) -> Iterator[Row]:
        for what, contenders, target, floor in cases():
            yield row(what, contenders, runs, target, floor)

    return measured


CASES: dict[str, list[Callable[[int], Iterator[Row]]]] = {
    "mri": [fourier, grams, kspace_steps, proximal, low_rank, reconstructions],
    "pat": [rows_of(photoacoustic)],
    "ct": [rows_of(tomographic)],
}
"""What is measured, by the names that --only takes."""
SECTIONS = {"mri": "Kernels", "pat": "Kernels, photoacoustics", "ct": "Kernels, CT"}
NOTES = {
    "mri": (
        "complex64; 10 runs of whole reconstructions. Floor: operations and bytes that the fused form must do and move; BART is "
        "timed as a program, start and planning included, ours as a call in a running process."
    ),
    "pat": (
        "float32. 256 elements on 270 degrees, 2030 samples at 40 MS/s, 256 x 256 pixels over 25 mm. Ours interpolates "
        "linearly; PATATO 0.7.0 takes the sample before, on float32 signals, its compilation left out. torch: the same sum "
        "without compiled kernels, its geometry in double precision."
    ),
    "ct": (
        "float32. 512 x 512 pixels, 720 views of 720 bins. ASTRA's processor code runs in one thread and takes the length of the "
        "ray in each pixel where ours interpolates."
    ),
}


def text_of(group: str, rows: list[Row], runs: int) -> str:
    """The section of the document."""
    table = Table("what", "ours, ms", "target, ms", "floor, or quality", "others, ms (times ours)")
    for found in rows:
        peers = ", ".join(f"{name} {ms:.2f} ({ms / found['ms']:.1f}x)" for name, ms in found["peers"].items())
        table.add(found["what"], f"{found['ms']:.3f}", found["target"] or "", found["floor"], peers)
    library = native.library()
    path = f"{library.level} library" if library else "no library"
    return (
        f"{table}\n\nMedians of {runs} runs, {torch.get_num_threads()} threads, {path}, load {os.getloadavg()[0]:.1f} "
        f"before, {NOTES[group]}"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=24)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="update docs/benchmarks.md")
    arguments = parser.parse_args()
    if not native.available():
        sys.exit("kernels.py: no compiled kernels in this installation, see kernels/README.md")
    tune_process()
    torch.set_num_threads(arguments.threads)
    rows = {name: [found for case in CASES[name] for found in case(arguments.runs)] for name in arguments.only}
    print(machine())
    for name, found in rows.items():
        text = text_of(name, found, arguments.runs)
        print(f"\n{SECTIONS[name]}\n\n{text}")
        if arguments.write:
            update_document(ROOT / "docs" / "benchmarks.md", SECTIONS[name], text, machine())
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
