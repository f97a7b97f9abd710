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
        shape = (coils, layout.depth, layout.height, layout.width)
        self.kspace = torch.zeros(shape, dtype=torch.complex64)
        self._flat = self.kspace.view(coils, -1, layout.width)
        self._array = self._flat.numpy()
        self.counts = np.zeros((layout.depth, layout.height), dtype=np.int32)
        self._center_distance = 1 << 30
        self.averages = layout.averages
        self.readouts = 0
        self.outside = 0
        self.received = 0.0
        self.header: np.ndarray | None = None

    def clear(self) -> None:
        """Make ready for the next frame."""
        self.kspace.zero_()
        self.counts[:] = 0
        self._center_distance = 1 << 30
        self.averages = self.layout.averages
        self.readouts = self.outside = 0
        self.received = 0.0
        self.header = None

    def add(self, lines: torch.Tensor, headers: np.ndarray, received: float) -> None:
        """Put lines (n, coils, width) in place by their counters. Lines outside the matrix are counted and left out."""
        self.readouts += len(headers)
        self.received = received
        idx = headers["idx"]
        rows, parts = self.layout.row(idx["kspace_encode_step_1"]), self.layout.partition(idx["kspace_encode_step_2"])
        inside = (rows >= 0) & (rows < self.layout.height) & (parts >= 0) & (parts < self.layout.depth)
        if not inside.all():
            self.outside += int((~inside).sum())
            lines, headers, rows, parts = lines[torch.from_numpy(inside)], headers[inside], rows[inside], parts[inside]
            if not len(rows):
                return
        self.averages = max(self.averages, int(headers["idx"]["average"].max()) + 1)
        self._keep_header(headers, rows, parts)
        self._write(lines, parts * self.layout.height + rows)

    def compress(self, matrix: torch.Tensor) -> None:
        """Replace the coils by virtual ones, complex64 (virtual, coil); later lines must come mixed like this."""
        self.kspace = torch.tensordot(matrix, self.kspace, dims=1)
        self.coils = len(matrix)
        self._flat = self.kspace.view(self.coils, -1, self.layout.width)
        self._array = self._flat.numpy()

    def _write(self, lines: torch.Tensor, flat: np.ndarray) -> None:
        counts, source = self.counts.reshape(-1), lines.transpose(0, 1)
        before = counts[flat]
        np.add.at(counts, flat, 1)
        if not before.any() and counts[flat].max() == 1:
            self._array[:, flat] = source.numpy()
        else:
            self._flat.index_add_(1, torch.from_numpy(flat), source)

    def _keep_header(self, headers: np.ndarray, rows: np.ndarray, parts: np.ndarray) -> None:
        """Keep the header nearest to the center of k-space: geometry and time stamps of the image come from there."""
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
        if self.counts.max(initial=0) <= 1:
            return self.kspace
        weights = torch.from_numpy(1.0 / np.maximum(self.counts, 1)).to(torch.float32)
        return self.kspace * weights[..., None]

    def drop_non_finite(self) -> int:
        """Take out lines that hold NaN, infinity or what would overflow when squared, as if they had not been measured.

        Returns how many there were.
        """
        bad = (~(torch.view_as_real(self._flat).abs() < LARGEST).all(dim=-1).all(dim=-1).all(dim=0)).numpy()
        bad &= self.counts.reshape(-1) > 0
        if bad.any():
            self._flat[:, torch.from_numpy(bad)] = 0
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
