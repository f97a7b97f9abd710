"""Centered transforms, window functions, and the way from the encoded matrix to the one the scanner wants.

Matrices and fields of view are ordered (x, y, z) as in `EncodingSpace`, arrays [..., z, y, x]; the center is at N//2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import pad

__all__ = ["central", "filter_kspace", "readout_crop", "resample", "resize_image", "to_image", "to_kspace", "tukey"]


def to_kspace(image: torch.Tensor, axes: Sequence[int] = (-2, -1)) -> torch.Tensor:
    """Centered orthonormal Fourier transform along `axes`; any shape, complex."""
    axes = tuple(axes)
    kspace = torch.fft.fftn(torch.fft.ifftshift(image, dim=axes), dim=axes, norm="ortho")
    centered: torch.Tensor = torch.fft.fftshift(kspace, dim=axes)
    return centered


def to_image(kspace: torch.Tensor, axes: Sequence[int] = (-2, -1)) -> torch.Tensor:
    """Inverse of `to_kspace`."""
    axes = tuple(axes)
    image = torch.fft.ifftn(torch.fft.ifftshift(kspace, dim=axes), dim=axes, norm="ortho")
    centered: torch.Tensor = torch.fft.fftshift(image, dim=axes)
    return centered


def tukey(size: int, taper: float, *, extent: float | None = None) -> torch.Tensor:
    """Window of `size` points, float64, 1 around N//2, with cosine edges; 0 at `extent` points from there and beyond.

    taper: fraction of the half width that is sloped, 0 (rectangle) to 1 (Hann window). extent: default size / 2.
    Harris, Proc. IEEE 66:51 (1978).
    """
    if not 0 <= taper <= 1:
        raise ValueError(f"taper is {taper}; it must lie between 0 and 1")
    distance = (torch.arange(size, dtype=torch.float64) - size // 2).abs() / (size / 2 if extent is None else extent)
    slope = ((distance - (1 - taper)) / taper).clamp(0, 1) if taper > 0 else (distance > 1).to(torch.float64)
    return 0.5 * (1 + torch.cos(torch.pi * slope))


def filter_kspace(kspace: torch.Tensor, taper: float, axes: Sequence[int] = (-2, -1)) -> torch.Tensor:
    """K-space with a Tukey window along each of `axes`, against ringing; taper 1 is a Hann filter."""
    for axis in axes:
        window = tukey(kspace.shape[axis], taper).to(device=kspace.device, dtype=kspace.real.dtype)
        kspace = kspace * window.reshape([-1] + [1] * (-axis - 1 if axis < 0 else kspace.ndim - 1 - axis))
    return kspace


def central(size: int, wanted: int) -> slice:
    """The `wanted` central points of `size`, N//2 staying N//2; all of them where there are no more than that."""
    wanted = min(size, wanted)
    first = size // 2 - wanted // 2
    return slice(first, first + wanted)


def readout_crop(samples: int, encoded_fov_mm: float, recon_fov_mm: float) -> slice:
    """Image points along the readout that are kept when its oversampling is removed."""
    return central(samples, _points(recon_fov_mm, encoded_fov_mm / samples))


def resample(image: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """Sinc interpolation (or low-pass and decimation) of one axis to `size` points of the same field of view.

    Intensities are kept.
    """
    present = image.shape[axis]
    if present == size:
        return image
    kspace = _recenter(to_kspace(image, (axis,)), axis, size)
    return torch.mul(to_image(kspace, (axis,)), math.sqrt(size / present))


def resize_image(
    image: torch.Tensor,
    encoded_matrix: tuple[int, int, int],
    encoded_fov_mm: tuple[float, float, float],
    recon_matrix: tuple[int, int, int],
    recon_fov_mm: tuple[float, float, float],
) -> torch.Tensor:
    """An image on the encoded grid, brought to the matrix and field of view of the reconstruction; intensities are kept.

    image: complex, shape (..., z, y, x), pixels of encoded FOV / encoded matrix; its oversampling may be removed already.
    Per axis the field of view is cropped or padded with zeros to the nearest whole pixel, then interpolated in k-space.
    """
    for axis, matrix, fov, wanted, wanted_fov in zip(
        (-1, -2, -3), encoded_matrix, encoded_fov_mm, recon_matrix, recon_fov_mm, strict=True
    ):
        if matrix > 1 or wanted > 1:
            image = resample(_recenter(image, axis, _points(wanted_fov, fov / matrix)), axis, wanted)
    return image


def _points(fov: float, pixel: float) -> int:
    return max(1, round(fov / pixel))


def _recenter(array: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """Crop or pad with zeros around N//2."""
    present = array.shape[axis]
    if size <= present:
        part = central(present, size)
        return array.narrow(axis, part.start, size)
    before = size // 2 - present // 2
    return pad(array.movedim(axis, -1), (before, size - present - before)).movedim(-1, axis)
