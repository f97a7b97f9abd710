"""Data consistency: an estimate brought into agreement with what was measured.

All take a state (*batch, *domain) and give one of the same shape, and all take new data in place (`update`) between two calls,
so that a reconstruction may begin before its scan ends. Data, maps and states are scaled alike.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol, cast

import msgspec
import torch
from torch import Tensor

from ...kernels import folded
from ...kernels.kspace_step import KspaceStep
from ..baselines.sense import lattice_columns
from ..baselines.solvers import conjugate_gradients
from ..config_priors import DataConfig
from ..operators.cartesian import CartesianSense, Fourier

__all__ = [
    "CONSISTENCIES",
    "DataConsistency",
    "Gradient",
    "HardReplacement",
    "Implicit",
    "Measurement",
    "NoConsistency",
    "Proximal",
    "RowReplacement",
    "SenseProjection",
    "Solver",
    "make_consistency",
]


class Measurement(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What was measured, and how.

    data: complex, centered k-space (coil, z, y, x). mask: boolean, broadcasts against (z, y, x). maps: complex, as data, with
    sum |maps|^2 = 1 or 0; None for a single channel, or where each coil is reconstructed for itself. axes: those that are
    k-space in the data. noise: standard deviation of the real part of one sample, in units of the data. lattice: ((Ry, Rz),
    (first line, first partition)) where every R-th line was sampled and no other.
    """

    data: Tensor
    mask: Tensor
    maps: Tensor | None = None
    axes: tuple[int, ...] = (-2, -1)
    noise: float = 0.0
    lattice: tuple[tuple[int, int], tuple[int, int]] | None = None


class DataConsistency(abc.ABC):
    """A function of the estimate and the noise level it is thought to have."""

    def __init__(self, measured: Measurement, config: DataConfig) -> None:
        self.measured, self.config = measured, config
        self.update(measured.data, measured.mask)

    def update(self, data: Tensor, mask: Tensor) -> None:
        """From now on, this was measured; shapes and coil maps stay."""
        self.measured = msgspec.structs.replace(self.measured, data=data * mask, mask=mask)
        for made in ("operator", "adjoint", "_kernel_step"):
            self.__dict__.pop(made, None)

    @abc.abstractmethod
    def __call__(self, state: Tensor, sigma: float) -> Tensor:
        """State (*batch, *domain) of noise level sigma, in agreement with the data."""

    def residual(self, state: Tensor) -> float:
        """|A x - y| / |y| of a state, 0 where nothing was measured.

        With coils it comes from A^H A x and A^H y, which are at hand: below 1e-3 it is rounding.
        """
        m = self.measured
        of_data = _inner(m.data, m.data)
        if m.maps is None:
            error = (self.fourier(state) - m.data) * m.mask
            square = _inner(error, error)
        else:
            square = of_data + _inner(state, self.operator.gram(state)) - 2 * _inner(state, self.adjoint)
        return math.sqrt(max(0.0, square / max(of_data, 1e-60)))

    @functools.cached_property
    def fourier(self) -> Fourier:
        """Centered transform along the axes of the data."""
        data = self.measured.data
        return Fourier(data.shape[-3:], self.measured.axes, dtype=data.dtype, device=data.device)

    def step(self, state: Tensor, share: float = 1.0) -> Tensor:
        """Coil images, or one channel, whose k-space comes nearer to the data by `share` where there are any.

        Where each image has a mask of its own, frames in time and the batches of a training, torch does it.
        """
        m = self.measured
        if m.mask.ndim <= 3 and m.data.ndim == 4:
            return self._kernel_step(state, share)
        kspace = self.fourier(state)
        return self.fourier.H(torch.where(m.mask, torch.lerp(kspace, m.data, share), kspace))

    @functools.cached_property
    def _kernel_step(self) -> KspaceStep:
        """Data and mask as the kernels take them; follows `update`."""
        return self.fourier.step(self.measured.data, self.measured.mask)

    @functools.cached_property
    def operator(self) -> CartesianSense:
        """A, from the image to the data; follows `update`."""
        m = self.measured
        if m.maps is None:
            raise ValueError("this data consistency needs coil sensitivity maps, and there are none")
        return _known_sense(m.maps, m.axes).with_mask(m.mask)

    @functools.cached_property
    def adjoint(self) -> Tensor:
        """A^H y; follows `update`."""
        return self.operator.H(self.measured.data)


def _inner(a: Tensor, b: Tensor) -> float:
    """Real part of the inner product, several times as fast as torch's complex norm."""
    return float(torch.view_as_real(a.contiguous()).flatten() @ torch.view_as_real(b.contiguous()).flatten())


class NoConsistency(DataConsistency):
    """The estimate as it is."""

    def __call__(self, state: Tensor, sigma: float) -> Tensor:  # noqa: ARG002
        """The state itself."""
        return state


class HardReplacement(DataConsistency):
    """Measured samples of each coil take their place in its k-space; state (*batch, coil, z, y, x), or one channel."""

    def __call__(self, state: Tensor, sigma: float) -> Tensor:  # noqa: ARG002
        """Coil images whose k-space holds the data."""
        return self.step(state)


class SenseProjection(DataConsistency):
    """One projection of a combined image: S^H F^H (y + (1 - M) F S x); state (*batch, z, y, x)."""

    def __init__(self, measured: Measurement, config: DataConfig) -> None:
        super().__init__(measured, config)
        _ = self.operator  # which says so where there are no maps

    def __call__(self, state: Tensor, sigma: float) -> Tensor:  # noqa: ARG002
        """x + A^H (y - A x), which is the same where sum |maps|^2 = 1."""
        return self.operator.descend(state, self.adjoint, 1.0)


class Gradient(SenseProjection):
    """x - weight A^H (A x - y)."""

    def __call__(self, state: Tensor, sigma: float) -> Tensor:  # noqa: ARG002
        """One step down the slope of half the squared error of the data."""
        return self.operator.descend(state, self.adjoint, self.config.weight)


class RowReplacement(DataConsistency):
    """Measured parts of a state that is data itself (a sinogram, one coil's k-space) take their place."""

    def __call__(self, state: Tensor, sigma: float) -> Tensor:  # noqa: ARG002
        """The state with the data where there is any."""
        return torch.where(self.measured.mask, self.measured.data, state)


class Proximal(DataConsistency):
    """argmin over x of |A x - y|^2 + (noise / sigma)^2 |x - estimate|^2: what data and prior weigh is told by their noise.

    Exact without iterations for one channel (a division in k-space) and for every-R-th-line sampling (pixels couple in groups
    of R, performance.md 4.2); else `iterations` of conjugate gradients that begin at the estimate.
    """

    def update(self, data: Tensor, mask: Tensor) -> None:
        """New data, on the same lattice or on none."""
        super().update(data, mask)
        self._folded = _folded(self.measured)

    def weight(self, sigma: float) -> float:
        """Weight of the estimate at noise level sigma, the one of the data being 1."""
        noise = max(self.measured.noise, self.config.floor)
        return self.config.weight * (noise / sigma) ** 2

    def __call__(self, state: Tensor, sigma: float) -> Tensor:
        """The regularized least-squares image next to the state."""
        m, weight = self.measured, self.weight(sigma)
        if m.maps is None:
            return self.step(state, 1 / (1 + weight))
        if state.requires_grad:
            return cast(Tensor, Implicit.apply(state, self, self.adjoint, weight, 1.0))  # type: ignore[no-untyped-call]
        return self.solve(self.adjoint + weight * state, weight, state)

    def solve(self, right: Tensor, weight: float, initial: Tensor) -> Tensor:
        """(A^H A + weight)^-1 right, in closed form or from `initial` on."""
        if self._folded is not None:
            return self._folded.solve(right, weight)
        return conjugate_gradients(
            self.operator.gram, right, iterations=self.config.iterations, regularization=weight, initial=initial
        )


class Solver(Protocol):
    """A regularized least-squares problem with a symmetric normal matrix."""

    def solve(self, right: Tensor, weight: float, initial: Tensor) -> Tensor:
        """(normal matrix + weight)^-1 right, from `initial` on where it is found by iterations."""


class Implicit(torch.autograd.Function):
    """(N + weight)^-1 (constant + weight state): linear in the state, with the Hermitian derivative weight (N + weight)^-1.

    apply(state, solver, constant, weight, share): the backward solution begins at `share` of the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        state: Tensor,
        solver: Solver,
        constant: Tensor,
        weight: float,
        share: float,
    ) -> Tensor:
        """The solution, from the state on."""
        ctx.solver, ctx.weight, ctx.share = solver, weight, share
        return solver.solve(constant + weight * state, weight, state)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # noqa: ANN401
        """weight (N + weight)^-1 gradient."""
        solved = ctx.solver.solve(ctx.weight * gradient, ctx.weight, ctx.share * gradient)
        return solved, None, None, None, None


class _Folded:
    """A^H A of every-R-th-line sampling as one R x R matrix per group of pixels, diagonalized once for all weights."""

    def __init__(self, columns: Tensor, steps: tuple[int, int]) -> None:
        adjoint = columns.conj().resolve_conj()
        gram = torch.stack([(row[:, None] * columns).sum(0) for row in adjoint.unbind(1)])
        values, vectors = torch.linalg.eigh(gram.movedim(-1, 0))
        self._values = values.clamp_min(0).T.float().contiguous()
        self._vectors = vectors.movedim(0, -1).to(torch.complex64).contiguous()
        self._steps = steps

    def solve(self, right: Tensor, weight: float) -> Tensor:
        """(A^H A + weight)^-1 right, shape (*batch, z, y, x)."""
        return folded.solve(self._vectors, self._values, right, weight, self._steps)


def _folded(measured: Measurement) -> _Folded | None:
    maps = measured.maps
    if maps is None or measured.lattice is None:
        return None
    (ry, rz), offset = measured.lattice
    z, y = maps.shape[-3:-1]
    if z % rz or y % ry or not set(measured.axes) <= {-3, -2, -1}:
        return None
    return _known_folded(maps, (ry, rz), offset, measured.axes)


@functools.lru_cache(maxsize=8)
def _known_sense(maps: Tensor, axes: tuple[int, ...]) -> CartesianSense:
    """A of a full scan, kept while the same tensor of maps is used, for packing maps takes as long as half an evaluation."""
    return CartesianSense(maps, torch.ones(1, dtype=torch.bool, device=maps.device), axes)


@functools.lru_cache(maxsize=8)
def _known_folded(maps: Tensor, steps: tuple[int, int], offset: tuple[int, int], axes: tuple[int, ...]) -> _Folded:
    """Kept while the same tensor of maps is used: frames of one slice share it."""
    return _Folded(lattice_columns(maps, steps, offset, axes), steps)


CONSISTENCIES: dict[str, Callable[[Measurement, DataConfig], DataConsistency]] = {
    "none": NoConsistency,
    "hard": HardReplacement,
    "sense": SenseProjection,
    "proximal": Proximal,
    "gradient": Gradient,
    "replace": RowReplacement,
}
"""Kinds of data consistency by the name that a configuration calls them."""


def make_consistency(measured: Measurement, config: DataConfig) -> DataConsistency:
    """Data consistency of the kind that the configuration says."""
    return CONSISTENCIES[config.kind](measured, config)
