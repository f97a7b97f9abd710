"""Shared fixtures: the scanner data, seeds, and a check that no test leaves a thread, socket or process behind."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import structlog
import torch
from hypothesis import settings

settings.register_profile("scanside", deadline=None)  # a busy machine is not a defect
settings.load_profile("scanside")
torch.set_num_threads(1)  # the arrays of the tests are too small for more

REPOSITORY = Path(__file__).resolve().parent.parent


def _sockets() -> set[str]:
    links = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:  # the descriptor of the listing itself is gone by now
            continue
        if target.startswith("socket:"):
            links.add(target)
    return links


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves a socket or a non-daemon thread behind."""
    threads, sockets = set(threading.enumerate()), _sockets()
    yield
    deadline = time.monotonic() + 5
    while True:
        left = {t for t in set(threading.enumerate()) - threads if t.is_alive() and not t.daemon}
        opened = _sockets() - sockets
        if not left and not opened:
            return
        gc.collect()  # only now: with all of torch loaded it takes longer than most tests
        if time.monotonic() > deadline:
            pytest.fail(f"left behind: threads {sorted(t.name for t in left)}, sockets {sorted(opened)}")
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def plain_logging() -> Iterator[None]:
    """Undo what a test's command did to logging: its stream ends with the test."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers, the same in every run."""
    return np.random.default_rng(20260901)


def data_folder() -> Path:
    """Where the scanner data lies."""
    return Path(os.environ.get("SCANSIDE_DATA", REPOSITORY.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def real_data() -> Iterator[object]:
    """A function from a relative path to an existing file of scanner data; skips the test where it is absent."""

    def find(name: str) -> Path:
        path = data_folder() / name
        if not path.exists():
            pytest.skip(f"scanner data {name} is not in {data_folder()}; set SCANSIDE_DATA")
        return path

    yield find
