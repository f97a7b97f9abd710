"""`scanside config`: what configurations there are, what they come to, and whether a file is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from scanside.engine.config import ConfigStore, SystemConfig, Value, origins, read_config, to_toml_rows, with_overrides

from .output import console, table

__all__ = ["check_config", "list_configs", "show_config"]

_META = ("name", "description", "aliases", "kind")


def list_configs(folders: Sequence[Path]) -> None:
    """Print every configuration with its description, as tab-separated lines where the output is no terminal.

    Raises ConfigError when one of them is broken.
    """
    store, out = ConfigStore(folders), console()
    if not out.is_terminal:
        for name in store.names():
            out.file.write(f"{name}\t{store.get(name).description}\n")
        return
    rows = table("name", "what it does", "also called")
    for name in store.names():
        config = store.get(name)
        rows.add_row(f"[bold]{name}[/]", config.description, ", ".join(config.aliases))
    out.print(rows)


def show_config(name: str, folders: Sequence[Path], overrides: Mapping[str, Value], *, effective: bool) -> None:
    """Print the values of a configuration as TOML; with `effective` all of them, each with its origin.

    Raises ConfigError for an unknown name, key or a value out of range.
    """
    store = ConfigStore(folders)
    config = with_overrides(store.get(name), overrides, source="-P")
    found = origins(config, store, overrides)
    shown = [path for path in found if path not in _META and (effective or found[path] != "default")]
    out = console()
    out.file.write(f"# {config.name}: {config.description}\n")
    if config.aliases:
        out.file.write(f"# also called {', '.join(config.aliases)}\n")
    out.file.write(_toml(config, shown, found))


def check_config(path: Path) -> None:
    """Print that a file is a valid configuration. Raises ConfigError that says why not, OSError when it cannot be read."""
    config = read_config(path.read_text("utf-8"), name=f"{path.parent.name}/{path.stem}", source=str(path))
    console().file.write(f"{path}: OK, {_method(config)}{_said(config)}\n")


def _method(config: SystemConfig) -> str:
    return config.photoacoustic.beamformer if config.kind == "pat" else config.reconstruction.method


def _said(config: SystemConfig) -> str:
    return f" ({config.description})" if config.description else ""


def _toml(config: SystemConfig, paths: Sequence[str], found: Mapping[str, str]) -> str:
    """The values as TOML, the origin of each as a comment."""
    values = to_toml_rows(config)
    lines, section = [], ""
    for path in paths:
        table_name, _, key = path.rpartition(".")
        if table_name != section:
            section = table_name
            lines.append(f"\n[{section}]")
        lines.append(f"{f'{key} = {_literal(values[path])}':<44} # {found[path]}")
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:  # noqa: ANN401 - any value that TOML has
    """A value in TOML, whose strings, numbers and truth values are written as in JSON, tables in one line."""
    if isinstance(value, msgspec.Struct):
        fields = ((f, getattr(value, f.name)) for f in msgspec.structs.fields(value))
        return "{" + ", ".join(f"{f.name} = {_literal(item)}" for f, item in fields if item != f.default) + "}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return msgspec.json.encode(value).decode()
