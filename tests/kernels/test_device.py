"""CUDA sources compile for every supported architecture without a warning, by nvcc and by NVRTC, and the result is kept."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from scanside.kernels import device

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
SOURCES = sorted(path.name for path in (device.sources() / "cuda").glob("*.cu"))
FOLDERS = [f"-I{device.sources() / folder}" for folder in device.SOURCES]
ELF = b"\x7fELF"


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """NVRTC with an empty cache."""
    if not device.installed():
        pytest.skip("NVRTC is not installed: pip install 'scanside[cuda]'")
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def test_there_are_sources() -> None:
    assert "coil_matrix.cu" in SOURCES


@pytest.mark.parametrize("source", SOURCES)
def test_nvcc_compiles_without_a_warning(source: str, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    targets = [f"-gencode=arch=compute_{arch[3:]},code={arch}" for arch in ARCHITECTURES]
    out = tmp_path / "out.fatbin"
    command = ["nvcc", "-fatbin", "-std=c++17", "-Werror", "all-warnings", "-t", "2", *targets, *FOLDERS]
    done = subprocess.run(
        [*command, str(device.sources() / "cuda" / source), "-o", str(out)], capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size > 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_nvrtc_compiles_to_machine_code(source: str, arch: str, nvrtc: Path) -> None:
    assert device.compile_cubin(source, arch).startswith(ELF)


def test_what_was_compiled_is_kept(nvrtc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = device.compile_cubin("coil_matrix.cu", "sm_90", (("SCS_COILS", 4),))
    (kept,) = nvrtc.rglob("*.cubin")
    assert kept.read_bytes() == first
    kept.write_bytes(b"from the disk")
    assert device.compile_cubin("coil_matrix.cu", "sm_90", (("SCS_COILS", 4),)) == b"from the disk"
    assert device.compile_cubin("coil_matrix.cu", "sm_90", (("SCS_COILS", 5),)).startswith(ELF)
    monkeypatch.setattr(device, "nvrtc_version", lambda: "0.0")
    assert device.compile_cubin("coil_matrix.cu", "sm_90", (("SCS_COILS", 4),)) == first
    assert len(list(nvrtc.rglob("*"))) == 2 + 3, (
        "folders scanside and cubin, and three files, none of them half written"
    )


def test_a_changed_source_is_compiled_again(nvrtc: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder in device.SOURCES:
        shutil.copytree(device.sources() / folder, tmp_path / folder)
    device.compile_cubin("coil_matrix.cu", "sm_90")
    monkeypatch.setattr(device, "sources", lambda: tmp_path)
    device.compile_cubin("coil_matrix.cu", "sm_90")
    assert len(list(nvrtc.rglob("*.cubin"))) == 1
    header = tmp_path / "include" / "scs.h"
    header.write_text(header.read_text("utf-8") + "\n#error changed\n", "utf-8")
    with pytest.raises(Exception, match="changed"):
        device.compile_cubin("coil_matrix.cu", "sm_90")


def test_without_nvrtc_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "installed", lambda: False)
    with pytest.raises(RuntimeError, match=r"pip install 'scanside\[cuda\]'"):
        device.compile_cubin("coil_matrix.cu", "sm_90")
