"""Plain photoacoustic reconstructions of one pass: delay-and-sum and universal back-projection, offline and live.

Signals have shape (..., element, samples), images (..., y, x) or (..., z, y, x).
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.fft
import scipy.signal
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ...kernels import photoacoustic as kernels
from ..operators.photoacoustic_geometry import WEIGHTING, DetectorArray, PixelGrid, TimeAxis

__all__ = ["METHODS", "LiveBeamformer", "band_pass", "band_response", "delay_and_sum", "universal_back_projection"]

METHODS = ("das", "ubp")
Singles = NDArray[np.float32]
Frame = NDArray[Any]
Band = tuple[float, float]
_DTYPES = {np.dtype(np.int16): torch.int16, np.dtype(np.uint16): torch.uint16, np.dtype(np.float32): torch.float32}
_ORDER = 3
"""Of the Butterworth band-pass."""


def band_response(band_hz: Band, sampling_rate_hz: float, length: int) -> Singles:
    """A Butterworth band-pass of third order run forwards and backwards: real, at the frequencies of an FFT of `length`.

    band_hz: lower and upper edge, where half the amplitude is left; 0 as the lower or half the sampling rate as the upper
    one leaves that edge out. Returns float32, (length // 2 + 1,). Raises ValueError for a band that is none.
    """
    low, high, top = *band_hz, sampling_rate_hz / 2
    if not 0 <= low < min(high, top):
        raise ValueError(f"band_hz is {band_hz}; needed: 0 <= lower < upper and lower < {top:g} Hz, half the rate")
    if low == 0 and high >= top:
        return np.ones(length // 2 + 1, np.float32)
    edges = [edge for edge in band_hz if 0 < edge < top]
    kind = "bandpass" if len(edges) == 2 else "lowpass" if low == 0 else "highpass"
    edge = edges if len(edges) == 2 else edges[0]
    sections = scipy.signal.butter(_ORDER, edge, kind, fs=sampling_rate_hz, output="sos")
    response = scipy.signal.sosfreqz(sections, np.fft.rfftfreq(length, 1 / sampling_rate_hz), fs=sampling_rate_hz)[1]
    power: Singles = (np.abs(response) ** 2).astype(np.float32)
    return power


def band_pass(signals: Tensor, band_hz: Band, sampling_rate_hz: float) -> Tensor:
    """Signals (..., samples) through `band_response`. Rows are led back to their start by a ramp, so that none jumps."""
    samples = signals.shape[-1]
    length = _filter_length(samples)
    ramp = torch.from_numpy(_ramp(length - samples)).to(signals)
    first, last = signals[..., :1], signals[..., -1:]
    longer = torch.cat([signals, torch.lerp(last, first, ramp)], -1)
    response = torch.from_numpy(band_response(band_hz, sampling_rate_hz, length)).to(signals)
    filtered: Tensor = torch.fft.irfft(torch.fft.rfft(longer) * response, n=length)
    return filtered[..., :samples]


def delay_and_sum(signals: Tensor, array: DetectorArray, grid: PixelGrid, time: TimeAxis) -> Tensor:
    """The mean over the elements, by their weights, of what each recorded when the sound of a pixel arrived.

    signals: real, (..., element, samples). Returns (..., *grid.shape). 0 if all elements are dead.
    """
    table = _table(signals, array, grid, time, 2)
    image: Tensor = kernels.pat_gather(signals, *table, time.delay, kernels.PLAIN)
    return (image / max(float(table[0][:, 6].sum()), 1e-30)).reshape(*signals.shape[:-2], *grid.shape)


def universal_back_projection(
    signals: Tensor, array: DetectorArray, grid: PixelGrid, time: TimeAxis, *, dimensions: int | None = None
) -> Tensor:
    """2 p - 2 t dp/dt, averaged over the elements by the angle under which a pixel sees each (Xu, Wang, PRE 71, 016706, 2005).

    The angles that are there stand for the whole circle or sphere, which keeps the brightness in limited view. The
    derivative amplifies noise: filter before (`band_pass`). dimensions: 2, plane angles, the weights of elements being
    lengths of arc; 3, solid angles, the weights being areas; by default 2 if all elements and the image lie in one plane.
    signals: real, (..., element, samples). Returns (..., *grid.shape), 0 where no element looks.
    """
    dimensions = _dimensions(array, grid) if dimensions is None else dimensions
    table = _table(signals, array, grid, time, dimensions)
    clock = torch.arange(time.samples, dtype=signals.dtype, device=signals.device) + time.delay
    projected = 2 * signals - 2 * clock * torch.gradient(signals, dim=-1)[0]
    frames = projected.reshape(-1, *signals.shape[-2:])
    both = torch.cat([frames, torch.ones_like(frames[:1])])
    images = kernels.pat_gather(both, *table, time.delay, WEIGHTING[dimensions])
    image = torch.where(images[-1] > 0, images[:-1] / images[-1], 0)
    return image.reshape(*signals.shape[:-2], *grid.shape)


class LiveBeamformer:
    """Frames to images, one after the other, in memory that is allocated once.

    positions_m, orientations, dead: as `DetectorArray.at`; without orientations elements face the middle of the image.
    pixels: (ny, nx). field_of_view_m: x from, x to, y from, y to, at the edges of the outer pixels. method: "das", as
    `delay_and_sum`, or "ubp", as `universal_back_projection`. t0_samples: time of the first sample. band_hz: band-pass before
    it, None for none. adc_offset: what the converter gives for silence. threads: of the processor.
    One object must not run in two threads at once. Raises ValueError for whatever does not fit.
    """

    def __init__(
        self,
        positions_m: ArrayLike,
        orientations: ArrayLike | None,
        sampling_rate_hz: float,
        *,
        pixels: tuple[int, int],
        field_of_view_m: tuple[float, float, float, float],
        method: str = "das",
        speed_of_sound: float = 1500.0,
        t0_samples: float = 0.0,
        band_hz: Band | None = None,
        dead: Sequence[int] = (),
        weights: ArrayLike | None = None,
        adc_offset: float = 0.0,
        threads: int = 2,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method is {method!r}, allowed are {', '.join(METHODS)}")
        self.grid = PixelGrid.over(pixels, field_of_view_m)
        self.array = DetectorArray.at(positions_m, orientations, weights=weights, dead=dead, facing_m=self.grid.center)
        self._time = TimeAxis(sampling_rate_hz, 1, speed_of_sound, t0_samples)
        self._dimensions = _dimensions(self.array, self.grid) if method == "ubp" else 2
        self._weighting = WEIGHTING[self._dimensions] if method == "ubp" else kernels.PLAIN
        self._band, self._offset, self._threads = band_hz, float(adc_offset), threads
        self._image = torch.empty(1, *self.grid.shape)
        self._pixels: Singles = self._image.numpy()[0]
        self._scales: dict[tuple[int, int], Singles] = {}
        self._response: Tensor | None = None
        self._padded = 0
        self._geometry()
        self._lengthen(1)

    @property
    def time(self) -> TimeAxis:
        """Speed of sound, delay and sampling rate as they are now."""
        return self._time

    def set_speed_of_sound(self, speed_of_sound: float) -> None:
        """For the frames from now on, in m/s. Raises ValueError."""
        self._time = dataclasses.replace(self._time, speed_of_sound=speed_of_sound)
        self._geometry()

    def set_delay(self, samples: float) -> None:
        """Time of the first sample, for the frames from now on. Raises ValueError."""
        self._time = dataclasses.replace(self._time, delay=samples)
        self._scales.clear()

    def image(self, frame: Frame, det_first: int = 0, det_count: int | None = None) -> Singles:
        """The image of a frame: float32, (ny, nx), overwritten by the next call.

        frame: int16, uint16 or float32, (element, samples), in the machine's byte order. With `det_count` it holds that many
        elements, from `det_first` on, and the image is what these alone show. Raises ValueError for another shape.
        """
        count = len(self.array) - det_first if det_count is None else det_count
        self._check(frame, det_first, count)
        if frame.shape[1] != self._time.samples:
            self._lengthen(frame.shape[1])
        table, rows = self._table.part(det_first, count), self._rows[:count]
        self._prepare(np.ascontiguousarray(frame), table, rows)
        self._sum(rows, table, self._image)
        self._pixels *= self._scale(det_first, count)
        return self._pixels

    def _geometry(self) -> None:
        self._table = kernels.Table.of(*self.array.table(self.grid, self._time, dimensions=self._dimensions))
        self._scales.clear()

    def _lengthen(self, samples: int) -> None:
        """Memory for frames of another number of samples."""
        self._time = dataclasses.replace(self._time, samples=samples)
        self._rows = kernels.prepared(len(self.array), samples)
        self._scales.clear()
        if self._band is not None:
            self._padded = _filter_length(samples)
            response = band_response(self._band, self._time.sampling_rate_hz, self._padded)
            self._response = torch.from_numpy(response / np.float32(self._padded))

    def _prepare(self, frame: Frame, table: kernels.Table, rows: Tensor) -> None:
        kernels.prepare(
            _borrowed(frame),
            table,
            rows,
            offset=self._offset,
            delay=self._time.delay,
            derivative=self._weighting != kernels.PLAIN,
            response=self._response,
            length=self._padded,
            threads=self._threads,
        )

    def _sum(self, rows: Tensor, table: kernels.Table, image: Tensor) -> None:
        delay, weighting, threads = self._time.delay, self._weighting, self._threads
        kernels.gather_into(rows, table, image, delay=delay, weighting=weighting, threads=threads)

    def _scale(self, first: int, count: int) -> Singles:
        """One over the sum of the weights: a number, or for universal back-projection one for each pixel."""
        if (first, count) not in self._scales:
            table = self._table.part(first, count)
            if self._weighting == kernels.PLAIN:
                total = table.elements[:, 6].sum().reshape(1, 1)
            else:
                ones, rows = torch.ones(count, self._time.samples), kernels.prepared(count, self._time.samples)
                kernels.prepare(ones, table, rows)
                total = torch.empty(self.grid.shape)
                self._sum(rows, table, total)
            self._scales[first, count] = torch.where(total > 0, 1 / total, 0).numpy()
        return self._scales[first, count]

    def _check(self, frame: Frame, first: int, count: int) -> None:
        elements = len(self.array)
        if first < 0 or count < 1 or first + count > elements:
            raise ValueError(f"det_first {first} and det_count {count} leave the array, which has {elements} elements")
        if frame.ndim != 2 or frame.shape[0] != count or not frame.shape[1]:
            raise ValueError(f"frame has shape {frame.shape}, needed is ({count}, samples), a row per element")
        if frame.dtype not in _DTYPES:
            raise ValueError(f"frame is {frame.dtype}; needed: int16, uint16 or float32 in this machine's byte order")


def _table(
    signals: Tensor, array: DetectorArray, grid: PixelGrid, time: TimeAxis, dimensions: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted = (len(array), time.samples)
    if tuple(signals.shape[-2:]) != wanted:
        raise ValueError(f"signals has shape {tuple(signals.shape)}, its last axes must be {wanted}: elements, samples")
    elements, x, y, z = (part.to(signals.device) for part in array.table(grid, time, dimensions=dimensions))
    return elements, x, y, z


def _dimensions(array: DetectorArray, grid: PixelGrid) -> int:
    flat = array.planar and len(grid.z) == 1 and abs(array.positions[0, 2] - grid.z[0]) < 1e-6
    return 2 if flat else 3


def _filter_length(samples: int) -> int:
    length: int = scipy.fft.next_fast_len(samples + samples // 8 + 1, real=True)
    return length


def _ramp(length: int) -> Singles:
    """Between 0 and 1, without its ends."""
    return np.linspace(0, 1, length + 2, dtype=np.float32)[1:-1]


def _borrowed(frame: Frame) -> Tensor:
    """The frame's own memory as a tensor, also where it is read-only, which torch would warn of; nothing writes to it."""
    memory = (ctypes.c_char * frame.nbytes).from_address(frame.ctypes.data)
    return torch.frombuffer(memory, dtype=_DTYPES[frame.dtype]).reshape(frame.shape)
