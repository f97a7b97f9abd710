"""K-space of one frame while it fills: written line by line and counted."""

from __future__ import annotations

import numpy as np
import torch

from ..headers import ACQUISITION_HEADER
from .layout import CartesianLayout

__all__ = ["CartesianFrame", "GatheredFrame"]

LARGEST = 1e15
"""Values from here on are faults of the receiver: their squares, summed over coils and lines, leave single precision."""


class CartesianFrame:
    """Hybrid k-space (coil, depth, height, width) of one frame, allocated once and reused.

    Repeated lines (averages) are summed and counted. What k-space holds does not depend on how the lines were grouped.
    """

    def __init__(self, layout: CartesianLayout, coils: int) -> None:
        self.layout = layout
        self.coils = coils
        self._hold(torch.zeros((coils, layout.depth, layout.height, layout.width), dtype=torch.complex64))
        self.counts = np.zeros((layout.depth, layout.height), dtype=np.int32)
        self._stale = np.zeros(layout.depth * layout.height, dtype=bool)  # lines that still hold an earlier frame's
        self._center_distance = 1 << 30
        self.averages = layout.averages
        self.readouts = 0
        self.outside = 0
        self.received = 0.0
        self.header: np.ndarray | None = None

    def _hold(self, kspace: torch.Tensor) -> None:
        self._kspace = kspace
        self.lines = kspace.view(self.coils, -1, self.layout.width)
        """K-space as lines, complex64 (coil, line, width), for a kernel that puts them in place; see `room`."""

    def clear(self) -> None:
        """Make ready for the next frame. Most lines are written anew then, so only those that are not will be set to zero."""
        self._stale |= self.counts.reshape(-1) > 0
        self.counts[:] = 0
        self._center_distance = 1 << 30
        self.averages = self.layout.averages
        self.readouts = self.outside = 0
        self.received = 0.0
        self.header = None

    def room(self, places: np.ndarray) -> bool:
        """Whether lines with these places (see `CartesianLayout.places`) may be written over what k-space holds there.

        They may when each lies within the matrix and none is there yet or comes twice.
        """
        free = places.min(initial=0) >= 0 and not self.counts.reshape(-1)[places].any()
        return bool(free) and len(np.unique(places)) == len(places)

    def note(self, headers: np.ndarray, places: np.ndarray, received: float) -> None:
        """Take note of lines that were written to `lines`, for which there was `room`."""
        self.readouts += len(headers)
        self.received = received
        self._stale[places] = False
        self.counts.reshape(-1)[places] = 1
        self._describe(headers, places)

    def add(self, lines: torch.Tensor, headers: np.ndarray, places: np.ndarray, received: float) -> None:
        """Put lines (n, coils, width) in place. Lines outside the matrix are counted and left out."""
        if self.room(places):
            self.lines.numpy()[:, places] = lines.transpose(0, 1).numpy()
            self.note(headers, places, received)
            return
        self.readouts += len(headers)
        self.received = received
        inside = places >= 0
        if not inside.all():
            self.outside += int((~inside).sum())
            lines, headers, places = lines[torch.from_numpy(inside)], headers[inside], places[inside]
        if len(places):
            self._wipe(places)
            np.add.at(self.counts.reshape(-1), places, 1)
            self.lines.index_add_(1, torch.from_numpy(places), lines.transpose(0, 1))
            self._describe(headers, places)

    def _wipe(self, places: np.ndarray | slice = slice(None)) -> None:
        """Set lines to zero that hold what an earlier frame had there."""
        if self._stale[places].any():
            stale = self._stale.copy()
            self._stale[places] = False
            self.lines.numpy()[:, np.flatnonzero(stale & ~self._stale)] = 0

    def compress(self, matrix: torch.Tensor) -> None:
        """Replace the coils by virtual ones, complex64 (virtual, coil); later lines must come mixed like this."""
        self._wipe()
        self.coils = len(matrix)
        self._hold(torch.tensordot(matrix, self._kspace, dims=1))

    def _describe(self, headers: np.ndarray, places: np.ndarray) -> None:
        """Note averages, and the header nearest to the center of k-space: the image's geometry and times come from there."""
        self.averages = max(self.averages, int(headers["idx"]["average"].max()) + 1)
        parts, rows = np.divmod(places, self.layout.height)
        distance = np.abs(rows - self.layout.height // 2) + self.layout.height * np.abs(parts - self.layout.depth // 2)
        nearest = int(distance.argmin())
        if distance[nearest] < self._center_distance:
            self._center_distance = int(distance[nearest])
            self.header = headers[nearest].copy()

    @property
    def mask(self) -> np.ndarray:
        """Lines measured, boolean (depth, height)."""
        return self.counts > 0

    @property
    def duplicates(self) -> int:
        """Lines that came more often than there are averages."""
        return int(np.maximum(self.counts - self.averages, 0).sum())

    def averaged(self) -> torch.Tensor:
        """Hybrid k-space with repeated lines averaged, complex64 (coil, depth, height, width)."""
        self._wipe()
        if self.counts.max(initial=0) <= 1:
            return self._kspace
        weights = torch.from_numpy(1.0 / np.maximum(self.counts, 1)).to(torch.float32)
        return self._kspace * weights[..., None]

    def drop_non_finite(self) -> int:
        """Take out lines that hold NaN, infinity or what would overflow when squared, as if they had not been measured.

        Returns how many there were.
        """
        self._wipe()
        bad = (~(torch.view_as_real(self.lines).abs() < LARGEST).all(dim=-1).all(dim=-1).all(dim=0)).numpy()
        bad &= self.counts.reshape(-1) > 0
        if bad.any():
            self.lines[:, torch.from_numpy(bad)] = 0
            self.counts.reshape(-1)[bad] = 0
        return int(bad.sum())


class GatheredFrame:
    """Readouts of one non-Cartesian frame, kept in the order of arrival.

    samples: complex64 (coil, readout, sample); trajectory: float32 (readout, sample, dimension) as received; headers: (readout,).
    """

    def __init__(self, coils: int, readouts: int, samples: int, dimensions: int) -> None:
        self.samples = torch.zeros(coils, readouts, samples, dtype=torch.complex64)
        self.trajectory = np.zeros((readouts, samples, dimensions), dtype=np.float32)
        self.headers = np.zeros(readouts, dtype=ACQUISITION_HEADER)
        self.readouts = 0
        self.received = 0.0
        self.header: np.ndarray | None = None

    def add(self, samples: torch.Tensor, trajectory: np.ndarray | None, headers: np.ndarray, received: float) -> None:
        """Append readouts (n, coils, samples); the buffer doubles when the header announced too few."""
        start, stop = self.readouts, self.readouts + len(headers)
        while stop > len(self.headers):
            self.samples = torch.cat((self.samples, torch.zeros_like(self.samples)), dim=1)
            self.trajectory = np.concatenate((self.trajectory, np.zeros_like(self.trajectory)))
            self.headers = np.concatenate((self.headers, np.zeros_like(self.headers)))
        self.samples[:, start:stop] = samples.transpose(0, 1)
        if trajectory is not None:
            self.trajectory[start:stop] = trajectory
        self.headers[start:stop] = headers
        self.readouts, self.received = stop, received
        if self.header is None:
            self.header = headers[0].copy()

    def clear(self) -> None:
        """Make ready for the next frame."""
        self.readouts, self.received, self.header = 0, 0.0, None
