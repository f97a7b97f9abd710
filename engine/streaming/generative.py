"""A frame through a system with a learned prior: scale, start, the loop under a deadline, and what the image says of it.

The prior knows images whose 99th percentile of |x| lies at `BRIGHT`; a frame is brought there by the 99th percentile of its own
plain image, never by its maximum, which one bright pixel moves. How prior and data are weighed is told by the noise of the
data, known after prewhitening (standard deviation 1 of real and imaginary part), else taken as the configured floor.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Iterator

import msgspec
import torch
from torch import Tensor

from ..config import SystemConfig
from ..errors import ConfigError, RuntimeFailed
from ..priors.denoiser import DenoiseFunction
from ..priors.storage import ModelCard, load_weights
from ..runtimes import (
    ArtefactCache,
    GuardedDenoiser,
    RuntimeConfig,
    RuntimeStatus,
    Selection,
    Shape,
    select,
)
from ..samplers.consistency import Measurement
from ..samplers.loop import Estimate, Program, make_program, run_to_end
from .results import StageClock

__all__ = ["BRIGHT", "FrameEstimate", "GenerativeResult", "PriorFrames", "PriorSolver"]

BRIGHT = 0.6
"""Where the 99th percentile of |x| lies in the images that priors are trained on, whose maximum is 1."""
TOGETHER = 8
"""Planes that a network is given at once, at most: a volume has hundreds."""
PER_COIL = frozenset({"hard", "replace"})
"""Kinds of data consistency whose state are the images of the coils, not their combination."""


class GenerativeResult(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """An estimate in the units of the data, and how it was made.

    image: complex (z, y, x); of a system without coil maps the root sum of squares. deviation: standard deviation over the
    samples that were drawn, or None. late: the deadline came before the last step.
    """

    image: Tensor
    evaluations: int
    step: int
    steps: int
    residual: float
    """|A x - y| / |y|."""
    late: bool = False
    samples: int = 1
    deviation: Tensor | None = None

    @property
    def last(self) -> bool:
        """Whether nothing follows."""
        return self.late or self.step == self.steps


@functools.lru_cache(maxsize=16)
def _weights(name: str) -> tuple[torch.nn.Module, ModelCard]:
    return load_weights(name)


@functools.lru_cache(maxsize=16)
def _selected(name: str, shape: Shape, options: RuntimeConfig) -> Selection:
    """What runs these weights at this shape; chosen once per process, since it takes seconds."""
    return select(_weights(name)[0], shape, options, cache=ArtefactCache())


class _InParts:
    """A denoiser of a few planes that is given many, (N, C, H, W): as many at a time as it takes."""

    def __init__(self, denoiser: GuardedDenoiser) -> None:
        self._denoiser = denoiser

    @property
    def status(self) -> RuntimeStatus:
        """What runs it."""
        return self._denoiser.status

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        count = self._denoiser.shape.batch
        parts = zip(torch.split(x, count), torch.split(sigma, count), strict=True)
        return torch.cat([self._denoiser(*part) for part in parts])


class PriorSolver:
    """Runs the stage program of a configuration on one frame after the other.

    matrix: (z, y, x) of the images. coils: of the data. Raises `ConfigError` for weights that are not there.
    """

    def __init__(self, config: SystemConfig, matrix: tuple[int, int, int], coils: int) -> None:
        self.config = config
        self.per_coil = bool(config.stages) and config.stages[0].data.kind in PER_COIL
        self._planes = matrix[0] * (coils if self.per_coil else 1)
        self._matrix = matrix
        self._before: dict[int, Tensor] = {}
        frames = config.reconstruction.frames
        if frames > 1 and not self.per_coil:
            raise ConfigError(f"reconstruction.frames = {frames}: frames together need stages[0].data.kind = 'hard'")
        self._recent: dict[int, deque[tuple[Measurement, Tensor]]] = {}
        self.cards = {stage.prior.weights: _weights(stage.prior.weights)[1] for stage in config.stages}
        self.prepare()

    def prepare(self) -> None:
        """Choose what runs the networks, before data comes."""
        for stage in self.config.stages:
            self._denoiser(stage.prior.weights)
            if self.config.output.posterior_samples > 1:
                self._denoiser(stage.prior.weights, self.config.output.posterior_samples)

    def _denoiser(self, name: str, copies: int = 1) -> DenoiseFunction:
        """By its weights, for `copies` images at once. What the transforms of a stage make of an image need not have its
        shape, and the frames of a slice grow in number; then torch runs it."""
        stages = [stage for stage in self.config.stages if stage.prior.weights == name]
        shaped = all(stage.transform.kind == "image" and not stage.transform.split for stage in stages)
        if not shaped or self.config.reconstruction.frames > 1:
            module: DenoiseFunction = _weights(name)[0]
            return module
        planes = copies * self._planes
        together = max(count for count in range(1, TOGETHER + 1) if planes % count == 0)
        shape = Shape(together, self.cards[name].network.channels, *self._matrix[1:])
        denoiser = _selected(name, shape, self.config.runtime).denoiser
        return denoiser if together == planes else _InParts(denoiser)

    def solve(
        self, measured: Measurement, plain: Tensor, *, where: int = 0, deadline: float | None = None
    ) -> Iterator[GenerativeResult]:
        """Yield an estimate after each step; the last one has `last` set.

        measured: in the units of the scanner, noise 0 where it is unknown. plain: the image to scale by and, if so configured,
        to start from, (z, y, x), or of each coil. where: which slice, for warm starts. deadline: monotonic time at which the
        best estimate so far has to do; one step is made in any case.
        """
        measured, plain = self._with_recent(measured, plain, where)
        scale = float(plain.abs().flatten().kthvalue(max(1, int(0.99 * plain.numel()))).values) / BRIGHT or 1.0
        shrink = 1 / scale  # torch divides complex numbers at a tenth of the speed at which it multiplies them
        scaled = msgspec.structs.replace(measured, data=measured.data * shrink, noise=measured.noise * shrink)
        program = make_program(self.config.stages, self.config.sampler, self._denoiser, scaled)
        start = self._start(program, plain * shrink, where)
        begun = time.monotonic()
        for estimate in program.run(start):
            now = time.monotonic()
            late = (
                deadline is not None
                and now + (now - begun) / estimate.step > deadline
                and estimate.step < estimate.steps
            )
            done = late or estimate.step == estimate.steps
            result = self._result(estimate, program, scale, late=late)
            if done:
                if self.config.reconstruction.warm_start:
                    self._before[where] = estimate.image.clone()
                count = self.config.output.posterior_samples
                if count > 1 and (deadline is None or now + count * (now - begun) < deadline):
                    result = self._with_samples(scaled, start, scale, result)
            yield result
            if done:
                return

    def _with_recent(self, measured: Measurement, plain: Tensor, where: int) -> tuple[Measurement, Tensor]:
        """Data and plain images of the last frames, the newest last, (frame, coil, z, y, x); those of one frame as they are."""
        count = self.config.reconstruction.frames
        if count == 1:
            return measured, plain
        recent = self._recent.setdefault(where, deque(maxlen=count))
        recent.append((measured, plain))
        data = torch.stack([one.data for one, _ in recent])
        masks = torch.stack([one.mask.expand(data.shape[-3:])[None] for one, _ in recent])
        together = msgspec.structs.replace(measured, data=data, mask=masks, lattice=None)
        return together, torch.stack([image for _, image in recent])

    def _start(self, program: Program, plain: Tensor, where: int) -> Tensor:
        before = self._before.get(where)
        if self.config.reconstruction.warm_start and before is not None and before.shape == plain.shape:
            return before
        if self.config.sampler.start != "zero_filled":
            return plain
        consistency = program.stages[0].consistency
        if self.per_coil:
            return consistency.fourier.H(consistency.measured.data)
        return consistency.adjoint

    def _with_samples(
        self, scaled: Measurement, start: Tensor, scale: float, result: GenerativeResult
    ) -> GenerativeResult:
        """Mean and standard deviation over runs, side by side, that begin with noise of the first level of their own."""
        count, sampler = self.config.output.posterior_samples, self.config.sampler
        generator = torch.Generator().manual_seed(sampler.seed)
        parts = torch.randn(2, count, *start.shape, generator=generator)
        program = make_program(self.config.stages, sampler, functools.partial(self._denoiser, copies=count), scaled)
        last = run_to_end(program, start + sampler.ends[0] * torch.complex(parts[0], parts[1]))
        images = self._combined(last.image) * scale
        mean = images.mean(0)
        deviation = (images - mean).abs().square().sum(0).div_(count - 1).sqrt_()
        evaluations = result.evaluations + count * last.evaluations
        return msgspec.structs.replace(result, image=mean, deviation=deviation, samples=count, evaluations=evaluations)

    def _combined(self, image: Tensor) -> Tensor:
        if not self.per_coil:
            return image
        newest = image.select(-5, -1) if self.config.reconstruction.frames > 1 else image
        return newest.abs().square().sum(-4).sqrt()

    def _result(self, estimate: Estimate, program: Program, scale: float, *, late: bool) -> GenerativeResult:
        return GenerativeResult(
            image=self._combined(estimate.image) * scale,
            evaluations=estimate.evaluations,
            step=estimate.step,
            steps=estimate.steps,
            residual=program.stages[-1].consistency.residual(estimate.image)
            if estimate.step == estimate.steps or late
            else 0.0,
            late=late,
        )

    def attributes(self, result: GenerativeResult) -> dict[str, list[str]]:
        """How the image was made, as image attributes (design.md 1.3)."""
        attributes = {
            "scanside_system": [self.config.name],
            "scanside_generative": ["1"],
            "scanside_network_evaluations": [str(result.evaluations)],
            "scanside_steps": [str(result.step), str(result.steps)],
            "scanside_residual": [f"{result.residual:.4g}"],
            "scanside_weights": [f"{card.name} {card.sha256}" for card in self.cards.values()],
            "scanside_samples": [str(result.samples)],
        }
        for stage in self.config.stages:
            denoise = self._denoiser(stage.prior.weights)
            status = getattr(denoise, "status", None)
            attributes |= (
                status.attributes() if status is not None else {"scanside_runtime": ["torch", "float32", "cpu"]}
            )
        return attributes


class FrameEstimate(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What a frame is given out as: an estimate of the prior's loop, or the plain image in its place, saying why."""

    image: Tensor
    method: str
    """Empty for the plain image, which was made before."""
    reason: str = ""
    provenance: dict[str, list[str]] = {}
    deviation: Tensor | None = None
    preview: bool = False


class PriorFrames:
    """A `PriorSolver` that always has an image: the plain one where weights or runtimes fail, marked.

    needed: whether the scan will surely need it, so that it is loaded at once; else with the first frame that does.
    """

    def __init__(self, config: SystemConfig, matrix: tuple[int, int, int], coils: int, *, needed: bool = True) -> None:
        self.config, self._size = config, (matrix, coils)
        self._known: PriorSolver | None = None
        self._why = ""
        if needed:
            self._load()

    def _load(self) -> PriorSolver | None:
        if self._known is None and not self._why:
            try:
                self._known = PriorSolver(self.config, *self._size)
            except (ConfigError, RuntimeFailed) as error:
                self._why = str(error)
        return self._known

    def run(
        self, measured: Measurement, plain: Tensor, *, where: int, received: float, clock: StageClock
    ) -> Iterator[FrameEstimate]:
        """Yield previews, if they are wanted, then the image. received: when the last readout came, monotonic."""
        solver, wanted = self._load(), self.config.reconstruction.deadline_ms
        if solver is None:
            said = {"scanside_prior_unavailable": [self._why[:500]]}
            yield FrameEstimate(image=plain, method="", reason="no_weights", provenance=said)
            return
        deadline = received + wanted / 1e3 if wanted else None
        results = solver.solve(measured, plain, where=where, deadline=deadline)
        while True:
            with clock.stage("prior"):
                result = next(results)
            if result.last or self.config.output.previews:
                yield self._estimate(solver, result, late=deadline is not None and time.monotonic() > deadline)
            if result.last:
                return

    def _estimate(self, solver: PriorSolver, result: GenerativeResult, *, late: bool) -> FrameEstimate:
        provenance = solver.attributes(result)
        if self.config.reconstruction.deadline_ms:
            provenance["scanside_deadline"] = ["missed" if late else "met"]
        return FrameEstimate(
            image=result.image,
            method="prior",
            reason="deadline" if result.late or (late and result.last) else "",
            provenance=provenance,
            deviation=result.deviation,
            preview=not result.last,
        )
