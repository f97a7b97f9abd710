"""The doctor on this machine, and on one where something is broken."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
from scanside.adapters import doctor
from scanside.adapters.cli import app
from scanside.adapters.doctor import Finding, examine
from scanside.adapters.process import ENVIRONMENT
from scanside.engine.runtimes import RUNTIMES
from scanside.engine.runtimes.base import LoadedDenoiser
from scanside.engine.runtimes.torch_runtimes import TorchEager
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    return {finding.what: finding for finding in examine()}


def test_nothing_that_is_needed_is_broken_here(findings: dict[str, Finding]) -> None:
    assert [finding for finding in findings.values() if finding.state == "broken"] == []
    assert findings["torch"].value == torch.__version__
    assert "image" in findings["reconstruction"].value


def test_every_dependency_is_examined(findings: dict[str, Finding]) -> None:
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = {re.split(r"[^A-Za-z0-9-]", line)[0] for line in project["dependencies"]}
    assert wanted - set(findings) == set()


def test_every_topic_is_there(findings: dict[str, Finding]) -> None:
    topics = {
        "python",
        "processor",
        "memory",
        "FFT",
        "compiled kernels",
        "CUDA",
        "runtime tensorrt",
        "runtime openvino",
        "runtime onnxruntime",
        "runtime torch",
        "runtime torch-compile",
        "malloc",
        "collector",
        "port 9002",
        "port 9091",
    }
    assert topics | set(ENVIRONMENT) | {"bart", "gadgetron"} <= set(findings)
    assert findings["CUDA"].state == ("ok" if torch.cuda.is_available() else "note")


def test_exactly_one_runtime_is_used_and_each_missing_one_has_a_remedy(findings: dict[str, Finding]) -> None:
    rows = [finding for name, finding in findings.items() if name.startswith("runtime ")]
    assert len(rows) == len(RUNTIMES)
    (used,) = [row for row in rows if "used" in row.value]
    assert used.state == "ok"
    assert "ms" in used.value
    assert all(row.remedy for row in rows if row.state == "note")


def test_a_runtime_that_is_wrong_is_shown_as_refused() -> None:
    class Zeros(TorchEager):
        name = "zeros"

        def load(self, *_: object) -> LoadedDenoiser:
            return lambda x, _sigma: 0 * x

    rows = {finding.what: finding for finding in doctor._runtimes((Zeros(), TorchEager()))}
    assert rows["runtime zeros"].state == "note"
    assert re.search(r"differs .* by [1-9].*, allowed is 0\.0", rows["runtime zeros"].value)
    assert "used" in rows["runtime torch"].value


def test_the_command_prints_every_finding(findings: dict[str, Finding]) -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert [line.split("  ")[0].strip() for line in result.stdout.splitlines()][1:] == list(findings)


def test_settings_of_the_environment_that_slow_the_engine_down_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "infinite")
    monkeypatch.setenv("OMP_WAIT_POLICY", ENVIRONMENT["OMP_WAIT_POLICY"])
    found = {finding.what: finding for finding in doctor._settings()}
    assert found["GOMP_SPINCOUNT"].state == "note"
    assert "unset it" in found["GOMP_SPINCOUNT"].remedy
    assert found["OMP_WAIT_POLICY"].state == "ok"


def test_a_port_that_is_taken_is_told_apart_from_a_free_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(doctor, "_PORTS", ((port, "scanners", "-p"),))
        (finding,) = doctor._ports()
        assert (finding.state, "-p 0" in finding.remedy) == ("note", True)
    (finding,) = doctor._ports()
    assert finding.state == "ok"


def test_a_broken_package_is_a_failure(tmp_path: Path) -> None:
    """A finufft whose library does not load, as on a machine of another kind."""
    (tmp_path / "finufft.py").write_text('raise ImportError("libfinufft.so: cannot open shared object file")\n')
    places = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, "-m", "scanside.adapters.cli", "doctor"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, env={**os.environ, "PYTHONPATH": places})
    assert done.returncode == 1
    assert "1 of the things that scanside needs are broken" in done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "BROKEN" in line]
    assert "libfinufft.so" in line
    assert "pip install --force-reinstall finufft" in line


def test_a_package_that_is_absent_is_broken() -> None:
    finding = doctor._package("nothing", lambda: import_module("no_such_module"))
    assert finding.state == "broken"
    assert "no_such_module" in finding.value
