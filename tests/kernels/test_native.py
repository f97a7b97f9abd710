"""The native library: built, found, checked, chosen; and an install without a compiler."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from scanside.kernels import native

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def looked_up_anew() -> Iterator[None]:
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.fixture
def built() -> native.Library:
    found = native.library()
    if found is None:
        pytest.skip("no compiled kernels in this installation")
    return found


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py build_ext in a copy of what it needs."""
    pytest.importorskip("setuptools", minversion="77")
    shutil.copy(REPOSITORY / "setup.py", folder)
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    for name in ("README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    shutil.copytree(REPOSITORY / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=110, env={**os.environ, **environment}
    )


def test_the_best_library_for_this_processor_is_chosen(built: native.Library) -> None:
    assert (built.level, built.lanes) == (built.best, {"base": 4, "avx2": 8, "avx512": 16}[built.best])
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert ("avx2" in flags.split()) == (built.best != "base")


def test_each_level_can_be_asked_for(built: native.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    for level in native.LEVELS:
        monkeypatch.setenv(native.VARIABLE, level)
        native.library.cache_clear()
        if native.LEVELS.index(level) <= native.LEVELS.index(built.best):
            found = native.library()
            assert found is not None
            assert found.level == level
        else:
            with pytest.raises(ImportError, match=f"runs no more than {built.best}"):
                native.library()


def test_torch_can_be_asked_for_and_nonsense_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "torch")
    assert not native.available()
    native.library.cache_clear()
    monkeypatch.setenv(native.VARIABLE, "sse9")
    with pytest.raises(ValueError, match="'sse9', allowed are auto, torch, base"):
        native.library()


def test_an_absent_library_is_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "_path", lambda level: tmp_path / f"_native_{level}.so")
    monkeypatch.delenv(native.VARIABLE, raising=False)
    with caplog.at_level(logging.WARNING, "scanside.kernels"):
        assert [native.available() for _ in range(3)] == [False] * 3
    (record,) = caplog.records
    assert "torch does their work" in record.message


def test_a_library_of_another_interface_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    for code, name in (('extern "C" int scs_abi() { return -7; }', "other"), ("int x;", "none")):
        (tmp_path / "a.cpp").write_text(code)
        library = tmp_path / f"{name}.so"
        subprocess.run(["g++", "-shared", "-fPIC", str(tmp_path / "a.cpp"), "-o", str(library)], check=True)
        with pytest.raises(
            ImportError, match=f"interface {'-7' if name == 'other' else 'None'}, needed is {native.ABI}"
        ):
            native.Library(library)


def test_refused_arguments_are_an_error(built: native.Library) -> None:
    refuse = native.Function(
        "scs_coil_matrix", *[native.ADDRESS] * 3, native.LENGTH, native.INTEGER, native.LENGTH, native.INTEGER
    )
    with pytest.raises(ValueError, match="scs_coil_matrix refuses its arguments"):
        refuse(0, 1, 2, 1, -1, 1, 1)


def test_threads_are_those_of_torch(built: native.Library) -> None:
    assert native.threads() == (torch.get_num_threads() if built.parallel else 1)


def test_it_builds_from_its_sources(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    done = build(tmp_path, SCANSIDE_LEVELS="base", CXXFLAGS="-O0")
    assert done.returncode == 0, done.stderr
    assert "warning:" not in done.stderr, done.stderr
    assert native.Library(tmp_path / "kernels" / "_native_base.so").parallel


def test_a_missing_compiler_does_not_stop_the_install(tmp_path: Path) -> None:
    done = build(tmp_path, CC="/no/compiler", CXX="/no/compiler")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "kernels").glob("*.so")) == []
    assert "_native_base" in done.stdout + done.stderr, "the build does not say what it left out"
