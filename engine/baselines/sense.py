"""SENSE: the least-squares image that explains the data of all coils."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..operators.cartesian import CartesianSense
from ..operators.linear import LinearOperator
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
    Where R does not divide the matrix size, pixels no longer fold in groups; `solve` then runs `fallback_iterations` of
    conjugate gradients instead, and `exact` is False. Raises ValueError for an acceleration that is no sampling of `axes`.
    """

    def __init__(
        self,
        maps: Tensor,
        acceleration: tuple[int, int],
        offset: tuple[int, int] = (0, 0),
        *,
        regularization: float = 0.0,
        axes: Sequence[int] = (-3, -2),
        fallback_iterations: int = 50,
    ) -> None:
        self._steps = (acceleration[1], acceleration[0], 1)
        self._starts = (offset[1], offset[0], 0)
        self._shape = tuple(maps.shape)
        _check_lattice(self._shape, self._steps, self._starts, axes)
        self._regularization, self._iterations = regularization, fallback_iterations
        self.mask = _lattice(self._shape[1:], self._steps, self._starts, maps.device)
        """What is sampled, boolean, (z, y, x)."""
        self.exact = all(size % step == 0 for size, step in zip(self._shape[1:], self._steps, strict=True))
        """Whether `solve` is exact, not iterative."""
        self._axes = tuple(axis for axis in sorted(axes) if self._shape[axis] > 1)
        self._operator: CartesianSense | None = None
        if self.exact:
            self._prepare(maps)
        else:
            self._operator = CartesianSense(maps, self.mask, axes)

    def solve(self, kspace: Tensor) -> Tensor:
        """The image (..., z, y, x) of centered k-space (..., coil, z, y, x); only the sampled lines are read."""
        if tuple(kspace.shape[-4:]) != self._shape:
            raise ValueError(
                f"kspace has shape {tuple(kspace.shape)}, its last axes must be those of maps {self._shape}"
            )
        (oz, oy, _), (rz, ry, _) = self._starts, self._steps
        if self._operator is None:
            return self.solve_lines(kspace[..., oz::rz, oy::ry, :])
        return cg_sense(self._operator, kspace, iterations=self._iterations, regularization=self._regularization)

    def solve_lines(self, lines: Tensor) -> Tensor:
        """The image (..., z, y, x) of the sampled lines alone, (..., coil, z / Rz, y / Ry, x), in the order of k-space.

        For whoever collects lines in a buffer of their own. Raises ValueError where `exact` is False, and for other shapes.
        """
        coils, z, y, x = self._shape
        rz, ry, _ = self._steps
        if not self.exact or tuple(lines.shape[-4:]) != (coils, z // rz, y // ry, x):
            raise ValueError(
                f"lines has shape {tuple(lines.shape)} for maps {self._shape}, acceleration ({ry}, {rz}); "
                "each size must be divided by its acceleration, without remainder"
            )
        folded = lines if self._phase is None else lines * self._phase
        if self._axes:
            folded = torch.fft.ifftn(folded, dim=self._axes, norm="forward")
        folded = folded.contiguous()[..., None, :, None, :, :]
        image = self._unfolding[0] * folded[..., 0, :, :, :, :, :]
        for coil in range(1, coils):
            image.addcmul_(self._unfolding[coil], folded[..., coil, :, :, :, :, :])
        return image.reshape(*lines.shape[:-4], z, y, x)

    def g_factor(self) -> Tensor:
        """Noise amplification over that of full sampling, less the sqrt(Ry Rz) of fewer samples: real, (z, y, x).

        sqrt(sum over coils |u|^2) sqrt(sum |maps|^2) / sqrt(Ry Rz), u being the unfolding weights; without regularization
        the g of Pruessmann et al. (1999). 0 where the maps are 0. Raises ValueError where `exact` is False.
        """
        if not self.exact:
            raise ValueError(
                f"acceleration {self._steps[1::-1]} does not divide the matrix {self._shape[1:]}: no g-factor"
            )
        noise = root_sum_of_squares(self._unfolding.reshape(self._shape))
        # The weights hold the scale of the folded transform, the root of its number of points.
        points = math.prod(self._shape[axis] // self._steps[axis] for axis in self._axes)
        return noise * self._power.sqrt() * math.sqrt(points / math.prod(self._steps))

    def _prepare(self, maps: Tensor) -> None:
        z, y, x = self._shape[1:]
        rz, ry, _ = self._steps
        self._power = root_sum_of_squares(maps).square_()
        _, self._phase = _lattice_phases(self._shape[1:], self._steps, self._starts, self._axes, maps)
        columns = lattice_columns(maps, (ry, rz), (self._starts[1], self._starts[0]), self._axes)
        weights = _least_squares(columns, self._regularization)
        weights /= math.sqrt(math.prod(self._shape[axis] // self._steps[axis] for axis in self._axes))
        unfolding = weights.movedim(1, 0).reshape(-1, rz, ry, z // rz, y // ry, x).movedim(2, 3)
        self._unfolding = unfolding.to(maps.dtype).contiguous()


def lattice_columns(
    maps: Tensor, acceleration: tuple[int, int], offset: tuple[int, int], axes: Sequence[int]
) -> Tensor:
    """What the coils see of each group of pixels that fold onto each other: complex128, (coil, Rz Ry, groups).

    Arguments as `UniformSense`, whose A^H A is columns^H columns, group by group. A group holds the pixels z / Rz and y / Ry
    apart, z before y; groups are in the order (z / Rz, y / Ry, x).
    """
    coils, z, y, x = maps.shape
    ry, rz = acceleration
    axes = tuple(axis for axis in axes if maps.shape[axis] > 1)
    shift, _ = _lattice_phases((z, y, x), (rz, ry, 1), (offset[1], offset[0], 0), axes, maps)
    groups = (maps.to(torch.complex128) * shift).reshape(-1, rz, z // rz, ry, y // ry, x)
    return groups.movedim(3, 2).reshape(coils, rz * ry, -1) / math.sqrt(rz * ry)


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
