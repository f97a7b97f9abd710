"""`scanside compile`: makes the networks of a configuration ready for this machine, and shows what came of each runtime."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
from rich.progress import Progress
from scanside.engine.config import ConfigStore, SystemConfig, Value, with_overrides
from scanside.engine.errors import ConfigError
from scanside.engine.priors.denoiser import Denoiser
from scanside.engine.priors.storage import load_weights, shipped_weights
from scanside.engine.runtimes import ArtefactCache, Selection, Shape, Trial, select

from .output import console, milliseconds, progress_bar, table

__all__ = ["CompileOptions", "compile_networks"]

_LARGEST = 4096


class CompileOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to compile, and for which images."""

    name: str
    """Of a configuration, or of weights."""
    matrices: tuple[str, ...] = ("256x256",)
    batch: int = 1
    cache: Path | None = None
    overrides: Mapping[str, Value] = {}
    folders: tuple[Path, ...] = ()


def compile_networks(options: CompileOptions) -> None:
    """Compile, test and time; prints a table.

    Raises ConfigError for names and sizes that cannot be used, `RuntimeFailed` when no runtime runs a network.
    """
    sizes = [_size(text) for text in options.matrices]
    config, names = _networks(options)
    networks = [(name, *load_weights(name)) for name in names]
    cache = ArtefactCache(options.cache)
    out = console()
    for name, denoiser, card in networks:
        for height, width in sizes:
            shape = Shape(options.batch, card.network.channels, height, width)
            with progress_bar(console(stderr=True), "runtimes") as bar:
                selection = _selected(denoiser, shape, config, cache, bar)
            out.print(f"[bold]{name}[/] ({card.sha256[:12]}), images {shape}", soft_wrap=True)
            out.print(_rows(selection))
    out.print(f"kept in {cache.folder}", markup=False)


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text.strip())
    height, width = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not (1 <= height <= _LARGEST and 1 <= width <= _LARGEST):
        raise ConfigError(f"--matrix {text!r}: expected HEIGHTxWIDTH with sizes from 1 to {_LARGEST}, e.g. 256x256")
    return height, width


def _networks(options: CompileOptions) -> tuple[SystemConfig, list[str]]:
    """The configuration in force, and the weights to compile."""
    store = ConfigStore(options.folders)
    if options.name.endswith(".safetensors") or options.name in shipped_weights():
        return with_overrides(store.get("default"), options.overrides, source="-P"), [options.name]
    config = with_overrides(store.get(options.name), options.overrides, source="-P")
    names = list(dict.fromkeys(stage.prior.weights for stage in config.stages if stage.prior.weights))
    if not names:
        raise ConfigError(f"configuration {config.name} uses no network, there is nothing to compile")
    return config, names


def _selected(denoiser: Denoiser, shape: Shape, config: SystemConfig, cache: ArtefactCache, bar: Progress) -> Selection:
    task = bar.add_task("compile", total=None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = select(
            denoiser,
            shape,
            config.runtime,
            cache=cache,
            measure=True,
            progress=lambda what: bar.update(task, advance=1, description=f"compile {what}"),
        )
    for warning in {str(each.message) for each in said}:
        console(stderr=True).print(f"scanside: {warning}", markup=False)
    return found


def _rows(selection: Selection) -> object:
    rows = table("runtime", "precision", "", ">ms", ">error", ">allowed", ">load s", "what")
    for trial in selection.trials:
        rows.add_row(trial.runtime, trial.precision, trial.state, *_figures(trial), "; ".join(_remarks(trial)))
    return rows


def _figures(trial: Trial) -> tuple[str, ...]:
    """Time, error, tolerance and time to load, empty where there are none."""
    return (
        "" if trial.seconds is None else milliseconds(trial.seconds).removesuffix(" ms"),
        "" if trial.error is None else f"{trial.error:.1e}",
        f"{trial.tolerance:g}" if trial.tolerance else "",
        "" if trial.load_seconds is None else f"{trial.load_seconds:.1f}",
    )


def _remarks(trial: Trial) -> Iterator[str]:
    yield from filter(None, (trial.version, trial.reason, trial.remedy))
    if trial.cached:
        yield "from the cache"
