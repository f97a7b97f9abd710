"""`scanside serve`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .cli_parts import Configs, examples

__all__ = ["serve"]

serve_app = typer.Typer()


@serve_app.command(
    epilog=examples(
        "scanside serve",
        "scanside serve -H 0.0.0.0 --insecure -d mri/sense   on a closed network",
        "scanside serve --spool /data/spool --keep-raw       keep the raw data of all scans",
        "scanside serve -p=9002 -v -l=/tmp/log --defaultConfig=openrecon",
    )
)
def serve(
    *,
    port: Annotated[int, typer.Option("-p", "--port", min=0, max=65535, help="For scanners; 0: any free one.")] = 9002,
    host: Annotated[str, typer.Option("-H", "--host", help="Address to listen on.")] = "127.0.0.1",
    default: Annotated[
        str | None,
        typer.Option(
            "-c",
            "--config",
            "-d",
            "--default",
            "--defaultConfig",
            metavar="NAME",
            help="Configuration for scans that ask for one that is not installed; without it they are refused.",
        ),
    ] = None,
    configs: Configs = None,
    dialect: Annotated[
        Literal["auto", "gadgetron", "fire"], typer.Option(help="How consoles are spoken to; auto: by what they send.")
    ] = "auto",
    failure: Annotated[
        Literal["close", "abort"],
        typer.Option(help="How a failed session ends: with CLOSE, or (FIRE, OpenRecon) by dropping the connection."),
    ] = "close",
    workers: Annotated[int, typer.Option(min=1, max=64, help="Engine processes.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="Processor threads per engine process; 0: all cores.")] = 0,
    metrics_host: Annotated[str, typer.Option(help="Address of metrics and health checks.")] = "127.0.0.1",
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="Their port; 0: any free one.")] = 9091,
    metrics: Annotated[bool, typer.Option(help="Serve metrics and health checks.")] = True,
    bus: Annotated[
        str | None, typer.Option(metavar="ENDPOINT", help="ZeroMQ endpoint for other producers, tcp://127.0.0.1:9003.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Record photoacoustic streams here, as IPASC files.")
    ] = None,
    spool: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep scans here while they run.", show_default="the user's state folder"),
    ] = None,
    no_spool: Annotated[bool, typer.Option("--no-spool", help="Keep nothing on disk.")] = False,
    spool_limit: Annotated[float, typer.Option(min=0, metavar="GB", help="All spool files together.")] = 20.0,
    keep_raw: Annotated[
        bool, typer.Option("--keep-raw", help="Keep the raw data of all scans, the newest as far as the limit goes.")
    ] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow addresses that other hosts can reach.")] = False,
    idle: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="End silent sessions after; 0: never.")] = 0.0,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log more.")] = False,
    logfile: Annotated[Path | None, typer.Option("-l", "--logfile", help="Append the log to this file.")] = None,
) -> None:
    """Wait for scanners and reconstruct what they send."""
    from .commands.serve import run_server
    from .logs import configure_logging
    from .server import ServeOptions
    from .spooling import default_folder

    configure_logging("debug" if verbose else "info", logfile)
    run_server(
        ServeOptions(
            host=host,
            port=port,
            default_config=default,
            config_folders=tuple(configs or ()),
            dialect=dialect,
            failure=failure,
            workers=workers,
            threads=threads,
            metrics_host=metrics_host,
            metrics_port=metrics_port if metrics else None,
            bus=bus,
            record=record,
            spool=None if no_spool else spool or default_folder(),
            spool_bytes=round(spool_limit * 1e9),
            keep_raw=keep_raw,
            insecure=insecure,
            idle_seconds=idle,
        )
    )
