"""Stand-ins for TensorRT and for torch's CUDA, which hold to the documented rules and compute what the ONNX file says.

Names are those of the real bindings (a test compares them). A plan works on one version and GPU. `execute_async_v3` returns
False, and writes nothing, when an address or a shape is missing, or when it is recorded before it has run once on that
stream; it reads and writes the memory at the addresses that it was given, so buffers that move or die are noticed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np

__all__ = ["CudaDouble", "double"]

TYPES = {1: "FLOAT", 16: "BF16", 10: "HALF"}


class Stream:
    """A stream of torch.cuda: work is done at once, in order."""

    handles = 4096

    def __init__(self, _device: object = None) -> None:
        Stream.handles += 1
        self.cuda_stream = Stream.handles
        self.waits: list[Stream] = []
        self.ran = self.synchronized = False

    def wait_stream(self, other: Stream) -> None:
        self.waits.append(other)

    def synchronize(self) -> None:
        self.synchronized = True


class CudaDouble:
    """The parts of torch.cuda that runtimes use."""

    def __init__(self) -> None:
        self.default = Stream()
        self.default.cuda_stream = 0
        self.current = self.default
        self.device_index: int | None = None
        self.recording: list[Callable[[], None]] | None = None
        self.recordings = self.replays = 0

    def current_device(self) -> int:
        return 0

    def current_stream(self, _device: object = None) -> Stream:
        return self.current

    Stream = Stream

    @contextmanager
    def device(self, index: int) -> Iterator[None]:
        before, self.device_index = self.device_index, index
        yield
        self.device_index = before

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def CUDAGraph(self) -> SimpleNamespace:  # noqa: N802 - torch's name
        graph = SimpleNamespace(work=None)

        def replay() -> None:
            assert graph.work is not None, "replayed before it was recorded"
            self.replays += 1
            for step in graph.work:
                step()

        graph.replay = replay
        return graph

    @contextmanager
    def graph(self, graph: SimpleNamespace, *, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local", "a global capture breaks the work of other threads"
        assert stream.cuda_stream != 0, "the default stream cannot be captured"
        assert stream.ran, "nothing has run on this stream yet: lazy initialization would be captured"
        assert stream.synchronized, "work was still under way when the capture began"
        self.recordings += 1
        self.recording = []
        with self.stream(stream):
            yield
        graph.work, self.recording = self.recording, None


class Dims(tuple[int, ...]):
    """Shape as TensorRT gives it."""


class Logger:
    ERROR = 1

    def __init__(self, severity: int) -> None:
        self.severity = severity


class DataType(Enum):
    FLOAT, HALF, BF16 = range(3)


class BuilderFlag(Enum):
    TF32 = 7


class MemoryPoolType(Enum):
    WORKSPACE = 0


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytearray:
        return bytearray(self.content)


class INetworkDefinition:
    def __init__(self, flags: int) -> None:
        self.flags, self.content = flags, b""


class IBuilderConfig:
    def __init__(self, trt: SimpleNamespace) -> None:
        self._trt = trt
        self.builder_optimization_level = 3
        self.cleared: list[BuilderFlag] = []
        self.timing: ITimingCache | None = None

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        assert pool_size > 0

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.cleared.append(flag)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._trt.timings_seen.append(cache.content)
        if cache.content and not cache.content.startswith(self._trt.machine):
            return False
        self.timing = cache
        return True


class OnnxParser:
    num_errors = 0

    def __init__(self, network: INetworkDefinition, logger: Logger) -> None:
        self._network = network

    def parse(self, model: bytes) -> bool:
        import onnx

        try:
            onnx.checker.check_model(onnx.load_from_string(model))
        except Exception:  # noqa: BLE001 - whatever is wrong with it
            self.num_errors = 1
            return False
        self._network.content = model
        return True

    def get_error(self, index: int) -> str:
        return f"error {index}: not an ONNX file"


class Builder:
    def __init__(self, logger: Logger) -> None:
        self._trt = logger.trt  # type: ignore[attr-defined]

    def create_network(self, flags: int) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig(self._trt)

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytearray | None:
        trt = self._trt
        old = int(trt.__version__.partition(".")[0]) < 11
        assert network.flags == (2 if old else 0), "strongly typed by a flag in 10, without one in 11"
        trt.builds.append(config)
        if trt.fails == "build" or config.timing is None:
            return None
        config.timing.content = trt.machine + b" timings"
        return bytearray(trt.machine + b"\0" + network.content)


class ICudaEngine:
    def __init__(self, trt: SimpleNamespace, content: bytes) -> None:
        import onnx

        self._trt, self.content = trt, content
        graph = onnx.load_from_string(content).graph
        self.inputs, self.outputs = [v.name for v in graph.input], [v.name for v in graph.output]
        values = {v.name: v.type.tensor_type for v in (*graph.input, *graph.output)}
        self.types = {name: DataType[TYPES[value.elem_type]] for name, value in values.items()}
        self.shapes = {name: Dims(d.dim_value for d in value.shape.dim) for name, value in values.items()}
        self.num_io_tensors = len(values)

    def get_tensor_name(self, index: int) -> str:
        return (*self.inputs, *self.outputs)[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType.HALF if self._trt.fails == "type" else self.types[name]

    def create_execution_context(self) -> IExecutionContext | None:
        assert self._trt.cuda.device_index is not None, "no device was made current"
        return None if self._trt.fails == "context" else IExecutionContext(self._trt, self)


class IExecutionContext:
    def __init__(self, trt: SimpleNamespace, engine: ICudaEngine) -> None:
        from onnx.reference import ReferenceEvaluator

        self._trt, self._engine = trt, engine
        self._evaluator = ReferenceEvaluator(engine.content)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._recorded = False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name in self._engine.inputs
        self._shapes[name] = shape
        return shape == tuple(self._engine.shapes[name])

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine.inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> Dims:
        return self._engine.shapes[name]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert not self._recorded, "addresses are part of the recording"
        self._addresses[name] = memory
        return self._trt.fails != "address"

    def execute_async_v3(self, stream_handle: int) -> bool:
        cuda, fails = self._trt.cuda, self._trt.fails
        assert stream_handle != 0, "the default stream costs synchronizations"
        assert cuda.current.cuda_stream == stream_handle, "enqueued on a stream that nobody waits for"
        if set(self._addresses) != {*self._engine.inputs, *self._engine.outputs} or self.infer_shapes():
            return False
        if fails == "enqueue" or (fails == "capture" and cuda.recording is not None):
            return False
        if cuda.recording is not None:
            self._recorded = True
            cuda.recording.append(self._compute)
        else:
            cuda.current.ran = True
            self._compute()
        return True

    def _compute(self) -> None:
        if self._trt.fails == "silent":
            return
        feeds = {name: self._memory(name).copy() for name in self._engine.inputs}
        for name, value in zip(self._engine.outputs, self._evaluator.run(None, feeds), strict=True):
            self._memory(name)[...] = value

    def _memory(self, name: str) -> np.ndarray:
        shape = tuple(self._engine.shapes[name])
        count = int(np.prod(shape))
        return np.ctypeslib.as_array((ctypes.c_float * count).from_address(self._addresses[name])).reshape(shape)


class Runtime:
    def __init__(self, logger: Logger) -> None:
        self._trt = logger.trt  # type: ignore[attr-defined]

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        assert self._trt.cuda.device_index is not None, "no device was made current"
        machine, _, content = bytes(serialized_engine).partition(b"\0")
        return ICudaEngine(self._trt, content) if machine == self._trt.machine else None


def double(cuda: CudaDouble, version: str = "11.4.0.106", gpu: str = "H100") -> Any:
    """A module `tensorrt` of a version on a GPU; `fails` names what goes wrong."""
    trt = SimpleNamespace(
        __version__=version, cuda=cuda, machine=f"{version} {gpu}".encode(), fails="", builds=[], timings_seen=[]
    )
    for kind in (DataType, BuilderFlag, MemoryPoolType, OnnxParser, Builder, Runtime):
        setattr(trt, kind.__name__, kind)
    trt.Logger = type("Logger", (Logger,), {"trt": trt})
    if int(version.partition(".")[0]) < 11:
        trt.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    return trt
