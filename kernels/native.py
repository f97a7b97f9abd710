"""The compiled kernels: finding the library, checking that it fits, and calling into it.

A kernel's module declares its C function once and calls what it gets like a Python function::

    _apply = native.Function("scs_coil_matrix", native.ADDRESS, native.ADDRESS, native.LENGTH)
    if native.available():
        _apply(x.data_ptr(), y.data_ptr(), x.numel())

Without a library `available` is False, torch does the work, and the log says so once. `SCANSIDE_KERNELS` chooses: `auto`,
`torch` (none of it), `base`, `avx2` or `avx512`.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from importlib import resources
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "ABI",
    "ADDRESS",
    "FLOAT",
    "INTEGER",
    "LENGTH",
    "LEVELS",
    "VARIABLE",
    "Function",
    "Library",
    "available",
    "library",
    "threads",
]

ABI = 7
"""Number of the interface that this package calls; the library has the same or is not used."""
LEVELS = ("base", "avx2", "avx512")
VARIABLE = "SCANSIDE_KERNELS"
ADDRESS, LENGTH, INTEGER, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
"""Types of arguments: of an array's memory, of sizes, of everything small, of real numbers."""

_log = logging.getLogger("scanside.kernels")


class Library:
    """A loaded library. level: its instruction set. lanes: floats per vector. parallel: whether it has OpenMP.

    Raises OSError for a file that is no library, ImportError for one of another interface.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = ctypes.CDLL(str(path))
        found = self.handle.scs_abi() if hasattr(self.handle, "scs_abi") else None
        if found != ABI:
            raise ImportError(f"{path.name} has interface {found}, needed is {ABI}; install scanside again")
        self.handle.scs_level.restype = ctypes.c_char_p
        self.level: str = self.handle.scs_level().decode()
        self.lanes: int = self.handle.scs_lanes()
        self.parallel = bool(self.handle.scs_parallel())
        self.best: str = LEVELS[self.handle.scs_best_level()]

    def count(self, name: str, *sizes: int) -> int:
        """What a function answers that takes sizes and gives a number of floats."""
        function = getattr(self.handle, name)
        function.argtypes, function.restype = [LENGTH] * len(sizes), LENGTH
        return int(function(*sizes))


class Function:
    """A C function by its name and the types of its arguments; looked up at the first call, and again in another library."""

    def __init__(self, name: str, *arguments: Any) -> None:  # noqa: ANN401 - ctypes has no common type of them
        self._name, self._arguments = name, arguments
        self._owner: Library | None = None
        self._call: Any = None

    def __call__(self, *arguments: float) -> None:
        """Raises ValueError for arguments that the function refuses, MemoryError where it got no memory."""
        found = library()
        if self._call is None or found is not self._owner:  # data packed for one library must not reach another
            self._bind(found)
        self._call(*arguments)

    def _bind(self, found: Library | None) -> None:
        if found is None:
            raise RuntimeError(f"{self._name} was called without a native library; ask `available` first")
        function = getattr(found.handle, self._name)
        function.argtypes, function.restype, function.errcheck = self._arguments, ctypes.c_int, _raise
        self._owner, self._call = found, function


def available() -> bool:
    """Whether compiled kernels are there and wanted."""
    return library() is not None


@functools.cache
def library() -> Library | None:
    """The best library that this machine runs, None without one. Raises ValueError for an unknown SCANSIDE_KERNELS."""
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in ("auto", "torch", *LEVELS):
        raise ValueError(f"{VARIABLE} is {wanted!r}, allowed are auto, torch, {', '.join(LEVELS)}")
    if wanted == "torch":
        return None
    try:
        base = Library(_path("base"))
        return _choose(base, wanted)
    except (OSError, ImportError) as error:
        if wanted != "auto":
            raise
        _log.warning("no compiled kernels, torch does their work more slowly: %s", error)
        return None


def threads() -> int:
    """How many threads a kernel may use: as many as torch, and one in a library without OpenMP."""
    found = library()
    return torch.get_num_threads() if found is None or found.parallel else 1


def _choose(base: Library, wanted: str) -> Library:
    """The wanted library, or with `auto` the best that is there. An unknown instruction would end the process."""
    if wanted != "auto" and LEVELS.index(wanted) > LEVELS.index(base.best):
        raise ImportError(f"{VARIABLE} is {wanted}, but this processor runs no more than {base.best}")
    for level in reversed(LEVELS[1 : LEVELS.index(base.best) + 1]):
        if wanted in ("auto", level) and (wanted == level or _path(level).exists()):
            return Library(_path(level))
    return base


def _path(level: str) -> Path:
    """Beside this file as the import system sees it, so that editable installs work."""
    return Path(str(resources.files(__package__).joinpath(f"_native_{level}.so")))


def _raise(status: int, function: Any, arguments: Any) -> None:  # noqa: ANN401 - as ctypes calls it
    if status == 0:
        return
    name = function.__name__
    if status == 2:
        raise MemoryError(f"{name}: no memory for its working arrays")
    raise ValueError(f"{name} refuses its arguments {arguments} (status {status})")
