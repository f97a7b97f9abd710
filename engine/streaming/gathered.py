"""From a closed non-Cartesian frame to an image: gridding when fully sampled, iterative SENSE when not."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator

import msgspec
import numpy as np
import torch

from ..baselines.combine import root_sum_of_squares
from ..baselines.sense import cg_sense
from ..baselines.solvers import conjugate_gradients
from ..config import SystemConfig
from ..errors import StreamError
from ..messages import EncodingSpace
from ..operators.nonuniform import NonCartesianSense, NonUniformFourier
from ..preparation.coil_maps import espirit
from ..preparation.filters import to_kspace
from .frames import GatheredFrame
from .lanes import ClosedFrame
from .positions import Geometry, Positions
from .results import Reconstruction, StageClock

__all__ = ["GatheredReconstructor"]

_UNDERSAMPLED = 1.15
"""Net acceleration from which coil maps are needed."""
_CALIBRATION = 32
"""Matrix of the low-resolution images that coil maps come from."""
_CALIBRATION_ITERATIONS, _CALIBRATION_WEIGHT = 20, 1e-3
"""Gridding is not enough for coil maps where angles are uneven (golden spirals): SENSE then ends at 0.21 NRMSE, not 0.05."""
_CENTER, _CENTER_ACCELERATION = 8.0, 1.6
"""Coil maps need k-space sampled nearly as the theorem asks up to this many cycles per field of view."""
_THIN_KERNEL = 4
"""ESPIRiT kernel in three dimensions: cost grows with its ninth power."""
_KEPT = 4
"""Trajectories whose weights, plans and operators are kept."""


class _Prepared(msgspec.Struct, eq=False):
    """What depends on the trajectory alone, made once and used again while it repeats."""

    geometry: Geometry
    transform: NonUniformFourier
    operators: dict[int, NonCartesianSense]


class GatheredReconstructor:
    """Reconstructs the frames of one non-Cartesian encoding space; keeps trajectories and, per slice, coil maps."""

    def __init__(self, config: SystemConfig, space: EncodingSpace) -> None:
        self.config, self.space = config, space
        x, y, z = space.recon_matrix
        self._shape = (z, y, x)
        self._positions = Positions(space)
        self._maps: dict[int, torch.Tensor] = {}
        self._known: OrderedDict[bytes, _Prepared] = OrderedDict()

    heavy = True
    """A frame is work enough for several processor threads."""

    def reconstruct(self, closed: ClosedFrame) -> Reconstruction:
        """Image of a closed frame. Readouts that are not finite are left out, and the image says so."""
        return self._attempt(closed, iterative=True)

    def estimates(self, closed: ClosedFrame) -> Iterator[Reconstruction]:
        """The image of a closed frame; there are no previews."""
        yield self.reconstruct(closed)

    def original(self, closed: ClosedFrame) -> Reconstruction:
        """The gridded image."""
        return self.fallback(closed)

    def fallback(self, closed: ClosedFrame) -> Reconstruction:
        """The gridded image, for when nothing better can be had; not a number throughout if there is no trajectory either."""
        try:
            return self._attempt(closed, iterative=False)
        except StreamError:
            return self._nothing("no_trajectory")

    def _attempt(self, closed: ClosedFrame, *, iterative: bool) -> Reconstruction:
        frame, clock = self._frame(closed), StageClock()
        count, reason = frame.readouts, "" if iterative else "fallback"
        data, headers, received = frame.samples[:, :count], frame.headers[:count], frame.trajectory[:count]
        good = _finite(data, received)
        if not good.all():
            data, headers, received, reason = (
                data[:, torch.from_numpy(good)],
                headers[good],
                received[good],
                "not_finite",
            )
        if not len(headers):
            return self._nothing(reason)
        with clock.stage("trajectory"):
            prepared = self._prepare(headers, received, data)
        method = self._choose(prepared.geometry.acceleration) if iterative else "gridding"
        if method == "cg_sense" and not self._ensure_maps(closed.key.slice, data, prepared.geometry, clock):
            method, reason = "gridding", reason or "no_calibration"
        with clock.stage("reconstruction"):
            image = self._solve(method, closed.key.slice, data[:, None], prepared)
        missing, duplicates = self._counted(headers)
        return Reconstruction(
            image=image.reshape(self._shape),
            method=method,
            reason=reason,
            missing=missing,
            duplicates=duplicates,
            acceleration=prepared.geometry.acceleration,
            stages=clock.stages,
        )

    def _nothing(self, reason: str) -> Reconstruction:
        return Reconstruction(image=torch.full(self._shape, math.nan), method="gridding", reason=reason)

    @staticmethod
    def _frame(closed: ClosedFrame) -> GatheredFrame:
        if not isinstance(closed.frame, GatheredFrame):
            raise TypeError(f"a non-Cartesian reconstruction got a {type(closed.frame).__name__}")
        return closed.frame

    def _choose(self, acceleration: float) -> str:
        method = self.config.reconstruction.method
        if method in ("auto", "prior"):  # priors work on Cartesian data so far
            return "cg_sense" if acceleration > _UNDERSAMPLED else "gridding"
        return "cg_sense" if method in ("sense", "cg_sense") else "gridding"

    def _counted(self, headers: np.ndarray) -> tuple[int, int]:
        """Readouts that the header announces and that did not come, and readouts that came again; 0 where it is not said."""
        limits, idx = self.space.limits, headers["idx"]
        names = ("kspace_encode_step_1", "kspace_encode_step_2", "average")
        announced = math.prod(limits[name].count for name in names if name in limits)
        if announced <= 1 or self.space.acceleration != (1, 1) or self.config.trigger.acquisitions:
            return 0, 0
        distinct = len(np.unique(np.stack([idx[name] for name in names]), axis=1).T)
        return max(0, announced - distinct), len(headers) - distinct

    def _prepare(self, headers: np.ndarray, received: np.ndarray, data: torch.Tensor) -> _Prepared:
        """Geometry and plans of a trajectory, the kept ones while it repeats."""
        key = self._positions.key(headers, received)
        prepared = self._known.pop(key, None)
        if prepared is None:
            geometry = self._positions.geometry(headers, received)
            prepared = _Prepared(geometry, NonUniformFourier(geometry.points, (len(data), *self._shape)), {})
        self._known[key] = prepared
        if len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return prepared

    def _solve(self, method: str, where: int, data: torch.Tensor, prepared: _Prepared) -> torch.Tensor:
        weights = prepared.geometry.weights
        if method == "gridding":
            return root_sum_of_squares(prepared.transform.H(data * weights))
        if where not in prepared.operators:
            prepared.operators[where] = NonCartesianSense(self._maps[where], prepared.geometry.points, weights=weights)
        operator, settings = prepared.operators[where], self.config.reconstruction
        return cg_sense(
            operator, operator.weigh(data), iterations=settings.iterations, regularization=settings.regularization
        )

    def _ensure_maps(self, where: int, data: torch.Tensor, geometry: Geometry, clock: StageClock) -> bool:
        """Coil maps of a slice, from the first frame whose center of k-space is sampled well enough."""
        if where in self._maps and self.config.coil_maps.refresh == "scan":
            return True
        if geometry.acceleration_within(_CENTER) > _CENTER_ACCELERATION:
            return where in self._maps
        with clock.stage("coil_maps"):
            self._maps[where] = self._estimate(data, geometry)
        for prepared in self._known.values():
            prepared.operators.pop(where, None)
        return True

    def _estimate(self, data: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        """Maps from the center of k-space: least-squares coil images of low resolution, then ESPIRiT."""
        settings, flat = self.config.coil_maps, self._shape[0] == 1
        small = tuple(min(_CALIBRATION, size) for size in self._shape)
        half = torch.tensor(small[::-1][: geometry.points.shape[-1]]) / 2
        near = torch.linalg.vector_norm(geometry.points / half, dim=-1) <= 1
        points, weights = geometry.points[near][None], geometry.weights[near][None]
        one = torch.ones(1, *small, dtype=data.dtype)
        operator = NonCartesianSense(one, points, weights=weights)
        low = torch.stack([operator.H(operator.weigh(coil[near][None, None, None])) for coil in data])
        images = conjugate_gradients(
            operator.gram, low, iterations=_CALIBRATION_ITERATIONS, regularization=_CALIBRATION_WEIGHT
        )
        return espirit(
            to_kspace(images, (-2, -1) if flat else (-3, -2, -1)),
            self._shape,
            kernel=settings.kernel if flat else min(settings.kernel, _THIN_KERNEL),
            threshold=settings.threshold,
            crop=settings.crop,
            calibration_size=settings.calibration_lines,
        )


def _finite(data: torch.Tensor, trajectory: np.ndarray) -> np.ndarray:
    """Which readouts hold no NaN or infinity, boolean (n,)."""
    placed: np.ndarray = np.isfinite(trajectory).all(axis=(1, 2))
    if not bool(torch.isfinite(torch.view_as_real(data).sum())):
        placed = placed & torch.isfinite(torch.view_as_real(data)).all(dim=-1).all(dim=-1).all(dim=0).numpy()
    return placed
