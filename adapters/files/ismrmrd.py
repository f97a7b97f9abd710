"""ISMRMRD files (HDF5): scans in and out, images out, as `ismrmrd` 1.4 to 1.15 lay them out.

A group, by convention "dataset", holds `xml` (one string), `data` (one record per readout: head, traj, data),
`waveforms`, and one group per image series with `header`, `attributes` and `data`. Readouts are read in blocks, in the
order of the file; files are read without an HDF5 lock, so that one file serves any number of readers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import h5py
import numpy as np
from scanside.adapters.mrd_meta import meta_from_xml, meta_to_xml
from scanside.engine.errors import ConfigError, DeliveryError, StreamError, TruncatedMessage
from scanside.engine.headers import ACQUISITION_HEADER, IMAGE_HEADER, PIXEL_TYPES, WAVEFORM_HEADER
from scanside.engine.messages import AcquisitionBatch, Image, ScanHeader, WaveformRecord

from .ismrmrd_xml import header_xml

__all__ = ["Progress", "ScanFile", "header_xml", "open_scan", "write_images", "write_scan"]

Progress = Callable[[int, int], None]
"""Called with the readouts done and the readouts there are."""

_BLOCK = 256
"""Readouts per access to the file; one readout at a time is ten times slower."""
_ACQUISITION = np.dtype(
    [("head", ACQUISITION_HEADER), ("traj", h5py.vlen_dtype(np.float32)), ("data", h5py.vlen_dtype(np.float32))]
)
_WAVEFORM = np.dtype([("head", WAVEFORM_HEADER), ("data", h5py.vlen_dtype(np.uint32))])
_COMPLEX = {
    np.dtype("<c8"): np.dtype([("real", "<f4"), ("imag", "<f4")]),
    np.dtype("<c16"): np.dtype([("real", "<f8"), ("imag", "<f8")]),
}
"""How the format stores complex pixels."""
_STRING = h5py.string_dtype("ascii")
"""Text is UTF-8 nevertheless; the C library of ISMRMRD cannot read strings that are declared so."""
_IMAGE_PARTS = frozenset({"header", "data"})


class ScanFile:
    """An open ISMRMRD file; a context manager.

    xml: the header of the scan as stored, b"" in a file that holds only images. `len()` is the number of readouts.
    """

    def __init__(self, file: h5py.File, group: h5py.Group) -> None:
        self._file, self._group = file, group
        self._path = Path(file.filename)
        self._data: h5py.Dataset | None = group.get("data")
        self.xml = _text(group["xml"]) if "xml" in group else b""

    def __len__(self) -> int:
        return 0 if self._data is None else int(self._data.shape[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was read stays valid."""
        self._file.close()

    def batches(self, size: int = _BLOCK, *, progress: Progress | None = None) -> Iterator[AcquisitionBatch]:
        """All readouts in the order of the file, consecutive ones of equal shape together, at most `size` in a batch.

        Raises StreamError when there are none, when a block of the file cannot be read, or when a readout holds more or
        fewer numbers than its header says.
        """
        if self._data is None or not len(self):
            raise StreamError(
                f"{self._path} has no readouts in {self._group.name}/data; there is nothing to reconstruct"
            )
        for start in range(0, len(self), _BLOCK):
            stop = min(start + _BLOCK, len(self))
            for run in self._runs(self._data, start, stop):
                yield from _pieces(run, size)
            if progress is not None:
                progress(stop, len(self))

    def waveforms(self) -> Iterator[WaveformRecord]:
        """All waveforms in the order of the file. Raises StreamError as `batches` does."""
        if "waveforms" not in self._group:
            return
        with self._reading("waveforms"):
            rows = self._group["waveforms"][()]
        headers = _by_name(rows["head"], WAVEFORM_HEADER)
        for number, (header, data) in enumerate(zip(headers, rows["data"], strict=True)):
            shape = (int(header["channels"]), int(header["number_of_samples"]))
            self._check_length("waveform", number, len(data), shape[0] * shape[1])
            yield WaveformRecord(header=header, samples=np.asarray(data, np.uint32).reshape(shape))

    def images(self) -> Iterator[Image]:
        """All images, series by series. Raises StreamError for unreadable data, PeerError for malformed attributes."""
        for name, series in self._group.items():
            if not (isinstance(series, h5py.Group) and series.keys() >= _IMAGE_PARTS):
                continue
            for number in range(series["header"].shape[0]):
                with self._reading(f"image {number} of {name}"):
                    header = _by_name(series["header"][number : number + 1], IMAGE_HEADER)[0]
                    pixels = _plain_complex(series["data"][number])
                    attributes = series["attributes"][number] if "attributes" in series else b""
                yield Image(header=header, pixels=pixels, meta=meta_from_xml(_bytes(attributes)))

    def _runs(self, data: h5py.Dataset, start: int, stop: int) -> Iterator[AcquisitionBatch]:
        """Readouts start...stop as one batch per run of equal shape."""
        with self._reading(f"readouts {start} to {stop - 1}"):
            rows = data[start:stop]
        headers = _by_name(rows["head"], ACQUISITION_HEADER)
        shapes = np.stack(
            [headers[name] for name in ("active_channels", "number_of_samples", "trajectory_dimensions")], axis=1
        )
        edges = np.flatnonzero((np.diff(shapes, axis=0) != 0).any(axis=1)) + 1
        for low, high in zip([0, *edges], [*edges, len(rows)], strict=True):
            channels, samples, dimensions = (int(size) for size in shapes[low])
            points = self._stacked("readout", start, rows["data"][low:high], low, 2 * channels * samples)
            trajectory = self._stacked(
                "trajectory of readout", start, rows["traj"][low:high], low, dimensions * samples
            )
            yield AcquisitionBatch(
                headers=headers[low:high],
                samples=points.view(np.complex64).reshape(high - low, channels, samples),
                trajectory=trajectory.reshape(high - low, samples, dimensions) if dimensions else None,
            )

    def _stacked(self, what: str, start: int, rows: np.ndarray, low: int, length: int) -> np.ndarray:
        """The variable-length rows as one float32 array; each must have `length` numbers."""
        stacked = np.empty((len(rows), length), np.float32)
        for place, row in enumerate(rows):
            self._check_length(what, start + low + place, len(row), length)
            stacked[place] = row
        return stacked

    def _check_length(self, what: str, number: int, length: int, expected: int) -> None:
        if length != expected:
            raise StreamError(
                f"{what} {number} of {self._path} has {length} numbers where its header says {expected}; the file is damaged"
            )

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise StreamError(
                f"{what} of {self._path} cannot be read ({error}); copy the file again from its source"
            ) from error


def open_scan(path: str | Path, group: str = "dataset") -> ScanFile:
    """Open an ISMRMRD file for reading, without a lock.

    Raises ConfigError when there is no such file or group, TruncatedMessage when the file ends early, StreamError when it
    is not HDF5, or has neither readouts nor images, or has readouts and no header.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; give the path of an ISMRMRD file")
    file = _opened(path)
    try:
        return ScanFile(file, _checked(file, path, group.strip("/")))
    except BaseException:
        file.close()
        raise


def write_scan(
    path: str | Path,
    header: ScanHeader,
    batches: Iterable[AcquisitionBatch],
    group: str = "dataset",
    waveforms: Iterable[WaveformRecord] = (),
) -> int:
    """Write a scan to a new group of a new or existing file, waveforms after readouts; returns the number of readouts.

    The header goes out as received (`header.xml`), or built from its fields where it has none. Raises ConfigError when the
    group is already there, DeliveryError when the file cannot be written.
    """
    written = 0
    with _target(Path(path), group, header.xml or header_xml(header)) as target:
        data = target.create_dataset("data", (0,), _ACQUISITION, maxshape=(None,), chunks=(_BLOCK,))
        for batch in batches:
            data.resize(written + len(batch), axis=0)
            data[written : written + len(batch)] = _rows(batch)
            written += len(batch)
        records = list(waveforms)
        if records:
            rows = np.empty(len(records), _WAVEFORM)
            for place, record in enumerate(records):
                rows["head"][place], rows["data"][place] = record.header, record.samples.ravel()
            target.create_dataset("waveforms", data=rows)
    return written


def write_images(path: str | Path, images: Iterable[Image], group: str = "dataset", xml: bytes = b"") -> int:
    """Write images to a new group of a new or existing file as they come; returns their number.

    A series goes to `image_<series>`. Its images share one size and pixel type in this format; those that differ go to
    `image_<series>_2` and so on, for no image may be lost. The file is complete on the disk after each image. `xml` is the
    header of the scan. Raises ConfigError when the group is already there, DeliveryError when the file cannot be written.
    """
    written = 0
    with _target(Path(path), group, xml) as target:
        for image in images:
            _append(_series(target, image), image)
            target.file.flush()
            written += 1
    return written


def _opened(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r", locking=False)
    except PermissionError as error:
        raise ConfigError(f"{path} may not be read by this user; change its permissions") from error
    except OSError as error:
        if "truncated file" in str(error):
            raise TruncatedMessage(f"{path} ends early; copy it again from its source ({error})") from error
        raise StreamError(f"{path} is not an HDF5 file that can be read ({error})") from error


def _checked(file: h5py.File, path: Path, name: str) -> h5py.Group:
    """The group with a scan or images; the errors say what there is instead."""
    group = file.get(name) if name else None
    if not isinstance(group, h5py.Group):
        there = ", ".join(repr(key) for key, item in file.items() if isinstance(item, h5py.Group)) or "none"
        raise ConfigError(f"{path} has no group {name!r}; its groups are: {there}")
    images = any(isinstance(item, h5py.Group) and item.keys() >= _IMAGE_PARTS for item in group.values())
    if "data" not in group and not images:
        raise StreamError(f"{path} has neither readouts nor images in group {name!r}; it is no ISMRMRD file")
    if "data" in group and not {"head", "data"} <= set(group["data"].dtype.names or ()):
        raise StreamError(f"{path}: {name}/data has no fields 'head' and 'data'; it is no ISMRMRD file")
    if "data" in group and "xml" not in group:
        raise StreamError(f"{path} has no header {name}/xml; without it the readouts cannot be placed")
    return group


def _text(xml: h5py.Dataset) -> bytes:
    """The one string of `xml`, up to the first NUL."""
    return _bytes(xml[()] if xml.shape == () else xml[0])


def _bytes(text: bytes | str) -> bytes:
    raw = text.encode() if isinstance(text, str) else bytes(text)
    return raw.partition(b"\0")[0]


def _by_name(records: np.ndarray, layout: np.dtype[np.void]) -> np.ndarray:
    """Records of a file in `layout`, whatever the file's padding; fields that the file lacks are 0."""
    out = np.zeros(records.shape, layout)
    for name in set(records.dtype.names or ()) & set(layout.names or ()):
        if layout[name].names:
            out[name] = _by_name(records[name], layout[name])
        else:
            out[name] = records[name]
    return out


def _pieces(run: AcquisitionBatch, size: int) -> Iterator[AcquisitionBatch]:
    """Views of at most `size` readouts."""
    for start in range(0, len(run), size):
        part = slice(start, start + size)
        yield AcquisitionBatch(
            headers=run.headers[part],
            samples=run.samples[part],
            trajectory=None if run.trajectory is None else run.trajectory[part],
        )


def _plain_complex(pixels: np.ndarray) -> np.ndarray:
    """Pairs named real and imag as complex numbers; other pixels as they are."""
    names = pixels.dtype.names
    if not names:
        return pixels
    return np.ascontiguousarray(pixels).view(np.result_type(pixels.dtype[names[0]], np.complex64))


@contextlib.contextmanager
def _target(path: Path, name: str, xml: bytes) -> Iterator[h5py.Group]:
    """A new group in the file at `path`, with the header written."""
    try:
        with h5py.File(path, "a") as file:
            if name in file:
                raise ConfigError(f"{path} already has a group {name!r}; choose another group or remove the file")
            group = file.create_group(name)
            if xml:
                group.create_dataset("xml", (1,), _STRING)[0] = _bytes(xml)
            yield group
    except OSError as error:
        raise DeliveryError(
            f"{path} cannot be written ({error}); check the folder, the space and who else has it open"
        ) from error


def _rows(batch: AcquisitionBatch) -> np.ndarray:
    """Readouts as records of the file."""
    rows = np.empty(len(batch), _ACQUISITION)
    rows["head"] = batch.headers
    for place, samples in enumerate(batch.samples):
        rows["data"][place] = np.ascontiguousarray(samples).view(np.float32).ravel()
        trajectory = () if batch.trajectory is None else batch.trajectory[place].ravel()
        rows["traj"][place] = np.asarray(trajectory, np.float32)
    return rows


def _series(target: h5py.Group, image: Image) -> h5py.Group:
    """The group for images like this one; made where it is not there yet."""
    stored = _stored(image.pixels)
    base = f"image_{int(image.header['image_series_index'])}"
    name, number = base, 1
    while name in target:
        if target[name]["data"].shape[1:] == stored.shape and target[name]["data"].dtype == stored.dtype:
            return target[name]
        number += 1
        name = f"{base}_{number}"
    series = target.create_group(name)
    series.create_dataset("header", (0,), IMAGE_HEADER, maxshape=(None,), chunks=(16,))
    series.create_dataset("attributes", (0,), _STRING, maxshape=(None,), chunks=(16,))
    series.create_dataset(
        "data", (0, *stored.shape), stored.dtype, maxshape=(None, *stored.shape), chunks=(1, *stored.shape)
    )
    return series


def _append(series: h5py.Group, image: Image) -> None:
    attributes, number = meta_to_xml(image.meta), series["header"].shape[0]
    header = image.header.copy()
    header["attribute_string_len"] = len(attributes)
    for name, value in (("header", header), ("attributes", attributes), ("data", _stored(image.pixels))):
        series[name].resize(number + 1, axis=0)
        series[name][number] = value


def _stored(pixels: np.ndarray) -> np.ndarray:
    """Pixels in the types of the format. Raises DeliveryError for a type that it does not have."""
    if pixels.dtype not in PIXEL_TYPES.values():
        raise DeliveryError(f"pixels are {pixels.dtype}, ISMRMRD has {[str(kind) for kind in PIXEL_TYPES.values()]}")
    return np.ascontiguousarray(pixels).view(_COMPLEX.get(pixels.dtype, pixels.dtype))
