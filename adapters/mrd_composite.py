"""The composite messages of Gadgetron's external nodes and workers: buffers (1023), image arrays (1024), buckets
(1050).

Arrays keep Gadgetron's axis order, first axis fastest in memory (Fortran order), and are read-only views on the
received bytes. Layouts: Gadgetron 4.7 `core/io/primitives.h`, `mri_core/readers` and `writers`; checked byte by byte
against captured streams.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
from scanside.engine.errors import PeerError
from scanside.engine.headers import ACQUISITION_HEADER, IMAGE_HEADER, WAVEFORM_HEADER
from scanside.engine.messages import AcquisitionBatch, WaveformRecord

from .mrd_framing import Frame
from .mrd_lengths import MessageId

__all__ = [
    "SAMPLING",
    "STATISTICS",
    "Bucket",
    "BucketPart",
    "Buffered",
    "ImageArray",
    "ReconBit",
    "bucket",
    "encode_bucket",
    "encode_image_array",
    "encode_recon_data",
    "image_array",
    "recon_data",
]

RANGE = np.dtype([("minimum", "<u2"), ("center", "<u2"), ("maximum", "<u2")])
SAMPLING = np.dtype(
    [
        ("encoded_fov", "<f4", (3,)),
        ("recon_fov", "<f4", (3,)),
        ("encoded_matrix", "<u2", (3,)),
        ("recon_matrix", "<u2", (3,)),
        ("limits", RANGE, (3,)),
        ("padding", "<u2"),
    ]
)
"""Field of view in mm, matrix and sampled range along readout, encoding steps 1 and 2."""
STATISTICS = (
    "kspace_encode_step_1",
    "kspace_encode_step_2",
    "slice",
    "phase",
    "contrast",
    "repetition",
    "set",
    "segment",
    "average",
)
"""Counters whose values a bucket lists, in the order of the wire."""
BUCKET_META = struct.Struct("<13Q")

Buffers = list[bytes | memoryview]


class Buffered(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """K-space of one encoding space, sorted.

    samples: complex64 [E0, E1, E2, CHA, N, S, LOC]; trajectory: float32 [TRAJ, E0, E1, E2, N, S, LOC] or None;
    density: float32 [E0, E1, E2, N, S, LOC] or None; headers: [E1, E2, N, S, LOC], number_of_samples 0 where nothing
    was sampled; sampling: one SAMPLING record.
    """

    samples: np.ndarray
    headers: np.ndarray
    sampling: np.ndarray
    trajectory: np.ndarray | None = None
    density: np.ndarray | None = None


class ReconBit(msgspec.Struct, frozen=True, eq=False):
    """Imaging data of one encoding space and its calibration lines, if any."""

    data: Buffered
    reference: Buffered | None = None


class ImageArray(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Images of one geometry.

    images: complex64 [X, Y, Z, CHA, N, S, LOC]; headers: IMAGE_HEADER [N, S, LOC]; meta: attribute texts as received;
    waveforms, acquisition_headers [Y, Z, N, S, LOC]: None where absent.
    """

    images: np.ndarray
    headers: np.ndarray
    meta: tuple[bytes, ...] = ()
    waveforms: tuple[WaveformRecord, ...] | None = None
    acquisition_headers: np.ndarray | None = None


class BucketPart(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Acquisitions of a bucket, unsorted.

    headers: (n,); trajectory: float32, all points of all acquisitions one after the other; samples: complex64,
    likewise; statistics: values of each counter in STATISTICS, per encoding space.
    """

    headers: np.ndarray
    trajectory: np.ndarray
    samples: np.ndarray
    statistics: tuple[dict[str, np.ndarray], ...] = ()

    def batches(self, received: float) -> Iterator[AcquisitionBatch]:
        """Runs of consecutive acquisitions of one shape, as views; `received` is the monotonic time in s."""
        shapes = _shapes(self.headers)
        edges = np.flatnonzero(np.any(shapes[1:] != shapes[:-1], axis=1)) + 1
        point = value = 0
        for first, last in zip([0, *edges], [*edges, len(shapes)], strict=True):
            if first == last:
                return
            (samples, channels, dimensions), count = shapes[first].tolist(), int(last - first)
            points, values = count * samples * dimensions, count * channels * samples
            trajectory = self.trajectory[point : point + points].reshape(count, samples, dimensions)
            yield AcquisitionBatch(
                headers=self.headers[first:last],
                samples=self.samples[value : value + values].reshape(count, channels, samples),
                trajectory=trajectory if dimensions else None,
                received=received,
            )
            point, value = point + points, value + values


class Bucket(msgspec.Struct, frozen=True, eq=False):
    """What arrived between two triggers: imaging and calibration acquisitions (some are in both) and waveforms."""

    imaging: BucketPart
    calibration: BucketPart
    waveforms: tuple[WaveformRecord, ...] = ()


def recon_data(frame: Frame) -> tuple[ReconBit, ...]:
    """The buffers of a frame, one per encoding space. Raises PeerError when lengths inside do not agree."""
    cursor = _Cursor(frame, MessageId.RECON_DATA)
    bits = []
    for _ in range(cursor.u64()):
        data = _read_buffered(cursor)
        bits.append(ReconBit(data, _read_buffered(cursor) if cursor.flag() else None))
    cursor.finish()
    return tuple(bits)


def image_array(frame: Frame) -> ImageArray:
    """The image array of a frame. Raises PeerError when lengths inside do not agree."""
    cursor = _Cursor(frame, MessageId.IMAGE_ARRAY)
    images, headers = cursor.array("<c8"), cursor.array(IMAGE_HEADER)
    meta = tuple(bytes(cursor.take(cursor.u64())) for _ in range(cursor.u64()))
    waveforms = tuple(_read_waveform(cursor) for _ in range(cursor.u64())) if cursor.flag() else None
    acquisition_headers = cursor.array(ACQUISITION_HEADER) if cursor.flag() else None
    cursor.finish()
    return ImageArray(
        images=images, headers=headers, meta=meta, waveforms=waveforms, acquisition_headers=acquisition_headers
    )


def bucket(frame: Frame) -> Bucket:
    """The bucket of a frame. Raises PeerError when the sizes in its table do not agree with its headers."""
    cursor = _Cursor(frame, MessageId.BUCKET)
    table = BUCKET_META.unpack(cursor.take(BUCKET_META.size))
    imaging = _read_part(cursor, table[0:4], table[8])
    calibration = _read_part(cursor, table[4:8], table[9])
    headers = cursor.records(WAVEFORM_HEADER, table[10], table[11])
    end = cursor.at + table[12]
    waveforms = tuple(_waveform_samples(cursor, header) for header in headers)
    if cursor.at != end:
        raise cursor.wrong(f"waveforms have {cursor.at - end + table[12]} bytes where {table[12]} are declared")
    cursor.finish()
    return Bucket(imaging, calibration, waveforms)


def encode_recon_data(bits: Sequence[ReconBit]) -> Buffers:
    """Buffers of a message with `bits`; contiguous (Fortran order) arrays are not copied."""
    out: Buffers = [struct.pack("<HQ", MessageId.RECON_DATA, len(bits))]
    for bit in bits:
        out += _write_buffered(bit.data)
        out += _optional(None if bit.reference is None else _write_buffered(bit.reference))
    return out


def encode_image_array(item: ImageArray) -> Buffers:
    """Buffers of a message with an image array; contiguous (Fortran order) arrays are not copied."""
    out: Buffers = [struct.pack("<H", MessageId.IMAGE_ARRAY)]
    out += _write_array(item.images, "<c8") + _write_array(item.headers, IMAGE_HEADER)
    out.append(struct.pack("<Q", len(item.meta)))
    out += [struct.pack("<Q", len(text)) + text for text in item.meta]
    waves = item.waveforms
    out += _optional(None if waves is None else [struct.pack("<Q", len(waves)), *map(_write_waveform, waves)])
    acquisitions = item.acquisition_headers
    return out + _optional(None if acquisitions is None else _write_array(acquisitions, ACQUISITION_HEADER))


def encode_bucket(item: Bucket) -> Buffers:
    """Buffers of a message with a bucket; contiguous arrays are not copied."""
    parts = [_write_part(part) for part in (item.imaging, item.calibration)]
    headers = b"".join(wave.header.tobytes() for wave in item.waveforms)
    samples = b"".join(wave.samples.astype("<u4").tobytes() for wave in item.waveforms)
    table: list[int] = []
    for part, (head, trajectory, values, _) in zip((item.imaging, item.calibration), parts, strict=True):
        table += [len(part.headers), len(head), len(values), len(trajectory)]
    table += [len(parts[0][3]), len(parts[1][3]), len(item.waveforms), len(headers), len(samples)]
    return [struct.pack("<H", MessageId.BUCKET) + BUCKET_META.pack(*table), *parts[0], *parts[1], headers, samples]


class _Cursor:
    """Reads a composite body from front to back."""

    def __init__(self, frame: Frame, ident: MessageId) -> None:
        if frame.id != ident:
            raise PeerError(f"message {frame.id} stands where {ident.name} is expected", offset=frame.offset)
        self._view = frame.body
        self._offset = frame.offset
        self._name = ident.name
        self.at = 0

    def wrong(self, what: str) -> PeerError:
        """The error that says what is inconsistent."""
        return PeerError(f"message {self._name}: {what}", offset=self._offset)

    def take(self, nbytes: int) -> memoryview:
        """The next bytes."""
        start, self.at = self.at, self.at + nbytes
        if self.at > len(self._view):
            raise self.wrong(f"its fields need {self.at} bytes, it has {len(self._view)}")
        return self._view[start : self.at]

    def u64(self) -> int:
        """The next count."""
        return int.from_bytes(self.take(8), "little")

    def flag(self) -> bool:
        """Whether an optional part follows."""
        return self.take(1)[0] == 1

    def array(self, dtype: np.dtype[np.void] | str) -> np.ndarray:
        """The next array with its axes; one without axes is empty."""
        axes = self.u64()
        shape = struct.unpack(f"<{axes}Q", self.take(8 * axes)) or (0,)
        kind = np.dtype(dtype)
        size = kind.itemsize * int(np.prod(shape, dtype=object))
        return np.ndarray(shape, kind, self.take(size), order="F")

    def records(self, dtype: np.dtype[np.void] | str, count: int, nbytes: int) -> np.ndarray:
        """The next `count` items, which must take `nbytes`."""
        kind = np.dtype(dtype)
        if nbytes != count * kind.itemsize:
            raise self.wrong(f"{count} items of {kind.itemsize} bytes are declared to take {nbytes} bytes")
        return np.ndarray((count,), kind, self.take(nbytes))

    def finish(self) -> None:
        """Check that nothing is left over."""
        if self.at != len(self._view):
            raise self.wrong(f"its fields need {self.at} bytes, it has {len(self._view)}")


def _read_buffered(cursor: _Cursor) -> Buffered:
    samples = cursor.array("<c8")
    trajectory = cursor.array("<f4") if cursor.flag() else None
    density = cursor.array("<f4") if cursor.flag() else None
    headers = cursor.array(ACQUISITION_HEADER)
    sampling = np.ndarray((), SAMPLING, cursor.take(SAMPLING.itemsize))
    return Buffered(samples=samples, headers=headers, sampling=sampling, trajectory=trajectory, density=density)


def _read_waveform(cursor: _Cursor) -> WaveformRecord:
    return _waveform_samples(cursor, np.ndarray((), WAVEFORM_HEADER, cursor.take(WAVEFORM_HEADER.itemsize)))


def _waveform_samples(cursor: _Cursor, header: np.ndarray) -> WaveformRecord:
    shape = (int(header["channels"]), int(header["number_of_samples"]))
    data = cursor.take(4 * shape[0] * shape[1])
    return WaveformRecord(header=np.asarray(header), samples=np.ndarray(shape, "<u4", data))


def _shapes(headers: np.ndarray) -> np.ndarray:
    """number_of_samples, active_channels, trajectory_dimensions per header, int64 (n, 3)."""
    names = ("number_of_samples", "active_channels", "trajectory_dimensions")
    return np.stack([headers[name].astype(np.int64) for name in names], axis=1)


def _read_part(cursor: _Cursor, sizes: tuple[int, ...], statistics_bytes: int) -> BucketPart:
    count, header_bytes, data_bytes, trajectory_bytes = sizes
    headers = cursor.records(ACQUISITION_HEADER, count, header_bytes)
    samples, channels, dimensions = _shapes(headers).T
    trajectory = cursor.records("<f4", int(samples @ dimensions), trajectory_bytes)
    values = cursor.records("<c8", int(samples @ channels), data_bytes)
    end = cursor.at + statistics_bytes
    statistics = tuple(_read_statistics(cursor) for _ in range(cursor.u64() if statistics_bytes else 0))
    if cursor.at != end:
        raise cursor.wrong(f"statistics end at byte {cursor.at} of its body, declared is {end}")
    return BucketPart(headers=headers, trajectory=trajectory, samples=values, statistics=statistics)


def _read_statistics(cursor: _Cursor) -> dict[str, np.ndarray]:
    found = {}
    for name in STATISTICS:
        count = cursor.u64()
        found[name] = np.ndarray((count,), "<u2", cursor.take(2 * count))
    return found


def _write_array(array: np.ndarray, dtype: np.dtype[np.void] | str) -> Buffers:
    axes = 0 if array.shape == (0,) else array.ndim
    flat = np.asfortranarray(array, dtype).reshape(-1, order="F")
    return [struct.pack(f"<Q{axes}Q", axes, *array.shape[:axes]), flat.view(np.uint8).data]


def _optional(content: Buffers | None) -> Buffers:
    return [b"\0"] if content is None else [b"\1", *content]


def _write_buffered(item: Buffered) -> Buffers:
    out = _write_array(item.samples, "<c8")
    for extra in (item.trajectory, item.density):
        out += _optional(None if extra is None else _write_array(extra, "<f4"))
    return [*out, *_write_array(item.headers, ACQUISITION_HEADER), item.sampling.astype(SAMPLING).tobytes()]


def _write_waveform(wave: WaveformRecord) -> bytes:
    return bytes(wave.header.tobytes() + wave.samples.astype("<u4").tobytes())


def _write_part(part: BucketPart) -> tuple[bytes, memoryview, memoryview, bytes]:
    statistics = [struct.pack("<Q", len(part.statistics))]
    for space in part.statistics:
        values = [space[name].astype("<u2") for name in STATISTICS]
        statistics += [struct.pack("<Q", len(value)) + value.tobytes() for value in values]
    trajectory = np.ascontiguousarray(part.trajectory, "<f4").view(np.uint8).data
    samples = np.ascontiguousarray(part.samples, "<c8").view(np.uint8).data
    return part.headers.astype(ACQUISITION_HEADER).tobytes(), trajectory, samples, b"".join(statistics)
