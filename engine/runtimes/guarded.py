"""A denoiser that keeps going: when its runtime fails or grows slow in mid-scan, torch takes over and the images say so."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

import msgspec
import torch
from torch import Tensor

from ..errors import DeviceLost, RuntimeFailed
from .base import LoadedDenoiser, Precision, Shape

__all__ = ["Fallback", "GuardedDenoiser", "RuntimeStatus"]

_log = logging.getLogger("scanside.runtimes")

SLOW_FACTOR = 10.0
"""An evaluation that takes this many times what it took at the start is counted as slow."""
_SLOW_AT_LEAST = 0.005
PATIENCE = 5
"""Slow evaluations in a row after which a fallback is tried. It takes over if it is faster than each of them was, measured at the
same moment, so that a busy machine, which slows everything, changes nothing. Else the patience doubles."""


class RuntimeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What runs a network, and whether that is what was chosen at the start."""

    runtime: str
    precision: Precision
    device: str
    version: str = ""
    error: float = 0.0
    """Of the self-test: the greatest error relative to torch in float32."""
    seconds: float | None = None
    """Of one evaluation at the start; None where it was not timed."""
    reason: str = ""
    """Empty, or the fixed word `runtime`: a fallback runs, since what was chosen failed or grew slow."""
    detail: str = ""
    """What failed or grew slow, for people and logs."""
    evaluations: int = 0
    slow: int = 0
    """Evaluations that took ten times as long as at the start, or longer."""

    def attributes(self) -> dict[str, list[str]]:
        """The provenance as image attributes."""
        said = [self.runtime, self.precision, self.device, *([self.version] if self.version else [])]
        attributes = {"scanside_runtime": said, "scanside_runtime_error": [f"{self.error:.2g}"]}
        if self.reason:
            attributes["scanside_runtime_reason"] = [self.reason]
        return attributes


class Fallback(msgspec.Struct, frozen=True, eq=False):
    """What takes over: made when it is needed."""

    runtime: str
    precision: Precision
    device: str
    load: Callable[[], LoadedDenoiser]


class GuardedDenoiser:
    """A loaded denoiser with others to fall back on.

    Calls from several threads wait for each other: a runtime has one set of buffers. A failure is remembered, what has taken
    over stays. NaN is looked for after each call on the processor; on CUDA, where that would wait for the device, by `check`.
    What is timed on CUDA is the call, which ends before the device does. clock: seconds, from any start.
    """

    def __init__(
        self,
        denoise: LoadedDenoiser,
        shape: Shape,
        status: RuntimeStatus,
        fallbacks: Sequence[Fallback],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.shape = shape
        self._denoise, self._status, self._fallbacks, self._clock = denoise, status, list(fallbacks), clock
        self._lock = threading.Lock()
        self._unchecked: Tensor | None = None
        self._slow_ones: list[float] = []
        self._patience = PATIENCE

    @property
    def status(self) -> RuntimeStatus:
        """What runs now, and what happened."""
        return self._status

    def __call__(self, x: Tensor, sigma: Tensor, out: Tensor | None = None) -> Tensor:
        """Denoised images, shape of x; written to `out` where it is given, which may be x.

        Raises ValueError for another shape than the one it was loaded for, `DeviceLost` when no fallback works either, and
        `RuntimeFailed` when the network itself gives values that are not finite.
        """
        self._require_shape(x, sigma)
        with self._lock:
            begun = self._clock()
            found = self._evaluate(x, sigma)
            self._count(self._clock() - begun)
            if len(self._slow_ones) >= self._patience:
                self._seek_faster(x, sigma)
            if out is None:
                return found.to(x.device, copy=True)
            return out.copy_(found)

    def check(self) -> None:
        """Wait for the device. Raises `RuntimeFailed` when a result since the last check was not finite; fallbacks come next."""
        with self._lock:
            pending, self._unchecked = self._unchecked, None
            if pending is not None and not bool(torch.isfinite(pending)):
                self._fall_back("the output was not finite")
                raise RuntimeFailed("the network gave values that are not finite; the frame cannot be used")

    def _require_shape(self, x: Tensor, sigma: Tensor) -> None:
        if tuple(x.shape) != self.shape.sizes or tuple(sigma.shape) != (self.shape.batch,):
            found = f"x {tuple(x.shape)} and sigma {tuple(sigma.shape)}"
            raise ValueError(f"{found}, but the network was loaded for {self.shape} and one sigma per image")

    def _evaluate(self, x: Tensor, sigma: Tensor) -> Tensor:
        while True:
            try:
                found = self._denoise(x, sigma)
                self._inspect(found)
            except RuntimeFailed as error:
                if not bool(torch.isfinite(x.sum())):
                    raise RuntimeFailed("the images that the network was given are not finite") from error
                self._fall_back(str(error), error)
            else:
                return found

    def _inspect(self, found: Tensor) -> None:
        if tuple(found.shape) != self.shape.sizes:
            raise RuntimeFailed(f"the output has shape {tuple(found.shape)}, expected {self.shape.sizes}")
        total = found.sum()
        if found.is_cuda:
            self._unchecked = total if self._unchecked is None else self._unchecked + total
        elif not bool(torch.isfinite(total)):
            raise RuntimeFailed("the output has values that are not finite")

    def _fall_back(self, why: str, cause: Exception | None = None) -> None:
        """Put the next fallback into the place of what runs now."""
        while self._fallbacks:
            following = self._fallbacks.pop(0)
            self._tell(following, why, None)
            try:
                self._denoise = following.load()
            except RuntimeFailed as error:
                why = str(error)
                continue
            return
        raise DeviceLost(f"no runtime is left that can run the network: {why}") from cause

    def _tell(self, following: Fallback, why: str, seconds: float | None) -> None:
        """In the status: what takes over, and why."""
        self._status = msgspec.structs.replace(
            self._status,
            runtime=following.runtime,
            precision=following.precision,
            device=following.device,
            version="",
            error=0.0,
            seconds=seconds,
            reason=RuntimeFailed.reason,
            detail="; ".join(filter(None, (self._status.detail, f"{self._status.runtime}: {why}"))),
        )
        self._slow_ones, self._patience = [], PATIENCE

    def _seek_faster(self, x: Tensor, sigma: Tensor) -> None:
        """Try the next fallback on images that were slow, and stay with it if it is faster."""
        fastest, usual = min(self._slow_ones), self._status.seconds
        self._slow_ones, self._patience = [], 2 * self._patience
        for following in self._fallbacks[:1]:
            try:
                denoise = following.load()
                seconds = self._timed(denoise, x, sigma)
            except RuntimeFailed as error:
                self._fallbacks.remove(following)
                _log.warning("the fallback %s cannot run the network: %s", following.runtime, error)
                return
            if seconds < fastest:
                self._fallbacks.remove(following)
                self._tell(following, f"took {fastest:.3g} s or longer, at the start {usual:.3g} s", seconds)
                self._denoise = denoise

    def _timed(self, denoise: LoadedDenoiser, x: Tensor, sigma: Tensor) -> float:
        """Seconds of the second evaluation; the first one warms up."""
        seconds = 0.0
        for _ in range(2):
            begun = self._clock()
            found = denoise(x, sigma)
            if found.is_cuda:
                torch.cuda.synchronize(found.device)
            seconds = self._clock() - begun
            self._inspect(found)
        return seconds

    def _count(self, seconds: float) -> None:
        usual = self._status.seconds
        slow = usual is not None and seconds > max(SLOW_FACTOR * usual, _SLOW_AT_LEAST)
        self._slow_ones = [*self._slow_ones, seconds] if slow else []
        self._status = msgspec.structs.replace(
            self._status, evaluations=self._status.evaluations + 1, slow=self._status.slow + slow
        )
