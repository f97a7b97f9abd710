"""Runs launches of CUDA kernels on the processor: compiles the real source with `cuda_emulation.h` and feeds it tensors."""

from __future__ import annotations

import functools
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from scanside.kernels import device, native
from scanside.kernels.device import Launch

HERE = Path(__file__).resolve().parent
SANITIZER = "ThreadSanitizer"


def needs(*programs: str) -> None:
    """Skip, naming the first program that is not installed."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


@pytest.fixture(scope="session")
def emulate() -> Callable[..., bool]:
    """A function that runs launches one after the other; tensors among their arguments, all contiguous, change in place.

    instead: texts to use in the place of the source files of these names. sanitize: run under ThreadSanitizer. Returns
    whether that saw two threads at the same memory without a barrier between them; tensors are not changed then.
    """
    needs("g++")

    def run(*launches: Launch, instead: dict[str, str] | None = None, sanitize: bool = False) -> bool:
        others = tuple(sorted((instead or {}).items()))
        return any(_raced(_program(item.source, item.kernel, item.macros, others, sanitize), item) for item in launches)

    return run


@pytest.fixture(params=["auto", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each test twice: with the compiled kernels and with torch in their place."""
    monkeypatch.setenv(native.VARIABLE, request.param)
    native.library.cache_clear()
    if request.param == "auto" and not native.available():
        pytest.skip("no compiled kernels in this installation")
    yield request.param
    monkeypatch.undo()
    native.library.cache_clear()


@pytest.fixture(params=native.LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each test with every library that this machine runs."""
    monkeypatch.setenv(native.VARIABLE, request.param)
    native.library.cache_clear()
    try:
        native.library()
    except (OSError, ImportError) as error:
        pytest.skip(str(error))
    yield request.param
    monkeypatch.undo()
    native.library.cache_clear()


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="scanside-emulation-")  # removed when the process ends


@functools.cache
def _program(
    source: str, kernel: str, macros: tuple[tuple[str, int], ...], instead: tuple[tuple[str, str], ...], sanitize: bool
) -> Path:
    folder = Path(tempfile.mkdtemp(dir=_folder().name))
    for path in (HERE / "cuda_emulation.h", *(p for f in device.SOURCES for p in (device.sources() / f).iterdir())):
        shutil.copy(path, folder)
    for name, text in instead:
        (folder / name).write_text(text)
    main = f"int main(int, char** words) {{ return emulation::main({kernel}, words[1], words[2]); }}\n"
    (folder / "main.cpp").write_text(f'#include "cuda_emulation.h"\n#include "{source}"\n{main}')
    flags = ["-std=c++20", "-O1", "-g0", "-pthread", "-w", *(["-fsanitize=thread"] if sanitize else [])]
    defined = [f"-D{name}={value}" for name, value in macros]
    command = ["g++", *flags, *defined, "main.cpp", "-o", "main"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return folder / "main"


def _raced(program: Path, item: Launch) -> bool:
    before, after = program.parent / "before", program.parent / "after"
    payloads = [_bytes(argument) for argument in item.arguments]
    head = struct.pack("<8q", *item.grid, *item.block, item.shared, len(payloads))
    before.write_bytes(head + b"".join(struct.pack("<q", len(payload)) + payload for payload in payloads))
    words = [str(program), str(before), str(after)]
    options = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=110, env=options)
    if SANITIZER in done.stderr and done.returncode == 66:
        return True
    assert done.returncode == 0, (done.returncode, done.stderr)
    data = after.read_bytes()
    for argument, payload in zip(item.arguments, payloads, strict=True):
        part, data = data[: len(payload)], data[len(payload) :]
        if isinstance(argument, torch.Tensor) and part:
            new = torch.frombuffer(bytearray(part), dtype=argument.dtype)
            argument.copy_(new.reshape(argument.shape))
    return False


def _bytes(argument: torch.Tensor | int | float) -> bytes:
    if isinstance(argument, torch.Tensor):
        assert argument.is_contiguous()
        return argument.numpy().tobytes()
    return struct.pack("<q", argument) if isinstance(argument, int) else struct.pack("<f", argument)
