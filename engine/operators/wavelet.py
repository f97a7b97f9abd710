"""Orthogonal wavelet transform, by PyWavelets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import EllipsisType

import numpy as np
import pywt
import torch
from numpy.typing import NDArray
from torch import Tensor

from .linear import Identity, LinearOperator

__all__ = ["Wavelet"]

SMALLEST = 16
"""The coarsest scale keeps at least this many points along each axis, as in BART."""


class Wavelet(LinearOperator):
    """Periodic orthogonal wavelet transform of images [..., z, y, x] along `axes`, coefficients in one array.

    Sizes that 2^levels does not divide are filled up with zeros, so `range` is then larger than `domain`; W^H W = 1 always.
    The arithmetic runs on the CPU in the precision of the argument; tensors of other devices travel there and back.

    shape: of the image. wavelet: any orthogonal one that PyWavelets names. levels: scales, by default as many as leave 16
    points. shift: the image is turned by so many pixels along each of `axes` first; by random shifts from one iteration to
    the next, thresholding loses its dependence on position (Coifman, Donoho, Wavelets and Statistics, 1995).
    Raises ValueError for a wavelet that is not orthogonal.
    """

    def __init__(
        self,
        shape: Sequence[int],
        axes: Sequence[int] = (-2, -1),
        *,
        wavelet: str = "db4",
        levels: int | None = None,
        shift: Sequence[int] | None = None,
    ) -> None:
        axes = tuple(axis for axis in sorted(axes) if shape[axis] > 1)
        if levels is None:
            levels = _default_levels([shape[axis] for axis in axes])
        super().__init__(shape, _filled_shape(shape, axes, levels))
        self._axes, self._levels, self._wavelet = axes, levels, pywt.Wavelet(wavelet)  # type: ignore[attr-defined]
        if not self._wavelet.orthogonal:
            raise ValueError(f"wavelet is {wavelet!r}, which is not orthogonal; take a db, sym or coif")
        self._shift = tuple(shift) if shift is not None and any(shift) else None
        if self._shift is not None and len(self._shift) != len(axes):
            raise ValueError(f"shift is {self._shift}, one number is needed for each of the axes {axes}")
        self._bands = ["".join(letters) for letters in itertools.product("ad", repeat=len(axes))]

    @property
    def axes(self) -> tuple[int, ...]:
        """The transformed axes; those of length 1 are left out."""
        return self._axes

    @property
    def period(self) -> int:
        """Shifts by multiples of this many pixels, 2^levels, only move the coefficients."""
        return 1 << self._levels

    @property
    def gram(self) -> LinearOperator:
        """The identity."""
        return Identity(self.domain)

    def shifted(self, shift: Sequence[int]) -> Wavelet:
        """The same transform behind a turn of the image by `shift` pixels along each of `axes`."""
        return Wavelet(self.domain, self._axes, wavelet=self._wavelet.name, levels=self._levels, shift=shift)

    def _forward(self, x: Tensor) -> Tensor:
        if self._shift is not None:
            x = torch.roll(x, self._shift, self._axes)
        rest = self._filled(x.cpu().resolve_conj().numpy())
        coefficients = np.empty_like(rest)
        for level in range(1, self._levels + 1):
            parts = pywt.dwtn(rest, self._wavelet, "periodization", self._axes)  # type: ignore[no-untyped-call]
            for band in self._bands[1:]:
                coefficients[self._box(band, level)] = parts[band]
            rest = parts[self._bands[0]]
        coefficients[self._box(self._bands[0], self._levels)] = rest
        return torch.from_numpy(coefficients).to(x.device)

    def _backward(self, y: Tensor) -> Tensor:
        coefficients = y.cpu().resolve_conj().numpy()
        rest = coefficients[self._box(self._bands[0], self._levels)]
        for level in range(self._levels, 0, -1):
            parts = {band: coefficients[self._box(band, level)] for band in self._bands[1:]}
            parts[self._bands[0]] = rest
            rest = pywt.idwtn(parts, self._wavelet, "periodization", self._axes)  # type: ignore[no-untyped-call]
        x = torch.from_numpy(rest).to(y.device)
        for axis in self._axes:
            x = x.narrow(axis, 0, self.domain[axis])
        return x if self._shift is None else torch.roll(x, tuple(-turn for turn in self._shift), self._axes)

    def _box(self, band: str, level: int) -> tuple[EllipsisType | slice, ...]:
        """Where the coefficients of a band ("a" coarse, "d" detail, per axis) and scale lie."""
        box = [slice(None)] * len(self.range)
        for letter, axis in zip(band, self._axes, strict=True):
            size = self.range[axis] >> level
            box[axis] = slice(0, size) if letter == "a" else slice(size, 2 * size)
        return (..., *box)

    def _filled(self, array: NDArray[np.generic]) -> NDArray[np.generic]:
        missing = [more - size for more, size in zip(self.range, self.domain, strict=True)]
        batch = array.ndim - len(missing)
        return np.pad(array, [(0, 0)] * batch + [(0, more) for more in missing]) if any(missing) else array


def _default_levels(sizes: Sequence[int]) -> int:
    levels = 0
    while sizes and min(sizes) >> (levels + 1) >= SMALLEST:
        levels += 1
    return levels


def _filled_shape(shape: Sequence[int], axes: Sequence[int], levels: int) -> list[int]:
    filled, unit = list(shape), 1 << levels
    for axis in axes:
        filled[axis] = -(-shape[axis] // unit) * unit
    return filled
