"""Training of photoacoustic priors on simulated scenes: by denoising, and through the loop of the system itself.

What a prior learns is what a full ring shows or records of a scene, in the band of its transducer and without noise. Most batches
go through the system's own few steps, from sparse or limited views with noise, or from signals that lack most of their band; the
rest is plain denoising, so that other samplers can use the network. Rings, bands, phases, noise and views are random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np
import torch
from torch import Tensor

from ..config_priors import DataConfig, SamplerConfig, StageConfig, TrainingConfig
from ..operators.photoacoustic_geometry import DetectorArray, PixelGrid, TimeAxis
from ..operators.photoacoustic_views import BeamformedOperator, completed
from ..samplers.photoacoustic import (
    LEVEL,
    RowConsistency,
    SpectralConsistency,
    domain_of,
    image_consistency,
    padded,
    photoacoustic_program,
    row_conditions,
    scale_of,
    transducer_response,
    wiener,
)
from ..simulation.photoacoustic_flaws import random_flaws
from ..simulation.photoacoustic_scenes import Recorded, random_ring, random_scene, record
from .denoiser import Denoiser
from .training import Trainer

__all__ = ["PhotoacousticTrainer", "Task", "ring_geometry", "simulate"]

_NOISE = 0.4
"""Greatest noise of a sample, over the root mean square of the signals; single shots of a real probe have 0.2 to 0.3."""
_PIXELS = 128
_SPARSE = 0.6
"""Share of the measurements from every n-th element, the others being from arcs."""
_GOLDEN = 0.618034


def simulate(count: int, seed: int, domain: str, *, flawed: float = 0.0) -> Iterator[Recorded]:
    """`count` scenes as rings hear them, a share of them with flaws that no model of the ring knows.

    domain: `image` has fewer elements and samples, to fit images of 128 x 128.
    """
    elements, samples = (320, 160) if domain == "image" else (512, 256)
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        ring = random_ring(rng, elements=elements, samples=samples)
        scene = random_scene(rng, ring.view_m)
        flaws = random_flaws(rng, elements, samples) if number * _GOLDEN % 1 < flawed else None
        yield record(rng, ring, scene, flaws)


def ring_geometry(recorded: Recorded, pixels: int) -> tuple[DetectorArray, PixelGrid, TimeAxis]:
    """Full array, grid over the field of view and times of a simulated ring."""
    ring = recorded.ring
    half = ring.view_m / 2
    grid = PixelGrid.over((pixels, pixels), (-half, half, -half, half))
    time = TimeAxis(ring.sampling_rate_hz, ring.samples, ring.speed_of_sound, ring.first_sample)
    return DetectorArray.at(ring.positions_m), grid, time


class Task(msgspec.Struct, frozen=True, eq=False):
    """One thing to reconstruct, scaled: what shall come out, where it starts, what is shown besides, and its consistency."""

    truth: Tensor
    start: Tensor
    conditions: Tensor | None
    consistency: Callable[[DataConfig], Callable[[Tensor, float], Tensor]]


class PhotoacousticTrainer(Trainer):
    """A trainer whose loss is the squared error after each step of a program, relative to that of the start."""

    def __init__(
        self,
        denoiser: Denoiser,
        recordings: Sequence[Recorded],
        config: TrainingConfig,
        stages: Sequence[StageConfig],
        sampler: SamplerConfig,
    ) -> None:
        self.recordings, self.stages, self.sampler, self.domain = recordings, stages, sampler, domain_of(stages)
        truths = [self._truth(recorded) for recorded in recordings]
        super().__init__(denoiser, truths, config)

    def _truth(self, recorded: Recorded) -> Tensor:
        signals = torch.from_numpy(recorded.signals)
        if self.domain == "image":
            signals = BeamformedOperator(*ring_geometry(recorded, _PIXELS)).back(signals)
        return (signals * scale_of(signals))[None]

    def loss(self, generator: torch.Generator) -> Tensor:
        """Of one batch."""
        numbers = torch.randint(0, len(self.images), (self.config.batch,), generator=generator).tolist()
        if float(torch.rand(1, generator=generator)) < self.config.denoising_share:
            return self._denoising(numbers, generator)
        tasks = [self.task(number, generator) for number in numbers]
        levels = self.sampler.levels
        drawn = int(torch.randint((levels + 1) // 2, levels + 1, (1,), generator=generator))
        return self._of_run(tasks, msgspec.structs.replace(self.sampler, levels=drawn))

    def task(self, number: int, generator: torch.Generator) -> Task:
        """A random measurement of a scene."""
        if self.domain == "image":
            return self._image_task(number, generator)
        return self._row_task(number, generator) if self.domain == "signals" else self._spectrum_task(number, generator)

    def _denoising(self, numbers: list[int], generator: torch.Generator) -> Tensor:
        clean = torch.stack([self._window(self.images[n][0], generator)[0] for n in numbers])[:, None]
        sigma = self.sigmas(len(clean), generator)
        noisy = clean + sigma.reshape(-1, 1, 1, 1) * torch.randn(clean.shape, generator=generator)
        hidden = clean.new_zeros(len(clean), self.denoiser.conditions, *clean.shape[-2:])
        with torch.autocast("cpu", torch.bfloat16, enabled=self._half):
            found = self.denoiser(torch.cat([noisy, hidden], 1), sigma)
        error = (found.float() - clean).square().mean((1, 2, 3))
        mean: Tensor = 0.5 * (error * (1 / sigma**2 + 1 / LEVEL**2)).mean()
        return mean

    def _of_run(self, tasks: list[Task], sampler: SamplerConfig) -> Tensor:
        truth, start = (torch.stack([getattr(task, name) for task in tasks]) for name in ("truth", "start"))
        shown = [task.conditions for task in tasks]
        conditions = None if shown[0] is None else torch.stack([c for c in shown if c is not None])

        def together(config: DataConfig) -> Callable[[Tensor, float], Tensor]:
            each = [task.consistency(config) for task in tasks]
            return lambda state, sigma: torch.stack([c(s, sigma) for c, s in zip(each, state.unbind(), strict=True)])

        program = photoacoustic_program(
            self.stages, sampler, lambda _: self._half_denoise, together, conditions=conditions
        )
        before = (start - truth).square().mean((1, 2)) + 1e-3 * truth.square().mean((1, 2)) + 1e-8
        total, weight = torch.zeros(()), 0.0
        for estimate in program.unrolled(start):
            share = (estimate.step / estimate.steps) ** 2
            total = total + share * ((estimate.image - truth).square().mean((1, 2)) / before).mean()
            weight += share
        return total / weight

    def _half_denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._half):
            found: Tensor = self.denoiser(x.to(memory_format=torch.channels_last), sigma)
        return found.float()

    def _window(self, *planes_and_generator: Tensor | torch.Generator) -> list[Tensor]:
        """The same random part of planes (y, x), flipped along y in half of the cases."""
        *planes, generator = planes_and_generator
        assert isinstance(generator, torch.Generator)  # noqa: S101 - the last one is
        crop, shape = self.config.crop, planes[0].shape[-2:]  # type: ignore[union-attr]
        room = [max(n - crop, 0) + 1 for n in shape]
        top, left, flip = (int(torch.randint(0, n, (1,), generator=generator)) for n in (*room, 2))
        parts = [p[..., top : top + crop, left : left + crop] for p in planes]  # type: ignore[index]
        return [p.flip(-2) if flip else p for p in parts]

    # Measurements

    def _noise(self, generator: torch.Generator) -> float:
        return _NOISE * math.pow(float(torch.rand(1, generator=generator)), 1.5)

    def _views(self, elements: int, generator: torch.Generator) -> Tensor:
        """Every n-th element of the ring, or an arc of it: boolean (elements,)."""
        drawn, first = (float(v) for v in torch.rand(2, generator=generator))
        measured = torch.zeros(elements, dtype=torch.bool)
        if float(torch.rand(1, generator=generator)) < _SPARSE:
            coarse = [n for n in (4, 5, 8, 10, 16, 20, 32) if elements % n == 0]
            every = coarse[int(drawn * len(coarse))]
            measured[int(first * every) :: every] = True
            return measured
        count = round((60 + 200 * drawn**1.3) / 360 * elements)
        measured[:count] = True
        return measured.roll(int(first * elements))

    def _image_task(self, number: int, generator: torch.Generator) -> Task:
        recorded = self.recordings[number]
        array, grid, time = ring_geometry(recorded, _PIXELS)
        signals = torch.from_numpy(recorded.signals)
        measured = self._views(len(array), generator)
        size = float(signals.square().mean().sqrt()) * self._noise(generator)
        signals = (signals + size * _hiss(signals.shape, generator)) * measured[:, None]
        full = BeamformedOperator(array, grid, time)
        start = full.back(completed(signals, measured))
        factor = scale_of(start)
        raw = full.back(torch.from_numpy(recorded.signals))
        part = full.part(measured.numpy())
        consistency = image_consistency(full, part, factor * signals, factor * start, measured)
        return Task(factor * raw, factor * start, None, consistency)

    def _row_task(self, number: int, generator: torch.Generator) -> Task:
        truth = self.images[number][0]
        measured = self._views(len(truth), generator)
        noisy = truth + LEVEL * self._noise(generator) * _hiss(truth.shape, generator)
        heard = noisy * measured[:, None]
        start = completed(heard, measured)
        factor = LEVEL / max(float(heard[measured].square().mean().sqrt()), 1e-6)
        rows = measured[:, None].expand(truth.shape)
        truth, heard, start, rows = self._window(factor * truth, factor * heard, factor * start, rows, generator)
        seen = rows[:, 0]
        return Task(truth, start, row_conditions(heard, seen, start), lambda _: RowConsistency(heard, seen))

    def _spectrum_task(self, number: int, generator: torch.Generator) -> Task:
        center, width = (float(v) for v in torch.rand(2, generator=generator))
        clean = self.images[number][0]
        response = transducer_response(clean.shape[-1], 0.09 + 0.19 * center, 50 + 25 * width)
        length = padded(clean.shape[-1])
        heard = torch.fft.irfft(torch.fft.rfft(clean, length) * response, length)[..., : clean.shape[-1]]
        noise = max(0.2 * self._noise(generator), 0.003) * float(heard.square().mean().sqrt())
        heard = heard + noise * torch.randn(heard.shape, generator=generator)
        ratio = noise / LEVEL
        start = wiener(heard, response, ratio)
        factor = scale_of(start)
        top = int(torch.randint(0, len(clean) - self.config.crop + 1, (1,), generator=generator))
        rows = slice(top, top + self.config.crop)
        truth, heard, start = (factor * p[rows] for p in (clean, heard, start))
        all_rows = torch.ones(len(truth), dtype=torch.bool)
        return Task(
            truth,
            start,
            row_conditions(heard, all_rows, start),
            lambda _: SpectralConsistency(heard, all_rows, response, factor * noise),
        )


def _hiss(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Noise (row, sample) as a band-pass leaves it at the working rate, its standard deviation about 1."""
    spectrum = torch.fft.rfft(torch.randn(shape, generator=generator))
    spectrum[..., round(0.7 * spectrum.shape[-1]) :] = 0
    noise: Tensor = torch.fft.irfft(spectrum, shape[-1]) / 0.7**0.5
    return noise
