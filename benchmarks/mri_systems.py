"""Configured systems with a learned prior, as methods of `mri_quality.py`."""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable, Iterator

import torch
from mri_cases import Case, Method
from scanside.engine.baselines.combine import root_sum_of_squares, zero_filled
from scanside.engine.baselines.sense import cg_sense
from scanside.engine.config import ConfigStore, SystemConfig
from scanside.engine.operators import Fourier
from scanside.engine.priors.denoiser import DenoiseFunction
from scanside.engine.priors.storage import load_weights
from scanside.engine.samplers.consistency import Measurement
from scanside.engine.samplers.loop import Estimate, make_program
from torch import Tensor

__all__ = ["estimates", "system_methods"]

FULL = "_full"
"""Ends the names of configurations with the published number of evaluations."""


def system_methods(kind: str, names: Iterable[str], *, full: bool) -> Iterator[Method]:
    """The configurations of these names, or `all`, that work on one coil or on several (kind `single`, `multi`)."""
    store, names = ConfigStore(), list(names)
    for name in store.names():
        config = store.get(name)
        wanted = name in names or ("all" in names and (full or not name.endswith(FULL)))
        if wanted and config.kind == "mri" and config.stages and _fits(config, kind):
            yield Method(name, name.removesuffix(FULL), functools.partial(_run, config))


def _fits(config: SystemConfig, kind: str) -> bool:
    """Low rank is over coils."""
    return kind == "multi" or all(stage.constraint.kind != "low_rank" for stage in config.stages)


def _run(config: SystemConfig, case: Case) -> tuple[Tensor, int]:
    last = collections.deque(estimates(config, case), maxlen=1)[0]
    return _picture(last.image), last.evaluations


def estimates(config: SystemConfig, case: Case) -> Iterator[Estimate]:
    """The estimates of a configuration after each step, on the scale of the case.

    The brightest pixel of the starting image is brought to 1, which is what the networks were trained on.
    """
    combined = any(stage.data.kind in ("sense", "gradient") for stage in config.stages)
    combined |= case.kind == "multi" and any(stage.data.kind == "proximal" for stage in config.stages)
    start = _start(config, case, combined=combined)
    scale = float(_picture(start).abs().max())
    measured = Measurement(data=case.data / scale, mask=case.mask, maps=case.maps if combined else None)
    program = make_program(config.stages, config.sampler, _prior, measured)
    for estimate in program.run(start / scale):
        yield Estimate(estimate.image * scale, estimate.sigma, estimate.evaluations, estimate.step, estimate.steps)


def _start(config: SystemConfig, case: Case, *, combined: bool) -> Tensor:
    if not combined:
        return Fourier(case.data.shape).H(case.data)
    if config.sampler.start == "given":
        return cg_sense(case.operator, case.data, iterations=10, regularization=0.01)
    return zero_filled(case.data, case.maps)


def _picture(image: Tensor) -> Tensor:
    """Coil images (coil, z, y, x) combined to (z, y, x)."""
    return root_sum_of_squares(image) if image.ndim == 4 else image


@functools.cache
def _prior(name: str) -> DenoiseFunction:
    return load_weights(name)[0].to(memory_format=torch.channels_last)  # type: ignore[call-overload]
