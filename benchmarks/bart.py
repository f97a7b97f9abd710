"""BART as a peer: arrays in, commands, arrays out."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bart", "wavelet_shifts"]

RAND_MAX = 2**31 - 1


class Bart:
    """The program, run in a folder of its own. Raises SystemExit where it is not installed."""

    def __init__(self, folder: Path, threads: int) -> None:
        if shutil.which("bart") is None:
            raise SystemExit("the program bart is not installed; apt-get install bart")
        self._folder = folder
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def __call__(self, command: str) -> float:
        """Run a command; returns seconds."""
        start = time.perf_counter()
        subprocess.run(
            ["bart", *command.split()], cwd=self._folder, env=self._environment, check=True, capture_output=True
        )
        return time.perf_counter() - start

    def write(self, name: str, array: NDArray[np.generic]) -> None:
        """Write an array with the axes (coil, z, y, x)."""
        dims = [*array.shape[::-1], *[1] * (16 - array.ndim)]
        (self._folder / f"{name}.hdr").write_text("# Dimensions\n" + " ".join(map(str, dims)) + "\n")
        np.ascontiguousarray(array, np.complex64).tofile(self._folder / f"{name}.cfl")

    def read(self, name: str) -> NDArray[np.complex64]:
        """Read an array as (coil, z, y, x)."""
        words = (self._folder / f"{name}.hdr").read_text().split("\n")[1].split()
        dims = [int(word) for word in words]
        return np.fromfile(self._folder / f"{name}.cfl", np.complex64).reshape(dims[::-1]).reshape(dims[3::-1])


def wavelet_shifts(levels: int) -> Iterator[tuple[int, int]]:
    """The turns (y, x), pixels, by which `bart pics` moves a two-dimensional image before each threshold but the first.

    levels: scales of its wavelets, five for 256 pixels. They come from the C library's `rand_r` at state 1, x first, each from
    0 to twice the period. The first threshold is left out since it meets an image of zeros.
    """
    library, state, most = ctypes.CDLL(None), ctypes.c_uint(1), 2 << levels

    def drawn() -> int:
        while True:
            number = int(library.rand_r(ctypes.byref(state))) // (RAND_MAX // (most + 1))
            if number <= most:
                return number

    def pairs() -> Iterator[tuple[int, int]]:
        while True:
            x, y = drawn(), drawn()
            yield y, x

    return itertools.islice(pairs(), 1, None)
