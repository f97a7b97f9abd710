"""Image quality of photoacoustic systems from some of the views of a ring, beside the plain reconstructions.

    python benchmarks/pat_quality.py                                # measured and simulated; prints the tables
    python benchmarks/pat_quality.py --write                        # update docs/benchmarks.md, draw docs/images/pat_*.png

The reference is the delay-and-sum image of the whole ring: of the measured three spheres (512 views, 0.15 to 3.5 MHz, 256 x 256
pixels over 32 mm), or of simulated scenes without noise, whose seeds nothing was trained on, made of spheres in closed form, not
on a grid. Those with flaws have what no model of a ring knows: views of unequal strength, a probe off its circle, motion, hum,
echoes; settings of the samplers were chosen on such scenes. Every image is scaled to the reference by least squares before it is
compared. CG and TV use the model of the ring
(`BeamformedOperator`), TV with the best of three weights by the reference, which flatters it; nothing else saw the reference.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mri_pictures import save_panel
from report import Table, machine, update_document
from scanside.engine.baselines.photoacoustic_iterative import model_based, total_variation_photoacoustic
from scanside.engine.config import ConfigStore, with_overrides
from scanside.engine.evaluation import ssim
from scanside.engine.operators.photoacoustic_geometry import ring_positions
from scanside.engine.operators.photoacoustic_views import completed
from scanside.engine.priors.photoacoustic_training import simulate
from scanside.engine.samplers.photoacoustic import transducer_response, wiener
from scanside.engine.simulation.photoacoustic_scenes import Recorded
from scanside.engine.streaming.photoacoustic_prior import PriorBeamformer

SYSTEMS = ("pat/online", "pat/sparse", "pat/limited", "pat/mdae", "pat/sinogram", "pat/multi_model")
PICTURES = {
    "32": ["DAS of the views", "linear interpolation", "FISTA-TV, 150 iterations", "pat/online", "pat/sinogram"],
    "120d": ["DAS of the views", "FISTA-TV, 150 iterations", "pat/online", "pat/limited", "pat/sinogram"],
    "70d": ["DAS of the views", "FISTA-TV, 150 iterations", "pat/online", "pat/limited", "pat/sinogram"],
}
TV_WEIGHTS = (0.001, 0.003, 0.01)
HELD_OUT = 977
NOISE = 0.01


class Scan(NamedTuple):
    """Signals of a whole ring as they are measured, its reference image, and what a beamformer must know of it."""

    name: str
    signals: np.ndarray
    positions: np.ndarray
    rate: float
    settings: dict
    band: str
    reference: np.ndarray


def views(case: str, elements: int) -> np.ndarray:
    """Elements of a case: "64" views round the ring, or "120d" of it."""
    if case.endswith("d"):
        return np.arange(round(elements * float(case[:-1]) / 360))
    return np.arange(0, elements, elements // int(case))


def beamformer(name: str, scan: Scan, chosen: np.ndarray) -> PriorBeamformer:
    """A system on some of the views."""
    config = with_overrides(ConfigStore().get(name), {"photoacoustic.band_hz": scan.band}, source="benchmark")
    return PriorBeamformer(config, scan.positions[chosen], scan.rate, **scan.settings)


def full_image(scan: Scan, signals: np.ndarray) -> np.ndarray:
    """Delay-and-sum of the whole ring."""
    made = beamformer("pat/online", scan, np.arange(len(signals)))
    prepared = made.prepared(signals)
    return made.operators()[0].back(prepared).numpy()


def measured(folder: Path) -> Iterator[Scan]:
    """The three spheres."""
    signals = np.load(folder / "pat" / "three_spheres_512x2000.npz")["sinogram"].astype(np.float32)
    settings = {"pixels": (256, 256), "field_of_view_m": (-0.016, 0.016, -0.016, 0.016)}
    scan = Scan(
        "three spheres", signals, ring_positions(512, 1460 * 1500 / 50e6), 50e6, settings, "150e3,3.5e6", signals
    )
    yield scan._replace(reference=full_image(scan, signals))


def simulated(count: int, *, flawed: bool = False) -> Iterator[Scan]:
    """Held-out scenes with noise of 1 % of the strongest signal; with flaws, other scenes."""
    scenes = simulate(count, HELD_OUT + flawed, "image", flawed=float(flawed))
    for number, scene in enumerate(scenes):
        ring, half = scene.ring, scene.ring.view_m / 2
        settings = {
            "pixels": (128, 128),
            "field_of_view_m": (-half, half, -half, half),
            "speed_of_sound": ring.speed_of_sound,
            "t0_samples": ring.first_sample,
        }
        noise = np.random.default_rng((HELD_OUT, number)).standard_normal(scene.signals.shape, dtype=np.float32)
        scan = Scan(f"scene {number}", scene.signals, ring.positions_m, ring.sampling_rate_hz, settings, "0,0", noise)
        yield scan._replace(signals=scene.signals + NOISE * noise, reference=full_image(scan, scene.signals))


def figures(image: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """NRMSE, PSNR in dB over the range of the reference, SSIM; after least-squares scaling."""
    scaled = image * float((image * reference).sum() / max(float((image * image).sum()), 1e-30))
    error = float(np.linalg.norm(scaled - reference) / np.linalg.norm(reference))
    span = float(np.ptp(reference))
    psnr = 20 * np.log10(span / np.sqrt(np.mean((scaled - reference) ** 2)))
    low = float(reference.min())
    return error, float(psnr), ssim((reference - low) / span, (scaled - low) / span)


def plain_images(scan: Scan, chosen: np.ndarray) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """Reconstructions without a prior."""
    made = beamformer("pat/online", scan, chosen)
    rows = made.prepared(scan.signals[chosen])
    full, part = made.operators()
    data = rows[made.measured]
    yield "DAS of the views", lambda: full.back(rows).numpy()
    yield "linear interpolation", lambda: full.back(completed(rows, made.measured)).numpy()
    yield "cubic interpolation", lambda: full.back(completed(rows, made.measured, cubic=True)).numpy()
    yield "CG, 20 iterations", lambda: model_based(part, data, iterations=20, regularization=0.01).numpy()

    def tv() -> np.ndarray:
        found = [total_variation_photoacoustic(part, data, iterations=150, weight=w).numpy() for w in TV_WEIGHTS]
        return min(found, key=lambda image: figures(image, scan.reference)[0])

    yield "FISTA-TV, 150 iterations", tv


def system_images(scan: Scan, chosen: np.ndarray, names: list[str]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Reconstructions with a prior."""
    for name in names:
        made = beamformer(name, scan, chosen)
        yield name, lambda made=made: made.solve(scan.signals[chosen])


def rows_of(scans: list[Scan], case: str, names: list[str]) -> tuple[list[list[object]], dict[str, np.ndarray]]:
    """Rows of a table for one case, means over the scans, and the images of the first scan."""
    found: dict[str, list[tuple]] = {}
    shown: dict[str, np.ndarray] = {}
    for scan in scans:
        chosen = views(case, len(scan.signals))
        for name, make in [*plain_images(scan, chosen), *system_images(scan, chosen, names)]:
            begun = time.process_time()
            result = make()
            seconds = time.process_time() - begun
            image, evaluations = (result, 0) if isinstance(result, np.ndarray) else (result.image, result.evaluations)
            found.setdefault(name, []).append((*figures(image, scan.reference), evaluations, seconds))
            shown.setdefault(name, image)
    rows = []
    for name, values in found.items():
        error, psnr, similarity, evaluations, seconds = np.mean(np.array(values), axis=0)
        row = [case, name, f"{error:.3f}", f"{psnr:.2f}", f"{similarity:.3f}", round(evaluations), f"{seconds:.2f}"]
        rows.append(row)
        print(*row, sep="\t", flush=True)
    return rows, shown


TRANSDUCERS = ((2.25e6, 66.0), (5e6, 55.0))


def bandwidth(count: int) -> Table:
    """NRMSE of signals and image of a wide band from what narrower transducers heard, beside Wiener deconvolution."""
    table = Table("transducer", "method", "NRMSE of the signals", "NRMSE of the image", "NFE")
    for center, width in TRANSDUCERS:
        found: dict[str, list[tuple[float, float, int]]] = {}
        for number, scene in enumerate(simulate(count, HELD_OUT, "spectrum")):
            scan = wide_scan(scene)
            config = with_overrides(
                ConfigStore().get("pat/bandwidth"),
                {"photoacoustic.band_hz": "0,0", "photoacoustic.transducer": f"{center},{width}"},
                source="benchmark",
            )
            made = PriorBeamformer(config, scan.positions, scan.rate, **scan.settings)
            length = 2 * scan.signals.shape[1]
            response = transducer_response(scan.signals.shape[1], center / scan.rate, width).numpy()
            heard = np.fft.irfft(np.fft.rfft(scan.signals, length) * response, length)[:, : scan.signals.shape[1]]
            noise = np.random.default_rng((HELD_OUT, number)).standard_normal(heard.shape)
            heard = (heard + 0.05 * np.sqrt(np.mean(heard**2)) * noise).astype(np.float32)
            truth, full = made.prepared(scan.signals), made.operators()[0]
            rows, solved = made.prepared(heard), made.solve(heard)
            restored = wiener(rows, made.response(rows.shape[-1]), made.noise_ratio(rows))
            for name, signals, evaluations in (
                ("as heard", rows, 0),
                ("Wiener deconvolution", restored, 0),
                ("pat/bandwidth", solved.signals, solved.evaluations),
            ):
                errors = [
                    figures(v.numpy(), t.numpy())[0]
                    for v, t in ((signals, truth), (full.back(signals), full.back(truth)))
                ]
                found.setdefault(name, []).append((*errors, evaluations))
        for name, values in found.items():
            signal_error, image_error, evaluations = np.mean(np.array(values), axis=0)
            row = [
                f"{center / 1e6:g} MHz, {width:g} %",
                name,
                f"{signal_error:.3f}",
                f"{image_error:.3f}",
                round(evaluations),
            ]
            table.add(*row)
            print(*row, sep="\t", flush=True)
    return table


def wide_scan(scene: Recorded) -> Scan:
    """A simulated ring at 20 MHz: lengths are scaled so that its own sampling rate becomes that."""
    ring = scene.ring
    factor = ring.sampling_rate_hz / 20e6
    half = ring.view_m / 2 * factor
    settings = {
        "pixels": (256, 256),
        "field_of_view_m": (-half, half, -half, half),
        "speed_of_sound": ring.speed_of_sound,
        "t0_samples": ring.first_sample,
    }
    return Scan("wide", scene.signals, ring.positions_m * factor, 20e6, settings, "0,0", scene.signals)


def draw(path: Path, scan: Scan, shown: dict[str, np.ndarray], names: list[str]) -> None:
    """The images of some methods with their errors, 5 times as bright."""
    top, low = float(np.percentile(scan.reference, 99.9)), float(scan.reference.min())

    def visible(image: np.ndarray) -> np.ndarray:
        scaled = image * float((image * scan.reference).sum() / (image * image).sum())
        return (scaled - low / 2) / (top - low / 2)

    save_panel(path, visible(scan.reference), {name: visible(shown[name]) for name in names if name in shown})


def main() -> None:
    """Command line."""
    root = Path(__file__).resolve().parent.parent
    data = Path(os.environ.get("SCANSIDE_DATA", root.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["128", "64", "32", "16", "240d", "120d", "70d"])
    parser.add_argument("--simulated-cases", nargs="*", default=["64", "32", "120d", "70d"])
    parser.add_argument("--systems", nargs="*", default=list(SYSTEMS))
    parser.add_argument("--bandwidth", action="store_true", help="only what transducers did not hear")
    parser.add_argument("--scenes", type=int, default=4, help="simulated ones")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=data, help="folder of measured data")
    parser.add_argument("--write", action="store_true", help="update docs/benchmarks.md and the pictures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.bandwidth:
        table = bandwidth(options.scenes)
        if options.write:
            section = f"{table}\n\n{_BANDWIDTH}"
            update_document(root / "docs" / "benchmarks.md", "Photoacoustic bandwidth", section, machine())
        return
    sets = [
        ("Photoacoustic systems, simulated", list(simulated(options.scenes)), options.simulated_cases),
        (
            "Photoacoustic systems, simulated with flaws",
            list(simulated(options.scenes, flawed=True)),
            options.simulated_cases,
        ),
    ]
    if (options.data / "pat").is_dir():
        sets.insert(0, ("Photoacoustic systems, measured spheres", list(measured(options.data)), options.cases))
    for title, scans, cases in sets:
        table = Table("views", "method", "NRMSE", "PSNR dB", "SSIM", "NFE", "CPU s")
        for case in cases:
            rows, shown = rows_of(scans, case, options.systems)
            for row in rows:
                table.add(*row)
            if options.write and case in PICTURES and "measured" in title:
                draw(root / "docs" / "images" / f"pat_{case}.png", scans[0], shown, PICTURES[case])
        if options.write and cases:
            explained = " ".join((__doc__ or "").split("\n\n", 2)[2].split())
            section = f"{table}\n\n`benchmarks/pat_quality.py`, {len(scans)} scans. {explained} NFE: network evaluations. {_LOAD}"
            update_document(root / "docs" / "benchmarks.md", title, section, machine())


_BANDWIDTH = (
    "`benchmarks/pat_quality.py --bandwidth`: held-out simulated scenes, 512 elements at 20 MHz, through a Gaussian response "
    "with noise of 5 % of what is heard (root mean square). Errors after least-squares scaling, against the signals of the wide "
    "band and their delay-and-sum image. Both methods know the response and estimate the noise from the data."
)
_LOAD = "CPU s: processor seconds on one thread, with other work on the machine."

if __name__ == "__main__":
    main()
