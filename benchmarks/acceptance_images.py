"""Acceptance: other people's clients get right images from real and simulated scans, and clients do not disturb each other."""

from __future__ import annotations

import ast
import copy
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import ismrmrd
import numpy as np
from acceptance_parts import Checks, Exchange, Scan, WatchedServer, exchange, probe, read_scan, reset
from plain_quality import combinations
from scanside.adapters.files.ismrmrd import header_xml
from scanside.adapters.files.png import write_png
from scanside.engine.config import ConfigStore
from scanside.engine.evaluation import nrmse, psnr
from scanside.engine.simulation.scan import simulate_scan

__all__ = ["Pictures", "save_bottles"]

GENERATE, RECONSTRUCT = "ismrmrd_generate_cartesian_shepp_logan", "ismrmrd_recon_cartesian_2d"
GENERATED = {"full": [], "C": ["-C"], "a2": ["-a", "2", "-w", "24"], "r20": ["-r", "20"], "k": ["-k"]}
PLAIN = (
    "<configuration><stream/><property name='scanside.config' value='mri/cartesian'/>"
    "<property name='preparation.prewhiten' value='false'/></configuration>"
)
"""The peer does not whiten; without the header's dwell time neither of us could be told right by the other."""
ZERO_FILLED = "<configuration><stream/><property name='reconstruction.method' value='zero_filled'/></configuration>"
NOISE, CALIBRATION, BOTH = ismrmrd.ACQ_IS_NOISE_MEASUREMENT, ismrmrd.ACQ_IS_PARALLEL_CALIBRATION, (
    ismrmrd.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING
)  # fmt: skip
REQUIRED = ("DataRole", "ImageProcessingHistory", "ImageRowDir", "ImageColumnDir", "Keep_image_geometry",
            "SequenceDescriptionAdditional")  # fmt: skip
"""What the conversion to DICOM and consoles need of every image."""
WINDOW = ("WindowCenter", "WindowWidth")
"""And of images in integers, whose gray levels have a scale."""


def scaled_psnr(reference: np.ndarray, image: np.ndarray) -> float:
    """PSNR against the reference with maximum 1, after least-squares scaling."""
    reference = reference / reference.max()
    return psnr(reference, image * float((reference * image).sum() / (image * image).sum()))


def coil_images(scan: Scan) -> np.ndarray:
    """Images of all coils (coil, y, x) of a fully sampled scan of one frame, oversampling cut off, by numpy alone."""
    lines = [a for a in scan.acquisitions if not a.is_flag_set(NOISE)]
    space = scan.header().encoding[0]
    samples = np.stack([a.data for a in lines])
    kspace = np.zeros((samples.shape[1], space.encodedSpace.matrixSize.y, samples.shape[2]), np.complex64)
    kspace[:, [a.idx.kspace_encode_step_1 for a in lines]] = samples.transpose(1, 0, 2)
    images = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace, axes=(1, 2)), norm="ortho"), axes=(1, 2))
    width = space.reconSpace.matrixSize.x
    start = (images.shape[2] - width) // 2
    return images[:, :, start : start + width]


def thinned(scan: Scan, every: int, lines: int) -> Scan:
    """The scan with every n-th line and calibration lines in the middle, marked as a scanner marks them."""
    header = scan.header()
    space = header.encoding[0]
    center = space.encodingLimits.kspace_encoding_step_1.center
    kind = ismrmrd.xsd
    space.parallelImaging = kind.parallelImagingType(
        accelerationFactor=kind.accelerationFactorType(kspace_encoding_step_1=every, kspace_encoding_step_2=1),
        calibrationMode=kind.calibrationModeType("embedded"),
    )
    kept = []
    for acquisition in scan.acquisitions:
        step = acquisition.idx.kspace_encode_step_1
        regular, calibrates = step % every == 0, abs(step - center + 0.5) < lines / 2
        if regular or calibrates:
            line = copy.deepcopy(acquisition)
            if calibrates:
                line.set_flag(BOTH if regular else CALIBRATION)
            kept.append(line)
    return scan.with_header(header, kept)


class Pictures:
    """The checks of images; `run` makes them all. folder: for files; data: of scanner data; tools: of the stock client."""

    def __init__(self, checks: Checks, server: WatchedServer, folder: Path, data: Path, tools: Path) -> None:
        self.checks, self.server, self.folder, self.data, self.tools = checks, server, folder, data, tools
        self.picture: np.ndarray | None = None
        """Skyra bottles, for the documentation."""

    def run(self) -> None:
        """All of them; one that breaks is a failure and the next goes on."""
        parts: list[Callable[[], None]] = [
            self.demo, self.in_vivo, self.in_vivo_thinned, self.bottles, self.generated, self.names, self.vanishing,
        ]  # fmt: skip
        for part in parts:
            try:
                part()
            except (OSError, ValueError, LookupError, RuntimeError, subprocess.SubprocessError) as error:
                self.checks.add(
                    part.__name__, "ran to its end", passed=False, figure=f"{type(error).__name__}: {error}"[:200]
                )

    def add(self, group: str, name: str, passed: bool | None, figure: str) -> None:  # noqa: FBT001
        """Note a result."""
        self.checks.add(group, name, passed, figure)

    # --- clients ---

    def stock(self, group: str, config: str, path: Path, images: int, *more: str) -> None:
        """The clients that others wrote count what they get."""
        client = self.tools / "pypi_ismrmrd_client.py"
        if client.exists():
            words = [sys.executable, str(client), "127.0.0.1", str(self.server.port), config, str(path), *more]
            said = subprocess.run(words, capture_output=True, text=True, timeout=60).stdout
            got = ast.literal_eval(said[: said.index("}") + 1]).get("Image", 0) if "}" in said else 0
            way = "PyPI ismrmrd client, unbuffered" if more else "PyPI ismrmrd client"
            self.add(
                group, way, got == images, f"{got} of {images} images, {said.split()[-1] if said else 'no answer'}"
            )
        else:
            self.add(group, "PyPI ismrmrd client", None, "the script is not in --tools")
        other = shutil.which("gadgetron_ismrmrd_client")
        if other is None:
            self.add(group, "gadgetron_ismrmrd_client", None, "not installed")
            return
        out = self.folder / "client.h5"
        out.unlink(missing_ok=True)
        words = [other, "-p", str(self.server.port), "-c", config, "-f", str(path), "-o", str(out)]
        code = subprocess.run(words, capture_output=True, timeout=60).returncode
        self.add(group, "gadgetron_ismrmrd_client", code == 0 and out.exists(), f"exit status {code}")

    def ask(self, config: str, scan: Scan, group: str, images: int) -> Exchange:
        """Send with PyPI ismrmrd and check what holds of every scan: count, no text, attributes, numbering."""
        answer = exchange(self.server.port, config, scan)
        count = sum(image.image_series_index == 1 for image in answer.images)
        missing = [name for name in REQUIRED if not answer.images or name not in answer.meta()]
        numbers = [(image.image_series_index, image.image_index) for image in answer.images]
        good = count == images and not answer.texts and not missing and len(set(numbers)) == len(numbers)
        said = f"; texts {answer.texts}" if answer.texts else ""
        lacks = f"; attributes missing: {', '.join(missing)}" if missing else ""
        self.add(group, f"images and attributes, {_short(config)}", good, f"{count} of {images}{lacks}{said}"[:300])
        return answer

    # --- scans ---

    def demo(self) -> None:
        """The scan of `scanside demo`, as a file."""
        group, frames = "demo scan", 12
        scan = simulate_scan(256, 8, 4, 24, repetitions=frames, noise_readouts=4, motion_degrees=6.0)
        path = self.folder / "demo.h5"
        with ismrmrd.Dataset(str(path), "dataset", create_if_needed=True) as file:
            file.write_xml_header(header_xml(scan.header))
            for batch in scan.batches:
                for header, samples in zip(batch.headers, batch.samples, strict=True):
                    acquisition = ismrmrd.Acquisition(header.tobytes())
                    acquisition.data[:] = samples
                    file.append_acquisition(acquisition)
        self.stock(group, "default", path, frames)
        stored = read_scan(path)
        truth = np.abs(scan.reference[:, 0])
        errors = {}
        for config in ("mri/cartesian", "default"):
            found = self.ask(config, stored, group, frames).pictures()
            errors[config] = float(np.mean([nrmse(t, f, fit_scale=True) for t, f in zip(truth, found, strict=True)]))
        filled = exchange(self.server.port, ZERO_FILLED, stored).pictures()
        plain = float(np.mean([nrmse(t, f, fit_scale=True) for t, f in zip(truth, filled, strict=True)]))
        figure = ", ".join(f"{name} {value:.3f}" for name, value in errors.items())
        self.add(group, "NRMSE to the truth below half of zero-filled", max(errors.values()) < plain / 2,
                 f"{figure}; zero-filled {plain:.3f}")  # fmt: skip

    def in_vivo(self) -> None:
        """SENSE of the full scan beside what others combine of it."""
        group, path = "in vivo, full", self.data / "mri" / "raw" / "invivo_brain_3T_16ch.h5"
        if not path.exists():
            self.add(group, "all", None, "no such file in the data folder")
            return
        self.stock(group, "sense", path, 1)
        scan = read_scan(path)
        (found,) = self.ask("sense", scan, group, 1).pictures()
        others = combinations(coil_images(scan))
        errors = {name: nrmse(other, found, fit_scale=True) for name, other in others.items()}
        figure = "; ".join(f"{name} {value:.4f}" for name, value in errors.items())
        name = "maps of BART, cropped" if "maps of BART, cropped" in errors else "adaptive combination"
        self.add(group, f"NRMSE to the coil-combined image ({name}) at most 0.02", errors[name] <= 0.02, figure)

    def in_vivo_thinned(self) -> None:
        """CG-SENSE of every second and third line."""
        group, path = "in vivo, thinned", self.data / "mri" / "raw" / "invivo_brain_3T_16ch.h5"
        if not path.exists():
            self.add(group, "all", None, "no such file in the data folder")
            return
        full = read_scan(path)
        truth = np.sqrt((np.abs(coil_images(full)) ** 2).sum(0))
        for every in (2, 3):
            scan = thinned(full, every, 24)
            answer = self.ask("sense", scan, group, 1)
            (found,) = answer.pictures()
            (filled,) = exchange(self.server.port, ZERO_FILLED, scan).pictures()
            ours, plain = scaled_psnr(truth, found), scaled_psnr(truth, filled)
            net = answer.meta()["scanside_net_acceleration"]
            self.add(group, f"every {every}. line + 24, CG-SENSE above zero-filled by 3 dB", ours > plain + 3,
                     f"{ours:.2f} dB, zero-filled {plain:.2f} dB, net acceleration {net}")  # fmt: skip

    def bottles(self) -> None:
        """A product sequence: noise readout, oversampling, embedded calibration, partial Fourier."""
        group, path = "Skyra bottles", self.data / "mri" / "raw" / "skyra_bottles_14ch_R3.h5"
        if not path.exists():
            self.add(group, "all", None, "no such file in the data folder")
            return
        scan = read_scan(path)
        lines = [a for a in scan.acquisitions if not a.is_flag_set(NOISE)]
        noises = len(scan.acquisitions) - len(lines)
        slices = len({a.idx.slice for a in lines})
        self.stock(group, "sense", path, slices)
        answer = self.ask("sense", scan, group, slices)
        found = answer.pictures()
        space = scan.header().encoding[0]
        width, wide = space.reconSpace.matrixSize.x, max(a.number_of_samples for a in lines)
        self.add(group, "oversampling removed", found[0].shape == (space.reconSpace.matrixSize.y, width),
                 f"{wide} samples, image {found[0].shape[1]} x {found[0].shape[0]}")  # fmt: skip
        without = exchange(self.server.port, "sense", Scan(scan.xml, lines)).pictures()
        change = nrmse(without[0], found[0], fit_scale=True)
        self.add(group, "noise readout is used, and is no line of the image", noises > 0 and 1e-4 < change < 0.2,
                 f"{noises} noise readouts; without them NRMSE {change:.4f}")  # fmt: skip
        grappa = self.ask("grappa", scan, group, slices).pictures()
        zero = "<configuration><stream/><property name='reconstruction.method' value='zero_filled'/></configuration>"
        filled = exchange(self.server.port, zero, scan).pictures()
        middle = len(found) // 2
        air = _air(scan, lines[len(lines) // 2].idx.slice, found[middle].shape)
        folded, ours, theirs = (_outside(image[middle], air) for image in (filled, found, grappa))
        self.add(group, "no fold-over: signal in air", ours < min(0.5 * folded, 0.05),
                 f"{ours:.4f} of the object's; GRAPPA {theirs:.4f}, zero-filled {folded:.4f}")  # fmt: skip
        self.picture = found[middle]

    def generated(self) -> None:
        """Scans of Debian's generator, beside Debian's reconstruction and the phantom in the file."""
        if shutil.which(GENERATE) is None or shutil.which(RECONSTRUCT) is None:
            self.add("Debian's tools", "all", None, "ismrmrd-tools is not installed")
            return
        full = np.inf
        for name, words in GENERATED.items():
            group, path = f"generated {' '.join(words) or 'full'}", self.folder / f"{name}.h5"
            command = [GENERATE, "-m", "256", "-c", "8", "-o", str(path), *words]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            images = {"r20": 20, "a2": 2}.get(name, 1)
            self.stock(group, "default", path, images, *(["unbuffered"] if name == "full" else []))
            scan = read_scan(path)
            found = self.ask(PLAIN, scan, group, images).pictures()
            with h5py.File(path) as file:
                coils = np.squeeze(file["dataset/coil_images"][0])
            truth = _root_sum_of_squares(coils, 256)
            errors = [nrmse(truth, image, fit_scale=True) for image in found]
            if name == "a2":
                self.add(group, "NRMSE to the phantom below that of the full scan", max(errors) < full,
                         f"{max(errors):.3f}, full {full:.3f}")  # fmt: skip
                continue
            subprocess.run([RECONSTRUCT, str(path)], check=True, capture_output=True, timeout=60)
            with h5py.File(path) as file:
                theirs = np.squeeze(file["dataset/cpp/data"][:]).astype(np.float64)
            # Their reconstruction writes every repetition over the one before.
            best = nrmse(theirs, found[-1], fit_scale=True)
            full = nrmse(truth, theirs, fit_scale=True)
            self.add(group, f"NRMSE to {RECONSTRUCT} at most 1e-3", best <= 1e-3,
                     f"{best:.1e}; to the phantom {max(errors):.3f}, theirs {full:.3f}")  # fmt: skip

    # --- names and neighbors ---

    def names(self) -> None:
        """Names that clients have built in lead to the default, others are told what there is."""
        scan = self._small()
        wanted = ConfigStore().get("default").name
        made = {}
        for name in ("default", "default.xml", "simplefft", "openrecon"):
            answer = probe(self.server.port, scan.wire(name))
            made[name] = answer.metas[0]["ImageProcessingHistory"] if answer.metas else ["no image"]
        self.add("names", f"default.xml, simplefft, openrecon lead to the default, {wanted}",
                 all(wanted in history for history in made.values()),
                 ", ".join(f"{key}: {' '.join(value)}" for key, value in made.items()))  # fmt: skip
        (image,) = exchange(self.server.port, "openrecon", scan).images
        lacks = [name for name in WINDOW if name not in ismrmrd.Meta.deserialize(image.attribute_string)]
        self.add("names", "openrecon gets integers with a window", image.data.dtype.kind in "iu" and not lacks,
                 f"{image.data.dtype}, up to {image.data.max()}; attributes missing: {lacks or 'none'}")  # fmt: skip
        answer = probe(self.server.port, scan.wire("no_such_thing"))
        told = " ".join(answer.texts)
        good = answer.refused and not answer.pixels and all(name in told for name in ("mri/sense", "mri/cartesian"))
        self.add("names", "an unknown name is answered with the list", good, told[:120])

    def vanishing(self) -> None:
        """Killed, idle and misbehaving clients beside and before a scan."""
        scan = self._small()
        wire = scan.wire("mri/cartesian")
        before = probe(self.server.port, wire).pixels[0]

        def same(name: str) -> None:
            begun = time.monotonic()
            after = probe(self.server.port, wire)
            good = len(after.pixels) == 1 and np.array_equal(after.pixels[0], before)
            self.add(
                "other clients", name, good, f"next scan the same to the bit, {1e3 * (time.monotonic() - begun):.0f} ms"
            )

        for _ in range(5):
            reset(self.server.port, [*wire[: len(wire) // 2], wire[len(wire) // 2][:100]])
        same("client reset in the middle of a scan, five times")
        client = self.tools / "pypi_ismrmrd_client.py"
        if client.exists():
            words = [
                sys.executable,
                str(client),
                "127.0.0.1",
                str(self.server.port),
                "default",
                str(self.folder / "r20.h5"),
            ]
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(1.2)
            process.kill()
            code = process.wait()
            same(f"PyPI client killed by signal {-code} while it sends")
        with socket.create_connection(("127.0.0.1", self.server.port)) as idle:
            idle.sendall(b"".join(wire[:10]))
            same("an idle client in the middle of its scan")
        with socket.create_connection(("127.0.0.1", self.server.port)) as rude:
            rude.sendall(wire[0] + b"\xff" * 100_000)
            same("a client that sends garbage and stays")
        self.add("other clients", "no session is left over", self.server.settle(), "scanside_sessions_active is 0")

    def _small(self) -> Scan:
        """A scan of 64 x 64, once."""
        path = self.folder / "small.h5"
        if not path.exists():
            small = simulate_scan(64, 4, 1, 0)
            with ismrmrd.Dataset(str(path), "dataset", create_if_needed=True) as file:
                file.write_xml_header(header_xml(small.header))
                for batch in small.batches:
                    for header, samples in zip(batch.headers, batch.samples, strict=True):
                        acquisition = ismrmrd.Acquisition(header.tobytes())
                        acquisition.data[:] = samples
                        file.append_acquisition(acquisition)
        return read_scan(path)


def _short(config: str) -> str:
    return "plain" if config.startswith("<") else config


def _root_sum_of_squares(coils: np.ndarray, width: int) -> np.ndarray:
    values = coils["real"] + 1j * coils["imag"] if coils.dtype.names else coils
    start = (values.shape[-1] - width) // 2
    return np.sqrt((np.abs(values[..., start : start + width]) ** 2).sum(0)).astype(np.float64)


def _air(scan: Scan, place: int, shape: tuple[int, int]) -> np.ndarray:
    """Where a slice has nothing: from its calibration lines alone, which hold no fold-over, by numpy."""
    lines = [
        a for a in scan.acquisitions if a.idx.slice == place and (a.is_flag_set(CALIBRATION) or a.is_flag_set(BOTH))
    ]
    steps = np.array([a.idx.kspace_encode_step_1 for a in lines])
    samples = np.stack([a.data for a in lines])
    rows, columns = shape
    kspace = np.zeros((samples.shape[1], rows, samples.shape[2]), np.complex64)
    window = np.hanning(len(lines) + 2)[1:-1]
    order = np.argsort(steps)
    kspace[:, rows // 2 - len(lines) // 2 + np.arange(len(lines))] = (samples[order] * window[:, None, None]).transpose(
        1, 0, 2
    )
    middle = np.arange(samples.shape[2]) - lines[0].center_sample
    kspace *= np.hanning(2 * len(lines) + 1)[np.clip(middle + len(lines), 0, 2 * len(lines))]
    pad = np.zeros((*kspace.shape[:2], scan.header().encoding[0].encodedSpace.matrixSize.x), np.complex64)
    start = pad.shape[2] // 2 - lines[0].center_sample
    pad[:, :, start : start + kspace.shape[2]] = kspace
    image = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(pad, axes=(1, 2))), axes=(1, 2))
    first = (image.shape[2] - columns) // 2
    power = np.sqrt((np.abs(image[:, :, first : first + columns]) ** 2).sum(0))
    return power < 0.05 * power.max()


def _outside(image: np.ndarray, air: np.ndarray) -> float:
    """Root mean square in air over that elsewhere."""
    return float(np.sqrt((image[air] ** 2).mean() / (image[~air] ** 2).mean()))


def save_bottles(image: np.ndarray, path: Path) -> None:
    """The picture of the documentation."""
    write_png(path, image)
