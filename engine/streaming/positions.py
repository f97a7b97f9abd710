"""Where the readouts of a non-Cartesian frame lie in k-space, and how much of it each sample stands for."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import torch

from ..baselines.radial import density_compensation
from ..errors import PeerError
from ..headers import AcquisitionFlag as Flag
from ..headers import has_flag
from ..messages import EncodingSpace
from ..preparation.density import turned_density
from ..preparation.trajectory import GOLDEN_RATIO, normalize_trajectory

__all__ = ["Geometry", "Positions"]

_ITERATIONS = 10
"""Of density compensation where there is no closed form: weights differ from those of 30 iterations by 1.5 to 8 %."""
_BOX = 1.1
"""From this ratio of the largest radius to the largest extent on, k-space is filled as a box, else as an ellipsoid."""


class Geometry(msgspec.Struct, frozen=True, eq=False):
    """Positions of all samples and what follows from them.

    points: (readouts, samples, 2 or 3), cycles per reconstructed field of view, inside the reconstructed matrix. weights:
    float32 (readouts, samples), cells of the grid that a sample stands for, 0 for samples that are left out. acceleration:
    cells in the part of k-space that the readouts reach, over those that are sampled, at least 1.
    """

    points: torch.Tensor
    weights: torch.Tensor
    acceleration: float

    def acceleration_within(self, radius: float) -> float:
        """The same for the center, up to `radius` cycles per field of view (less where k-space ends earlier)."""
        far = self.points.abs().flatten(0, -2).amax(0).clamp(max=radius)
        inside = torch.linalg.vector_norm(self.points / far.clamp_min(0.5), dim=-1) <= 1
        sampled = float(self.weights[inside].clamp(max=1.0).sum())
        return _ellipsoid(far.clamp_min(0.5).tolist()) / max(sampled, 1e-6)


class Positions:
    """Brings the readouts of one encoding space to their places."""

    def __init__(self, space: EncodingSpace) -> None:
        self.space = space
        self._ratio = [a / b for a, b in zip(space.recon_fov_mm, space.encoded_fov_mm, strict=True)]
        self._depth = space.recon_matrix[2]

    def key(self, headers: np.ndarray, received: np.ndarray) -> bytes:
        """What decides on the geometry: equal keys, equal geometries."""
        idx = headers["idx"]
        parts = [received, headers["discard_pre"], headers["discard_post"]]
        if not received.shape[-1]:
            parts += [headers["flags"] & Flag.IS_REVERSE.bit, headers["center_sample"], self._numbers(headers)]
        if self._depth > 1:
            parts.append(idx["kspace_encode_step_2"])
        return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)

    def geometry(self, headers: np.ndarray, received: np.ndarray) -> Geometry:
        """Geometry of finite readouts: header records (n,) and trajectory as received, float32 (n, samples, dimensions).

        Without a trajectory, spokes are drawn by their counters. Raises `StreamError` for a trajectory that cannot be used.
        """
        if received.shape[-1]:
            found = normalize_trajectory(torch.from_numpy(received), self.space)
            points, sent = found.points, found.density
        else:
            points, sent = self._drawn(headers, received.shape[1]), None
        if self._depth == 1:
            points = points[..., :2]
        points = points * torch.tensor(self._ratio[: points.shape[-1]], dtype=points.dtype)
        points, weights = self._weighted(headers, points)
        if sent is not None and float(sent.sum()) > 0:  # of any scale, on the wire
            weights = sent * (weights.sum() / sent.sum())
        return self._kept(headers, points, weights)

    def _kept(self, headers: np.ndarray, points: torch.Tensor, weights: torch.Tensor) -> Geometry:
        """Leave out what the scanner wants discarded and what lies beyond the reconstructed matrix."""
        half = torch.tensor(self.space.recon_matrix[: points.shape[-1]], dtype=points.dtype) / 2
        sample, count = np.arange(points.shape[1]), points.shape[1]
        wanted = sample >= headers["discard_pre"][:, None].astype(np.int64)
        wanted &= sample < count - headers["discard_post"][:, None].astype(np.int64)
        used = (points.abs() <= half).all(dim=-1) & torch.from_numpy(wanted)
        if not bool(used.all()):
            points, weights = points * used[..., None], weights * used
        return Geometry(points, weights.to(torch.float32), _acceleration(points, weights))

    def _weighted(self, headers: np.ndarray, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Points and weights; flat readouts of a volume are put into their partitions, each with weights of its own."""
        if points.shape[-1] == 3 or self._depth == 1:
            return points, self._density(points)
        step = headers["idx"]["kspace_encode_step_2"].astype(np.int64)
        limit = self.space.limits.get("kspace_encode_step_2")
        center = limit.center if limit else self.space.encoded_matrix[2] // 2
        weights = points.new_zeros(points.shape[:2], dtype=torch.float32)
        for part in np.unique(step):
            same = torch.from_numpy(step == part)
            weights[same] = self._density(points[same])
        height = torch.from_numpy((step - center) * self._ratio[2]).to(points.dtype)
        height = height[:, None, None].expand(*points.shape[:2], 1)
        return torch.cat((points, height), dim=-1), weights * self._ratio[2]

    def _density(self, points: torch.Tensor) -> torch.Tensor:
        weights = turned_density(points)
        if weights is not None:
            return weights
        sizes = [max(n, 2 * math.ceil(far)) for n, far in zip(self.space.recon_matrix, _extents(points), strict=False)]
        return density_compensation(points, (1, *sizes[::-1])[-3:], iterations=_ITERATIONS)

    def _numbers(self, headers: np.ndarray) -> np.ndarray:
        """Number of each spoke in the series that goes on over the repetitions."""
        idx, limit = headers["idx"], self.space.limits.get("kspace_encode_step_1")
        steps: np.ndarray = idx["kspace_encode_step_1"].astype(np.int64)
        if self.space.trajectory != "goldenangle" or limit is None or steps.max() > limit.maximum:
            return steps
        return steps - limit.minimum + limit.count * idx["repetition"].astype(np.int64)

    def _drawn(self, headers: np.ndarray, samples: int) -> torch.Tensor:
        """Spokes by their counters, where the scanner sent no trajectory, in cycles per encoded field of view."""
        if self.space.trajectory not in ("radial", "goldenangle"):
            raise PeerError(
                f"{self.space.trajectory} readouts came without a trajectory; only radial ones can be drawn: send it with them"
            )
        center = int(headers["center_sample"][0])
        center = center if center < samples else samples // 2
        circle = 2 * math.pi if center < samples // 8 else math.pi
        angle = torch.from_numpy(self._numbers(headers).astype(np.float64)) * (circle * self._turn(headers))
        # the longer side reaches the edge of k-space
        radius = (torch.arange(samples, dtype=torch.float64) - center) / max(center, samples - center)
        reverse = torch.from_numpy(np.asarray(has_flag(headers["flags"], Flag.IS_REVERSE)))
        along = torch.where(reverse[:, None], radius.flip(0), radius) * (self.space.encoded_matrix[0] / 2)
        return (along[..., None] * torch.stack([angle.cos(), angle.sin()], dim=-1)[:, None]).to(torch.float32)

    def _turn(self, headers: np.ndarray) -> float:
        """Angle from one spoke to the next, of the half or full circle that spokes divide."""
        if self.space.trajectory == "goldenangle":
            return 1 / GOLDEN_RATIO
        limit, highest = self.space.limits.get("kspace_encode_step_1"), int(self._numbers(headers).max())
        announced = limit.maximum + 1 if limit else self.space.encoded_matrix[1]
        return 1 / max(announced, highest + 1)


def _extents(points: torch.Tensor) -> list[float]:
    extents: list[float] = points.abs().flatten(0, -2).amax(0).tolist()
    return extents


def _ellipsoid(half: list[float]) -> float:
    """Area or volume by its half axes."""
    return (math.pi if len(half) == 2 else 4 / 3 * math.pi) * math.prod(half)


def _acceleration(points: torch.Tensor, weights: torch.Tensor) -> float:
    """Cells that the readouts reach, over the cells that their samples stand for, each at most one."""
    half = [max(far, 0.5) for far in _extents(points)]
    box = float(torch.linalg.vector_norm(points / torch.tensor(half), dim=-1).max()) > _BOX
    reached = math.prod(2 * far for far in half) if box else _ellipsoid(half)
    return max(1.0, reached / max(1.0, float(weights.clamp(max=1.0).sum())))
