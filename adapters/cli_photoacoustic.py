"""The commands of the command line that are for photoacoustics alone."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from .cli_parts import BUS, examples

__all__ = ["tune"]

photoacoustic_app = typer.Typer()


@photoacoustic_app.command(
    epilog=examples(
        "scanside tune --speed-of-sound 1520",
        "scanside tune --autofocus delay",
        "scanside tune --averages 4 --bus tcp://10.0.0.7:9003",
    )
)
def tune(
    *,
    speed_of_sound: Annotated[float | None, typer.Option(min=300, max=10000, help="In m/s.")] = None,
    delay: Annotated[float | None, typer.Option(help="Time of the first sample after the pulse, in samples.")] = None,
    averages: Annotated[int | None, typer.Option(min=1, max=4096, help="Shots per image.")] = None,
    autofocus: Annotated[
        Literal["delay", "speed-of-sound"] | None, typer.Option(help="Search the sharpest image of the last shot.")
    ] = None,
    bus: Annotated[str, typer.Option(metavar="ENDPOINT", help="The bus of the server.")] = BUS,
    timeout: Annotated[int, typer.Option("-t", "--timeout", min=1, help="Wait for the server, ms.")] = 5000,
) -> None:
    """Adjust all photoacoustic streams that run on a server."""
    from .commands.photoacoustic import tune as work

    focus = None if autofocus is None else autofocus.replace("-", "_")
    given = {"speed_of_sound": speed_of_sound, "delay_samples": delay, "averages": averages, "autofocus": focus}
    raise typer.Exit(work(bus, {name: value for name, value in given.items() if value is not None}, timeout / 1e3))
