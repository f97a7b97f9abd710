"""Scans of a known object: header and readouts as a scanner would send them, and the image that should come out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np

from ..headers import ACQUISITION_HEADER, AcquisitionFlag
from ..messages import AcquisitionBatch, EncodingLimit, EncodingSpace, ScanHeader
from .coils import TrigonometricMaps, coil_kspace, coil_maps, object_phase
from .phantom import Phantom, shepp_logan
from .sampling import cartesian_lines, golden_spokes, spiral_arms

__all__ = ["SimulatedScan", "simulate_scan"]

SimulatedTrajectory = Literal["cartesian", "radial", "spiral"]
LineOrder = Literal["linear", "calibration_first"]

_FOV_MM, _THICKNESS_MM, _SLICE_DISTANCE_MM = 240.0, 5.0, 6.0
_READOUT_TICKS = 2
"""Time between readouts in ticks of 2.5 ms."""
_START_TICKS = 14_400_000
"""Ten o'clock in ticks of 2.5 ms since midnight."""
_SAMPLING_US = 2560.0
"""How long a readout samples."""
_OBJECT_PHASE = 2.0
_MOTION_PERIOD = 20
"""Repetitions until the object is back where it was."""
_SPIRAL_ARMS = 8
"""Pixels per arm of a full spiral: a matrix of 256 has 32."""


@dataclasses.dataclass(frozen=True)
class SimulatedScan:
    """A scan and its truth.

    header: as parsed; `xml` is empty, since the engine writes no file format. batches: first the noise readouts where
    there are any, then one batch per repetition and slice, in order of time. reference: complex64, shape
    (repetitions, slices, y, x), max|x| = 1: the fully sampled, noiseless scan, combined with
        `maps` scaled to a root sum of squares of 1; its magnitude is that of the root sum of squares of the coil
        images.
    maps: complex64, shape (coils, y, x): the sensitivities, not scaled.
    noise_covariance: complex128, shape (coils, coils), E n n^H of one k-space sample.

    K-space is scaled so that the unitary centered inverse transform over the reconstructed matrix gives coil images
    whose combination is `reference`.
    """

    header: ScanHeader
    batches: tuple[AcquisitionBatch, ...]
    reference: np.ndarray
    maps: np.ndarray
    noise_covariance: np.ndarray

    def __len__(self) -> int:
        return sum(len(batch) for batch in self.batches)

    def readouts(self, size: int = 1) -> Iterator[AcquisitionBatch]:
        """The same readouts in batches of at most `size`; arrays are views."""
        for batch in self.batches:
            for start in range(0, len(batch), size):
                part = slice(start, start + size)
                trajectory = None if batch.trajectory is None else batch.trajectory[part]
                yield AcquisitionBatch(headers=batch.headers[part], samples=batch.samples[part], trajectory=trajectory)


def simulate_scan(
    matrix: int = 256,
    coils: int = 8,
    acceleration: int = 4,
    calibration_lines: int = 24,
    *,
    repetitions: int = 1,
    slices: int = 1,
    oversampling: int = 2,
    noise: float = 0.005,
    noise_readouts: int = 1,
    partial_fourier: float = 1.0,
    trajectory: SimulatedTrajectory = "cartesian",
    order: LineOrder = "linear",
    motion_degrees: float = 0.0,
    seed: int = 0,
) -> SimulatedScan:
    """A scan of the Shepp-Logan head with a smooth phase, by wire loops round it, from k-space in closed form.

    matrix: pixels per side, even. acceleration: every n-th line (Cartesian), or 1/n of the spokes or arms that the
    sampling theorem asks for. calibration_lines: full block in the middle, embedded; Cartesian scans and spirals
    with acceleration above 1 only. oversampling: along the readout, 1 or 2. noise: standard deviation of a complex k-space
    sample, so of a pixel of an unaccelerated coil image, against max|reference| = 1; differs and correlates between
    coils. noise_readouts: readouts without signal before the scan. partial_fourier: share of lines, 0.5 < p <= 1;
    lines are numbered from the first that is acquired, as scanners do. order: of the lines within a frame.
    motion_degrees: the head turns to and fro by so much, once in 20 repetitions, standing still within each. Raises
    ValueError that names the setting.
    """
    plan = _Plan(
        matrix, coils, acceleration, calibration_lines, repetitions, slices, oversampling, noise, noise_readouts,
        partial_fourier, trajectory, order, motion_degrees, seed,
    )  # fmt: skip
    plan.check()
    return _simulate(plan)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The settings of `simulate_scan`."""

    matrix: int
    coils: int
    acceleration: int
    calibration_lines: int
    repetitions: int
    slices: int
    oversampling: int
    noise: float
    noise_readouts: int
    partial_fourier: float
    trajectory: SimulatedTrajectory
    order: LineOrder
    motion_degrees: float
    seed: int

    def check(self) -> None:
        _within("matrix", self.matrix, 8, 4096)
        if self.matrix % 2:
            raise ValueError(f"matrix is {self.matrix}, an even number is needed")
        _within("coils", self.coils, 1, 1024)
        _within("acceleration", self.acceleration, 1, self.matrix // 2)
        _within("calibration_lines", self.calibration_lines, 0, self.matrix)
        for name in ("repetitions", "slices"):
            _within(name, getattr(self, name), 1, 65535)
        _within("oversampling", self.oversampling, 1, 2)
        _within("noise", self.noise, 0, math.inf)
        _within("noise_readouts", self.noise_readouts, 0, 65535)
        self._check_words()

    def _check_words(self) -> None:
        if self.trajectory not in ("cartesian", "radial", "spiral"):
            raise ValueError(f"trajectory is {self.trajectory!r}, allowed are 'cartesian', 'radial', 'spiral'")
        if self.order not in ("linear", "calibration_first"):
            raise ValueError(f"order is {self.order!r}, allowed are 'linear', 'calibration_first'")
        if not 0.5 < self.partial_fourier <= 1.0:
            raise ValueError(f"partial_fourier is {self.partial_fourier}, allowed is above 0.5 and up to 1")
        if self.partial_fourier < 1.0 and self.trajectory != "cartesian":
            raise ValueError(f"partial_fourier is {self.partial_fourier}, a {self.trajectory} scan has 1")


@dataclasses.dataclass(frozen=True)
class _Frame:
    """Readouts of one slice and repetition: where they sample and how their headers say so.

    kx, ky: shape (readouts, samples), cycles per field of view.
    """

    kx: np.ndarray
    ky: np.ndarray
    step: np.ndarray
    flags: np.ndarray
    center_sample: int
    limit: EncodingLimit
    trajectory: np.ndarray | None = None


def _simulate(plan: _Plan) -> SimulatedScan:
    rng = np.random.default_rng(plan.seed)
    maps, phase = coil_maps(plan.coils), object_phase(_OBJECT_PHASE)
    seen = maps.times(phase)
    reference, scale = _references(plan, maps, seen)
    covariance, mixing = _coil_noise(plan, rng)
    batches, count = [], 0
    for headers, frame, phantom in _readouts(plan):
        samples = np.zeros((plan.coils, *frame.kx.shape), np.complex128)
        if phantom is not None:
            samples = coil_kspace(phantom, seen, frame.kx, frame.ky) * (scale * plan.matrix)
        samples = (samples + _noise(mixing, frame.kx.shape, rng)).astype(np.complex64)
        _number(headers, count)
        count += len(headers)
        batches.append(
            AcquisitionBatch(
                headers=headers, samples=np.ascontiguousarray(samples.swapaxes(0, 1)), trajectory=frame.trajectory
            )
        )
    maps_image = maps.image((plan.matrix, plan.matrix)).astype(np.complex64)
    return SimulatedScan(_header(plan), tuple(batches), reference, maps_image, covariance)


def _readouts(plan: _Plan) -> Iterator[tuple[np.ndarray, _Frame, Phantom | None]]:
    """Headers, sampling and object of each batch; no object for the noise readouts."""
    if plan.noise_readouts:
        frame = _noise_frame(plan)
        yield _headers(plan, frame), frame, None
    for repetition in range(plan.repetitions):
        for place in range(plan.slices):
            frame = _frame(plan, repetition)
            headers = _headers(plan, frame)
            headers["idx"]["repetition"], headers["idx"]["slice"] = repetition, place
            headers["position"][:, 2] = _SLICE_DISTANCE_MM * _slice_height(plan, place)
            _mark_ends(headers["flags"], plan, repetition, place)
            yield headers, frame, _object(plan, repetition, place)


def _object(plan: _Plan, repetition: int, place: int) -> Phantom:
    """The head in this repetition; slices off the center cut it smaller, as an ellipsoid."""
    turn = math.radians(plan.motion_degrees) * math.sin(2 * math.pi * repetition / _MOTION_PERIOD)
    height = _slice_height(plan, place) * _SLICE_DISTANCE_MM / (_FOV_MM / 2)
    return shepp_logan().moved(rotation=turn, scale=math.sqrt(max(1 - height**2, 0.04)))


def _slice_height(plan: _Plan, place: int) -> float:
    return place - (plan.slices - 1) / 2


def _references(plan: _Plan, maps: TrigonometricMaps, seen: TrigonometricMaps) -> tuple[np.ndarray, float]:
    """The true images, and the factor on k-space that brings their maximum to 1."""
    moving = plan.repetitions if plan.motion_degrees else 1
    sensitivity = maps.image((plan.matrix, plan.matrix))
    sensitivity /= np.sqrt((np.abs(sensitivity) ** 2).sum(axis=0))
    steps = np.arange(plan.matrix) - float(plan.matrix // 2)
    kx, ky = np.meshgrid(steps, steps)
    images = np.empty((moving, plan.slices, plan.matrix, plan.matrix), np.complex128)
    for repetition, place in np.ndindex(moving, plan.slices):
        kspace = coil_kspace(_object(plan, repetition, place), seen, kx, ky)
        images[repetition, place] = (sensitivity.conj() * _image(kspace)).sum(axis=0)
    scale = 1 / np.abs(images).max()
    reference = (scale * images).astype(np.complex64)
    return np.broadcast_to(reference, (plan.repetitions, *reference.shape[1:])), float(scale)


def _image(kspace: np.ndarray) -> np.ndarray:
    """Sum over integer frequencies, the center at index N // 2 on both sides."""
    axes = (-2, -1)
    image = np.fft.ifft2(np.fft.ifftshift(kspace, axes=axes), axes=axes, norm="forward")
    return np.fft.fftshift(image, axes=axes)


def _coil_noise(plan: _Plan, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Covariance with mean variance noise^2, and the matrix that gives white noise this covariance."""
    shape = (plan.coils, plan.coils)
    stray = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    mixing = np.eye(plan.coils) + 0.3 / math.sqrt(plan.coils) * stray
    mixing *= plan.noise / math.sqrt((np.abs(mixing) ** 2).sum() / plan.coils)
    return mixing @ mixing.conj().T, mixing


def _noise(mixing: np.ndarray, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    white = rng.standard_normal((len(mixing), *shape, 2), np.float32).view(np.complex64)[..., 0]
    return np.tensordot(mixing.astype(np.complex64) / math.sqrt(2), white, axes=1)


def _frame(plan: _Plan, repetition: int) -> _Frame:
    if plan.trajectory == "cartesian":
        return _cartesian_frame(plan)
    if plan.trajectory == "radial":
        spokes = math.ceil(math.pi / 2 * plan.matrix / plan.acceleration)
        samples = plan.matrix * plan.oversampling
        return _free_frame(plan, golden_spokes(repetition * spokes, spokes, samples), samples // 2)
    full = max(plan.matrix // _SPIRAL_ARMS, 1)
    arms = math.ceil(full / plan.acceleration)
    block = plan.calibration_lines if plan.acceleration > 1 else 0
    spiral = spiral_arms(repetition * arms, arms, full, plan.matrix, plan.oversampling, calibration=block)
    return _free_frame(plan, spiral, 0)


def _cartesian_frame(plan: _Plan) -> _Frame:
    lines = cartesian_lines(
        plan.matrix,
        plan.acceleration,
        plan.calibration_lines,
        plan.partial_fourier,
        calibration_first=plan.order == "calibration_first",
    )
    samples = plan.matrix * plan.oversampling
    ky, kx = np.meshgrid(
        lines.line - float(plan.matrix // 2), (np.arange(samples) - samples // 2) / plan.oversampling, indexing="ij"
    )
    both, only = AcquisitionFlag.IS_PARALLEL_CALIBRATION_AND_IMAGING, AcquisitionFlag.IS_PARALLEL_CALIBRATION
    flags = np.where(lines.calibration, np.where(lines.imaging, both.bit, only.bit), 0).astype(np.uint64)
    limit = EncodingLimit(0, plan.matrix - 1 - lines.first, plan.matrix // 2 - lines.first)
    return _Frame(kx, ky, lines.line - lines.first, flags, samples // 2, limit)


def _free_frame(plan: _Plan, trajectory: np.ndarray, center_sample: int) -> _Frame:
    k = trajectory.astype(np.float64) * plan.matrix
    count = len(k)
    limit = EncodingLimit(0, count - 1, count // 2)
    flags = np.zeros(count, np.uint64)
    return _Frame(k[..., 0], k[..., 1], np.arange(count), flags, center_sample, limit, trajectory)


def _noise_frame(plan: _Plan) -> _Frame:
    nowhere = np.zeros((plan.noise_readouts, plan.matrix * plan.oversampling))
    flags = np.full(plan.noise_readouts, AcquisitionFlag.IS_NOISE_MEASUREMENT.bit, np.uint64)
    return _Frame(nowhere, nowhere, np.zeros(plan.noise_readouts, np.intp), flags, 0, EncodingLimit())


def _headers(plan: _Plan, frame: _Frame) -> np.ndarray:
    headers = np.zeros(len(frame.kx), ACQUISITION_HEADER)
    headers["version"] = 1
    headers["flags"] = frame.flags
    headers["measurement_uid"] = plan.seed & 0xFFFFFFFF
    headers["number_of_samples"] = frame.kx.shape[1]
    headers["available_channels"] = headers["active_channels"] = plan.coils
    headers["channel_mask"] = _channel_mask(plan.coils)
    headers["center_sample"] = frame.center_sample
    headers["trajectory_dimensions"] = 0 if frame.trajectory is None else frame.trajectory.shape[-1]
    headers["sample_time_us"] = _SAMPLING_US / (plan.matrix * plan.oversampling)
    headers["read_dir"], headers["phase_dir"], headers["slice_dir"] = np.eye(3)
    headers["idx"]["kspace_encode_step_1"] = frame.step
    headers["idx"]["user"][:, 5] = frame.limit.center
    return headers


def _channel_mask(coils: int) -> list[int]:
    """Bits 0 to coils - 1 in sixteen words of 64."""
    mask = (1 << coils) - 1
    return [(mask >> (64 * word)) & (1 << 64) - 1 for word in range(16)]


def _number(headers: np.ndarray, before: int) -> None:
    """Counter and time of each readout, `before` readouts having gone before."""
    counter = np.arange(before, before + len(headers))
    headers["scan_counter"] = counter + 1
    headers["acquisition_time_stamp"] = _START_TICKS + _READOUT_TICKS * counter


def _mark_ends(flags: np.ndarray, plan: _Plan, repetition: int, place: int) -> None:
    """First and last readouts of a slice, a repetition and the measurement."""
    flags[0] |= _bits(AcquisitionFlag.FIRST_IN_ENCODE_STEP1, AcquisitionFlag.FIRST_IN_SLICE)
    flags[-1] |= _bits(AcquisitionFlag.LAST_IN_ENCODE_STEP1, AcquisitionFlag.LAST_IN_SLICE)
    if place == 0:
        flags[0] |= _bits(AcquisitionFlag.FIRST_IN_REPETITION)
    if place == plan.slices - 1:
        flags[-1] |= _bits(AcquisitionFlag.LAST_IN_REPETITION)
        if repetition == plan.repetitions - 1:
            flags[-1] |= _bits(AcquisitionFlag.LAST_IN_MEASUREMENT)


def _bits(*flags: AcquisitionFlag) -> np.uint64:
    return np.uint64(sum(flag.bit for flag in flags))


def _header(plan: _Plan) -> ScanHeader:
    return ScanHeader(
        encodings=(_encoding(plan),),
        channels=plan.coils,
        relative_receiver_noise_bandwidth=1.0,
        field_strength_tesla=3.0,
        measurement_id=f"simulated-{plan.seed}",
    )


def _encoding(plan: _Plan) -> EncodingSpace:
    cartesian = plan.trajectory == "cartesian"
    wide = plan.oversampling if cartesian else 1
    accelerated = plan.acceleration > 1 and cartesian
    return EncodingSpace(
        encoded_matrix=(plan.matrix * wide, plan.matrix, 1),
        encoded_fov_mm=(_FOV_MM * wide, _FOV_MM, _THICKNESS_MM),
        recon_matrix=(plan.matrix, plan.matrix, 1),
        recon_fov_mm=(_FOV_MM, _FOV_MM, _THICKNESS_MM),
        trajectory=plan.trajectory,
        limits={
            "kspace_encode_step_1": _frame(plan, 0).limit,
            "slice": EncodingLimit(0, plan.slices - 1, 0),
            "repetition": EncodingLimit(0, plan.repetitions - 1, 0),
        },
        acceleration=(plan.acceleration if accelerated else 1, 1),
        calibration="embedded" if accelerated and plan.calibration_lines else "none",
        trajectory_dimensions=None if cartesian else 2,
    )


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, allowed is {low} to {high}")
