"""Runtimes for the processor that read ONNX: ONNX Runtime and OpenVINO, both with their buffers shared with torch."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from ..errors import RuntimeFailed
from .base import Availability, DeviceKind, LoadedDenoiser, LoadOptions, Precision, Shape, failing_as
from .cache import Artefact
from .export import INPUTS, OUTPUT, export_key, to_onnx
from .fingerprint import package_version, processor_identity

__all__ = ["OnnxRuntime", "OpenVino", "exported", "missing_package"]

_EXPORTERS = ("onnx", "onnxscript")


def exported(model: nn.Module, shape: Shape, precision: Precision, options: LoadOptions) -> Artefact:
    """The ONNX file of a denoiser, from the cache where it is there."""
    return options.artefact("onnx", export_key(model, shape, precision), lambda: to_onnx(model, shape, precision))


def missing_package(names: tuple[str, ...], extra: str) -> Availability | None:
    """What to say when one of the packages is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            return Availability(ok=False, reason=f"{name} is not installed", remedy=f"pip install 'scanside[{extra}]'")
    return None


class _Buffers:
    """Fixed float32 buffers for one shape on the processor."""

    def __init__(self, shape: Shape) -> None:
        self.x, self.sigma, self.out = torch.zeros(shape.sizes), torch.ones(shape.batch), torch.zeros(shape.sizes)

    def fill(self, x: Tensor, sigma: Tensor) -> None:
        self.x.copy_(x)
        self.sigma.copy_(sigma)


class OnnxRuntime:
    """Microsoft's ONNX Runtime on the processor, float32. Idle threads sleep: spinning ones slow everything else down."""

    name = "onnxruntime"

    def precisions(self, device: DeviceKind) -> tuple[Precision, ...]:
        """As `Runtime.precisions`."""
        return ("float32",) if device == "cpu" else ()

    def available(self, device: DeviceKind, precision: Precision) -> Availability:  # noqa: ARG002 - as the Protocol has it
        """As `Runtime.available`."""
        missing = missing_package((*_EXPORTERS, "onnxruntime"), "onnx")
        if missing is not None:
            return missing
        with failing_as("import of onnxruntime"):
            import onnxruntime
        return Availability(ok=True, version=str(onnxruntime.__version__))

    def load(self, model: nn.Module, shape: Shape, precision: Precision, options: LoadOptions) -> LoadedDenoiser:
        """As `Runtime.load`."""
        content = exported(model, shape, precision, options).content
        with failing_as("ONNX Runtime could not take the network; loading"):
            import onnxruntime

            settings = onnxruntime.SessionOptions()
            settings.intra_op_num_threads, settings.inter_op_num_threads = options.threads, 1
            settings.log_severity_level = 3
            settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
            session = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
            return _OnnxSession(session, shape)


class _OnnxSession:
    def __init__(self, session: Any, shape: Shape) -> None:  # noqa: ANN401 - onnxruntime has no types
        self._session, self._buffers = session, _Buffers(shape)
        self._binding = session.io_binding()
        for name, buffer in zip(INPUTS, (self._buffers.x, self._buffers.sigma), strict=True):
            self._binding.bind_input(name, "cpu", 0, "float32", tuple(buffer.shape), buffer.data_ptr())
        out = self._buffers.out
        self._binding.bind_output(OUTPUT, "cpu", 0, "float32", tuple(out.shape), out.data_ptr())

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        with failing_as("ONNX Runtime"):
            self._buffers.fill(x, sigma)
            self._session.run_with_iobinding(self._binding)
        return self._buffers.out


_OPENVINO_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


class OpenVino:
    """Intel's OpenVINO on the processor: its threads get on best with others, and it computes in bfloat16 where there is any."""

    name = "openvino"

    def precisions(self, device: DeviceKind) -> tuple[Precision, ...]:
        """As `Runtime.precisions`."""
        return ("bfloat16", "float32") if device == "cpu" else ()

    def available(self, device: DeviceKind, precision: Precision) -> Availability:  # noqa: ARG002 - as the Protocol has it
        """As `Runtime.available`."""
        missing = missing_package((*_EXPORTERS, "openvino"), "openvino")
        if missing is not None:
            return missing
        with failing_as("import of openvino"):
            openvino = _openvino()
            able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bfloat16" and "BF16" not in able:
            return Availability(
                ok=False,
                version=_version(openvino),
                reason="the processor has no bfloat16 instructions",
                remedy="use float32 here; Zen 4, Cooper Lake and later have them",
            )
        return Availability(ok=True, version=_version(openvino))

    def load(self, model: nn.Module, shape: Shape, precision: Precision, options: LoadOptions) -> LoadedDenoiser:
        """As `Runtime.load`. The compiled network is kept in the cache; a blob that it refuses is made anew."""
        settings = _openvino_settings(precision, options)
        key = export_key(model, shape, "float32") | {f"setting {name}": value for name, value in settings.items()}
        key |= {"openvino": package_version("openvino"), "processor": processor_identity()}

        def build() -> bytes:
            # float32 in the file: OpenVINO rounds weights itself, as the hint says
            compiled = _compiled(exported(model, shape, "float32", options).content, settings)
            return bytes(compiled.export_model().getvalue())

        with failing_as("OpenVINO could not take the network; loading"):
            kept = options.artefact("openvino", key, build)
            compiled = _imported(kept.content, settings)
            if compiled is None and kept.found:
                again = msgspec.structs.replace(options, anew=True)
                compiled = _imported(again.artefact("openvino", key, build).content, settings)
            if compiled is None:
                raise RuntimeFailed("OpenVINO cannot read what it compiled itself")
            return _OpenVinoRequest(compiled, shape, precision)


def _openvino() -> Any:  # noqa: ANN401 - openvino has no types
    """The module, kept from reporting to its maker over the network, which importing it does by default."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # not found, so it takes its own stub
    import openvino

    return openvino


def _version(openvino: Any) -> str:  # noqa: ANN401
    """Without the build and the branch."""
    return str(openvino.__version__).partition("-")[0]


def _openvino_settings(precision: Precision, options: LoadOptions) -> dict[str, str]:
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": _OPENVINO_PRECISIONS[precision],
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(options.threads),
    }


def _compiled(content: bytes, settings: dict[str, str]) -> Any:  # noqa: ANN401 - an openvino.CompiledModel
    core = _openvino().Core()
    return core.compile_model(core.read_model(content), "CPU", settings)


def _imported(blob: bytes, settings: dict[str, str]) -> Any:  # noqa: ANN401 - an openvino.CompiledModel, or None
    try:
        return _openvino().Core().import_model(blob, "CPU", settings)
    except RuntimeError:  # of another build
        return None


class _OpenVinoRequest:
    def __init__(self, compiled: Any, shape: Shape, precision: Precision) -> None:  # noqa: ANN401 - openvino.CompiledModel
        openvino = _openvino()
        used = str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())
        if used != _OPENVINO_PRECISIONS[precision]:
            raise RuntimeFailed(f"OpenVINO computes in {used}, not in {precision} as asked for")
        self._request, self._buffers = compiled.create_infer_request(), _Buffers(shape)
        for name, buffer in zip(INPUTS, (self._buffers.x, self._buffers.sigma), strict=True):
            self._request.set_tensor(name, openvino.Tensor(buffer.numpy(), shared_memory=True))
        self._request.set_tensor(OUTPUT, openvino.Tensor(self._buffers.out.numpy(), shared_memory=True))

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        with failing_as("OpenVINO"):
            self._buffers.fill(x, sigma)
            self._request.infer()
        return self._buffers.out
