"""The loop: a program of stages over a schedule, as a generator that gives its estimate after each step.

Because it is a generator, whoever drives it may show an estimate, stop at a deadline, or put in new data between two steps
(`Program.update`), so that a reconstruction begins before its scan ends. Which network, domain, data consistency and
constraint a stage has are its configuration's business; a system is a TOML file.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec
import torch
from torch import Tensor

from ..config_priors import SamplerConfig, StageConfig
from ..errors import ConfigError
from ..priors.denoiser import DenoiseFunction
from ..priors.domains import filtered_prior, hankel_prior, image_prior
from ..priors.transforms import HankelMatrix, Transform
from .consistency import DataConsistency, Measurement, make_consistency
from .constraints import Constraint, make_constraint
from .rules import Rule, Step, make_rule

__all__ = ["Estimate", "Program", "Stage", "generate", "make_program", "run_to_end"]


class Estimate(msgspec.Struct, frozen=True, eq=False):
    """What a run has come to after a step: the image (*batch, *domain) and what it cost so far."""

    image: Tensor
    sigma: float
    evaluations: int
    """Network evaluations of each plane so far."""
    step: int
    """Number of this step, from 1 to `steps`."""
    steps: int


class Stage:
    """One stage: u = T z, the prior's move, z' = T^+ u', data consistency, constraint.

    levels: first and last noise level of the schedule, which `prior.sigma_range` takes the place of.
    """

    def __init__(
        self,
        config: StageConfig,
        denoise: DenoiseFunction,
        transform: Transform,
        consistency: DataConsistency,
        constraint: Constraint,
        levels: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        self.config, self.transform, self._levels = config, transform, levels
        self.consistency, self.constraint = consistency, constraint
        self._denoise, self.evaluations, self.moves = denoise, 0, 0

    def denoise(self, u: Tensor, sigma: Tensor) -> Tensor:
        """The prior of this stage, with its evaluations counted."""
        self.evaluations += 1
        return self._denoise(u, sigma)

    def apply(self, state: Tensor, steps: Sequence[Step], rule: Rule) -> tuple[Tensor, Tensor]:
        """State and estimate after the moves of one level: a predictor and its correctors, or a single one."""
        estimate, asked = state, self.config.constraint
        for number, step in enumerate(map(self._own, steps), 1):
            moved = rule.push(state, self._moved(state, step, rule))
            consistent = self.consistency(moved, step.sigma)
            if number == len(steps) or asked.each_move:
                consistent = self.constraint(consistent)
                if asked.data_after:
                    consistent = self.consistency(consistent, step.sigma)
            state, estimate = rule.settle(state, moved, consistent, step)
        return state, estimate

    def _moved(self, state: Tensor, step: Step, rule: Rule) -> Tensor:
        """The state after the prior's move, made on the image with its phase turned (T is linear, so it is turned, too)."""
        turn = cmath.rect(1.0, math.radians(self.config.prior.turn * self.moves))
        self.moves += 1
        seen = state if turn == 1 else state * turn
        moved = self.transform.inverse(rule.move(self.transform.forward(seen), step, self.denoise), seen)
        return moved if turn == 1 else moved * turn.conjugate()

    def _own(self, step: Step) -> Step:
        """A step in the noise levels of this stage, if it has its own."""
        told, own = self.config.prior.sigma, self.config.prior.sigma_range
        if told:
            return msgspec.structs.replace(step, sigma=told, following=told)
        if own is None:
            return step
        first, last = self._levels
        exponent = math.log(own[1] / own[0]) / math.log(last / first) if last != first else 1.0
        sigma, following = (
            own[0] * (level / first) ** exponent if level else 0.0 for level in (step.sigma, step.following)
        )
        return msgspec.structs.replace(step, sigma=sigma, following=following)


class Program:
    """Stages, one after the other or side by side, repeated over the schedule of a sampler."""

    def __init__(self, stages: Sequence[Stage], sampler: SamplerConfig) -> None:
        self.stages, self.sampler = list(stages), sampler
        if not stages:
            raise ConfigError(
                "stages is empty; a system with a prior has at least one, such as [[stages]] with a prior"
            )
        if stages[0].config.branch:
            raise ConfigError("stages[0].branch = true: the first stage has none before it to branch from")
        if sampler.rule == "annealed_langevin" and not sampler.steps:
            raise ConfigError("sampler.steps = 0: annealed_langevin needs at least 1 at each level")
        if sampler.rule == "mean_reverting" and any(stage.config.prior.sigma_range for stage in stages):
            raise ConfigError(
                "prior.sigma_range: mean_reverting has one stationary level for all stages, sampler.sigma[0]"
            )
        if sampler.rule == "mean_reverting" and sampler.sigma_steps:
            raise ConfigError("sampler.sigma_steps: mean_reverting has no noise levels one by one, but sampler.sigma")
        if sampler.rule == "mean_reverting" and any(stage.config.prior.turn for stage in stages):
            raise ConfigError("prior.turn: mean_reverting goes back to its start, which is not turned")
        if len(stages) > 1 and sampler.rule in ("ddim", "heun"):
            raise ConfigError(f"sampler.rule = {sampler.rule!r} works on one stage, the program has {len(stages)}")

    def update(self, data: Tensor, mask: Tensor) -> None:
        """From the next step on, this was measured."""
        for stage in self.stages:
            stage.consistency.update(data, mask)

    @torch.no_grad()
    def run(self, start: Tensor, *, seed: int | None = None) -> Iterator[Estimate]:
        """Yield the estimate after each step, from an image (*batch, *domain) to begin with.

        seed: instead of the configured one. The same seed, input and number of threads give the same bits.
        """
        yield from self.unrolled(start, seed=seed)

    def unrolled(self, start: Tensor, *, seed: int | None = None) -> Iterator[Estimate]:
        """As `run`, with gradients, for training through the loop."""
        generator = torch.Generator().manual_seed(self.sampler.seed if seed is None else seed)
        rules = [make_rule(self.sampler, generator) for _ in self.stages]
        for stage, rule in zip(self.stages, rules, strict=True):
            stage.evaluations, stage.moves, rule.anchor = 0, 0, stage.transform.forward(start)
        levels, state = _levels(rules[0].schedule()), rules[0].begin(start)
        for index, steps in enumerate(levels, 1):
            state, estimate = self._level(state, steps, rules)
            evaluations = sum(stage.evaluations for stage in self.stages)
            yield Estimate(estimate, steps[0].sigma, evaluations, index, len(levels))

    def _level(self, state: Tensor, steps: Sequence[Step], rules: Sequence[Rule]) -> tuple[Tensor, Tensor]:
        before = estimate = state
        for stage, rule in zip(self.stages, rules, strict=True):
            if not stage.config.branch:
                before = state
            after, found = stage.apply(before, steps, rule)
            share = stage.config.merge if stage.config.branch else 1.0
            state, estimate = _mixed(state, after, share), _mixed(estimate, found, share)
        return state, estimate


def _levels(schedule: Sequence[Step]) -> list[list[Step]]:
    """Steps with the correctors that follow them: each stage makes all of one before the next stage has its turn."""
    levels: list[list[Step]] = []
    for step in schedule:
        if step.corrects and levels:
            levels[-1].append(step)
        else:
            levels.append([step])
    return levels


def _mixed(one: Tensor, other: Tensor, share: float) -> Tensor:
    return other if share == 1.0 else (1 - share) * one + share * other


def make_program(
    stages: Sequence[StageConfig],
    sampler: SamplerConfig,
    priors: Callable[[str], DenoiseFunction] | Mapping[str, DenoiseFunction],
    measured: Measurement,
) -> Program:
    """The program of a configuration for what was measured.

    priors: gives a denoiser by the name of its weights. Raises `ConfigError` for a program that cannot be.
    """
    find = priors if callable(priors) else priors.__getitem__
    shape = measured.data.shape[-2:]
    made = []
    for config in stages:
        transform, denoise = Transform(config.transform, shape), find(config.prior.weights)
        if config.prior.domain == "image":
            denoise = image_prior(denoise, transform)
        elif config.prior.domain == "filtered":
            denoise = filtered_prior(denoise, transform)
        elif isinstance(transform.analysis, HankelMatrix):
            denoise = hankel_prior(denoise, transform.analysis)
        consistency, constraint = make_consistency(measured, config.data), make_constraint(config.constraint)
        made.append(Stage(config, denoise, transform, consistency, constraint, sampler.ends))
    return Program(made, sampler)


def run_to_end(program: Program, start: Tensor, *, seed: int | None = None) -> Estimate:
    """The last estimate of a run."""
    last = None
    for estimate in program.run(start, seed=seed):
        last = estimate
    if last is None:
        raise ConfigError("sampler.levels: a schedule without steps gives no image")
    return last


def generate(
    denoise: DenoiseFunction, sampler: SamplerConfig, shape: Sequence[int], *, seed: int | None = None
) -> Estimate:
    """An image of the prior alone, from noise: no data. shape: (*batch, y, x); the image is complex."""
    start = torch.zeros(tuple(shape), dtype=torch.complex64)
    nothing = Measurement(
        data=torch.zeros(1, 1, *shape[-2:], dtype=torch.complex64), mask=torch.zeros((), dtype=torch.bool)
    )
    stage = msgspec.convert({"data": {"kind": "none"}}, StageConfig)
    noisy = msgspec.structs.replace(sampler, start="noise")
    return run_to_end(make_program([stage], noisy, {"": denoise}, nothing), start, seed=seed)
