"""What is done to each readout the moment it arrives: reversal, Fourier transform, crop, prewhitening, coil compression.

A readout leaves here as a line of hybrid space: position along the readout, still k-space along the encoding directions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch

from ...kernels import streaming
from ..headers import AcquisitionFlag as Flag
from ..headers import has_flag
from .layout import CartesianLayout

__all__ = ["ReadoutTransform"]

CHUNK_BYTES = 1 << 21
"""Readouts are transformed in groups of this size, so that a group stays within the second-level cache."""


class ReadoutTransform:
    """Turns readouts of one layout into lines; its buffers are allocated once.

    `matrix` mixes coils, complex64 (coils out, coils in): the prewhitening matrix, or None for none.
    """

    def __init__(self, layout: CartesianLayout, channels: int, matrix: torch.Tensor | None = None) -> None:
        self.layout = layout
        self.channels = channels
        self.matrix = matrix
        self.chunk = max(1, CHUNK_BYTES // (8 * channels * layout.readout))
        """Readouts transformed at a time."""
        self._staging = torch.zeros(self.chunk, channels, layout.readout, dtype=torch.complex64)
        self._staged = self._staging.numpy()
        self._lines = torch.empty(self.chunk, channels, layout.width, dtype=torch.complex64)
        self._modulations: dict[int, torch.Tensor] = {}

    def _modulation(self, center: int) -> torch.Tensor:
        """Factors that place k-space sample `center` at frequency zero, for the kept points, unit norm transform."""
        factors = self._modulations.get(center)
        if factors is None:
            size, width = self.layout.readout, self.layout.width
            positions = np.arange(-(width // 2), width - width // 2)
            factors = torch.from_numpy(np.exp(-2j * np.pi / size * (center * positions % size)) / math.sqrt(size))
            self._modulations[center] = factors = factors.to(torch.complex64)
        return factors

    def lines(self, samples: np.ndarray, headers: np.ndarray) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield (which readouts, their lines).

        samples: complex64 (n, channels, samples), any strides; headers: their records, shape (n,), which say where the
        center of k-space lies, what is to be discarded and which readouts ran backwards.
        Lines are complex64 (m, coils, width) and valid until the next ones are asked for.
        """
        for start in range(0, len(samples), self.chunk):
            part = slice(start, min(start + self.chunk, len(samples)))
            reverse = np.asarray(has_flag(headers["flags"][part], Flag.IS_REVERSE))
            centers = self._centers(headers[part], reverse)
            lines = self._compiled(samples[part], headers[part], reverse, centers)
            if lines is None:
                self._stage(samples[part], headers[part], reverse)
                lines = self._transform(part.stop - part.start, centers)
            yield part, lines if self.matrix is None else torch.matmul(self.matrix, lines)

    def place(self, samples: np.ndarray, headers: np.ndarray, places: np.ndarray, lines: torch.Tensor) -> bool:
        """Write lines straight from the received bytes to their places in k-space, complex64 (coils, lines, width).

        Arguments are those of `lines`, and places int64 (n,), no two the same. False, and nothing is written, where coils are
        mixed, or readouts turned or cut, or without a compiled kernel.
        """
        if (
            self.matrix is not None
            or not streaming.takes(self.layout.readout)
            or samples.strides[-1] != samples.itemsize
        ):
            return False
        reverse = np.asarray(has_flag(headers["flags"], Flag.IS_REVERSE))
        if reverse.any() or headers["discard_pre"].any() or headers["discard_post"].any():
            return False
        for part, factors in self._by_center(self._centers(headers, reverse)):
            streaming.readout_lines(samples[part], factors, self.layout.readout, lines, places[part])
        return True

    def _by_center(self, centers: np.ndarray) -> Iterator[tuple[slice, torch.Tensor]]:
        """Readouts with the same center of k-space one after the other, and the factors for it."""
        edges = [0, *(np.flatnonzero(centers[1:] != centers[:-1]) + 1).tolist(), len(centers)]
        for start, stop in itertools.pairwise(edges):
            yield slice(start, stop), self._modulation(int(centers[start]))

    def _compiled(
        self, samples: np.ndarray, headers: np.ndarray, reverse: np.ndarray, centers: np.ndarray
    ) -> torch.Tensor | None:
        """Lines by the compiled kernel, straight from the received bytes where nothing is turned or left out; None without it."""
        if not streaming.takes(self.layout.readout):
            return None
        changed = reverse.any() or headers["discard_pre"].any() or headers["discard_post"].any()
        if changed or samples.strides[-1] != samples.itemsize:
            self._stage(samples, headers, reverse)
            samples = self._staged[: len(samples)]
        for part, factors in self._by_center(centers):
            streaming.readout_lines(samples[part], factors, self.layout.readout, self._lines[part])
        return self._lines[: len(samples)]

    def _centers(self, headers: np.ndarray, reverse: np.ndarray) -> np.ndarray:
        """Sample at the center of k-space, counted in the direction of increasing frequency; shape (n,)."""
        centers = headers["center_sample"].astype(np.int64)
        centers[centers >= self.layout.samples] = self.layout.center_sample
        return np.where(reverse, self.layout.samples - 1 - centers, centers) if reverse.any() else centers

    def _stage(self, samples: np.ndarray, headers: np.ndarray, reverse: np.ndarray) -> None:
        """Copy readouts from the received bytes: the one copy between socket and k-space."""
        target = self._staged[: len(samples), :, : self.layout.samples]
        if samples.strides[-1] == samples.itemsize:
            # as bytes, since the wire aligns nothing and numpy copies unaligned complex numbers one by one
            np.copyto(target.view(np.uint8), samples.view(np.uint8))
        else:
            np.copyto(target, samples)
        first, last = headers["discard_pre"], headers["discard_post"]
        if first.any() or last.any():
            number = np.arange(self.layout.samples)
            kept = (number >= first[:, None]) & (number < self.layout.samples - last[:, None].astype(np.int64))
            np.copyto(target, 0, where=~kept[:, None])
        for index in np.flatnonzero(reverse):
            target[index] = target[index, :, ::-1].copy()

    def _transform(self, count: int, centers: np.ndarray) -> torch.Tensor:
        spectrum = torch.fft.ifft(self._staging[:count], norm="forward")
        lines, half = self._lines[:count], self.layout.width // 2
        if (centers == centers[0]).all():
            factors = self._modulation(int(centers[0]))
        else:
            factors = torch.stack([self._modulation(int(center)) for center in centers])[:, None]
        torch.mul(spectrum[..., self.layout.readout - half :], factors[..., :half], out=lines[..., :half])
        torch.mul(spectrum[..., : self.layout.width - half], factors[..., half:], out=lines[..., half:])
        return lines
