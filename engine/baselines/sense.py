"""SENSE: the least-squares image that explains the data of all coils."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..operators.linear import LinearOperator
from ..preparation.filters import to_image, to_kspace
from .combine import root_sum_of_squares
from .solvers import conjugate_gradients

__all__ = ["UniformSense", "cg_sense", "lattice_columns"]


def cg_sense(
    operator: LinearOperator,
    data: Tensor,
    *,
    iterations: int = 30,
    regularization: float = 0.0,
    initial: Tensor | None = None,
) -> Tensor:
    """Minimize |A x - data|^2 + regularization |x|^2 by conjugate gradients (Pruessmann et al., MRM 46, 2001).

    operator: A, such as `CartesianSense` or `NonCartesianSense`. data: shape (*batch, *operator.range).
    regularization: compares with the eigenvalues of A^H A, which lie between 0 and 1 for Cartesian sampling with maps of
    sum |maps|^2 = 1; the scale of the data does not matter. It is the r of `bart pics -l2 -r`, and the image is that of
    `bart pics -S` (without -S, BART leaves its image divided by the scale that it prints).
    initial: where to start, such as the last frame. Returns the image, shape (*batch, *operator.domain), contiguous.
    """
    return conjugate_gradients(
        operator.gram, operator.H(data), iterations=iterations, regularization=regularization, initial=initial
    ).contiguous()


class UniformSense:
    """Exact SENSE for Cartesian sampling of every R-th line, as one small matrix per group of aliased pixels.

    Every Ry-th line along y and Rz-th along z is sampled, from line `offset` on. The Ry Rz pixels that fold onto each other
    depend on no other, so argmin over x of |A x - data|^2 + regularization |x|^2 is one product of a (Ry Rz) x coil matrix
    with the folded coil images (Pruessmann et al., MRM 42, 1999); the matrices are made here, once for a set of maps.

    maps: complex, (coil, z, y, x). acceleration: (Ry, Rz). offset: (oy, oz), first sampled line in the centered k-space.
    axes: those that are k-space in the data; (-3, -2) where the readout has been transformed on arrival.
    Where R does not divide the matrix size N, pixels of this size do not fold in groups, but those of N / (R M) the size do, M
    being the number of lines: the same field of view, k-space wider or narrower by less than R lines, in which each
    point of the lattice is a measured one. The image is solved there, with maps interpolated to those pixels, and its k-space cut
    or filled up to N lines; `exact` is False. Raises ValueError for an acceleration that is no sampling of `axes`.
    """

    def __init__(
        self,
        maps: Tensor,
        acceleration: tuple[int, int],
        offset: tuple[int, int] = (0, 0),
        *,
        regularization: float = 0.0,
        axes: Sequence[int] = (-3, -2),
    ) -> None:
        self._steps = (acceleration[1], acceleration[0], 1)
        self._starts = (offset[1], offset[0], 0)
        self._shape = tuple(maps.shape)
        _check_lattice(self._shape, self._steps, self._starts, axes)
        self.mask = _lattice(self._shape[1:], self._steps, self._starts, maps.device)
        """What is sampled, boolean, (z, y, x)."""
        self._axes = tuple(axis for axis in sorted(axes) if self._shape[axis] > 1)
        counts = [len(range(first, n, step)) for n, step, first in self._along()]
        sizes = [count * step for count, step in zip(counts, self._steps, strict=True)]
        self.exact = sizes == list(self._shape[1:])
        """Whether pixels fold in groups as they are."""
        # where the lattice begins in the grid that it divides, whose center is that of the matrix
        firsts: list[int] = [
            first - n // 2 + size // 2 for (n, _, first), size in zip(self._along(), sizes, strict=True)
        ]
        self._grid = (self._shape[0], *sizes)
        self._prepare(maps if self.exact else _interpolated(maps, sizes), firsts, regularization)

    def _along(self) -> list[tuple[int, int, int]]:
        """Matrix size, step and first line per axis (z, y, x)."""
        return list(zip(self._shape[1:], self._steps, self._starts, strict=True))

    def solve(self, kspace: Tensor) -> Tensor:
        """The image (..., z, y, x) of centered k-space (..., coil, z, y, x); only the sampled lines are read."""
        if tuple(kspace.shape[-4:]) != self._shape:
            raise ValueError(
                f"kspace has shape {tuple(kspace.shape)}, its last axes must be those of maps {self._shape}"
            )
        (oz, oy, _), (rz, ry, _) = self._starts, self._steps
        return self.solve_lines(kspace[..., oz::rz, oy::ry, :])

    def solve_lines(self, lines: Tensor) -> Tensor:
        """The image (..., z, y, x) of the sampled lines alone, (..., coil, lines along z, lines along y, x), in their order.

        For whoever collects lines in a buffer of their own. Raises ValueError for other shapes.
        """
        coils, z, y, x = self._grid
        rz, ry, _ = self._steps
        if tuple(lines.shape[-4:]) != (coils, z // rz, y // ry, x):
            raise ValueError(
                f"lines has shape {tuple(lines.shape)} for maps {self._shape}, acceleration ({ry}, {rz}); "
                f"its last axes must be {(coils, z // rz, y // ry, x)}"
            )
        folded = lines if self._phase is None else lines * self._phase
        if self._axes:
            folded = torch.fft.ifftn(folded, dim=self._axes, norm="forward")
        folded = folded.contiguous()[..., None, :, None, :, :]
        image = self._unfolding[0] * folded[..., 0, :, :, :, :, :]
        for coil in range(1, coils):
            image.addcmul_(self._unfolding[coil], folded[..., coil, :, :, :, :, :])
        image = image.reshape(*lines.shape[:-4], z, y, x)
        return image if self.exact else _resampled(image, self._shape[1:])

    def g_factor(self) -> Tensor:
        """Noise amplification over that of full sampling, less the sqrt(Ry Rz) of fewer samples: real, (z, y, x).

        sqrt(sum over coils |u|^2) sqrt(sum |maps|^2) / sqrt(Ry Rz), u being the unfolding weights; without regularization
        the g of Pruessmann et al. (1999). 0 where the maps are 0.
        """
        noise = root_sum_of_squares(self._unfolding.reshape(self._grid))
        # The weights hold the scale of the folded transform, the root of its number of points.
        points = math.prod(self._grid[axis] // self._steps[axis] for axis in self._axes)
        factor = noise * self._power.sqrt() * math.sqrt(points / math.prod(self._steps))
        return factor if self.exact else _stretched(factor, self._shape[1:])

    def _prepare(self, maps: Tensor, firsts: Sequence[int], regularization: float) -> None:
        z, y, x = self._grid[1:]
        rz, ry, _ = self._steps
        self._power = root_sum_of_squares(maps).square_()
        _, self._phase = _lattice_phases(self._grid[1:], self._steps, firsts, self._axes, maps)
        columns = lattice_columns(maps, (ry, rz), (firsts[1], firsts[0]), self._axes)
        weights = _least_squares(columns, regularization)
        weights /= math.sqrt(math.prod(self._grid[axis] // self._steps[axis] for axis in self._axes))
        unfolding = weights.movedim(1, 0).reshape(-1, rz, ry, z // rz, y // ry, x).movedim(2, 3)
        self._unfolding = unfolding.to(maps.dtype).contiguous()


def lattice_columns(
    maps: Tensor, acceleration: tuple[int, int], offset: tuple[int, int], axes: Sequence[int]
) -> Tensor:
    """What the coils see of each group of pixels that fold onto each other: complex128, (coil, Rz Ry, groups).

    Arguments as `UniformSense`, whose A^H A is columns^H columns, group by group. A group holds the pixels z / Rz and y / Ry
    apart, z before y; groups are in the order (z / Rz, y / Ry, x). The acceleration must divide the matrix.
    """
    coils, z, y, x = maps.shape
    ry, rz = acceleration
    axes = tuple(axis for axis in axes if maps.shape[axis] > 1)
    shift, _ = _lattice_phases((z, y, x), (rz, ry, 1), (offset[1], offset[0], 0), axes, maps)
    groups = (maps.to(torch.complex128) * shift).reshape(-1, rz, z // rz, ry, y // ry, x)
    return groups.movedim(3, 2).reshape(coils, rz * ry, -1) / math.sqrt(rz * ry)


def _interpolated(maps: Tensor, sizes: Sequence[int]) -> Tensor:
    """(coil, z, y, x) on other numbers of pixels over the same field of view, by cubic splines through four neighbors.

    The root of the sum of squares is interpolated by itself, so that unit maps stay so up to the edge of the object.
    """
    power, maps = _stretched(root_sum_of_squares(maps), sizes), _stretched(maps, sizes)
    return maps * (power.clamp_min(0) / root_sum_of_squares(maps).clamp_min(torch.finfo(power.dtype).tiny))


def _stretched(values: Tensor, sizes: Sequence[int]) -> Tensor:
    for axis, size in zip((-3, -2, -1), sizes, strict=True):
        if size != values.shape[axis]:
            values = _along_axis(values, axis, size)
    return values


def _along_axis(values: Tensor, axis: int, size: int) -> Tensor:
    """Catmull-Rom interpolation; positions keep their distance to the center, indices end at the edges."""
    before = values.shape[axis]
    place = (torch.arange(size, dtype=torch.float64, device=values.device) - size // 2) * (before / size) + before // 2
    left = place.floor()
    t = place - left
    weights = (t * (t * (2 - t) - 1), t * t * (3 * t - 5) + 2, t * (t * (4 - 3 * t) + 1), t * t * (t - 1))
    total = torch.zeros_like(values.index_select(axis, left.long().clamp(0, before - 1)))
    for offset, weight in zip((-1, 0, 1, 2), weights, strict=True):
        index = (left.long() + offset).clamp(0, before - 1)
        shaped = (weight / 2).to(total.real.dtype).reshape((-1,) + (1,) * (-axis - 1))
        total += values.index_select(axis, index) * shaped
    return total


def _resampled(image: Tensor, sizes: Sequence[int]) -> Tensor:
    """(..., z, y, x) on other numbers of pixels over the same field of view, by cutting k-space or filling it with zeros."""
    for axis, size in zip((-3, -2, -1), sizes, strict=True):
        if size != image.shape[axis]:
            kspace = to_kspace(image, (axis,))
            first = size // 2 - image.shape[axis] // 2
            image = to_image(_placed(kspace, axis, size, first), (axis,))
    return image


def _placed(kspace: Tensor, axis: int, size: int, first: int) -> Tensor:
    """Lines along an axis put into `size` lines from `first` on; what lies outside is cut off."""
    count = kspace.shape[axis]
    kept = kspace.narrow(axis, max(0, -first), min(count, size - first) - max(0, -first))
    shape = list(kspace.shape)
    shape[axis] = size
    placed = kspace.new_zeros(shape)
    placed.narrow(axis, max(0, first), kept.shape[axis]).copy_(kept)
    return placed


def _least_squares(columns: Tensor, regularization: float) -> Tensor:
    """(T^H T + regularization)^-1 T^H for each T of `columns`, (coil, pixel, group); result (pixel, coil, group).

    Gauss-Jordan elimination with all groups side by side, which for such small matrices is twice as fast as a batched
    Cholesky factorization. Hermitian positive definite matrices need no pivoting.
    """
    pixels = columns.shape[1]
    adjoint = columns.conj().resolve_conj().transpose(0, 1)
    normal = torch.stack([(row[:, None] * columns).sum(0) for row in adjoint])
    diagonal = normal.diagonal().real.clone()
    # Pixels that no coil sees would make the matrix singular, and coils that are alike nearly so.
    ridge = regularization + 1e-10 * diagonal.amax(-1, keepdim=True) + (diagonal == 0)
    normal.diagonal().add_(ridge)
    system = torch.cat([normal, adjoint], dim=1)
    for pivot in range(pixels):
        system[pivot] /= system[pivot, pivot].clone()
        for other in (row for row in range(pixels) if row != pivot):
            system[other] -= system[other, pivot].clone() * system[pivot]
    return system[:, pixels:]


def _lattice_phases(
    shape: Sequence[int], steps: Sequence[int], starts: Sequence[int], axes: Sequence[int], maps: Tensor
) -> tuple[Tensor, Tensor | None]:
    """What turns a centered lattice into a plain folding: a phase on the maps, and one on the lines, None where it is 1.

    With c = N // 2 and M = N / R points from o on, the m-th sample has frequency o + R m - c: exp(-2 pi i (o-c)(n-c)/N) goes
    onto pixel n and exp(-2 pi i m c/M) onto sample m.
    """
    pixels = torch.zeros(1, 1, 1, dtype=torch.float64)
    lines = pixels
    for axis in axes:
        size, step, start = shape[axis], steps[axis], starts[axis]
        column, center, points = (-1,) + (1,) * (-axis - 1), size // 2, size // step
        index = torch.arange(size)
        pixels = pixels + (((start - center) * (index - center) % size).double() / size).reshape(column)
        lines = lines + ((index[:points] * center % points).double() / points).reshape(column)
    phase = None if not lines.any() else _turns(-lines).to(maps.device, maps.dtype)
    return _turns(-pixels).to(maps.device), phase


def _turns(turns: Tensor) -> Tensor:
    return torch.polar(torch.ones_like(turns), 2 * math.pi * turns)


def _lattice(shape: Sequence[int], steps: Sequence[int], starts: Sequence[int], device: torch.device) -> Tensor:
    mask = torch.zeros(*shape, dtype=torch.bool, device=device)
    mask[tuple(slice(start, None, step) for start, step in zip(starts, steps, strict=True))] = True
    return mask


def _check_lattice(shape: Sequence[int], steps: Sequence[int], starts: Sequence[int], axes: Sequence[int]) -> None:
    if len(shape) != 4:
        raise ValueError(f"maps has shape {tuple(shape)}, needed: (coil, z, y, x)")
    if not set(axes) <= {-3, -2, -1}:
        raise ValueError(f"axes is {tuple(axes)}, allowed are -3, -2 and -1")
    for axis, name in ((-3, "z"), (-2, "y")):
        size, step, start = shape[axis], steps[axis], starts[axis]
        if not 1 <= step <= size or not 0 <= start < step:
            raise ValueError(
                f"acceleration {step}, offset {start} along {name}: needed 0 <= offset < acceleration <= {size}"
            )
        if step > 1 and axis not in axes:
            raise ValueError(
                f"acceleration along {name} is {step}, so {axis} must be among axes, which is {tuple(axes)}"
            )
