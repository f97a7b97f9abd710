"""What all benchmarks share: the machine in words, Markdown tables, and sections of docs/benchmarks.md."""

from __future__ import annotations

import datetime
import os
import platform
import re
from pathlib import Path

import torch

__all__ = ["Table", "machine", "update_document"]

HEAD = """# Benchmarks

The tables were written by the scripts in `benchmarks/`, which run what they compare side by side on one machine.
Where a figure was taken
otherwise, its section says so.
No GPU was at hand for any of them; everything about CUDA and TensorRT is unmeasured.
"""


def machine() -> str:
    """Processor, cores, system and library versions, and the date."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    name, family, number = (
        found[1] if (found := re.search(rf"{field}\s*:\s*(.+)", text)) else "unknown"
        for field in ("model name", "cpu family", "model")  # virtual machines call different processors by one name
    )
    cores = len(os.sched_getaffinity(0))
    return (
        f"{name} (family {family}, model {number}), {cores} cores, no GPU, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, {datetime.date.today().isoformat()}"
    )


class Table:
    """A Markdown table that grows by rows."""

    def __init__(self, *columns: str) -> None:
        self._rows = [list(columns), ["---"] * len(columns)]

    def add(self, *cells: object) -> None:
        """Append a row."""
        self._rows.append([str(cell) for cell in cells])

    def __str__(self) -> str:
        return "\n".join("| " + " | ".join(row) + " |" for row in self._rows)


def update_document(path: Path, name: str, section: str, where: str) -> None:
    """Replace or append the section `name` of the document; everything else in it stays.

    The variable SCANSIDE_BENCHMARKS names a document to write to in place of benchmarks.md, for a second machine.
    """
    if path.name == "benchmarks.md":
        path = Path(os.environ.get("SCANSIDE_BENCHMARKS", path))
    text = path.read_text(encoding="utf-8") if path.exists() else HEAD
    body = f"## {name}\n\n{where}\n\n{section.strip()}\n"
    pattern = re.compile(rf"^## {re.escape(name)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    text = pattern.sub(lambda _: body + "\n", text) if pattern.search(text) else f"{text.rstrip()}\n\n{body}"
    path.write_text(text.rstrip() + "\n", encoding="utf-8")
