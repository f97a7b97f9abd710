"""What a runtime is: something that runs a denoiser of one shape, in one precision, on one device.

A denoiser is a module that takes images x (N, C, H, W) float32 and noise levels sigma (N,) float32 and gives the denoised
images, shape of x. Whatever precision its network is computed in, both ends are float32, and so is the scaling by sigma.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Literal, Protocol

import msgspec
import torch
from torch import Tensor, nn

from ..errors import RuntimeFailed
from .cache import Artefact, ArtefactCache

__all__ = [
    "Availability",
    "DeviceKind",
    "LoadOptions",
    "LoadedDenoiser",
    "Precision",
    "Runtime",
    "Shape",
    "failing_as",
    "parse_precision",
    "quietly",
]

Precision = Literal["float32", "bfloat16", "float16"]
DeviceKind = Literal["cpu", "cuda"]
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]

LoadedDenoiser = Callable[[Tensor, Tensor], Tensor]
"""(x, sigma) -> denoised x. The result may be a buffer of the runtime: it holds until the next call."""


class Shape(msgspec.Struct, frozen=True):
    """Shape of the images of a denoiser."""

    batch: Size
    channels: Size
    height: Size
    width: Size

    @classmethod
    def of(cls, x: Tensor) -> Shape:
        """Shape of a tensor (N, C, H, W). Raises ValueError for any other rank."""
        if x.ndim != 4:
            raise ValueError(f"images have shape {tuple(x.shape)}; expected (batch, channels, height, width)")
        return cls(*x.shape)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """As a tuple, in the order of the axes."""
        return self.batch, self.channels, self.height, self.width

    def __str__(self) -> str:
        return " x ".join(str(size) for size in self.sizes)


class Availability(msgspec.Struct, frozen=True):
    """Whether a runtime can be used here; where not, why, and what to do about it."""

    ok: bool
    version: str = ""
    reason: str = ""
    remedy: str = ""


class LoadOptions(msgspec.Struct, frozen=True):
    """Where and how a runtime runs."""

    device: DeviceKind = "cpu"
    threads: int = max(1, len(os.sched_getaffinity(0)))
    """Processor threads, for what runs on the processor."""
    cache: ArtefactCache | None = None
    """Where compiled networks are kept; None keeps nothing."""
    anew: bool = False
    """Compile again, whatever the cache has."""

    def artefact(self, kind: str, key: Mapping[str, str], make: Callable[[], bytes]) -> Artefact:
        """What `make` gives, kept in the cache where there is one."""
        if self.cache is None:
            return Artefact(make(), None, found=False)
        return self.cache.get_or_make(kind, key, make, anew=self.anew)


class Runtime(Protocol):
    """One way to run a network."""

    name: str

    def precisions(self, device: DeviceKind) -> tuple[Precision, ...]:
        """What can be asked for on a device, the preferred one first; empty where it does not run there at all."""

    def available(self, device: DeviceKind, precision: Precision) -> Availability:
        """Whether it can be used; imports what it needs, builds nothing."""

    def load(self, model: nn.Module, shape: Shape, precision: Precision, options: LoadOptions) -> LoadedDenoiser:
        """Make a denoiser of one shape ready to run. Raises `RuntimeFailed` where that cannot be done."""


@contextmanager
def failing_as(doing: str) -> Iterator[None]:
    """Turn whatever a third party's library raises inside into a `RuntimeFailed` that says what was being done."""
    try:
        yield
    except RuntimeFailed:
        raise
    except Exception as error:
        said = next(iter(str(error).strip().splitlines()), "")
        raise RuntimeFailed(f"{doing} failed: {type(error).__name__}: {said[:300]}") from error


def parse_precision(precision: Precision) -> torch.dtype:
    """The torch type of the numbers that a network is computed with."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


@contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings of compilers and exporters, which are about their own code."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
