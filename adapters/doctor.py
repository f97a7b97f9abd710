"""`scanside doctor`: what this machine has, which fast paths are active, and the remedy for each that is not."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Literal

import msgspec
from rich.markup import escape
from scanside.engine.errors import ScansideError

from .commands.output import console, milliseconds, table
from .process import ENVIRONMENT, MALLOC, SWITCH_SECONDS

if TYPE_CHECKING:  # the doctor starts on a machine whose torch is broken, too
    from scanside.engine.runtimes import Runtime, Trial

__all__ = ["Finding", "examine", "report"]

State = Literal["ok", "note", "broken"]

_MARKS: dict[State, str] = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "broken": "[bold red]BROKEN[/]"}
_PYTHON = (3, 11)
_PORTS = ((9002, "scanners", "-p"), (9091, "metrics", "--metrics-port"))
_MINIMUM_BYTES = 4 << 30


class Finding(msgspec.Struct, frozen=True):
    """One row: `broken` keeps scanside from working, `note` is worth knowing; remedy says what to do about it."""

    what: str
    state: State
    value: str
    remedy: str = ""


def report() -> int:
    """Print the table; returns the exit code, 1 when something that is needed is broken."""
    rows, broken, out = table("", "", "found", "what to do"), 0, console()
    for finding in examine():
        rows.add_row(finding.what, _MARKS[finding.state], escape(finding.value), escape(finding.remedy))
        broken += finding.state == "broken"
    out.print(rows)
    if broken:
        console(stderr=True).print(f"scanside doctor: {broken} of the things that scanside needs are broken")
    return 1 if broken else 0


def examine() -> Iterator[Finding]:
    """All findings, in the order in which they are printed."""
    packages = list(_packages())
    yield from packages
    if all(finding.state != "broken" for finding in packages):  # the rest needs them
        yield from _processor()
        yield from _accelerators()
        yield from _runtimes()
        yield _engine()
        yield from _settings()
    yield from _ports()
    yield from _peers()


def _packages() -> Iterator[Finding]:
    found = sys.version_info[:2]
    state: State = "ok" if found >= _PYTHON else "broken"
    yield Finding("python", state, platform.python_version(), "" if state == "ok" else "install Python 3.11 or later")
    # Imported and not only looked up: a package whose compiled part does not fit the machine is as good as none.
    required: dict[str, Callable[[], object]] = {
        "torch": lambda: import_module("torch"),
        "numpy": lambda: import_module("numpy"),
        "ismrmrd": lambda: import_module("ismrmrd"),
        "h5py": lambda: import_module("h5py"),
        "pyzmq": lambda: import_module("zmq"),
        "msgpack": lambda: import_module("msgpack"),
        "msgspec": lambda: import_module("msgspec"),
        "finufft": lambda: import_module("finufft"),
        "PyWavelets": lambda: import_module("pywt"),
        "safetensors": lambda: import_module("safetensors.torch"),
        "crc32c": lambda: import_module("crc32c"),
        "scipy": lambda: import_module("scipy.ndimage"),
        "pillow": lambda: import_module("PIL.Image"),
        "scikit-image": lambda: import_module("skimage.metrics"),
        "matplotlib": lambda: import_module("matplotlib.figure"),
        "prometheus-client": lambda: import_module("prometheus_client"),
        "defusedxml": lambda: import_module("defusedxml.ElementTree"),
        "platformdirs": lambda: import_module("platformdirs"),
        "structlog": lambda: import_module("structlog"),
        "typer": lambda: import_module("typer"),
        "rich": lambda: import_module("rich"),
    }
    for name, load in required.items():
        yield _package(name, load)


def _package(name: str, load: Callable[[], object]) -> Finding:
    try:
        load()
        return Finding(name, "ok", metadata.version(name))
    except (ImportError, OSError, metadata.PackageNotFoundError) as error:
        return Finding(name, "broken", str(error), f"pip install --force-reinstall {name}")


def _processor() -> Iterator[Finding]:
    import torch

    usable, instructions = len(os.sched_getaffinity(0)), torch.backends.cpu.get_cpu_capability()
    few = usable < 2  # one for the sockets, one for the engine
    yield Finding(
        "processor",
        "note" if few else "ok",
        f"{usable} of {os.cpu_count()} cores usable, {torch.get_num_threads()} threads, {instructions}",
        "give the process 2 cores or more: one reads sockets while the other reconstructs" if few else "",
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    little = memory < _MINIMUM_BYTES
    yield Finding(
        "memory",
        "note" if little else "ok",
        f"{memory / 2**30:.1f} GiB",
        "4 GiB or more are advisable" if little else "",
    )
    mkl = bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]
    yield Finding(
        "FFT",
        "ok" if mkl else "note",
        "MKL through torch" if mkl else "pocketfft through torch",
        "" if mkl else "MKL is about twice as fast on x86: install torch from the default index",
    )
    yield _kernels()


def _kernels() -> Finding:
    from scanside.kernels import native

    remedy = "install a C++ compiler (apt install g++), then install scanside again"
    try:
        library = native.library()
    except (ImportError, OSError, ValueError) as error:
        return Finding("compiled kernels", "broken", str(error), f"unset {native.VARIABLE}")
    if library is None and os.environ.get(native.VARIABLE) == "torch":
        return Finding("compiled kernels", "note", f"off, {native.VARIABLE} is torch", f"unset {native.VARIABLE}")
    if library is None:
        return Finding("compiled kernels", "note", "none in this installation; torch does their work", remedy)
    threads = f"{native.threads()} threads" if library.parallel else "1 thread, built without OpenMP"
    return Finding(
        "compiled kernels", "ok", f"{library.level}, {library.lanes} lanes, interface {native.ABI}, {threads}"
    )


def _device_kernels() -> Finding:
    from scanside.kernels import device

    if not device.installed():
        return _optional("CUDA kernels", "cuda", there=False)
    kept = len(list(device.cache_folder().glob("*.cubin")))
    return Finding("CUDA kernels", "ok", f"NVRTC {device.nvrtc_version()}, {kept} compiled in {device.cache_folder()}")


def _accelerators() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        names = ", ".join(torch.cuda.get_device_name(device) for device in devices)
        yield Finding("CUDA", "ok", f"{names}, CUDA {torch.version.cuda}")
    elif torch.version.cuda is None:
        yield Finding("CUDA", "note", f"torch {torch.__version__} was built without it", _without_cuda())
    else:
        yield Finding(
            "CUDA", "note", f"torch has CUDA {torch.version.cuda}, but no device answers", "check `nvidia-smi`"
        )
    yield _device_kernels()


def _without_cuda() -> str:
    if shutil.which("nvidia-smi") is None:
        return "nothing to do without an NVIDIA device"
    return "install a torch with CUDA, see https://pytorch.org/get-started/locally"


def _optional(title: str, extra: str, there: bool) -> Finding:  # noqa: FBT001 - found or not
    if there:
        return Finding(title, "ok", metadata.version(extra))
    return Finding(title, "note", "not installed; torch does their work", f"optional: pip install 'scanside[{extra}]'")


def _runtimes(runtimes: Sequence[Runtime] | None = None) -> Iterator[Finding]:
    """Each way to run a network, tried with a small one: whether it is right here, how fast, and which is used."""
    from scanside.engine.config_priors import NetworkConfig
    from scanside.engine.priors.denoiser import Denoiser
    from scanside.engine.runtimes import RUNTIMES, Shape, select

    known = RUNTIMES if runtimes is None else runtimes
    network = Denoiser.of_size(NetworkConfig(widths=(16, 32), blocks=1))
    for weight in network.parameters():  # a new network gives zeros, as a broken runtime does
        weight.data.normal_(std=0.1)
    try:
        trials = select(network, Shape(1, 2, 64, 64), runtimes=known, measure=True).trials
    except ScansideError as error:
        yield Finding("runtimes", "broken", str(error), "pip install --force-reinstall torch")
        return
    for runtime in known:
        yield _runtime(runtime, [trial for trial in trials if trial.runtime == runtime.name])


def _runtime(runtime: Runtime, trials: Sequence[Trial]) -> Finding:
    """One row: what works in which precision, or why nothing does."""
    title = f"runtime {runtime.name}"
    works = [trial for trial in trials if trial.seconds is not None]
    if works:
        said = [f"{t.precision} {milliseconds(t.seconds or 0)}{', used' * (t.state == 'chosen')}" for t in works]
        return Finding(title, "ok", f"{works[0].version}: {'; '.join(said)}, for a small network")
    refused = [trial for trial in trials if trial.state == "refused"]
    if refused:
        return Finding(title, "note", f"refused: {refused[0].reason}", "update or remove it; another one is used")
    device: Literal["cpu", "cuda"] = "cpu" if runtime.precisions("cpu") else "cuda"
    found = runtime.available(device, "float32")
    if found.ok:
        return Finding(title, "ok", f"{found.version}: not tried, it takes a minute; ask for it by name")
    return Finding(title, "note", found.reason, found.remedy)


def _engine() -> Finding:
    """Reconstruct a small simulated scan, as a server would."""
    from scanside.engine.config import ConfigStore
    from scanside.engine.messages import FrameStats, Message
    from scanside.engine.simulation.scan import simulate_scan
    from scanside.engine.streaming.session import Session

    remedy = "report this with `scanside --debug run`"
    try:
        scan, session = simulate_scan(32, 4, 2, 12), Session(ConfigStore().get("default"))
        messages: list[Message] = [scan.header, *scan.batches]
        events = [event for message in messages for event in session.feed(message)]
    except (ScansideError, RuntimeError, ValueError) as error:
        return Finding("reconstruction", "broken", f"{type(error).__name__}: {error}", remedy)
    frames = [event for event in events if isinstance(event, FrameStats)]
    if [frame.outcome for frame in frames] == ["complete"]:
        return Finding("reconstruction", "ok", "a simulated scan gave its image")
    said = ", ".join(f"{frame.outcome} {frame.reason}" for frame in frames) or "no frame"
    return Finding("reconstruction", "broken", f"a simulated scan gave: {said}", remedy)


def _settings() -> Iterator[Finding]:
    """The engine's processes get the settings from `scanside serve`, unless the environment has others."""
    for name, wanted in ENVIRONMENT.items():
        own = os.environ.get(name)
        if own is None:
            yield Finding(name, "ok", f"{wanted}, set by `scanside serve` for its engine")
        elif own == wanted:
            yield Finding(name, "ok", f"{own}, from your environment")
        else:
            yield Finding(
                name, "note", f"{own}, from your environment", f"unset it; `scanside serve` would set {wanted}"
            )
    if platform.libc_ver()[0] == "glibc":
        told = ", ".join(f"{name} {value}" for name, (_, value) in MALLOC.items())
        yield Finding("malloc", "ok", f"glibc's, told by every process of ours to keep its memory: {told}")
    else:
        yield Finding("malloc", "note", "not glibc's, cannot be told to keep its memory", "use a glibc distribution")
    switch = f"{1e6 * SWITCH_SECONDS:g} µs between threads"
    yield Finding("collector", "ok", f"the engine freezes what it has loaded; {switch}")


def _ports() -> Iterator[Finding]:
    for port, use, option in _PORTS:
        if _free(port):
            yield Finding(f"port {port}", "ok", f"free, for {use}")
        else:
            remedy = f"stop what listens there, or `scanside serve {option} 0` for any free one"
            yield Finding(f"port {port}", "note", f"taken, wanted for {use}", remedy)


def _free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _peers() -> Iterator[Finding]:
    for program, use in (("bart", "to compare with"), ("gadgetron", "to chain with"), ("gadgetron_ismrmrd_client", "")):
        path = shutil.which(program)
        yield Finding(
            program, "ok" if path else "note", path or "not found", f"optional, {use}" if use and not path else ""
        )
