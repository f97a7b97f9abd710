"""L1-ESPIRiT: SENSE whose image is sparse in wavelets."""

from __future__ import annotations

import collections
import math
import random
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..operators.cartesian import CartesianSense, Fourier
from ..operators.linear import LinearOperator
from ..operators.wavelet import Wavelet
from .combine import root_sum_of_squares
from .solvers import fista_steps, largest_eigenvalue

__all__ = ["gradient_step", "intensity_scale", "l1_espirit", "l1_espirit_steps", "soft_threshold"]

CALIBRATION = 32
"""Points per axis of the k-space center that the scale is estimated from, at most."""


def l1_espirit(
    operator: LinearOperator,
    data: Tensor,
    *,
    weight: float = 0.005,
    iterations: int = 60,
    wavelet: Wavelet | None = None,
    scale: float | Tensor | None = None,
    step: float | Tensor | None = None,
    seed: int | None = 0,
    shifts: Iterable[Sequence[int]] | None = None,
    end_on_data: bool = False,
) -> Tensor:
    """Minimize 1/2 |A x - data/s|^2 + weight |W x|_1 by FISTA; the image is s x. (Uecker et al., MRM 71, 2014.)

    operator: A, such as `CartesianSense` with ESPIRiT maps. data: shape (*batch, *operator.range).
    weight: the threshold for an image whose bright parts are about 1, as in `bart pics -S -R W:3:0:weight`.
    wavelet: W, by default db4 along y and x, and z in 3-D; BART's is `Wavelet(shape, wavelet="db2")` with a scale more and a
    mirrored border. Real and imaginary part share one threshold, on their magnitude. The image is turned by new random
    shifts, from `seed`, at each iteration; None leaves it in place, as `bart pics -n` does. The shifts gain 1 dB or more, and
    leave an image whose PSNR varies by 0.5 to 1 dB with the seed. shifts: these instead, for each iteration the pixels along
    the axes of the wavelet.
    scale: s, by default `intensity_scale(operator, data)`, as in BART. step: of the gradient, by default 0.95 over a
    bound of the largest eigenvalue of A^H A. end_on_data: one more gradient step after the last threshold, which gives back
    part of what the threshold took, fine structure and noise alike; BART 0.8 ends so as well, but takes that step from the
    extrapolated image. Returns the image, shape (*batch, *operator.domain), contiguous.
    """
    step = gradient_step(operator, data) if step is None else step
    steps = l1_espirit_steps(
        operator,
        data,
        weight=weight,
        iterations=iterations,
        wavelet=wavelet,
        scale=scale,
        step=step,
        seed=seed,
        shifts=shifts,
    )
    image = collections.deque(steps, maxlen=1)[0]
    if end_on_data:
        image = image + step * (operator.H(data) - operator.gram(image))
    return image.contiguous()


def l1_espirit_steps(
    operator: LinearOperator,
    data: Tensor,
    *,
    weight: float = 0.005,
    iterations: int = 60,
    wavelet: Wavelet | None = None,
    scale: float | Tensor | None = None,
    step: float | Tensor | None = None,
    seed: int | None = 0,
    shifts: Iterable[Sequence[int]] | None = None,
) -> Iterator[Tensor]:
    """Yield the image after each iteration of `l1_espirit`."""
    scale = intensity_scale(operator, data) if scale is None else scale
    transform = _default_wavelet(operator) if wavelet is None else wavelet
    turns = iter(shifts) if shifts is not None else None if seed is None else _random_shifts(transform, seed)

    def proximal(x: Tensor, length: float | Tensor) -> Tensor:
        turned = transform if turns is None else transform.shifted(next(turns))
        return turned.H(soft_threshold(turned(x), weight * length))

    step = gradient_step(operator, data) if step is None else step
    for x in fista_steps(operator.gram, operator.H(data) / scale, proximal, iterations=iterations, step=step):
        yield x * scale


def _random_shifts(wavelet: Wavelet, seed: int) -> Iterator[list[int]]:
    draw = random.Random(seed)  # noqa: S311 nothing secret
    while True:
        yield [draw.randrange(wavelet.period) for _ in wavelet.axes]


def soft_threshold(x: Tensor, threshold: float | Tensor) -> Tensor:
    """Shrink each magnitude by `threshold`, to 0 at least; real or complex, any shape."""
    size = torch.linalg.vector_norm(torch.view_as_real(x.resolve_conj()), dim=-1) if x.is_complex() else x.abs()
    factor = 1 - threshold / size.clamp_min(torch.finfo(size.dtype).tiny)
    return x * factor.clamp_min_(0)


def intensity_scale(operator: LinearOperator, data: Tensor) -> Tensor:
    """How bright the bright parts of the image are: a real tensor without axes, in units of the image. As BART 0.8 has it.

    The largest magnitude of a low-resolution image, or the 90th percentile where the largest stands out no further above it
    than twice its height above the median. For a `CartesianSense` the image is the root of the sum of squares of the fully
    sampled k-space center, at most 32 points wide, moved along x to where most energy is; for any other operator A^H data.
    1 where all data are 0.
    """
    image = _low_resolution(operator, data) if isinstance(operator, CartesianSense) else operator.H(data).abs()
    levels = image.flatten().sort().values
    median, high, top = levels[len(levels) // 2], levels[int(len(levels) * 0.9)], levels[-1]
    scale = torch.where(top - high < 2 * (high - median), high, top)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def gradient_step(operator: LinearOperator, data: Tensor) -> Tensor:
    """0.95 over a bound of the largest eigenvalue of A^H A, or over the power iteration's where no bound is known.

    data: tells dtype and device. A real tensor without axes.
    """
    bound = operator.gram_bound if isinstance(operator, CartesianSense) else largest_eigenvalue(operator.gram, data)
    return 0.95 / bound.clamp_min(torch.finfo(bound.dtype).tiny)


def _low_resolution(operator: CartesianSense, data: Tensor) -> Tensor:
    shape = operator.range
    rest = tuple(axis for axis in (-3, -2, -1) if axis not in operator.axes and shape[axis] > 1)
    kspace = Fourier(shape, rest, dtype=data.dtype, device=data.device)(data) if rest else data
    z, y, x = _sampled_center(operator.mask.expand(operator.domain) != 0)
    # BART follows the energy along the readout: an echo need not lie in the middle.
    energy = torch.view_as_real(kspace[..., z, y, :].resolve_conj()).square().sum(-1)
    size = x.stop - x.start
    first = int(energy.flatten(0, -2).sum(0).unfold(0, size, 1).sum(-1).argmax())
    center = kspace[..., z, y, first : first + size] * _half_pixel(kspace[0, z, y, x].shape, kspace.device)
    transform = Fourier(center.shape[-4:], (-3, -2, -1), dtype=data.dtype, device=data.device)
    # Both transforms being orthonormal, fewer points make the small image brighter.
    fewer = math.sqrt(center.numel() / kspace.numel())
    return root_sum_of_squares(transform.H(center)) * fewer


def _half_pixel(shape: Sequence[int], device: torch.device) -> Tensor:
    """Alternating signs, which move the image by half of each axis; where the length is odd, by half a pixel too.

    There BART has its pixels, and with so few of them their places decide how bright the brightest is.
    """
    places = torch.meshgrid([torch.arange(size, device=device) for size in shape], indexing="ij")
    return 1.0 - 2.0 * (torch.stack(places).sum(0) % 2)


def _sampled_center(mask: Tensor) -> tuple[slice, slice, slice]:
    """The largest fully sampled box round the center of a (z, y, x) mask, grown along x, y and z in turn."""
    mask, sizes, grows = mask.cpu(), [1, 1, 1], True
    while grows:
        grows = False
        for axis in (2, 1, 0):
            larger = [size + (place == axis) for place, size in enumerate(sizes)]
            if larger[axis] <= min(mask.shape[axis], CALIBRATION) and bool(mask[_box(mask, larger)].all()):
                sizes, grows = larger, True
    return _box(mask, sizes)


def _box(mask: Tensor, sizes: list[int]) -> tuple[slice, slice, slice]:
    starts = [(whole - size) // 2 for whole, size in zip(mask.shape, sizes, strict=True)]
    z, y, x = (slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
    return z, y, x


def _default_wavelet(operator: LinearOperator) -> Wavelet:
    return Wavelet(operator.domain, (-3, -2, -1) if operator.domain[-3] > CALIBRATION else (-2, -1))
