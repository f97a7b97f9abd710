"""Configured systems with a learned prior, as methods of `mri_quality.py`."""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable, Iterator

from mri_cases import Case, Method
from scanside.engine.baselines.sense import cg_sense
from scanside.engine.config import ConfigStore, SystemConfig
from scanside.engine.operators import Fourier
from scanside.engine.samplers.consistency import Measurement
from scanside.engine.streaming.generative import GenerativeResult, PriorSolver
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
    return last.image, last.evaluations


def estimates(config: SystemConfig, case: Case) -> Iterator[GenerativeResult]:
    """What a session's solver gives after each step; the image combined, (z, y, x), on the scale of the case."""
    solver = PriorSolver(config, (1, *case.mask.shape), case.data.shape[0])
    measured = Measurement(data=case.data, mask=case.mask, maps=None if solver.per_coil else case.maps)
    if solver.per_coil:
        plain = Fourier(case.data.shape).H(case.data)
    else:
        plain = cg_sense(case.operator, case.data, iterations=8, regularization=0.005)
    yield from solver.solve(measured, plain)
