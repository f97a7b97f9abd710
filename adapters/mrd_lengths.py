"""How long each MRD version 1 message is, told from its own length fields as soon as they have arrived.

The stream has no frame length: every message is a two-byte id and a body whose size follows from fields inside it.
Each rule here is a generator that yields how many bytes it needs (counted from the id), is sent a view that has at
least as many, and returns the size of the whole message. It looks at each field once, whatever the pieces in which
the bytes arrive, and checks every declared size against the limits before anybody allocates for it. Sources:
Gadgetron 4.7 readers and ISMRMRD 1.15 (`ismrmrd/serialization.h`).
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Generator
from math import prod

from scanside.engine.errors import PeerError
from scanside.engine.headers import PIXEL_TYPES, AcquisitionFlag
from scanside.engine.limits import Limits

__all__ = [
    "ACQUISITION_FIELDS",
    "ACQUISITION_START",
    "COMPRESSED",
    "CONFIG_FILE_BYTES",
    "ID_BYTES",
    "Length",
    "MessageId",
    "acquisition_size",
    "length_rule",
]

ID_BYTES = 2
CONFIG_FILE_BYTES = 1024
ACQUISITION_START = ID_BYTES + 340
"""Bytes of an acquisition message before its trajectory."""
COMPRESSED = AcquisitionFlag.COMPRESSION1.bit | AcquisitionFlag.COMPRESSION2.bit
MAX_DIMENSIONS = 16
"""Most axes of an array inside a composite body; Gadgetron uses seven."""

ACQUISITION_FIELDS = struct.Struct("<H2xQ24xH2xH136xH")
"""id, flags, number_of_samples, active_channels, trajectory_dimensions of an acquisition message."""
IMAGE_FIELDS = struct.Struct("<4xH12x3H12xH")
"""data_type, matrix_size[3], channels of an image message."""
U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")

Length = Generator[int, memoryview, int]


class MessageId(enum.IntEnum):
    """Ids of the messages of a session (Gadgetron `MessageID.h`, ISMRMRD 1.15)."""

    CONFIG_FILE = 1
    CONFIG_TEXT = 2
    HEADER = 3
    CLOSE = 4
    TEXT = 5
    QUERY = 6
    RESPONSE = 7
    ERROR = 8
    ACQUISITION = 1008
    CLOUD_JOB = 1013
    GADGETCLOUD_JOB = 1014
    DICOM = 1018
    DEPENDENCY = 1019
    IMAGE = 1022
    RECON_DATA = 1023
    IMAGE_ARRAY = 1024
    WAVEFORM = 1026
    NDARRAY = 1030
    BUCKET = 1050
    BUNDLE = 1051


_CLOUD = "is a Gadgetron cloud job, which no server supports any more; send acquisitions (1008) instead"
_TYPED = "is a typed message that was deprecated with MRD 1.0; send acquisitions (1008) and images (1022) instead"
_REFUSED: dict[int, str] = {
    **dict.fromkeys((*range(1001, 1008), *range(1009, 1013), 1015, 1016, 1017, 1020, 1021), _TYPED),
    MessageId.CLOUD_JOB: _CLOUD,
    MessageId.GADGETCLOUD_JOB: _CLOUD,
    MessageId.NDARRAY: "is an NDARRAY, whose axis order differs between its two writers; send images (1022) instead",
    MessageId.BUNDLE: "is a BUNDLE, which is declared but has no defined body; send buckets (1050) instead",
}


def acquisition_size(samples: int, channels: int, dimensions: int, limits: Limits, offset: int) -> int:
    """Bytes of an uncompressed acquisition message with its id.

    Raises PeerError when it has no samples or no channels, LimitExceeded when a size is above its limit.
    """
    if not samples or not channels:
        raise PeerError(
            f"acquisition declares {samples} samples of {channels} active channels; both must be at least 1",
            offset=offset,
        )
    limits.check("channels", channels, what="active_channels of an acquisition", offset=offset)
    limits.check("samples", samples, what="number_of_samples of an acquisition", offset=offset)
    limits.check("trajectory_dimensions", dimensions, what="trajectory_dimensions of an acquisition", offset=offset)
    size = ACQUISITION_START + samples * (4 * dimensions + 8 * channels)
    limits.check("acquisition_bytes", size, what="size of an acquisition in bytes", offset=offset)
    return size


def _acquisition(limits: Limits, offset: int) -> Length:
    view = yield ACQUISITION_START
    _, flags, samples, channels, dimensions = ACQUISITION_FIELDS.unpack_from(view)
    size = acquisition_size(samples, channels, dimensions, limits, offset)
    if not flags & COMPRESSED:
        return size
    data = ACQUISITION_START + 4 * samples * dimensions
    view = yield data + 4
    size = data + 4 + U32.unpack_from(view, data)[0]
    limits.check("acquisition_bytes", size, what="size of a compressed acquisition in bytes", offset=offset)
    return int(size)


def _image(limits: Limits, offset: int) -> Length:
    view = yield ID_BYTES + 206
    data_type, *matrix, channels = IMAGE_FIELDS.unpack_from(view)
    if data_type not in PIXEL_TYPES:
        raise PeerError(f"image has data_type {data_type}; allowed are 1 to 8", offset=offset)
    if not all(matrix) or not channels:
        raise PeerError(
            f"image has matrix_size {matrix} and {channels} channels; all must be at least 1", offset=offset
        )
    attributes = U64.unpack_from(view, ID_BYTES + 198)[0]
    limits.check("attribute_bytes", attributes, what="attribute length of an image in bytes", offset=offset)
    size = ID_BYTES + 206 + attributes + prod(matrix) * channels * PIXEL_TYPES[data_type].itemsize
    limits.check("message_bytes", size, what="size of an image in bytes", offset=offset)
    return int(size)


def _waveform(limits: Limits, offset: int) -> Length:
    view = yield ID_BYTES + 40
    samples, channels = struct.unpack_from("<HH", view, ID_BYTES + 28)
    size = ID_BYTES + 40 + 4 * samples * channels
    limits.check("message_bytes", size, what="size of a waveform in bytes", offset=offset)
    return int(size)


def _fixed(size: int) -> Callable[[Limits, int], Length]:
    def rule(_limits: Limits, _offset: int) -> Length:
        yield ID_BYTES
        return size

    return rule


def _counted(name: str, field: str, prefix: int, width: struct.Struct) -> Callable[[Limits, int], Length]:
    """Rule of a body that is `prefix` bytes, a byte count, and as many bytes."""

    def rule(limits: Limits, offset: int) -> Length:
        start = ID_BYTES + prefix + width.size
        view = yield start
        count = int(width.unpack_from(view, ID_BYTES + prefix)[0])
        limits.check(field, count, what=f"length of {name} in bytes", offset=offset)
        return start + count

    return rule


def _query(limits: Limits, offset: int) -> Length:
    view = yield ID_BYTES + 8
    reserved = U64.unpack_from(view, ID_BYTES)[0]
    if reserved:
        raise PeerError(f"reserved field of a query is {reserved}; it must be 0", offset=offset)
    return (yield from _counted("a query", "text_bytes", 16, U64)(limits, offset))


def _dicom(limits: Limits, offset: int) -> Length:
    at = ID_BYTES
    for name, field, width in (
        ("a DICOM data set", "message_bytes", U32),
        ("a DICOM file name", "config_bytes", U64),
        ("DICOM attributes", "attribute_bytes", U64),
    ):
        view = yield at + width.size
        count = width.unpack_from(view, at)[0]
        limits.check(field, count, what=f"length of {name} in bytes", offset=offset)
        at += width.size + count
    return at


def _count(at: int, what: str, limits: Limits, offset: int) -> Generator[int, memoryview, int]:
    """The u64 at `at`, checked as a number of items or bytes."""
    view = yield at + 8
    count = int(U64.unpack_from(view, at)[0])
    limits.check("message_bytes", count, what=what, offset=offset)
    return count


def _array(at: int, itemsize: int, limits: Limits, offset: int) -> Length:
    """End of an array (u64 number of axes, u64 per axis, items) that starts at `at`."""
    axes = yield from _count(at, "number of axes of an array", limits, offset)
    if axes > MAX_DIMENSIONS:
        raise PeerError(f"an array declares {axes} axes; at most {MAX_DIMENSIONS} are allowed", offset=offset)
    at += 8
    view = yield at + 8 * axes
    shape = struct.unpack_from(f"<{axes}Q", view, at)
    # Axes of length 0 count as 1 here, so that no other axis of an empty array can be absurd.
    span = prod(max(length, 1) for length in shape) * itemsize
    limits.check("message_bytes", at + 8 * axes + span, what="size of a message with arrays in bytes", offset=offset)
    return at + 8 * axes + (span if axes and all(shape) else 0)


def _flag(at: int, offset: int) -> Generator[int, memoryview, bool]:
    view = yield at + 1
    if view[at] > 1:
        raise PeerError(f"a presence flag is {view[at]}; it must be 0 or 1", offset=offset)
    return bool(view[at])


def _buffered(at: int, limits: Limits, offset: int) -> Length:
    at = yield from _array(at, 8, limits, offset)
    for itemsize in (4, 4):  # trajectory, density
        present = yield from _flag(at, offset)
        at = (yield from _array(at + 1, itemsize, limits, offset)) if present else at + 1
    return (yield from _array(at, 340, limits, offset)) + 56


def _recon_data(limits: Limits, offset: int) -> Length:
    bits = yield from _count(ID_BYTES, "number of buffers of a message", limits, offset)
    limits.check("encodings", bits, what="number of buffers of a message", offset=offset)
    at = ID_BYTES + 8
    for _ in range(bits):
        at = yield from _buffered(at, limits, offset)
        present = yield from _flag(at, offset)
        at = (yield from _buffered(at + 1, limits, offset)) if present else at + 1
        limits.check("message_bytes", at, what="size of a buffer message in bytes", offset=offset)
    return at


def _image_array(limits: Limits, offset: int) -> Length:
    at = yield from _array(ID_BYTES, 8, limits, offset)
    at = yield from _array(at, 198, limits, offset)
    metas = yield from _count(at, "number of attribute texts of an image array", limits, offset)
    at += 8
    for _ in range(metas):
        count = yield from _count(at, "attribute length of an image array in bytes", limits, offset)
        at += 8 + count
        limits.check("message_bytes", at, what="size of an image array in bytes", offset=offset)
    if (yield from _flag(at, offset)):
        at = yield from _waveforms(at + 1, limits, offset)
    else:
        at += 1
    present = yield from _flag(at, offset)
    return (yield from _array(at + 1, 340, limits, offset)) if present else at + 1


def _waveforms(at: int, limits: Limits, offset: int) -> Length:
    count = yield from _count(at, "number of waveforms of an image array", limits, offset)
    at += 8
    for _ in range(count):
        view = yield at + 40
        samples, channels = struct.unpack_from("<HH", view, at + 28)
        at += 40 + 4 * samples * channels
        limits.check("message_bytes", at, what="size of an image array in bytes", offset=offset)
    return at


def _bucket(limits: Limits, offset: int) -> Length:
    view = yield ID_BYTES + 104
    sizes = struct.unpack_from("<13Q", view, ID_BYTES)
    body = sum(sizes) - sizes[0] - sizes[4] - sizes[10]  # those three are counts of items
    limits.check("message_bytes", body, what="size of a bucket in bytes", offset=offset)
    return int(ID_BYTES + 104 + body)


_RULES: dict[int, Callable[[Limits, int], Length]] = {
    MessageId.CONFIG_FILE: _fixed(ID_BYTES + CONFIG_FILE_BYTES),
    MessageId.CONFIG_TEXT: _counted("a configuration text", "config_bytes", 0, U32),
    MessageId.HEADER: _counted("a header", "header_bytes", 0, U32),
    MessageId.CLOSE: _fixed(ID_BYTES),
    MessageId.TEXT: _counted("a text", "text_bytes", 0, U32),
    MessageId.QUERY: _query,
    MessageId.RESPONSE: _counted("a response", "text_bytes", 8, U64),
    MessageId.ERROR: _counted("an error text", "text_bytes", 0, U64),
    MessageId.ACQUISITION: _acquisition,
    MessageId.DICOM: _dicom,
    MessageId.DEPENDENCY: _counted("dependency attributes", "attribute_bytes", 0, U64),
    MessageId.IMAGE: _image,
    MessageId.RECON_DATA: _recon_data,
    MessageId.IMAGE_ARRAY: _image_array,
    MessageId.WAVEFORM: _waveform,
    MessageId.BUCKET: _bucket,
}


def length_rule(ident: int, limits: Limits, offset: int) -> Length:
    """The length rule of the message `ident` that starts at byte `offset` of the stream.

    Raises PeerError, with the reason, for an id that is unknown, deprecated or not supported: without its length the
    rest of the stream is lost.
    """
    rule = _RULES.get(ident)
    if rule is None:
        known = ", ".join(str(int(each)) for each in _RULES)
        why = _REFUSED.get(ident, f"is unknown; known are {known}")
        raise PeerError(f"message id {ident} {why}", offset=offset)
    return rule(limits, offset)
