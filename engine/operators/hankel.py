"""Low rank of k-space: windows of all coils as the rows of a Hankel matrix, and the same projection pixel by pixel.

A window of w x w points of all coils, slid over k-space, gives a matrix H of few large singular values, because the coils
are smooth and the object is finite (Shin et al., SAKE, MRM 72, 2014). Projecting its rows onto the leading right singular
vectors V and averaging the overlaps is, away from the border of k-space, a convolution of k-space, hence a multiplication of
each pixel's coil values by a coil x coil matrix,

    M(r)[c', c] = sum over offsets d of G[d; c', c] exp(-2 pi i d r / N),
    G[d; c', c] = 1/w^2 sum over a of P[(c, a + d), (c', a)],    P = V V^H,

and the Gram matrix H^H H holds nothing but the correlations of the coils at offsets below w. So a step of SAKE needs neither
the matrix nor a Fourier transform: correlations, one eigendecomposition, matrices, one product per pixel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.coil_matrix import apply, triangle
from .linear import LinearOperator

__all__ = ["Hankel", "coil_matrices", "correlation_gram", "image_low_rank", "leading_subspace"]


class Hankel(LinearOperator):
    """K-space (coil, y, x) to the matrix of its windows, (positions, coil * window * window), overlaps and all.

    The adjoint adds the overlapping entries up; `average` divides by their number, so that `average(H(k))` is k.
    Raises ValueError for a window that does not fit into k-space.
    """

    def __init__(self, shape: Sequence[int], window: int) -> None:
        coils, height, width = shape
        if not 1 <= window <= min(height, width):
            raise ValueError(
                f"window is {window}, it must lie between 1 and {min(height, width)} for k-space {tuple(shape)}"
            )
        self._window, self._positions = window, (height - window + 1, width - window + 1)
        super().__init__(shape, (self._positions[0] * self._positions[1], coils * window**2))

    def average(self, rows: Tensor) -> Tensor:
        """The k-space nearest to a matrix: mean over the entries that stand for one sample. Shape (*batch, coil, y, x)."""
        counts = [_overlaps(size, self._window, rows.device) for size in self.domain[1:]]
        return self.H(rows) / torch.outer(counts[0], counts[1]).to(rows.real.dtype)

    def _forward(self, x: Tensor) -> Tensor:
        windows = x.unfold(-2, self._window, 1).unfold(-2, self._window, 1)
        return windows.movedim(-5, -3).reshape(*x.shape[:-3], *self.range)

    def _backward(self, y: Tensor) -> Tensor:
        coils, (rows, columns), size = self.domain[0], self._positions, self._window
        windows = y.reshape(*y.shape[:-2], rows, columns, coils, size, size).movedim(-3, -5)
        k = y.new_zeros(*y.shape[:-2], *self.domain)
        for a, b in itertools.product(range(size), repeat=2):
            k[..., a : a + rows, b : b + columns] += windows[..., a, b]
        return k


def _overlaps(size: int, window: int, device: torch.device) -> Tensor:
    index = torch.arange(size, device=device)
    least = torch.minimum(index + 1, size - index)
    return least.clamp(max=min(window, size - window + 1))


def leading_subspace(gram: Tensor, rank: int, energy: float = 1.0) -> Tensor:
    """The `rank` leading eigenvectors V of a Gram matrix H^H H, shape (size, rank): the right singular vectors of H.

    Fewer where `energy` of the trace, that is of |H|^2, needs fewer. In double precision, for the Gram matrix squares the range
    of the singular values. Raises ValueError for a rank beyond the size.
    """
    size = gram.shape[-1]
    if not 1 <= rank <= size:
        raise ValueError(f"rank is {rank}, it must lie between 1 and the size {size} of the window over all coils")
    values, vectors = torch.linalg.eigh(gram.to(torch.complex128))
    if energy < 1:
        held = values.clamp_min(0).flip(0).cumsum(0)
        rank = min(rank, 1 + int((held < energy * held[-1]).sum()))
    leading: Tensor = vectors[..., size - rank :]
    return leading


def correlation_gram(images: Tensor, window: int) -> Tensor:
    """H^H H of the k-space of coil images, windows wrapping round its border; complex128, (coil w w, coil w w).

    images: complex, (coil, y, x), centered. Only the products of the coil images and their lowest frequencies are needed.
    The scale is that of orthonormal transforms.
    """
    coils, (height, width) = images.shape[0], images.shape[-2:]
    _check_window(window, height, width)
    x = images.to(torch.complex128)
    products = x.conj()[:, None] * x[None]
    # sum over k of conj(k_c[k]) k_c'[k + d] = sum over r of conj(x_c) x_c' exp(-2 pi i d r / N)
    lags = _waves(window, height, x) @ products @ _waves(window, width, x).mT
    places = torch.arange(window, device=images.device)
    offsets = places[None, :] - places[:, None] + window - 1
    blocks = lags[:, :, offsets[:, None, :, None], offsets[None, :, None, :]]
    return blocks.permute(0, 2, 3, 1, 4, 5).reshape(coils * window**2, coils * window**2)


def coil_matrices(subspace: Tensor, coils: int, shape: tuple[int, int]) -> Tensor:
    """M(r), the projection onto `subspace` in image space: the upper triangle of each pixel's Hermitian matrix.

    subspace: V, (coil w w, rank), orthonormal columns. shape: (y, x) of the centered images. Returns complex64 of shape
    (coil (coil + 1) / 2, y, x), from the module's formula, for `scanside.kernels.coil_matrix.apply`.
    """
    window = round((subspace.shape[0] / coils) ** 0.5)
    if coils * window**2 != subspace.shape[0]:
        raise ValueError(f"subspace has {subspace.shape[0]} rows, needed: {coils} coils times the square of a window")
    _check_window(window, *shape)
    projector = (subspace @ subspace.mH).reshape(coils, window, window, coils, window, window)
    rows, columns = triangle(coils)
    kernel = _offset_means(projector, window)[rows, columns].to(torch.complex64)
    return _waves(window, shape[0], kernel).mT @ kernel @ _waves(window, shape[1], kernel)


def image_low_rank(images: Tensor, window: int, rank: int, energy: float = 1.0) -> Tensor:
    """Coil images (coil, y, x) after projection of the Hankel matrix of their k-space to `rank`, windows wrapping round.

    To a lower rank where that holds `energy` of |H|^2.
    """
    subspace = leading_subspace(correlation_gram(images, window), rank, energy)
    matrices = coil_matrices(subspace, images.shape[0], (images.shape[-2], images.shape[-1]))
    return apply(matrices.to(images.dtype), images)


def _offset_means(projector: Tensor, window: int) -> Tensor:
    """G[c', c, dy, dx] of the module's formula from P, (c, ay, ax, c', by, bx)."""
    coils = projector.shape[0]
    kernel = projector.new_zeros(coils, coils, 2 * window - 1, 2 * window - 1)
    for y, x in itertools.product(range(window), repeat=2):
        rows, columns = (slice(window - 1 - place, 2 * window - 1 - place) for place in (y, x))
        kernel[:, :, rows, columns] += projector[..., y, x].permute(3, 0, 1, 2)
    return kernel / window**2


def _waves(window: int, size: int, like: Tensor) -> Tensor:
    """exp(-2 pi i d (n - N//2) / N) for the offsets d below `window`, shape (2 window - 1, size)."""
    offsets = torch.arange(1 - window, window, device=like.device)
    turns = torch.outer(offsets, torch.arange(size, device=like.device) - size // 2) % size
    angle = turns.double() * (-2 * torch.pi / size)
    return torch.polar(torch.ones_like(angle), angle).to(like.dtype)


def _check_window(window: int, height: int, width: int) -> None:
    if not 1 <= window <= (min(height, width) + 1) // 2:
        raise ValueError(f"window is {window}, it must lie between 1 and half of the image, {height} x {width}")
