"""From coil images to one image."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators.cartesian import Fourier
from ..operators.linear import LinearOperator

__all__ = ["root_sum_of_squares", "sense_combine", "zero_filled"]


def root_sum_of_squares(images: Tensor) -> Tensor:
    """sqrt(sum over coils |image|^2): coil images (..., coil, z, y, x) to a real image (..., z, y, x)."""
    # Squares of real and imaginary parts, coil after coil: five times as fast on a CPU as abs() of all coils.
    parts = torch.view_as_real(images).unbind(-5)
    total = parts[0] * parts[0]
    for part in parts[1:]:
        total.addcmul_(part, part)
    return torch.add(total[..., 0], total[..., 1]).sqrt_()


def sense_combine(images: Tensor, maps: Tensor) -> Tensor:
    """Sum conj(maps) * images / sum |maps|^2, the least-squares combination of coil images whose noise is white.

    images: (..., coil, z, y, x); maps: (coil, z, y, x). Returns (..., z, y, x), 0 where every map is 0. (Roemer et al., MRM
    16, 1990.)
    """
    if images.shape[-4:] != maps.shape:
        raise ValueError(
            f"images has shape {tuple(images.shape)}, its last axes must be those of maps {tuple(maps.shape)}"
        )
    coils, sees = images.unbind(-4), maps.conj().resolve_conj()
    total = sees[0] * coils[0]
    for coil in range(1, len(coils)):
        total.addcmul_(sees[coil], coils[coil])
    power = root_sum_of_squares(maps).square_()
    return total.mul_(torch.where(power > 0, 1 / power, torch.zeros_like(power)))


def zero_filled(kspace: Tensor, maps: Tensor | None = None, *, axes: tuple[int, ...] = (-2, -1)) -> Tensor:
    """The image with 0 for what was not sampled: inverse transform, then the coils together.

    kspace: centered, (..., coil, z, y, x). axes: those that are k-space. Returns a complex image by `sense_combine` with
    maps (coil, z, y, x), a real one by `root_sum_of_squares` without; shape (..., z, y, x).
    """
    transform: LinearOperator = Fourier(kspace.shape[-4:], axes, dtype=kspace.dtype, device=kspace.device)
    images = transform.H(kspace)
    return root_sum_of_squares(images) if maps is None else sense_combine(images, maps)
