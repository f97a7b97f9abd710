"""IPASC HDF5 files (consensus data format V1): photoacoustic time series in and out.

`/binary_time_series_data` is (detectors, samples, wavelengths, measurements); `/meta_data` and `/meta_data_device` hold the
tags of the format, "None" where a value is not known. What it has no tag for lies in `/x_scanside`: numbers of frames and
shots, -1 where a cell was never measured, and the delay.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import msgspec
import numpy as np
from scanside.adapters.photoacoustic import (
    AXES,
    POSE_NUMBERS,
    Acquisition,
    Detectors,
    Extra,
    General,
    Header,
    Illuminator,
    header_from_message,
    header_message,
)
from scanside.engine.errors import ConfigError, DeliveryError, PeerError, StreamError
from scanside.engine.limits import DEFAULT_LIMITS, Limits
from scanside.engine.messages import PhotoacousticFrame, PhotoacousticHeader

from .photoacoustic import Quantizer, Recording, new_stream

__all__ = ["IpascWriter", "read_ipasc", "write_ipasc"]

_DATA, _ACQUISITION, _DEVICE, _OURS = "binary_time_series_data", "meta_data", "meta_data_device", "x_scanside"
_DIMENSIONS, _FULL, _PAIR_AXES = (2, 3, 4), 4, 2
_ILLUMINATOR = "illumination_element_"
_TUPLES = {"field_of_view", "pixels", "dead_elements"}
_BLOCK = 64
"""Measurements by which the file grows."""
_VECTORS = {"detector_position", "detector_orientation"}
_PAIRS = {"angular_response", "beam_energy_profile", "beam_stability_profile", "beam_intensity_profile"}
"""Stored as two rows: what it depends on, and the value."""
_PER_FRAME = ("measurement_timestamps", "pulse_energy", "temperature_control")


class IpascWriter:
    """Writes one stream as it comes; a context manager. Frames may come in parts, late, and with gaps.

    Each wavelength of each round has a cell of its own; a cell that nothing was measured for keeps the reading of an element at
    rest, and says so in `/x_scanside/seq`. Raises DeliveryError when the file cannot be written.
    """

    def __init__(self, path: Path, header: PhotoacousticHeader) -> None:
        self.path, self._header = path, header
        self._wavelengths = len(header.wavelengths_m)
        self._shape = (header.elements, header.samples)
        self._cells: dict[int, tuple[int, int]] = {}
        self._round, self._last = 0, -1
        self._written = 0
        self._columns: dict[str, dict[tuple[int, int], float]] = {name: {} for name in _PER_FRAME}
        self._numbers: dict[str, dict[tuple[int, int], int]] = {"seq": {}, "shot": {}}
        self._poses: dict[tuple[int, int], tuple[float, ...]] = {}
        try:
            self._file = h5py.File(path, "x", locking=False)
        except OSError as error:
            raise DeliveryError(f"{path}: the recording cannot be made: {error}") from None
        dtype = np.dtype("<i2" if header.data_type == "int16" else "<u2")
        self._data = self._file.create_dataset(
            _DATA,
            shape=(*self._shape, self._wavelengths, 0),
            maxshape=(*self._shape, self._wavelengths, None),
            chunks=(*self._shape, 1, 1),
            dtype=dtype,
            fillvalue=round(header.adc_offset),
        )

    def add(self, frame: PhotoacousticFrame) -> None:
        """Put a frame into its cell."""
        cell = self._cell(frame)
        self._grow(cell[1] + 1)
        if len(frame.samples) == self._shape[0]:
            self._data.id.write_direct_chunk((0, 0, *cell), np.ascontiguousarray(frame.samples))
        else:
            rows = slice(frame.first_element, frame.first_element + len(frame.samples))
            self._data[rows, :, cell[0], cell[1]] = frame.samples
        self._note(frame, cell)

    def _cell(self, frame: PhotoacousticFrame) -> tuple[int, int]:
        """Wavelength and round of a shot: a round ends where its wavelength is there already."""
        found = self._cells.get(frame.shot)
        if found is None:
            if self._last >= frame.wavelength:
                self._round += 1
            self._last = frame.wavelength
            found = self._cells[frame.shot] = frame.wavelength, self._round
        return found

    def _grow(self, measurements: int) -> None:
        self._written = max(self._written, measurements)
        if measurements > self._data.shape[3]:
            self._data.resize(self._data.shape[3] + _BLOCK, axis=3)
            self._file.flush()

    def _note(self, frame: PhotoacousticFrame, cell: tuple[int, int]) -> None:
        values = (frame.timestamp_s, frame.pulse_energy_joule, frame.temperature_kelvin)
        for name, value in zip(_PER_FRAME, values, strict=True):
            if value is not None:
                self._columns[name][cell] = value
        self._numbers["seq"].setdefault(cell, frame.seq)
        self._numbers["shot"][cell] = frame.shot
        if frame.pose is not None:
            self._poses[cell] = frame.pose

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write the metadata and close the file."""
        if not self._file:
            return
        self._data.resize(self._written, axis=3)
        message = header_message(self._header)
        _write_tree(self._file, _ACQUISITION, self._acquisition(message))
        _write_tree(self._file, _DEVICE, _device(message, self._header))
        _write_tree(self._file, _OURS, self._ours(message))
        self._file.close()

    def _acquisition(self, message: Header) -> dict[str, Any]:
        fields = msgspec.structs.asdict(message.acquisition)
        gains = ("time_gain_compensation", "element_dependent_gain", "frequency_domain_filter")
        fields |= {name: _array(fields[name]) for name in gains}
        fields["sizes"] = np.array([*self._shape, self._wavelengths, self._written])
        fields["acquisition_wavelengths"] = np.array(fields["acquisition_wavelengths"])
        regions = fields["regions_of_interest"]
        fields["regions_of_interest"] = {name: _array(value) for name, value in regions.items()} if regions else None
        fields |= {name: self._table(cells, np.nan) for name, cells in self._columns.items() if cells}
        if self._poses:
            fields["measurement_spatial_poses"] = np.array(
                [self._poses[cell] for cell in sorted(self._poses, key=_order)]
            )
        return {name: fields.get(name) for name in (*fields, *_PER_FRAME, "measurement_spatial_poses")}

    def _table(self, cells: Mapping[tuple[int, int], float], empty: float) -> np.ndarray:
        """One number per cell, wavelength by wavelength within each measurement."""
        table = np.full(
            (self._written, self._wavelengths), empty, dtype=np.int64 if isinstance(empty, int) else np.float64
        )
        for (wavelength, measurement), value in cells.items():
            table[measurement, wavelength] = value
        return np.asarray(table.ravel())

    def _ours(self, message: Header) -> dict[str, Any]:
        extra = msgspec.structs.asdict(message.x_scanside)
        extra = {
            name: value if np.isscalar(value) else np.array(value) for name, value in extra.items() if value is not None
        }
        numbers = {name: self._table(cells, -1) for name, cells in self._numbers.items()}
        return {"stream": message.stream, **extra, **numbers}


def _order(cell: tuple[int, int]) -> tuple[int, int]:
    return cell[1], cell[0]


def _array(data: bytes | None) -> np.ndarray | None:
    return None if data is None else np.frombuffer(data, "<f8")


def _tags(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Values as IPASC has them: bytes as arrays, pairs as two rows."""
    found = {}
    for name, value in fields.items():
        array = _array(value) if isinstance(value, bytes) else value
        found[name] = array.reshape(-1, 2).T if name in _PAIRS and isinstance(array, np.ndarray) else array
    return found


def _device(message: Header, header: PhotoacousticHeader) -> dict[str, Any]:
    general, detectors = message.device.general, msgspec.structs.asdict(message.device.detectors)
    places = {name: np.frombuffer(detectors.pop(name) or b"", "<f8").reshape(-1, 3) for name in sorted(_VECTORS)}
    if not len(places["detector_orientation"]):
        places["detector_orientation"] = _inwards(header.positions_m)
    shared = _tags(detectors)
    elements = {
        f"detection_element_{index}": {**{name: rows[index] for name, rows in places.items()}, **shared}
        for index in range(header.elements)
    }
    illuminators = {
        f"{_ILLUMINATOR}{name}": _tags(msgspec.structs.asdict(value))
        for name, value in message.device.illuminators.items()
    }
    return {
        "general": {
            "unique_identifier": general.unique_identifier,
            "field_of_view": np.array(general.field_of_view or _extent(header.positions_m)),
            "num_detectors": header.elements,
            "num_illuminators": len(illuminators),
        },
        "detectors": elements,
        "illuminators": illuminators,
    }


def _inwards(positions: np.ndarray) -> np.ndarray:
    """Orientations towards the middle of the elements, where the stream gave none."""
    towards = positions.mean(axis=0) - positions
    lengths = np.linalg.norm(towards, axis=1, keepdims=True)
    return np.asarray(np.divide(towards, lengths, out=np.zeros_like(towards), where=lengths > 0))


def _extent(positions: np.ndarray) -> list[float]:
    """The box around the elements, where the stream gave no field of view."""
    return np.stack([positions.min(axis=0), positions.max(axis=0)], axis=1).ravel().tolist()


def _write_tree(file: h5py.File, path: str, fields: Mapping[str, Any]) -> None:
    group = file.require_group(path)
    for name, value in fields.items():
        if isinstance(value, Mapping):
            _write_tree(file, f"{path}/{name}", value)
        else:
            group[name] = "None" if value is None else value


def write_ipasc(path: Path, header: PhotoacousticHeader, frames: Iterable[PhotoacousticFrame]) -> int:
    """Write a whole recording; returns the number of frames. Raises DeliveryError when the file is there already."""
    count = 0
    with IpascWriter(path, header) as writer:
        for frame in frames:
            writer.add(frame)
            count += 1
    return count


# --- reading -----------------------------------------------------------------------------------------------------------------


def read_ipasc(path: Path, limits: Limits = DEFAULT_LIMITS) -> Recording:
    """Open an IPASC file; frames are read when they are asked for. A context manager, through `Recording`.

    Raises ConfigError for what is no such file, StreamError naming the tag for one that cannot be used.
    """
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        raise ConfigError(f"{path}: not an HDF5 file that can be read: {error}") from None
    try:
        return _open(path, file, limits)
    except (KeyError, ValueError, TypeError, msgspec.ValidationError) as error:
        file.close()
        raise StreamError(f"{path}: not the IPASC file that it should be: {error}") from None
    except BaseException:
        file.close()
        raise


def _open(path: Path, file: h5py.File, limits: Limits) -> Recording:
    data = file[_DATA]
    if data.ndim not in _DIMENSIONS:
        raise ValueError(f"{_DATA} has {data.ndim} dimensions; detectors, samples, wavelengths, measurements are due")
    acquisition = _tree(file[_ACQUISITION])
    ours = _tree(file[_OURS]) if _OURS in file else {}
    shape = (*data.shape, 1, 1)[:4]
    quantizer = Quantizer.of(data.dtype, (data[..., m] for m in range(shape[3])) if data.ndim == _FULL else [data])
    header = _header(acquisition, _tree(file[_DEVICE]), ours, shape, quantizer, limits)
    cells = _Cells(acquisition, ours, shape)

    def frame(index: int) -> PhotoacousticFrame:
        measurement, wavelength = divmod(index, shape[2])
        raw = data[(slice(None), slice(None), wavelength, measurement)[: data.ndim]]
        return cells.frame(index, wavelength, quantizer.integers(np.asarray(raw)))

    return Recording(path, header, cells.measured(), frame, file.close)


class _Cells:
    """What the file says of each cell; cells count wavelength by wavelength within each measurement."""

    def __init__(self, acquisition: Mapping[str, Any], ours: Mapping[str, Any], shape: tuple[int, ...]) -> None:
        self._count = shape[2] * shape[3]
        self._columns = [self._column(acquisition.get(name), shape[3]) for name in _PER_FRAME]
        self._seq, self._shot = (self._column(ours.get(name), shape[3]) for name in ("seq", "shot"))
        poses = acquisition.get("measurement_spatial_poses")
        self._poses = None if poses is None else np.asarray(poses, np.float64).reshape(len(np.atleast_1d(poses)), -1)

    def _column(self, values: object, measurements: int) -> np.ndarray | None:
        """One number for each cell; files of others have one for each measurement."""
        if values is None or isinstance(values, str):
            return None
        flat = np.asarray(values).ravel()
        if len(flat) == measurements != self._count:
            flat = np.repeat(flat, self._count // measurements)
        return flat if len(flat) == self._count else None

    def measured(self) -> list[int]:
        """Cells that were measured, in the order of their frames."""
        if self._seq is None:
            return list(range(self._count))
        return [int(i) for i in np.argsort(self._seq, kind="stable") if self._seq[i] >= 0]

    def frame(self, index: int, wavelength: int, samples: np.ndarray) -> PhotoacousticFrame:
        """The frame in a cell."""
        time_s, energy, temperature = (None if c is None else _finite(float(c[index])) for c in self._columns)
        pose = None
        if self._poses is not None and self._poses.shape == (self._count, POSE_NUMBERS):
            pose = tuple(self._poses[index].tolist())
        return PhotoacousticFrame(
            seq=index if self._seq is None else int(self._seq[index]),
            shot=index if self._shot is None else int(self._shot[index]),
            samples=samples,
            wavelength=wavelength,
            timestamp_s=max(0.0, time_s or 0.0),
            pulse_energy_joule=energy or None,
            temperature_kelvin=temperature,
            pose=pose,
        )


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _header(
    acquisition: dict[str, Any],
    device: dict[str, Any],
    ours: dict[str, Any],
    shape: tuple[int, ...],
    quantizer: Quantizer,
    limits: Limits,
) -> PhotoacousticHeader:
    detectors = [device["detectors"][name] for name in sorted(device["detectors"], key=_natural)]
    if len(detectors) != shape[0]:
        raise PeerError(f"{len(detectors)} detection elements are described, the data has {shape[0]}")
    wavelengths = acquisition.pop("acquisition_wavelengths", None)
    speed = acquisition.pop("speed_of_sound", None)
    fields = {
        "type": "header",
        "schema": "PAT1.0",
        "stream": ours.get("stream") or new_stream(str(acquisition["uuid"])),
        "acquisition": {
            **_wire(Acquisition, acquisition),
            **{"encoding": "raw", "compression": "none", "dimensionality": "time", "data_type": quantizer.data_type},
            "sizes": shape[:2],
            "acquisition_wavelengths": _wavelengths(wavelengths, shape[2]),
            "speed_of_sound": None if speed is None else float(np.mean(speed)),
        },
        "device": {
            "general": _wire(General, device["general"]) | {"num_detectors": shape[0]},
            "detectors": _detectors(detectors),
            "illuminators": {
                name.removeprefix(_ILLUMINATOR): _wire(Illuminator, value)
                for name, value in device.get("illuminators", {}).items()
            },
        },
        "x_scanside": _wire(Extra, ours),
    }
    return header_from_message(msgspec.convert(fields, Header), limits)


def _wavelengths(values: object, count: int) -> list[float]:
    if values is None:
        return [800e-9] * count  # the format does not demand them; images need none
    flat = [float(value) for value in np.ravel(np.asarray(values))]
    if len(flat) != count:
        raise PeerError(f"acquisition_wavelengths has {len(flat)} numbers, the data {count} wavelengths")
    return flat


def _detectors(elements: list[dict[str, Any]]) -> dict[str, Any]:
    shared = _wire(Detectors, {name: value for name, value in elements[0].items() if name not in _VECTORS})
    for name in sorted(_VECTORS):
        rows = [element.get(name) for element in elements]
        if all(row is not None and np.size(row) == AXES for row in rows):
            shared[name] = np.array([np.asarray(row).ravel() for row in rows], "<f8").tobytes()
    return shared


def _wire(kind: type[msgspec.Struct], tree: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a group that the wire has a field for, as the wire has them."""
    return {name: _plain(name, tree[name]) for name in kind.__struct_fields__ if tree.get(name) is not None}


def _plain(name: str, value: Any) -> Any:  # noqa: ANN401 - whatever the file holds
    if isinstance(value, dict):
        return {key: _plain(key, inner) for key, inner in value.items()}
    if not isinstance(value, np.ndarray):
        return value
    if name in _TUPLES:
        return value.ravel().tolist()
    pairs = name in _PAIRS and value.ndim == _PAIR_AXES
    return np.ascontiguousarray(value.T if pairs else value, "<f8").tobytes()


def _tree(group: h5py.Group) -> dict[str, Any]:
    """A group as nested dicts: arrays, numbers and text; "None" is None."""
    found: dict[str, Any] = {}
    for name, item in group.items():
        value = _tree(item) if isinstance(item, h5py.Group) else item[()]
        value = value.decode("utf-8") if isinstance(value, bytes) else value
        value = value.item() if isinstance(value, np.generic) else value
        found[name] = None if isinstance(value, str) and value == "None" else value
    return found


def _natural(name: str) -> list[int | str]:
    """Order in which element 2 comes before element 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
