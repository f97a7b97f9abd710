"""From a closed non-Cartesian frame to an image: gridding when fully sampled, iterative SENSE when not."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..baselines.radial import density_compensation, gridding, noncartesian_sense
from ..config import SystemConfig
from ..errors import PeerError, StreamError
from ..messages import EncodingSpace
from ..operators.nonuniform import NonUniformFourier
from ..preparation.coil_maps import espirit
from ..preparation.filters import to_kspace
from ..preparation.trajectory import normalize_trajectory, radial_trajectory
from .frames import GatheredFrame
from .lanes import ClosedFrame
from .results import Reconstruction, StageClock

__all__ = ["GatheredReconstructor"]

_UNDERSAMPLED = 1.15
"""Net acceleration from which coil maps are needed."""
_CALIBRATION = 32
"""Matrix of the low-resolution images that coil maps come from."""


class GatheredReconstructor:
    """Reconstructs the frames of one non-Cartesian encoding space; keeps density weights and coil maps."""

    def __init__(self, config: SystemConfig, space: EncodingSpace) -> None:
        self.config, self.space = config, space
        x, y, z = space.recon_matrix
        self._shape = (z, y, x)
        self._maps: dict[int, torch.Tensor] = {}
        self._known: tuple[np.ndarray, torch.Tensor, torch.Tensor] | None = None

    def reconstruct(self, closed: ClosedFrame) -> Reconstruction:
        """Image of a closed frame."""
        return self._attempt(closed, iterative=True)

    def fallback(self, closed: ClosedFrame) -> Reconstruction:
        """The gridded image, for when nothing better can be had."""
        return self._attempt(closed, iterative=False)

    def _attempt(self, closed: ClosedFrame, *, iterative: bool) -> Reconstruction:
        frame, clock = self._frame(closed), StageClock()
        with clock.stage("trajectory"):
            points, weights = self._geometry(frame)
        data = frame.samples[:, None, : frame.readouts]
        acceleration = self._acceleration(points, weights)
        method, reason = self._choose(acceleration), ""
        if not iterative:
            method, reason = "gridding", "fallback"
        if method == "cg_sense":
            with clock.stage("coil_maps"):
                maps = self._coil_maps(closed.key.slice, data, points, weights)
        with clock.stage("reconstruction"):
            if method == "cg_sense":
                settings = self.config.reconstruction
                image = noncartesian_sense(
                    data,
                    points,
                    maps,
                    iterations=settings.iterations,
                    regularization=settings.regularization,
                    weights=weights,
                )
            else:
                image = gridding(data, points, self._shape, weights=weights)
        return Reconstruction(
            image=image.reshape(self._shape),
            method=method,
            reason=reason,
            acceleration=acceleration,
            stages=clock.stages,
        )

    @staticmethod
    def _frame(closed: ClosedFrame) -> GatheredFrame:
        if not isinstance(closed.frame, GatheredFrame):
            raise TypeError(f"a non-Cartesian reconstruction got a {type(closed.frame).__name__}")
        return closed.frame

    def _choose(self, acceleration: float) -> str:
        method = self.config.reconstruction.method
        if method == "auto":
            return "cg_sense" if acceleration > _UNDERSAMPLED else "gridding"
        return "cg_sense" if method in ("sense", "cg_sense") else "gridding"

    def _geometry(self, frame: GatheredFrame) -> tuple[torch.Tensor, torch.Tensor]:
        """Trajectory in cycles per reconstructed field of view and density weights; kept while the trajectory repeats."""
        received = frame.trajectory[: frame.readouts]
        if received.shape[-1] == 0:
            received = self._drawn(frame)
        if self._known is not None and np.array_equal(self._known[0], received):
            return self._known[1], self._known[2]
        found = normalize_trajectory(torch.from_numpy(received), self.space)
        if found.points.shape[-1] == 2 and self._shape[0] > 1:
            raise PeerError(f"a 2-D trajectory cannot fill a matrix of {self._shape[0]} partitions")
        ratio = [a / b for a, b in zip(self.space.recon_fov_mm, self.space.encoded_fov_mm, strict=True)]
        points = found.points * torch.tensor(ratio[: found.points.shape[-1]], dtype=found.points.dtype)
        weights = found.density
        if weights is None:
            weights = density_compensation(points, self._shape)
        self._known = (received.copy(), points, weights.to(torch.float32))
        return points, self._known[2]

    def _drawn(self, frame: GatheredFrame) -> np.ndarray:
        """Radial trajectory by the order of the readouts, where the scanner sent none."""
        if self.space.trajectory not in ("radial", "goldenangle"):
            raise StreamError(
                f"{self.space.trajectory} readouts came without a trajectory; only radial ones can be drawn"
            )
        angles = "golden" if self.space.trajectory == "goldenangle" else "uniform"
        count, samples = frame.readouts, frame.samples.shape[-1]
        spokes = radial_trajectory(count, samples, matrix=self.space.encoded_matrix[0], angles=angles)
        order = np.argsort(np.argsort(frame.steps[:count], kind="stable"))
        return np.asarray(spokes[torch.from_numpy(order)], dtype=np.float32)

    def _acceleration(self, points: torch.Tensor, weights: torch.Tensor) -> float:
        """Area of k-space that the readouts reach, over the area that their samples stand for, each at most one cell."""
        reach = float(torch.linalg.vector_norm(points, dim=-1).max())
        area = math.pi * reach**2 if points.shape[-1] == 2 else 4 / 3 * math.pi * reach**3
        return max(1.0, area / max(1.0, float(weights.clamp(max=1.0).sum())))

    def _coil_maps(self, where: int, data: torch.Tensor, points: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Maps from the center of k-space, which every readout through it oversamples."""
        if where in self._maps and self.config.coil_maps.refresh == "scan":
            return self._maps[where]
        settings, size = self.config.coil_maps, _CALIBRATION
        small = tuple(min(size, n) for n in self._shape)
        near = torch.linalg.vector_norm(points, dim=-1) <= size / 2
        low = data * (weights * near)
        images = NonUniformFourier(points * near[..., None], (data.shape[0], *small)).H(low)
        axes = (-2, -1) if small[0] == 1 else (-3, -2, -1)
        self._maps[where] = espirit(
            to_kspace(images, axes),
            self._shape,
            kernel=settings.kernel,
            threshold=settings.threshold,
            crop=settings.crop,
            calibration_size=settings.calibration_lines,
        )
        return self._maps[where]
