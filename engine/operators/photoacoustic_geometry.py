"""Where detector elements and pixels of a photoacoustic scan lie, in metres, and the same in samples of sound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ...kernels import photoacoustic as kernels

__all__ = ["WEIGHTING", "DetectorArray", "PixelGrid", "TimeAxis", "ring_positions"]

Floats = NDArray[np.float64]
WEIGHTING = {2: kernels.PLANE, 3: kernels.SPACE}
"""Weights of universal back-projection by the number of dimensions."""


@dataclass(frozen=True, eq=False)
class PixelGrid:
    """Centers of the pixels along each axis, in metres. With one z, images are (y, x); else (z, y, x)."""

    x: Floats
    y: Floats
    z: Floats

    @classmethod
    def over(cls, pixels: Sequence[int], field_of_view_m: Sequence[float], *, z_m: float = 0.0) -> PixelGrid:
        """A regular grid. pixels: (ny, nx) or (nz, ny, nx). field_of_view_m: x from, x to, y from, y to (, z from, z to).

        The field of view ends at the edges of the outer pixels. z_m: where a plane lies. Raises ValueError.
        """
        edges = [float(edge) for edge in field_of_view_m]
        if len(pixels) not in (2, 3) or len(edges) != 2 * len(pixels):
            raise ValueError(
                f"pixels is {tuple(pixels)} and field_of_view_m {tuple(edges)}; needed are 2 numbers and 4, or 3 and 6"
            )
        axes = [_centers("xyz"[i], n, edges[2 * i], edges[2 * i + 1]) for i, n in enumerate(reversed(pixels))]
        return cls(axes[0], axes[1], axes[2] if len(axes) == 3 else np.array([float(z_m)]))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image."""
        plane = (len(self.y), len(self.x))
        return plane if len(self.z) == 1 else (len(self.z), *plane)

    @property
    def center(self) -> Floats:
        """x, y, z of the middle of the field of view, in metres."""
        return np.array([(axis[0] + axis[-1]) / 2 for axis in (self.x, self.y, self.z)])

    @property
    def cell(self) -> float:
        """Area of a pixel in m^2, or volume of a voxel in m^3. An axis of one point counts 1."""
        sizes = [abs(axis[1] - axis[0]) for axis in (self.x, self.y, self.z) if len(axis) > 1]
        return float(np.prod(sizes))


@dataclass(frozen=True)
class TimeAxis:
    """When a signal was sampled, and how fast sound was. delay: time of the first sample, in samples (system delay t0).

    Raises ValueError for what no scanner has.
    """

    sampling_rate_hz: float
    samples: int
    speed_of_sound: float = 1500.0
    delay: float = 0.0

    def __post_init__(self) -> None:
        for name, unit in (("sampling_rate_hz", "Hz"), ("speed_of_sound", "m/s")):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}, it must be a positive number of {unit}; see the scan's header")
        if not np.isfinite(self.delay):
            raise ValueError(f"delay is {self.delay}, it must be a finite number of samples")
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}, at least 1 is needed")

    @property
    def per_metre(self) -> float:
        """Samples that sound needs for a metre."""
        return self.sampling_rate_hz / self.speed_of_sound


@dataclass(frozen=True, eq=False)
class DetectorArray:
    """Elements of a detector array. positions, orientations: (element, 3), metres and unit vectors into the object.

    weights: (element,), what each counts for: 1, its length of arc (m) or its area (m^2); 0 for a dead element.
    """

    positions: Floats
    orientations: Floats
    weights: Floats

    @classmethod
    def at(
        cls,
        positions_m: ArrayLike,
        orientations: ArrayLike | None = None,
        *,
        weights: ArrayLike | None = None,
        dead: Sequence[int] = (),
        facing_m: ArrayLike = (0.0, 0.0, 0.0),
    ) -> DetectorArray:
        """Elements at positions (element, 3). orientations: by default towards `facing_m`; of any length but 0.

        weights: by default 1. dead: numbers of elements whose signals must not be used. Raises ValueError that names the
        first element that is wrong.
        """
        positions = _rows("positions_m", positions_m, None)
        towards = np.asarray(facing_m, np.float64) - positions
        given = towards if orientations is None else _rows("orientations", orientations, len(positions))
        lengths = np.linalg.norm(given, axis=1, keepdims=True)
        if orientations is not None and not lengths.all():
            raise ValueError(
                f"orientations[{int(np.argmin(lengths))}] is 0 long; a direction is needed, or None for all"
            )
        normals = np.divide(given, lengths, out=np.zeros_like(given), where=lengths > 0)
        return cls(positions, normals, _weights(weights, len(positions), dead))

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def planar(self) -> bool:
        """Whether all elements have the same z, to a micrometre."""
        return bool(np.ptp(self.positions[:, 2]) < 1e-6)

    def table(self, grid: PixelGrid, time: TimeAxis, *, dimensions: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Elements (element, 7) and axes x, y, z for `kernels.photoacoustic`, float64, in samples from the grid's center.

        dimensions: 2 where weights are lengths, 3 where they are areas.
        """
        scale, center = time.per_metre, grid.center
        places = (self.positions - center) * scale
        columns = np.hstack([places, self.orientations, self.weights[:, None] * scale ** (dimensions - 1)])
        axes = ((axis - middle) * scale for axis, middle in zip((grid.x, grid.y, grid.z), center, strict=True))
        x, y, z = (torch.from_numpy(axis) for axis in axes)
        return torch.from_numpy(columns), x, y, z


def ring_positions(elements: int, radius_m: float, *, span: float = 2 * np.pi, first: float = 0.0) -> Floats:
    """Positions (element, 3), metres, of elements on a circle in the plane z = 0, counter-clockwise.

    span: angle that they cover, in radians; a full circle does not repeat the first element, an arc ends with the last.
    first: angle of element 0, from the x axis.
    """
    whole = abs(span) >= 2 * np.pi - 1e-9
    angles = first + np.linspace(0, span, elements, endpoint=not whole)
    return np.stack([radius_m * np.cos(angles), radius_m * np.sin(angles), np.zeros(elements)], axis=1)


def _centers(name: str, count: int, start: float, end: float) -> Floats:
    if count < 1:
        raise ValueError(f"pixels along {name} is {count}, at least 1 is needed")
    if not (np.isfinite(start) and np.isfinite(end)) or start == end:
        raise ValueError(f"field_of_view_m along {name} is {start} to {end}; needed: two different ends in metres")
    edges = np.linspace(start, end, count + 1)
    centers: Floats = (edges[:-1] + edges[1:]) / 2
    return centers


def _rows(name: str, values: ArrayLike, count: int | None) -> Floats:
    array = np.array(values, np.float64)
    if array.ndim != 2 or array.shape[1] != 3 or not len(array) or count not in (None, len(array)):
        needed = "element" if count is None else count
        raise ValueError(f"{name} has shape {array.shape}, needed is ({needed}, 3): x, y, z of each detector element")
    wrong = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(wrong):
        raise ValueError(
            f"{name}[{wrong[0]}] is {array[wrong[0]].tolist()}; finite numbers are needed: give the true value, "
            "and name the element as dead if its signal must not be used"
        )
    return array


def _weights(values: ArrayLike | None, count: int, dead: Sequence[int]) -> Floats:
    weights = np.ones(count) if values is None else np.array(values, np.float64)
    if weights.shape != (count,):
        raise ValueError(f"weights has shape {weights.shape}, needed is one number for each of {count} elements")
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(wrong):
        raise ValueError(f"weights[{wrong[0]}] is {weights[wrong[0]]}; finite numbers that are not negative are needed")
    for number in dead:
        if not 0 <= number < count:
            raise ValueError(f"dead names element {number}, the array has 0 to {count - 1}")
        weights[number] = 0
    return weights
