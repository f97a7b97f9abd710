"""What else is asked of an estimate, X in z = X(z''): low rank over the coils, limits.

Branches are merged by the program itself (`loop`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels.coil_matrix import apply
from ..config_priors import ConstraintConfig
from ..errors import ConfigError
from ..operators.hankel import Hankel, coil_matrices, image_low_rank, leading_subspace

__all__ = ["CONSTRAINTS", "Constraint", "clip", "frozen_low_rank", "low_rank", "make_constraint"]

Constraint = Callable[[Tensor], Tensor]
"""From an estimate to one that fits: complex, shape (*batch, coil, z, y, x) or, for what needs no coils, any."""


def make_constraint(config: ConstraintConfig) -> Constraint:
    """The constraint of a stage."""
    return CONSTRAINTS[config.kind](config)


def low_rank(images: Tensor, window: int, rank: int, share: float = 1.0, energy: float = 1.0) -> Tensor:
    """Low rank of the Hankel matrix of k-space over the coils (SAKE), or over frames in their place; (*batch, coil, z, y, x).

    Every slice on its own, with a subspace of its own that is found anew at each call; `frozen_low_rank` keeps one. A rank of
    window^2 coils or more is no constraint; share: of window^2 coils that the rank is at most; energy: share of that of the
    matrix for which a lower rank is enough.
    """
    columns = window**2 * images.shape[-4]
    rank = min(rank, max(1, int(share * columns)))
    if rank >= columns and energy == 1:
        return images
    planes = images.movedim(-4, -3)
    flat = [image_low_rank(coils, window, rank, energy) for coils in planes.reshape(-1, *planes.shape[-3:]).unbind()]
    return torch.stack(flat).reshape(planes.shape).movedim(-3, -4)


def _coils_low_rank(config: ConstraintConfig) -> Constraint:
    return lambda images: low_rank(images, config.window, config.rank, config.share, config.energy)


def _frames_low_rank(config: ConstraintConfig) -> Constraint:
    """Of frames (frame, coil, z, y, x): each coil on its own."""

    def constrain(images: Tensor) -> Tensor:
        if images.ndim < 5:
            raise ConfigError("constraint.over = 'frames': there are none; set reconstruction.frames to 2 or more")
        return low_rank(images.transpose(0, 1), config.window, config.rank, config.share, config.energy).transpose(0, 1)

    return constrain


def frozen_low_rank(calibration: Tensor, shape: tuple[int, int], *, window: int, rank: int) -> Constraint:
    """The projection onto the subspace of fully sampled k-space center: one small matrix product per pixel.

    calibration: complex, (coil, y, x), centered. shape: (y, x) of the images (*batch, coil, z, y, x) that it is for. What is
    found once here, `low_rank` finds at every step.
    """
    rows = Hankel(calibration.shape, window)(calibration.to(torch.complex128))
    matrices = coil_matrices(leading_subspace(rows.mH @ rows, rank), calibration.shape[0], shape)
    return lambda images: apply(matrices.to(images.dtype), images.movedim(-4, -3)).movedim(-3, -4)


def clip(images: Tensor, limit: float) -> Tensor:
    """Real and imaginary part brought between -limit and limit; any shape."""
    return torch.view_as_complex(torch.view_as_real(images.resolve_conj()).clamp(-limit, limit))


CONSTRAINTS: dict[str, Callable[[ConstraintConfig], Constraint]] = {
    "none": lambda _: lambda images: images,
    "low_rank": lambda config: _frames_low_rank(config) if config.over == "frames" else _coils_low_rank(config),
    "clip": lambda config: lambda images: clip(images, config.limit),
}
"""Constraints by the name that a configuration calls them."""
