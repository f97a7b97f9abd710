"""The CUDA side of `sense`: what is launched for A^H A, A, A^H or a solution, and the same interface for tensors on a device.

Maps stay in their natural layout, (coil, z, y, x) contiguous; weights are in the natural order of plain transforms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import device
from .fft import roots, threads_for
from .sense_operators import plain

__all__ = [
    "DeviceLines",
    "DevicePlanes",
    "lines_adjoint",
    "lines_descend",
    "lines_forward",
    "lines_gram",
    "lines_solve",
    "lines_step",
    "planes_adjoint",
    "planes_descend",
    "planes_forward",
    "planes_gram",
    "planes_step",
]

_SHARED_NUMBERS = 2048
_COLUMNS = 4
"""Neighboring columns of one block: 32 bytes, the least that device memory moves."""
_ROWS = 4


class _Linear(torch.autograd.Function):
    """A linear function that torch differentiates: by its adjoint, and that by the function again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, apply: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: ANN401 - as torch calls it
        ctx.both = adjoint, apply
        return apply(x)

    @staticmethod
    def backward(ctx: Any, *up: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        return cast("Tensor", _Linear.apply(up[0], *ctx.both)), None, None  # type: ignore[no-untyped-call]


class _OnDevice:
    """What both forms share; see `sense._Prepared` for shapes. Raises RuntimeError where NVRTC is not installed."""

    def __init__(self, maps: Tensor) -> None:
        self._maps = plain(maps)

    def gram(self, weights: Tensor, x: Tensor) -> Tensor:
        """maps^H F^H weights F maps x, weights real."""
        return _differentiable(x, lambda given: self._gram(weights, given), lambda up: self._gram(weights, up))

    def forward(self, weights: Tensor, x: Tensor) -> Tensor:
        """weights F maps x, weights complex."""
        return _differentiable(x, lambda given: self._forward(weights, given), lambda up: self._adjoint(weights, up))

    def adjoint(self, weights: Tensor, kspace: Tensor) -> Tensor:
        """maps^H F^H conj(weights) kspace."""
        return _differentiable(
            kspace, lambda given: self._adjoint(weights, given), lambda up: self._forward(weights, up)
        )

    def descend(self, weights: Tensor, x: Tensor, of_data: Tensor, share: float) -> Tensor:
        """x + share (of_data - gram x), of_data being A^H y, (z, y, x)."""
        if x.requires_grad and torch.is_grad_enabled():
            return x + share * (of_data - self.gram(weights, x))
        return self._descend(weights, plain(x), plain(of_data), share)

    def _gram(self, weights: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _forward(self, weights: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _adjoint(self, weights: Tensor, kspace: Tensor) -> Tensor:
        raise NotImplementedError

    def _descend(self, weights: Tensor, x: Tensor, of_data: Tensor, share: float) -> Tensor:
        raise NotImplementedError

    def _like_image(self, kspace: Tensor) -> Tensor:
        return kspace.new_empty((*kspace.shape[:-4], *self._maps.shape[1:]))

    def _like_kspace(self, x: Tensor) -> Tensor:
        return x.new_empty((*x.shape[:-3], *self._maps.shape))


def _differentiable(given: Tensor, apply: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]) -> Tensor:
    """apply(given), recorded where torch records."""
    if given.requires_grad and torch.is_grad_enabled():
        return cast("Tensor", _Linear.apply(given, apply, adjoint))  # type: ignore[no-untyped-call]
    return apply(given)


class DeviceLines(_OnDevice):
    """As `sense.Lines`."""

    def __init__(self, maps: Tensor, axis: int) -> None:
        super().__init__(maps)
        self._axis = axis

    def real_weights(self, weights: Tensor) -> Tensor:
        """Weights of a gram, (n,) real."""
        return weights.reshape(self._maps.shape[self._axis]).to(torch.float32).contiguous()

    def complex_weights(self, weights: Tensor) -> Tensor:
        """Weights of A, (n,) complex."""
        return plain(weights.reshape(self._maps.shape[self._axis]).to(torch.complex64))

    def _gram(self, weights: Tensor, x: Tensor) -> Tensor:
        x = plain(x)
        result = torch.empty_like(x)
        device.launch(*lines_gram(self._maps, weights, x, result, self._axis))
        return result

    def _forward(self, weights: Tensor, x: Tensor) -> Tensor:
        x = plain(x)
        kspace = self._like_kspace(x)
        device.launch(*lines_forward(self._maps, weights, x, kspace, self._axis))
        return kspace

    def _adjoint(self, weights: Tensor, kspace: Tensor) -> Tensor:
        kspace = plain(kspace)
        x = self._like_image(kspace)
        device.launch(*lines_adjoint(self._maps, weights, kspace, x, self._axis))
        return x

    def _descend(self, weights: Tensor, x: Tensor, of_data: Tensor, share: float) -> Tensor:
        result = torch.empty_like(x)
        device.launch(*lines_descend(self._maps, weights, x, of_data, result, self._axis, share))
        return result

    def solve(
        self, weights: Tensor, right_side: Tensor, iterations: int, regularization: float, initial: Tensor | None
    ) -> Tensor:
        """x after conjugate gradients for (gram + regularization) x = right_side, column by column, in one launch."""
        right_side, x = _start(right_side, initial)
        device.launch(*lines_solve(self._maps, weights, right_side, x, self._axis, regularization, iterations))
        return x


class DevicePlanes(_OnDevice):
    """As `sense.Planes`."""

    def real_weights(self, weights: Tensor) -> Tensor:
        """Weights of a gram, real, (z or 1, y, x)."""
        return self._expanded(weights.to(torch.float32))

    def complex_weights(self, weights: Tensor) -> Tensor:
        """Weights of A, complex, likewise."""
        return self._expanded(weights.to(torch.complex64))

    def _expanded(self, weights: Tensor) -> Tensor:
        slices = weights.shape[-3] if weights.ndim > 2 else 1
        return plain(weights.expand(slices, *self._maps.shape[-2:]))

    def _gram(self, weights: Tensor, x: Tensor) -> Tensor:
        x = plain(x)
        result = torch.empty_like(x)
        device.launch(*planes_gram(self._maps, weights, x, self._between(x, 3), result))
        return result

    def _forward(self, weights: Tensor, x: Tensor) -> Tensor:
        x = plain(x)
        kspace = self._like_kspace(x)
        device.launch(*planes_forward(self._maps, weights, x, self._between(x, 3), kspace))
        return kspace

    def _adjoint(self, weights: Tensor, kspace: Tensor) -> Tensor:
        kspace = plain(kspace)
        x = self._like_image(kspace)
        device.launch(*planes_adjoint(self._maps, weights, kspace, self._between(kspace, 4), x))
        return x

    def _descend(self, weights: Tensor, x: Tensor, of_data: Tensor, share: float) -> Tensor:
        result = torch.empty_like(x)
        device.launch(*planes_descend(self._maps, weights, x, of_data, self._between(x, 3), result, share))
        return result

    def solve(
        self, weights: Tensor, right_side: Tensor, iterations: int, regularization: float, initial: Tensor | None
    ) -> Tensor:
        """x after conjugate gradients for (gram + regularization) x = right_side, slice by slice, without waiting once."""
        right_side, x = _start(right_side, initial)
        residual = right_side - self._gram(weights, x) - regularization * x if initial is not None else right_side
        direction, energy = residual, _per_slice(residual, residual)
        for _ in range(iterations):
            image = self._gram(weights, direction) + regularization * direction
            step = _ratio(energy, _per_slice(direction, image))
            x, residual = x + step * direction, residual - step * image
            before, energy = energy, _per_slice(residual, residual)
            direction = residual + _ratio(energy, before) * direction
        return x

    def _between(self, x: Tensor, axes: int) -> Tensor:
        """Memory for k-space between the passes, (batch z, coil, y, x)."""
        coils, slices, rows, columns = self._maps.shape
        return x.new_empty((math.prod(x.shape[: x.ndim - axes]) * slices, coils, rows, columns))


def lines_gram(maps: Tensor, weights: Tensor, x: Tensor, result: Tensor, axis: int) -> list[device.Launch]:
    """x to result, both (*batch, z, y, x); transforms along `axis`, -2 or -3. All contiguous."""
    return [_lines("scs_lines_gram", maps, weights, x, result, axis)]


def lines_forward(maps: Tensor, weights: Tensor, x: Tensor, kspace: Tensor, axis: int) -> list[device.Launch]:
    """x, (*batch, z, y, x), to kspace, (*batch, coil, z, y, x), weights complex."""
    return [_lines("scs_lines_forward", maps, weights, x, kspace, axis)]


def lines_adjoint(maps: Tensor, weights: Tensor, kspace: Tensor, x: Tensor, axis: int) -> list[device.Launch]:
    """kspace, (*batch, coil, z, y, x), to x, (*batch, z, y, x), weights complex."""
    return [_lines("scs_lines_adjoint", maps, weights, kspace, x, axis)]


def lines_descend(
    maps: Tensor, weights: Tensor, x: Tensor, of_data: Tensor, result: Tensor, axis: int, share: float
) -> list[device.Launch]:
    """x + share (of_data - gram x), of_data: (z, y, x)."""
    grid, macros, shared, threads = _columns(maps, x.numel(), axis)
    turns = roots(maps.shape[axis], maps.device)
    arguments = (maps, weights, turns, x, of_data, result, len(maps), _inner(maps, axis), float(share))
    return [device.Launch("sense_lines.cu", "scs_lines_descend", grid, (threads, 1, 1), arguments, macros, shared)]


def lines_step(
    x: Tensor, sampled: Tensor, data: Tensor | None, result: Tensor, axis: int, settings: tuple[float, float]
) -> list[device.Launch]:
    """Coil by coil, x to result, (*batch, coil, z, y, x); sampled: (1 or z, n); settings: share and 1 / n. See `kspace_step`."""
    images = x.reshape(-1, *x.shape[-3:])
    grid, macros, shared, threads = _columns(images, x.numel(), axis)
    length, turns = x.shape[axis], roots(x.shape[axis], x.device)
    sizes = (x.shape[-4], _inner(images, axis), sampled.numel() // length)
    arguments = (x, sampled, x if data is None else data, turns, result, *sizes, *settings)
    macros = (*macros, ("SCS_DATA", int(data is not None)))
    return [device.Launch("sense_lines.cu", "scs_lines_step", grid, (threads, 1, 1), arguments, macros, shared)]


def _lines(name: str, maps: Tensor, weights: Tensor, given: Tensor, result: Tensor, axis: int) -> device.Launch:
    images = min(given.numel(), result.numel())  # the other may be k-space, which has coils
    grid, macros, shared, threads = _columns(maps, images, axis)
    turns = roots(maps.shape[axis], maps.device)
    arguments = (maps, weights, turns, given, result, len(maps), _inner(maps, axis))
    return device.Launch("sense_lines.cu", name, grid, (threads, 1, 1), arguments, macros, shared)


def lines_solve(
    maps: Tensor, weights: Tensor, right_side: Tensor, x: Tensor, axis: int, regularization: float, iterations: int
) -> list[device.Launch]:
    """x, which holds the start, to the solution."""
    grid, macros, shared, threads = _columns(maps, x.numel(), axis)
    turns = roots(maps.shape[axis], maps.device)
    sizes = (len(maps), _inner(maps, axis), float(regularization), iterations)
    arguments = (maps, weights, turns, right_side, x, *sizes)
    shared += 4 * threads  # sums of scalar products
    return [device.Launch("sense_lines.cu", "scs_lines_solve", grid, (threads, 1, 1), arguments, macros, shared)]


def planes_gram(maps: Tensor, weights: Tensor, x: Tensor, between: Tensor, result: Tensor) -> list[device.Launch]:
    """x to result, both (*batch, z, y, x), through `between`, (batch z, coil, y, x); all contiguous."""
    passes = _Passes(maps, between)
    return [passes.rows_forward(x), passes.columns("scs_columns", weights, between), passes.rows_back(result)]


def planes_forward(maps: Tensor, weights: Tensor, x: Tensor, between: Tensor, kspace: Tensor) -> list[device.Launch]:
    """x, (*batch, z, y, x), to kspace, (*batch, coil, z, y, x), weights complex."""
    passes = _Passes(maps, between)
    return [passes.rows_forward(x), passes.columns("scs_columns_forward", weights, between, kspace)]


def planes_adjoint(maps: Tensor, weights: Tensor, kspace: Tensor, between: Tensor, x: Tensor) -> list[device.Launch]:
    """kspace, (*batch, coil, z, y, x), to x, (*batch, z, y, x), weights complex."""
    passes = _Passes(maps, between)
    return [passes.columns("scs_columns_back", weights, kspace, between), passes.rows_back(x)]


def planes_descend(
    maps: Tensor, weights: Tensor, x: Tensor, of_data: Tensor, between: Tensor, result: Tensor, share: float
) -> list[device.Launch]:
    """x + share (of_data - gram x), of_data: (z, y, x)."""
    passes = _Passes(maps, between)
    middle = passes.columns("scs_columns", weights, between)
    return [passes.rows_forward(x), middle, passes.rows_descend(x, of_data, result, share)]


def planes_step(
    x: Tensor, sampled: Tensor, data: Tensor | None, result: Tensor, settings: tuple[float, float]
) -> list[device.Launch]:
    """Coil by coil, x to result, (*batch, coil, z, y, x); sampled: (1 or z, y, x); settings: share and 1 / (y x)."""
    images = x.reshape(1, -1, *x.shape[-2:])
    passes = _Passes(
        images, torch.empty_like(images).movedim(0, 1), macros=(("SCS_MAPS", 0), ("SCS_DATA", int(data is not None)))
    )
    middle = passes.step(sampled, x if data is None else data, x.shape[-4:-2], settings)
    return [passes.rows_forward(x), middle, passes.rows_back(result)]


class _Passes:
    """Launches of the passes over the planes of `between`, (batch z, coil, y, x)."""

    def __init__(self, maps: Tensor, between: Tensor, macros: tuple[tuple[str, int], ...] = ()) -> None:
        self._maps, self._between, self._macros = maps, between, macros
        self._coils, self._slices, self._rows, self._across = maps.shape

    def rows_forward(self, x: Tensor) -> device.Launch:
        """Rows of maps times image."""
        turns = roots(self._across, self._maps.device)
        return self._launch("scs_rows_forward", self._coils, self._maps, turns, x, self._between, self._slices)

    def columns(self, name: str, weights: Tensor, *planes: Tensor) -> device.Launch:
        """A pass along y from and to `planes`."""
        turns = roots(self._rows, self._maps.device)
        return self._launch(name, self._coils, weights, turns, *planes, self._slices, len(weights))

    def rows_back(self, result: Tensor) -> device.Launch:
        """Rows back, and the sum over coils."""
        turns = roots(self._across, self._maps.device)
        sizes = (self._coils, self._slices)
        return self._launch("scs_rows_back", 1, self._maps, turns, self._between, result, *sizes)

    def rows_descend(self, x: Tensor, of_data: Tensor, result: Tensor, share: float) -> device.Launch:
        """Rows back, the sum over coils, and the step."""
        turns = roots(self._across, self._maps.device)
        sizes = (self._coils, self._slices, float(share))
        return self._launch("scs_rows_descend", 1, self._maps, turns, self._between, x, of_data, result, *sizes)

    def step(
        self, sampled: Tensor, data: Tensor, planes: Sequence[int], settings: tuple[float, float]
    ) -> device.Launch:
        """The pass along y with the step in its middle; planes: coils and slices."""
        turns, (coils, slices) = roots(self._rows, self._maps.device), planes
        sizes = (coils * slices, slices, len(sampled))
        return self._launch("scs_columns_step", 1, sampled, data, turns, self._between, *sizes, *settings)

    def _launch(self, name: str, coils: int, *arguments: Tensor | float) -> device.Launch:
        along_rows = "rows" in name
        length, lines = (self._across, self._rows) if along_rows else (self._rows, self._across)
        threads = threads_for(max(self._rows, self._across) * _ROWS)
        sizes = (("SCS_Y", self._rows), ("SCS_X", self._across), ("SCS_LINES", _ROWS), ("SCS_THREADS", threads))
        grid = (-(-lines // _ROWS), coils, len(self._between))
        macros = (*sizes, *self._macros)
        return device.Launch("sense_planes.cu", name, grid, (threads, 1, 1), arguments, macros, 8 * length * _ROWS)


def _inner(maps: Tensor, axis: int) -> int:
    return math.prod(maps.shape[axis + 1 :]) if axis < -1 else 1


def _columns(
    maps: Tensor, numbers: int, axis: int
) -> tuple[tuple[int, int, int], tuple[tuple[str, int], ...], int, int]:
    """Grid, macros, bytes of shared memory and threads for blocks of a few columns of images of so many numbers in all."""
    length, outer, inner = maps.shape[axis], math.prod(maps.shape[1:axis]), _inner(maps, axis)
    together = _COLUMNS if length * _COLUMNS <= _SHARED_NUMBERS * 2 else 1
    threads = threads_for(length * together)
    macros = (("SCS_N", length), ("SCS_COLUMNS", together), ("SCS_THREADS", threads))
    grid = (-(-inner // together), outer, numbers // (length * outer * inner))
    return grid, macros, 8 * length * together, threads


def _start(right_side: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """The right side as the kernels take it, and the array that holds the start and then the result."""
    right_side = plain(right_side)
    x = torch.zeros_like(right_side) if initial is None else plain(initial.expand_as(right_side).clone())
    return right_side, x


def _per_slice(a: Tensor, b: Tensor) -> Tensor:
    """Real part of <a, b> of every slice, (*batch, z, 1, 1)."""
    return (torch.view_as_real(a) * torch.view_as_real(b)).sum((-3, -2, -1))[..., None, None]


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, 0 where below is: a slice that is solved stays as it is."""
    return torch.where(below > 0, above / below, 0)
