"""Torch as a runtime: eager, compiled by its inductor, and on CUDA recorded once as a graph.

Eager is the reference and what is fallen back on, so it depends on nothing but torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..streaming.results import threads
from .base import Availability, DeviceKind, LoadedDenoiser, LoadOptions, Precision, Shape, failing_as, quietly
from .cuda import CudaDevice
from .export import at_precision, example

__all__ = ["TorchCompiled", "TorchCudaGraph", "TorchEager"]


def _processor_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself; where it does not, torch is ten times slower with it."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def _precisions(device: DeviceKind) -> tuple[Precision, ...]:
    if device == "cuda":
        return ("bfloat16", "float32", "float16")
    return ("bfloat16", "float32")


def _available(device: DeviceKind, precision: Precision) -> Availability:
    if device == "cuda" and not torch.cuda.is_available():
        return Availability(ok=False, reason="no CUDA device answers", remedy="see the row CUDA of `scanside doctor`")
    if device == "cpu" and precision == "bfloat16" and not _processor_has_bfloat16():
        return Availability(
            ok=False,
            reason="the processor has no bfloat16 instructions",
            remedy="use float32 here; Zen 4, Cooper Lake and later have them",
        )
    return Availability(ok=True, version=torch.__version__)


@contextmanager
def _exactly(device: DeviceKind) -> Iterator[None]:
    """Without the 10-bit mantissa that cuDNN takes for float32 by default."""
    if device == "cpu":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False):
        yield


class TorchEager:
    """The module itself, in the memory format that its convolutions like best."""

    name = "torch"

    def precisions(self, device: DeviceKind) -> tuple[Precision, ...]:
        """As `Runtime.precisions`."""
        return _precisions(device)

    def available(self, device: DeviceKind, precision: Precision) -> Availability:
        """As `Runtime.available`."""
        return _available(device, precision)

    def load(
        self,
        model: nn.Module,
        shape: Shape,  # noqa: ARG002 - any will do
        precision: Precision,
        options: LoadOptions,
    ) -> LoadedDenoiser:
        """As `Runtime.load`."""
        with failing_as("moving the network to its device"):
            return _Eager(_prepared(model, precision, options.device), options)


def _prepared(model: nn.Module, precision: Precision, device: DeviceKind) -> nn.Module:
    """A copy for inference, weights with channels last."""
    made: nn.Module = at_precision(model, precision, device=device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return made


class _Eager:
    def __init__(self, model: nn.Module, options: LoadOptions) -> None:
        self._model, self._options = model, options

    @torch.inference_mode()
    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        device = self._options.device
        with failing_as("torch"), threads(self._options.threads), _exactly(device):
            x = x.to(device).contiguous(memory_format=torch.channels_last)
            out: Tensor = self._model(x, sigma.to(device))
        return out


class TorchCompiled:
    """The module compiled by torch's inductor, with its weights frozen into the code."""

    name = "torch-compile"

    def precisions(self, device: DeviceKind) -> tuple[Precision, ...]:
        """As `Runtime.precisions`."""
        return _precisions(device)

    def available(self, device: DeviceKind, precision: Precision) -> Availability:
        """As `Runtime.available`: it needs a C++ compiler when it runs."""
        if device == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++")):
            return Availability(
                ok=False, reason="there is no C++ compiler", remedy="install one, e.g. `apt install g++`"
            )
        return _available(device, precision)

    def load(self, model: nn.Module, shape: Shape, precision: Precision, options: LoadOptions) -> LoadedDenoiser:
        """As `Runtime.load`; takes up to a minute. Torch keeps what it compiles in a cache of its own."""
        with failing_as("compilation by torch"), quietly(), torch.inference_mode(), threads(options.threads):
            made = _prepared(model, precision, options.device)
            made.compile(dynamic=False, options={"freezing": True, "compile_threads": 1})
            loaded = _Eager(made, options)
            loaded(*example(shape, device=options.device))
        return loaded


class TorchCudaGraph:
    """The module recorded once as a CUDA graph: one launch per evaluation. Unmeasured."""

    name = "torch-cuda-graph"

    def precisions(self, device: DeviceKind) -> tuple[Precision, ...]:
        """As `Runtime.precisions`."""
        return _precisions(device) if device == "cuda" else ()

    def available(self, device: DeviceKind, precision: Precision) -> Availability:
        """As `Runtime.available`."""
        return _available(device, precision)

    def load(self, model: nn.Module, shape: Shape, precision: Precision, options: LoadOptions) -> LoadedDenoiser:
        """As `Runtime.load`."""
        with failing_as("recording the network as a CUDA graph"):
            return _Recorded(_prepared(model, precision, options.device), shape, CudaDevice())


class _Recorded:
    def __init__(self, model: nn.Module, shape: Shape, cuda: CudaDevice) -> None:
        self._model = model
        self._x, self._sigma, self._out = cuda.empty(shape.sizes), cuda.empty((shape.batch,)), cuda.empty(shape.sizes)
        self._x.zero_()
        self._sigma.fill_(1.0)
        with torch.inference_mode(), _exactly("cuda"):
            self._replay = cuda.record(self._work)

    def _work(self) -> None:
        self._out.copy_(self._model(self._x.contiguous(memory_format=torch.channels_last), self._sigma))

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        with failing_as("the CUDA graph"), torch.inference_mode():
            self._x.copy_(x, non_blocking=True)
            self._sigma.copy_(sigma, non_blocking=True)
            self._replay()
        return self._out
