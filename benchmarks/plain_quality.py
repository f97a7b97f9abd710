"""Quality of the plain reconstructions on a real, fully sampled scan with lines taken out.

    python benchmarks/plain_quality.py [--data DIR] [--json FILE] [--write]

Needs `mri/raw/invivo_brain_3T_16ch.h5` in the data folder. Every second or third line is kept, and 24 calibration lines in
the middle, marked as a scanner marks them; the session does the rest. In the first table the reference is the root sum of
squares of the full scan; images are scaled to it by least squares. Scores are over the whole image, and over the object
alone (where the reference is above 5 % of its maximum), since SENSE leaves no background.

The second table takes SENSE of the full scan, with the default crop of the coil maps and without, and compares it with
what others make of the same fully sampled coil images: root sum of squares, as it is and less its noise floor, the
adaptive combination (Walsh et al., MRM 43, 2000; local coil correlations over a Gaussian of 3 pixels), and, where the
program is installed, the combination with the maps of `bart ecalib`, cropped as BART does by default and not. The root of the
squares of 16 coils has a floor in air that no combination follows.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import torch
from bart_agreement import Bart
from report import Table, machine, update_document
from scanside.adapters.files.ismrmrd import open_scan
from scanside.adapters.mrd_header import parse_header
from scanside.engine.config import ConfigStore, SystemConfig, with_overrides
from scanside.engine.evaluation import nrmse, psnr, ssim
from scanside.engine.headers import AcquisitionFlag as Flag
from scanside.engine.messages import AcquisitionBatch, EndOfScan, Image, ScanHeader
from scanside.engine.streaming.session import Session
from scipy import ndimage

METHODS = (
    ("zero-filled", "cartesian", {"reconstruction.method": "zero_filled"}),
    ("SENSE, closed form or CG", "cartesian", {}),
    ("CG-SENSE", "sense", {}),
    ("GRAPPA", "grappa", {}),
    ("L1-ESPIRiT", "l1_espirit", {}),
)


def undersampled(
    header: ScanHeader, batches: list[AcquisitionBatch], every: int, lines: int
) -> tuple[ScanHeader, list]:
    """The scan with every `every`-th line and `lines` calibration lines around the center."""
    space = msgspec.structs.replace(header.encodings[0], acceleration=(every, 1), calibration="embedded")
    center = space.limits["kspace_encode_step_1"].center
    kept = []
    for batch in batches:
        steps = batch.headers["idx"]["kspace_encode_step_1"].astype(int)
        regular, calibrates = steps % every == 0, np.abs(steps - center + 0.5) < lines / 2
        headers = batch.headers.copy()
        headers["flags"][calibrates & regular] |= np.uint64(Flag.IS_PARALLEL_CALIBRATION_AND_IMAGING.bit)
        headers["flags"][calibrates & ~regular] |= np.uint64(Flag.IS_PARALLEL_CALIBRATION.bit)
        wanted = regular | calibrates
        kept.append(AcquisitionBatch(headers=headers[wanted], samples=batch.samples[wanted]))
    return msgspec.structs.replace(header, encodings=(space,)), kept


def reconstruct(config: SystemConfig, header: ScanHeader, batches: list[AcquisitionBatch]) -> Iterator[Image]:
    """Images that a session makes of a scan."""
    session = Session(config)
    for message in (header, *batches, EndOfScan()):
        yield from (event for event in session.feed(message) if isinstance(event, Image))


def score(reference: np.ndarray, image: np.ndarray) -> dict[str, float]:
    """PSNR, SSIM and NRMSE after least-squares scaling; NRMSE of the object alone."""
    scaled = image * float((reference * image).sum() / (image * image).sum())
    inside = reference > 0.05
    return {
        "psnr": psnr(reference, scaled),
        "ssim": ssim(reference, scaled),
        "nrmse": nrmse(reference, scaled),
        "object": nrmse(reference[inside], scaled[inside], fit_scale=True),
    }


def coil_images(batches: list[AcquisitionBatch]) -> np.ndarray:
    """Images of all coils of the full scan, complex (coil, y, x), without any part of the engine."""
    samples = np.concatenate([batch.samples for batch in batches])
    steps = np.concatenate([batch.headers["idx"]["kspace_encode_step_1"] for batch in batches])
    kspace = np.zeros((samples.shape[1], int(steps.max()) + 1, samples.shape[2]), np.complex64)
    kspace[:, steps] = samples.transpose(1, 0, 2)
    centered = np.fft.ifftshift(kspace, axes=(1, 2))
    return np.fft.fftshift(np.fft.ifft2(centered, norm="ortho"), axes=(1, 2))


def adaptive(images: np.ndarray, width: float = 3.0) -> np.ndarray:
    """Coil maps as the dominant eigenvectors of the local coil correlation."""
    product = images[:, None] * images[None].conj()
    blur = (0, 0, width, width)
    local = ndimage.gaussian_filter(product.real, blur) + 1j * ndimage.gaussian_filter(product.imag, blur)
    return np.linalg.eigh(local.transpose(2, 3, 0, 1))[1][..., -1].transpose(2, 0, 1)


def bart_maps(images: np.ndarray, options: str) -> np.ndarray:
    """Maps of `bart ecalib` from the 24 central lines and points."""
    kspace = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(images, axes=(1, 2)), norm="ortho"), axes=(1, 2))
    with tempfile.TemporaryDirectory() as folder:
        bart = Bart(Path(folder), 1)
        bart.write("kspace", kspace[:, None].astype(np.complex64))
        bart(f"ecalib -m1 -r24 {options} kspace maps")
        return bart.read("maps")[:, 0]


def combinations(images: np.ndarray) -> dict[str, np.ndarray]:
    """What others make of the full scan: real images (y, x) by name."""
    squares = (np.abs(images) ** 2).sum(0)
    air = squares < np.quantile(squares, 0.15)
    found = {
        "root sum of squares": np.sqrt(squares),
        "the same less its noise floor": np.sqrt(np.maximum(squares - squares[air].mean(), 0)),
        "adaptive combination": np.abs((adaptive(images).conj() * images).sum(0)),
    }
    if shutil.which("bart"):
        for name, options in (("maps of BART, cropped", ""), ("maps of BART, not cropped", "-c0")):
            found[name] = np.abs((bart_maps(images, options).conj() * images).sum(0))
    return found


def full_scan(header: ScanHeader, batches: list[AcquisitionBatch]) -> list[dict[str, object]]:
    """NRMSE of SENSE of the full scan to every combination: everywhere, and where the root sum of squares is bright."""
    others, store = combinations(coil_images(batches)), ConfigStore()
    bright = others["root sum of squares"] / others["root sum of squares"].max()
    rows: list[dict[str, object]] = []
    for crop in (0.8, 0.0):
        config = with_overrides(store.get("sense"), {"coil_maps.crop": crop}, source="benchmark")
        ours = next(reconstruct(config, header, batches)).pixels[0, 0].astype(np.float64)
        for name, other in others.items():
            figures = [
                nrmse(other[where], ours[where], fit_scale=True) for where in (bright >= 0, bright > 0.05, bright > 0.1)
            ]
            mapped = ours > 1e-6 * ours.max()
            figures.append(nrmse(other[mapped], ours[mapped], fit_scale=True))
            rows.append({"crop": crop, "reference": name, "nrmse": figures})
            print(rows[-1], flush=True)
    return rows


def load(path: Path) -> tuple[ScanHeader, list[AcquisitionBatch]]:
    """Header and readouts of a file."""
    with open_scan(path) as scan:
        return parse_header(scan.xml, ConfigStore().get("default").limits), list(scan.batches())


def run(header: ScanHeader, batches: list[AcquisitionBatch]) -> list[dict[str, object]]:
    """All methods at R = 1, 2, 3."""
    store, rows = ConfigStore(), []
    full = next(reconstruct(store.get("cartesian"), header, batches)).pixels[0, 0]
    reference = full / full.max()
    for every in (1, 2, 3):
        measured = (header, batches) if every == 1 else undersampled(header, batches, every, 24)
        for name, config, values in METHODS:
            if every == 1 and name not in ("CG-SENSE", "L1-ESPIRiT"):
                continue
            begun = time.monotonic()
            image = next(reconstruct(with_overrides(store.get(config), values, source="benchmark"), *measured))
            seconds = time.monotonic() - begun
            net = float(image.meta["scanside_net_acceleration"][0])
            rows.append(
                {"every": every, "net": net, "method": name, "seconds": seconds, **score(reference, image.pixels[0, 0])}
            )
            print(rows[-1], flush=True)
    return rows


def full_report(rows: list[dict[str, object]]) -> str:
    """The second table, and what it says about an NRMSE of at most 0.02."""
    table = Table(
        "crop of our maps", "full scan combined by", "whole image", "above 5 %", "above 10 %", "where our maps are"
    )
    for row in rows:
        table.add(row["crop"], row["reference"], *(f"{value:.4f}" for value in row["nrmse"]))
    whole, bright = (
        ", ".join(f"{row['reference']} (crop {row['crop']})" for row in rows if row["nrmse"][place] <= 0.02) or "none"
        for place in (0, 2)
    )
    return (
        f"SENSE of the full scan, NRMSE after least-squares scaling to the image in the second column:\n\n{table}\n\n"
        f"At most 0.02 over the whole image: {whole}. At most 0.02 above 10 % of the maximum: {bright}.\n"
    )


def report(rows: list[dict[str, object]]) -> str:
    """The results as a Markdown section."""
    table = Table("lines kept", "net R", "method", "PSNR dB", "SSIM", "NRMSE", "NRMSE object", "seconds")
    for row in rows:
        kept = "all" if row["every"] == 1 else f"every {row['every']}. + 24"
        table.add(
            kept,
            f"{row['net']:.2f}",
            row["method"],
            *(f"{row[key]:.{digits}f}" for key, digits in (("psnr", 2), ("ssim", 3), ("nrmse", 4), ("object", 4))),
            f"{row['seconds']:.2f}",
        )
    return (
        f"{table}\n\nIn-vivo brain, 3 T, 16 coils, 128 x 128. Reference: root sum of squares of the full scan. "
        f"Seconds are for the whole scan, coil maps included, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}.\n"
    )


def main() -> None:
    """Command line."""
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("SCANSIDE_DATA", root.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=default, help="folder of scanner data")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="update docs/benchmarks.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    measured = load(arguments.data / "mri" / "raw" / "invivo_brain_3T_16ch.h5")
    rows, full = run(*measured), full_scan(*measured)
    section = f"{report(rows)}\n{full_report(full)}"
    print(section)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "rows": rows, "full_scan": full}, indent=1))
    if arguments.write:
        update_document(root / "docs" / "benchmarks.md", "Plain reconstructions in vivo", section, machine())


if __name__ == "__main__":
    main()
