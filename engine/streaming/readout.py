"""What is done to each readout the moment it arrives: reversal, Fourier transform, crop, prewhitening, coil compression.

A readout leaves here as a line of hybrid space: position along the readout, still k-space along the encoding directions.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Iterator

import numpy as np
import torch

from .layout import CartesianLayout

__all__ = ["ReadoutTransform"]

CHUNK = 64
"""Readouts transformed at a time: 64 of 8 coils x 512 points stay within the second-level cache."""


class ReadoutTransform:
    """Turns readouts of one layout into lines; its buffers are allocated once.

    `matrix` mixes coils, complex64 (coils out, coils in): the prewhitening matrix, or None for none.
    """

    def __init__(self, layout: CartesianLayout, channels: int, matrix: torch.Tensor | None = None) -> None:
        self.layout = layout
        self.channels = channels
        self.matrix = matrix
        self._staging = torch.zeros(CHUNK, channels, layout.readout, dtype=torch.complex64)
        self._staged = self._staging.numpy()
        self._lines = torch.empty(CHUNK, channels, layout.width, dtype=torch.complex64)
        center = layout.center_sample
        self._forward = self._modulation(center)
        self._reversed = self._modulation(layout.samples - 1 - center)

    def _modulation(self, center: int) -> torch.Tensor:
        """Factors that place k-space sample `center` at frequency zero, for the kept points, unit norm transform."""
        layout = self.layout
        positions = range(-(layout.width // 2), layout.width - layout.width // 2)
        scale = 1 / math.sqrt(layout.readout)
        factors = [scale * cmath.exp(-2j * math.pi * (center * x % layout.readout) / layout.readout) for x in positions]
        return torch.tensor(factors, dtype=torch.complex64)

    def lines(self, samples: np.ndarray, reverse: np.ndarray) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield (which readouts, their lines).

        samples: complex64 (n, channels, samples), any strides; reverse: boolean (n,), readouts that ran backwards.
        Lines are complex64 (m, coils, width) and valid until the next one is asked for.
        """
        for start in range(0, len(samples), CHUNK):
            part = slice(start, min(start + CHUNK, len(samples)))
            self._stage(samples[part], reverse[part])
            yield part, self._transform(part.stop - part.start, reverse[part])

    def _stage(self, samples: np.ndarray, reverse: np.ndarray) -> None:
        """Copy readouts from the received bytes: the one copy between socket and k-space."""
        count, length = len(samples), self.layout.samples
        target = self._staged[:count, :, :length]
        if samples.strides[-1] == samples.itemsize:
            # as bytes, since the wire aligns nothing and numpy copies unaligned complex numbers one by one
            np.copyto(target.view(np.uint8), samples.view(np.uint8))
        else:
            np.copyto(target, samples)
        for index in np.flatnonzero(reverse):
            target[index] = target[index, :, ::-1].copy()

    def _transform(self, count: int, reverse: np.ndarray) -> torch.Tensor:
        spectrum = torch.fft.ifft(self._staging[:count], norm="forward")
        lines = self._lines[:count]
        half = self.layout.width // 2
        lines[..., :half].copy_(spectrum[..., self.layout.readout - half :])
        lines[..., half:].copy_(spectrum[..., : self.layout.width - half])
        if not reverse.any():
            lines.mul_(self._forward)
        elif reverse.all():
            lines.mul_(self._reversed)
        else:
            lines.mul_(torch.where(torch.from_numpy(reverse)[:, None, None], self._reversed, self._forward))
        return lines if self.matrix is None else torch.matmul(self.matrix, lines)
