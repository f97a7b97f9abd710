"""`scanside spool`: what a server has kept of scans, and what can be made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_parts import Configs, Values, examples

__all__ = ["clean", "export", "list_", "replay"]

spool_app = typer.Typer(
    help="Look at the raw data that a server has kept, reconstruct it, or export it.",
    epilog=examples(
        "scanside spool list",
        "scanside spool replay 3f2a -o images.h5",
        "scanside spool export 3f2a scan.h5",
        "scanside spool clean --older-than 7",
    ),
)
_File = Annotated[str, typer.Argument(metavar="FILE", help="A spool file, or how a session id begins.")]
_Folder = Annotated[
    Path | None,
    typer.Option("--spool", metavar="DIR", help="Folder of the server.", show_default="the user's state folder"),
]


@spool_app.command("list", epilog=examples("scanside spool list", "scanside spool list --check --spool /data/spool"))
def list_(
    *,
    folder: _Folder = None,
    check: Annotated[bool, typer.Option("--check", help="Read all of each file and say what is damaged.")] = False,
) -> None:
    """List the scans that are kept."""
    from .commands.spool import list_files

    list_files(folder, check=check)


@spool_app.command(
    epilog=examples(
        "scanside spool replay 3f2a -o images.h5",
        "scanside spool replay 20261126T091500Z-3f2a.scanspool -c mri/l1_espirit --png pictures",
    )
)
def replay(
    file: _File,
    *,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="ISMRMRD file for the images.")
    ] = None,
    group: Annotated[str, typer.Option("-G", "--out-group", help="Group to make in it.")] = "dataset",
    png: Annotated[Path | None, typer.Option("--png", metavar="DIR", help="Write the images as PNGs.")] = None,
    config: Annotated[
        str | None, typer.Option("-c", "--config", help="Configuration.", show_default="that of the scan")
    ] = None,
    values: Values = None,
    configs: Configs = None,
    threads: Annotated[int, typer.Option(min=0, help="Processor threads; 0: all cores.")] = 0,
    folder: _Folder = None,
) -> None:
    """Reconstruct what was received of a scan, as the server would have."""
    from .commands.output import pairs
    from .commands.results import Output
    from .commands.spool import ReplayOptions, replay_file

    options = ReplayOptions(
        file=file,
        folder=folder,
        output=Output(file=output, group=group, png=png),
        config=config,
        overrides=pairs(values, "-P"),
        folders=configs or (),
        threads=threads,
    )
    raise typer.Exit(replay_file(options))


@spool_app.command(epilog=examples("scanside spool export 3f2a scan.h5"))
def export(
    file: _File,
    out: Annotated[Path, typer.Argument(help="ISMRMRD file to write.")],
    *,
    group: Annotated[str, typer.Option("-G", "--out-group", help="Group to make in it.")] = "dataset",
    folder: _Folder = None,
) -> None:
    """Write the raw data of a scan as an ISMRMRD file."""
    from .commands.spool import export_file

    raise typer.Exit(export_file(file, folder, out, group))


@spool_app.command(epilog=examples("scanside spool clean --older-than 7", "scanside spool clean --all"))
def clean(
    *,
    older_than: Annotated[
        float | None, typer.Option(min=0, metavar="DAYS", help="Remove what was begun so long ago.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all that no server is writing.")] = False,
    folder: _Folder = None,
) -> None:
    """Remove scans that are kept."""
    from .commands.spool import clean_files

    clean_files(folder, 0.0 if everything else older_than)
