"""`scanside config`: look at configurations, or check one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_parts import Configs, Values, examples

__all__ = ["check", "list_", "show"]

config_app = typer.Typer(
    help="Look at configurations, or check one.",
    epilog=examples(
        "scanside config list", "scanside config show mri/sense --effective", "scanside config check mine.toml"
    ),
)


@config_app.command("list", epilog=examples("scanside config list", "scanside config list | cut -f 1"))
def list_(*, configs: Configs = None) -> None:
    """List the configurations."""
    from .commands.configs import list_configs

    list_configs(configs or ())


@config_app.command(
    epilog=examples(
        "scanside config show mri/sense", "scanside config show default --effective -P output.image=complex"
    )
)
def show(
    name: Annotated[str, typer.Argument(help="Name or other name of a configuration.")],
    *,
    effective: Annotated[bool, typer.Option("--effective", help="All values, those by default too.")] = False,
    values: Values = None,
    configs: Configs = None,
) -> None:
    """Show the values of a configuration, each with its origin."""
    from .commands.configs import show_config
    from .commands.output import pairs

    show_config(name, configs or (), pairs(values, "-P"), effective=effective)


@config_app.command(epilog=examples("scanside config check mine.toml"))
def check(file: Annotated[Path, typer.Argument(help="TOML file.")]) -> None:
    """Say whether a file is a valid configuration."""
    from .commands.configs import check_config

    check_config(file)
