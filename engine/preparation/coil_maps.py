"""Coil sensitivity maps: ESPIRiT from calibration lines, and a quick estimate from fully sampled coil images.

All maps have unit norm over the coils wherever they are defined and are 0 elsewhere. Their phase is such that the first
principal virtual coil of the calibration data is real and positive, as in BART.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch.nn.functional import interpolate, pad

__all__ = ["EspiritMaps", "espirit", "espirit_with_eigenvalues", "hybrid_to_kspace", "walsh"]

COARSE = 4
"""Pixels per axis that share one start vector of the power iteration."""
SQUARINGS = 4
"""The start vectors come from the 2^4-th power of each matrix."""
ITERATIONS = 4
"""Power iterations per pixel after that."""
BLOCK_NUMBERS = 1 << 19
"""Complex numbers of per-pixel matrices held at a time: small enough to stay in a processor's cache."""


@dataclass(frozen=True, eq=False)
class EspiritMaps:
    """Maps, complex, shape (coil, z, y, x), and the eigenvalue of each pixel, real, shape (z, y, x), 0 to 1."""

    maps: torch.Tensor
    eigenvalues: torch.Tensor


def espirit(
    calibration: torch.Tensor,
    shape: tuple[int, int, int],
    *,
    kernel: int = 6,
    threshold: float = 0.02,
    crop: float = 0.8,
    calibration_size: int = 24,
    hybrid: bool = False,
) -> torch.Tensor:
    """Sensitivity maps from fully sampled lines around the k-space center, shape (coil, z, y, x).

    calibration: complex, shape (coil, z, y, x), k-space with its center at N//2 of each axis; with `hybrid` the x axis
    is in image space. shape: (z, y, x) of the maps. kernel: points per axis, fewer where the region is thin.
    threshold: singular values below this fraction of the largest belong to the null space (BART's -t is its square).
    crop: maps are 0 where the eigenvalue is below (-c). calibration_size: central points per axis that are used (-r).
    Raises ValueError on calibration data that is empty, not finite or all zero.
    Uecker et al., MRM 71:990 (2014), in the form where the autocorrelation of the kernels gives each pixel's matrix.
    """
    result = espirit_with_eigenvalues(
        calibration,
        shape,
        kernel=kernel,
        threshold=threshold,
        crop=crop,
        calibration_size=calibration_size,
        hybrid=hybrid,
    )
    return result.maps


def espirit_with_eigenvalues(
    calibration: torch.Tensor,
    shape: tuple[int, int, int],
    *,
    kernel: int = 6,
    threshold: float = 0.02,
    crop: float = 0.8,
    calibration_size: int = 24,
    hybrid: bool = False,
) -> EspiritMaps:
    """As `espirit`, with the eigenvalue of every pixel beside the maps."""
    if hybrid:
        calibration = hybrid_to_kspace(calibration, calibration_size)
    calibration = _central(calibration, calibration_size)
    _check(calibration)
    size = _kernel_size(calibration, kernel)
    spectrum = _autocorrelation(_signal_projector(calibration, size, threshold), calibration.shape[0], size)
    reference = _principal_coil(calibration)
    return _per_pixel(_Spectrum(spectrum, shape), reference, crop)


def hybrid_to_kspace(hybrid: torch.Tensor, size: int | None = None) -> torch.Tensor:
    """Transform the x axis, which is in image space, to k-space and keep its central `size` points (default: all).

    hybrid: complex, shape (..., x). Centered orthonormal transform.
    """
    kspace = torch.fft.fftshift(torch.fft.fft(torch.fft.ifftshift(hybrid, dim=-1), norm="ortho"), dim=-1)
    return kspace if size is None else _narrow(kspace, -1, size)


def walsh(images: torch.Tensor, shape: tuple[int, int, int] | None = None, *, block: int = 4) -> torch.Tensor:
    """Quick sensitivity maps from fully sampled coil images, shape (coil, z, y, x).

    images: complex, shape (coil, z, y, x), may be of low resolution. shape: (z, y, x) of the maps (default: as the
    images). block: pixels per axis whose coil covariance is pooled, smoothed over 3 blocks per axis.
    The maps are the first eigenvectors of the covariances, interpolated; there is no crop: where there is no signal
    they are noise. Walsh et al., MRM 43:682 (2000).
    """
    covariance = _smooth(_block_covariance(images, block))
    reference = _principal_coil(images)
    vectors = _phased(_dominant(covariance, squarings=3), reference)
    return _normalized(_upsample(vectors, shape or _spatial(images)), dim=0)


# --- ESPIRiT, calibration -------------------------------------------------------------------------------------------


def _spatial(data: torch.Tensor) -> tuple[int, int, int]:
    z, y, x = data.shape[-3:]
    return z, y, x


def _narrow(data: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """The central `size` points, center at N//2 before and after."""
    length = data.shape[dim]
    return data if size >= length else data.narrow(dim, length // 2 - size // 2, size)


def _central(calibration: torch.Tensor, size: int) -> torch.Tensor:
    for dim in (-3, -2, -1):
        calibration = _narrow(calibration, dim, size)
    return calibration


def _check(calibration: torch.Tensor) -> None:
    if calibration.ndim != 4 or calibration.numel() == 0 or not calibration.is_complex():
        raise ValueError(
            f"calibration is {calibration.dtype} {tuple(calibration.shape)}; expected complex (coil, z, y, x), none 0"
        )
    energy = float(calibration.abs().square().sum())
    if not 0 < energy < float("inf"):
        raise ValueError(
            f"calibration has energy {energy}; it must be finite and above 0: check which lines were given"
        )


def _kernel_size(calibration: torch.Tensor, kernel: int) -> tuple[int, int, int]:
    """Kernel points along z, y, x: no more than half of the calibration region, so that several positions remain."""
    z, y, x = (min(kernel, (n + 1) // 2) for n in _spatial(calibration))
    return z, y, x


def _patches(calibration: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
    """All kernel-sized patches, shape (positions, coil * kz * ky * kx), in double precision."""
    windows = calibration.to(torch.complex128)
    for dim, k in zip((1, 2, 3), size, strict=True):
        windows = windows.unfold(dim, k, 1)
    return windows.permute(1, 2, 3, 0, 4, 5, 6).flatten(3).flatten(0, 2)


def _signal_projector(calibration: torch.Tensor, size: tuple[int, int, int], threshold: float) -> torch.Tensor:
    """Projector onto the span of the patches without the null space, from the smaller of the two Gram matrices."""
    patches = _patches(calibration, size)
    if patches.shape[0] < patches.shape[1]:
        values, left = torch.linalg.eigh(patches @ patches.mH)
        signal = values > threshold**2 * values[-1]
        basis = patches.mT @ (left[:, signal].conj() / values[signal].sqrt())
    else:
        values, right = torch.linalg.eigh(patches.mT @ patches.conj())
        basis = right[:, values > threshold**2 * values[-1]]
    return torch.matmul(basis, basis.mH).to(calibration.dtype)


def _autocorrelation(projector: torch.Tensor, coils: int, size: tuple[int, int, int]) -> torch.Tensor:
    """Mean of the projector over equal kernel offsets, shape (2kz-1, 2ky-1, 2kx-1, coil, coil).

    These are the Fourier coefficients of each pixel's matrix: it is band-limited to the kernel's autocorrelation.
    """
    blocks = projector.reshape(coils, *size, coils, *size).permute(1, 2, 3, 5, 6, 7, 0, 4)
    result = projector.new_zeros(*(2 * k - 1 for k in size), coils, coils)
    for z, y, x in itertools.product(*map(range, size)):
        window = tuple(slice(k - 1 - m, 2 * k - 1 - m) for k, m in zip(size, (z, y, x), strict=True))
        result[window] += blocks[:, :, :, z, y, x]
    return result / (size[0] * size[1] * size[2])


def _principal_coil(data: torch.Tensor) -> torch.Tensor:
    """Weights (coil,) of the virtual coil with most signal; the last coil's weight is real and positive."""
    columns = data.flatten(1)
    vector = torch.linalg.eigh((columns @ columns.mH).to(torch.complex128))[1][:, -1]
    return torch.mul(vector, torch.exp(-1j * vector[-1].angle())).to(data.dtype)


# --- ESPIRiT, per pixel ---------------------------------------------------------------------------------------------


class _Spectrum:
    """Each pixel's coil matrix as a trigonometric polynomial, evaluated at any positions of a grid of `shape`."""

    def __init__(self, coefficients: torch.Tensor, shape: tuple[int, int, int]) -> None:
        self.coefficients = coefficients
        self.shape = shape
        self.coils = int(coefficients.shape[-1])

    def waves(self, axis: int, positions: torch.Tensor) -> torch.Tensor:
        """exp(2 pi i d p / N), shape (positions, offsets d)."""
        half = self.coefficients.shape[axis] // 2
        offsets = torch.arange(-half, half + 1, device=positions.device, dtype=positions.dtype)
        angle = 2 * torch.pi / self.shape[axis] * (positions - self.shape[axis] // 2)[:, None] * offsets
        return torch.polar(torch.ones_like(angle), angle).to(self.coefficients.dtype)

    def slab(self, z: torch.Tensor) -> torch.Tensor:
        """Coefficients along y and x at the position z, a scalar tensor."""
        slab: torch.Tensor = torch.tensordot(self.waves(0, z[None])[0], self.coefficients, dims=1)
        return slab

    def rows(self, slab: torch.Tensor, y: torch.Tensor, x_waves: torch.Tensor) -> torch.Tensor:
        """Matrices at rows `y` of a slab, shape (y, x, coil, coil)."""
        rows = torch.tensordot(self.waves(1, y), slab, dims=1)
        return torch.matmul(x_waves, rows.flatten(2)).reshape(len(y), len(x_waves), self.coils, self.coils)

    def grid(self, counts: tuple[int, ...]) -> torch.Tensor:
        """Matrices in the middles of `counts` equal cells per axis, shape (z, y, x, coil, coil)."""
        middles = [
            (torch.arange(m, device=self.coefficients.device, dtype=torch.float64) + 0.5) * n / m - 0.5
            for m, n in zip(counts, self.shape, strict=True)
        ]
        x_waves = self.waves(2, middles[2])
        return torch.stack([self.rows(self.slab(z), middles[1], x_waves) for z in middles[0]])


def _per_pixel(spectrum: _Spectrum, reference: torch.Tensor, crop: float) -> EspiritMaps:
    """Leading eigenvector of every pixel's matrix: from a coarse grid, then power iteration in blocks of rows."""
    vectors = _start_vectors(spectrum, reference)
    values = vectors.new_zeros(spectrum.shape, dtype=vectors.real.dtype)
    y, x = (torch.arange(n, device=vectors.device, dtype=torch.float64) for n in spectrum.shape[1:])
    x_waves = spectrum.waves(2, x)
    block = max(1, BLOCK_NUMBERS // (spectrum.shape[2] * spectrum.coils**2))
    for z in range(spectrum.shape[0]):
        slab = spectrum.slab(torch.tensor(float(z), device=vectors.device, dtype=torch.float64))
        for part in (slice(first, first + block) for first in range(0, len(y), block)):
            found, values[z, part] = _refine(spectrum.rows(slab, y[part], x_waves), vectors[z, part])
            vectors[z, part] = _phased(found, reference)
    return EspiritMaps((vectors * (values >= crop)[..., None]).movedim(-1, 0).contiguous(), values)


def _start_vectors(spectrum: _Spectrum, reference: torch.Tensor) -> torch.Tensor:
    """Approximate eigenvectors, shape (z, y, x, coil), interpolated from the middles of small cells."""
    least = (min(n, 2 * k) for n, k in zip(spectrum.shape, spectrum.coefficients.shape, strict=False))
    counts = tuple(max(m, -(-n // COARSE)) for m, n in zip(least, spectrum.shape, strict=True))
    return _upsample(_phased(_dominant(spectrum.grid(counts)), reference), spectrum.shape).movedim(0, -1).contiguous()


def _refine(matrices: torch.Tensor, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Power iterations: unit vectors (..., coil) and eigenvalues (...); these are at most 1, so nothing overflows."""
    column = vectors[..., None]
    for _ in range(ITERATIONS - 1):
        column = matrices @ column
    image = torch.view_as_real((matrices @ column)[..., 0])
    before = torch.view_as_real(column[..., 0])
    tiny = torch.finfo(before.dtype).tiny
    values = (before * image).sum(dim=(-2, -1)) / before.square().sum(dim=(-2, -1)).clamp(min=tiny)
    return _normalized(torch.view_as_complex(image), dim=-1), values


def _dominant(matrices: torch.Tensor, squarings: int = SQUARINGS) -> torch.Tensor:
    """Leading eigenvectors (..., coil) of positive semidefinite matrices (..., coil, coil), by repeated squaring."""
    for _ in range(squarings):
        trace = matrices.diagonal(dim1=-2, dim2=-1).real.sum(-1).clamp(min=torch.finfo(matrices.real.dtype).tiny)
        matrices = matrices / trace[..., None, None]
        matrices = matrices @ matrices
    largest = matrices.diagonal(dim1=-2, dim2=-1).real.argmax(-1)
    index = largest[..., None, None].expand(*matrices.shape[:-1], 1)
    return _normalized(matrices.gather(-1, index)[..., 0], dim=-1)


def _phased(vectors: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Rotate vectors (..., coil) so that the virtual coil `reference` is real and not negative."""
    virtual = vectors @ reference.conj()
    size = virtual.abs()
    rotation = torch.where(size > 0, virtual.conj() / size.clamp(min=torch.finfo(size.dtype).tiny), 1.0)
    return vectors * rotation[..., None]


def _normalized(vectors: torch.Tensor, dim: int) -> torch.Tensor:
    parts = torch.view_as_real(vectors)
    energy = parts.square().sum(-1).sum(dim, keepdim=True)
    return vectors * energy.clamp(min=torch.finfo(parts.dtype).tiny).rsqrt()


def _upsample(vectors: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Linear interpolation of (z, y, x, coil) from cell middles to (coil, *shape)."""
    planes = torch.cat([vectors.real, vectors.imag], dim=-1).movedim(-1, 0)[None].contiguous()
    if vectors.shape[0] == shape[0] == 1:
        fine = interpolate(planes[:, :, 0], size=shape[1:], mode="bilinear", align_corners=False)[:, :, None]
    else:
        fine = interpolate(planes, size=shape, mode="trilinear", align_corners=False)
    return torch.complex(*fine[0].chunk(2))


# --- fully sampled images -------------------------------------------------------------------------------------------


def _block_covariance(images: torch.Tensor, block: int) -> torch.Tensor:
    """Coil covariance of blocks of pixels, shape (z, y, x, coil, coil); the last block may be padded."""
    sizes = [min(block, n) for n in _spatial(images)]
    missing = [-n % b for n, b in zip(_spatial(images), sizes, strict=True)]
    padded = pad(images, (0, missing[2], 0, missing[1], 0, missing[0]))
    counts = [n // b for n, b in zip(_spatial(padded), sizes, strict=True)]
    pairs = [length for pair in zip(counts, sizes, strict=True) for length in pair]
    columns = padded.reshape(-1, *pairs).permute(1, 3, 5, 0, 2, 4, 6).flatten(4)
    return torch.matmul(columns, columns.mH)


def _smooth(covariance: torch.Tensor) -> torch.Tensor:
    """Weights 1 2 1 along z, y and x."""
    for dim in range(3):
        if covariance.shape[dim] > 1:
            first, last = covariance.narrow(dim, 0, 1), covariance.narrow(dim, -1, 1)
            longer = torch.cat([first, covariance, last], dim)
            length = covariance.shape[dim]
            covariance = longer.narrow(dim, 0, length) + 2 * covariance + longer.narrow(dim, 2, length)
    return covariance
