"""What all commands print with: consoles, tables, progress, and parameters from the command line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from scanside.engine.errors import ConfigError

__all__ = ["console", "milliseconds", "pairs", "progress_bar", "table"]


def console(*, stderr: bool = False, file: IO[str] | None = None) -> Console:
    """A console that writes wide, plain lines where it is no terminal."""
    made = Console(stderr=stderr, file=file, highlight=False, soft_wrap=True)
    if not made.is_terminal:
        made.width = 1000  # nothing wraps in a pipe
    return made


def progress_bar(where: Console, unit: str = "readouts") -> Progress:
    """A bar over readouts; invisible where there is no terminal."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        console=where,
        disable=not where.is_terminal,
        transient=True,
    )


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table in the style of all commands; columns that start with > are aligned right."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return made


def milliseconds(seconds: float) -> str:
    """A duration as a person reads it, e.g. "9.3 ms"."""
    return f"{1e3 * seconds:.1f} ms"


def pairs(values: Iterable[str] | None, option: str) -> dict[str, str]:
    """`name=value` arguments as a dict. Raises ConfigError that shows how they are written."""
    found: dict[str, str] = {}
    for text in values or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"{option} {text!r}: expected name=value, e.g. reconstruction.method=sense")
        found[name.strip()] = value
    return found
