"""What detectors record of circular or spherical integrals of an initial pressure: the wave equation as a matrix in time."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .photoacoustic_geometry import TimeAxis

__all__ = ["gaussian_response", "time_matrix"]

Floats = NDArray[np.float64]
_LOBES = 4


def gaussian_response(center_hz: float, bandwidth_percent: float, sampling_rate_hz: float) -> Floats:
    """Impulse response of a transducer whose frequency response is a Gaussian: odd in length, its middle at time 0.

    bandwidth_percent: full width at half of the amplitude over the center, as k-Wave's `gaussianFilter` has it. Zero phase.
    Raises ValueError for numbers that are not positive.
    """
    for name, value in (("center_hz", center_hz), ("bandwidth_percent", bandwidth_percent)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}, a positive number is needed")
    spread = bandwidth_percent / 100 * center_hz / (2 * math.sqrt(2 * math.log(2)))
    half = math.ceil(6 * sampling_rate_hz / (2 * math.pi * spread))
    length = 4 * half + 1
    frequencies = np.fft.rfftfreq(length, 1 / sampling_rate_hz)
    response = np.fft.irfft(np.exp(-((frequencies - center_hz) ** 2) / (2 * spread**2)), length)
    return np.concatenate([response[-half:], response[: half + 1]])


def time_matrix(
    time: TimeAxis, pixel_m: float, cell: float, *, dimensions: int, response: Floats | None = None
) -> Floats:
    """K of A = (I x K) S: from what `TimeOfFlight` collects of an initial pressure to the pressure at the elements.

    K = G D M H cell / (c dt), all (samples, samples): H gives the pixels their footprint, of `pixel_m`, by a Lanczos kernel
    of 4 lobes; M is the free-space solution of the wave equation, in the plane
    1/(2 pi c) int g(R) / sqrt(c^2 t^2 - R^2) dR, g linear between samples, and in space g / (4 pi c^2 t); D is the
    derivative by time, between half samples; G the transducer's `response`, odd in length, its middle at time 0.
    cell: area of a pixel in m^2, or volume of a voxel in m^3; with the area of a pixel in space, the image is a sheet 1 m
    thick. dimensions: 2 or 3. Returns float64. Raises ValueError.
    """
    if dimensions not in (2, 3):
        raise ValueError(f"dimensions is {dimensions}, allowed are 2 and 3")
    if not 0 < pixel_m < math.inf or not 0 < cell < math.inf:
        raise ValueError(f"pixel_m is {pixel_m}, cell is {cell}; positive lengths and areas in metres are needed")
    integrals = _plane(time, pixel_m) if dimensions == 2 else _space(time, pixel_m)
    step = 1 / time.sampling_rate_hz
    pressure = np.diff(integrals, axis=0, prepend=0) * (cell / (time.speed_of_sound * step**2))
    return pressure if response is None else _toeplitz(_odd(response), time.samples) @ pressure


def _plane(time: TimeAxis, pixel_m: float) -> Floats:
    """M H: rows at half samples."""
    nodes = np.arange(time.samples) + time.delay
    until = np.maximum(nodes[:, None] + 0.5, 0)
    low, high = (np.minimum(np.maximum(edge, 0), until) for edge in (nodes[None], nodes[None] + 1))
    safe = np.where(until > 0, until, 1)
    angle = np.arcsin(high / safe) - np.arcsin(low / safe)
    root = np.sqrt(until**2 - low**2) - np.sqrt(until**2 - high**2)
    weights = angle * (nodes + 1) - root
    weights[:, 1:] += (root - angle * nodes)[:, :-1]
    integrals: Floats = weights @ _footprint(time, pixel_m, 0.0) / (2 * math.pi * time.speed_of_sound)
    return integrals


def _space(time: TimeAxis, pixel_m: float) -> Floats:
    """The same in space; the footprint is read at half samples, so that no further interpolation is needed."""
    clock = (np.arange(time.samples) + 0.5 + time.delay) / time.sampling_rate_hz
    inverse = np.divide(1, clock, out=np.zeros_like(clock), where=clock > 0)
    integrals: Floats = _footprint(time, pixel_m, 0.5) * inverse[:, None] / (4 * math.pi * time.speed_of_sound**2)
    return integrals


def _footprint(time: TimeAxis, pixel_m: float, shift: float) -> Floats:
    """A pixel spans several samples: sinc(t / width) sinc(t / 4 width), with sum 1, `shift` samples later."""
    width = max(pixel_m * time.per_metre, 1.0)
    reach = math.ceil(_LOBES * width)
    lag = np.arange(-reach, reach + 1) + shift
    taps = np.where(np.abs(lag) < _LOBES * width, np.sinc(lag / width) * np.sinc(lag / (_LOBES * width)), 0)
    return _toeplitz(taps / taps.sum(), time.samples)


def _toeplitz(taps: Floats, size: int) -> Floats:
    """Convolution with taps whose middle is at lag 0."""
    half = len(taps) // 2
    lag = np.arange(size)[:, None] - np.arange(size)[None] + half
    return np.where((lag >= 0) & (lag < len(taps)), taps[np.clip(lag, 0, len(taps) - 1)], 0)


def _odd(response: Floats) -> Floats:
    taps = np.asarray(response, np.float64)
    if taps.ndim != 1 or len(taps) % 2 == 0 or not np.isfinite(taps).all():
        raise ValueError(
            f"response has shape {taps.shape}; an odd number of finite values is needed, time 0 in the middle"
        )
    return taps
