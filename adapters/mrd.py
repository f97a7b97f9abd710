"""The messages of MRD version 1 (ISMRMRD, Gadgetron): from frames to arrays and back.

Framing is in `mrd_framing`, the composite bodies of Gadgetron's external nodes are in `mrd_composite`. Nothing here
copies samples or pixels when it decodes: the arrays are read-only views on the received bytes and need not be
aligned. Wire format: ISMRMRD 1.15 `ismrmrd.h` and Gadgetron 4.7 `core/readers`, `core/writers`; `docs/wire.md`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from scanside.engine.errors import ConfigError, PeerError
from scanside.engine.headers import ACQUISITION_HEADER, IMAGE_HEADER, PIXEL_TYPES, WAVEFORM_HEADER, AcquisitionFlag
from scanside.engine.messages import AcquisitionBatch, Image, WaveformRecord

from . import nhlbi
from .mrd_framing import Frame, Framer
from .mrd_lengths import ACQUISITION_FIELDS, ACQUISITION_START, COMPRESSED, CONFIG_FILE_BYTES, ID_BYTES, MessageId
from .mrd_meta import meta_from_xml, meta_to_xml
from .mrd_xml import decode_text

__all__ = [
    "Dicom",
    "Frame",
    "Framer",
    "MessageId",
    "Query",
    "Response",
    "acquisitions",
    "content",
    "dependency",
    "dicom",
    "encode_acquisitions",
    "encode_close",
    "encode_compressed",
    "encode_config_file",
    "encode_config_text",
    "encode_dependency",
    "encode_dicom",
    "encode_error",
    "encode_header",
    "encode_image",
    "encode_query",
    "encode_response",
    "encode_text",
    "encode_waveform",
    "error",
    "image",
    "query",
    "response",
    "text",
    "waveform",
]

ZFP_REFUSAL = "ZFP-compressed acquisitions are not supported"
IMAGE_START = ID_BYTES + 206
WAVEFORM_START = ID_BYTES + 40
COUNTED_TEXTS = frozenset({MessageId.CONFIG_TEXT, MessageId.HEADER, MessageId.TEXT})
U16_MAX = 65535


class Query(msgspec.Struct, frozen=True):
    """A question of a client; the answer repeats `correlation`."""

    correlation: int
    text: str


class Response(msgspec.Struct, frozen=True):
    """Answer to the query of the same `correlation`."""

    correlation: int
    text: str


class Dicom(msgspec.Struct, frozen=True, eq=False):
    """A DICOM data set with the file name and attributes that its sender proposes."""

    data: memoryview
    name: str
    meta: dict[str, list[str]] = {}


def acquisitions(frame: Frame, received: float) -> AcquisitionBatch:
    """The readouts of a frame; `received` is the monotonic time in s at which its last byte was read.

    Headers (n,), samples (n, channels, samples) and trajectory (n, samples, dimensions) are strided views on the
    frame. Blocks in NHLBI compression are decoded and their flag is cleared, on a copy. Raises PeerError for ZFP
    compression or a bad block.
    """
    _expect(frame, MessageId.ACQUISITION)
    _, flags, samples, channels, dimensions = ACQUISITION_FIELDS.unpack_from(frame.view)
    count, size = frame.count, frame.size
    headers = np.ndarray((count,), ACQUISITION_HEADER, frame.view, ID_BYTES, (size,))
    trajectory, start = None, ACQUISITION_START
    if dimensions:
        strides = (size, 4 * dimensions, 4)
        trajectory = np.ndarray((count, samples, dimensions), "<f4", frame.view, start, strides)
        start += 4 * samples * dimensions
    if flags & COMPRESSED:
        headers, values = _decompressed(frame, headers, start, (1, channels, samples))
    else:
        values = np.ndarray((count, channels, samples), "<c8", frame.view, start, (size, 8 * samples, 8))
    return AcquisitionBatch(headers=headers, samples=values, trajectory=trajectory, received=received)


def _decompressed(
    frame: Frame, headers: np.ndarray, start: int, shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    if int(headers["flags"][0]) & AcquisitionFlag.COMPRESSION1.bit:
        raise PeerError(ZFP_REFUSAL, offset=frame.offset)
    floats = 2 * shape[1] * shape[2]
    values = nhlbi.decode(frame.view[start + 4 :], floats, offset=frame.offset).view("<c8").reshape(shape)
    headers = headers.copy()
    headers["flags"] &= np.uint64(~COMPRESSED & (1 << 64) - 1)
    headers.flags.writeable = values.flags.writeable = False
    return headers, values


def image(frame: Frame) -> Image:
    """The image of a frame; header () and pixels (channels, z, y, x) are views.

    Raises PeerError for attributes that are no meta XML.
    """
    _expect(frame, MessageId.IMAGE)
    header = np.ndarray((), IMAGE_HEADER, frame.view, ID_BYTES)
    attributes = int.from_bytes(frame.view[IMAGE_START - 8 : IMAGE_START], "little")
    start = IMAGE_START + attributes
    x, y, z = header["matrix_size"].tolist()
    shape = (int(header["channels"]), z, y, x)
    pixels = np.ndarray(shape, PIXEL_TYPES[int(header["data_type"])], frame.view, start)
    return Image(header=header, pixels=pixels, meta=meta_from_xml(frame.view[IMAGE_START:start], offset=frame.offset))


def waveform(frame: Frame) -> WaveformRecord:
    """The waveform of a frame; header () and samples uint32 (channels, samples) are views."""
    _expect(frame, MessageId.WAVEFORM)
    header = np.ndarray((), WAVEFORM_HEADER, frame.view, ID_BYTES)
    shape = (int(header["channels"]), int(header["number_of_samples"]))
    return WaveformRecord(header=header, samples=np.ndarray(shape, "<u4", frame.view, WAVEFORM_START))


def content(frame: Frame) -> memoryview:
    """The bytes of a config file name (all 1024), config text, header or text message, as received."""
    if frame.id == MessageId.CONFIG_FILE:
        return frame.body
    _expect(frame, *COUNTED_TEXTS)
    return frame.body[4:]


def text(frame: Frame) -> str:
    """The string of a config file name, config text, header or text message, up to its first NUL.

    Raises PeerError when it is not UTF-8.
    """
    return decode_text(content(frame), f"message {MessageId(frame.id).name}", offset=frame.offset)


def query(frame: Frame) -> Query:
    """The question of a frame. Raises PeerError when it is not UTF-8."""
    _expect(frame, MessageId.QUERY)
    (correlation,) = struct.unpack_from("<Q", frame.body, 8)
    return Query(correlation, decode_text(frame.body[24:], "query", offset=frame.offset))


def response(frame: Frame) -> Response:
    """The answer of a frame. Raises PeerError when it is not UTF-8."""
    _expect(frame, MessageId.RESPONSE)
    (correlation,) = struct.unpack_from("<Q", frame.body)
    return Response(correlation, decode_text(frame.body[16:], "response", offset=frame.offset))


def error(frame: Frame) -> str:
    """The text of an external node's error. Raises PeerError when it is not UTF-8."""
    _expect(frame, MessageId.ERROR)
    return decode_text(frame.body[8:], "error text", offset=frame.offset)


def dicom(frame: Frame) -> Dicom:
    """The DICOM data set of a frame, as a view. Raises PeerError when its name or attributes are malformed."""
    _expect(frame, MessageId.DICOM)
    data, rest = _counted("<I", frame.body)
    name, rest = _counted("<Q", rest)
    meta, _ = _counted("<Q", rest)
    name_text = decode_text(name, "DICOM file name", offset=frame.offset)
    return Dicom(data, name_text, meta_from_xml(meta, offset=frame.offset))


def dependency(frame: Frame) -> dict[str, list[str]]:
    """The attributes of an answer to a dependency query. Raises PeerError when they are no meta XML."""
    _expect(frame, MessageId.DEPENDENCY)
    return meta_from_xml(frame.body[8:], offset=frame.offset)


def encode_config_file(name: str) -> bytes:
    """Message that asks for the configuration called `name`. Raises ConfigError when it has no room in 1023 bytes."""
    raw = name.encode()
    if len(raw) >= CONFIG_FILE_BYTES or b"\0" in raw:
        raise ConfigError(
            f"configuration name has {len(raw)} bytes or a NUL; at most {CONFIG_FILE_BYTES - 1} bytes are allowed"
        )
    return struct.pack(f"<H{CONFIG_FILE_BYTES}s", MessageId.CONFIG_FILE, raw)


def encode_config_text(config: str | bytes) -> bytes:
    """Message with a whole configuration."""
    return _short(MessageId.CONFIG_TEXT, config)


def encode_header(xml: str | bytes) -> bytes:
    """Message with a scan's XML header; bytes go out unchanged."""
    return _short(MessageId.HEADER, xml)


def encode_text(sentence: str) -> bytes:
    """Message for the operator's console."""
    return _short(MessageId.TEXT, sentence)


def encode_close() -> bytes:
    """The last message of either side."""
    return struct.pack("<H", MessageId.CLOSE)


def encode_query(question: Query) -> bytes:
    """Message with a question."""
    raw = question.text.encode()
    return struct.pack("<HQQQ", MessageId.QUERY, 0, question.correlation, len(raw)) + raw


def encode_response(answer: Response) -> bytes:
    """Message with an answer."""
    raw = answer.text.encode()
    return struct.pack("<HQQ", MessageId.RESPONSE, answer.correlation, len(raw)) + raw


def encode_error(sentence: str) -> bytes:
    """Message with which an external node fails its parent's scan; never for a scanner client."""
    raw = sentence.encode()
    return struct.pack("<HQ", MessageId.ERROR, len(raw)) + raw


def encode_dicom(item: Dicom) -> list[bytes | memoryview]:
    """Buffers of a DICOM message; the data set is not copied."""
    name, meta = item.name.encode(), meta_to_xml(item.meta)
    head = struct.pack("<HI", MessageId.DICOM, len(item.data))
    return [head, item.data, struct.pack("<Q", len(name)) + name + struct.pack("<Q", len(meta)) + meta]


def encode_dependency(meta: Mapping[str, Sequence[str]]) -> bytes:
    """Message that answers a dependency query."""
    raw = meta_to_xml(meta)
    return struct.pack("<HQ", MessageId.DEPENDENCY, len(raw)) + raw


def encode_acquisitions(batch: AcquisitionBatch) -> bytes:
    """The messages of a batch, one after the other.

    number_of_samples, active_channels and trajectory_dimensions are set from the arrays and compression flags are
    cleared. Raises ValueError when the arrays do not belong together or do not fit the header's fields.
    """
    headers, trajectory = _wire_headers(batch)
    count, channels, samples = batch.samples.shape
    dimensions = trajectory.shape[2]
    start = ACQUISITION_START + 4 * samples * dimensions
    size = start + 8 * channels * samples
    out = bytearray(count * size)
    np.ndarray((count,), "<u2", out, 0, (size,))[...] = MessageId.ACQUISITION
    np.ndarray((count,), ACQUISITION_HEADER, out, ID_BYTES, (size,))[...] = headers
    np.ndarray(trajectory.shape, "<f4", out, ACQUISITION_START, (size, 4 * dimensions, 4))[...] = trajectory
    np.ndarray(batch.samples.shape, "<c8", out, start, (size, 8 * samples, 8))[...] = batch.samples
    return bytes(out)


def encode_compressed(batch: AcquisitionBatch, bits: int) -> bytes:
    """The messages of a batch in NHLBI compression of `bits` bits per float.

    Raises ValueError as `encode_acquisitions`.
    """
    headers, trajectory = _wire_headers(batch)
    headers["flags"] |= np.uint64(AcquisitionFlag.COMPRESSION2.bit)
    parts = []
    for header, points, values in zip(headers, trajectory, batch.samples, strict=True):
        block = nhlbi.encode(values, bits)
        parts += [struct.pack("<H", MessageId.ACQUISITION), header.tobytes(), points.tobytes()]
        parts += [struct.pack("<I", len(block)), block]
    return b"".join(parts)


def _wire_headers(batch: AcquisitionBatch) -> tuple[np.ndarray, np.ndarray]:
    """Headers that agree with the arrays, and the trajectory as (n, samples, dimensions) with 0 dimensions for none."""
    count, channels, samples = batch.samples.shape
    trajectory = batch.trajectory if batch.trajectory is not None else np.empty((count, samples, 0), "<f4")
    if len(batch) != count or trajectory.shape[:2] != (count, samples):
        raise ValueError(
            f"{len(batch)} headers, samples {batch.samples.shape} and trajectory {trajectory.shape} do not agree"
        )
    if not 1 <= channels <= U16_MAX or not 1 <= samples <= U16_MAX:
        raise ValueError(
            f"{channels} channels of {samples} samples do not fit an acquisition header; each must be 1 to {U16_MAX}"
        )
    headers = np.array(batch.headers, ACQUISITION_HEADER)
    headers["flags"] &= np.uint64(~COMPRESSED & (1 << 64) - 1)
    headers["number_of_samples"] = samples
    headers["active_channels"] = channels
    headers["trajectory_dimensions"] = trajectory.shape[2]
    return headers, np.ascontiguousarray(trajectory, "<f4")


def encode_waveform(record: WaveformRecord) -> bytes:
    """Message with a waveform; its channels and number_of_samples are set from the array."""
    samples = np.ascontiguousarray(record.samples, "<u4")
    header = np.zeros((), WAVEFORM_HEADER)  # with its padding
    for name in WAVEFORM_HEADER.names or ():
        header[name] = record.header[name]
    header["channels"], header["number_of_samples"] = samples.shape
    return struct.pack("<H", MessageId.WAVEFORM) + header.tobytes() + samples.tobytes()


def encode_image(item: Image) -> list[bytes | memoryview]:
    """Buffers of an image message: id with header and attribute length, attributes, pixels (not copied when
    contiguous).

    data_type, matrix_size, channels and attribute_string_len are set from pixels and attributes. Raises ValueError
    when the pixels have a type or shape that the header cannot say.
    """
    pixels = item.pixels
    if pixels.ndim != 4 or not all(1 <= length <= U16_MAX for length in pixels.shape):
        raise ValueError(f"pixels have shape {pixels.shape}; expected (channels, z, y, x), each 1 to {U16_MAX}")
    wire = pixels.dtype.newbyteorder("<")
    kind = next((kind for kind, dtype in PIXEL_TYPES.items() if dtype == wire), None)
    if kind is None:
        raise ValueError(
            f"pixels have type {pixels.dtype}; allowed are {', '.join(str(d) for d in PIXEL_TYPES.values())}"
        )
    attributes = meta_to_xml(item.meta)
    header = np.array(item.header, IMAGE_HEADER)
    header["data_type"] = kind
    header["channels"] = pixels.shape[0]
    header["matrix_size"] = pixels.shape[:0:-1]
    header["attribute_string_len"] = len(attributes)
    head = struct.pack("<H", MessageId.IMAGE) + header.tobytes() + struct.pack("<Q", len(attributes))
    return [head, attributes, np.ascontiguousarray(pixels, wire).reshape(-1).view(np.uint8).data]


def _short(ident: MessageId, content: str | bytes) -> bytes:
    raw = content.encode() if isinstance(content, str) else content
    return struct.pack("<HI", ident, len(raw)) + raw


def _counted(width: str, view: memoryview) -> tuple[memoryview, memoryview]:
    """What a leading byte count counts, and what follows it."""
    (count,) = struct.unpack_from(width, view)
    start = struct.calcsize(width)
    return view[start : start + count], view[start + count :]


def _expect(frame: Frame, *idents: MessageId) -> None:
    if frame.id not in idents:
        names = " or ".join(ident.name for ident in idents)
        raise PeerError(
            f"message {frame.id} ({MessageId(frame.id).name}) stands where {names} is expected", offset=frame.offset
        )
