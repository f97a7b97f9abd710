"""Radial, spiral and any other non-Cartesian scan: density compensation, gridding, iterative SENSE.

Trajectories have shape (readouts, samples, dims), in cycles per field of view; k-space [..., coil, z, readouts, samples].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..operators.nonuniform import NonCartesianSense, NonUniformFourier
from .combine import root_sum_of_squares, sense_combine
from .sense import cg_sense

__all__ = ["density_compensation", "gridding", "noncartesian_sense", "radial_density"]


def density_compensation(
    trajectory: Tensor, shape: Sequence[int], *, iterations: int = 15, accuracy: float = 1e-3
) -> Tensor:
    """The volume of k-space that each sample stands for, in cells of the Cartesian grid: real, (readouts, samples).

    w <- w / (K w) until the weighted samples, blurred by K, are flat (Pipe, Menon, MRM 41, 1999). K is the product of squared
    sincs, the narrowest positive kernel that does not alias in the field of view: in the image a triangle over twice its
    width. shape: of the image, (..., z, y, x). Integer k on the full grid give 1.
    """
    dims = trajectory.shape[-1]
    pixels = tuple(shape[-dims:])
    # On a grid of twice the width the same frequency has twice the number.
    doubled = (1,) * (3 - dims) + tuple(2 * size for size in pixels)
    transform = NonUniformFourier(2 * trajectory, doubled, accuracy=accuracy)
    window = _triangles(pixels).to(trajectory.device) * 2**dims
    density = torch.ones(transform.range, dtype=torch.complex64, device=trajectory.device)
    for _ in range(iterations):
        blurred = transform(transform.H(density) * window).real
        density = density / blurred.clamp_min_(1e-6)
    return density.real[0]


def radial_density(trajectory: Tensor) -> Tensor:
    """The same for straight readouts through the center whose angles divide the half circle evenly: real, (readouts, samples).

    A ring of width dk at radius |k| is shared by all readouts: pi |k| dk / readouts, at the center pi dk^2 / (4 readouts).
    Two dimensions only; raises ValueError for three.
    """
    if trajectory.shape[-1] != 2:
        raise ValueError(
            f"trajectory has {trajectory.shape[-1]} dimensions; the ramp is that of 2, use density_compensation"
        )
    radius = torch.linalg.vector_norm(trajectory, dim=-1)
    width = torch.linalg.vector_norm(trajectory.diff(dim=1), dim=-1).mean(dim=1, keepdim=True)
    ring: Tensor = torch.maximum(radius, width / 4) * width * (math.pi / len(trajectory))
    return ring


def gridding(
    kspace: Tensor,
    trajectory: Tensor,
    shape: Sequence[int],
    *,
    maps: Tensor | None = None,
    weights: Tensor | None = None,
    accuracy: float = 1e-3,
) -> Tensor:
    """The adjoint transform of the density-compensated samples, coils combined: an image (..., z, y, x).

    kspace: (..., coil, z, readouts, samples). shape: of the image, (z, y, x). weights: real, (readouts, samples), by default
    `density_compensation`. With maps (coil, z, y, x) the image is complex, by `sense_combine`; else `root_sum_of_squares`.
    """
    if weights is None:
        weights = density_compensation(trajectory, shape, accuracy=accuracy)
    transform = NonUniformFourier(trajectory, (kspace.shape[-4], *shape), accuracy=accuracy)
    images = transform.H(kspace * weights.to(kspace.device))
    return root_sum_of_squares(images) if maps is None else sense_combine(images, maps)


def noncartesian_sense(
    kspace: Tensor,
    trajectory: Tensor,
    maps: Tensor,
    *,
    iterations: int = 12,
    regularization: float = 0.01,
    weights: Tensor | None = None,
    accuracy: float = 1e-3,
) -> Tensor:
    """Minimize |sqrt(w) (A x - kspace)|^2 + regularization |x|^2 by conjugate gradients (Pruessmann et al., MRM 46, 2001).

    kspace: (..., coil, z, readouts, samples). maps: (coil, z, y, x). weights: w, real, (readouts, samples), by default
    `density_compensation`; they bring A^H w A near the identity, so that few iterations do and `regularization` means what it
    means in `cg_sense`. Returns the image, (..., z, y, x).
    """
    if weights is None:
        weights = density_compensation(trajectory, maps.shape[1:], accuracy=accuracy)
    operator = NonCartesianSense(maps, trajectory, weights=weights, accuracy=accuracy)
    return cg_sense(operator, operator.weigh(kspace), iterations=iterations, regularization=regularization)


def _triangles(pixels: Sequence[int]) -> Tensor:
    """Product of 1 - |d|/N over the axes, d from -N to N - 1; three axes, those missing of length 1."""
    window = torch.ones((1,) * 3)
    for axis, size in enumerate(reversed(pixels)):
        ramp = 1 - (torch.arange(2 * size) - size).abs() / size
        window = window * ramp.reshape((-1,) + (1,) * axis)
    return window
