"""Quality of the plain reconstructions on a real, fully sampled scan with lines taken out.

    python benchmarks/plain_quality.py [--data DIR] [--json FILE] [--write]

Needs `mri/raw/invivo_brain_3T_16ch.h5` in the data folder. Every second or third line is kept, and 24 calibration lines in
the middle, marked as a scanner marks them; the session does the rest. The reference is the root sum of squares of the full
scan; images are scaled to it by least squares. Scores are over the whole image, and over the object alone (where the
reference is above 5 % of its maximum), since SENSE leaves no background.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import torch
from report import Table, machine, update_document
from scanside.adapters.files.ismrmrd import open_scan
from scanside.adapters.mrd_header import parse_header
from scanside.engine.config import ConfigStore, SystemConfig, with_overrides
from scanside.engine.evaluation import nrmse, psnr, ssim
from scanside.engine.headers import AcquisitionFlag as Flag
from scanside.engine.messages import AcquisitionBatch, EndOfScan, Image, ScanHeader
from scanside.engine.streaming.session import Session

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


def run(path: Path) -> list[dict[str, object]]:
    """All methods at R = 1, 2, 3."""
    store, rows = ConfigStore(), []
    with open_scan(path) as scan:
        header = parse_header(scan.xml, store.get("default").limits)
        batches = list(scan.batches())
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
    rows = run(arguments.data / "mri" / "raw" / "invivo_brain_3T_16ch.h5")
    section = report(rows)
    print(section)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    if arguments.write:
        update_document(root / "docs" / "benchmarks.md", "Plain reconstructions in vivo", section, machine())


if __name__ == "__main__":
    main()
