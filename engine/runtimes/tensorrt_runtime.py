"""TensorRT 10 and 11: a plan built on the scanner's host from ONNX, kept, and run from a CUDA graph.

Written against the documentation and the published Python bindings of 11.4; no GPU and no builder library was at hand, so
nothing here has been run but against a stand-in that holds to the documented rules. `benchmarks/gpu.py` does the real thing.

Rules that are easy to break, and how they are kept:
- precision is that of the ONNX file; version 10 is told so by STRONGLY_TYPED, version 11 knows nothing else;
- plans fit one GPU model, driver and version: all three are part of the key;
- loading binds to the current device, so it is made current;
- `execute_async_v3` says that it failed by returning False, and leaves the outputs as they were;
- the default stream costs synchronizations; a recording needs one run before it and buffers that stay;
- without a device the library crashes the process at exit: it is not even imported there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from ..errors import RuntimeFailed
from .base import Availability, DeviceKind, LoadedDenoiser, LoadOptions, Precision, Shape, failing_as
from .cuda import CudaDevice
from .export import INPUTS, OUTPUT, export_key
from .fingerprint import gpu_identity
from .onnx_runtimes import exported, missing_package

__all__ = ["TensorRT", "build_plan"]

WORKSPACE_BYTES = 2 << 30
OPTIMIZATION_LEVEL = 5
"""The most thorough search for fast kernels: it is done once, by `scanside compile`."""
_FIRST_ALWAYS_TYPED = 11


class TensorRT:
    """NVIDIA's TensorRT; `bindings` and `cuda` are given by tests only."""

    name = "tensorrt"

    def __init__(self, bindings: Any = None, cuda: Callable[[], CudaDevice] = CudaDevice) -> None:  # noqa: ANN401
        self._bindings, self._cuda = bindings, cuda

    def precisions(self, device: DeviceKind) -> tuple[Precision, ...]:
        """As `Runtime.precisions`; bfloat16 first, since U-Nets overflow in float16."""
        return ("bfloat16", "float32", "float16") if device == "cuda" else ()

    def available(self, device: DeviceKind, precision: Precision) -> Availability:  # noqa: ARG002 - as the Protocol has it
        """As `Runtime.available`."""
        if not torch.cuda.is_available():
            return Availability(
                ok=False, reason="no CUDA device answers", remedy="see the row CUDA of `scanside doctor`"
            )
        missing = missing_package(("onnx", "onnxscript", "tensorrt"), "tensorrt")
        if missing is not None:
            return missing
        with failing_as("import of tensorrt"):
            return Availability(ok=True, version=str(self._module().__version__))

    def load(self, model: nn.Module, shape: Shape, precision: Precision, options: LoadOptions) -> LoadedDenoiser:
        """As `Runtime.load`. A new plan takes minutes; one that is kept but cannot be read is built anew."""
        cuda = self._cuda()
        with failing_as("TensorRT could not take the network; loading"), cuda.made_current():
            trt = self._module()
            key = export_key(model, shape, precision) | _flags(precision)
            key |= {"tensorrt": str(trt.__version__), "gpu": gpu_identity()}

            def build() -> bytes:
                content = exported(model, shape, precision, options).content
                return _build_with_timings(trt, content, precision, options)

            kept = options.artefact("tensorrt", key, build)
            engine = _deserialized(trt, kept.content)
            if engine is None and kept.found:
                again = msgspec.structs.replace(options, anew=True)
                engine = _deserialized(trt, again.artefact("tensorrt", key, build).content)
            if engine is None:
                raise RuntimeFailed("TensorRT cannot read the plan that it built")
            return _Engine(trt, engine, shape, cuda)

    def _module(self) -> Any:  # noqa: ANN401 - the bindings have no types
        if self._bindings is None:
            import tensorrt

            self._bindings = tensorrt
        return self._bindings


def _flags(precision: Precision) -> dict[str, str]:
    return {"tf32": "off" if precision == "float32" else "on", "level": str(OPTIMIZATION_LEVEL)}


def _build_with_timings(trt: Any, content: bytes, precision: Precision, options: LoadOptions) -> bytes:  # noqa: ANN401
    """Build, starting from the kernel timings of earlier builds on this GPU, and keep the timings."""
    key = {"tensorrt": str(trt.__version__), "gpu": gpu_identity()}
    known = options.cache.get("tensorrt-timings", key) if options.cache is not None else None
    plan, timings = build_plan(trt, content, precision, known or b"")
    if options.cache is not None:
        options.cache.put("tensorrt-timings", key, timings)
    return plan


def build_plan(trt: Any, content: bytes, precision: Precision, timings: bytes = b"") -> tuple[bytes, bytes]:  # noqa: ANN401
    """Plan of an ONNX file, and the timings of kernels, for later builds.

    `trt`: the module tensorrt; `timings`: what an earlier build returned. Raises `RuntimeFailed` with what TensorRT said.
    """
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(content):
        said = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise RuntimeFailed(f"TensorRT {trt.__version__} cannot read the ONNX file: {said}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    config.builder_optimization_level = OPTIMIZATION_LEVEL
    if precision == "float32":
        config.clear_flag(trt.BuilderFlag.TF32)
    timing = config.create_timing_cache(timings)
    if timing is None or not config.set_timing_cache(timing, False):  # noqa: FBT003 - not across GPUs
        timing = config.create_timing_cache(b"")
        config.set_timing_cache(timing, False)  # noqa: FBT003
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeFailed(f"TensorRT {trt.__version__} could not build a plan; its log says why")
    return bytes(plan), bytes(timing.serialize())


def _network_flags(trt: Any) -> int:  # noqa: ANN401
    if int(str(trt.__version__).partition(".")[0]) >= _FIRST_ALWAYS_TYPED:
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _deserialized(trt: Any, plan: bytes) -> Any:  # noqa: ANN401 - an engine, or None for a plan of another version or GPU
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    return runtime.deserialize_cuda_engine(plan)


class _Engine:
    """A plan with its context, buffers and recording."""

    def __init__(self, trt: Any, engine: Any, shape: Shape, cuda: CudaDevice) -> None:  # noqa: ANN401
        self._engine, self._cuda = engine, cuda
        self._context = engine.create_execution_context()
        if self._context is None:
            raise RuntimeFailed("TensorRT has no memory for the network")
        self._x, self._sigma, self._out = cuda.empty(shape.sizes), cuda.empty((shape.batch,)), cuda.empty(shape.sizes)
        self._x.zero_()
        self._sigma.fill_(1.0)
        self._bind(trt)
        self._replay = cuda.record(self._enqueue)

    def _bind(self, trt: Any) -> None:  # noqa: ANN401
        engine, context = self._engine, self._context
        buffers = dict(zip((*INPUTS, OUTPUT), (self._x, self._sigma, self._out), strict=True))
        names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        if names != set(buffers):
            raise RuntimeFailed(f"the plan has the tensors {sorted(names)}, expected {sorted(buffers)}")
        for name in INPUTS:
            if not context.set_input_shape(name, tuple(buffers[name].shape)):
                raise RuntimeFailed(f"the plan does not take {name} of shape {tuple(buffers[name].shape)}")
        if unknown := context.infer_shapes():
            raise RuntimeFailed(f"the plan lacks the shapes of {unknown}")
        for name, buffer in buffers.items():
            found = tuple(context.get_tensor_shape(name)), engine.get_tensor_dtype(name)
            if found != (tuple(buffer.shape), trt.DataType.FLOAT):
                raise RuntimeFailed(f"the plan has {name} as {found}, expected float32 {tuple(buffer.shape)}")
            if not context.set_tensor_address(name, buffer.data_ptr()):
                raise RuntimeFailed(f"TensorRT refuses the buffer of {name}")

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._cuda.stream_handle):
            raise RuntimeFailed("TensorRT could not enqueue the network; its log says why")

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        with failing_as("TensorRT"), torch.inference_mode():
            self._x.copy_(x, non_blocking=True)
            self._sigma.copy_(sigma, non_blocking=True)
            self._replay()
        return self._out
