"""SAKE: parallel imaging without coil maps or calibration lines, by low rank of k-space."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..operators.cartesian import Fourier
from ..operators.hankel import image_low_rank

__all__ = ["sake", "sake_steps"]


def sake(
    kspace: Tensor,
    mask: Tensor,
    *,
    window: int = 6,
    rank: int = 54,
    iterations: int = 40,
    axes: Sequence[int] = (-2, -1),
) -> Tensor:
    """Fill k-space so that its windows span few dimensions; coil images (coil, z, y, x). (Shin et al., MRM 72, 2014.)

    kspace: complex, (coil, z, y, x), centered. mask: boolean, broadcasts against (z, y, x). window: points per axis.
    rank: dimensions kept of the coil * window^2; 1.5 window^2 is usual. axes: those that are k-space in the data; along y
    and x the windows lie, whichever of the two have been transformed already. The projection is done in image space
    (see `engine.operators.hankel`), where the windows wrap round the border of k-space; the measured samples are put
    back after each. Combine the coil images by `root_sum_of_squares`.
    """
    steps = sake_steps(kspace, mask, window=window, rank=rank, iterations=iterations, axes=axes)
    return collections.deque(steps, maxlen=1)[0]


def sake_steps(
    kspace: Tensor,
    mask: Tensor,
    *,
    window: int = 6,
    rank: int = 54,
    iterations: int = 40,
    axes: Sequence[int] = (-2, -1),
) -> Iterator[Tensor]:
    """Yield the coil images after each iteration of `sake`."""
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, at least 1 is needed")
    fourier = Fourier(kspace.shape, axes, dtype=kspace.dtype, device=kspace.device)
    images = fourier.H(kspace * mask)
    for _ in range(iterations):
        slices = [image_low_rank(part, window, rank) for part in images.unbind(-3)]
        images = fourier.H(torch.where(mask, kspace, fourier(torch.stack(slices, -3))))
        yield images
