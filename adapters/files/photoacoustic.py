"""Stored photoacoustic scans, whatever their format: a header, and frames that are read when they are asked for.

`open_recording` takes IPASC HDF5 files, iThera's `.msot` with its `.bin`, and `.npz` files of plain numbers with a geometry
file in TOML::

    sampling_rate_hz = 50e6
    speed_of_sound = 1500        # m/s
    [ring]                       # or: positions = "positions.npy", (elements, 3) in m
    radius_m = 0.0438
    span_degrees = 360           # counter-clockwise from first_degrees; an arc ends with its last element
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Self

import msgspec
import numpy as np
from scanside.adapters.photoacoustic import header_from_message, header_message
from scanside.engine.errors import ConfigError
from scanside.engine.limits import DEFAULT_LIMITS, Limits
from scanside.engine.messages import PhotoacousticFrame, PhotoacousticHeader

__all__ = ["Geometry", "Quantizer", "Recording", "Ring", "new_stream", "open_recording", "read_npz"]

_FULL_SCALE = 32000
"""Counts that the largest of real numbers becomes."""
_SIGNALS = ("sinogram", "signals", "sensor_data", "data")
"""Names under which an `.npz` file may hold its signals, in this order."""
_AXES = 3


def new_stream(seed: str) -> str:
    """A stream id that is always the same for the same seed."""
    return hashlib.sha256(seed.encode()).hexdigest()[:32]


class Recording:
    """A stored scan; a context manager.

    header: as a device would send it. `len()` is the number of frames.
    """

    def __init__(
        self,
        path: Path,
        header: PhotoacousticHeader,
        order: Sequence[int],
        read: Callable[[int], PhotoacousticFrame],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.path, self.header = path, header
        self._order, self._read, self._close = order, read, close

    def __len__(self) -> int:
        return len(self._order)

    def frames(self) -> Iterator[PhotoacousticFrame]:
        """All frames in their order, one after the other."""
        return map(self._read, self._order)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()


class Quantizer(msgspec.Struct, frozen=True):
    """Makes 16-bit integers of stored numbers. step: value of one count where they were real; 1 where they were such integers."""

    data_type: Literal["int16", "uint16"]
    step: float = 1.0

    @classmethod
    def of(cls, dtype: np.dtype[Any], parts: Iterable[np.ndarray]) -> Quantizer:
        """The one for numbers of a type; for real ones all parts are looked at. Raises ValueError for complex or no numbers."""
        if dtype == np.uint16:
            return cls("uint16")
        if dtype == np.int16:
            return cls("int16")
        if dtype.kind not in "fiu":
            raise ValueError(f"samples are {dtype}; real numbers are due")
        largest = max((float(np.abs(np.asarray(part, np.float64)).max(initial=0.0)) for part in parts), default=0.0)
        if not np.isfinite(largest):
            raise ValueError("samples are not all finite")
        return cls("int16", largest / _FULL_SCALE or 1.0)

    def integers(self, samples: np.ndarray) -> np.ndarray:
        """The samples as little-endian 16-bit integers."""
        if self.step == 1.0 and samples.dtype.kind in "iu":
            return np.ascontiguousarray(samples, "<i2" if self.data_type == "int16" else "<u2")
        return np.rint(np.asarray(samples, np.float64) / self.step).astype("<i2")


class Ring(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Elements on a circle around the origin, in the plane x3 = 0."""

    radius_m: Annotated[float, msgspec.Meta(gt=0, le=100)]
    span_degrees: Annotated[float, msgspec.Meta(ge=-360, le=360)] = 360.0
    first_degrees: float = 0.0

    def positions(self, elements: int) -> np.ndarray:
        """Positions (elements, 3) in m; a whole circle does not repeat the first, an arc ends with the last."""
        whole = abs(self.span_degrees) == 360
        angles = np.radians(self.first_degrees + np.linspace(0, self.span_degrees, elements, endpoint=not whole))
        return self.radius_m * np.stack([np.cos(angles), np.sin(angles), np.zeros(elements)], axis=1)


class Geometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a file of plain numbers does not say."""

    sampling_rate_hz: Annotated[float, msgspec.Meta(gt=0)]
    speed_of_sound: float = 1500.0
    t0_samples: float = 0.0
    adc_offset: float = 0.0
    wavelengths_m: tuple[float, ...] = (800e-9,)
    ring: Ring | None = None
    positions: str = ""
    """File with the positions, (elements, 3) or (3, elements) in m, `.npy` or `.npz`; relative to the geometry file."""
    field_of_view_m: tuple[float, float, float, float] | None = None
    pixels: tuple[int, int] | None = None
    dead_elements: tuple[int, ...] = ()
    first_sample: Annotated[int, msgspec.Meta(ge=0)] = 0
    last_sample: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Samples outside are set to rest, as they hold the laser or echoes; 0: up to the end."""


def _geometry(path: Path) -> Geometry:
    try:
        return msgspec.convert(tomllib.loads(path.read_text("utf-8")), Geometry)
    except OSError as error:
        raise ConfigError(f"{path}: the geometry cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path}: not a geometry: {error}; see `scanside send --help`") from None


def _positions(geometry: Geometry, path: Path, elements: int) -> np.ndarray:
    if (geometry.ring is None) == (not geometry.positions):
        raise ConfigError(f"{path}: give either [ring] or positions")
    if geometry.ring is not None:
        return geometry.ring.positions(elements)
    place = path.parent / geometry.positions
    positions = _numbers(place, ("positions",)).astype(np.float64)
    positions = positions.T if positions.ndim == 2 and positions.shape[0] == _AXES != positions.shape[1] else positions
    if positions.shape != (elements, _AXES):
        raise ConfigError(f"{place}: positions have shape {positions.shape}, the data needs ({elements}, {_AXES})")
    return positions


def _numbers(path: Path, names: Sequence[str]) -> np.ndarray:
    """The array of a `.npy` file, or the one of an `.npz` file that has one of the names, or that is alone in it."""
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            found = next((name for name in names if name in loaded.files), None)
            if found is None and len(loaded.files) != 1:
                raise ConfigError(f"{path} holds {', '.join(loaded.files)}; expected one of {', '.join(names)}")
            return np.asarray(loaded[found or loaded.files[0]])
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        raise ConfigError(f"{path}: not a file of plain arrays: {error}") from None


def read_npz(path: Path, geometry: Path | None = None, limits: Limits = DEFAULT_LIMITS) -> Recording:
    """Signals of an `.npz` or `.npy` file: (elements, samples), or (frames, elements, samples).

    geometry: a TOML file; by default the one beside it with the same name. Real numbers become int16. Raises ConfigError for
    files that are not what they should be, PeerError for a geometry that no measurement can have.
    """
    described = geometry or path.with_suffix(".toml")
    if not described.exists():
        raise ConfigError(f"{path} has no geometry: give --geometry FILE, or put {described.name} beside it")
    wanted, signals = _geometry(described), _numbers(path, _SIGNALS)
    if signals.ndim not in (2, 3) or not signals.size:
        raise ConfigError(
            f"{path}: signals have shape {signals.shape}; expected (elements, samples) or (frames, elements, samples)"
        )
    frames = signals.reshape(-1, *signals.shape[-2:])
    try:
        quantizer = Quantizer.of(frames.dtype, frames)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    header = PhotoacousticHeader(
        stream=new_stream(str(path.resolve())),
        elements=frames.shape[1],
        samples=frames.shape[2],
        data_type=quantizer.data_type,
        positions_m=_positions(wanted, described, frames.shape[1]),
        sampling_rate_hz=wanted.sampling_rate_hz,
        wavelengths_m=wanted.wavelengths_m,
        speed_of_sound=wanted.speed_of_sound,
        t0_samples=wanted.t0_samples,
        adc_offset=wanted.adc_offset,
        dead=wanted.dead_elements,
        pixels=wanted.pixels,
        field_of_view_m=wanted.field_of_view_m,
        details={"device": {"general": {"unique_identifier": path.stem[:256]}}},
    )
    header = header_from_message(header_message(header), limits)
    outside = _outside(wanted, frames.shape[2])

    def frame(index: int) -> PhotoacousticFrame:
        samples = quantizer.integers(frames[index])
        samples[:, outside] = round(wanted.adc_offset)
        return PhotoacousticFrame(seq=index, shot=index, samples=samples, wavelength=index % len(wanted.wavelengths_m))

    return Recording(path, header, range(len(frames)), frame)


def _outside(geometry: Geometry, samples: int) -> np.ndarray:
    numbers = np.arange(samples)
    return (numbers < geometry.first_sample) | (numbers >= (geometry.last_sample or samples))


def open_recording(path: Path, geometry: Path | None = None, limits: Limits = DEFAULT_LIMITS) -> Recording:
    """Open a stored scan by what its name ends with. Raises ConfigError for a file that is none, StreamError for one that is
    damaged.
    """
    from .ipasc import read_ipasc  # the readers need what is defined above
    from .msot import read_msot

    ending = path.suffix.lower()
    if not path.exists():
        raise ConfigError(f"{path}: no such file")
    if ending in (".npz", ".npy"):
        return read_npz(path, geometry, limits)
    if geometry is not None:
        raise ConfigError(f"{path} has its own geometry; --geometry is for .npz files")
    if ending in (".h5", ".hdf5", ".hdf"):
        return read_ipasc(path, limits)
    if ending == ".msot" or path.is_dir():
        return read_msot(path, limits)
    raise ConfigError(
        f"{path}: unknown kind of file; known: .hdf5 and .h5 (IPASC), .msot (iThera), .npz and .npy with a geometry"
    )
