"""PSNR against network evaluations for steps of different sizes: hundreds of small steps come to what a few whole ones do.

    python benchmarks/evaluations.py [--images 2] [--mask hggdp_radial_015] [--picture docs/images/evaluations.png]

The loop of HGGDP (ten noise levels from 1 to 0.01, mean of the Langevin dynamics, hard data consistency) with 80 steps of 0.015,
8 of 0.15, 2 of 0.6 and 1 of 1 at each level, from the zero-filled image.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from mri_cases import scans
from mri_systems import estimates
from scanside.engine.baselines.combine import zero_filled
from scanside.engine.config import ConfigStore, with_overrides
from scanside.engine.evaluation import psnr

mpl.use("agg")
SIZES = ((80, 0.015), (8, 0.15), (2, 0.6), (1, 1.0))


def main() -> None:
    """Command line."""
    root = Path(__file__).resolve().parent.parent
    data = Path(os.environ.get("SCANSIDE_DATA", root.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--mask", default="hggdp_radial_015")
    parser.add_argument("--longest", type=int, default=80, help="most steps per level; leaves out longer runs")
    parser.add_argument("--data", type=Path, default=data, help="folder of scanner data")
    parser.add_argument("--picture", type=Path, default=root / "docs" / "images" / "evaluations.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = list(scans("single", options.data, options.mask, options.images))
    start = float(np.mean([psnr(case.reference, zero_filled(case.data)[0].numpy()) for case in cases]))
    curves = {}
    for steps, size in (pair for pair in SIZES if pair[0] <= options.longest):
        curves[steps, size] = np.mean([_curve(case, steps, size) for case in cases], axis=0)
        print(f"{10 * steps:4d} evaluations of step {size}: {curves[steps, size][-1]:.2f} dB", flush=True)
    print(f"zero-filled {start:.2f} dB")
    _draw(curves, start, options.picture)


def _curve(case: object, steps: int, size: float) -> list[float]:
    config = with_overrides(
        ConfigStore().get("mri/hggdp"), {"sampler.steps": steps, "sampler.relaxation": size}, source="benchmark"
    )
    return [psnr(case.reference, result.image[0].abs().numpy()) for result in estimates(config, case)]


def _draw(curves: dict[tuple[int, float], np.ndarray], start: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), dpi=100, layout="constrained")
    axes = figure.subplots()
    for (steps, size), curve in curves.items():
        axes.semilogx(1 + np.arange(len(curve)), curve, label=f"{steps} steps of {size:g} per level")
    axes.axhline(start, color="gray", linestyle=":", label="zero-filled")
    axes.set(xlabel="network evaluations", ylabel="PSNR, dB")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
