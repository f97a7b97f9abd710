"""Loops that several threads share: nothing runs twice or late, results are the same for any number of threads, forks survive."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from scanside.kernels import device, native
from scanside.kernels import photoacoustic as sound

HERE = Path(__file__).resolve().parent
ELEMENTS, SAMPLES = 70, 300


@pytest.mark.parametrize("sanitize", [False, True])
def test_every_chunk_runs_once_and_none_waits_for_a_helper_that_is_held_up(tmp_path: Path, sanitize: bool) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    program, folder = tmp_path / "stress", device.sources() / "cpu"
    flags = ["-std=c++20", "-O1", "-pthread", f"-I{folder}", *(["-fsanitize=thread"] if sanitize else [])]
    sources = [HERE / "sharing_stress.cpp", folder / "sharing.cpp"]
    subprocess.run(["g++", *flags, *map(str, sources), "-o", str(program)], check=True, timeout=100)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[:4000])


def shots(threads: int) -> list[torch.Tensor]:
    """What the kernels make of a shot, with and without a band-pass, and the adjoint."""
    rng = np.random.default_rng(4)
    table = np.zeros((ELEMENTS, sound.COLUMNS))
    table[:, :3], table[:, 4], table[:, 6] = rng.uniform(-90, 90, (ELEMENTS, 3)), 1, rng.uniform(0.5, 2, ELEMENTS)
    axis, plane = torch.linspace(-60, 60, 150, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    compact = sound.Table.of(torch.from_numpy(table), axis, axis, plane)
    signals = torch.from_numpy(rng.integers(-3000, 3000, (ELEMENTS, SAMPLES)).astype(np.int16))
    found = []
    for response in (None, torch.linspace(0, 1, 163)):
        rows, image = sound.prepared(ELEMENTS, SAMPLES), torch.empty(1, 150, 150)
        length = 0 if response is None else 324
        sound.prepare(signals, compact, rows, derivative=True, response=response, length=length, threads=threads)
        sound.gather_into(rows, compact, image, delay=2.5, weighting=sound.PLANE, threads=threads)
        found += [rows, image]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found.append(sound.scatter(found[1], torch.from_numpy(table), axis, axis, plane, SAMPLES, 2.5))
    torch.set_num_threads(before)
    return found


@pytest.fixture
def built() -> None:
    if not native.available():
        pytest.skip("no compiled kernels in this installation")


@pytest.mark.usefixtures("built")
def test_results_do_not_depend_on_the_number_of_threads_or_on_who_else_computes() -> None:
    expected, others = shots(1), [threading.Thread(target=shots, args=(3,)) for _ in range(3)]
    for other in others:
        other.start()
    for threads in (2, 3, 5, 4):
        for found, wanted in zip(shots(threads), expected, strict=True):
            assert torch.equal(found, wanted)
    for other in others:
        other.join()


def in_a_process_of_its_own(text: str) -> str:
    """What a program prints that has `shots`; fails when it ends otherwise than with 0."""
    head = f"import os, sys\nsys.path.insert(0, {str(HERE)!r})\nfrom test_sharing import *\n"
    done = subprocess.run([sys.executable, "-c", head + text], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return done.stdout


FORK = """
expected = shots(3)
child = os.fork()
same = all(torch.equal(a, b) for a, b in zip(shots(3), expected))
if not child:
    os._exit(0 if same else 1)
print(same, os.waitpid(child, 0)[1])
"""


@pytest.mark.usefixtures("built")
def test_a_child_process_has_helpers_of_its_own() -> None:
    assert in_a_process_of_its_own(FORK).split() == ["True", "0"]


COUNT = """
torch.set_num_threads(1)
shots(1)
tasks = lambda: len(os.listdir("/proc/self/task"))
before = tasks()
for threads in (2, 3, 3, 2, 3):
    rows = sound.prepared(64, 50)
    table = sound.Table.of(torch.ones(64, 7), *[torch.zeros(1)] * 3)
    sound.prepare(torch.ones(64, 50), table, rows, threads=threads)
    print(tasks() - before)
"""


@pytest.mark.usefixtures("built")
def test_no_more_threads_are_started_than_were_asked_for() -> None:
    if not Path("/proc/self/task").is_dir():
        pytest.skip("no /proc")
    assert in_a_process_of_its_own(COUNT).split() == ["1", "2", "2", "2", "2"]
