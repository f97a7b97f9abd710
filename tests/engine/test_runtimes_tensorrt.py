"""TensorRT without a GPU: names against the real bindings, and the order of calls against a stand-in that keeps the rules."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scanside.engine.errors import RuntimeFailed
from scanside.engine.priors.denoiser import Denoiser
from scanside.engine.runtimes import ArtefactCache, LoadOptions, Shape, tensorrt_runtime
from scanside.engine.runtimes.base import Precision
from scanside.engine.runtimes.cache import Artefact, CacheWarning
from scanside.engine.runtimes.cuda import CudaDevice
from scanside.engine.runtimes.fingerprint import function_digest
from scanside.engine.runtimes.onnx_runtimes import exported
from scanside.engine.runtimes.self_test import TOLERANCES, golden_tensors, verify
from scanside.engine.runtimes.tensorrt_runtime import TensorRT, build_plan
from scanside.engine.runtimes.torch_runtimes import TorchCudaGraph, TorchEager

Make = Callable[..., Denoiser]
SHAPE = Shape(1, 2, 12, 16)
SOURCE = Path(tensorrt_runtime.__file__).read_text("utf-8")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("onnxscript") is None, reason="onnxscript is not installed: pip install '.[tensorrt]'"
)

# --- names, against the real bindings ----------------------------------------------------------------------------------------

CLASSES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "timing": "ITimingCache",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "_engine": "ICudaEngine",
    "context": "IExecutionContext",
    "_context": "IExecutionContext",
}
"""What the names of variables in our code stand for."""
TENSORRT_10 = "SCANSIDE_TENSORRT_10"
STUBS = """
createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL createNvOnnxParserRefitter_INTERNAL
createNvOnnxParser_INTERNAL getBuilderPluginRegistry getNvOnnxParserVersion getPluginRegistry initLibNvInferPlugins
"""
"""Functions of the libraries whose addresses the bindings take when they are imported; none of them is called."""
READ = """
import json, os, sys
sys.setdlopenflags(os.RTLD_LAZY)
import {module} as trt
kinds = {{name: getattr(trt, name) for name in dir(trt) if isinstance(getattr(trt, name), type)}}
names = {{name: {{each: str(getattr(kind, each).__doc__) for each in dir(kind)}} for name, kind in kinds.items()}}
made = {{name: str(kind.__init__.__doc__) for name, kind in kinds.items()}}
print(json.dumps({{"version": trt.__version__, "names": names, "made": made, "module": dir(trt)}}))
"""
Names = dict[str, Any]


def read_bindings(module: str, libraries: Path | None, place: str = "") -> Names:
    """Names and docstrings of bindings, read in a process of their own. Nothing is constructed: that needs a GPU."""
    environment = {**os.environ, **({"LD_LIBRARY_PATH": str(libraries)} if libraries else {})}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (place, os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-c", READ.format(module=module)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of libraries that hold nothing, for the bindings to be imported over."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the stub libraries: apt install gcc")
    folder = tmp_path_factory.mktemp("stubs")
    source = "\n".join(f"void *{name}(void) {{ return 0; }}" for name in STUBS.split())
    for library in ("libnvinfer.so", "libnvinfer_plugin.so", "libnvonnxparser.so"):
        for version in (10, 11):
            name = f"{library}.{version}"
            command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / name), f"-Wl,-soname,{name}"]
            subprocess.run(command, input=source, text=True, check=True)
    return folder


@pytest.fixture(scope="module")
def bindings(stubs: Path) -> Names:
    """The full bindings of TensorRT 11.4."""
    if importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("tensorrt-cu13-bindings is not installed: pip install '.[test-runtimes]'")
    return read_bindings("tensorrt_bindings", stubs)


def last(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def uses(source: str) -> Iterator[tuple[str, str, int | None]]:
    """(class or `module`, attribute, number of arguments of a call) for all that our code asks of TensorRT."""
    tree = ast.parse(source)
    calls = {
        id(node.func): len(node.args) + len(node.keywords) for node in ast.walk(tree) if isinstance(node, ast.Call)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = last(node.value)
        if owner == "trt":
            yield "module", node.attr, calls.get(id(node))
        elif isinstance(node.value, ast.Attribute) and last(node.value.value) == "trt":
            yield owner, node.attr, calls.get(id(node))
        elif owner in CLASSES:
            yield CLASSES[owner], node.attr, calls.get(id(node))


def arities(docstring: str) -> list[tuple[int, int]]:
    """Least and greatest number of arguments of each overload in a docstring of pybind11, `self` not counted."""
    found = []
    for arguments in re.findall(r"\w+\(self: [^,)]*,? ?(.*?)\) -> ", docstring):
        flat = re.sub(r"\[[^\]]*\]", "", arguments)
        parts = [part for part in flat.split(", ") if part]
        found.append((sum("=" not in part for part in parts), len(parts)))
    return found


def wrong_uses(source: str, real: Names) -> list[str]:
    wrong = []
    for owner, name, count in uses(source):
        if owner == "module":
            docstring = real["made"].get(name, "")
            known = name in real["module"]
        else:
            docstring = real["names"].get(owner, {}).get(name, "")
            known = name in real["names"].get(owner, {})
        allowed = arities(docstring) if count is not None else []
        if not known:
            wrong.append(f"{owner}.{name} does not exist")
        elif allowed and not any(low <= (count or 0) <= high for low, high in allowed):
            wrong.append(f"{owner}.{name} takes {allowed} arguments, {count} are given")
    return wrong


def test_every_name_exists_in_the_real_bindings(bindings: Names) -> None:
    assert bindings["version"].startswith("11.4.")
    asked = {(owner, name) for owner, name, _ in uses(SOURCE)}
    assert len(asked) >= 25
    assert {owner for owner, _ in asked} >= {*CLASSES.values(), "module", "BuilderFlag"} - {"INetworkDefinition"}
    assert wrong_uses(SOURCE, bindings) == []


def test_every_name_exists_in_the_bindings_of_version_10(stubs: Path) -> None:
    """They cannot be installed beside those of 11; `pip install --no-deps --target DIR tensorrt-cu13-bindings==10.16.1.11`."""
    place = os.environ.get(TENSORRT_10)
    if not place:
        pytest.skip(f"{TENSORRT_10} names no folder with the bindings of TensorRT 10")
    old = read_bindings("tensorrt_bindings", stubs, place)
    assert old["version"].startswith("10.")
    assert wrong_uses(SOURCE, old) == []
    assert "STRONGLY_TYPED" in old["names"]["NetworkDefinitionCreationFlag"]


def test_a_name_of_tensorrt_10_or_a_wrong_call_would_be_found(bindings: Names) -> None:
    changes = {
        ("BuilderFlag.TF32", "BuilderFlag.BF16"): ["BuilderFlag.BF16 does not exist"],
        ("_context.execute_async_v3", "_context.execute_async_v2"): [
            "IExecutionContext.execute_async_v2 does not exist"
        ],
        ("build_serialized_network(network, config)", "build_serialized_network(network)"): [
            "Builder.build_serialized_network takes [(2, 2), (3, 3)] arguments, 1 are given"
        ],
        ("trt.OnnxParser(network, logger)", "trt.OnnxParser(network)"): [
            "module.OnnxParser takes [(2, 2)] arguments, 1 are given"
        ],
    }
    for (before, after), expected in changes.items():
        assert before in SOURCE
        assert wrong_uses(SOURCE.replace(before, after), bindings) == expected


def test_the_runtime_half_exists_in_the_lean_bindings() -> None:
    """These come with their real library, which loads on a machine without a GPU as long as no Runtime is made."""
    if importlib.util.find_spec("tensorrt_lean_bindings") is None:
        pytest.skip("tensorrt-lean-cu13-bindings is not installed: pip install '.[test-runtimes]'")
    lean = read_bindings("tensorrt_lean_bindings", None)
    half = {"Runtime", "ICudaEngine", "IExecutionContext", "DataType"}
    asked = {(owner, name) for owner, name, _ in uses(SOURCE) if owner in half}
    assert len(asked) >= 10
    assert [use for use in asked if use[1] not in lean["names"][use[0]]] == []


def test_the_stand_in_has_no_name_that_the_real_one_lacks(bindings: Names, rules: Any) -> None:
    for kind in vars(rules).values():
        name = getattr(kind, "__name__", "")
        if not isinstance(kind, type) or name not in CLASSES.values():
            continue
        own = {each for each in vars(kind) if not each.startswith("_") and each != "trt"}
        assert own <= set(bindings["names"][name]), name


# --- the order of calls, against the stand-in --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def rules() -> Any:
    """The module with the stand-ins."""
    path = Path(__file__).with_name("tensorrt_double.py")
    spec = importlib.util.spec_from_file_location("tensorrt_double", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cuda(rules: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for torch.cuda; buffers lie in main memory."""
    stand_in = rules.CudaDouble()
    for name in ("Stream", "CUDAGraph", "current_device", "current_stream", "device", "graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(stand_in, name))
    monkeypatch.setattr(CudaDevice, "empty", lambda _self, sizes: torch.empty(sizes))
    monkeypatch.setattr(tensorrt_runtime, "gpu_identity", lambda: "H100 sm_90 driver 580.1")
    monkeypatch.setattr(tensorrt_runtime, "exported", exported_once)
    return stand_in


_EXPORTED: dict[tuple[str, Shape, str], Artefact] = {}


def exported_once(model: Denoiser, shape: Shape, precision: Precision, options: LoadOptions) -> Artefact:
    """As `exported`; all tests together export a network once, which takes most of the time."""
    key = function_digest(model), shape, precision
    if key not in _EXPORTED:
        _EXPORTED[key] = exported(model, shape, precision, LoadOptions())
    return _EXPORTED[key]


@pytest.mark.parametrize("version", ["10.16.1", "11.4.0.106", "12.0.0"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_plan_is_built_recorded_and_right(
    version: str, precision: str, rules: Any, cuda: Any, small_denoiser: Make
) -> None:
    trt, model = rules.double(cuda, version), small_denoiser()
    golden = golden_tensors(TorchEager().load(model, SHAPE, "float32", LoadOptions()), SHAPE)
    denoise = TensorRT(trt).load(model, SHAPE, precision, LoadOptions())  # type: ignore[arg-type]
    assert verify(denoise, golden, TOLERANCES[precision]) >= 0  # type: ignore[index]
    assert (cuda.recordings, cuda.replays) == (1, len(golden))
    (config,) = trt.builds
    assert [flag.name for flag in config.cleared] == (["TF32"] if precision == "float32" else [])
    assert config.builder_optimization_level == 5


FAULTS = {
    "build": "could not build a plan",
    "context": "no memory for the network",
    "type": "expected float32",
    "address": "refuses the buffer",
    "enqueue": "could not enqueue",
    "capture": "could not enqueue",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_tensorrt_says_by_a_return_value_is_heard(fault: str, rules: Any, cuda: Any, small_denoiser: Make) -> None:
    trt = rules.double(cuda)
    trt.fails = fault
    with pytest.raises(RuntimeFailed, match=FAULTS[fault]):
        TensorRT(trt).load(small_denoiser(), SHAPE, "float32", LoadOptions())


def test_an_enqueue_that_does_nothing_is_refused_by_the_self_test(rules: Any, cuda: Any, small_denoiser: Make) -> None:
    trt, model = rules.double(cuda), small_denoiser()
    golden = golden_tensors(TorchEager().load(model, SHAPE, "float32", LoadOptions()), SHAPE)
    denoise = TensorRT(trt).load(model, SHAPE, "float32", LoadOptions())
    verify(denoise, golden, 1e-4)
    trt.fails = "silent"
    with pytest.raises(RuntimeFailed, match="not finite, or was not written at all"):
        verify(denoise, golden, 1e-4)


def test_plans_and_timings_are_kept_for_one_machine(
    rules: Any, cuda: Any, small_denoiser: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, model = LoadOptions(cache=ArtefactCache(tmp_path / "cache")), small_denoiser()
    first, second = rules.double(cuda), rules.double(cuda)
    TensorRT(first).load(model, SHAPE, "float32", load)
    TensorRT(second).load(model, SHAPE, "float32", load)
    assert (len(first.builds), len(second.builds)) == (1, 0)
    TensorRT(second).load(model, SHAPE, "bfloat16", load)  # another plan, the same kernels' timings
    assert second.timings_seen == [first.machine + b" timings"]
    newer = rules.double(cuda, "11.5.0")
    TensorRT(newer).load(model, SHAPE, "float32", load)
    assert (len(newer.builds), newer.timings_seen) == (1, [b""])
    monkeypatch.setattr(tensorrt_runtime, "gpu_identity", lambda: "A100 sm_80 driver 580.1")
    other = rules.double(cuda, gpu="A100")
    TensorRT(other).load(model, SHAPE, "float32", load)
    assert len(other.builds) == 1


def test_a_plan_that_cannot_be_read_is_built_anew(rules: Any, cuda: Any, small_denoiser: Make, tmp_path: Path) -> None:
    """Of a driver that was replaced without a change of its number, say; and one whose file is damaged."""
    load, model = LoadOptions(cache=ArtefactCache(tmp_path / "cache")), small_denoiser()
    TensorRT(rules.double(cuda)).load(model, SHAPE, "float32", load)
    changed = rules.double(cuda, gpu="H100 of another kind")
    TensorRT(changed).load(model, SHAPE, "float32", load)
    assert len(changed.builds) == 1
    assert changed.timings_seen == [b"11.4.0.106 H100 timings", b""]  # refused, so it starts from none
    (plan,) = load.cache.folder.glob("tensorrt-[0-9a-f]*")  # type: ignore[union-attr]
    plan.write_bytes(plan.read_bytes()[:-7])
    with pytest.warns(CacheWarning, match="damaged"):
        TensorRT(changed).load(model, SHAPE, "float32", load)
    assert len(changed.builds) == 2


def test_a_file_that_the_parser_refuses(rules: Any, cuda: Any) -> None:
    with pytest.raises(RuntimeFailed, match="cannot read the ONNX file: error 0: not an ONNX file"):
        build_plan(rules.double(cuda), b"no ONNX", "float32")


def test_a_plan_of_another_network_is_refused(
    rules: Any, cuda: Any, small_denoiser: Make, content_of: Callable[[Path], bytes], tmp_path: Path
) -> None:
    """With a shape that it does not take."""
    load = LoadOptions(cache=ArtefactCache(tmp_path / "cache"))
    trt = rules.double(cuda)
    TensorRT(trt).load(small_denoiser(), Shape(1, 2, 16, 16), "float32", load)
    (plan,) = load.cache.folder.glob("tensorrt-[0-9a-f]*")  # type: ignore[union-attr]
    body = content_of(plan)
    with pytest.raises(RuntimeFailed, match=r"does not take x of shape \(1, 2, 12, 16\)"):
        monkey = LoadOptions(cache=_Always(tmp_path / "other", body))
        TensorRT(trt).load(small_denoiser(), SHAPE, "float32", monkey)


class _Always(ArtefactCache):
    """A cache that has one plan for everything."""

    def __init__(self, folder: Path, content: bytes) -> None:
        super().__init__(folder)
        self._content = content

    def get(self, kind: str, key: Any) -> bytes | None:
        return self._content if kind == "tensorrt" else None


def test_the_stand_in_notices_a_recording_without_a_run_before_it(cuda: Any) -> None:
    device = CudaDevice()
    with pytest.raises(AssertionError, match="nothing has run on this stream"):
        device.record(lambda: None)  # the stand-in marks a stream by an enqueue only
    assert device.stream_handle not in (0, None)


def test_work_waits_for_the_caller_and_the_caller_for_it(cuda: Any) -> None:
    device, seen = CudaDevice(), []
    device.run(lambda: seen.append((cuda.current.cuda_stream, cuda.device_index)))
    assert seen == [(device.stream_handle, 0)]
    assert [len(stream.waits) for stream in (cuda.default, device._stream)] == [1, 1]
    assert cuda.current is cuda.default


def test_torch_is_recorded_by_the_same_rules(cuda: Any, small_denoiser: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recording of the stand-in holds no kernels, so values mean nothing here; `benchmarks/gpu.py` checks them."""
    ran = []
    real = CudaDevice.run

    def run(device: CudaDevice, work: Callable[[], None]) -> None:
        real(device, work)
        device._stream.ran = True  # type: ignore[attr-defined]
        ran.append(1)

    monkeypatch.setattr(CudaDevice, "run", run)
    denoise = TorchCudaGraph().load(small_denoiser(), SHAPE, "float32", LoadOptions())
    x, sigma = torch.randn(SHAPE.sizes), torch.tensor([0.3])
    assert (len(ran), cuda.recordings) == (1, 1)
    assert denoise(x, sigma).shape == x.shape
    assert cuda.replays == 1


def test_without_a_device_the_library_is_not_even_imported() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    script = (
        "import sys\n"
        "from scanside.engine.runtimes.tensorrt_runtime import TensorRT\n"
        "found = TensorRT().available('cuda', 'bfloat16')\n"
        "assert not found.ok and 'no CUDA device' in found.reason and found.remedy, found\n"
        "assert not [name for name in sys.modules if name.startswith('tensorrt')]\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
