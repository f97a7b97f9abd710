"""Builds the compiled kernels, one library per instruction set. They are optional: without a compiler the rest installs."""

from __future__ import annotations

import copy
import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FLAGS = ["-O3", "-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions"]
FLAGS += ["-pthread", "-fno-rtti", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror=return-type"]
FLAGS += ["-Wno-psabi"]  # vectors wider than a register are inlined, never passed between libraries
OWN_FLAGS = os.environ.get("CXXFLAGS", "").split()
LEVELS = {"base": [], "avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
"""Every library holds all kernels; kernels/native.py loads the best one that the processor runs."""


def libraries() -> list[Extension]:
    """One extension per instruction set of this kind of machine; SCANSIDE_LEVELS="base avx2" builds no others."""
    here = LEVELS if platform.machine().lower() in ("x86_64", "amd64") else ("base",)
    wanted = os.environ.get("SCANSIDE_LEVELS", " ".join(here)).split()
    sources = sorted(path.as_posix() for path in Path("kernels/cpu").glob("*.cpp"))
    headers = sorted(path.as_posix() for path in Path("kernels").glob("*/*.h"))
    return [
        Extension(
            f"scanside.kernels._native_{level}",
            sources,
            include_dirs=["kernels/include"],
            depends=headers,
            extra_compile_args=[*FLAGS, *LEVELS[level], f'-DSCS_LEVEL="{level}"', *OWN_FLAGS],
            language="c++",
            optional=True,
        )
        for level in here
        if level in wanted
    ]


class BuildLibraries(build_ext):
    """Plain shared libraries, not Python modules: no ABI tag in the name; without OpenMP where there is none."""

    def finalize_options(self) -> None:
        """One library per processor at a time."""
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def get_ext_filename(self, fullname: str) -> str:
        """Path of the library below the build folder."""
        return fullname.replace(".", "/") + (".dll" if sys.platform == "win32" else ".so")

    def build_extension(self, ext: Extension) -> None:
        """Compile and link, with OpenMP if possible, in a folder of its own: the libraries have the same sources."""
        own, plain = copy.copy(self), list(ext.extra_compile_args)
        own.build_temp = str(Path(self.build_temp) / ext.name.rpartition(".")[2])
        try:
            ext.extra_compile_args, ext.extra_link_args = [*plain, "-fopenmp"], ["-fopenmp"]
            build_ext.build_extension(own, ext)
        except CompileError:
            ext.extra_compile_args, ext.extra_link_args = plain, []
            build_ext.build_extension(own, ext)


class AnyPythonWheel(bdist_wheel):
    """The libraries know nothing of Python, so one wheel serves every version of it."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-platform."""
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=libraries(), cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AnyPythonWheel})
