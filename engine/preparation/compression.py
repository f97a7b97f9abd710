"""Coil compression: fewer virtual coils that hold nearly all of the signal."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["CoilCompression", "coil_compression", "geometric_compression"]


@dataclass(frozen=True, eq=False)
class CoilCompression:
    """How physical coils are combined into virtual ones.

    matrix: complex, shape (virtual, coil), or (x, virtual, coil) where it differs along the readout; rows are
    orthonormal, so whitened noise stays white. energy_kept: fraction of the calibration signal's energy that is kept.
    """

    matrix: torch.Tensor
    energy_kept: float

    @property
    def channels(self) -> int:
        """Number of virtual coils."""
        return int(self.matrix.shape[-2])

    def apply(self, data: torch.Tensor, coil_dim: int = -4) -> torch.Tensor:
        """Compress `data`, any shape with coils along `coil_dim`; its last axis is x where there is a matrix per x."""
        matrix = self.matrix.to(data)
        if matrix.ndim == 2:
            return torch.movedim(torch.tensordot(matrix, data, dims=([1], [coil_dim])), 0, coil_dim)
        return torch.movedim(torch.einsum("xvc,...cx->...vx", matrix, data.movedim(coil_dim, -2)), -2, coil_dim)


def coil_compression(samples: torch.Tensor, channels: int, *, coil_dim: int = -4) -> CoilCompression:
    """One matrix for all of k-space, from the principal components of the coils.

    samples: complex, any shape with coils along `coil_dim`, prewhitened; calibration lines or all that was measured.
    channels: virtual coils wanted; more than there are coils gives a square, lossless matrix.
    Huang et al., MRI 26:133 (2008); Buehrer et al., MRM 57:1131 (2007).
    """
    columns = samples.movedim(coil_dim, 0).flatten(1)
    energies, vectors = _principal(columns @ columns.mH)
    kept = _kept(channels, len(energies))
    return CoilCompression(vectors[:, :kept].mH.to(samples.dtype).contiguous(), _fraction(energies, kept))


def geometric_compression(hybrid: torch.Tensor, channels: int, *, window: int = 5) -> CoilCompression:
    """A matrix per readout position, aligned between neighbors so that the virtual coils vary smoothly.

    hybrid: complex, shape (coil, z, y, x), readout already in image space, prewhitened. channels: virtual coils
    wanted. window: neighboring positions, an odd number, whose samples are pooled.
    The matrix has shape (x, virtual, coil).
    Zhang et al., MRM 69:571 (2013).
    """
    columns = hybrid.movedim(-1, 0).flatten(2)
    energies, vectors = _principal(_pool(columns @ columns.mH, window))
    kept = _kept(channels, energies.shape[-1])
    matrices = _align(vectors[..., :kept].mH)
    return CoilCompression(matrices.to(hybrid.dtype), _fraction(energies, kept))


def _kept(channels: int, coils: int) -> int:
    if channels < 1:
        raise ValueError(f"channels is {channels}; at least 1 virtual coil is needed")
    return min(channels, coils)


def _principal(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Energies, largest first, and their vectors in columns; double precision, since energies span decades."""
    energies, vectors = torch.linalg.eigh(covariance.to(torch.complex128))
    return energies.flip(-1).clamp(min=0), vectors.flip(-1)


def _fraction(energies: torch.Tensor, kept: int) -> float:
    total = float(energies.sum())
    return float(energies[..., :kept].sum()) / total if total > 0 else 1.0


def _pool(covariances: torch.Tensor, window: int) -> torch.Tensor:
    """Sum of the covariances (x, coil, coil) over `window` neighbors; fewer at the two ends."""
    size, half = covariances.shape[0], window // 2
    running = torch.cat([torch.zeros_like(covariances[:1]), covariances.to(torch.complex128)]).cumsum(0)
    position = torch.arange(size, device=covariances.device)
    return running[(position + half + 1).clamp(max=size)] - running[(position - half).clamp(min=0)]


def _align(matrices: torch.Tensor) -> torch.Tensor:
    """Rotate the virtual coils of each position onto those of the one before, from the middle outwards."""
    aligned = matrices.cpu().clone()
    middle = aligned.shape[0] // 2
    for here, before in [(x, x - 1) for x in range(middle + 1, len(aligned))] + [
        (x, x + 1) for x in range(middle)[::-1]
    ]:
        left, _, right = torch.linalg.svd(aligned[before] @ aligned[here].mH)
        aligned[here] = left @ right @ aligned[here]
    return aligned.to(matrices.device)
