"""Which domain a network knows, and what it is worth in the domain of a stage.

One network serves many systems where their domains differ by a map U with |U z|^2 = a |z|^2: noise of level sigma on U z tells of
z as much as noise of level sigma / sqrt(a) on z, so E[u | u + n] = U E[z | z + n / sqrt(a)]. Copies, undecimated Haar bands and
unweighted k-space are such maps of the image. Weighted k-space is one of the image that the weights filter, F^H W F x, where
the constant c of the weights is part of a: a network of filtered images (c = 1) is the score of weighted k-space for each c
and each size of image, and sees edges next to each other where one of k-space sees waves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from ..config_priors import StageConfig, TrainingConfig, TransformConfig
from ..errors import ConfigError
from ..operators.hankel import Hankel
from ..simulation.coils import coil_maps
from .denoiser import DenoiseFunction
from .transforms import HankelMatrix, Kspace, KspaceHaar, Transform

__all__ = ["filtered_prior", "hankel_prior", "image_prior", "network_domain", "network_planes", "random_phase"]

_LINES = 16
"""Lines of windows that a network is given at once."""
_PHASES = 2
"""Versions of each image with random phase that are taken to another domain."""


def network_domain(stage: StageConfig) -> TransformConfig:
    """What takes an image to where the network of a stage is at home."""
    if stage.prior.domain == "image":
        return TransformConfig()
    if stage.prior.domain == "filtered":
        return msgspec.structs.replace(stage.transform, kind="filtered", copies=1, split=False, weight_scale=1.0)
    return stage.transform


def network_planes(images: Sequence[Tensor] | Tensor, stage: StageConfig, config: TrainingConfig) -> list[Tensor]:
    """Images (2, y, x) as planes of the domain of the stage's network, (channels, rows, columns) in half precision.

    Whole images are taken there, so patches are cut from what their k-space makes of all of it. Two versions of each image have
    random phases, for a phase that rises along an axis is no factor in every domain. With `config.hankel_window` the plane is
    the Hankel matrix of the first image as some coils see it.
    """
    chosen = list(images[: config.images or len(images)])
    if config.hankel_window:
        return [_hankel_plane(image, stage.transform, config) for image in chosen]
    domain = network_domain(stage)
    if domain == TransformConfig():
        return chosen
    planes = []
    for index, image in enumerate(chosen):
        versions = image.float().expand(_PHASES if config.phase else 1, *image.shape)
        if config.phase:
            versions = random_phase(versions, torch.Generator().manual_seed(config.seed * 1_000_003 + index))
        transform = Transform(domain, (image.shape[-2], image.shape[-1]))
        planes += list(transform.forward(torch.complex(versions[:, 0], versions[:, 1])).half())
    return planes


def _hankel_plane(image: Tensor, transform: TransformConfig, config: TrainingConfig) -> Tensor:
    """Rows are the positions of the window in weighted k-space, columns its points in all coils: (2, rows, columns)."""
    shape = (image.shape[-2], image.shape[-1])
    maps = torch.from_numpy(coil_maps(config.hankel_coils).image(shape)).to(torch.complex64)
    maps = maps / maps.abs().square().sum(0).sqrt()
    weighted = Kspace(shape, transform)(maps * torch.complex(*image.float()))[:, 0]
    rows = Hankel(weighted.shape, config.hankel_window)(weighted)
    return torch.stack([rows.real, rows.imag]).half()


def random_phase(batch: Tensor, generator: torch.Generator, *, slopes: bool = True) -> Tensor:
    """Turn complex images (N, 2, H, W) by random phases, with a random slope of up to a turn over 128 pixels if so wanted."""
    count, _, height, width = batch.shape
    start, down, right = (math.pi * (2 * torch.rand(count, 1, 1, generator=generator) - 1) for _ in range(3))
    rows, columns = torch.arange(height).reshape(1, -1, 1) / 128, torch.arange(width).reshape(1, 1, -1) / 128
    angle = start + down * rows + right * columns if slopes else start
    real, imaginary, c, s = batch[:, 0], batch[:, 1], angle.cos(), angle.sin()
    return torch.stack([c * real - s * imaginary, s * real + c * imaginary], 1)


def image_prior(denoise: DenoiseFunction, transform: Transform) -> DenoiseFunction:
    """The prior of a domain from one of plain images, exact where the transform keeps lengths, |u|^2 = a |z|^2.

    What is orthogonal to the image of T tells nothing of z. Hence m copies are one image at sigma / sqrt(m), the undecimated
    Haar bands one at sigma / 2, and k-space without weights one at sigma / sqrt(N).

    denoise: of real and imaginary part as two channels. Raises `ConfigError` where the transform weighs k-space or leaves a
    part out: such a domain needs a network of its own.
    """
    gain = transform.analysis.gain
    if gain is None:
        raise ConfigError(
            f"prior.domain = 'image' with transform.kind = {transform.config.kind!r}: weighted or cut k-space does not keep "
            "lengths, so it needs a network that was trained on it"
        )
    ratio = (gain * transform.config.copies) ** -0.5

    def denoised(u: Tensor, sigma: Tensor) -> Tensor:
        count = _images(u, transform)
        nothing = u.new_zeros((count, *transform.analysis.domain), dtype=torch.promote_types(u.dtype, torch.complex64))
        z = transform.inverse(u, nothing)
        return transform.forward(_asked(denoise, z, sigma[:count] * ratio))

    return denoised


def filtered_prior(denoise: DenoiseFunction, transform: Transform) -> DenoiseFunction:
    """The prior of weighted or cut k-space, or of its Haar bands, from one of images that the weights filter with c = 1.

    u = sqrt(a) F v with a = N c^(4 p), m copies of it: the noise of v is sigma / sqrt(a m). Points of weight 0 are known to be 0.
    Raises `ConfigError` where the transform is none of k-space.
    """
    analysis, config = transform.analysis, transform.config
    if not isinstance(analysis, Kspace | KspaceHaar):
        raise ConfigError(
            f"prior.domain = 'filtered' with transform.kind = {config.kind!r}: needed is 'kspace' or 'kspace_haar'"
        )
    height, width = analysis.domain
    root = (height * width) ** 0.5 * config.weight_scale ** (2 * config.weight_power)
    seen = (analysis.weights > 0).to(torch.float32)

    def denoised(u: Tensor, sigma: Tensor) -> Tensor:
        count = _images(u, transform)
        fourier, _ = analysis.parts(u)
        kspace = analysis.merged(transform.planes(u)) * seen.to(u.device, u.dtype)
        v = _asked(denoise, fourier.H(kspace) / root, sigma[:count] / (root * config.copies**0.5))
        return transform.channels_of(analysis.split(fourier(v) * root * seen.to(u.device, u.dtype)))

    return denoised


def hankel_prior(denoise: DenoiseFunction, analysis: HankelMatrix) -> DenoiseFunction:
    """The prior of Hankel matrices, given a few lines of windows at a time, for a matrix has as many entries as 60 images.

    Each line is a plane by itself: its rows are windows side by side, those of the next line lie elsewhere in k-space.
    """

    def denoised(u: Tensor, sigma: Tensor) -> Tensor:
        lines = u.reshape(*u.shape[:2], -1, analysis.line, u.shape[-1]).movedim(1, 2)
        planes, levels = lines.flatten(0, 1), sigma.repeat_interleave(lines.shape[1])
        parts = zip(torch.split(planes, _LINES), torch.split(levels, _LINES), strict=True)
        found = torch.cat([denoise(*part) for part in parts])
        return found.reshape(lines.shape).movedim(2, 1).reshape(u.shape)

    return denoised


def _images(u: Tensor, transform: Transform) -> int:
    return u.shape[0] // (2 if transform.config.split else 1)


def _asked(denoise: DenoiseFunction, z: Tensor, sigma: Tensor) -> Tensor:
    """Complex images (N, y, x) through a denoiser of two channels."""
    x = denoise(torch.stack([z.real, z.imag], 1), sigma)
    return torch.complex(x[:, 0].contiguous(), x[:, 1].contiguous())
