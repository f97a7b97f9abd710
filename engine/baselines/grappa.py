"""GRAPPA: missing lines as weighted sums of their measured neighbors in all coils.

Kernels are calibrated in k-space. A kernel acts along the readout as a circular convolution, so on data whose readout is
already in image space it is one matrix per position, exactly; that form is the only one that is run. In image space along
all axes it is a matrix per pixel, and with coil maps a set of unmixing coefficients.

Griswold et al., MRM 47:1202 (2002); Breuer et al., MRM 62:739 (2009) for the image-space form.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from ..preparation.filters import central, to_image, to_kspace

__all__ = ["Grappa"]

CALIBRATION_READOUT = 128
"""Central readout points that are calibrated on: the outer ones are mostly noise."""
CHUNK_NUMBERS = 1 << 22
"""Complex numbers of gathered source lines held at a time."""


@dataclass(frozen=True, eq=False)
class Grappa:
    """Calibrated weights.

    weights: complex, shape (cells, coil out, coil in, kz, ky, kx); the cells are the offsets (z, y) from a line of the
    lattice to the missing lines before the next one, in the order of `missing`, the taps are Rz and Ry lines apart.
    acceleration: (Ry, Rz).
    """

    weights: torch.Tensor
    acceleration: tuple[int, int]

    @classmethod
    def calibrate(
        cls,
        calibration: torch.Tensor,
        acceleration: tuple[int, int],
        *,
        kernel: tuple[int, ...] = (5, 4),
        regularization: float = 5e-4,
        hybrid: bool = False,
    ) -> Grappa:
        """Least-squares weights from fully sampled lines.

        calibration: complex, shape (coil, z, y, x), k-space, or with `hybrid` the readout in image space; it must have the
        readout field of view of the data. acceleration: (Ry, Rz), not both 1. kernel: taps along x, y and, where given, z
        (else as y); an axis that is not accelerated gets 3, a thin calibration region fewer. regularization: Tikhonov,
        relative to the mean energy of a source line. Raises ValueError where there are too few lines.
        """
        if acceleration == (1, 1):
            raise ValueError("acceleration is (1, 1): nothing is missing, so there is nothing to calibrate")
        if hybrid:
            calibration = to_kspace(calibration, (-1,))
        calibration = calibration[..., central(calibration.shape[-1], CALIBRATION_READOUT)]
        taps = _taps(calibration, acceleration, kernel)
        sources, targets = _training(calibration, acceleration, taps)
        weights = _fit(sources, targets, regularization)
        coils, cells = calibration.shape[0], len(targets) // calibration.shape[0]
        weights = weights.reshape(cells, coils, taps[2], taps[1], taps[0], coils).movedim(-1, 2)
        return cls(weights.to(calibration.dtype), acceleration)

    @property
    def missing(self) -> list[tuple[int, int]]:
        """Offsets (z, y) of the lines that are filled."""
        return _missing(self.acceleration)

    def lattice(self, mask: torch.Tensor) -> torch.Tensor:
        """Lines of the regular lattice among the measured ones, boolean, shape (z, y).

        mask: boolean, shape (y,), (z, y) or (z, y, x). The lattice may start at any line; extra lines such as the calibration
        region do not hide it.
        """
        lines = _lines(mask)
        z_first, y_first = _origin(lines, self.acceleration)
        result = torch.zeros_like(lines)
        part = (slice(z_first, None, self.acceleration[1]), slice(y_first, None, self.acceleration[0]))
        result[part] = lines[part]
        return result

    def apply(self, kspace: torch.Tensor, mask: torch.Tensor, *, hybrid: bool = False) -> torch.Tensor:
        """Fill missing lines; measured ones stay exactly as they are.

        kspace: complex, shape (coil, z, y, x), or with `hybrid` the readout in image space. mask: as in `lattice`.
        Lines are filled where at least one corner of their cell was measured: what partial Fourier left out stays zero.
        Kernels wrap round at the edges of k-space.
        """
        lines = _lines(mask)
        data = kspace if hybrid else to_image(kspace, (-1,))
        filled = self._fill(data, lines)
        if not hybrid:
            filled = to_kspace(filled, (-1,))
        return torch.where(lines[:, :, None], kspace, filled)

    def unmixing(self, maps: torch.Tensor) -> torch.Tensor:
        """Coefficients, shape (coil, z, y, x): the combined image is their product with the zero-filled coil images, summed.

        maps: unit-norm coil maps, complex, shape (coil, z, y, x). The coil images must come from the lattice's lines alone.
        """
        waves_z, waves_y = self._cell_waves(maps.shape[1], 0), self._cell_waves(maps.shape[2], 1)
        waves_x = _waves(maps.shape[3], self._x_taps(), maps.device).to(maps.dtype)
        result = torch.empty_like(maps)
        for z in range(maps.shape[1]):
            rows = torch.einsum("cp,ycq,coipqr->yroi", waves_z[:, z], waves_y.movedim(0, 1), self.weights)
            for y in range(maps.shape[2]):
                mixing = torch.einsum("xr,roi->xoi", waves_x, rows[y])
                result[:, z, y] = torch.einsum("ox,xoi->ix", maps[:, z, y].conj(), mixing)
        return result + maps.conj()

    # --- inner parts ---------------------------------------------------------------------------------------------------

    def _x_taps(self) -> torch.Tensor:
        count = self.weights.shape[-1]
        return torch.arange(count) - count // 2

    def _cell_waves(self, size: int, axis: int) -> torch.Tensor:
        """Phases of every tap seen from every missing line, shape (cells, positions, taps); axis 0 is z, 1 is y."""
        step = self.acceleration[1 - axis]
        count = self.weights.shape[3 + axis]
        sources = step * (torch.arange(count) - (count - 1) // 2)
        waves = [_waves(size, sources - cell[axis], self.weights.device) for cell in self.missing]
        return torch.stack(waves).to(self.weights.dtype)

    def _fill(self, hybrid: torch.Tensor, lines: torch.Tensor) -> torch.Tensor:
        """All lines within reach, from the lattice's lines alone."""
        blocks = _Blocks(self, lines)
        weights = torch.einsum("xr,coipqr->xcoipq", self._readout_waves(hybrid), self.weights).flatten(3).flatten(1, 2)
        rows = (hybrid * self.lattice(lines)[:, :, None]).flatten(1, 2)
        result = torch.zeros_like(rows)
        chunk = max(1, CHUNK_NUMBERS // (weights.shape[2] * max(1, blocks.sources.shape[1])))
        for first in range(0, rows.shape[-1], chunk):
            part = slice(first, first + chunk)
            sources = rows[:, blocks.sources, part].flatten(0, 1).permute(2, 0, 1)
            filled = torch.bmm(weights[part], sources).reshape(sources.shape[0], -1, rows.shape[0], sources.shape[2])
            for cell, (target, used) in enumerate(blocks.targets):
                result[:, target, part] = filled[:, cell, :, used].permute(1, 2, 0)
        return result.reshape(hybrid.shape)

    def _readout_waves(self, hybrid: torch.Tensor) -> torch.Tensor:
        return _waves(hybrid.shape[-1], self._x_taps(), hybrid.device).to(hybrid.dtype)


class _Blocks:
    """Which lines feed which: flat line indices z * ny + y.

    sources: long, shape (taps, blocks). targets: per missing cell, the lines to fill and the blocks they come from.
    """

    def __init__(self, grappa: Grappa, lines: torch.Tensor) -> None:
        (ry, rz), (nz, ny) = grappa.acceleration, lines.shape
        lattice = grappa.lattice(lines)
        z_first, y_first = _origin(lines, grappa.acceleration)
        z = torch.arange(z_first - rz if z_first else 0, nz, rz, device=lines.device)
        y = torch.arange(y_first - ry if y_first else 0, ny, ry, device=lines.device)
        starts = torch.cartesian_prod(z, y)
        starts = starts[_reached(lattice, starts, rz, ry)]
        kz, ky = grappa.weights.shape[3:5]
        taps = [
            (rz * (p - (kz - 1) // 2), ry * (q - (ky - 1) // 2)) for p, q in itertools.product(range(kz), range(ky))
        ]
        self.sources = torch.stack([(starts[:, 0] + p) % nz * ny + (starts[:, 1] + q) % ny for p, q in taps])
        self.targets = [_inside(starts + torch.tensor(cell, device=lines.device), nz, ny) for cell in grappa.missing]


def _inside(targets: torch.Tensor, nz: int, ny: int) -> tuple[torch.Tensor, torch.Tensor]:
    z, y = targets.T
    used = torch.nonzero((z >= 0) & (z < nz) & (y >= 0) & (y < ny)).flatten()
    return z[used] * ny + y[used], used


def _reached(lattice: torch.Tensor, starts: torch.Tensor, rz: int, ry: int) -> torch.Tensor:
    """Whether a corner of the cell that begins at each start was measured."""
    reached = torch.zeros(len(starts), dtype=torch.bool, device=lattice.device)
    for corner in itertools.product((0, rz), (0, ry)):
        z, y = (starts + torch.tensor(corner, device=lattice.device)).T
        inside = (z >= 0) & (z < lattice.shape[0]) & (y >= 0) & (y < lattice.shape[1])
        reached |= inside & lattice[z.clamp(0, lattice.shape[0] - 1), y.clamp(0, lattice.shape[1] - 1)]
    return reached


def _lines(mask: torch.Tensor) -> torch.Tensor:
    """Measured lines, boolean, shape (z, y)."""
    mask = mask.to(torch.bool)
    return mask[None] if mask.ndim == 1 else mask.any(-1) if mask.ndim == 3 else mask


def _origin(lines: torch.Tensor, acceleration: tuple[int, int]) -> tuple[int, int]:
    """First line (z, y) of the lattice: the offsets at which most lines were measured."""
    ry, rz = acceleration
    counts = {(z, y): int(lines[z::rz, y::ry].sum()) for z, y in itertools.product(range(rz), range(ry))}
    return max(counts, key=counts.__getitem__)


def _missing(acceleration: tuple[int, int]) -> list[tuple[int, int]]:
    return [cell for cell in itertools.product(range(acceleration[1]), range(acceleration[0])) if cell != (0, 0)]


def _waves(size: int, shifts: torch.Tensor, device: torch.device) -> torch.Tensor:
    """exp(-2 pi i m (n - N//2) / N), shape (n, m): what a shift by m points in k-space is in image space."""
    position = torch.arange(size, dtype=torch.float64, device=device) - size // 2
    angle = -2 * torch.pi / size * position[:, None] * shifts.to(position)
    return torch.polar(torch.ones_like(angle), angle)


def _taps(calibration: torch.Tensor, acceleration: tuple[int, int], kernel: tuple[int, ...]) -> tuple[int, int, int]:
    """Taps along x, y, z that fit into the calibration region."""
    wanted = (kernel[0], kernel[1], kernel[2] if len(kernel) > 2 else kernel[1])
    steps = (1, *acceleration)
    x, y, z = (
        _fitting(count if axis == 0 or step > 1 else 3, step, calibration.shape[-1 - axis], "xyz"[axis])
        for axis, (count, step) in enumerate(zip(wanted, steps, strict=True))
    )
    return x, y, z


def _fitting(count: int, step: int, available: int, axis: str) -> int:
    while step * (count - 1) + 1 > available and count > 1:
        count -= 1
    if step > 1 and (count < 2 or step * (count - 1) + 1 > available):
        raise ValueError(f"calibration has {available} lines along {axis}; an acceleration of {step} needs {step + 1}")
    return count if step > 1 else count - (count + 1) % 2


def _training(
    calibration: torch.Tensor, acceleration: tuple[int, int], taps: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """All examples: sources (taps * coil, examples) and targets (cells * coil, examples)."""
    steps = (acceleration[1], acceleration[0], 1)
    counts = taps[::-1]
    before = [step * ((count - 1) // 2) for step, count in zip(steps, counts, strict=True)]
    lengths = [n - step * (count - 1) for n, step, count in zip(calibration.shape[1:], steps, counts, strict=True)]

    def cut(*offset: int) -> torch.Tensor:
        part = [slice(first, first + length) for first, length in zip(offset, lengths, strict=True)]
        return calibration[(slice(None), *part)].flatten(1)

    sources = [cut(*(s * i for s, i in zip(steps, tap, strict=True))) for tap in itertools.product(*map(range, counts))]
    targets = [cut(before[0] + z, before[1] + y, before[2]) for z, y in _missing(acceleration)]
    return torch.cat(sources), torch.cat(targets)


def _fit(sources: torch.Tensor, targets: torch.Tensor, regularization: float) -> torch.Tensor:
    """Regularized least squares, targets = weights @ sources; solved in double precision."""
    gram = (sources @ sources.mH).to(torch.complex128)
    cross = (targets @ sources.mH).to(torch.complex128)
    gram.diagonal().add_(regularization * gram.diagonal().real.mean())
    weights: torch.Tensor = torch.linalg.solve(gram, cross.mH).mH
    return weights
