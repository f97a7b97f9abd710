"""Configured systems with a learned prior, as methods of `mri_quality.py`."""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable, Iterator

import msgspec
from mri_cases import Case, Method
from scanside.engine.baselines.sense import cg_sense
from scanside.engine.config import ConfigStore, SystemConfig, Value, with_overrides
from scanside.engine.operators import Fourier
from scanside.engine.samplers.consistency import Measurement
from scanside.engine.streaming.generative import GenerativeResult, PriorSolver
from torch import Tensor

__all__ = ["PUBLISHED_EFFORT", "estimates", "foreign_method", "system_methods"]

_OF_ONE_FAMILY = ("hkgm", "cm_dm", "dp_mdm_1", "dp_mdm_2", "dp_mdm_3", "dp_mdm_4")
_THREE_CORRECTORS: dict[str, Value] = {"sampler.steps": 1, "sampler.noise_copies": 3, "sampler.input_noise": 0.15}
PUBLISHED_EFFORT: dict[str, dict[str, Value]] = {
    "mri/hggdp": {"sampler.steps": 80, "sampler.relaxation": 0.015},
    "mri/ugm_pi": {"sampler.steps": 30, "sampler.relaxation": 0.1},
    "mri/edaeprec": {
        "sampler.levels": 200,
        "sampler.relaxation": 0.1,
        "sampler.momentum": 0.9,
        "sampler.noise_copies": 3,
        "sampler.input_noise": 1.0,
        "sampler.jacobian": True,
    },
    "mri/edmsprec": {"sampler.levels": 300, "sampler.noise_copies": 3},
    "mri/ebmrec": {"sampler.levels": 300, "sampler.noise_copies": 8},
    "mri/ki_ebm": {"sampler.levels": 20, "sampler.noise_copies": 8},
    "mri/gm_sde": {"sampler.levels": 800},
    "mri/dds": {"sampler.levels": 99},
    "mri/wkgm": {"sampler.levels": 1000, "sampler.steps": 1},
    "mri/svd_wkgm": {"sampler.levels": 1000, "sampler.steps": 1},
    "mri/sub_dm": {"sampler.levels": 50, **_THREE_CORRECTORS},
    **{f"mri/{name}": {"sampler.levels": 1000, **_THREE_CORRECTORS} for name in _OF_ONE_FAMILY},
}
"""What makes a configuration spend as many network evaluations as its publication."""
EFFORTS = {"mri/online": (4, 8), "mri/online_undistilled": (4, 8)}
"""Numbers of network evaluations with which a configuration is run, each a row of its own."""


def system_methods(kind: str, names: Iterable[str], *, full: bool) -> Iterator[Method]:
    """The configurations of these names, or `all`, that work on one coil or on several (kind `single`, `multi`)."""
    store, names = ConfigStore(), list(names)
    for name in store.names():
        config = store.get(name)
        if not ({name, "all"} & set(names)) or config.kind != "mri" or not config.stages or not _fits(config, kind):
            continue
        for count in EFFORTS.get(name, (config.sampler.levels,)):
            effort = with_overrides(config, {"sampler.levels": count}, source="benchmark")
            row = f"{name}, {count}" if name in EFFORTS else name
            yield Method(row, row, functools.partial(_run, effort))
        if full and name in PUBLISHED_EFFORT:
            longer = with_overrides(config, PUBLISHED_EFFORT[name], source="published effort")
            yield Method(f"{name}, as many evaluations as published", f"{name} (long)", functools.partial(_run, longer))


def foreign_method(weights: str) -> Method:
    """The undistilled online system with a prior that was trained on something else."""
    config = with_overrides(ConfigStore().get("mri/online_undistilled"), {"sampler.levels": 8}, source="benchmark")
    stage = config.stages[0]
    stage = msgspec.structs.replace(stage, prior=msgspec.structs.replace(stage.prior, weights=weights))
    name = "mri/online_undistilled, 8, natural images"
    return Method(name, name, functools.partial(_run, msgspec.structs.replace(config, stages=(stage,))))


def _fits(config: SystemConfig, kind: str) -> bool:
    """Low rank over coils adds nothing for one coil; SVD-WKGM then is WKGM. Frames are no matter of these cases."""
    return config.reconstruction.frames == 1 and (kind == "multi" or config.name != "mri/svd_wkgm")


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
