"""Computed tomography with a flat detector: fan and parallel beams, their line integrals and the exact adjoint.

Images have shape (..., y, x), sinograms (..., view, bin). At angle 0 rays go along +y and the detector's axis along +x; angles
turn counter-clockwise, from x to y.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...kernels import tomography as kernels
from .linear import LinearOperator

__all__ = ["BeamGeometry", "RayTransform", "even_angles"]


def even_angles(views: int, *, span: float = 2 * math.pi, first: float | None = None) -> Tensor:
    """Angles of views evenly over `span`, in radians, float64. first: of view 0; by default the middle of its share."""
    share = span / views
    return (share / 2 if first is None else first) + share * torch.arange(views, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class BeamGeometry:
    """Where the rays of a scan are. Lengths in one unit, such as millimetres.

    shape: pixels of the image, (ny, nx), centered on the axis of rotation. angles: (view,), radians. bins: of the detector,
    pitch apart, centered but for `offset`. source: its distance from the axis; infinite for parallel beams. detector:
    distance of the detector from the axis on the other side. Raises ValueError for what cannot be.
    """

    shape: tuple[int, int]
    pixel: float
    angles: Tensor
    bins: int
    pitch: float
    source: float = math.inf
    detector: float = 0.0
    offset: float = 0.0
    views: Tensor = field(init=False)
    """The rays as `kernels.tomography` takes them."""

    def __post_init__(self) -> None:
        for name in ("pixel", "pitch"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, a positive length is needed")
        if len(self.shape) != 2 or min(self.shape) < 1 or self.bins < 1:
            raise ValueError(f"shape is {self.shape}, bins is {self.bins}; needed are (ny, nx) and bins of at least 1")
        if self.angles.ndim != 1 or not len(self.angles) or not bool(self.angles.isfinite().all()):
            raise ValueError(f"angles has shape {tuple(self.angles.shape)}; needed are finite numbers along one axis")
        corner = self.pixel * math.hypot(*self.shape) / 2
        if not self.source > corner or not 0 <= self.detector < math.inf or not math.isfinite(self.offset):
            raise ValueError(
                f"source is {self.source}, detector {self.detector}, offset {self.offset}; needed: source above {corner:g}, "
                "the distance of the image's corners, detector not negative, all finite but for the source"
            )
        object.__setattr__(self, "views", self._rays())

    @property
    def parallel(self) -> bool:
        """Whether the source is infinitely far away."""
        return math.isinf(self.source)

    @property
    def magnification(self) -> float:
        """Of the axis of rotation on the detector."""
        return 1.0 if self.parallel else (self.source + self.detector) / self.source

    def part(self, chosen: Tensor | Sequence[int] | slice) -> BeamGeometry:
        """The same with some of the views, such as `slice(None, None, 6)`."""
        rest = (self.bins, self.pitch, self.source, self.detector, self.offset)
        return BeamGeometry(self.shape, self.pixel, self.angles[chosen], *rest)

    def _rays(self) -> Tensor:
        """(y, x) of starts and directions, counted in pixels from pixel [0, 0]."""
        angles = self.angles.to(torch.float64)
        axis = torch.stack([angles.sin(), angles.cos()], 1) / self.pixel
        ahead = torch.stack([angles.cos(), -angles.sin()], 1) / self.pixel
        first = axis * ((0.5 - self.bins / 2) * self.pitch + self.offset)
        center = torch.tensor([(n - 1) / 2 for n in self.shape], dtype=torch.float64)
        still = torch.zeros_like(axis)
        if self.parallel:
            return torch.cat([first + center, axis * self.pitch, ahead, still], 1)
        way = ahead * (self.source + self.detector) + first
        return torch.cat([center - ahead * self.source, still, way, axis * self.pitch], 1)


class RayTransform(LinearOperator):
    """Line integrals of images along the rays of a `BeamGeometry`, by Joseph's method; `H` is the exact adjoint."""

    def __init__(self, geometry: BeamGeometry, *, device: torch.device | str | None = None) -> None:
        super().__init__(geometry.shape, (len(geometry.angles), geometry.bins))
        self.geometry = geometry
        self._views = geometry.views.to(device)

    def _forward(self, x: Tensor) -> Tensor:
        pixel = self.geometry.pixel
        sinogram: Tensor = kernels.ct_project(x, self._views, self.geometry.bins, pixel, pixel)
        return sinogram

    def _backward(self, y: Tensor) -> Tensor:
        pixel = self.geometry.pixel
        image: Tensor = kernels.ct_adjoint(y, self._views, *self.domain, pixel, pixel)
        return image
