"""Sampler rules: how far the prior moves an estimate at each noise level, and what noise goes with it.

A rule sees the estimate in the domain of the prior (`move`), then as an image before (`push`) and after (`settle`) data
consistency. One object serves one stage of one run; it may remember. mri.md 4.1 gives the table of which published system
is which rule.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import msgspec
import torch
from torch import Tensor

from ..config_priors import SamplerConfig
from ..priors.denoiser import DenoiseFunction, energy_gradient
from .schedules import along, noise_levels

__all__ = [
    "RULES",
    "AnnealedLangevin",
    "Ddim",
    "Energy",
    "Heun",
    "MeanReverting",
    "PredictorCorrector",
    "Relaxation",
    "Rule",
    "Step",
    "make_rule",
]


class Step(msgspec.Struct, frozen=True):
    """One move: the noise level of the estimate, the one it is to have after, and whether it only corrects."""

    sigma: float
    following: float
    corrects: bool = False
    number: int = 0
    """Of the step in its run, from 0, for rules whose steps differ in more than their noise level."""


class Rule(abc.ABC):
    """Base of all rules. `generator` draws all noise, so a seed and a thread count fix the outcome to the bit."""

    anchor: Tensor
    """The starting image in the prior's domain; the loop sets it."""

    def __init__(self, config: SamplerConfig, generator: torch.Generator) -> None:
        self.config, self.generator = config, generator

    def schedule(self) -> list[Step]:
        """All steps of a run."""
        levels = noise_levels(self.config)
        pairs = zip(levels, [*levels[1:], levels[-1]], strict=True)
        return [Step(a, b, number=number) for number, (a, b) in enumerate(pairs)]

    @abc.abstractmethod
    def move(self, u: Tensor, step: Step, denoise: DenoiseFunction) -> Tensor:
        """The estimate in the prior's domain, real (N, C, H, W), after the prior has had its say."""

    def push(self, before: Tensor, moved: Tensor) -> Tensor:  # noqa: ARG002
        """The moved image, before data consistency."""
        return moved

    def settle(self, before: Tensor, moved: Tensor, consistent: Tensor, step: Step) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """State that the next step begins with, and the estimate so far; both images."""
        return consistent, consistent

    def begin(self, start: Tensor) -> Tensor:
        """The first state, an image, from the starting image."""
        if self.config.start == "noise":
            return self.config.ends[0] * self.noise(start)
        return start

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal numbers, real and imaginary part each of variance 1."""
        if not like.is_complex():
            return torch.randn(like.shape, generator=self.generator, dtype=like.dtype).to(like.device)
        real = like.real
        return torch.complex(self.noise(real), self.noise(real))


def _ask(denoise: DenoiseFunction, u: Tensor, sigma: float) -> Tensor:
    return denoise(u, torch.full((u.shape[0],), sigma, dtype=u.dtype, device=u.device))


class Relaxation(Rule):
    """u + r (D(u + n) - u) with momentum: denoising autoencoder priors and, with few large steps, the online system.

    r = `relaxation`, n of `input_noise` times the noise level, averaged over `noise_copies`; with `jacobian` the whole gradient
    of |u - D(u + n)|^2 / 2. r and the momentum may be each step's own. Bigdeli, Zwicker 2017; mri.md 3.1 and 3.3.
    """

    _velocity: Tensor | None = None
    _number = 0

    def move(self, u: Tensor, step: Step, denoise: DenoiseFunction) -> Tensor:
        """One relaxed step towards what the denoiser says."""
        self._number = step.number
        share = self._at(self.config.relaxation_steps, self.config.relaxation) / self.config.noise_copies
        moved = u
        for _ in range(self.config.noise_copies):
            moved = moved.add(self._change(u, step.sigma, denoise), alpha=share)
        return moved

    def _change(self, u: Tensor, sigma: float, denoise: DenoiseFunction) -> Tensor:
        scale = self.config.input_noise * sigma
        noise = scale * self.noise(u) if scale else None
        if not self.config.jacobian:
            return _ask(denoise, u if noise is None else u + noise, sigma) - u
        with torch.enable_grad():
            x = u.detach().requires_grad_()
            error = (x - _ask(denoise, x if noise is None else x + noise, sigma)).square().sum() / 2
            (gradient,) = torch.autograd.grad(error, x)
        return -gradient

    def push(self, before: Tensor, moved: Tensor) -> Tensor:
        """Keep a share of the last move, as a ball that rolls."""
        momentum = self._at(self.config.momentum_steps, self.config.momentum)
        if not momentum and not self.config.momentum_steps:
            return moved
        velocity = moved - before
        if self._velocity is not None:
            velocity = velocity.add(self._velocity, alpha=momentum)
        self._velocity = velocity
        return before + velocity

    def _at(self, steps: Sequence[float], always: float) -> float:
        """What is configured for this step."""
        return along(steps, self.config.levels)[self._number] if steps else always


class Energy(Rule):
    """u - step_size sigma^2 grad E(u + n; sigma), averaged over `noise_copies`; mri.md 3.6."""

    def move(self, u: Tensor, step: Step, denoise: DenoiseFunction) -> Tensor:
        """One step down the energy."""
        sigma, c = step.sigma, self.config
        levels = torch.full((u.shape[0],), sigma, dtype=u.dtype, device=u.device)
        noisy = (u + c.input_noise * sigma * self.noise(u) if c.input_noise else u for _ in range(c.noise_copies))
        gradient = torch.stack([energy_gradient(denoise, x, levels) for x in noisy]).mean(0)
        return u - c.step_size * sigma**2 * gradient


class AnnealedLangevin(Rule):
    """u + a s(u) + sqrt(2 a) n with a = relaxation sigma^2, `steps` times per level (Song, Ermon 2019; mri.md 3.4, 3.5)."""

    def schedule(self) -> list[Step]:
        """Every level `steps` times."""
        return [Step(sigma, sigma) for sigma in noise_levels(self.config) for _ in range(self.config.steps)]

    def move(self, u: Tensor, step: Step, denoise: DenoiseFunction) -> Tensor:
        """One Langevin step."""
        r = self.config.relaxation
        moved = u + r * (_ask(denoise, u, step.sigma) - u)
        return moved + math.sqrt(2 * r) * step.sigma * self.noise(u) if self.config.inject else moved


class PredictorCorrector(Rule):
    """Reverse diffusion of the variance-exploding equation with Langevin correctors (Song et al. 2021; mri.md 3.7).

    Predictor u + (s_i^2 - s_j^2) score + sqrt(s_i^2 - s_j^2) n, i to j; corrector u + e score + sqrt(2 e) n with e = 2 (snr |n| /
    |score|)^2. The last level has no noise. Published code keeps the mean of the predictor only: `inject = false`.
    """

    def schedule(self) -> list[Step]:
        """A predictor and `steps` correctors at each level; the last predictor goes to no noise."""
        levels = noise_levels(self.config)
        steps = []
        for sigma, following in zip(levels, [*levels[1:], 0.0], strict=True):
            steps.append(Step(sigma, following))
            if following:
                steps += [Step(following, following, corrects=True)] * self.config.steps
        return steps

    def move(self, u: Tensor, step: Step, denoise: DenoiseFunction) -> Tensor:
        """One predictor or corrector step."""
        return self._correct(u, step, denoise) if step.corrects else self._predict(u, step, denoise)

    def _predict(self, u: Tensor, step: Step, denoise: DenoiseFunction) -> Tensor:
        variance = step.sigma**2 - step.following**2
        moved = u + variance / step.sigma**2 * (_ask(denoise, u, step.sigma) - u)
        return moved + math.sqrt(variance) * self.noise(u) if self.config.inject and step.following else moved

    def _correct(self, u: Tensor, step: Step, denoise: DenoiseFunction) -> Tensor:
        scores = []
        for _ in range(self.config.noise_copies):
            noisy = u + self.config.input_noise * step.sigma * self.noise(u) if self.config.input_noise else u
            scores.append((_ask(denoise, noisy, step.sigma) - u) / step.sigma**2)
        score, noise = torch.stack(scores).mean(0), self.noise(u)
        ratio = noise.flatten(1).norm(dim=1).mean() / score.flatten(1).norm(dim=1).mean().clamp_min(1e-12)
        size: Tensor = 2 * (self.config.snr * ratio) ** 2
        moved: Tensor = u + size * score
        return moved + (2 * size).sqrt() * noise if self.config.inject else moved


class MeanReverting(Rule):
    """From the degraded image mu with a little noise back to the clean one (Luo et al. 2023; GM-SDE, mri.md 3.11).

    x_t = mu + m_t (x_0 - mu) + s_t n with s_t^2 = sigma_1^2 (1 - m_t^2), where m_t rises from `sigma[1]` to 1 by the cosine of
    Nichol and Dhariwal. The prior need not know mu: mu + (x_t - mu) / m_t is x_0 with noise of level s_t / m_t, which is what a
    denoiser is made for. Each step draws from the exact conditional of the step before, given that answer.
    """

    def schedule(self) -> list[Step]:
        """Steps between remaining shares m_t of the image; `sigma` is the share, not a noise level."""
        low, count = self.config.sigma[1], self.config.levels
        shares = [low + (1 - low) * math.sin(index / count * math.pi / 2) ** 2 for index in range(count + 1)]
        return [Step(a, b) for a, b in pairwise(shares)]

    def begin(self, start: Tensor) -> Tensor:
        """The degraded image with noise of the stationary level."""
        return start + self._spread(self.config.sigma[1]) * self.noise(start)

    def _spread(self, share: float) -> float:
        return self.config.sigma[0] * math.sqrt(max(0.0, 1 - share**2))

    def move(self, u: Tensor, step: Step, denoise: DenoiseFunction) -> Tensor:
        """One step back, given what the denoiser says."""
        mean, share, after = self.anchor, step.sigma, step.following
        spread, left = self._spread(share), self._spread(after)
        clean = _ask(denoise, mean + (u - mean) / share, spread / share)
        ratio = share / after
        fresh = spread**2 - ratio**2 * left**2
        moved = mean + (ratio * left**2 * (u - mean) + after * fresh * (clean - mean)) / spread**2
        noise = math.sqrt(max(0.0, fresh)) * left / spread
        return moved + noise * self.noise(u) if self.config.inject and noise else moved


class _Denoised(Rule):
    """Rules that bring the denoised image, not the noisy one, into agreement with the data."""

    def move(self, u: Tensor, step: Step, denoise: DenoiseFunction) -> Tensor:
        """What the denoiser says."""
        return _ask(denoise, u, step.sigma)

    def schedule(self) -> list[Step]:
        """The last step goes to no noise."""
        levels = noise_levels(self.config)
        return [Step(a, b) for a, b in zip(levels, [*levels[1:], 0.0], strict=True)]

    def begin(self, start: Tensor) -> Tensor:
        """The starting image with noise of the first level (CCDF, Chung et al. 2022), or noise alone."""
        noise = self.config.ends[0] * self.noise(start)
        return noise if self.config.start == "noise" else start + noise


class Ddim(_Denoised):
    """x_0 = DC(D(x)); x = x_0 + sqrt(s'^2 - f^2) e + f n, e the noise that D took away (DDS, Chung et al. 2024).

    f = eta s' sqrt(1 - s'^2 / s^2) is the fresh noise from level s to s' (Song et al. 2021, DDIM, equation 16).
    """

    def settle(self, before: Tensor, moved: Tensor, consistent: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Noise of the next level on the consistent image."""
        if not step.following:
            return consistent, consistent
        fresh = self.config.eta * step.following * math.sqrt(max(0.0, 1 - (step.following / step.sigma) ** 2))
        kept = math.sqrt(step.following**2 - fresh**2) * (before - moved) / step.sigma
        state = consistent + kept
        return state + fresh * self.noise(before) if fresh else state, consistent


class Heun(_Denoised):
    """Heun's method along the probability flow dx/dsigma = (x - DC(D(x))) / sigma (Karras et al. 2022, algorithm 1)."""

    _from: tuple[Tensor, Tensor, float] | None = None

    def schedule(self) -> list[Step]:
        """A step and its correction at each level but the last."""
        steps: list[Step] = []
        for step in super().schedule():
            steps.append(step)
            if step.following:
                steps.append(Step(step.following, step.following, corrects=True))
        return steps

    def settle(self, before: Tensor, moved: Tensor, consistent: Tensor, step: Step) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """One Euler step, or its correction with the slope at its end."""
        slope = (before - consistent) / step.sigma
        if step.corrects and self._from is not None:
            start, first, length = self._from
            return start + length * (first + slope) / 2, consistent
        length = step.following - step.sigma
        self._from = (before, slope, length)
        return before + length * slope, consistent


RULES: dict[str, Callable[[SamplerConfig, torch.Generator], Rule]] = {
    "proximal": Relaxation,
    "gradient": Relaxation,
    "energy": Energy,
    "annealed_langevin": AnnealedLangevin,
    "predictor_corrector": PredictorCorrector,
    "mean_reverting": MeanReverting,
    "ddim": Ddim,
    "heun": Heun,
}
"""Rules by the name that a configuration calls them."""


def make_rule(config: SamplerConfig, generator: torch.Generator) -> Rule:
    """The rule that the configuration says."""
    return RULES[config.rule](config, generator)
