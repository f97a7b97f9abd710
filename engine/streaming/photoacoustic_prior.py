"""A shot through a system with a learned prior: band, rate, the full ring it belongs to, scale, and the loop under a deadline."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..baselines.photoacoustic import band_pass
from ..config import SystemConfig
from ..errors import ConfigError
from ..messages import PhotoacousticHeader
from ..operators.photoacoustic_geometry import DetectorArray, PixelGrid, TimeAxis
from ..operators.photoacoustic_views import BeamformedOperator, completed, full_ring
from ..priors.denoiser import DenoiseFunction, Denoiser
from ..priors.storage import ModelCard, load_weights
from ..runtimes import ArtefactCache, GuardedDenoiser, RuntimeConfig, Shape, select
from ..samplers.loop import Program
from ..samplers.photoacoustic import (
    LEVEL,
    RowConsistency,
    SpectralConsistency,
    domain_of,
    image_consistency,
    photoacoustic_program,
    row_conditions,
    scale_of,
    transducer_response,
    wiener,
)

__all__ = ["PriorBeamformer", "PriorShots", "Solved", "View"]

Singles = NDArray[np.float32]
View = tuple[float, float, float, float]
_SAMPLES_PER_PERIOD = 2.857
"""Working sampling rate over the upper end of the band, as in training."""
_FINEST = 384
"""Rows of a full ring, at least: more than a field of view in most rings needs."""
_LARGEST = 1 << 22
"""Numbers in the matrix of band-pass and change of rate: above, Fourier transforms are faster, and memory is not wasted."""
_TOGETHER = 256
"""Of its rows, what is made at once."""
_HOPE = 0.95
"""What a shot that was passed over leaves of the time that the loop is expected to take, so that it is tried again."""
_PATIENCE = 64
"""At most so many times as many shots are passed over: twice as many after each try that came too late again."""


class Solved(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """An image (y, x) in the units of delay-and-sum, and how it was made; signals: of the full ring, for systems on signals."""

    image: Singles
    evaluations: int
    step: int
    steps: int
    late: bool = False
    signals: Tensor | None = None


@functools.lru_cache(maxsize=16)
def _prior(name: str) -> tuple[Denoiser, ModelCard]:
    return load_weights(name)


def _denoiser(name: str) -> Denoiser:
    return _prior(name)[0]


@functools.lru_cache(maxsize=16)
def _selected(name: str, pixels: tuple[int, int], options: RuntimeConfig) -> GuardedDenoiser:
    """What runs these weights on one image of (y, x); chosen once per process, since it takes seconds."""
    return select(_denoiser(name), Shape(1, 1, *pixels), options, cache=ArtefactCache()).denoiser


class PriorShots:
    """The images of a stream by a learned prior, and what they say of how they were made.

    refused: why there are none and the plain images go out in their place; empty where there are. late: the image of the last
    shot missed the deadline, or would have and its plain image goes out.
    """

    def __init__(self, config: SystemConfig, header: PhotoacousticHeader, pixels: tuple[int, int], view: View) -> None:
        self.refused = ""
        self.solved: Solved | None = None
        self.late = False
        self._expected, self._patience = 0.0, 1
        self._config, self._header, self._pixels, self._view = config, header, pixels, view
        self._known: tuple[object, PriorBeamformer] | None = None
        try:
            self.cards = [_prior(stage.prior.weights)[1] for stage in config.stages]
            full_ring(np.asarray(header.positions_m, np.float64), _FINEST)
        except ConfigError as error:
            self.refused = str(error)
        else:
            for stage in config.stages:
                self._denoiser(stage.prior.weights)

    def _denoiser(self, name: str) -> DenoiseFunction:
        """What runs the weights; of systems on signals torch, as the number of samples follows the speed of sound."""
        if domain_of(self._config.stages) != "image":
            return _denoiser(name)
        return _selected(name, (self._pixels[1], self._pixels[0]), self._config.runtime)

    def image(
        self,
        samples: NDArray[np.generic],
        silent: NDArray[np.bool_],
        speed: float,
        delay: float,
        received: float | None,
    ) -> Singles | None:
        """Image (y, x) of a shot (elements, samples), None where there is no prior for it or no time."""
        if self.refused:
            return None
        key = (silent.tobytes(), speed, delay)
        cold = self._known is None or self._known[0] != key
        if self._known is None or cold:
            self._known = key, self._made(silent, speed, delay)
        deadline = self._deadline(received)
        self.solved = self._in_time(self._known[1], samples, deadline, cold=cold)
        self.late = self.solved is None or (deadline is not None and time.monotonic() > deadline)
        return None if self.solved is None else self.solved.image

    def _deadline(self, received: float | None) -> float | None:
        wanted = self._config.reconstruction.deadline_ms
        return received + wanted / 1e3 if wanted and received is not None else None

    def _in_time(
        self, beamformer: PriorBeamformer, samples: NDArray[np.generic], deadline: float | None, *, cold: bool
    ) -> Solved | None:
        """What the loop makes of a shot, None when it would come too late, by the last one that ran.

        cold: the loop runs for the first time and builds its operators, so what it takes says nothing about the next one.
        """
        begun = time.monotonic()
        if deadline is not None and begun + self._expected > deadline:
            self._expected *= _HOPE ** (1 / self._patience)
            return None
        solved = beamformer.solve(samples, deadline=deadline)
        if not cold:
            self._expected = (time.monotonic() - begun) * solved.steps / solved.step
            in_time = not solved.late and (deadline is None or time.monotonic() <= deadline)
            self._patience = 1 if in_time else min(2 * self._patience, _PATIENCE)
        return None if solved.late else solved

    def _made(self, silent: NDArray[np.bool_], speed: float, delay: float) -> PriorBeamformer:
        return PriorBeamformer(
            self._config,
            self._header.positions_m,
            self._header.sampling_rate_hz,
            pixels=(self._pixels[1], self._pixels[0]),
            field_of_view_m=self._view,
            speed_of_sound=speed,
            t0_samples=delay,
            dead=np.flatnonzero(silent).tolist(),
            adc_offset=self._header.adc_offset,
            denoisers=self._denoiser,
        )

    def attributes(self) -> dict[str, str]:
        """How the last image was made, as image attributes."""
        if self.refused:
            return {"scanside_prior_unavailable": self.refused[:500]}
        kept = "missed" if self.late else "met"
        told = {"scanside_deadline": kept} if self._config.reconstruction.deadline_ms else {}
        if self.solved is None:
            return told
        for stage in self._config.stages:
            status = getattr(self._denoiser(stage.prior.weights), "status", None)
            ran = {"scanside_runtime": ["torch", "float32", "cpu"]} if status is None else status.attributes()
            told |= {name: " ".join(values) for name, values in ran.items()}
        return told | {
            "scanside_generative": "1",
            "scanside_method": "prior",
            "scanside_system": self._config.name,
            "scanside_network_evaluations": str(self.solved.evaluations),
            "scanside_steps": f"{self.solved.step} {self.solved.steps}",
            "scanside_weights": ", ".join(f"{card.name} {card.sha256}" for card in self.cards),
            "SequenceDescriptionAdditional": "prior",
        }


class PriorBeamformer:
    """Shots to images by a learned prior; takes the place of a `LiveBeamformer`. Arguments as there, and the configuration.

    The image is that which delay-and-sum of the whole ring would show, of which the elements are a part: all of it, every n-th
    element, or an arc. denoisers: what runs weights of a name, by default torch. Raises ConfigError for arrays that are no part
    of a ring, and for weights that are not there.
    """

    def __init__(
        self,
        config: SystemConfig,
        positions_m: ArrayLike,
        sampling_rate_hz: float,
        *,
        pixels: tuple[int, int],
        field_of_view_m: View,
        speed_of_sound: float = 1500.0,
        t0_samples: float = 0.0,
        dead: Sequence[int] = (),
        adc_offset: float = 0.0,
        denoisers: Callable[[str], DenoiseFunction] = _denoiser,
    ) -> None:
        self.config, self.domain = config, domain_of(config.stages)
        for stage in config.stages:
            _prior(stage.prior.weights)
        band = config.photoacoustic.band_hz
        self._band = band if any(band) else (0.0, sampling_rate_hz / _SAMPLES_PER_PERIOD)
        self._offset, self._sampling = adc_offset, sampling_rate_hz
        self._speed, self._delay = speed_of_sound, t0_samples
        positions = np.asarray(positions_m, np.float64)
        grid = PixelGrid.over(pixels, field_of_view_m)
        self._ring, self._rows = full_ring(positions, _FINEST)
        self._alive = np.setdiff1d(np.arange(len(positions)), np.asarray(dead, np.int64))
        self.measured = torch.zeros(len(self._ring), dtype=torch.bool)
        self.measured[self._rows[self._alive]] = True
        self.grid = grid
        self._operators: tuple[BeamformedOperator, BeamformedOperator] | None = None
        self._window = (0, 0)
        self._samples = 0
        self._slowing: Tensor | None = None
        self._denoisers = denoisers

    def set_speed_of_sound(self, speed_of_sound: float) -> None:
        """For the shots from now on, in m/s."""
        self._speed, self._operators = speed_of_sound, None

    def set_delay(self, samples: float) -> None:
        """Time of the first sample, for the shots from now on."""
        self._delay, self._operators = samples, None

    def image(self, frame: NDArray[np.generic]) -> Singles:
        """The image (y, x) of a shot (element, samples)."""
        return self.solve(frame).image

    def solve(self, frame: NDArray[np.generic], *, deadline: float | None = None) -> Solved:
        """The image after the last step; marked late, that after the last one for which `deadline` leaves time, or the first."""
        begun, last = time.monotonic(), None
        for last in self.steps(frame):
            now = time.monotonic()
            if last.step < last.steps and deadline is not None and now + (now - begun) / last.step > deadline:
                return msgspec.structs.replace(last, late=True)
        assert last is not None  # noqa: S101 - a schedule has a step
        return last

    @torch.no_grad()
    def steps(self, frame: NDArray[np.generic]) -> Iterator[Solved]:
        """Yield the image after each step."""
        signals = self.prepared(frame)
        full, _ = self.operators()
        if self.domain == "image":
            start, factor = self._image_start(signals)
        elif self.domain == "signals":
            start = completed(signals, self.measured)
            factor = _factor(signals[self.measured])
        else:
            start, factor = self._restored(signals)
        program = self._program(signals * factor, start * factor)
        for estimate in program.run(start * factor):
            state = estimate.image / factor
            image = state if self.domain == "image" else full.back(state)
            yield Solved(
                image=image.numpy(),
                evaluations=estimate.evaluations,
                step=estimate.step,
                steps=estimate.steps,
                signals=None if self.domain == "image" else state,
            )

    def start(self, frame: NDArray[np.generic]) -> Singles:
        """What the loop starts from, as an image."""
        signals = self.prepared(frame)
        full, _ = self.operators()
        if self.domain == "spectrum":
            return full.back(self._restored(signals)[0]).numpy()
        return full.back(completed(signals, self.measured)).numpy()

    def prepared(self, frame: NDArray[np.generic]) -> Tensor:
        """Band-passed signals (row, sample) of the full ring at the working rate, where the field of view is heard."""
        if frame.shape[1] != self._samples:
            self._samples, self._operators = frame.shape[1], None
        self.operators()
        alive = torch.from_numpy(np.asarray(frame[self._alive], np.float32) - np.float32(self._offset))
        ring = torch.zeros(len(self._ring), self._window[1])
        ring[self._rows[self._alive]] = self._slowed(alive) if self._slowing is None else alive @ self._slowing
        return ring

    def _slowed(self, signals: Tensor) -> Tensor:
        """Band-pass, change of rate and choice of the window, of rows (..., samples)."""
        filtered = band_pass(signals, self._band, self._sampling)
        (first, count), every = self._window, self._every()
        length = 2 * _up(self._samples, every)
        spectrum = torch.fft.rfft(filtered, n=every * length)
        slow: Tensor = torch.fft.irfft(spectrum[..., : length // 2 + 1], n=length)
        return slow[..., first : first + count] / every

    def _slowing_matrix(self) -> Tensor | None:
        """`_slowed` as a matrix (samples, window), which takes a fraction of the time; None where it would be large."""
        if self._samples * self._window[1] > _LARGEST:
            return None
        matrix = torch.empty(self._samples, self._window[1])
        for first in range(0, self._samples, _TOGETHER):
            count = min(_TOGETHER, self._samples - first)
            unit = torch.zeros(count, self._samples, dtype=torch.float64)
            unit[torch.arange(count), torch.arange(first, first + count)] = 1
            matrix[first : first + count] = self._slowed(unit)
        return matrix

    def _every(self) -> int:
        return max(1, int(self._sampling / (_SAMPLES_PER_PERIOD * self._band[1])))

    def operators(self) -> tuple[BeamformedOperator, BeamformedOperator]:
        """Operators of the full ring and of what was measured."""
        if self._operators is None:
            every = self._every()
            rate, delay = self._sampling / every, self._delay / every
            corners = np.array([[x, y, 0.0] for x in self.grid.x[[0, -1]] for y in self.grid.y[[0, -1]]])
            flat = self._ring * [1, 1, 0]
            paths = np.linalg.norm(flat[:, None] - corners, axis=-1) / self._speed * rate - delay
            total = _up(self._samples, every)
            nearest = paths.min() if not self._inside() else 0.0
            first, last = max(int(nearest) - 8, 0), min(int(paths.max()) + 8, total)
            if last - first < 8:
                raise ConfigError(
                    "the samples hold nothing of the field of view; check delay, sampling rate and positions"
                )
            self._window = (first, last - first)
            axis = TimeAxis(rate, last - first, self._speed, delay + first)
            array = DetectorArray.at(self._ring)
            full = BeamformedOperator(array, self.grid, axis)
            self._operators = full, full.part(self.measured.numpy())
            self._slowing = self._slowing_matrix()
        return self._operators

    def _inside(self) -> bool:
        """Whether elements lie in the field of view."""
        x, y = self._ring[:, 0], self._ring[:, 1]
        (x0, x1), (y0, y1) = np.sort(self.grid.x[[0, -1]]), np.sort(self.grid.y[[0, -1]])
        return bool(((x > x0) & (x < x1) & (y > y0) & (y < y1)).any())

    def _image_start(self, signals: Tensor) -> tuple[Tensor, float]:
        start = self.operators()[0].back(completed(signals, self.measured))
        return start, scale_of(start)

    def _restored(self, signals: Tensor) -> tuple[Tensor, float]:
        start = wiener(signals, self.response(signals.shape[-1]), self.noise_ratio(signals))
        return start, scale_of(start[self.measured])

    def response(self, samples: int) -> Tensor:
        """Of the transducer, at the working rate."""
        center, width = self.config.photoacoustic.transducer
        if not center:
            raise ConfigError("photoacoustic.transducer is not set: center in Hz and width in percent are needed")
        return transducer_response(samples, center / self._sampling * self._every(), width)

    def noise_ratio(self, signals: Tensor) -> float:
        """Noise of a sample, by the median of |signals|, over the root mean square of what was heard, before the transducer."""
        heard = signals[self.measured]
        noise = float(heard.abs().median()) / 0.6745
        return noise / max(float(heard.square().mean().sqrt()), 1e-30)

    def _program(self, signals: Tensor, start: Tensor) -> Program:
        stages, sampler, measured = self.config.stages, self.config.sampler, self.measured
        if self.domain == "image":
            consistency = image_consistency(*self.operators(), signals, start, measured)
            return photoacoustic_program(stages, sampler, self._denoisers, consistency)
        conditions = row_conditions(signals, measured, start)
        if self.domain == "signals":
            return photoacoustic_program(
                stages,
                sampler,
                _denoiser,
                lambda _: RowConsistency(signals, measured),
                conditions=conditions,
                blank=_opposite(measured),
            )
        noise = self.noise_ratio(signals) * float(signals[measured].square().mean().sqrt())
        response = self.response(signals.shape[-1])
        return photoacoustic_program(
            stages,
            sampler,
            _denoiser,
            lambda _: SpectralConsistency(signals, measured, response, noise),
            conditions=conditions,
        )


def _factor(signals: Tensor) -> float:
    size = float(signals.square().mean().sqrt())
    return LEVEL / size if size > 0 else 1.0


def _up(samples: int, every: int) -> int:
    return -(-samples // every)


def _opposite(measured: Tensor) -> Tensor:
    """The third of the ring that is furthest from the middle of what was measured."""
    count = len(measured)
    angles = 2 * np.pi * np.arange(count) / count
    middle = np.angle((measured.numpy() * np.exp(1j * angles)).sum())
    away = np.abs(np.angle(np.exp(1j * (angles - middle - np.pi))))
    return torch.from_numpy(away < np.pi / 3)
