"""CUDA kernels: compiled by NVRTC for the device at hand, kept on disk, launched on torch's current stream.

A kernel's module describes each launch (`Launch`) from the arguments of the operation; `launch` runs it. The description
needs no device, so tests run the same launches on a processor. Needs the extra: pip install 'scanside[cuda]'.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from dataclasses import dataclass
from importlib import resources, util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .files import write_whole

__all__ = ["Launch", "cache_folder", "compile_cubin", "installed", "launch", "nvrtc_version", "sources"]

_log = logging.getLogger("scanside.kernels")

Argument = Tensor | int | float
SOURCES = ("include", "cuda")
STATIC_SHARED = 48 << 10
"""Bytes of shared memory that a block may have without asking for more."""


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel launch. source: file in kernels/cuda. macros: -D definitions that make the kernel for these sizes.

    grid, block: blocks and threads along x, y, z. arguments: tensors go as their address, whole numbers as 64 bits,
    others as float. shared: bytes of dynamic shared memory.
    """

    source: str
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    arguments: tuple[Argument, ...]
    macros: tuple[tuple[str, int], ...] = ()
    shared: int = 0


@functools.cache
def installed() -> bool:
    """Whether the packages of the extra [cuda] are there and NVRTC loads; says nothing about a device."""
    if util.find_spec("cuda") is None or util.find_spec("cuda.core") is None:
        return False
    try:
        return bool(_nvrtc_version())
    except (ImportError, OSError, RuntimeError) as error:  # the bindings without the library
        _log.warning("NVRTC does not load, so there are no CUDA kernels: %s", error)
        return False


def launch(*launches: Launch) -> None:
    """Run kernels one after the other on torch's current stream; waits for nothing, so a CUDA graph can capture it.

    Raises RuntimeError, naming the extra, where its packages are missing.
    """
    from cuda.core import LaunchConfig
    from cuda.core import launch as start

    device = torch.cuda.current_device()
    stream = _Stream(torch.cuda.current_stream(device).cuda_stream)
    for item in launches:
        config = LaunchConfig(grid=item.grid, block=item.block, shmem_size=item.shared)
        start(stream, config, _kernel(item, device), *(_passed(argument) for argument in item.arguments))


def compile_cubin(source: str, arch: str, macros: tuple[tuple[str, int], ...] = ()) -> bytes:
    """Machine code of a source in kernels/cuda for `arch`, such as "sm_90"; from the disk where it was compiled before.

    Raises RuntimeError with NVRTC's log if the source does not compile, or where NVRTC is not installed.
    """
    _require()
    kept = cache_folder() / f"{_fingerprint(source, arch, macros)}.cubin"
    try:
        return kept.read_bytes()
    except FileNotFoundError:
        code = _compiled(source, arch, macros)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, code)
        return code


def cache_folder() -> Path:
    """Where compiled kernels are kept: below $XDG_CACHE_HOME, or ~/.cache."""
    from platformdirs import user_cache_path

    return user_cache_path("scanside") / "cubin"


def nvrtc_version() -> str:
    """Version of NVRTC, such as "13.0". Raises RuntimeError where it is not installed."""
    _require()
    return _nvrtc_version()


def _nvrtc_version() -> str:
    from cuda.bindings import nvrtc

    status, major, minor = nvrtc.nvrtcVersion()
    if int(status) != 0:
        raise RuntimeError(f"NVRTC does not say its version: {status}")
    return f"{major}.{minor}"


@functools.cache
def sources() -> Path:
    """The folder that holds include/ and cuda/."""
    return Path(str(resources.files(__package__)))


class _Stream:
    """Torch's stream as cuda.core takes it."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


def _require() -> None:
    if not installed():
        raise RuntimeError("NVRTC is not installed, it compiles the CUDA kernels: pip install 'scanside[cuda]'")


def _passed(argument: Argument) -> Any:  # noqa: ANN401 - what cuda.core takes
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return argument if isinstance(argument, int) else np.float32(argument)


def _kernel(item: Launch, device: int) -> Any:  # noqa: ANN401 - cuda.core's kernel
    kernel = _loaded(item.source, item.kernel, item.macros, device)
    if item.shared > STATIC_SHARED:
        kernel.attributes.max_dynamic_shared_size_bytes = item.shared
    return kernel


@functools.cache
def _loaded(source: str, name: str, macros: tuple[tuple[str, int], ...], device: int) -> Any:  # noqa: ANN401
    from cuda.core import Device, ObjectCode

    Device(device).set_current()
    major, minor = torch.cuda.get_device_capability(device)
    return ObjectCode.from_cubin(compile_cubin(source, f"sm_{major}{minor}", macros)).get_kernel(name)


def _compiled(source: str, arch: str, macros: tuple[tuple[str, int], ...]) -> bytes:
    from cuda.core import Program, ProgramOptions

    folders = [str(sources() / folder) for folder in SOURCES]
    defined = [(name, str(value)) for name, value in macros]
    options = ProgramOptions(
        name=source, arch=arch, std="c++17", include_path=folders, define_macro=defined or None, no_source_include=True
    )
    program = Program((sources() / "cuda" / source).read_text("utf-8"), "c++", options)
    return bytes(program.compile("cubin").code)


def _fingerprint(source: str, arch: str, macros: tuple[tuple[str, int], ...]) -> str:
    """Of everything that the machine code depends on; headers count whether or not this source includes them."""
    digest = hashlib.sha256(repr((source, arch, macros, nvrtc_version())).encode())
    headers = (path for folder in SOURCES for path in (sources() / folder).glob("*.h"))
    for path in (sources() / "cuda" / source, *sorted(headers)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
