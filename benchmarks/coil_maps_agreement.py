"""Coil maps beside BART's: time and agreement on the same data, in one run.

    python -m benchmarks.coil_maps_agreement --coils 8 16 --matrix 256 --json coil_maps.json

The phantom is analytic, so both are also compared with the true profiles. BART is timed as a user runs it, process start
and files included; its own share without them cannot be told from outside. Both use kernel 6, 24 calibration points,
the same singular value threshold and crop.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from report import Table, machine, update_document
from scanside.engine.preparation.coil_maps import espirit, walsh
from scanside.engine.preparation.filters import to_image, to_kspace

__all__ = ["main"]

THRESHOLD = 0.001
"""BART's -t, its default."""


def scan(matrix: int, coils: int, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit-norm profiles (coil, 1, y, x), object (1, y, x) and noisy k-space (coil, 1, y, x)."""
    y, x = np.meshgrid(*2 * [(np.arange(matrix) - matrix // 2) * 2 / matrix], indexing="ij")
    angle = 2 * np.pi * np.arange(coils)[:, None, None] / coils
    distance = (y - 1.3 * np.sin(angle)) ** 2 + (x - 1.3 * np.cos(angle)) ** 2
    profiles = np.exp(-distance / 1.2 + 1j * (2 * np.cos(angle + 0.3) * x + 1.5 * np.sin(angle) * y + angle))
    profiles /= np.linalg.norm(profiles, axis=0)
    image = ((y / 0.7) ** 2 + (x / 0.8) ** 2 < 1) * (1 + 0.4 * np.cos(9 * x) * np.sin(7 * y))
    kspace = to_kspace(torch.from_numpy(profiles * image)).numpy()
    kspace += noise * (np.random.default_rng(1).standard_normal((*kspace.shape, 2)) @ [1, 1j])
    return profiles[:, None], image[None], kspace[:, None].astype(np.complex64)


def timed(call: Callable[[], object], repeats: int) -> float:
    """Median time in ms after one call to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def write_cfl(path: Path, array: np.ndarray) -> None:
    """BART's format: a text header and complex64, first axis fastest."""
    dimensions = [*array.shape[::-1], *[1] * (16 - array.ndim)]
    path.with_suffix(".hdr").write_text("# Dimensions\n" + " ".join(map(str, dimensions)) + "\n")
    array.astype(np.complex64).tofile(path.with_suffix(".cfl"))


def bart_maps(kspace: np.ndarray, repeats: int, threads: int) -> tuple[np.ndarray, float]:
    """Maps of `bart ecalib -m1`, and its time in ms."""
    with tempfile.TemporaryDirectory() as folder:
        write_cfl(Path(folder) / "kspace", kspace)
        command = ["bart", "ecalib", "-m1", "-r24", f"-t{THRESHOLD}", "-c0.8", "kspace", "maps"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        call = lambda: subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)  # noqa: E731
        spent = timed(call, repeats)
        return np.fromfile(Path(folder) / "maps.cfl", np.complex64).reshape(kspace.shape), spent


def agreement(maps: np.ndarray, other: np.ndarray, image: np.ndarray) -> dict[str, float]:
    """Correlation per pixel inside of the object, without and with phase, and how much of it both define."""
    both = (np.abs(maps).sum(0) > 0) & (np.abs(other).sum(0) > 0) & (image > 0)
    product = (maps.conj() * other).sum(0)[both]
    return {
        "correlation_median": float(np.median(np.abs(product))),
        "correlation_least": float(np.abs(product).min()),
        "with_phase_least": float(product.real.min()),
        "defined": float(both.sum() / (image > 0).sum()),
    }


def residual(maps: np.ndarray, profiles: np.ndarray, image: np.ndarray) -> float:
    """Part of the noise-free coil images that the maps cannot represent, relative."""
    images = profiles * image
    return float(np.linalg.norm(images - maps * (maps.conj() * images).sum(0)) / np.linalg.norm(images))


def compare(matrix: int, coils: int, repeats: int, threads: int) -> dict[str, object]:
    """One row of the table."""
    profiles, image, kspace = scan(matrix, coils, noise=0.01)
    middle = slice(matrix // 2 - 12, matrix // 2 + 12)
    calibration = torch.from_numpy(kspace[:, :, middle, middle].copy())
    shape = (1, matrix, matrix)
    images = to_image(torch.from_numpy(kspace))
    ours = espirit(calibration, shape, threshold=THRESHOLD**0.5).numpy()
    row: dict[str, object] = {
        "matrix": matrix,
        "coils": coils,
        "espirit_ms": timed(lambda: espirit(calibration, shape, threshold=THRESHOLD**0.5), repeats),
        "espirit_residual": residual(ours, profiles, image),
        "walsh_ms": timed(lambda: walsh(images), repeats),
        "walsh_residual": residual(walsh(images).numpy(), profiles, image),
    }
    if shutil.which("bart"):
        theirs, spent = bart_maps(kspace, repeats, threads)
        row |= {"bart_ms": spent, "bart_residual": residual(theirs, profiles, image)}
        row |= agreement(ours, theirs, image)
    return row


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--coils", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--matrix", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="update docs/benchmarks.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    conditions = {"threads": arguments.threads, "cores": os.cpu_count(), "load_before": os.getloadavg()[0]}
    rows = [compare(arguments.matrix, coils, arguments.repeats, arguments.threads) for coils in arguments.coils]
    conditions |= {"load_after": os.getloadavg()[0], "torch": torch.__version__}
    print(conditions)
    for row in rows:
        print(
            "  ".join(
                f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
            )
        )
    if "bart_ms" not in rows[0]:
        print("bart is not installed: no comparison", file=sys.stderr)
    if arguments.write:
        document = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
        table = Table(*rows[0])
        for row in rows:
            table.add(*(f"{value:.5g}" if isinstance(value, float) else value for value in row.values()))
        note = ", ".join(f"{name} {value}" for name, value in conditions.items())
        section = f"{table}\n\n`benchmarks/coil_maps_agreement.py`; BART's time is of the whole program. {note}.\n"
        update_document(document, "Coil maps beside BART", section, machine())
    if arguments.json:
        arguments.json.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
