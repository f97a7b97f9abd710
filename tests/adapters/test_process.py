"""Settings of a process: what they do, seen from outside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from scanside.adapters.process import ENVIRONMENT, require_environment

FAULTS = """
import resource, sys
import numpy as np
from scanside.adapters.process import tune_process
if sys.argv[1] == "tuned":
    assert tune_process()
for _ in range(3):
    np.ones(4 << 20).sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(4 << 20).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
AGAIN = """
import os, sys
from scanside.adapters.process import require_environment
require_environment("again", sys.argv[1:])
print(*(f"{name}={os.environ[name]}" for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")), sys.argv[1:])
"""


def script(*words: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=60, env=inherited | environment, check=True
    )
    return done.stdout.strip()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_a_tuned_process_does_not_map_its_arrays_anew() -> None:
    """32 MiB are 8192 pages, or 16 when the kernel gives 2 MiB at a time: untuned, each array takes them again."""
    plain, tuned = (int(script("-c", FAULTS, kind)) for kind in ("plain", "tuned"))
    assert plain >= 100
    assert tuned <= plain / 10


def test_a_process_that_lacks_settings_starts_again_with_them(tmp_path: Path) -> None:
    (tmp_path / "again.py").write_text(AGAIN)
    place = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    said = script("-m", "again", "--flag", "value", PYTHONPATH=place, GOMP_SPINCOUNT="7")
    assert said == "OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=7 KMP_BLOCKTIME=0 ['--flag', 'value']"


def test_a_process_that_has_them_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        pytest.fail("started again")

    monkeypatch.setattr(os, "execve", never)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    require_environment("again", [])
    assert all(os.environ[name] == value for name, value in ENVIRONMENT.items())
