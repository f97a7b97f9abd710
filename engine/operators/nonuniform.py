"""Operators of non-Cartesian imaging, by FINUFFT on the CPU.

A trajectory has shape (readouts, samples, dims) in cycles per field of view, from -N/2 to N/2, ordered (kx, ky) or
(kx, ky, kz). Its k-space is [..., coil, z, readouts, samples]; z is 1 for three dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import finufft
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cartesian import CoilSensitivity, Sampling, innermost
from .linear import LinearOperator

__all__ = ["NonCartesianSense", "NonUniformFourier"]

_SMALL_GRID_LIMIT = 1e-8
"""The small oversampled grid, 9 times as fast as the usual one, reaches no better accuracy than this."""


class NonUniformFourier(LinearOperator):
    """Fourier transform of images at the points k of a trajectory: 1/sqrt(N) sum over n of x[n] exp(-2 pi i k (n - c)/N).

    N is the number of pixels that are summed over and c the center, N // 2 along each axis, as in `Fourier`, which this
    equals for integer k. With two dimensions z is a batch axis.

    trajectory: real, (readouts, samples, 2 or 3). shape: of the image, (..., z, y, x), such as (coil, z, y, x).
    accuracy: relative error of the transform; adjoint and forward match to rounding whatever it is.
    Plans are kept and serve again for batches of the same size; one object must not run in two threads at once.
    Raises ValueError for a trajectory of another shape or one that leaves -N/2 ... N/2.
    """

    def __init__(self, trajectory: Tensor, shape: Sequence[int], *, accuracy: float = 1e-3) -> None:
        _check_trajectory(trajectory, shape)
        self._dims = trajectory.shape[-1]
        self._pixels = tuple(shape[-self._dims :])
        batch = tuple(shape[: -self._dims]) + (1,) * (self._dims - 2)
        super().__init__(shape, (*batch, *trajectory.shape[:2]))
        self._accuracy, self._points = accuracy, trajectory
        self._angles = _angles(trajectory, self._pixels)
        self._plans: dict[tuple[int, int, np.dtype[np.generic]], finufft.Plan] = {}

    @property
    def gram(self) -> LinearOperator:
        """Convolution by FFT on the doubled grid (Toeplitz), without the trajectory."""
        return _Toeplitz(self._points, self.domain, None, self._accuracy)

    def _forward(self, x: Tensor) -> Tensor:
        batch = x.shape[: x.ndim - len(self.domain)]
        return self._run(2, x, self._pixels).reshape(*batch, *self.range).mul_(self._scale)

    def _backward(self, y: Tensor) -> Tensor:
        batch = y.shape[: y.ndim - len(self.range)]
        return self._run(1, y, self.range[-2:]).reshape(*batch, *self.domain).mul_(self._scale)

    @property
    def _scale(self) -> float:
        return 1 / math.sqrt(math.prod(self._pixels))

    def _run(self, kind: int, x: Tensor, shape: Sequence[int]) -> Tensor:
        array = x.reshape(-1, *shape).cpu().resolve_conj().contiguous().numpy()
        if kind == 1:
            array = array.reshape(len(array), -1)
        key = (kind, len(array), array.dtype)
        if key not in self._plans:
            self._plans[key] = _plan(kind, self._pixels, len(array), array.dtype, self._angles, self._accuracy)
        return _execute(self._plans[key], array if len(array) > 1 else array[0]).to(x.device)


class NonCartesianSense(LinearOperator):
    """sqrt(weights) NonUniformFourier @ CoilSensitivity: an image [z, y, x] to k-space [coil, z, readouts, samples].

    maps: complex, (coil, z, y, x). trajectory: real, (readouts, samples, 2 or 3).
    weights: real, (readouts, samples), density compensation by which squared residuals count; data must then be multiplied
    by their root as well (`weigh`). With them the gram is near the identity, and few iterations do.
    """

    def __init__(
        self, maps: Tensor, trajectory: Tensor, *, weights: Tensor | None = None, accuracy: float = 1e-3
    ) -> None:
        self._maps = CoilSensitivity(maps)
        self._transform = NonUniformFourier(trajectory, maps.shape, accuracy=accuracy)
        super().__init__(maps.shape[1:], self._transform.range)
        self._root: LinearOperator | None = None
        if weights is not None:
            self._root = Sampling(weights.to(maps.device, maps.real.dtype).sqrt(), self._transform.range)
        toeplitz = _Toeplitz(trajectory, maps.shape, weights, accuracy)
        self._gram = _SenseToeplitz(maps, toeplitz)

    @property
    def gram(self) -> LinearOperator:
        """Coil by coil a convolution on the doubled grid, without the trajectory."""
        return self._gram

    def weigh(self, data: Tensor) -> Tensor:
        """Data times the root of the weights, as this operator explains them."""
        return data if self._root is None else self._root(data)

    def _forward(self, x: Tensor) -> Tensor:
        return self.weigh(self._transform(self._maps(x)))

    def _backward(self, y: Tensor) -> Tensor:
        return self._maps.H(self._transform.H(self.weigh(y)))


class _Toeplitz(LinearOperator):
    """F^H diag(weights) F of a trajectory: depends on differences of positions alone, so it is a convolution.

    Its kernel, sampled on the doubled grid by one adjoint transform of the weights, is diagonalized there by the FFT
    (Fessler et al., IEEE TSP 53, 2005).
    """

    def __init__(self, trajectory: Tensor, shape: Sequence[int], weights: Tensor | None, accuracy: float) -> None:
        super().__init__(shape, shape)
        dims = trajectory.shape[-1]
        pixels = tuple(shape[-dims:])
        self._axes = tuple(axis for axis in range(-dims, 0))
        doubled = tuple(2 * size for size in pixels)
        ones = torch.ones(trajectory.shape[:2]) if weights is None else weights
        values = ones.cpu().to(torch.complex128).numpy().ravel()
        plan = _plan(1, doubled, 1, values.dtype, _angles(trajectory, pixels), accuracy)
        kernel = torch.fft.ifftshift(_execute(plan, values))
        # Symmetric but for the last offset, which no pair of pixels has: the spectrum is real.
        self._spectrum = torch.fft.fftn(kernel).real / math.prod(pixels)
        self._kept: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def H(self) -> LinearOperator:  # noqa: N802
        """Itself."""
        return self

    def _forward(self, x: Tensor) -> Tensor:
        result = x
        for axis in reversed(self._axes):  # each axis is doubled only when its turn comes
            result = torch.fft.fft(result, n=2 * x.shape[axis], dim=axis)
        result.mul_(self._on(x))
        for axis in self._axes:
            result = torch.fft.ifft(result, dim=axis).narrow(axis, 0, x.shape[axis])
        return result

    def _backward(self, y: Tensor) -> Tensor:
        return self._forward(y)

    def _on(self, x: Tensor) -> Tensor:
        key = (x.device, x.dtype)
        if key not in self._kept:
            # The axis that was transformed last lies innermost in memory, and two layouts multiply slowly.
            self._kept[key] = innermost(self._spectrum.to(x.device, x.dtype), self._axes[:1])
        return self._kept[key]


class _SenseToeplitz(LinearOperator):
    """maps^H toeplitz maps, one coil after the other, so that one doubled grid is enough."""

    def __init__(self, maps: Tensor, toeplitz: _Toeplitz) -> None:
        super().__init__(maps.shape[1:], maps.shape[1:])
        self._maps, self._conjugate, self._toeplitz = maps, maps.conj().resolve_conj(), toeplitz

    @property
    def H(self) -> LinearOperator:  # noqa: N802
        """Itself."""
        return self

    def _forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for sees, back in zip(self._maps, self._conjugate, strict=True):
            total.addcmul_(back, self._toeplitz._forward(sees * x))
        return total

    def _backward(self, y: Tensor) -> Tensor:
        return self._forward(y)


def _plan(
    kind: int,
    modes: Sequence[int],
    batch: int,
    dtype: np.dtype[np.generic],
    angles: Sequence[NDArray[np.float64]],
    accuracy: float,
) -> finufft.Plan:
    """A FINUFFT plan of type 1 (adjoint) or 2 (forward), its points set."""
    plan = finufft.Plan(  # type: ignore[no-untyped-call]
        kind,
        tuple(modes),
        batch,
        accuracy,
        1 if kind == 1 else -1,
        dtype=dtype.name,
        upsampfac=1.25 if accuracy >= _SMALL_GRID_LIMIT else 2.0,
        nthreads=torch.get_num_threads(),
    )
    real = np.float32 if dtype == np.complex64 else np.float64
    plan.setpts(*(np.ascontiguousarray(angle, real) for angle in angles))  # type: ignore[no-untyped-call]
    return plan


def _execute(plan: finufft.Plan, values: NDArray[np.complexfloating]) -> Tensor:
    return torch.from_numpy(plan.execute(values))  # type: ignore[no-untyped-call]


def _angles(trajectory: Tensor, pixels: Sequence[int]) -> list[NDArray[np.float64]]:
    """2 pi k / N of all points, one array per image axis: (z,) y, x."""
    points = trajectory.detach().cpu().double().reshape(-1, len(pixels)).flip(-1).numpy()
    return [2 * np.pi * points[:, axis] / size for axis, size in enumerate(pixels)]


def _check_trajectory(trajectory: Tensor, shape: Sequence[int]) -> None:
    if trajectory.ndim != 3 or trajectory.shape[-1] not in (2, 3) or len(shape) < 3:
        raise ValueError(
            f"trajectory has shape {tuple(trajectory.shape)}, image {tuple(shape)}; "
            "needed: (readouts, samples, 2 or 3) and (..., z, y, x)"
        )
    dims = trajectory.shape[-1]
    for axis, name in zip(range(dims), "xyz", strict=False):
        size, farthest = shape[-1 - axis], float(trajectory[..., axis].abs().amax())
        # A hair beyond is rounding of the scanner's single precision.
        if not farthest <= size / 2 * (1 + 1e-4):
            raise ValueError(
                f"trajectory reaches k{name} = {farthest:g} cycles per field of view, but {size} pixels hold "
                f"{size / 2:g}; reconstruct on a larger matrix or crop the readouts"
            )
