"""The loop on photoacoustic data: real states, images or the signals of a full ring, and consistency with what was heard.

Everything is scaled so that the root mean square of the starting state is `LEVEL`; the factor is found once, from the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..baselines.solvers import conjugate_gradients
from ..config_priors import DataConfig, SamplerConfig, StageConfig
from ..errors import ConfigError
from ..operators.linear import LinearOperator
from ..operators.photoacoustic_views import BeamformedOperator, interpolation, ring_density, views_needed
from ..priors.denoiser import DenoiseFunction
from .consistency import Implicit
from .constraints import make_constraint
from .loop import Program, Stage

__all__ = [
    "LEVEL",
    "CompletedConsistency",
    "ModelConsistency",
    "RowConsistency",
    "SpectralConsistency",
    "domain_of",
    "image_consistency",
    "padded",
    "photoacoustic_program",
    "row_conditions",
    "scale_of",
    "transducer_response",
    "wiener",
]

LEVEL = 0.15
"""Root mean square of a starting state."""
Consistency = Callable[[Tensor, float], Tensor]


class ModelConsistency:
    """argmin over x of <A x - y, F^-1 (A x - y)> / M + weight (floor / sigma)^2 |x - z|^2 by conjugate gradients from z.

    A = F S as `BeamformedOperator`; with the inverse ramp as its metric the normal matrix is S^T F S / M, whose eigenvalues reach
    about 1 where M is the number of views that the field of view needs, or of a full ring as dense as this one.
    """

    def __init__(self, operator: BeamformedOperator, signals: Tensor, config: DataConfig, *, ring: int) -> None:
        self._operator, self._config = operator, config
        self._share = len(operator.array) / max(views_needed(operator.grid, operator.time), ring)
        self._right = self._share * operator.back(signals)
        self.normal = _Normal(operator, self._share)

    def weight(self, sigma: float) -> float:
        """Of the estimate against the data."""
        return self._config.weight * (self._config.floor / sigma) ** 2

    def solve(self, right: Tensor, weight: float, initial: Tensor) -> Tensor:
        """(S^T F S / M + weight)^-1 right."""
        return conjugate_gradients(
            self.normal, right, iterations=self._config.iterations, regularization=weight, initial=initial
        )

    def __call__(self, state: Tensor, sigma: float) -> Tensor:
        """The image next to `state` that fits the data."""
        weight = self.weight(sigma)
        if state.requires_grad:
            share = weight / (weight + 0.5)
            return cast(Tensor, Implicit.apply(state, self, self._right, weight, share))  # type: ignore[no-untyped-call]
        return self.solve(self._right + weight * state, weight, state)


class _Normal(LinearOperator):
    """S^T F S / M."""

    def __init__(self, operator: BeamformedOperator, share: float) -> None:
        super().__init__(operator.domain, operator.domain)
        self._operator, self._share = operator, share

    def _forward(self, x: Tensor) -> Tensor:
        return self._share * self._operator.back(self._operator(x))

    def _backward(self, y: Tensor) -> Tensor:
        return self._forward(y)


class CompletedConsistency:
    """x + w C (y - A x): delay-and-sum of the ring that the estimate predicts, once what was measured is in its place.

    A predicts the measured rows; C interpolates what they differ by between neighbours and is delay-and-sum of the whole ring;
    w = 1 / (1 + weight (floor / sigma)^2); start: C y. What no image explains (views of unequal strength, motion, a wrong speed
    of sound) goes the way that it goes in delay-and-sum of interpolated rows, while least squares spread it over the image.
    """

    def __init__(
        self, full: BeamformedOperator, part: BeamformedOperator, start: Tensor, measured: Tensor, config: DataConfig
    ) -> None:
        self._full, self._part, self._start, self._config = full, part, start, config
        self._weights = interpolation(measured)

    def weight(self, sigma: float) -> float:
        """w."""
        return 1 / (1 + self._config.weight * (self._config.floor / sigma) ** 2)

    def corrected(self, state: Tensor, weight: float) -> Tensor:
        """x + w C (y - A x)."""
        return state + weight * (self._start - self._full.back(self._weights @ self._part(state)))

    def transposed(self, gradient: Tensor, weight: float) -> Tensor:
        """(1 - w A^T C^T) gradient."""
        return gradient - weight * self._part.H(self._weights.mT @ self._full.back_transposed(gradient))

    def __call__(self, state: Tensor, sigma: float) -> Tensor:
        """The image with what was measured."""
        if state.requires_grad:
            return cast(Tensor, _Corrected.apply(state, self, self.weight(sigma)))  # type: ignore[no-untyped-call]
        return self.corrected(state, self.weight(sigma))


class _Corrected(torch.autograd.Function):
    """`CompletedConsistency` with its derivative, the compiled sums having none of their own."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, data: CompletedConsistency, weight: float) -> Tensor:  # noqa: ANN401
        """The image with what was measured."""
        ctx.data, ctx.weight = data, weight
        return data.corrected(state, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        """Of the state."""
        return ctx.data.transposed(gradient, ctx.weight), None, None


def image_consistency(
    full: BeamformedOperator, part: BeamformedOperator, signals: Tensor, start: Tensor, measured: Tensor
) -> Callable[[DataConfig], Consistency]:
    """Makes the consistency of a stage. full, part: of the ring and of what was `measured` of it, boolean (row,).

    signals: (row, samples) of the ring; start: the image of them, missing rows by interpolation.
    """

    def made(config: DataConfig) -> Consistency:
        if config.kind == "complete":
            return CompletedConsistency(full, part, start, measured, config)
        return ModelConsistency(part, signals[measured], config, ring=ring_density(measured))

    return made


class RowConsistency:
    """Measured rows take their place."""

    def __init__(self, signals: Tensor, measured: Tensor) -> None:
        self._signals, self._mask = signals, measured[..., None]

    def __call__(self, state: Tensor, sigma: float) -> Tensor:  # noqa: ARG002
        """Signals (..., row, samples) with what was measured."""
        return torch.where(self._mask, self._signals, state)


class SpectralConsistency:
    """argmin over s of |H s - y|^2 / noise^2 + |s - z|^2 / sigma^2 in every measured row, a division at each frequency.

    Frequencies that the transducer heard become as it heard them, where it is deaf the state stays. response: H, real.
    """

    def __init__(self, signals: Tensor, measured: Tensor, response: Tensor, noise: float) -> None:
        self._mask, self._response, self._length = measured[..., None], response, padded(signals.shape[-1])
        self._noise, self._heard = max(noise, 1e-6), torch.fft.rfft(signals, self._length)

    def __call__(self, state: Tensor, sigma: float) -> Tensor:
        """Signals (..., row, samples)."""
        spectrum = torch.fft.rfft(state, self._length)
        gain = self._response / (self._response**2 + (self._noise / sigma) ** 2)
        spectrum = spectrum + gain * (self._heard - self._response * spectrum)
        found = torch.fft.irfft(spectrum, self._length)[..., : state.shape[-1]]
        return torch.where(self._mask, found, state)


def padded(samples: int) -> int:
    """Length of the Fourier transform in which a transducer is applied."""
    return 2 * samples


def transducer_response(samples: int, center: float, bandwidth_percent: float) -> Tensor:
    """Gaussian transfer function at the frequencies of an FFT of `padded(samples)`; center in cycles per sample.

    bandwidth_percent: full width at half of the amplitude over the center, as `wave.gaussian_response` has it.
    """
    spread = bandwidth_percent / 100 * center / (2 * math.sqrt(2 * math.log(2)))
    frequencies = torch.fft.rfftfreq(padded(samples))
    return torch.exp(-((frequencies - center) ** 2) / (2 * spread**2))


def wiener(signals: Tensor, response: Tensor, ratio: float) -> Tensor:
    """Wiener deconvolution: Y H / (H^2 + ratio^2), ratio being noise over signal, both before the transducer."""
    length = padded(signals.shape[-1])
    gain = response / (response**2 + max(ratio, 1e-4) ** 2)
    restored: Tensor = torch.fft.irfft(torch.fft.rfft(signals, length) * gain, length)
    return restored[..., : signals.shape[-1]]


def domain_of(stages: Sequence[StageConfig]) -> str:
    """`image`, `signals` or `spectrum`: what the state of a program is, by the data consistency of its first stage."""
    kinds = {"proximal": "image", "complete": "image", "replace": "signals", "deconvolve": "spectrum"}
    kind = stages[0].data.kind if stages else "proximal"
    if kind not in kinds:
        raise ConfigError(f"stages[0].data.kind = {kind!r}: for photoacoustics allowed are {', '.join(kinds)}")
    return kinds[kind]


def row_conditions(signals: Tensor, measured: Tensor, start: Tensor) -> Tensor:
    """What a network on signals is shown: the measured rows, 0 elsewhere, and the start. (2, row, samples)."""
    return torch.stack([signals * measured[..., None], start], -3)


class _Planes:
    """Real states (*batch, y, x) as one channel, in place of a `Transform`; `blank` rows are hidden from the prior."""

    def __init__(self, blank: Tensor | None = None) -> None:
        self._blank = blank

    def forward(self, state: Tensor) -> Tensor:
        planes = state.reshape(-1, 1, *state.shape[-2:])
        return planes if self._blank is None else planes.masked_fill(self._blank[:, None], 0)

    def inverse(self, channels: Tensor, before: Tensor) -> Tensor:
        state = channels.reshape(before.shape)
        return state if self._blank is None else torch.where(self._blank[:, None], before, state)


def photoacoustic_program(
    stages: Sequence[StageConfig],
    sampler: SamplerConfig,
    priors: Callable[[str], DenoiseFunction] | Mapping[str, DenoiseFunction],
    consistency: Callable[[DataConfig], Consistency],
    *,
    conditions: Tensor | None = None,
    blank: Tensor | None = None,
) -> Program:
    """The program of a configuration. consistency: makes one for a stage.

    conditions: (K, y, x) or (batch, K, y, x), shown to the networks. blank: rows that stages with `transform.kind = "arc"` do not
    show to their prior. Raises `ConfigError` for a program that cannot be.
    """
    find = priors if callable(priors) else priors.__getitem__
    made = []
    for config in stages:
        hidden = blank if config.transform.kind == "arc" else None
        denoise = _conditioned(find(config.prior.weights), conditions, hidden)
        constraint = make_constraint(config.constraint)
        planes = cast(Any, _Planes(hidden))
        if config.prior.turn:
            raise ConfigError(f"prior.turn = {config.prior.turn:g}: photoacoustic images are real and have no phase")
        made.append(Stage(config, denoise, planes, cast(Any, consistency(config.data)), constraint))
    return Program(made, sampler)


def _conditioned(denoise: DenoiseFunction, conditions: Tensor | None, blank: Tensor | None) -> DenoiseFunction:
    if conditions is None:
        return denoise
    shown = conditions if blank is None else conditions.masked_fill(blank[:, None], 0)

    def denoised(u: Tensor, sigma: Tensor) -> Tensor:
        return denoise(torch.cat([u, shown.expand(len(u), *shown.shape[-3:])], 1), sigma)

    return denoised


def scale_of(state: Tensor) -> float:
    """Factor that brings a state to `LEVEL`; 1 where it is 0."""
    size = math.sqrt(float(state.square().mean()))
    return LEVEL / size if size > 0 else 1.0
