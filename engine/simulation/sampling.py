"""Where a simulated scan samples k-space: the phase-encoding lines of a Cartesian scan, radial spokes, spiral arms.

Trajectories are in cycles per pixel of the reconstructed matrix, from -0.5 to 0.5, whatever the readout oversampling.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

__all__ = ["CartesianLines", "cartesian_lines", "golden_spokes", "spiral_arms"]

_GOLDEN_ANGLE = math.pi * (math.sqrt(5) - 1) / 2
"""111.25 degrees (Winkelmann et al., IEEE TMI 26, 2007)."""


@dataclasses.dataclass(frozen=True)
class CartesianLines:
    """Phase-encoding lines of one frame in the order of acquisition.

    line: number in the full matrix, whose center is matrix // 2. first: lowest number that a partial Fourier scan
    would acquire without acceleration. imaging, calibration: what each line is good for (both for a calibration line
    on the grid).
    """

    line: np.ndarray
    first: int
    imaging: np.ndarray
    calibration: np.ndarray


def cartesian_lines(
    matrix: int, acceleration: int, calibration_lines: int, partial_fourier: float, *, calibration_first: bool
) -> CartesianLines:
    """Every `acceleration`-th line with the center among them, a full block in the middle, low lines left out.

    partial_fourier: share of the matrix that is covered, above 0.5. The center must stay covered with the whole
    block, so fewer lines are left out where the calibration block is large.
    """
    center = matrix // 2
    low, high = center - calibration_lines // 2, center - calibration_lines // 2 + calibration_lines
    first = min(matrix - math.ceil(partial_fourier * matrix), low)
    every = np.arange(first, matrix)
    imaging = (every - center) % acceleration == 0
    calibration = (every >= low) & (every < high) & (acceleration > 1)
    taken = np.flatnonzero(imaging | calibration)
    if calibration_first:
        taken = taken[np.argsort(~calibration[taken], kind="stable")]
    return CartesianLines(every[taken], first, imaging[taken], calibration[taken])


def golden_spokes(first: int, spokes: int, samples: int) -> np.ndarray:
    """Spokes through the center, each turned by the golden angle from the one before; `first` counts those before.

    Shape (spokes, samples, 2), last axis (kx, ky); sample samples // 2 is the center.
    """
    angle = _GOLDEN_ANGLE * np.arange(first, first + spokes)
    radius = (np.arange(samples) - samples // 2) / samples
    return _polar(angle[:, None], radius[None, :])


def spiral_arms(
    first: int, arms: int, full: int, matrix: int, oversampling: int, *, calibration: int = 0
) -> np.ndarray:
    """Archimedean spirals from the center, each turned by twice the golden angle from the one before.

    Arms cover the full circle, not half of it as spokes do, so the angle that divides it well is twice as large.
    `full` arms with equal angles between them would satisfy the sampling theorem; within `calibration` / 2 cycles per
    field of view from the center, `arms` do. The first sample is at the center; samples are at most 1/oversampling
    cycles per field of view apart along the arm. Shape (arms, samples, 2).
    """
    radius = np.linspace(0, matrix / 2, 64 * matrix)
    step = radius[1]
    pitch = 2 * math.pi / np.where(radius < calibration / 2, arms, full)
    turned = np.cumsum(pitch) * step - pitch[0] * step
    # an even speed all along: an even area per sample would leave a hole of several cycles around the center
    length = np.cumsum(np.hypot(1, pitch * radius)) * step
    samples = math.ceil((length[-1] - length[0]) * oversampling) + 1
    even = np.interp(np.linspace(length[0], length[-1], samples), length, radius)
    angle = 2 * _GOLDEN_ANGLE * np.arange(first, first + arms)[:, None] + np.interp(even, radius, turned)[None, :]
    return _polar(angle, even[None, :] / matrix)


def _polar(angle: np.ndarray, radius: np.ndarray) -> np.ndarray:
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1).astype(np.float32)
