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
from ..operators.cartesian import Fourier
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
    block), `random` (points of variable density with a full center), `radial` (spokes of even angles).
    """
    y, x = _distances(shape)
    share = 1 / acceleration
    if kind == "radial":
        spokes = max(2, round(share * shape[0] * 1.1))
        return _spokes(shape, spokes, float(torch.rand(1, generator=generator)))
    if kind in ("cartesian", "uniform"):
        lines = torch.linspace(-1, 1, shape[0])
        block = max(2, round(0.3 * share * shape[0])) if kind == "cartesian" else max(4, round(0.08 * shape[0]))
        if kind == "uniform":
            step = max(2, round(acceleration))
            first = int(torch.randint(0, step, (1,), generator=generator))
            chosen = (torch.arange(shape[0]) - first) % step == 0
        else:
            chosen = _drawn((1 - lines.abs()) ** 2 + 0.05, share - block / shape[0], generator)
        low = shape[0] // 2 - block // 2
        chosen[low : low + block] = True
        return chosen[:, None].expand(shape).clone()
    radius = (y**2 + x**2).sqrt()
    center = radius < math.sqrt(0.3 * share)
    return _drawn((1 - radius / math.sqrt(2)) ** 4 + 0.005, share - float(center.float().mean()), generator) | center


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
    """A `Trainer` whose loss is that of the images after each step of a program, relative to where it started.

    Steps from half of `sampler.levels` to all, masks, net accelerations 2 to 12, noise up to 2 % and, in `training.coil_share`
    of the batches, 4 to 12 coils are random;
    `training.denoising_share` of the batches are plain denoising. `stages` and `sampler` are those of the system.
    """

    kinds: Sequence[str] = ("cartesian", "uniform", "random", "radial")

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

    def loss(self, generator: torch.Generator) -> Tensor:
        """Of one batch."""
        drawn = float(torch.rand(1, generator=generator))
        if drawn < self.config.denoising_share:
            return super().loss(generator)
        clean = augmented(self.images, self.config, generator)
        truth = torch.complex(clean[:, 0], clean[:, 1])[:, None]
        if drawn < self.config.denoising_share + self.config.coil_share:
            measured, start, truth = self._with_coils(truth[0], generator)
        else:
            measured, start = self._one_channel(truth, generator)
        levels = self.sampler.levels
        drawn_levels = int(torch.randint((levels + 1) // 2, levels + 1, (1,), generator=generator))
        return self._of_run(measured, start, truth, msgspec.structs.replace(self.sampler, levels=drawn_levels))

    def _of_run(self, measured: Measurement, start: Tensor, truth: Tensor, sampler: SamplerConfig) -> Tensor:
        program = make_program(self.stages, sampler, lambda _: self.denoiser, measured)
        before = _squares(start - truth).clamp_min(1e-6)
        total, weight = torch.zeros(()), 0.0
        for estimate in program.unrolled(start):
            share = (estimate.step / estimate.steps) ** 2
            total = total + share * (_squares(estimate.image - truth) / before).mean()
            weight += share
        return total / weight

    def _mask(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        kind = self.kinds[int(torch.randint(0, len(self.kinds), (1,), generator=generator))]
        acceleration = 2 * 6.0 ** float(torch.rand(1, generator=generator))
        return random_mask(kind, shape, acceleration, generator)

    def _noisy(self, kspace: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
        noise = 0.02 * float(torch.rand(1, generator=generator)) ** 2
        parts = torch.randn(2, *kspace.shape, generator=generator)
        return kspace + noise * torch.complex(parts[0], parts[1]), noise

    def _one_channel(self, truth: Tensor, generator: torch.Generator) -> tuple[Measurement, Tensor]:
        """Images (N, 1, y, x), each with a mask of its own."""
        shape = (truth.shape[-2], truth.shape[-1])
        mask = torch.stack([self._mask(shape, generator) for _ in truth])[:, None]
        fourier = Fourier(truth.shape[-3:])
        kspace, noise = self._noisy(fourier(truth), generator)
        data = kspace * mask
        return Measurement(data=data, mask=mask, noise=noise), fourier.H(data)

    def _with_coils(self, truth: Tensor, generator: torch.Generator) -> tuple[Measurement, Tensor, Tensor]:
        """One image (1, y, x), seen by some coils."""
        shape = (truth.shape[-2], truth.shape[-1])
        maps = simulated_maps(int(torch.randint(4, 13, (1,), generator=generator)), shape, generator)
        mask = self._mask(shape, generator)[None]
        kspace, noise = self._noisy(Fourier(maps.shape)(maps * truth), generator)
        measured = Measurement(data=kspace * mask, mask=mask, maps=maps, noise=noise)
        return measured, (maps.conj() * Fourier(maps.shape).H(measured.data)).sum(0), truth


def _squares(x: Tensor) -> Tensor:
    """Mean |x|^2 of each image."""
    return torch.view_as_real(x).square().flatten(-4 if x.ndim == 3 else 1).mean(-1)
