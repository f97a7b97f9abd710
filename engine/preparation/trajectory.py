"""Non-Cartesian trajectories: standard ones, and what scanners send brought to one unit.

Everywhere else in the package k-space positions are in cycles per field of view, -N/2 <= k < N/2, ordered (kx, ky[, kz]).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import StreamError
from ..messages import EncodingSpace

__all__ = ["Trajectory", "Units", "normalize_trajectory", "radial_trajectory", "spiral_trajectory"]

Angles = Literal["uniform", "golden", "tiny_golden"]
Units = Literal["auto", "unit", "cycles", "per_meter"]

GOLDEN_RATIO = (1 + math.sqrt(5)) / 2
TINY_GOLDEN_ORDER = 7
SLACK = {"unit": 1.05, "cycles": 1.1, "per_meter": 1.25}
"""How far beyond half the matrix a trajectory may go in each unit: gradient delays and ramps shift it outwards."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Positions in cycles per field of view, shape (..., samples, 2 or 3), density weights (..., samples) where they were
    sent, and the unit that they came in."""

    points: torch.Tensor
    density: torch.Tensor | None
    units: Units


def radial_trajectory(
    spokes: int, samples: int, *, matrix: int | None = None, angles: Angles = "golden", first: int = 0
) -> torch.Tensor:
    """Spokes through the center, float64, shape (spokes, samples, 2).

    matrix: N, default `samples`; fewer than the samples where the readout is oversampled. first: number of the first spoke,
    for a stream that goes on. angles: uniform, pi/spokes apart; golden, 111.25 degrees (Winkelmann et al., IEEE TMI 26:68, 2007);
    tiny_golden, 23.6 degrees, the 7th of its series (Wundrak et al., IEEE TMI 34:1262, 2015).
    """
    steps = {
        "uniform": math.pi / spokes,
        "golden": math.pi / GOLDEN_RATIO,
        "tiny_golden": math.pi / (GOLDEN_RATIO + TINY_GOLDEN_ORDER - 1),
    }
    angle = steps[angles] * torch.arange(first, first + spokes, dtype=torch.float64)
    radius = (torch.arange(samples, dtype=torch.float64) - samples // 2) * ((matrix or samples) / samples)
    return radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=-1)[:, None]


def spiral_trajectory(interleaves: int, samples: int, matrix: int) -> torch.Tensor:
    """Archimedean spirals from the center outwards, about equally fast all along; float64, shape (interleaves, samples, 2).

    Together the interleaves are one cycle per field of view apart (Nyquist) for a matrix of N points.
    """
    progress = torch.sqrt(torch.arange(samples, dtype=torch.float64) / samples)
    start = 2 * math.pi / interleaves * torch.arange(interleaves, dtype=torch.float64)
    angle = start[:, None] + math.pi * matrix / interleaves * progress
    return (matrix / 2 * progress)[:, None] * torch.stack([angle.cos(), angle.sin()], dim=-1)


def normalize_trajectory(
    received: torch.Tensor, space: EncodingSpace, *, units: Units = "auto", density: bool | None = None
) -> Trajectory:
    """A trajectory as it was received, in cycles per field of view.

    received: float, shape (..., samples, dimensions), in one of the units that MRD files use: `unit`, -0.5 to 0.5; `cycles`
    per field of view, -N/2 to N/2; `per_meter`, cycles per meter. `auto` takes the first of them whose range holds all points,
    so it needs at least one readout that reaches the edge of k-space.
    density: whether the last of 3 dimensions is a density weight; None decides: it is one when the encoded matrix is flat,
    unless the header declares 3 dimensions; a third dimension that is zero throughout is left out.
    Raises StreamError on NaN, on a number of dimensions other than 2 or 3 and on a range that fits no unit.
    """
    _check(received)
    points, weights = _split(received, space, density=density)
    chosen = _decide(points, space) if units == "auto" else units
    scale = torch.tensor(_scales(space)[chosen][: points.shape[-1]], dtype=points.dtype, device=points.device)
    return Trajectory(points * scale, weights, chosen)


def _check(received: torch.Tensor) -> None:
    if received.shape[-1] not in (2, 3):
        raise StreamError(
            f"trajectory has {received.shape[-1]} dimensions; 2 or 3 are understood: set trajectory_dimensions"
        )
    if not torch.isfinite(received).all():
        raise StreamError("trajectory holds NaN or infinity; these readouts cannot be placed in k-space")


def _split(
    received: torch.Tensor, space: EncodingSpace, *, density: bool | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Positions, and the density weights if the third dimension holds them."""
    flat = space.encoded_matrix[2] == 1
    if received.shape[-1] == 2:
        return received, None
    if flat and density is not True and not received[..., 2].any():
        return received[..., :2], None
    if density is None:
        density = flat and space.trajectory_dimensions != 3
    if not density:
        return received, None
    if (received[..., 2] < 0).any():
        raise StreamError(
            "the third trajectory dimension has negative values, so it is no density weight; declare 3 dimensions"
        )
    return received[..., :2], received[..., 2]


def _scales(space: EncodingSpace) -> dict[str, tuple[float, ...]]:
    """Factors per axis from each unit to cycles per field of view, in the order in which they are tried."""
    meters = tuple(fov / 1000 for fov in space.encoded_fov_mm)
    return {"unit": tuple(map(float, space.encoded_matrix)), "cycles": (1.0, 1.0, 1.0), "per_meter": meters}


def _decide(points: torch.Tensor, space: EncodingSpace) -> Units:
    largest = points.abs().flatten(0, -2).amax(0).tolist()
    candidates: tuple[Units, ...] = ("unit", "cycles", "per_meter")
    for name in candidates:
        reach = [k * s / (n / 2) for k, s, n in zip(largest, _scales(space)[name], space.encoded_matrix, strict=False)]
        if max(reach) <= SLACK[name]:
            return name
    raise StreamError(
        f"trajectory reaches {max(largest):g}, which is neither -0.5 to 0.5, nor within half of the matrix "
        f"{space.encoded_matrix}, nor in cycles per meter for a field of view of {space.encoded_fov_mm} mm; set its units"
    )
