"""What the commands of the command line share: options, and the examples at the end of their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["BUS", "Configs", "Values", "examples"]

BUS = "tcp://127.0.0.1:9003"
"""Where the bus of a server is expected."""
Configs = Annotated[
    list[Path] | None,
    typer.Option("--configs", metavar="DIR", help="Folder with more configurations (DIR/mri/mine.toml is mri/mine)."),
]
Values = Annotated[
    list[str] | None,
    typer.Option("-P", "--parameter", metavar="NAME=VALUE", help="Replace a value of the configuration; may repeat."),
]


def examples(*lines: str) -> str:
    """The end of a help text."""
    return "\b\n[bold]Examples[/]\n" + "\n".join(f"  {line}" for line in lines)
