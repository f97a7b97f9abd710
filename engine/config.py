"""Configurations: TOML files read into strict structs, with errors that say where, what, and what was meant.

A configuration is named by its place, `mri/cartesian`. A name that arrives on the wire is only ever a key into the list of
installed configurations (their names and aliases); nothing is imported or opened by it.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec

from .config_photoacoustic import PhotoacousticConfig
from .config_priors import NetworkConfig, SamplerConfig, StageConfig, TrainingConfig
from .config_runtime import RuntimeConfig
from .errors import ConfigError
from .limits import Limits

__all__ = [
    "CoilMapConfig",
    "ConfigStore",
    "OutputConfig",
    "PhotoacousticConfig",
    "PreparationConfig",
    "ReconstructionConfig",
    "SystemConfig",
    "TriggerConfig",
    "Value",
    "origins",
    "parameter_overrides",
    "read_config",
    "to_toml_rows",
    "with_overrides",
]

Value = str | int | float | bool
Iterations = Annotated[int, msgspec.Meta(ge=1, le=10000)]
KernelSize = Annotated[int, msgspec.Meta(ge=1, le=64)]
Weight = Annotated[float, msgspec.Meta(ge=0)]

Method = Literal[
    "auto",
    "none",
    "zero_filled",
    "sense",
    "cg_sense",
    "l1_espirit",
    "total_variation",
    "grappa",
    "sake",
    "gridding",
    "prior",
]


class PreparationConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What happens to each readout on arrival."""

    prewhiten: bool = True
    """Use noise readouts, or the noise measurement that the header depends on, when there are any."""
    remove_oversampling: bool = True
    """Crop the readout to the reconstructed field of view."""
    compressed_channels: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Virtual coils to keep; 0 keeps all. Learned from the calibration of the first frame."""
    partial_fourier: Literal["pocs", "homodyne", "zero_filled"] = "pocs"
    """How rows that a partial Fourier scan leaves out are filled."""


class CoilMapConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Coil sensitivity maps."""

    calibration_lines: Annotated[int, msgspec.Meta(ge=4)] = 24
    """Central rows used; fewer when fewer were measured."""
    kernel: Annotated[int, msgspec.Meta(ge=3, le=12)] = 6
    threshold: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.02
    """Singular values below this fraction of the largest are noise."""
    crop: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.8
    """Pixels whose eigenvalue is below this have no coil map."""
    refresh: Literal["scan", "frame"] = "scan"
    """Estimate once per slice, or anew for every frame."""


class ReconstructionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a frame becomes an image."""

    method: Method = "auto"
    """`auto`: root sum of squares of what is fully sampled, SENSE for what is not."""
    iterations: Iterations = 30
    """Of conjugate gradients, of FISTA for `l1_espirit` and `total_variation`, of `sake`."""
    regularization: Weight = 0.005
    """L2 weight of SENSE, relative to the largest eigenvalue; threshold of `l1_espirit` and `total_variation`."""
    kernel: tuple[KernelSize, KernelSize] = (5, 4)
    """GRAPPA kernel: readout points, acquired lines."""
    frames: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    """`prior`: reconstruct the last so many frames of a slice together; the newest is given out."""
    warm_start: bool = False
    """`prior`: begin at the last frame of the same slice."""
    deadline_ms: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """`prior`: milliseconds after the last readout at which the best estimate so far has to do; 0: none."""


class TriggerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When a frame is reconstructed: the first of these that happens. The end of the scan always does."""

    flags: bool = True
    """A LAST_IN_SLICE, LAST_IN_REPETITION or LAST_IN_MEASUREMENT flag."""
    coverage: bool = True
    """All lines that the header announces are there."""
    change: bool = True
    """A readout of a later repetition of the same slice arrives."""
    acquisitions: Annotated[int, msgspec.Meta(ge=0)] = 0
    """This many imaging readouts were counted; 0 switches it off."""


class OutputConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What goes back to the console."""

    image: Literal["magnitude", "complex"] = "magnitude"
    pixels: Literal["auto", "float32", "uint16"] = "auto"
    """`auto`: uint16 scaled to BitsStored for FIRE and OpenRecon, float32 for everyone else."""
    send_original: bool = False
    """Also send the zero-filled image, as a series of its own; of a generative image, the plain reconstruction."""
    previews: bool = False
    """Send the estimate after each step of a generative image, as a series of its own."""
    posterior_samples: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    """Draw so many samples of a generative image and send their standard deviation, as a series of its own."""


class SystemConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One reconstruction system."""

    name: str = ""
    description: str = ""
    aliases: tuple[str, ...] = ()
    """Other names that a scanner may ask for."""
    kind: Literal["mri", "pat"] = "mri"
    """What data it is for: MRI readouts or photoacoustic shots."""
    stages: tuple[StageConfig, ...] = ()
    """Program of a system with a learned prior (method `prior`)."""
    preparation: PreparationConfig = PreparationConfig()
    coil_maps: CoilMapConfig = CoilMapConfig()
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    sampler: SamplerConfig = SamplerConfig()
    trigger: TriggerConfig = TriggerConfig()
    output: OutputConfig = OutputConfig()
    photoacoustic: PhotoacousticConfig = PhotoacousticConfig()
    limits: Limits = Limits()
    runtime: RuntimeConfig = RuntimeConfig()
    network: NetworkConfig = NetworkConfig()
    """What `scanside train` makes; shipped weights bring their own."""
    training: TrainingConfig = TrainingConfig()


def _suggest(word: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"known: {', '.join(known)}{hint}"


def _fields(path: str) -> Iterable[str]:
    """Keys allowed in the table at a dotted path of a system configuration."""
    return [f.name for f in msgspec.structs.fields(_kind(path))]


def _kind(path: str) -> Any:  # noqa: ANN401 - the type of whatever the path names
    """Type at a dotted path, such as stages[0].transform."""
    kind: Any = SystemConfig
    for part in filter(None, path.split(".")):
        name, _, index = part.partition("[")
        kind = {f.name: f.type for f in msgspec.structs.fields(kind)}[name]
        kind = get_args(kind)[0] if index else kind
    return kind


def _at(values: Any, path: str) -> Any:  # noqa: ANN401 - whatever the file holds there
    """Value at a dotted path, such as reconstruction.kernel[1]."""
    for part in re.findall(r"[^.\[\]]+", path):
        values = values[int(part)] if isinstance(values, list | tuple) else values[part]
    return values


def _complaint(path: str, value: object, what: str) -> str:
    """What is wrong with a value, and what would be right."""
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    kind = _kind(path)
    if get_origin(kind) is Literal:
        allowed = get_args(kind)
        close = difflib.get_close_matches(str(value)[:80], allowed, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"{path} = {shown}: allowed: {', '.join(allowed)}{hint}"
    return f"{path} = {shown}: {what[0].lower()}{what[1:]}"


def _explain(error: msgspec.ValidationError, source: str, values: Mapping[str, Any]) -> str:
    """Turn msgspec's message into one with file, key path, value and remedy."""
    text = str(error)
    match = re.match(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?$", text, re.DOTALL)
    what, path = (match["what"], match["path"] or "") if match else (text, "")
    unknown = re.search(r"unknown field `([^`]+)`", what)
    if unknown:
        key = ".".join(filter(None, (path, unknown[1])))
        return f"{source}: unknown key {key}; {_suggest(unknown[1], _fields(path))}"
    return f"{source}: {_complaint(path, _at(values, path), what)}"


def read_config(text: str, *, name: str, source: str) -> SystemConfig:
    """Parse the text of a TOML file into a checked configuration.

    `source` names the file in errors. Raises `ConfigError` for bad TOML, unknown keys and values out of range.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from None
    return _convert({**values, "name": name}, source)


def _convert(values: Mapping[str, Any], source: str) -> SystemConfig:
    try:
        config = msgspec.convert(values, SystemConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(error, source, values)) from None
    for path, value in _numbers(msgspec.to_builtins(config)):
        if not math.isfinite(value):
            raise ConfigError(f"{source}: {_complaint(path, value, 'expected a finite number')}")
    return config


def _numbers(values: Any, path: str = "") -> Iterator[tuple[str, float]]:  # noqa: ANN401 - whatever a file may hold
    """Every float with its path."""
    if isinstance(values, float):
        yield path, values
    elif isinstance(values, dict):
        for key, value in values.items():
            yield from _numbers(value, f"{path}.{key}" if path else key)
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            yield from _numbers(value, f"{path}[{index}]")


@functools.cache  # each walk leaves cycles behind, and every session asks
def _leaves(kind: Any, prefix: str = "") -> Mapping[str, Any]:  # noqa: ANN401 - a struct class, walked by reflection
    leaves: dict[str, Any] = {}
    for field in msgspec.structs.fields(kind):
        path = f"{prefix}{field.name}"
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            leaves |= _leaves(field.type, f"{path}.")
        else:
            leaves[path] = field.type
    return leaves


def _parse_value(value: Value, kind: Any, path: str, source: str) -> Any:  # noqa: ANN401 - typed by the field it is for
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.lower() in ("true", "false"):
        text = text.lower()
    if kind is str or text == "":
        return value
    parts = [part.strip() for part in text.strip("[]()").split(",")] if get_origin(kind) is tuple else text
    try:
        return msgspec.convert(parts, kind, strict=False)
    except msgspec.ValidationError as error:
        what = str(error).partition(" - at `")[0]
        raise ConfigError(f"{source}: {_complaint(path, value, what)}") from None


def with_overrides(config: SystemConfig, overrides: Mapping[str, Value], *, source: str) -> SystemConfig:
    """Return `config` with values replaced by dotted path, e.g. {"reconstruction.iterations": "20"}.

    Values may be text, as they come from a command line or from OpenRecon. Raises `ConfigError` for an unknown path.
    """
    leaves = _leaves(SystemConfig)
    values: dict[str, Any] = msgspec.to_builtins(config)
    for path, value in overrides.items():
        if path not in leaves or path in ("name", "aliases", "description", "kind"):
            raise ConfigError(f"{source}: unknown key {path}; {_suggest(path, leaves)}")
        *tables, key = path.split(".")
        table = values
        for part in tables:
            table = table[part]
        table[key] = _parse_value(value, leaves[path], path, source)
    return _convert(values, source)


def parameter_overrides(values: Mapping[str, Value]) -> tuple[dict[str, Value], set[str]]:
    """Sort parameters from a console into overrides by dotted path, and names that mean nothing here.

    A console knows only letters and digits (OpenRecon), so `sendOriginal` means output.send_original and `iterations`
    reconstruction.iterations; a short name that two tables have, such as `kernel`, means nothing. Limits, the stages with their
    weights, the runtime, and what only training reads cannot be set from the wire. Empty strings mean "not set".
    """
    settable = [
        path
        for path in _leaves(SystemConfig)
        if "." in path and path.partition(".")[0] not in ("limits", "network", "training", "runtime")
    ]
    short = Counter(_squeeze(path.rpartition(".")[2]) for path in settable)
    paths = {name: path for path in settable if short[name := _squeeze(path.rpartition(".")[2])] == 1}
    paths |= {_squeeze(path): path for path in settable}
    known = {paths[_squeeze(name)]: value for name, value in values.items() if _squeeze(name) in paths and value != ""}
    return known, {name for name in values if _squeeze(name) not in paths}


def _squeeze(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def to_toml_rows(config: SystemConfig) -> dict[str, Any]:
    """Every value of a configuration by its dotted path, in the order of the structs."""
    rows: dict[str, Any] = {}
    for path in _leaves(SystemConfig):
        value: Any = config
        for part in path.split("."):
            value = getattr(value, part)
        rows[path] = value
    return rows


def origins(config: SystemConfig, store: ConfigStore, overrides: Mapping[str, Value]) -> dict[str, str]:
    """Where each effective value comes from: `override`, `file` or `default`, by dotted path."""
    written = store.written(config.name)
    found = {}
    for path in _leaves(SystemConfig):
        found[path] = "override" if path in overrides else "file" if path in written else "default"
    return found


class ConfigStore:
    """The installed configurations, by name and alias.

    `folders` are searched after the shipped ones; a file `mri/mine.toml` in one of them is called `mri/mine` and replaces a
    shipped configuration of that name. An alias in a folder takes the place of the same alias in what was there before; two
    files of one folder with the same alias are an error.
    """

    def __init__(self, folders: Iterable[Path] = ()) -> None:
        self._texts: dict[str, tuple[str, str]] = {}
        self._layers: dict[str, int] = {}
        for domain in ("mri", "pat"):
            for item in resources.files("scanside.configs").joinpath(domain).iterdir():
                if item.name.endswith(".toml"):
                    self._add(f"{domain}/{item.name[:-5]}", item, item.name, 0)
        for layer, folder in enumerate(folders, 1):
            if not folder.is_dir():
                raise ConfigError(f"{folder}: no such folder of configurations")
            for path in sorted(folder.glob("*/*.toml")):
                self._add(f"{path.parent.name}/{path.stem}", path, str(path), layer)
        self._configs = {n: read_config(t, name=n, source=s) for n, (t, s) in self._texts.items()}
        self._aliases = self._known_names()

    def _add(self, name: str, file: Traversable, source: str, layer: int) -> None:
        try:
            self._texts[name] = (file.read_text("utf-8"), source)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{source}: cannot be read as UTF-8 text: {error}") from None
        self._layers[name] = layer

    def _known_names(self) -> dict[str, str]:
        """Configuration by every name it may be asked for: full names first, then what later folders say."""
        names = {name: name for name in self._configs}
        for layer in sorted(set(self._layers.values()), reverse=True):
            inside = sorted(name for name, where in self._layers.items() if where == layer)
            aliases: dict[str, str] = {}
            for name in inside:
                for alias in self._configs[name].aliases:
                    if aliases.setdefault(alias, name) != name:
                        files = f"{self._texts[aliases[alias]][1]} and {self._texts[name][1]}"
                        raise ConfigError(f"{files}: both have the alias {alias!r}; take it out of one of them")
            short = {name.partition("/")[2]: name for name in reversed(inside)}
            names = short | aliases | names
        return names

    def names(self) -> list[str]:
        """Names of all configurations, sorted."""
        return sorted(self._configs)

    def get(self, name: str) -> SystemConfig:
        """The configuration called `name`, or that has it as alias. Raises `ConfigError` listing the known names."""
        key = self._aliases.get(name)
        if key is None:
            shown = name if len(name) <= 80 else name[:77] + "..."
            raise ConfigError(f"unknown configuration {shown!r}; {_suggest(name[:80], self._aliases)}")
        return self._configs[key]

    def written(self, name: str) -> set[str]:
        """Dotted paths that the file of a configuration sets itself."""
        paths: set[str] = set()
        for key, value in tomllib.loads(self._texts[name][0]).items():
            paths |= {f"{key}.{k}" for k in value} if isinstance(value, dict) else {key}
        return paths
