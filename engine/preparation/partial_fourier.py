"""Partial Fourier: rows that were left out at one end of k-space, restored from the conjugate symmetry of a smooth phase.

Works on the combined complex image [..., z, y, x] after SENSE or GRAPPA, given which rows of k-space lie behind it; an
asymmetric echo is the same along x. Axes are counted from the end: -3 is z, -2 is y, -1 is x.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .filters import to_image, to_kspace, tukey

__all__ = ["SampledRange", "homodyne", "partial_axes", "pocs", "sampled_range"]

COMPLETE = 0.95
"""From this fraction on an axis is not partial: a lattice may end a few lines before the last one."""


@dataclass(frozen=True)
class SampledRange:
    """From which to which row an axis of `size` points was measured: start <= row < stop, with the center at size // 2."""

    size: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.size // 2 < self.stop <= self.size:
            raise ValueError(
                f"rows {self.start} to {self.stop - 1} of {self.size} miss the k-space center at {self.size // 2}"
            )

    @property
    def below(self) -> int:
        """Rows measured below the center."""
        return self.size // 2 - self.start

    @property
    def above(self) -> int:
        """Rows measured above the center."""
        return self.stop - 1 - self.size // 2

    @property
    def half_width(self) -> int:
        """Rows measured on both sides of the center."""
        return min(self.below, self.above)

    @property
    def fraction(self) -> float:
        """Rows measured over those of the symmetric range; a range that is cut at both ends alike is 1 (low resolution)."""
        return (self.stop - self.start) / min(self.size, 2 * max(self.below, self.above) + 1)

    @property
    def is_partial(self) -> bool:
        """Whether rows were left out on one side, by more than the spacing of an undersampled lattice explains."""
        return self.fraction < COMPLETE


def sampled_range(rows: torch.Tensor) -> SampledRange:
    """First and last measured row.

    rows: boolean, shape (n,); gaps do not matter (undersampling). Raises ValueError when the center is outside.
    """
    measured = torch.nonzero(rows).flatten()
    if not len(measured):
        raise ValueError(f"none of {len(rows)} rows was measured")
    return SampledRange(len(rows), int(measured[0]), int(measured[-1]) + 1)


def partial_axes(mask: torch.Tensor) -> dict[int, SampledRange]:
    """The axes that are partial, with their ranges; empty where k-space is complete or symmetric.

    mask: boolean, shape (z, y, x), (z, y, 1) or (z, y): what was measured.
    """
    mask = mask[..., None] if mask.ndim == 2 else mask
    found = {axis: mask.any(dim=tuple({-3, -2, -1} - {axis})) for axis in (-3, -2, -1) if mask.shape[axis] > 1}
    ranges = {axis: sampled_range(rows) for axis, rows in found.items()}
    return {axis: rows for axis, rows in ranges.items() if rows.is_partial}


def homodyne(image: torch.Tensor, ranges: Mapping[int, SampledRange]) -> torch.Tensor:
    """Homodyne reconstruction: one-sided rows count twice, the part in phase with the low-resolution image fills the rest.

    image: complex, shape (..., z, y, x), from zero-filled k-space. ranges: per axis, as from `partial_axes`; several axes are
    restored one after the other. Measured rows are put back afterwards, blended smoothly at the cut: where the phase is rough,
    the textbook's image, which keeps nothing but the part in phase, is further from the truth than zero filling.
    Noll, Nishimura and Macovski, IEEE TMI 10:154 (1991).
    """
    phase = _low_resolution_phase(image, ranges)
    for axis, rows in ranges.items():
        estimate = _in_phase(_weighted(image, axis, _ramp(rows)), phase)
        image = estimate + _weighted(image - estimate, axis, _trusted(rows))
    return image


def pocs(image: torch.Tensor, ranges: Mapping[int, SampledRange], *, iterations: int = 10) -> torch.Tensor:
    """Projection onto convex sets: phase of the low-resolution image, k-space as measured, in turns.

    image, ranges: as for `homodyne`, all axes at a time. iterations: fixed; 10 are enough from 5/8 on. Measured rows are blended
    smoothly with estimated ones at the cut, all others are kept exactly.
    Haacke, Lindskog and Lin, JMR 92:126 (1991).
    """
    phase, axes = _low_resolution_phase(image, ranges), tuple(ranges)
    measured, trusted = to_kspace(image, axes), torch.ones_like(image.real)
    for axis, rows in ranges.items():
        trusted = trusted * _along(_trusted(rows), axis, image)
    for _ in range(iterations):
        estimate = to_kspace(_in_phase(image, phase), axes)
        image = to_image(estimate + trusted * (measured - estimate), axes)
    return image


def _in_phase(image: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
    return (image * phase.conj()).real * phase


def _along(window: torch.Tensor, axis: int, like: torch.Tensor) -> torch.Tensor:
    """A window as a real tensor that broadcasts along `axis`."""
    return window.to(device=like.device, dtype=like.real.dtype).reshape([-1] + [1] * (-axis - 1))


def _weighted(image: torch.Tensor, axis: int, window: torch.Tensor) -> torch.Tensor:
    return to_image(to_kspace(image, (axis,)) * _along(window, axis, image), (axis,))


def _low_resolution_phase(image: torch.Tensor, ranges: Mapping[int, SampledRange]) -> torch.Tensor:
    """Unit phase factors of the image from the rows that were measured on both sides of the center."""
    for axis, rows in ranges.items():
        image = _weighted(image, axis, tukey(rows.size, 0.5, extent=rows.half_width + 1))
    return torch.polar(torch.ones_like(image.real), image.angle())


def _ramp(rows: SampledRange) -> torch.Tensor:
    """Weights from 0 on the side that was left out to 2 on the other, linear between; a row and its mirror image sum to 2."""
    distance = torch.arange(rows.size, dtype=torch.float64) - rows.size // 2
    weights = 1 + (distance if rows.above > rows.below else -distance) / (rows.half_width + 1)
    if rows.size % 2 == 0:
        weights[0] = 1  # the highest frequency is its own mirror image
    return weights.clamp(0, 2)


def _trusted(rows: SampledRange) -> torch.Tensor:
    """How far measured rows are kept, 0 to 1: 1 inside, falling to 0 over a few rows towards the side that was left out."""
    row = torch.arange(rows.size, dtype=torch.float64)
    inside = row - rows.start + 1 if rows.above > rows.below else rows.stop - row
    slope = (inside / max(1, min(8, rows.half_width // 2))).clamp(0, 1)
    return 0.5 - 0.5 * torch.cos(torch.pi * slope)
