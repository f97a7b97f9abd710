"""What a mask of measured lines says: fully sampled, a lattice, a calibration block, a part of k-space left out."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np

from .layout import CartesianLayout

__all__ = ["Sampling", "central_block", "lattice"]

SMALLEST_BLOCK = 8
"""Rows around the center from which coil maps can be estimated."""
REPEATS = 5
"""Lines beside the calibration block in which a spacing that no header declares must be seen."""
PARTIAL = 0.9
"""A matrix filled to less than this, from one side, is partial Fourier."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling of one frame along the encoding directions (partition, row)."""

    mask: np.ndarray
    """Lines measured, boolean (depth, height)."""
    extent: tuple[slice, slice]
    """Smallest box that holds all measured lines."""
    full: bool
    """Every line of the box was measured."""
    lattice: tuple[tuple[int, int], tuple[int, int]] | None
    """Acceleration and offset per direction, if all lines of a regular lattice within the box were measured."""
    missing: int
    """Announced lines that never came."""

    @classmethod
    def of(cls, mask: np.ndarray, layout: CartesianLayout) -> Sampling:
        """Analyze a mask of measured lines, boolean (depth, height)."""
        extent = (_range(np.asarray(mask.any(axis=1))), _range(np.asarray(mask.any(axis=0))))
        box = mask[extent]
        announced = layout.announced()
        full = bool(box.size) and bool(box.all()) and not (announced & ~mask).any()
        found = None if full else lattice(mask, extent, layout.encoding.acceleration)
        if found is not None and announced.any() and not _explains(found, mask):
            found = None  # a full scan that lost some lines
        missing = int((announced & ~mask).sum()) if announced.any() else _lattice_gaps(mask, layout)
        return cls(mask=mask, extent=extent, full=full, lattice=found, missing=missing)

    @property
    def acceleration(self) -> float:
        """Net acceleration: lines of the matrix over lines measured."""
        return float(self.mask.size / max(1, int(self.mask.sum())))

    @property
    def lattice_lines(self) -> int:
        """Lines that the lattice has in the whole matrix, 0 without a lattice."""
        if self.lattice is None:
            return 0
        (rz, oz), (ry, oy) = self.lattice
        depth, height = self.mask.shape
        return len(range(oz, depth, rz)) * len(range(oy, height, ry))

    @property
    def partial(self) -> tuple[bool, bool]:
        """Whether k-space was left out on one side, per direction (partition, row)."""
        sides = []
        for part, size in zip(self.extent, self.mask.shape, strict=True):
            before, after = size // 2 - part.start, part.stop - size // 2
            lopsided = min(before, after) < 0.8 * max(before, after)
            sides.append(0 < part.stop - part.start < PARTIAL * size and lopsided)
        return sides[0], sides[1]


def _range(present: np.ndarray) -> slice:
    where = np.flatnonzero(present)
    return slice(int(where[0]), int(where[-1]) + 1) if len(where) else slice(0, 0)


def lattice(
    mask: np.ndarray, extent: tuple[slice, slice], declared: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Regular lattice of a mask as ((acceleration, offset) of partitions, (acceleration, offset) of rows), or None.

    `declared` is the undersampling of (rows, partitions) in the header; where it says 1 the spacing is read off the mask.
    Further lines, such as calibration lines, may be there; lines of the lattice may not be missing. Of several such
    lattices, the one with most lines.
    """
    box = mask[extent]
    rz, ry = (
        step if step > 1 else _spacing(np.flatnonzero(box.any(axis=axis)))
        for axis, step in ((1, declared[1]), (0, declared[0]))
    )
    found, most = None, 0
    for first, row in itertools.product(range(min(rz, box.shape[0])), range(min(ry, box.shape[1]))):
        points = box[first::rz, row::ry]
        if points.size > most and points.all():
            found, most = ((rz, (extent[0].start + first) % rz), (ry, (extent[1].start + row) % ry)), points.size
    return found


def _spacing(lines: np.ndarray) -> int:
    """Commonest distance, the widest of several, above one if there are any: calibration lines lie closer."""
    steps = np.diff(lines)
    wide = steps[steps > 1]
    if not len(wide):
        return 1
    values, counts = np.unique(wide, return_counts=True)
    return int(values[counts == counts.max()][-1])


def _explains(found: tuple[tuple[int, int], tuple[int, int]], mask: np.ndarray) -> bool:
    """Whether a lattice that was read off a mask is the plan of the scan, and not what lost lines happened to leave.

    Then the other lines are one block, as calibration lines are, and the lattice goes on beside it.
    """
    (rz, oz), (ry, oy) = found
    points = np.zeros_like(mask)
    points[oz::rz, oy::ry] = True
    others = mask & ~points
    if not others.any():
        return True
    block = _range(np.asarray(others.any(axis=1))), _range(np.asarray(others.any(axis=0)))
    beside = int((points & mask).sum()) - int((points & mask)[block].sum())
    return bool(mask[block].all()) and beside >= REPEATS


def _lattice_gaps(mask: np.ndarray, layout: CartesianLayout) -> int:
    """Lines that a declared undersampling promises and that did not come, with the best-fitting offset."""
    ry, rz = layout.encoding.acceleration
    present = mask[layout.box]
    gaps = [
        int((~present[oz::rz, oy::ry]).sum()) for oz in range(rz) for oy in range(ry) if present[oz::rz, oy::ry].size
    ]
    return min(gaps, default=0)


def central_block(mask: np.ndarray, largest: int) -> tuple[slice, slice] | None:
    """Largest fully measured box around the center of k-space, at most `largest` per direction; None if below 8 rows.

    mask: boolean (depth, height). Rows grow first, then partitions as long as all these rows are there. With partial Fourier
    the box lies off the center, which ESPIRiT and GRAPPA do not mind.
    """
    depth, height = mask.shape
    rows = _grow(mask[depth // 2], largest)
    if rows.stop - rows.start < min(SMALLEST_BLOCK, height):
        return None
    parts = _grow(np.asarray(mask[:, rows].all(axis=1)), largest)
    return parts, rows


def _grow(present: np.ndarray, largest: int) -> slice:
    """At most `largest` consecutive True around index n//2, as central as the run they lie in allows."""
    center = len(present) // 2
    if not present[center]:
        return slice(center, center)
    gaps = np.flatnonzero(~present)
    start = int(gaps[gaps < center].max(initial=-1)) + 1
    stop = int(gaps[gaps > center].min(initial=len(present)))
    first = min(max(start, center - largest // 2), max(start, stop - largest))
    return slice(first, min(stop, first + largest))
