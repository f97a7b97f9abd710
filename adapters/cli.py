"""The command line: names, options and help of the commands. What they do is imported when they run.

Errors are one line on stderr: exit code 2 for what the user can correct on the command line or in a configuration, 1 for
everything that went wrong later, 130 after Ctrl-C.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from scanside.engine.errors import ConfigError, ScansideError
from typer.core import TyperGroup

from .cli_configs import config_app
from .cli_parts import BUS, Configs, Values
from .cli_parts import examples as _examples
from .cli_photoacoustic import photoacoustic_app
from .cli_serve import serve_app
from .cli_spool import spool_app

__all__ = ["compile_", "demo", "doctor", "main", "run", "send", "train"]

_UsageError: type[typer.BadParameter] = typer.BadParameter.__bases__[0]
"""What is raised for a wrong option, whichever package has the parser."""
_GLUED = re.compile(r"(-[A-Za-z])=(.+)", re.DOTALL)
"""`-p=9002`, as OpenRecon's command lines have it."""


class _Group(TyperGroup):
    """Turns errors into one line on stderr and an exit code."""

    debug = False

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:  # noqa: ANN401 - as the base has it
        words = sys.argv[1:] if args is None else list(args)
        extra["standalone_mode"] = False
        try:
            code = super().main(_unglued(words), *rest, **extra)
        except _UsageError as error:
            code = _complain(error.format_message(), 2)
        except ConfigError as error:
            code = self._failed(error, str(error), 2)
        except ScansideError as error:
            code = self._failed(error, str(error), 1)
        except OSError as error:
            code = self._failed(error, _told(error), 1)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - as the base has it
        self.debug = bool(ctx.params.get("debug"))
        return super().invoke(ctx)

    def _failed(self, error: Exception, text: str, code: int) -> int:
        if self.debug:
            raise error
        return _complain(text, code)


def _unglued(words: list[str]) -> list[str]:
    """The words with `-p=9002` written as `-p 9002`."""
    found = ((word, _GLUED.fullmatch(word)) for word in words)
    return [part for word, glued in found for part in (glued.groups() if glued else (word,))]


def _complain(text: str, code: int) -> int:
    line = " ".join(text.split())
    typer.echo(f"scanside: {line}", err=True)
    return code


def _told(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


app = typer.Typer(
    name="scanside",
    cls=_Group,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_examples(
        "scanside demo                                  see it work, in under a minute",
        "scanside serve                                 wait for scanners on port 9002",
        "scanside send scan.h5 -c mri/sense -o out.h5   play a stored scan to it",
        "scanside run -i scan.h5 -o out.h5              the same without a server",
    ),
)
app.add_typer(serve_app)
app.add_typer(config_app, name="config")
app.add_typer(spool_app, name="spool")
app.add_typer(photoacoustic_app)

_Png = Annotated[Path | None, typer.Option("--png", metavar="DIR", help="Write each image as a PNG into this folder.")]


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    *,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,  # noqa: ARG001
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Scanner-side streaming reconstruction: raw data in while the scan runs, images out by the deadline."""
    if version:
        typer.echo(f"scanside {_version()}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def _version() -> str:
    try:
        return metadata.version("scanside")
    except metadata.PackageNotFoundError:
        return "(not installed)"


@app.command(
    epilog=_examples(
        "scanside send scan.h5 -o out.h5 --png pictures",
        "scanside send scan.h5 -c mri/sense --pace-ms 3   at the pace of a scanner",
        "scanside send -a 10.0.0.7 -p 9002 -f scan.h5 -c default.xml -o out.h5",
        "scanside send -Q gadgetron::version              ask the server something",
        "scanside send --pat scan.hdf5 --rate 25          photoacoustics: IPASC, .msot or .npz",
        "scanside send --pat spheres.npz --geometry ring.toml -c pat/ubp --png pictures",
    )
)
def send(
    scan: Annotated[Path | None, typer.Argument(metavar="FILE", help="ISMRMRD file.", show_default=False)] = None,
    *,
    filename: Annotated[Path | None, typer.Option("-f", "--filename", help="The same as FILE.")] = None,
    address: Annotated[str, typer.Option("-a", "--address", help="Host of the server.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("-p", "--port", min=1, max=65535, help="Port of the server.")] = 9002,
    outfile: Annotated[
        Path | None, typer.Option("-o", "--outfile", help="Write the images to this ISMRMRD file.")
    ] = None,
    in_group: Annotated[str, typer.Option("-g", "--in-group", help="Group of the scan in its file.")] = "dataset",
    out_group: Annotated[
        str, typer.Option("-G", "--out-group", help="Group to write; date and time without it.", show_default=False)
    ] = "",
    config: Annotated[str, typer.Option("-c", "--config", help="Configuration that the server knows.")] = "default",
    config_local: Annotated[
        Path | None, typer.Option("-C", "--config-local", help="Send this file as the configuration.")
    ] = None,
    values: Annotated[
        list[str] | None,
        typer.Option("--parameter", metavar="NAME=VALUE", help="Send as OpenRecon's parameters; may repeat."),
    ] = None,
    loops: Annotated[int, typer.Option("-l", "--loops", min=1, help="Sessions, one after the other.")] = 1,
    timeout: Annotated[int, typer.Option("-t", "--timeout", min=1, help="Longest silence of the server, ms.")] = 10000,
    bits: Annotated[
        int, typer.Option("-P", "--precision", min=0, max=32, help="Compress to so many bits per float; 0: do not.")
    ] = 0,
    pace_ms: Annotated[float, typer.Option(min=0, help="Milliseconds between readouts; 0: at once.")] = 0.0,
    rate: Annotated[
        float | None,
        typer.Option(
            min=0, help="The same as readouts, or photoacoustic frames (25 without it), per second; 0: at once."
        ),
    ] = None,
    pat: Annotated[Path | None, typer.Option(metavar="FILE", help="Photoacoustic scan to send over the bus.")] = None,
    geometry: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TOML with the detector array of an .npz file.")
    ] = None,
    bus: Annotated[str, typer.Option(metavar="ENDPOINT", help="With --pat: the bus of `serve --bus`.")] = BUS,
    waveforms: Annotated[bool, typer.Option("-w", "--waveforms", help="Send the file's waveforms, too.")] = False,
    png: _Png = None,
    dicom: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep DICOM files that come back here.")] = None,
    query: Annotated[
        str | None, typer.Option("-Q", "--info", metavar="KEY", help="Print the answer to a query.")
    ] = None,
    dependency: Annotated[bool, typer.Option("-q", "--query", help="Print the answer about a noise scan.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="A line for each image.")] = False,
) -> None:
    """Play a stored scan to any MRD server, with the letters of gadgetron_ismrmrd_client."""
    from .commands import send as work
    from .commands.output import pairs
    from .commands.results import Output

    if pat is not None:
        from .commands import photoacoustic

        raise typer.Exit(
            photoacoustic.send_recording(
                photoacoustic.SendOptions(
                    file=pat,
                    geometry=geometry,
                    bus=bus,
                    config="pat/das" if config == "default" else config,
                    parameters=pairs(values, "--parameter"),
                    rate=25.0 if rate is None else rate,
                    loops=loops,
                    output=Output(file=outfile, group=out_group or "dataset", png=png),
                    timeout=timeout / 1e3,
                )
            )
        )
    if query is not None:
        work.ask(address, port, query, timeout / 1e3)
        return
    if pace_ms and rate:
        raise typer.BadParameter("--pace-ms and --rate say the same thing; give one of them")
    options = work.SendOptions(
        host=address,
        port=port,
        file=Path() if dependency else _one(scan, filename, "a file to send"),
        group=in_group,
        output=Output(file=outfile, group=out_group, png=png),
        config=config,
        config_file=config_local,
        parameters=pairs(values, "--parameter"),
        loops=loops,
        timeout=timeout / 1e3,
        interval=1 / rate if rate else pace_ms / 1e3,
        bits=bits,
        waveforms=waveforms,
        dicom=dicom,
        verbose=verbose,
    )
    raise typer.Exit(work.ask_dependency(options) if dependency else work.send_file(options))


def _one(first: Path | None, second: Path | None, what: str) -> Path:
    """The one of two spellings that was used."""
    if (first is None) == (second is None):
        raise typer.BadParameter(f"expected {what}, once")
    return first or second or Path()


@app.command(
    epilog=_examples(
        "scanside run -i scan.h5 -o out.h5",
        "scanside run scan.h5 -c mri/l1_espirit -P reconstruction.iterations=100 --png pictures",
    )
)
def run(
    scan: Annotated[Path | None, typer.Argument(metavar="FILE", help="ISMRMRD file.", show_default=False)] = None,
    *,
    infile: Annotated[Path | None, typer.Option("-i", "--input", help="The same as FILE.")] = None,
    outfile: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the images to this ISMRMRD file.")
    ] = None,
    in_group: Annotated[str, typer.Option("-g", "--in-group", help="Group of the scan in its file.")] = "dataset",
    out_group: Annotated[str, typer.Option("-G", "--out-group", help="Group to write.")] = "dataset",
    config: Annotated[str, typer.Option("-c", "--config", help="Configuration.")] = "default",
    values: Values = None,
    configs: Configs = None,
    png: _Png = None,
    threads: Annotated[int, typer.Option(min=0, help="Processor threads; 0: all cores.")] = 0,
) -> None:
    """Reconstruct a stored scan without a server."""
    from .commands.output import pairs
    from .commands.results import Output
    from .commands.run import RunOptions, run_file

    options = RunOptions(
        file=_one(scan, infile, "a file to reconstruct"),
        group=in_group,
        output=Output(file=outfile, group=out_group, png=png),
        config=config,
        overrides=pairs(values, "-P"),
        folders=configs or (),
        threads=threads,
    )
    raise typer.Exit(run_file(options))


@app.command(
    epilog=_examples(
        "scanside train mri/online --data images -o my-prior",
        "scanside train mine.toml --data scans -P training.steps=5000 -P network.blocks=2",
        "scanside train mri/online --data images -o my-prior --through-loop --weights base.safetensors",
        "scanside train pat/online -o my-prior -P training.scenes=800",
        "scanside train mri/cm_dm --stage 2 --data images -o without-center",
    )
)
def train(
    config: Annotated[str, typer.Argument(help="Name of a configuration, or a TOML file.")],
    *,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="Folder of npz, ISMRMRD or NIfTI files; for MRI only."),
    ] = None,
    out: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for weights; a run in it is taken up again.")
    ] = Path("scanside-training"),
    name: Annotated[str, typer.Option(help="What the weights are called.")] = "prior",
    values: Values = None,
    configs: Configs = None,
    through_loop: Annotated[
        bool, typer.Option("--through-loop", help="Train through the reconstruction loop, for few evaluations.")
    ] = False,
    stage: Annotated[int, typer.Option(min=1, help="Train the prior of this stage of the configuration.")] = 1,
    weights: Annotated[str, typer.Option(help="Weights to begin with: shipped ones by name, or a file.")] = "",
    held_out: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the images, the last ones, kept for validation.")
    ] = 0.08,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    threads: Annotated[int, typer.Option(min=0, help="Processor threads; 0: all cores.")] = 0,
) -> None:
    """Train a prior on a folder of images, or on simulated photoacoustic scenes; stop and take up again at any time."""
    from .commands.output import pairs
    from .commands.train import TrainOptions, run_training

    options = TrainOptions(
        config=config,
        data=data,
        out=out,
        name=name,
        overrides=pairs(values, "-P"),
        folders=configs or (),
        through_loop=through_loop,
        stage=stage,
        weights=weights,
        held_out=held_out,
        save_every=save_every,
        threads=threads,
    )
    raise typer.Exit(run_training(options))


@app.command(epilog=_examples("scanside doctor", "scanside doctor && scanside serve"))
def doctor() -> None:
    """Show what this machine has, which fast paths are active, and what to do about those that are not."""
    from .doctor import report

    raise typer.Exit(report())


@app.command(
    "compile",
    epilog=_examples(
        "scanside compile mri/online",
        "scanside compile mri/online --matrix 256x256 --matrix 320x320",
        "scanside compile mine.safetensors -P runtime.runtime=openvino",
    ),
)
def compile_(
    name: Annotated[
        str, typer.Argument(metavar="CONFIG", help="Configuration, or weights: a name or a .safetensors file.")
    ],
    *,
    matrix: Annotated[
        list[str] | None,
        typer.Option(metavar="HEIGHTxWIDTH", help="Pixels of the images; may repeat. [default: 256x256]"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=64, help="Images at a time.")] = 1,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep what is compiled here, not in $SCANSIDE_CACHE.")
    ] = None,
    values: Values = None,
    configs: Configs = None,
) -> None:
    """Compile the networks of a configuration for this machine, test and time them, and keep the fastest."""
    from .commands.compile import CompileOptions, compile_networks
    from .commands.output import pairs

    compile_networks(
        CompileOptions(
            name=name,
            matrices=tuple(matrix or ("256x256",)),
            batch=batch,
            cache=cache,
            overrides=pairs(values, "-P"),
            folders=tuple(configs or ()),
        )
    )


@app.command(
    epilog=_examples(
        "scanside demo",
        "scanside demo --frames 40 --acceleration 6 --config mri/l1_espirit",
        "scanside demo --file scan.h5 --tr-ms 5",
        "scanside demo --pat                            photoacoustics: 256 elements at 25 frames a second",
        "scanside demo --pat --file spheres.npz --geometry ring.toml",
    )
)
def demo(
    *,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for images and pictures.")] = Path("scanside-demo"),
    file: Annotated[Path | None, typer.Option(help="Stream this ISMRMRD file instead of a simulated scan.")] = None,
    config: Annotated[str | None, typer.Option("-c", "--config", help="Configuration.", show_default=False)] = None,
    pat: Annotated[bool, typer.Option("--pat", help="A photoacoustic scan instead of MRI.")] = False,
    geometry: Annotated[Path | None, typer.Option(help="With --pat: detector array of an .npz file.")] = None,
    rate: Annotated[float, typer.Option(min=1, max=1000, help="With --pat: frames per second.")] = 25.0,
    matrix: Annotated[int, typer.Option(min=16, max=1024, help="Pixels per side.")] = 256,
    coils: Annotated[int, typer.Option(min=1, max=128, help="Receive coils.")] = 8,
    acceleration: Annotated[int, typer.Option(min=1, max=16, help="Every n-th line is measured.")] = 4,
    frames: Annotated[
        int | None,
        typer.Option(min=1, max=10000, help="Repetitions (12), or photoacoustic frames (250).", show_default=False),
    ] = None,
    tr_ms: Annotated[float, typer.Option(min=0, help="Milliseconds between readouts.")] = 3.0,
) -> None:
    """Stream a scan through a real server at a real pace, and compare what comes back with the truth."""
    if pat:
        from .photoacoustic_demo import PhotoacousticDemo, run_photoacoustic_demo

        shown = PhotoacousticDemo(out=out, file=file, geometry=geometry, config=config, rate=rate, frames=frames or 250)
        raise typer.Exit(run_photoacoustic_demo(shown))
    from .demo import DemoOptions, run_demo

    options = DemoOptions(
        out=out,
        file=file,
        config=config or "default",
        matrix=matrix,
        coils=coils,
        acceleration=acceleration,
        frames=frames or 12,
        interval=tr_ms / 1e3,
    )
    raise typer.Exit(run_demo(options))


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="scanside")


if __name__ == "__main__":
    main()
