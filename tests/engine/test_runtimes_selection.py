"""Choosing a runtime, refusing wrong ones, and going on when the chosen one fails: with real runtimes that are made to fail."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scanside.engine.errors import ConfigError, DeviceLost, RuntimeFailed
from scanside.engine.priors.denoiser import Denoiser
from scanside.engine.runtimes import ArtefactCache, GuardedDenoiser, LoadOptions, RuntimeConfig, Shape, select
from scanside.engine.runtimes.base import LoadedDenoiser, Runtime
from scanside.engine.runtimes.cache import CacheWarning
from scanside.engine.runtimes.guarded import PATIENCE, Fallback, RuntimeStatus
from scanside.engine.runtimes.onnx_runtimes import OnnxRuntime, OpenVino
from scanside.engine.runtimes.self_test import golden_tensors, verify
from scanside.engine.runtimes.torch_runtimes import TorchEager
from torch import Tensor, nn

Make = Callable[..., Denoiser]
SHAPE = Shape(1, 2, 24, 32)
OPTIONS = RuntimeConfig(device="cpu", threads=1)
EAGER = TorchEager()
ONNX, OPENVINO = OnnxRuntime(), OpenVino()
needs_onnxruntime = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed: pip install '.[onnx]'"
)
needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed: pip install '.[openvino]'"
)


class Altered:
    """A real runtime whose denoiser is altered after it was loaded."""

    def __init__(
        self, inner: Runtime, alter: Callable[[LoadedDenoiser], LoadedDenoiser], name: str = "altered"
    ) -> None:
        self._inner, self._alter, self.name = inner, alter, name
        self.precisions, self.available = inner.precisions, inner.available

    def load(self, model: nn.Module, shape: Shape, precision: str, options: LoadOptions) -> LoadedDenoiser:
        return self._alter(self._inner.load(model, shape, precision, options))  # type: ignore[arg-type]


class WrongWeights(Altered):
    """A real runtime that was given another network."""

    def __init__(self, inner: Runtime, other: nn.Module) -> None:
        super().__init__(inner, lambda denoise: denoise, "wrong-weights")
        self._other = other

    def load(self, model: nn.Module, shape: Shape, precision: str, options: LoadOptions) -> LoadedDenoiser:
        return self._inner.load(self._other, shape, precision, options)  # type: ignore[arg-type]


def images(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE.sizes, generator=generator), torch.tensor([0.2])


def reference(model: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).double()(x.double(), sigma.double())


def close(out: Tensor, wanted: Tensor) -> bool:
    return float((out - wanted).norm() / wanted.norm()) <= 1e-5


# --- the self-test -----------------------------------------------------------------------------------------------------------


def stale(denoise: LoadedDenoiser) -> LoadedDenoiser:
    """Writes its output once and never again, as an enqueue that fails in silence does."""
    kept: list[Tensor] = []

    def run(x: Tensor, sigma: Tensor) -> Tensor:
        if not kept:
            kept.append(denoise(x, sigma).clone())
        return kept[0]

    return run


FAULTS: dict[str, tuple[Callable[[LoadedDenoiser], LoadedDenoiser], str]] = {
    "stale": (stale, "not finite, or was not written at all"),
    "NaN": (lambda d: lambda x, s: d(x, s) * torch.nan, "not finite"),
    "shape": (lambda d: lambda x, s: d(x, s)[..., 1:], r"shape \(1, 2, 24, 31\), expected \(1, 2, 24, 32\)"),
    "zeros": (lambda d: lambda x, s: 0 * d(x, s), "differs from torch in float32 by .*, allowed is 0.0001"),
    "unchanged": (lambda d: lambda x, s: x, "differs from torch in float32 by 1, allowed is 0.0001"),
    "slightly wrong": (lambda d: lambda x, s: x + 1.001 * (d(x, s) - x), "by 0.001, allowed is 0.0001"),
    "raises": (lambda d: lambda x, s: d(x[:, :1], s), "torch failed: RuntimeError"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_runtime_is_refused_and_the_next_is_taken(fault: str, small_denoiser: Make) -> None:
    alter, said = FAULTS[fault]
    model = small_denoiser()
    golden = golden_tensors(EAGER.load(model, SHAPE, "float32", LoadOptions()), SHAPE)
    with pytest.raises(RuntimeFailed, match=said):
        verify(alter(EAGER.load(model, SHAPE, "float32", LoadOptions())), golden, 1e-4)
    found = select(model, SHAPE, OPTIONS, runtimes=[Altered(EAGER, alter), EAGER])
    assert [t.state for t in found.trials if t.precision == "float32"] == ["refused", "chosen"]
    assert found.chosen.runtime == "torch"
    assert close(found.denoiser(*images()), reference(model, *images()))


@needs_onnxruntime
@needs_openvino
@pytest.mark.parametrize("real", [ONNX, OPENVINO], ids=lambda r: r.name)
def test_wrong_weights_are_refused(real: Runtime, small_denoiser: Make) -> None:
    found = select(small_denoiser(0), SHAPE, OPTIONS, runtimes=[WrongWeights(real, small_denoiser(1)), EAGER])
    trial = found.trials[0] if real is ONNX else found.trials[1]
    assert (trial.state, trial.tolerance) == ("refused", 1e-4)
    assert "allowed is 0.0001" in trial.reason
    assert found.chosen.runtime == "torch"


BROKEN = ("openvino", "onnxruntime")
CHOOSE = """
from scanside.engine.config_priors import NetworkConfig
from scanside.engine.priors.denoiser import Denoiser
from scanside.engine.runtimes import Shape, select
model = Denoiser.of_size(NetworkConfig(channels=2, widths=(8, 8), blocks=1, shuffle=2)).eval()
chosen = select(model, Shape(1, 2, 16, 16))
print(chosen.chosen.runtime, [t.reason for t in chosen.trials if t.runtime == "openvino"])
"""


def test_a_package_that_is_installed_and_broken_costs_its_own_runtime(tmp_path: Path) -> None:
    for name in (*BROKEN, "onnx", "onnxscript"):
        (tmp_path / name).mkdir()
        fault = "raise ImportError('libfoo.so: cannot open shared object file')" if name in BROKEN else ""
        (tmp_path / name / "__init__.py").write_text(fault)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    words = [sys.executable, "-c", CHOOSE]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("torch ")
    assert "libfoo.so" in ended.stdout


def test_nothing_left_is_an_error_that_says_why(small_denoiser: Make) -> None:
    broken = Altered(EAGER, FAULTS["NaN"][0])
    with pytest.raises(
        RuntimeFailed, match=r"no runtime can run the network: .*altered float32: the output has values"
    ):
        select(small_denoiser(), SHAPE, OPTIONS, runtimes=[broken])


# --- the choice --------------------------------------------------------------------------------------------------------------


def slowed(denoise: LoadedDenoiser) -> LoadedDenoiser:
    def run(x: Tensor, sigma: Tensor) -> Tensor:
        time.sleep(0.05)
        return denoise(x, sigma)

    return run


@needs_onnxruntime
def test_the_fastest_on_the_processor_is_taken_and_remembered(small_denoiser: Make, tmp_path: Path) -> None:
    model, cache = small_denoiser(), ArtefactCache(tmp_path / "cache")
    runtimes = [Altered(ONNX, slowed, "slow"), ONNX, Altered(EAGER, slowed, "slow too")]
    told: list[str] = []
    first = select(model, SHAPE, OPTIONS, cache=cache, runtimes=runtimes, progress=told.append)
    assert first.chosen.runtime == "onnxruntime"
    assert told[:2] == ["slow float32", "onnxruntime float32"]
    times = {trial.runtime: trial.seconds for trial in first.trials if trial.state in ("passed", "chosen")}
    assert times["slow"] > times["onnxruntime"] > 0  # type: ignore[operator]
    again = select(model, SHAPE, OPTIONS, cache=cache, runtimes=runtimes)
    assert [(t.runtime, t.state) for t in again.trials[:2]] == [("onnxruntime", "chosen"), ("slow", "untried")]
    assert again.chosen.cached
    measured = select(model, SHAPE, OPTIONS, cache=cache, runtimes=runtimes, measure=True)
    assert "untried" not in {trial.state for trial in measured.trials}


def test_what_is_asked_for_is_taken_or_refused(small_denoiser: Make) -> None:
    asked = RuntimeConfig(runtime="torch", precision="float32", device="cpu")
    assert select(small_denoiser(), SHAPE, asked).chosen.runtime == "torch"
    with pytest.raises(ConfigError, match="no runtime called tensorrt runs on cpu in precision auto"):
        select(small_denoiser(), SHAPE, RuntimeConfig(runtime="tensorrt", device="cpu"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"runtime.device = 'cuda', but no CUDA device answers"):
            select(small_denoiser(), SHAPE, RuntimeConfig(runtime="tensorrt", device="cuda"))


# --- the cache of compiled networks ------------------------------------------------------------------------------------------


@needs_openvino
def test_a_damaged_blob_is_compiled_anew(small_denoiser: Make, tmp_path: Path) -> None:
    model, cache = small_denoiser(), ArtefactCache(tmp_path / "cache")
    load = LoadOptions(threads=1, cache=cache)
    OPENVINO.load(model, SHAPE, "float32", load)
    (blob,) = cache.folder.glob("openvino-*")
    whole = bytearray(blob.read_bytes())
    whole[len(whole) // 2] ^= 255
    blob.write_bytes(whole)
    with pytest.warns(CacheWarning, match="damaged"):
        denoise = OPENVINO.load(model, SHAPE, "float32", load)
    assert close(denoise(*images()), reference(model, *images()))
    assert OPENVINO.load(model, SHAPE, "float32", load)(*images()).isfinite().all()


def stored(cache: ArtefactCache, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Let the cache give `content`, with a digest that is right, the first time it is asked for a blob."""
    real, given = cache.get, []

    def get(kind: str, key: dict[str, str]) -> bytes | None:
        if kind != "openvino" or given:
            return real(kind, key)
        given.append(1)
        cache.put(kind, key, content)
        return real(kind, key)

    monkeypatch.setattr(cache, "get", get)


@needs_openvino
def test_a_blob_that_openvino_refuses_is_compiled_anew(
    small_denoiser: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = small_denoiser(), ArtefactCache(tmp_path / "cache")
    stored(cache, monkeypatch, b"of another build")
    denoise = OPENVINO.load(model, SHAPE, "float32", LoadOptions(threads=1, cache=cache))
    assert close(denoise(*images()), reference(model, *images()))


@needs_openvino
def test_a_blob_of_other_weights_fails_the_test_and_is_compiled_anew(
    small_denoiser: Make, content_of: Callable[[Path], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache, elsewhere = small_denoiser(0), ArtefactCache(tmp_path / "a"), ArtefactCache(tmp_path / "b")
    OPENVINO.load(small_denoiser(1), SHAPE, "float32", LoadOptions(threads=1, cache=elsewhere))
    (blob,) = elsewhere.folder.glob("openvino-*")
    stored(cache, monkeypatch, content_of(blob))
    options = RuntimeConfig(device="cpu", threads=1, precision="float32")  # as the blob; bfloat16 may be faster
    found = select(model, SHAPE, options, cache=cache, runtimes=[OPENVINO])
    assert (found.chosen.runtime, found.chosen.precision) == ("openvino", "float32")
    assert close(found.denoiser(*images()), reference(model, *images()))


# --- in the middle of a scan -------------------------------------------------------------------------------------------------


def selected(model: Denoiser, runtime: Runtime) -> GuardedDenoiser:
    """A runtime at work; torch is there to fall back on."""
    found = select(model, SHAPE, RuntimeConfig(device="cpu", threads=1, precision="float32"), runtimes=[runtime])
    assert found.denoiser.status.reason == ""
    return found.denoiser


@needs_onnxruntime
def test_onnxruntime_that_loses_its_input_is_replaced_by_torch(small_denoiser: Make) -> None:
    model = small_denoiser()
    denoiser = selected(model, ONNX)
    assert close(denoiser(*images(0)), reference(model, *images(0)))
    denoiser._denoise._binding.clear_binding_inputs()  # type: ignore[attr-defined]
    assert close(denoiser(*images(1)), reference(model, *images(1)))
    status = denoiser.status
    assert (status.runtime, status.reason, status.evaluations) == ("torch", "runtime", 2)
    assert "onnxruntime: ONNX Runtime failed" in status.detail
    assert status.attributes()["scanside_runtime_reason"] == ["runtime"]
    assert close(denoiser(*images(2)), reference(model, *images(2)))


@needs_openvino
def test_openvino_with_a_wrong_shape_is_replaced_by_torch(small_denoiser: Make) -> None:
    import openvino

    model = small_denoiser()
    denoiser = selected(model, OPENVINO)
    wrong = openvino.Tensor(torch.zeros(1, 2, 8, 8).numpy())
    request = denoiser._denoise._request  # type: ignore[attr-defined]

    class Infers:
        def infer(self) -> None:
            request.set_tensor("x", wrong)
            request.infer()

    denoiser._denoise._request = Infers()  # type: ignore[attr-defined]
    assert close(denoiser(*images()), reference(model, *images()))
    assert (denoiser.status.runtime, denoiser.status.reason) == ("torch", "runtime")


@pytest.mark.parametrize("fault", ["NaN", "shape", "raises"])
def test_a_fault_after_the_start_is_caught(fault: str, small_denoiser: Make) -> None:
    model = small_denoiser()
    denoiser = selected(model, Altered(EAGER, lambda d: d))
    denoiser._denoise = FAULTS[fault][0](denoiser._denoise)
    assert close(denoiser(*images()), reference(model, *images()))
    assert (denoiser.status.runtime, denoiser.status.reason) == ("torch", "runtime")


def test_when_nothing_is_left_the_device_is_lost(small_denoiser: Make) -> None:
    def broken() -> LoadedDenoiser:
        raise RuntimeFailed("no memory")

    eager = EAGER.load(small_denoiser(), SHAPE, "float32", LoadOptions(threads=1))
    status = RuntimeStatus(runtime="first", precision="float32", device="cpu")
    fallbacks = [Fallback("second", "float32", "cpu", broken)]
    denoiser = GuardedDenoiser(FAULTS["NaN"][0](eager), SHAPE, status, fallbacks)
    with pytest.raises(DeviceLost, match="no runtime is left that can run the network: no memory"):
        denoiser(*images())


def test_images_that_are_not_finite_are_not_the_runtimes_fault(small_denoiser: Make) -> None:
    denoiser = selected(small_denoiser(), Altered(EAGER, lambda d: d))
    x, sigma = images()
    x[0, 0, 3, 3] = torch.nan
    with pytest.raises(RuntimeFailed, match="images that the network was given are not finite"):
        denoiser(x, sigma)
    assert denoiser.status.reason == ""


def test_slow_evaluations_are_counted(small_denoiser: Make) -> None:
    denoiser = selected(small_denoiser(), EAGER)
    denoiser(*images())
    denoiser._denoise = slowed(denoiser._denoise)
    usual = denoiser.status.seconds or 1.0
    denoiser(*images())
    assert denoiser.status.slow == (10 * usual < 0.05)  # on a machine so busy that 50 ms are usual, they are not slow
    assert denoiser.status.reason == ""


class Clock:
    """Time that passes only where a runtime says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, seconds: list[float], denoise: LoadedDenoiser) -> LoadedDenoiser:
        """A real runtime whose evaluations take so long, one after the other; the last one's time stays."""

        def run(x: Tensor, sigma: Tensor) -> Tensor:
            self.now += seconds.pop(0) if len(seconds) > 1 else seconds[0]
            return denoise(x, sigma)

        return run


def timed(model: Denoiser, first: list[float], *others: list[float]) -> tuple[GuardedDenoiser, Clock]:
    """A runtime that took 10 ms at the start, with fallbacks; seconds of the evaluations of each."""
    clock, options = Clock(), LoadOptions(threads=1)
    chosen, *fallbacks = (clock.taking(s, EAGER.load(model, SHAPE, "float32", options)) for s in (first, *others))
    status = RuntimeStatus(runtime="first", precision="float32", device="cpu", seconds=0.01)
    following = [Fallback(f"other {i}", "float32", "cpu", lambda d=d: d) for i, d in enumerate(fallbacks)]  # type: ignore[misc]
    return GuardedDenoiser(chosen, SHAPE, status, following, clock), clock


def test_a_runtime_that_stays_slow_is_replaced_by_a_faster_one(small_denoiser: Make) -> None:
    model = small_denoiser()
    denoiser, _ = timed(model, [0.01, 0.2], [1.0, 0.05])  # the first evaluation of torch warms up
    for _ in range(PATIENCE):
        denoiser(*images())
        assert denoiser.status.runtime == "first"
    x, sigma = images()
    denoiser(x, sigma, out=x)  # in place: what is tried must not read its own outcome
    assert close(x, reference(model, *images()))
    status = denoiser.status
    assert (status.runtime, status.reason, status.slow, status.seconds) == (
        "other 0",
        "runtime",
        PATIENCE,
        pytest.approx(0.05),
    )
    assert status.detail == "first: took 0.2 s or longer, at the start 0.01 s"
    assert status.attributes()["scanside_runtime_reason"] == ["runtime"]
    assert close(denoiser(*images(1)), reference(model, *images(1)))
    assert denoiser.status.evaluations == PATIENCE + 2


def test_a_busy_machine_changes_nothing(small_denoiser: Make) -> None:
    """Everything is slow: the fallback is tried more and more seldom, and the runtime stays."""
    denoiser, clock = timed(small_denoiser(), [0.2], [0.3])
    tried = []
    for evaluation in range(1, 40):
        before = clock.now
        denoiser(*images())
        if clock.now - before > 0.5:
            tried.append(evaluation)
    assert tried == [PATIENCE, 3 * PATIENCE, 7 * PATIENCE]
    assert (denoiser.status.runtime, denoiser.status.reason, denoiser.status.slow) == ("first", "", 39)


def test_a_few_slow_evaluations_are_no_reason(small_denoiser: Make) -> None:
    denoiser, _ = timed(small_denoiser(), [*[*[0.2] * (PATIENCE - 1), 0.01] * 3, 0.01], [0.01])
    for _ in range(3 * PATIENCE):
        denoiser(*images())
    assert (denoiser.status.runtime, denoiser.status.slow) == ("first", 3 * (PATIENCE - 1))


def test_a_fallback_that_is_fast_and_wrong_is_not_taken(small_denoiser: Make) -> None:
    denoiser, _ = timed(small_denoiser(), [0.2], [0.01], [0.02])
    denoiser._fallbacks[0] = Fallback("wrong", "float32", "cpu", lambda: FAULTS["NaN"][0](denoiser._denoise))
    for _ in range(PATIENCE):
        denoiser(*images())
    assert denoiser.status.runtime == "first"
    for _ in range(2 * PATIENCE):
        denoiser(*images())
    assert denoiser.status.runtime == "other 1"


@needs_onnxruntime
def test_a_result_stays_when_the_buffer_is_used_again(small_denoiser: Make) -> None:
    model = small_denoiser()
    denoiser = selected(model, ONNX)
    kept = denoiser(*images(0))
    x, sigma = images(1)
    denoiser(x, sigma, out=x)  # in place
    assert close(kept, reference(model, *images(0)))
    assert close(x, reference(model, *images(1)))


def test_another_shape_is_the_callers_mistake(small_denoiser: Make) -> None:
    denoiser = selected(small_denoiser(), EAGER)
    with pytest.raises(
        ValueError, match=r"x \(1, 2, 8, 8\) and sigma \(1,\), but the network was loaded for 1 x 2 x 24"
    ):
        denoiser(torch.zeros(1, 2, 8, 8), torch.ones(1))
    with pytest.raises(ValueError, match=r"sigma \(\)"):
        denoiser(images()[0], torch.tensor(0.2))


@needs_onnxruntime
def test_threads_take_turns(small_denoiser: Make) -> None:
    model = small_denoiser()
    denoiser = selected(model, ONNX)
    found: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        for _ in range(20):
            found[seed] = denoiser(*images(seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(close(out, reference(model, *images(seed))) for seed, out in found.items())
    assert denoiser.status.evaluations == 80
