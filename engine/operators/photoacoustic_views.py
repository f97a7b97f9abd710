"""A full ring of detectors of which some were there: the image that the whole ring would show, and the signals of it.

Delay-and-sum u of a dense ring blurs a heated object by a kernel whose spectrum is 1/|k|. So signals whose delay-and-sum is u are
F S u: the circular sums S of u, through a ramp F in time. It holds whatever the band of the transducer, since u went through it
too, and needs no more than the geometry. Signals have shape (..., element, samples), images (..., y, x).
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from .linear import LinearOperator
from .photoacoustic import TimeMatrix, TimeOfFlight
from .photoacoustic_geometry import DetectorArray, PixelGrid, TimeAxis

__all__ = [
    "BeamformedOperator",
    "completed",
    "full_ring",
    "interpolation",
    "ramp_matrix",
    "ring_density",
    "views_needed",
]

_GREATEST_GAP = np.pi / 5
"""Views further apart than this (radians) are not interpolated between: that is limited view, not sparse view."""
_ROLL_OFF = (0.38, 0.48)
"""Cycles per sample between which the ramp falls to 0: signals are band-passed below, and above it would raise noise only."""


class BeamformedOperator(LinearOperator):
    """A = F S: from the image that delay-and-sum of the full ring shows to what the elements of `array` record.

    `back` is delay-and-sum of these elements, back(A u) = u for a full and dense ring. F is symmetric, so that
    back A = S^T F S / elements is, too.
    """

    def __init__(self, array: DetectorArray, grid: PixelGrid, time: TimeAxis) -> None:
        super().__init__(grid.shape, (len(array), time.samples))
        self.array, self.grid, self.time = array, grid, time
        pixel = abs(grid.x[1] - grid.x[0]) * time.per_metre
        self._sums = TimeOfFlight(array, grid, time)
        self._product = TimeMatrix(ramp_matrix(time.samples, float(pixel)), len(array)) @ self._sums
        self._alive = max(float((array.weights > 0).sum()), 1.0)

    def _forward(self, x: Tensor) -> Tensor:
        return self._product(x)

    def _backward(self, y: Tensor) -> Tensor:
        return self._product.H(y)

    def part(self, chosen: np.ndarray) -> BeamformedOperator:
        """Of some of the elements: boolean (element,), or their numbers."""
        array = self.array
        kept = DetectorArray(array.positions[chosen], array.orientations[chosen], array.weights[chosen])
        return BeamformedOperator(kept, self.grid, self.time)

    def back(self, signals: Tensor) -> Tensor:
        """Delay-and-sum, the mean over the elements."""
        return self._sums.H(signals) / self._alive

    def back_transposed(self, image: Tensor) -> Tensor:
        """The adjoint of `back`."""
        return self._sums(image) / self._alive


@functools.lru_cache(maxsize=16)
def ramp_matrix(samples: int, pixel: float) -> Tensor:
    """F: float32 (samples, samples), symmetric; multiplies the frequency of nu cycles per sample by pi |nu| pixel^2 / sinc^4(nu).

    pixel: side of a pixel in samples of sound. The mean over all directions of delta(n r) is 1 / (pi |r|), with spectrum 2 / |k|;
    the two linear interpolations, of S and of delay-and-sum, take away sinc^2 each. It ends below the greatest frequency, see
    `_ROLL_OFF`.
    """
    frequencies = np.fft.rfftfreq(4 * samples)
    above = np.clip((frequencies - _ROLL_OFF[0]) / (_ROLL_OFF[1] - _ROLL_OFF[0]), 0, 1)
    response = np.pi * frequencies * pixel**2 / np.sinc(frequencies) ** 4 * np.cos(above * np.pi / 2) ** 2
    taps = np.fft.irfft(response, 4 * samples)
    lag = np.arange(samples)
    return torch.from_numpy(taps[np.abs(lag[:, None] - lag)].astype(np.float32))


def views_needed(grid: PixelGrid, time: TimeAxis) -> float:
    """Views of a full ring above which a band up to 0.35 of the sampling rate shows no streaks: 2 k r, r at the edge."""
    reach = max(float(np.ptp(grid.x)), float(np.ptp(grid.y))) / 2
    return 2 * 2 * np.pi * 0.35 * time.per_metre * reach


def completed(signals: Tensor, measured: Tensor, *, cubic: bool = False) -> Tensor:
    """Rows of a full ring of which some were measured, the others by interpolation over the angle between neighbours.

    signals: (..., element, samples); measured: boolean (element,), the ring closes. Rows between neighbours further apart than
    36 degrees are 0.
    """
    return interpolation(measured, cubic=cubic).to(signals) @ signals[..., measured, :]


def interpolation(measured: Tensor, *, cubic: bool = False) -> Tensor:
    """The matrix of `completed`: float32 (element, measured element), not to be written to."""
    return _interpolation(measured.numpy().tobytes(), cubic)


@functools.lru_cache(maxsize=16)
def _interpolation(measured: bytes, cubic: bool) -> Tensor:  # noqa: FBT001
    count, known = len(measured), np.flatnonzero(np.frombuffer(measured, np.bool_))
    if not len(known):
        return torch.zeros(count, 0)
    table = _cubic_weights(count, known) if cubic else _linear_weights(count, known)
    return torch.from_numpy(table.astype(np.float32))


def _gaps(count: int, known: np.ndarray) -> np.ndarray:
    """Number of steps from each known row to the next, round the ring."""
    return np.diff(known, append=known[0] + count)


def _linear_weights(count: int, known: np.ndarray) -> np.ndarray:
    table = np.zeros((count, len(known)))
    for place, (row, gap) in enumerate(zip(known, _gaps(count, known), strict=True)):
        table[row, place] = 1
        if gap * 2 * np.pi / count > _GREATEST_GAP:
            continue
        for step in range(1, gap):
            table[(row + step) % count, place] += 1 - step / gap
            table[(row + step) % count, (place + 1) % len(known)] += step / gap
    return table


def _cubic_weights(count: int, known: np.ndarray) -> np.ndarray:
    """Of a periodic cubic spline through the known rows, as far as linear interpolation would go."""
    from scipy.interpolate import CubicSpline

    places = np.append(known, known[0] + count)
    values = np.vstack([np.eye(len(known)), np.eye(len(known))[:1]])
    spline = CubicSpline(places, values, bc_type="periodic")
    table: np.ndarray = spline(known[0] + (np.arange(count) - known[0]) % count)
    reached = np.abs(_linear_weights(count, known)).sum(1, keepdims=True) > 0
    return np.where(reached, table, 0)


def ring_density(measured: Tensor) -> int:
    """Elements of a full ring as dense as the measured rows are: boolean (element,)."""
    known = np.flatnonzero(measured.numpy())
    return round(len(measured) / float(np.median(_gaps(len(measured), known)))) if len(known) else len(measured)


def full_ring(positions: np.ndarray, finest: int) -> tuple[np.ndarray, np.ndarray]:
    """Elements (row, 3) of a full ring that holds all `positions` (element, 3), and the row of each element.

    The ring is as dense as the elements or a whole number of times denser, with `finest` rows at least. Raises ConfigError where
    the elements do not lie evenly on one circle in a plane of constant x3.
    """
    middle, radius = _circle(positions)
    offsets = positions[:, :2] - middle
    angles = np.arctan2(offsets[:, 1], offsets[:, 0])
    away = max(float(np.abs(np.hypot(*offsets.T) - radius).max()), float(np.ptp(positions[:, 2])))
    ordered = np.sort(angles)
    gaps = np.diff(ordered, append=ordered[0] + 2 * np.pi)
    spacing = float(np.median(gaps)) if len(gaps) > 1 else 2 * np.pi
    around = round(2 * np.pi / max(spacing, 1e-6))
    count = around * max(1, math.ceil(finest / around))
    rows = (angles - angles[0]) / (2 * np.pi) * count
    stray = float(np.abs(rows - np.round(rows)).max()) * around / count
    if away > 0.02 * radius or stray > 0.25 or len(np.unique(np.round(rows) % count)) < len(rows):
        raise ConfigError(
            "systems with a learned prior are for elements that lie evenly on a circle, or on an arc of one; these do not: "
            "use pat/das or pat/ubp"
        )
    turns = angles[0] + 2 * np.pi * np.arange(count) / count
    ring = np.column_stack([middle + radius * np.column_stack([np.cos(turns), np.sin(turns)]), np.zeros(count)])
    ring[:, 2] = positions[:, 2].mean()
    return ring, np.round(rows).astype(np.int64) % count


def _circle(positions: np.ndarray) -> tuple[np.ndarray, float]:
    """Middle (x, y) and radius of the least-squares circle (Kasa 1976)."""
    x, y = positions[:, 0], positions[:, 1]
    start = np.array([x.mean(), y.mean()])
    size = float(np.hypot(x - start[0], y - start[1]).max()) or 1.0
    u, v = (x - start[0]) / size, (y - start[1]) / size
    found = np.linalg.lstsq(np.stack([u, v, np.ones_like(u)], axis=1), u**2 + v**2, rcond=1e-9)[0]
    center = found[:2] / 2
    return start + center * size, float(np.sqrt(max(found[2] + center @ center, 0.0))) * size
