"""The CUDA side of `sense`: what is launched for a gram or a solution, and the same interface for tensors on a device.

Maps stay in their natural layout, (coil, z, y, x) contiguous; weights are real and in the natural order of plain transforms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import device
from .fft import roots, threads_for

__all__ = ["DeviceLines", "DevicePlanes", "lines_gram", "lines_solve", "planes_gram"]

_SHARED_NUMBERS = 2048
_COLUMNS = 4
"""Neighboring columns of one block: 32 bytes, the least that device memory moves."""
_ROWS = 4


class DeviceLines:
    """As `sense.Lines`, for its gram and its solution."""

    def __init__(self, maps: Tensor, axis: int) -> None:
        self._maps, self._axis = maps.resolve_conj().contiguous(), axis

    def real_weights(self, weights: Tensor) -> Tensor:
        """Weights of a gram, (n,) real."""
        return weights.reshape(self._maps.shape[self._axis]).to(torch.float32).contiguous()

    def gram(self, weights: Tensor, x: Tensor) -> Tensor:
        """maps^H F^H weights F maps x."""
        x = x.resolve_conj().contiguous()
        result = torch.empty_like(x)
        device.launch(*lines_gram(self._maps, weights, x, result, self._axis))
        return result

    def solve(
        self, weights: Tensor, right_side: Tensor, iterations: int, regularization: float, initial: Tensor | None
    ) -> Tensor:
        """x after conjugate gradients for (gram + regularization) x = right_side, column by column, in one launch."""
        right_side = right_side.resolve_conj().contiguous()
        x = torch.zeros_like(right_side) if initial is None else initial.expand_as(right_side).clone().contiguous()
        device.launch(*lines_solve(self._maps, weights, right_side, x, self._axis, regularization, iterations))
        return x


class DevicePlanes:
    """As `sense.Planes`, for its gram."""

    def __init__(self, maps: Tensor) -> None:
        self._maps = maps.resolve_conj().contiguous()

    def real_weights(self, weights: Tensor) -> Tensor:
        """Weights of a gram, real, (z or 1, y, x)."""
        slices = weights.shape[-3] if weights.ndim > 2 else 1
        return weights.expand(slices, *self._maps.shape[-2:]).to(torch.float32).contiguous()

    def gram(self, weights: Tensor, x: Tensor) -> Tensor:
        """maps^H F^H weights F maps x."""
        x = x.resolve_conj().contiguous()
        batch = x.numel() // math.prod(x.shape[-3:])
        kspace = x.new_empty((batch * x.shape[-3], self._maps.shape[0], *x.shape[-2:]))
        result = torch.empty_like(x)
        device.launch(*planes_gram(self._maps, weights, x, kspace, result))
        return result


def lines_gram(maps: Tensor, weights: Tensor, x: Tensor, result: Tensor, axis: int) -> list[device.Launch]:
    """x to result, both (*batch, z, y, x); transforms along `axis`, -2 or -3. All contiguous."""
    shape, macros, shared, threads = _columns(maps, x, axis)
    arguments = (maps, weights, roots(maps.shape[axis], maps.device), x, result, len(maps), _inner(maps, axis))
    grid, block = shape, (threads, 1, 1)
    return [device.Launch("sense_lines.cu", "scs_lines_gram", grid, block, arguments, macros, shared)]


def lines_solve(
    maps: Tensor, weights: Tensor, right_side: Tensor, x: Tensor, axis: int, regularization: float, iterations: int
) -> list[device.Launch]:
    """x, which holds the start, to the solution."""
    grid, macros, shared, threads = _columns(maps, x, axis)
    turns = roots(maps.shape[axis], maps.device)
    sizes = (len(maps), _inner(maps, axis), float(regularization), iterations)
    arguments = (maps, weights, turns, right_side, x, *sizes)
    shared += 4 * threads  # sums of scalar products
    return [device.Launch("sense_lines.cu", "scs_lines_solve", grid, (threads, 1, 1), arguments, macros, shared)]


def planes_gram(maps: Tensor, weights: Tensor, x: Tensor, kspace: Tensor, result: Tensor) -> list[device.Launch]:
    """x to result, both (*batch, z, y, x), through kspace, (batch z, coil, y, x); all contiguous."""
    coils, slices, rows, columns = maps.shape
    jobs = x.numel() // (rows * columns)
    threads = threads_for(max(rows, columns) * _ROWS)
    sizes = (("SCS_Y", rows), ("SCS_X", columns), ("SCS_LINES", _ROWS), ("SCS_THREADS", threads))
    along_y, along_x = roots(rows, maps.device), roots(columns, maps.device)
    row_tiles, column_tiles = -(-rows // _ROWS), -(-columns // _ROWS)

    def one(name: str, grid: tuple[int, int, int], length: int, *arguments: Tensor | int) -> device.Launch:
        block, shared = (threads, 1, 1), 8 * length * _ROWS
        return device.Launch("sense_planes.cu", name, grid, block, arguments, sizes, shared)

    return [
        one("scs_rows_forward", (row_tiles, coils, jobs), columns, maps, along_x, x, kspace, slices),
        one("scs_columns", (column_tiles, coils, jobs), rows, weights, along_y, kspace, slices, len(weights)),
        one("scs_rows_back", (row_tiles, 1, jobs), columns, maps, along_x, kspace, result, coils, slices),
    ]


def _inner(maps: Tensor, axis: int) -> int:
    return math.prod(maps.shape[axis + 1 :]) if axis < -1 else 1


def _columns(maps: Tensor, x: Tensor, axis: int) -> tuple[tuple[int, int, int], tuple[tuple[str, int], ...], int, int]:
    """Grid, macros, bytes of shared memory and threads for blocks of a few columns."""
    length, outer, inner = maps.shape[axis], math.prod(maps.shape[1:axis]), _inner(maps, axis)
    together = _COLUMNS if length * _COLUMNS <= _SHARED_NUMBERS * 2 else 1
    threads = threads_for(length * together)
    macros = (("SCS_N", length), ("SCS_COLUMNS", together), ("SCS_THREADS", threads))
    grid = (-(-inner // together), outer, x.numel() // (length * outer * inner))
    return grid, macros, 8 * length * together, threads
