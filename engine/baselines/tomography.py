"""Plain reconstructions of computed tomography: filtered back-projection and SIRT."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator

import numpy as np
import scipy.fft
import torch
from torch import Tensor

from ...kernels import tomography as kernels
from ..operators.tomography import BeamGeometry, RayTransform

__all__ = ["WINDOWS", "filtered_back_projection", "sirt", "sirt_steps"]

WINDOWS = ("ramp", "hann")


def filtered_back_projection(sinogram: Tensor, geometry: BeamGeometry, *, window: str = "ramp") -> Tensor:
    """Filtered back-projection for a flat detector (Kak, Slaney, Principles of CT Imaging, 1988, sections 3.3 and 3.4.2).

    sinogram: real, (..., view, bin), line integrals. Views must cover the circle evenly, parallel ones the circle or half of
    it; of fewer the image has streaks. window: "ramp", or "hann", smoother. Returns (..., y, x), per unit of length.
    """
    if window not in WINDOWS:
        raise ValueError(f"window is {window!r}, allowed are {', '.join(WINDOWS)}")
    if tuple(sinogram.shape[-2:]) != (len(geometry.angles), geometry.bins):
        needed = f"({len(geometry.angles)}, {geometry.bins})"
        raise ValueError(f"sinogram has shape {tuple(sinogram.shape)}, its last axes must be {needed}: views, bins")
    filtered = _filtered(sinogram * _obliquity(geometry).to(sinogram), geometry, window)
    image = kernels.pixel_driven(filtered, geometry.views, *geometry.shape)
    return image * (math.pi / len(geometry.angles))


def sirt(sinogram: Tensor, geometry: BeamGeometry, *, iterations: int = 50, nonnegative: bool = True) -> Tensor:
    """The image after so many steps of `sirt_steps`."""
    steps = sirt_steps(sinogram, geometry, iterations=iterations, nonnegative=nonnegative)
    return collections.deque(steps, maxlen=1)[0]


def sirt_steps(
    sinogram: Tensor,
    geometry: BeamGeometry,
    *,
    iterations: int,
    nonnegative: bool = True,
    initial: Tensor | None = None,
) -> Iterator[Tensor]:
    """Simultaneous iterative reconstruction: x <- x + C A^T R (y - A x), R and C one over row and column sums of A.

    It minimizes |y - A x|^2 weighted by R (Gregor, Benson, IEEE TMI 27, 918, 2008); what is seen in few steps is smooth.
    nonnegative: set what falls below 0 to 0. initial: the start, 0 if left out. Yields the image after each step.
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, at least 1 is needed")
    operator = RayTransform(geometry, device=sinogram.device)
    rows, columns = operator(sinogram.new_ones(operator.domain)), operator.H(sinogram.new_ones(operator.range))
    rows, columns = (torch.where(sums > 0, 1 / sums, 0) for sums in (rows, columns))
    image = sinogram.new_zeros((*sinogram.shape[:-2], *operator.domain)) if initial is None else initial
    for _ in range(iterations):
        image = image + columns * operator.H(rows * (sinogram - operator(image)))
        image = image.clamp_min(0) if nonnegative else image
        yield image


def _positions(geometry: BeamGeometry) -> tuple[Tensor, float]:
    """Where bins lie and their pitch, on a detector moved to the axis of rotation."""
    bins = torch.arange(geometry.bins, dtype=torch.float64) - (geometry.bins - 1) / 2
    return (bins * geometry.pitch + geometry.offset) / geometry.magnification, geometry.pitch / geometry.magnification


def _obliquity(geometry: BeamGeometry) -> Tensor:
    """Cosine of the angle between a ray and the central one."""
    if geometry.parallel:
        return torch.ones(geometry.bins)
    return geometry.source / torch.sqrt(geometry.source**2 + _positions(geometry)[0] ** 2)


def _filtered(sinogram: Tensor, geometry: BeamGeometry, window: str) -> Tensor:
    """Convolution with the band-limited ramp, whose samples are known; long enough that it does not wrap."""
    bins, pitch = geometry.bins, _positions(geometry)[1]
    length = scipy.fft.next_fast_len(2 * bins, real=True)
    lag = np.minimum(np.arange(length), length - np.arange(length))
    ramp = np.zeros(length)
    ramp[lag % 2 == 1] = -1 / (np.pi * lag[lag % 2 == 1] * pitch) ** 2
    ramp[0] = 1 / (4 * pitch**2)
    response = np.fft.rfft(ramp).real * pitch
    if window == "hann":
        response *= 0.5 * (1 + np.cos(2 * np.pi * np.fft.rfftfreq(length)))
    spectrum = torch.fft.rfft(sinogram, n=length) * torch.from_numpy(response).to(sinogram)
    filtered: Tensor = torch.fft.irfft(spectrum, n=length)
    return filtered[..., :bins]
