"""Every runtime that is here gives what float64 mathematics gives; export, precision, fingerprints."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.engine.errors import RuntimeFailed
from scanside.engine.priors.denoiser import Denoiser
from scanside.engine.runtimes import RUNTIMES, LoadOptions, Shape
from scanside.engine.runtimes.base import Runtime
from scanside.engine.runtimes.export import at_precision, example, to_onnx
from scanside.engine.runtimes.fingerprint import function_digest
from scanside.engine.runtimes.onnx_runtimes import OnnxRuntime, OpenVino
from scanside.engine.runtimes.self_test import TOLERANCES
from scanside.engine.runtimes.torch_runtimes import TorchCompiled, TorchEager
from torch import Tensor

Make = Callable[..., Denoiser]
needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="onnxscript is not installed")


def images(shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape.sizes, generator=generator), 0.05 + torch.rand(shape.batch, generator=generator)


def in_float64(model: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).double()(x.double(), sigma.double())


def error(out: Tensor, reference: Tensor, x: Tensor) -> float:
    """Relative to what the denoiser changes."""
    return float((out - reference).norm() / (reference - x).norm())


def usable(runtime: Runtime, precision: str = "float32") -> Runtime:
    found = runtime.available("cpu", precision)  # type: ignore[arg-type]
    if not found.ok:
        pytest.skip(f"{runtime.name} {precision}: {found.reason}; {found.remedy}")
    return runtime


@pytest.mark.parametrize("precondition", ["homogeneous", "edm"])
@pytest.mark.parametrize(
    ("runtime", "precision"),
    [(r, p) for r in RUNTIMES for p in r.precisions("cpu") if r.name != "torch-compile"],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_runtime_gives_what_mathematics_gives(
    runtime: Runtime, precision: str, precondition: str, small_denoiser: Make
) -> None:
    usable(runtime, precision)
    model, shape = small_denoiser(1, precondition=precondition), Shape(2, 2, 40, 36)
    denoise = runtime.load(model, shape, precision, LoadOptions(threads=1))  # type: ignore[arg-type]
    for seed in range(3):  # other inputs, other outputs: buffers are filled each time
        x, sigma = images(shape, seed)
        out = denoise(x, sigma)
        assert out.dtype == torch.float32
        limit = 1e-5 if precision == "float32" else TOLERANCES[precision]  # type: ignore[index]
        assert error(out, in_float64(model, x, sigma), x) <= limit


@pytest.mark.timeout(400)
def test_torch_compile_gives_what_mathematics_gives(
    small_denoiser: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # compile now, whatever was compiled before
    model, shape = small_denoiser(2), Shape(1, 2, 16, 16)
    denoise = usable(TorchCompiled()).load(model, shape, "float32", LoadOptions(threads=1))
    x, sigma = images(shape)
    assert error(denoise(x, sigma), in_float64(model, x, sigma), x) <= 1e-5


@settings(max_examples=6)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 3),
    height=st.integers(8, 48),
    width=st.integers(8, 48),
    kind=st.sampled_from([TorchEager, OnnxRuntime, OpenVino]),
)
def test_any_shape(
    batch: int, channels: int, height: int, width: int, kind: type[Runtime], small_denoiser: Make
) -> None:
    runtime = kind()
    if not runtime.available("cpu", "float32").ok:
        return
    model, shape = small_denoiser(3, channels=channels), Shape(batch, channels, height, width)
    x, sigma = images(shape, height * width)
    out = runtime.load(model, shape, "float32", LoadOptions(threads=1))(x, sigma)
    assert error(out, in_float64(model, x, sigma), x) <= 1e-5


def test_nothing_changes_the_module_that_is_loaded(small_denoiser: Make) -> None:
    model = small_denoiser(4).train()
    before = function_digest(model)
    at_precision(model, "bfloat16")
    assert model.training
    assert function_digest(model) == before
    assert next(model.parameters()).requires_grad


def test_a_lower_precision_needs_a_network_inside(small_denoiser: Make) -> None:
    inner = small_denoiser().network
    with pytest.raises(ValueError, match="UNet has no submodule `network`"):
        at_precision(inner, "bfloat16")
    assert at_precision(inner, "float32") is not inner


def test_openvino_does_not_report_to_its_maker() -> None:
    """Importing it sends an event over the network by default; in a hospital that would be out of place."""
    usable(OpenVino())
    script = (
        "import sys, threading\n"
        "from scanside.engine.runtimes.onnx_runtimes import OpenVino\n"
        "assert OpenVino().available('cpu', 'float32').ok\n"
        "assert sys.modules['openvino_telemetry'] is None\n"
        "assert not any('openvino_telemetry.' in name for name in sys.modules)\n"
        "assert threading.enumerate() == [threading.main_thread()], threading.enumerate()\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr


@needs_onnx
def test_precision_is_in_the_onnx_file(small_denoiser: Make) -> None:
    """TensorRT 11 has no other place for it; both ends and sigma stay float32."""
    import onnx

    types = onnx.TensorProto
    wanted = {"float32": types.FLOAT, "bfloat16": types.BFLOAT16, "float16": types.FLOAT16}
    for precision, kind in wanted.items():
        proto = onnx.load_from_string(to_onnx(small_denoiser(), Shape(1, 2, 16, 24), precision))  # type: ignore[arg-type]
        weights = [tensor for tensor in proto.graph.initializer if len(tensor.dims) == 4]
        assert len(weights) == len(list(small_denoiser().parameters()))
        assert {tensor.data_type for tensor in weights} == {kind}
        ends = {value.name: value for value in (*proto.graph.input, *proto.graph.output)}
        assert {value.type.tensor_type.elem_type for value in ends.values()} == {types.FLOAT}
        sizes = {name: [d.dim_value for d in value.type.tensor_type.shape.dim] for name, value in ends.items()}
        assert sizes == {"x": [1, 2, 16, 24], "sigma": [1], "out": [1, 2, 16, 24]}


@needs_onnx
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_onnx_file_means_what_torch_computes(precision: str, small_denoiser: Make) -> None:
    """By the reference implementation of ONNX, which is slow and knows all types."""
    from onnx.reference import ReferenceEvaluator

    model, shape = small_denoiser(5), Shape(1, 2, 12, 16)
    x, sigma = images(shape)
    evaluator = ReferenceEvaluator(to_onnx(model, shape, precision))  # type: ignore[arg-type]
    (out,) = evaluator.run(None, {"x": x.numpy(), "sigma": sigma.numpy()})
    limit = 1e-5 if precision == "float32" else TOLERANCES[precision]  # type: ignore[index]
    assert error(torch.from_numpy(np.asarray(out)), in_float64(model, x, sigma), x) <= limit


@needs_onnx
def test_what_cannot_be_exported_is_said_so() -> None:
    class Branching(torch.nn.Module):
        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else x * sigma

    with pytest.raises(RuntimeFailed, match="export to ONNX failed"):
        to_onnx(Branching(), Shape(1, 1, 8, 8), "float32")


def test_the_digest_follows_the_function(small_denoiser: Make) -> None:
    first = small_denoiser(0)
    assert function_digest(copy.deepcopy(first).train()) == function_digest(first)
    others = [small_denoiser(1), small_denoiser(0, precondition="edm")]
    nudged = copy.deepcopy(first)
    with torch.no_grad():
        next(nudged.parameters()).view(-1)[0] += 1e-6
    shifted = small_denoiser(0, precondition="edm")
    shifted.sigma_data = 0.3
    digests = {function_digest(model) for model in (first, *others, nudged, shifted)}
    assert len(digests) == 5


def test_a_shape_is_that_of_images() -> None:
    assert Shape.of(torch.zeros(2, 3, 4, 5)) == Shape(2, 3, 4, 5)
    assert str(Shape(1, 2, 256, 192)) == "1 x 2 x 256 x 192"
    with pytest.raises(ValueError, match=r"shape \(4, 5\); expected"):
        Shape.of(torch.zeros(4, 5))
    x, sigma = example(Shape(2, 1, 4, 4))
    assert (x.shape, sigma.shape) == ((2, 1, 4, 4), (2,))
