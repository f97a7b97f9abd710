"""What a stream waits for: readouts transformed as they arrive, frames as they close, in one pass over memory each."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from . import native
from .fft import transformable

__all__ = ["readout_lines", "root_sum_of_squares", "takes"]

_A, _N, _I, _F = native.ADDRESS, native.LENGTH, native.INTEGER, native.FLOAT
_readout_lines = native.Function("scs_readout_lines", *[_A] * 4, *[_N] * 9, _I)
_root_sum_of_squares = native.Function("scs_root_sum_of_squares", _A, _A, *[_N] * 3, _F, _I)


def takes(length: int) -> bool:
    """Whether there are compiled kernels, and for transforms of this length."""
    return native.available() and transformable(length)


def readout_lines(
    samples: np.ndarray, factors: Tensor, size: int, out: Tensor, places: np.ndarray | None = None
) -> None:
    """Transform readouts, keep the central positions and weigh them, where `takes(size)`.

    samples: complex64 (readouts, channels, n), n <= size, contiguous along the last axis, of any alignment, as they lie in a
    received message; they are filled with zeros to `size`. factors: complex64 (width,). out: complex64 (readouts, channels,
    width), gets sum over k of samples[k] exp(2 pi i k m / size) times its factor for m = -(width // 2), ...
    With places, int64 (readouts,), each other than the others, out is complex64 (channels, lines, width) and gets the lines
    of readout r at places[r]; its other lines stay as they are.
    Raises ValueError for shapes, types and places that do not fit.
    """
    readouts, channels, count = samples.shape
    if samples.dtype != np.complex64 or samples.strides[2] != 8:
        raise ValueError(f"samples are {samples.dtype} with strides {samples.strides}, needed: complex64, contiguous")
    width, lines = len(factors), readouts if places is None else out.shape[1]
    shape = (readouts, channels, width) if places is None else (channels, lines, width)
    if out.shape != shape or not out.is_contiguous() or not count <= size >= width:
        raise ValueError(
            f"out has shape {tuple(out.shape)} for samples {samples.shape}, {width} factors and size {size}"
        )
    where = 0 if places is None else _places(places, readouts, lines)
    line, channel = (channels * width, width) if places is None else (width, lines * width)
    addresses = (samples.__array_interface__["data"][0], factors.data_ptr(), out.data_ptr(), where)
    sizes = (readouts, channels, count, *samples.strides[:2], size, width, line, channel)
    _readout_lines(*addresses, *sizes, native.threads())


def _places(places: np.ndarray, readouts: int, lines: int) -> int:
    """Their address, once it is certain that nothing is written elsewhere."""
    fits = places.dtype == np.int64 and places.shape == (readouts,) and places.flags.c_contiguous
    if not fits or (readouts and not 0 <= places.min() <= places.max() < lines):
        raise ValueError(f"places do not fit {readouts} readouts, whose samples go to {lines} lines")
    address: int = places.ctypes.data
    return address


def root_sum_of_squares(kspace: Tensor) -> Tensor | None:
    """Centered image, float32 (n, inner), of k-space complex64 (coils, n, inner) centered along n; None where no kernel can.

    The root of the sum over coils of |orthonormal inverse transform along n|^2; a phase along n that centers k-space is not seen.
    """
    coils, n, inner = kspace.shape
    if not (
        native.available() and transformable(n) and kspace.dtype == torch.complex64 and kspace.device.type == "cpu"
    ):
        return None
    kspace, image = kspace.resolve_conj().contiguous(), torch.empty(n, inner)
    _root_sum_of_squares(kspace.data_ptr(), image.data_ptr(), coils, n, inner, 1 / math.sqrt(n), native.threads())
    return image
