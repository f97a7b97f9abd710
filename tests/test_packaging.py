"""Packaging: what an install holds, what lies at the top of the repository, and that every shipped configuration loads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from scanside.engine.config import ConfigStore

REPOSITORY = Path(__file__).resolve().parent.parent
INSTALLED = ("adapters", "configs", "engine", "kernels")
FIXED = {*INSTALLED, "tests", "benchmarks", "docs", ".ci"}
BUILD_LEFTOVERS = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so", "build", "dist", "*.egg-info", ".*")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))


def shipped() -> list[Path]:
    """Every file of the package in the working tree, relative to the repository."""
    paths = (path for top in INSTALLED for path in (REPOSITORY / top).rglob("*") if path.is_file())
    return sorted(
        p.relative_to(REPOSITORY) for p in paths if "__pycache__" not in p.parts and p.suffix not in (".pyc", ".so")
    )


def package_of(path: Path) -> str:
    return ".".join(("scanside", *path.parent.parts))


def test_every_folder_with_code_is_a_listed_package(project: dict[str, Any]) -> None:
    setuptools = project["tool"]["setuptools"]
    needed = {package_of(path) for path in shipped() if path.suffix == ".py"}
    listed = set(setuptools["packages"])
    assert {"lacks": needed - listed, "has too much": listed - needed} == {"lacks": set(), "has too much": set()}
    assert setuptools["package-dir"] == {f"scanside.{top}": top for top in INSTALLED}


def test_every_folder_with_code_has_an_init() -> None:
    folders = {path.parent for path in shipped() if path.suffix == ".py"}
    assert {folder for folder in folders if not (REPOSITORY / folder / "__init__.py").exists()} == set()


def test_every_data_file_is_covered_by_package_data(project: dict[str, Any]) -> None:
    patterns = project["tool"]["setuptools"]["package-data"]
    lost = [str(path) for path in shipped() if path.suffix != ".py" and not covered(path, patterns)]
    assert lost == []


def covered(path: Path, patterns: dict[str, list[str]]) -> bool:
    """Whether a package that the file lies in, at any depth, names it."""
    for folder in path.parents[:-1]:
        inside = path.relative_to(folder)
        named = patterns.get(".".join(("scanside", *folder.parts)), ())
        if any(inside.match(pattern) and len(inside.parts) == pattern.count("/") + 1 for pattern in named):
            return True
    return False


def test_every_installed_folder_says_that_it_is_typed() -> None:
    assert {top for top in INSTALLED if top != "configs" and not (REPOSITORY / top / "py.typed").exists()} == set()


def test_the_top_level_folders_are_the_fixed_ones() -> None:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout, so that files of the project cannot be told from others")
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert {line.partition("/")[0] for line in listing.stdout.splitlines() if "/" in line} - FIXED == set()


def test_the_installed_version_is_the_declared_one(project: dict[str, Any]) -> None:
    try:
        installed = metadata.version("scanside")
    except metadata.PackageNotFoundError:
        pytest.skip("scanside is not installed here, only on the path")
    assert installed == project["project"]["version"]


# --- configurations ----------------------------------------------------------------------------------------------------------


def test_every_shipped_configuration_loads_and_is_described() -> None:
    store = ConfigStore()
    files = {str(path.relative_to("configs").with_suffix("")) for path in shipped() if path.suffix == ".toml"}
    assert set(store.names()) == files
    described = {name: store.get(name).description for name in store.names()}
    assert [name for name, text in described.items() if len(text) < 20] == []
    assert len(set(described.values())) == len(described)


def test_no_two_configurations_answer_to_the_same_name() -> None:
    store = ConfigStore()
    taken: dict[str, str] = {}
    clashes = []
    for name in store.names():
        domain, _, short = name.partition("/")
        shared = domain == "pat" and f"mri/{short}" in store.names()  # then the short name is that for MRI
        for alias in {name, *store.get(name).aliases} | (set() if shared else {short}):
            if taken.setdefault(alias, name) != name:
                clashes.append((alias, taken[alias], name))
    assert clashes == []
    assert store.get("online").name == "mri/online"


# --- the wheel ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    """The wheel built from a copy of the working tree."""
    installed = {name: next(iter(metadata.distributions(name=name)), None) for name in ("setuptools", "pip")}
    for name, distribution in installed.items():
        if distribution is None:
            pytest.skip(f"{name} is not installed, so that no wheel can be built")
    if int(installed["setuptools"].version.partition(".")[0]) < 77:
        pytest.skip(f"setuptools {installed['setuptools'].version} is older than 77")
    folder = tmp_path_factory.mktemp("wheel")
    copy, out = folder / "copy", folder / "out"
    shutil.copytree(REPOSITORY, copy, ignore=BUILD_LEFTOVERS)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(copy),
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(out),
    ]
    # one library, not optimized: how it is packed is asked here, and the others take a minute
    quick = {**os.environ, "SCANSIDE_LEVELS": "base", "CXXFLAGS": "-O0"}
    build = subprocess.run(command, capture_output=True, text=True, timeout=110, env=quick)
    assert build.returncode == 0, build.stdout + build.stderr
    return zipfile.Path(next(out.glob("scanside-*.whl")))


def members(wheel: zipfile.Path) -> set[str]:
    return {name for name in wheel.root.namelist() if not name.endswith("/")}


def wheel_metadata(wheel: zipfile.Path) -> Message:
    name = next(name for name in members(wheel) if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(wheel.root.read(name))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.Path) -> None:
    code = {name for name in members(wheel) if ".dist-info/" not in name and not name.endswith(".so")}
    needed = {f"scanside/{path.as_posix()}" for path in shipped()}
    assert {"lacks": needed - code, "has too much": code - needed} == {"lacks": set(), "has too much": set()}
    assert any(name.startswith("scanside/configs/mri/") and name.endswith(".toml") for name in code)


def test_the_wheel_holds_the_compiled_kernels_where_there_is_a_compiler(wheel: zipfile.Path) -> None:
    libraries = {name for name in members(wheel) if name.endswith(".so")}
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    assert "scanside/kernels/_native_base.so" in libraries
    assert {name.rpartition("_native_")[0] for name in libraries} == {"scanside/kernels/"}


def test_scanside_is_a_name_space_that_others_may_share(wheel: zipfile.Path) -> None:
    assert "scanside/__init__.py" not in members(wheel)
    assert {name.partition("/")[0] for name in members(wheel) if ".dist-info/" not in name} == {"scanside"}


def test_the_wheel_says_what_the_project_says(wheel: zipfile.Path, project: dict[str, Any]) -> None:
    said = wheel_metadata(wheel)
    assert (said["Name"], said["Version"]) == ("scanside", project["project"]["version"])
    assert said["License-Expression"] == project["project"]["license"]
    assert any(name.endswith("/licenses/LICENSE") for name in members(wheel))
    assert "scanside" in said.get_payload(), "README.md is not in the metadata"


def test_the_command_of_the_wheel_leads_to_a_module_in_it(wheel: zipfile.Path) -> None:
    name = next(name for name in members(wheel) if name.endswith(".dist-info/entry_points.txt"))
    line = next(line for line in wheel.root.read(name).decode().splitlines() if line.startswith("scanside = "))
    module = line.partition(" = ")[2].partition(":")[0].replace(".", "/")
    assert {f"{module}.py", f"{module}/__init__.py"} & members(wheel), line


def test_the_wheel_works_away_from_the_repository(wheel: zipfile.Path, tmp_path: Path) -> None:
    wheel.root.extractall(tmp_path)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import scanside; scanside.__path__ = [sys.argv[1] + '/scanside']\n"  # not the working tree on the path
        "import scanside.engine.config as config\n"
        "assert config.__file__.startswith(sys.argv[1]), config.__file__\n"
        "print(*config.ConfigStore().names())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ConfigStore().names()
