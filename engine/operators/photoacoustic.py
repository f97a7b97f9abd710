"""The forward model of photoacoustics: from the initial pressure to what the elements of a detector array record.

A = (I x K) S W: an optional smoothing W of the image, the collection S of its pixels by time of flight, and the wave equation
as a matrix K in time (`wave.time_matrix`). The adjoint is exact, since that of S is and K is a matrix.
Images have shape (..., y, x) or (..., z, y, x), signals (..., element, samples).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels import photoacoustic as kernels
from ...kernels.photoacoustic_turned import Turned
from .linear import LinearOperator
from .photoacoustic_geometry import DetectorArray, PixelGrid, TimeAxis
from .wave import time_matrix

__all__ = ["BlackmanSmoothing", "PhotoacousticOperator", "TimeMatrix", "TimeOfFlight"]

Weighting = Literal["plain", "plane", "space"]
_MARGIN = 8
"""Pixels of zeros around an image that is smoothed, so that nothing wraps: the window's response is about 4 wide."""


class TimeOfFlight(LinearOperator):
    """S: every pixel adds its value to the two samples between which its sound arrives; `H` is delay-and-sum, unscaled.

    weighting: what an element counts for at a pixel, see `kernels.photoacoustic.WEIGHTINGS`.
    """

    def __init__(
        self,
        array: DetectorArray,
        grid: PixelGrid,
        time: TimeAxis,
        *,
        weighting: Weighting = "plain",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(grid.shape, (len(array), time.samples))
        dimensions = {"plain": 1, "plane": 2, "space": 3}[weighting]
        table = array.table(grid, time, dimensions=dimensions)
        self._table = [part.to(device) for part in table]
        cpu = torch.device(device or "cpu").type == "cpu"
        self._turned = Turned.of(*table) if weighting == "plain" and cpu else None
        self._volume = (len(grid.z), len(grid.y), len(grid.x))
        self._delay, self._weighting = time.delay, kernels.WEIGHTINGS[weighting]

    def _forward(self, x: Tensor) -> Tensor:
        if self._turned is not None and _single(x, self.domain):
            return self._turned.scatter(x, self.range[-1], self._delay)
        batch = x.shape[: x.ndim - len(self.domain)]
        image = x.reshape(*batch, *self._volume)
        signals: Tensor = kernels.pat_scatter(image, *self._table, self.range[-1], self._delay, self._weighting)
        return signals

    def _backward(self, y: Tensor) -> Tensor:
        if self._turned is not None and _single(y, self.range):
            return self._turned.gather(y, self._delay)
        image: Tensor = kernels.pat_gather(y, *self._table, self._delay, self._weighting)
        return image.reshape(*y.shape[: y.ndim - len(self.range)], *self.domain)


class TimeMatrix(LinearOperator):
    """I x K: the same real matrix (samples, samples) along the time of every element."""

    def __init__(self, matrix: Tensor, elements: int) -> None:
        rows, columns = matrix.shape
        super().__init__((elements, columns), (elements, rows))
        self._matrix = matrix
        self._gram: Tensor | None = None

    @property
    def gram(self) -> LinearOperator:
        """I x K^T K: one product in the place of two."""
        if self._gram is None:
            self._gram = self._matrix.mT @ self._matrix
        return TimeMatrix(self._gram, self.domain[0])

    def _forward(self, x: Tensor) -> Tensor:
        return x @ self._matrix.to(x).mT

    def _backward(self, y: Tensor) -> Tensor:
        return y @ self._matrix.to(y)


class BlackmanSmoothing(LinearOperator):
    """W: a Blackman window over the spatial frequencies, 0 above the Nyquist frequency in every direction; self-adjoint.

    What k-Wave's `smooth` does to an initial pressure, but for its last rescaling. Images are taken as 0 outside.
    """

    def __init__(self, shape: Sequence[int], *, device: torch.device | str | None = None) -> None:
        super().__init__(shape, shape)
        self._padded = [n + 2 * _MARGIN for n in shape]
        axes = [torch.fft.fftfreq(n, device=device, dtype=torch.float64) * 2 for n in self._padded]
        radius = torch.stack(torch.meshgrid(*axes, indexing="ij")).norm(dim=0)
        window = 0.42 + 0.5 * torch.cos(torch.pi * radius) + 0.08 * torch.cos(2 * torch.pi * radius)
        self._window = torch.where(radius <= 1, window, 0)[..., : self._padded[-1] // 2 + 1]

    def _forward(self, x: Tensor) -> Tensor:
        axes = tuple(range(-len(self.domain), 0))
        padded = torch.nn.functional.pad(x, (_MARGIN,) * (2 * len(axes)))
        spectrum = torch.fft.rfftn(padded, dim=axes) * self._window.to(x)
        smooth: Tensor = torch.fft.irfftn(spectrum, s=self._padded, dim=axes)
        return torch.nn.functional.pad(smooth, (-_MARGIN,) * (2 * len(axes)))

    def _backward(self, y: Tensor) -> Tensor:
        return self._forward(y)


class PhotoacousticOperator(LinearOperator):
    """A = (I x K) S W, from an initial pressure to the pressure that point-like elements record, both in the same unit.

    dimensions: 2 for sound that stays in the plane of the image, as in a 2-D simulation; 3 for real sound, which an image in
    a plane takes as sheet of 1 m. response: of the transducer, see `wave.gaussian_response`. smooth: with W.
    Dead elements record 0; the weights of the others are of no account here. dtype: that K is kept in.
    """

    def __init__(
        self,
        array: DetectorArray,
        grid: PixelGrid,
        time: TimeAxis,
        *,
        dimensions: int = 3,
        response: NDArray[np.float64] | None = None,
        smooth: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(grid.shape, (len(array), time.samples))
        matrix = time_matrix(time, _pixel(grid), grid.cell, dimensions=dimensions, response=response)
        alive = dataclasses.replace(array, weights=(array.weights > 0).astype(np.float64))
        wave = TimeMatrix(torch.from_numpy(matrix).to(device, dtype), len(array))
        self._product: LinearOperator = wave @ TimeOfFlight(alive, grid, time, device=device)
        if smooth:
            self._product = self._product @ BlackmanSmoothing(grid.shape, device=device)

    @property
    def gram(self) -> LinearOperator:
        """With K^T K as one matrix."""
        return self._product.gram

    def _forward(self, x: Tensor) -> Tensor:
        return self._product(x)

    def _backward(self, y: Tensor) -> Tensor:
        return self._product.H(y)


def _single(x: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether it is one float32 on the processor, and no gradient is asked for."""
    plain = x.dtype == torch.float32 and x.device.type == "cpu" and not (x.requires_grad and torch.is_grad_enabled())
    return plain and x.shape == shape


def _pixel(grid: PixelGrid) -> float:
    """Width of a pixel; the footprint is the same in every direction, so that it must be square."""
    sizes = [abs(axis[1] - axis[0]) for axis in (grid.x, grid.y, grid.z) if len(axis) > 1]
    if not sizes:
        raise ValueError(f"the grid has shape {grid.shape}; of one pixel the size is not known, two or more are needed")
    if max(sizes) > 1.001 * min(sizes):
        raise ValueError(f"pixels measure {', '.join(f'{s:g}' for s in sizes)} m; the forward model needs square ones")
    return float(sizes[0])
