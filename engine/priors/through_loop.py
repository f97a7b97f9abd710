"""Training through the reconstruction loop: the loss is of the image that J steps with data consistency come to.

Denoising score matching teaches what images are; with 4 to 8 steps there is no time for the loop to use all of it. So the same
network is trained further by back-propagation through its own program over random masks, noise and coils: distillation by the
truth rather than by a long run. It stays one denoiser that is told the noise level, and part of the batches are plain
denoising, so that other samplers can still use it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from ..config_priors import SamplerConfig, StageConfig, TrainingConfig
from ..errors import ConfigError
from ..operators.cartesian import CartesianSense, Fourier
from ..samplers.consistency import Measurement
from ..samplers.loop import make_program
from .denoiser import Denoiser
from .training import Trainer, augmented

__all__ = ["LoopTrainer", "random_mask", "simulated_maps"]


def _distances(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Coordinates from the center, from -1 to 1."""
    y, x = (torch.arange(n) - n // 2 for n in shape)
    return (2 * y / shape[0])[:, None].expand(shape), (2 * x / shape[1])[None, :].expand(shape)


def random_mask(kind: str, shape: tuple[int, int], acceleration: float, generator: torch.Generator) -> Tensor:
    """A random sampling mask (y, x), boolean, with the center at N // 2 and about 1/acceleration of the points.

    kind: `cartesian` (whole lines, denser at the center, with a block of calibration lines), `uniform` (every R-th line and the
    block), `random` (points of variable density with a full center), `radial` (spokes of even angles). How steeply the density
    falls and how large the full center is are random, too.
    """
    y, x = _distances(shape)
    share, steep, full, even = 1 / acceleration, *torch.rand(3, generator=generator).tolist()
    if kind == "radial":
        return _spokes(shape, max(2, round(share * shape[0] * 1.1)), even)
    if kind == "uniform":
        return _every(shape, max(2, round(acceleration)), max(4, round(0.08 * shape[0])), even)
    if kind == "cartesian":
        block = max(2, round((0.1 + 0.5 * full) * share * shape[0]))
        density = (1 - torch.linspace(-1, 1, shape[0]).abs()) ** (1 + 4 * steep) + 0.1 * even
        chosen = _drawn(density, share - block / shape[0], generator) | _block(shape[0], block)
        return chosen[:, None].expand(shape).clone()
    radius = (y**2 + x**2).sqrt()
    center = radius < math.sqrt((0.01 + 0.4 * full) * share)
    density = (1 - radius / math.sqrt(2)) ** (1.5 + 6 * steep) + 0.1 * even**2
    return _drawn(density, share - float(center.float().mean()), generator) | center


def _block(lines: int, count: int) -> Tensor:
    """The `count` central of all lines."""
    place = torch.arange(lines) - (lines // 2 - count // 2)
    return (place >= 0) & (place < count)


def _every(shape: tuple[int, int], step: int, block: int, turn: float) -> Tensor:
    """Every `step`-th line from one that `turn`, from 0 to 1, chooses, and the central ones."""
    chosen = (torch.arange(shape[0]) - int(turn * step)) % step == 0
    return (chosen | _block(shape[0], block))[:, None].expand(shape).clone()


def _drawn(density: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Points drawn with a probability in proportion to the density, `share` of all on average, at most each once."""
    goal, scale = max(0.0, share) * density.numel(), 1.0
    for _ in range(20):  # clipping at 1 takes from the sum what the scale gives back
        scale *= goal / max(1e-9, float((density * scale).clamp_max(1).sum()))
    return torch.rand(density.shape, generator=generator) < density * scale


def _spokes(shape: tuple[int, int], count: int, turn: float) -> Tensor:
    """Points on `count` spokes, the first turned by `turn` of the angle between two."""
    mask = torch.zeros(shape, dtype=torch.bool)
    radius = torch.linspace(-0.5, 0.5, 2 * max(shape))[None]
    angle = (math.pi * (torch.arange(count) + turn) / count)[:, None]
    rows = (radius * angle.sin() * (shape[0] - 1)).round().long() + shape[0] // 2
    columns = (radius * angle.cos() * (shape[1] - 1)).round().long() + shape[1] // 2
    mask[rows.clamp(0, shape[0] - 1), columns.clamp(0, shape[1] - 1)] = True
    return mask


def simulated_maps(coils: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Smooth random coil sensitivities, complex64 (coil, 1, y, x) with sum |maps|^2 = 1: bells round the field of view."""
    y, x = _distances(shape)
    angle = 2 * math.pi * (torch.arange(coils) + torch.rand(1, generator=generator)) / coils
    distance = 0.9 + 0.4 * torch.rand(coils, generator=generator)
    width = 0.7 + 0.5 * torch.rand(coils, generator=generator)
    slope = 2 * torch.rand(coils, 3, generator=generator) - 1
    across, down = distance * angle.cos(), distance * angle.sin()
    squares = (x - across[:, None, None]) ** 2 + (y - down[:, None, None]) ** 2
    bells = torch.exp(-squares / (2 * width[:, None, None] ** 2))
    phase = math.pi * (slope[:, 0, None, None] + slope[:, 1, None, None] * x + slope[:, 2, None, None] * y)
    maps = torch.polar(bells, phase)[:, None]
    return maps / maps.abs().square().sum(0).sqrt().clamp_min(1e-6)


class LoopTrainer(Trainer):
    """A `Trainer` whose loss is of the images after each step of a program: the logarithm of their squared error.

    So a factor in the error weighs alike where much and where little is missing; the mean over images is that of PSNR, and what
    is subtracted, that of the starting image, makes the loss a gain in nepers. Late steps weigh more (`training.loop_emphasis`).
    The number of steps (`training.loop_steps`), masks, net accelerations 2 to 12, noise up to 2 % and, in `training.coil_share`
    of the batches, 4 to 12 coils are random; `training.denoising_share` of the batches are plain denoising. `stages` and
    `sampler` are those of the system. Where training is in half precision the network alone is, never data consistency.
    """

    kinds: Sequence[str] = ("cartesian", "random", "radial", "uniform")
    one_channel, several_coils = (0.35, 0.35, 0.25, 0.05), (0.2, 0.2, 0.2, 0.4)
    """How often each kind of mask is drawn: nothing unfolds regular sampling without coils, and most scans with coils have it."""

    def __init__(
        self,
        denoiser: Denoiser,
        images: Sequence[Tensor] | Tensor,
        config: TrainingConfig,
        stages: Sequence[StageConfig],
        sampler: SamplerConfig,
    ) -> None:
        super().__init__(denoiser, images, config)
        self.stages, self.sampler = stages, sampler
        if config.loop_steps[0] > config.loop_steps[1]:
            raise ConfigError(f"training.loop_steps = {list(config.loop_steps)}: the first must not exceed the second")

    def loss(self, generator: torch.Generator) -> Tensor:
        """Of one batch."""
        drawn = float(torch.rand(1, generator=generator))
        if drawn < self.config.denoising_share:
            return super().loss(generator)
        clean = augmented(self.images, self.config, generator)
        truth = torch.complex(clean[:, 0], clean[:, 1])[:, None]
        several = drawn < self.config.denoising_share + self.config.coil_share
        measured, start = (self._with_coils if several else self._one_channel)(truth, generator)
        fewest, most = self.config.loop_steps
        levels = int(torch.randint(fewest, most + 1, (1,), generator=generator))
        return self._of_run(measured, start, truth, msgspec.structs.replace(self.sampler, levels=levels))

    def _denoised(self, x: Tensor, sigma: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._half):
            found: Tensor = self.denoiser(x, sigma)
        return found.float()

    def _of_run(self, measured: Measurement, start: Tensor, truth: Tensor, sampler: SamplerConfig) -> Tensor:
        program = make_program(self.stages, sampler, lambda _: self._denoised, measured)
        before, least = _squares(start - truth), 1e-5 * _squares(truth)
        total, weight = torch.zeros(()), 0.0
        for estimate in program.unrolled(start):
            share = (estimate.step / estimate.steps) ** self.config.loop_emphasis
            gained = (_squares(estimate.image - truth) + least) / (before + least)
            total = total + share * gained.log().mean()
            weight += share
        return total / weight

    def _mask(self, shape: tuple[int, int], shares: Sequence[float], generator: torch.Generator) -> Tensor:
        kind = self.kinds[int(torch.multinomial(torch.tensor(shares), 1, generator=generator))]
        acceleration = 2 * 6.0 ** float(torch.rand(1, generator=generator))
        return random_mask(kind, shape, acceleration, generator)

    def _noisy(self, kspace: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
        noise = 0.02 * float(torch.rand(1, generator=generator)) ** 2
        parts = torch.randn(2, *kspace.shape, generator=generator)
        return kspace + noise * torch.complex(parts[0], parts[1]), noise

    def _one_channel(self, truth: Tensor, generator: torch.Generator) -> tuple[Measurement, Tensor]:
        """Images (N, 1, y, x), each with a mask of its own."""
        shape = (truth.shape[-2], truth.shape[-1])
        mask = torch.stack([self._mask(shape, self.one_channel, generator) for _ in truth])[:, None]
        fourier = Fourier(truth.shape[-3:])
        kspace, noise = self._noisy(fourier(truth), generator)
        data = kspace * mask
        return Measurement(data=data, mask=mask, noise=noise), fourier.H(data)

    def _with_coils(self, truth: Tensor, generator: torch.Generator) -> tuple[Measurement, Tensor]:
        """Images (N, 1, y, x), all seen by the same coils through the same mask."""
        shape = (truth.shape[-2], truth.shape[-1])
        maps = simulated_maps(int(torch.randint(4, 13, (1,), generator=generator)), shape, generator)
        mask = self._mask(shape, self.several_coils, generator)[None]
        kspace, noise = self._noisy(Fourier(maps.shape)(maps * truth[:, None]), generator)
        measured = Measurement(data=kspace * mask, mask=mask, maps=maps, noise=noise)
        return measured, CartesianSense(maps, mask).H(measured.data)


def _squares(x: Tensor) -> Tensor:
    """Mean |x|^2 of each image (N, 1, y, x)."""
    return torch.view_as_real(x).square().flatten(1).mean(-1)
