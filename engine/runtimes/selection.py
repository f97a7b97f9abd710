"""Which runtime runs a network here: those that can are loaded, tested against torch in float32, and the best is taken.

On a GPU the order is fixed: TensorRT, torch recorded as a CUDA graph, torch. On the processor the fastest wins, as measured
when it is first asked for; the outcome is kept in the cache. What was tried and why it was not taken is part of the outcome.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import msgspec
import torch
from torch import nn

from ..config_runtime import RuntimeConfig
from ..errors import ConfigError, RuntimeFailed
from .base import DeviceKind, LoadedDenoiser, LoadOptions, Precision, Runtime, Shape
from .cache import ArtefactCache
from .export import export_key
from .fingerprint import package_version, processor_identity
from .guarded import Fallback, GuardedDenoiser, RuntimeStatus
from .onnx_runtimes import OnnxRuntime, OpenVino
from .self_test import TOLERANCES, Golden, golden_tensors, verify
from .tensorrt_runtime import TensorRT
from .torch_runtimes import TorchCompiled, TorchCudaGraph, TorchEager

__all__ = ["RUNTIMES", "RuntimeConfig", "Selection", "Trial", "select"]

RUNTIMES: tuple[Runtime, ...] = (TensorRT(), TorchCudaGraph(), OpenVino(), OnnxRuntime(), TorchEager(), TorchCompiled())
"""All there are, in the order of preference on a GPU."""
State = Literal["untried", "chosen", "passed", "refused", "unavailable"]
_BY_NAME_ONLY = {"torch-compile"}
"""Takes a minute to load, so that it is tried only where it is asked for."""
_TIMED_RUNS, _TIMED_SECONDS, _WARM_RUNS = 9, 0.6, 2


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One runtime in one precision: what came of it."""

    runtime: str
    precision: Precision
    state: State
    version: str = ""
    error: float | None = None
    """Greatest error of the self-test relative to torch in float32."""
    tolerance: float = 0.0
    load_seconds: float | None = None
    seconds: float | None = None
    """Median of one evaluation."""
    cached: bool = False
    """Whether something that it needed was in the cache."""
    reason: str = ""
    remedy: str = ""


class Selection(msgspec.Struct, frozen=True, eq=False):
    """A denoiser that runs, and all that was tried on the way to it, in order."""

    denoiser: GuardedDenoiser
    trials: tuple[Trial, ...]

    @property
    def chosen(self) -> Trial:
        """What runs."""
        return next(trial for trial in self.trials if trial.state == "chosen")


class _Candidate(msgspec.Struct, eq=False):
    """A runtime under trial."""

    runtime: Runtime
    trial: Trial
    denoise: LoadedDenoiser | None = None


def select(
    model: nn.Module,
    shape: Shape,
    options: RuntimeConfig | None = None,
    *,
    cache: ArtefactCache | None = None,
    runtimes: Sequence[Runtime] = RUNTIMES,
    progress: Callable[[str], None] = lambda _: None,
    measure: bool = False,
) -> Selection:
    """Make a denoiser ready for images of one shape.

    model: module (x (N, C, H, W), sigma (N,)) -> (N, C, H, W), float32. cache: where compiled networks and the choice are
    kept; None keeps nothing. progress: told what is being done. measure: load and time everything, whatever was chosen
    before. Raises ConfigError when what is asked for does not exist here, `RuntimeFailed` when nothing runs.
    """
    asked = options or RuntimeConfig()
    device = _device(asked)
    load = LoadOptions(device=device, threads=asked.threads or LoadOptions().threads, cache=cache)
    golden = golden_tensors(TorchEager().load(model, shape, "float32", load), shape)
    candidates = [
        _Candidate(r, Trial(runtime=r.name, precision=p, state="untried")) for r, p in _asked(asked, device, runtimes)
    ]
    if not candidates:
        raise ConfigError(f"no runtime called {asked.runtime} runs on {device} in precision {asked.precision}")
    key = _choice_key(model, shape, load, candidates)
    kept = None if measure or cache is None else _kept_choice(cache, key)
    everything = measure or (device == "cpu" and kept is None)
    ranked = sorted(candidates, key=lambda c: kept is not None and (c.runtime.name, c.trial.precision) != kept)
    for candidate in ranked:
        progress(f"{candidate.runtime.name} {candidate.trial.precision}")
        _try(candidate, model, shape, load, golden)
        if candidate.denoise is not None and not everything:
            break
    tried = [c for c in ranked if c.denoise is not None]
    _time(tried, golden)
    return _concluded(model, shape, load, ranked, tried, key)


def _device(asked: RuntimeConfig) -> DeviceKind:
    there = torch.cuda.is_available()
    if asked.device == "cuda" and not there:
        raise ConfigError("runtime.device = 'cuda', but no CUDA device answers; see the row CUDA of `scanside doctor`")
    return "cuda" if there and asked.device != "cpu" else "cpu"


def _asked(
    asked: RuntimeConfig, device: DeviceKind, runtimes: Sequence[Runtime]
) -> Iterator[tuple[Runtime, Precision]]:
    """Runtimes and precisions that come into question, the preferred first."""
    for runtime in runtimes:
        named = asked.runtime == runtime.name
        if named or (asked.runtime == "auto" and runtime.name not in _BY_NAME_ONLY):
            for precision in runtime.precisions(device):
                if precision == asked.precision or (asked.precision == "auto" and precision != "float16"):
                    yield runtime, precision


def _choice_key(model: nn.Module, shape: Shape, load: LoadOptions, candidates: Sequence[_Candidate]) -> dict[str, str]:
    """What the choice depends on."""
    names = " ".join(f"{c.runtime.name}/{c.trial.precision}" for c in candidates)
    versions = {name: package_version(name) for name in ("openvino", "onnxruntime", "tensorrt")}
    here = {"device": load.device, "threads": str(load.threads), "processor": processor_identity(), "candidates": names}
    return export_key(model, shape, "float32") | versions | here


def _kept_choice(cache: ArtefactCache, key: dict[str, str]) -> tuple[str, str] | None:
    content = cache.get("choice", key)
    if content is None:
        return None
    runtime, _, precision = content.decode().partition(" ")
    return runtime, precision


def _try(candidate: _Candidate, model: nn.Module, shape: Shape, load: LoadOptions, golden: Sequence[Golden]) -> None:
    """Load a candidate and test it; what is wrong with it goes into its trial."""
    runtime, trial = candidate.runtime, candidate.trial
    try:
        found = runtime.available(load.device, trial.precision)
    except RuntimeFailed as failure:  # installed, and broken
        candidate.trial = msgspec.structs.replace(trial, state="unavailable", reason=str(failure))
        return
    if not found.ok:
        candidate.trial = msgspec.structs.replace(
            trial, state="unavailable", version=found.version, reason=found.reason, remedy=found.remedy
        )
        return
    begun, hits = time.perf_counter(), load.cache.hits if load.cache is not None else 0
    tolerance = TOLERANCES[trial.precision]
    try:
        denoise, error = _loaded(candidate, model, shape, load, golden)
    except RuntimeFailed as failure:
        candidate.trial = msgspec.structs.replace(
            trial, state="refused", version=found.version, tolerance=tolerance, reason=str(failure)
        )
        return
    candidate.denoise = denoise
    candidate.trial = msgspec.structs.replace(
        trial,
        state="passed",
        version=found.version,
        error=error,
        tolerance=tolerance,
        load_seconds=time.perf_counter() - begun,
        cached=load.cache is not None and load.cache.hits > hits,
    )


def _loaded(
    candidate: _Candidate, model: nn.Module, shape: Shape, load: LoadOptions, golden: Sequence[Golden]
) -> tuple[LoadedDenoiser, float]:
    """A candidate that has passed the test, and its error. What comes from the cache and fails is compiled anew, once."""
    runtime, precision = candidate.runtime, candidate.trial.precision
    tolerance, hits = TOLERANCES[precision], load.cache.hits if load.cache is not None else 0
    try:
        denoise = runtime.load(model, shape, precision, load)
        return denoise, verify(denoise, golden, tolerance)
    except RuntimeFailed:
        if load.cache is None or load.cache.hits == hits:
            raise
    denoise = runtime.load(model, shape, precision, msgspec.structs.replace(load, anew=True))
    return denoise, verify(denoise, golden, tolerance)


def _time(candidates: Sequence[_Candidate], golden: Sequence[Golden]) -> None:
    """Time candidates in turn, so that a passing disturbance meets all of them alike."""
    times: list[list[float]] = [[] for _ in candidates]
    deadline = time.perf_counter() + _TIMED_SECONDS * max(1, len(candidates))
    for turn in range(_WARM_RUNS + _TIMED_RUNS):
        if turn > _WARM_RUNS and time.perf_counter() > deadline:
            break
        for candidate, taken in zip(candidates, times, strict=True):
            taken.append(_seconds(candidate.denoise, golden[turn % len(golden)]))
    for candidate, taken in zip(candidates, times, strict=True):
        kept = taken[_WARM_RUNS:] or taken
        candidate.trial = msgspec.structs.replace(candidate.trial, seconds=statistics.median(kept))


def _seconds(denoise: LoadedDenoiser | None, case: Golden) -> float:
    if denoise is None:
        return float("inf")
    begun = time.perf_counter()
    out = denoise(case.x, case.sigma)
    if out.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _concluded(
    model: nn.Module,
    shape: Shape,
    load: LoadOptions,
    ranked: Sequence[_Candidate],
    tried: Sequence[_Candidate],
    key: dict[str, str],
) -> Selection:
    """Take the best of what passed, and remember it."""
    if not tried:
        said = "; ".join(f"{c.runtime.name} {c.trial.precision}: {c.trial.reason}" for c in ranked)
        raise RuntimeFailed(f"no runtime can run the network: {said}")
    best = tried[0] if load.device == "cuda" else min(tried, key=lambda c: c.trial.seconds or 0.0)
    best.trial = trial = msgspec.structs.replace(best.trial, state="chosen")
    if load.cache is not None:
        load.cache.put("choice", key, f"{trial.runtime} {trial.precision}".encode())
    status = RuntimeStatus(
        runtime=trial.runtime,
        precision=trial.precision,
        device=load.device,
        version=trial.version,
        error=trial.error or 0.0,
        seconds=trial.seconds,
    )
    if best.denoise is None:
        raise RuntimeFailed(f"{trial.runtime} was not loaded")
    denoiser = GuardedDenoiser(best.denoise, shape, status, list(_fallbacks(model, shape, load, trial)))
    return Selection(denoiser, tuple(c.trial for c in ranked))


def _fallbacks(model: nn.Module, shape: Shape, load: LoadOptions, trial: Trial) -> Iterator[Fallback]:
    """Torch on the same device, then on the processor; each in float32."""
    eager = TorchEager()

    def on(options: LoadOptions) -> Callable[[], LoadedDenoiser]:
        return lambda: eager.load(model, shape, "float32", options)

    if (trial.runtime, trial.precision) != (eager.name, "float32"):
        yield Fallback(eager.name, "float32", load.device, on(load))
    if load.device != "cpu":
        yield Fallback(eager.name, "float32", "cpu", on(msgspec.structs.replace(load, device="cpu")))
