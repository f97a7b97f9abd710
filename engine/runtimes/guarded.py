"""A denoiser that keeps going: when its runtime fails in the middle of a scan, torch takes over and the images say so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import msgspec
import torch
from torch import Tensor

from ..errors import DeviceLost, RuntimeFailed
from .base import LoadedDenoiser, Precision, Shape

__all__ = ["Fallback", "GuardedDenoiser", "RuntimeStatus"]

SLOW_FACTOR = 10.0
"""An evaluation that takes this many times what it took at the start is counted as slow."""
_SLOW_AT_LEAST = 0.005


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
    """Empty, or the fixed word `runtime`: a fallback runs, since what was chosen failed."""
    detail: str = ""
    """What failed, for people and logs."""
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
    """

    def __init__(
        self, denoise: LoadedDenoiser, shape: Shape, status: RuntimeStatus, fallbacks: Sequence[Fallback]
    ) -> None:
        self.shape = shape
        self._denoise, self._status, self._fallbacks = denoise, status, list(fallbacks)
        self._lock = threading.Lock()
        self._unchecked: Tensor | None = None

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
            begun = time.perf_counter()
            found = self._evaluate(x, sigma)
            self._count(time.perf_counter() - begun)
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
            self._status = msgspec.structs.replace(
                self._status,
                runtime=following.runtime,
                precision=following.precision,
                device=following.device,
                version="",
                error=0.0,
                seconds=None,
                reason=RuntimeFailed.reason,
                detail="; ".join(filter(None, (self._status.detail, f"{self._status.runtime}: {why}"))),
            )
            try:
                self._denoise = following.load()
            except RuntimeFailed as error:
                why = str(error)
                continue
            return
        raise DeviceLost(f"no runtime is left that can run the network: {why}") from cause

    def _count(self, seconds: float) -> None:
        usual = self._status.seconds
        slow = usual is not None and seconds > max(SLOW_FACTOR * usual, _SLOW_AT_LEAST)
        self._status = msgspec.structs.replace(
            self._status, evaluations=self._status.evaluations + 1, slow=self._status.slow + slow
        )
