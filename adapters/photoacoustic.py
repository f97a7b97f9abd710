"""PAT1: photoacoustic data as bytes, both ways. docs/wire.md is the reference.

A message is a head, "PAT1" and one msgpack map, and for frames the samples as a second buffer, which is never copied here. A
head that arrives is unpacked with every length bounded and without extension types, converted into a strict struct, checked,
and only then turned into what the engine takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Final, Literal

import crc32c
import msgspec
import numpy as np
from scanside.engine.errors import PeerError
from scanside.engine.limits import DEFAULT_LIMITS, Limits
from scanside.engine.messages import EndOfStream, PhotoacousticFrame, PhotoacousticHeader

from .envelope import pack_map, unpack_map

__all__ = [
    "AXES",
    "HEAD_BYTES",
    "MAGIC",
    "POSE_NUMBERS",
    "Acquisition",
    "Detectors",
    "Device",
    "End",
    "Extra",
    "Frame",
    "General",
    "Header",
    "Illuminator",
    "decode",
    "encode_end",
    "encode_frame",
    "encode_header",
    "header_from_message",
    "header_message",
]

MAGIC: Final = b"PAT1"
SCHEMA: Final = "PAT1.0"
HEAD_BYTES: Final = 4096
"""Of every head that is no header."""
DTYPES = {"int16": "<i2", "uint16": "<u2"}
AXES, FIELD_NUMBERS, VIEW_NUMBERS, POSE_NUMBERS = 3, 6, 4, 12
SPEEDS = (300.0, 10000.0)
"""Of sound, in m/s, that any tissue or coupling medium could have."""
LONGEST_M = 100.0
"""No detector array is larger."""

Natural = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=(1 << 31) - 1)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Text = Annotated[str, msgspec.Meta(max_length=256)]
Word = Annotated[str, msgspec.Meta(max_length=32)]
StreamId = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]


class _Map(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What all maps share: unknown fields are refused, fields at their default are not sent."""


class Acquisition(_Map, frozen=True, kw_only=True):
    """What was measured; the fields are tags of IPASC's acquisition metadata."""

    uuid: Name
    encoding: Literal["raw"] = "raw"
    compression: Literal["none"] = "none"
    data_type: Literal["int16", "uint16"]
    dimensionality: Literal["time"] = "time"
    sizes: tuple[Positive, Positive]
    ad_sampling_rate: float
    acquisition_wavelengths: Annotated[tuple[float, ...], msgspec.Meta(min_length=1)]
    speed_of_sound: float | None = None
    measurements_per_image: Positive = 1
    overall_gain: float | None = None
    time_gain_compensation: bytes | None = None
    element_dependent_gain: bytes | None = None
    frequency_domain_filter: bytes | None = None
    acoustic_coupling_agent: Text | None = None
    scanning_method: Text | None = None
    photoacoustic_imaging_device_reference: Text | None = None
    regions_of_interest: dict[Name, bytes] | None = None


class General(_Map, frozen=True, kw_only=True):
    """The device as a whole."""

    unique_identifier: Name
    field_of_view: tuple[float, float, float, float, float, float] | None = None
    num_detectors: Positive
    num_illuminators: Natural = 0


class Detectors(_Map, frozen=True, kw_only=True):
    """All detector elements, as arrays."""

    detector_position: bytes
    detector_orientation: bytes | None = None
    detector_geometry_type: Word | None = None
    detector_geometry: bytes | None = None
    frequency_response: bytes | None = None
    angular_response: bytes | None = None


class Illuminator(_Map, frozen=True, kw_only=True):
    """One source of light; kept for recordings."""

    illuminator_position: bytes | None = None
    illuminator_orientation: bytes | None = None
    illuminator_geometry: bytes | None = None
    illuminator_geometry_type: Word | None = None
    wavelength_range: bytes | None = None
    beam_energy_profile: bytes | None = None
    beam_stability_profile: bytes | None = None
    beam_intensity_profile: bytes | None = None
    intensity_profile_distance: float | None = None
    pulse_width: float | None = None
    beam_divergence_angles: float | None = None


class Device(_Map, frozen=True, kw_only=True):
    """The device: as a whole, its detectors, its light."""

    general: General
    detectors: Detectors
    illuminators: dict[Name, Illuminator] = {}


class Extra(_Map, frozen=True, kw_only=True):
    """What IPASC has no tag for (`x_scanside`)."""

    t0_samples: float = 0.0
    adc_offset: float = 0.0
    lsb_pascal: float | None = None
    dead_elements: tuple[Natural, ...] = ()
    pixels: tuple[Positive, Positive] | None = None
    field_of_view: tuple[float, float, float, float] | None = None


class Header(_Map, frozen=True, kw_only=True, tag_field="type", tag="header"):
    """The first message of a session."""

    schema: Literal["PAT1.0"]
    stream: StreamId
    acquisition: Acquisition
    device: Device
    x_scanside: Extra = Extra()


class Frame(_Map, frozen=True, kw_only=True, tag_field="type", tag="frame"):
    """The head of one frame; its samples follow in a buffer of their own."""

    seq: Natural
    shot: Natural
    bytes: Positive
    det_first: Natural = 0
    det_count: Positive
    wavelength_index: Natural = 0
    measurement_timestamps: float = 0.0
    host_ns: Natural = 0
    pulse_energy: float | None = None
    temperature_control: float | None = None
    measurement_spatial_poses: Annotated[tuple[float, ...], msgspec.Meta(min_length=12, max_length=12)] | None = None
    crc32c: Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)] | None = None
    flags: Annotated[int, msgspec.Meta(ge=0, le=7)] = 0


class End(_Map, frozen=True, kw_only=True, tag_field="type", tag="end"):
    """The last message of a stream."""

    seq_last: Annotated[int, msgspec.Meta(ge=-1)]
    frames_sent: Natural


Message = PhotoacousticHeader | PhotoacousticFrame | EndOfStream
_KINDS: dict[object, type[_Map]] = {"header": Header, "frame": Frame, "end": End}


# --- from bytes --------------------------------------------------------------------------------------------------------------


def decode(
    payload: Sequence[memoryview],
    received: float,
    header: PhotoacousticHeader | None,
    limits: Limits = DEFAULT_LIMITS,
) -> Iterator[Message]:
    """The messages in the payload frames of one `data` envelope; samples are views on them.

    `received`: monotonic time in s of the last byte; `header`: the one in force, by which frames are read. Raises PeerError for
    what docs/wire.md does not allow and LimitExceeded for a declared size above the limits, in both cases before anything is
    allocated for it.
    """
    parts = iter(payload)
    for part in parts:
        head = _head(part, limits)
        if isinstance(head, Header):
            header = header_from_message(head, limits)
            yield header
        elif isinstance(head, Frame):
            samples = next(parts, None)
            if samples is None:
                raise PeerError(
                    f"frame {head.seq} comes without its samples; they are the payload frame behind the head"
                )
            if header is None:
                raise PeerError(f"frame {head.seq} came before the header of the stream; send the header first")
            yield _frame(head, samples, header, received)
        elif isinstance(head, End):
            yield EndOfStream(last=head.seq_last, frames=head.frames_sent)


def _head(part: memoryview, limits: Limits) -> _Map:
    if bytes(part[:4]) != MAGIC:
        raise PeerError(f"payload frame of {len(part)} bytes where the head of a message was due; it starts with PAT1")
    limits.check("photoacoustic_header_bytes", len(part), what="size of a PAT1 head in bytes")
    fields = unpack_map(part[4:], what="PAT1 head", bin_bytes=len(part))
    kind = fields.get("type")
    found = _KINDS.get(kind) if isinstance(kind, str) else None
    if found is None:
        shown = kind[:40] if isinstance(kind, str) else type(kind).__name__
        raise PeerError(f"PAT1 message of unknown type {shown}; known: {', '.join(map(str, _KINDS))}")
    if found is not Header and len(part) > HEAD_BYTES:
        raise PeerError(f"PAT1 {kind} has a head of {len(part)} bytes, the limit is {HEAD_BYTES}")
    try:
        return msgspec.convert(fields, found)
    except msgspec.ValidationError as error:
        raise PeerError(f"PAT1 {kind}: {error}") from None


def _frame(head: Frame, samples: memoryview, header: PhotoacousticHeader, received: float) -> PhotoacousticFrame:
    _check_frame(head, samples, header)
    array = np.frombuffer(samples, DTYPES[header.data_type]).reshape(head.det_count, header.samples)
    pose = head.measurement_spatial_poses
    return PhotoacousticFrame(
        seq=head.seq,
        shot=head.shot,
        samples=array,
        first_element=head.det_first,
        wavelength=head.wavelength_index,
        timestamp_s=head.measurement_timestamps,
        pulse_energy_joule=head.pulse_energy,
        temperature_kelvin=head.temperature_control,
        pose=pose,
        flags=head.flags,
        intact=head.crc32c is None or head.crc32c == crc32c.crc32c(samples),
        received=received,
    )


def _check_frame(head: Frame, samples: memoryview, header: PhotoacousticHeader) -> None:
    name, (elements, count) = f"frame {head.seq}", (header.elements, header.samples)
    if head.det_first + head.det_count > elements:
        raise PeerError(
            f"{name} has elements {head.det_first} to {head.det_first + head.det_count - 1}, the header says {elements}; "
            "send a new header before frames of another array"
        )
    due = 2 * head.det_count * count
    if head.bytes != due or len(samples) != due:
        raise PeerError(
            f"{name} announces {head.bytes} bytes and has {len(samples)}; {head.det_count} elements of {count} samples of "
            f"{header.data_type} are {due}"
        )
    if head.wavelength_index >= len(header.wavelengths_m):
        raise PeerError(
            f"{name} has wavelength_index {head.wavelength_index}, the header has {len(header.wavelengths_m)} wavelengths"
        )
    _positive(f"{name}: pulse_energy", head.pulse_energy)
    values = (head.measurement_timestamps, head.temperature_control or 0.0, *(head.measurement_spatial_poses or ()))
    if not all(map(math.isfinite, values)) or head.measurement_timestamps < 0:
        raise PeerError(f"{name}: times, temperatures and poses must be finite numbers, times not below 0")


def _positive(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise PeerError(f"{name} is {value}; it must be above 0 and finite")


def header_from_message(head: Header, limits: Limits = DEFAULT_LIMITS) -> PhotoacousticHeader:
    """The engine's header. Raises PeerError naming the field that no measurement can have, LimitExceeded for sizes."""
    acquisition, device, extra = head.acquisition, head.device, head.x_scanside
    elements, samples = acquisition.sizes
    limits.check("channels", elements, what="number of detector elements")
    limits.check("samples", samples, what="samples per element")
    limits.check("acquisition_bytes", 2 * elements * samples, what="size of one shot in bytes")
    if device.general.num_detectors != elements:
        raise PeerError(f"num_detectors is {device.general.num_detectors}, sizes says {elements} elements")
    _check_numbers(head)
    return PhotoacousticHeader(
        stream=head.stream,
        elements=elements,
        samples=samples,
        data_type=acquisition.data_type,
        positions_m=_vectors("detector_position", device.detectors.detector_position, elements),
        orientations=_orientations(device.detectors.detector_orientation, elements),
        sampling_rate_hz=acquisition.ad_sampling_rate,
        wavelengths_m=acquisition.acquisition_wavelengths,
        speed_of_sound=acquisition.speed_of_sound,
        averages=acquisition.measurements_per_image,
        element_gain=_gains(acquisition.element_dependent_gain, elements),
        t0_samples=extra.t0_samples,
        adc_offset=extra.adc_offset,
        dead=tuple(sorted(set(extra.dead_elements))),
        pixels=extra.pixels,
        field_of_view_m=extra.field_of_view,
        details=msgspec.to_builtins(head, builtin_types=(bytes,)),
    )


def _check_numbers(head: Header) -> None:
    acquisition, extra, (elements, _) = head.acquisition, head.x_scanside, head.acquisition.sizes
    _positive("ad_sampling_rate", acquisition.ad_sampling_rate)
    for index, wavelength in enumerate(acquisition.acquisition_wavelengths):
        _positive(f"acquisition_wavelengths[{index}]", wavelength)
    _positive("overall_gain", acquisition.overall_gain)
    _positive("lsb_pascal", extra.lsb_pascal)
    speed = acquisition.speed_of_sound
    if speed is not None and not SPEEDS[0] <= speed <= SPEEDS[1]:
        raise PeerError(f"speed_of_sound is {speed} m/s; {SPEEDS[0]:g} to {SPEEDS[1]:g} are possible")
    view = (*(extra.field_of_view or ()), *(head.device.general.field_of_view or ()))
    if not all(map(math.isfinite, (extra.t0_samples, extra.adc_offset, *view))):
        raise PeerError("t0_samples, adc_offset and field_of_view must be finite numbers")
    if extra.field_of_view and not (
        extra.field_of_view[0] < extra.field_of_view[1] and extra.field_of_view[2] < extra.field_of_view[3]
    ):
        raise PeerError(f"field_of_view is {extra.field_of_view} m; starts must lie before ends: x1, x1, x2, x2")
    if any(dead >= elements for dead in extra.dead_elements):
        raise PeerError(f"dead_elements has {max(extra.dead_elements)}, the array has elements 0 to {elements - 1}")
    for name, value in head.device.illuminators.items():
        numbers = (value.intensity_profile_distance, value.pulse_width, value.beam_divergence_angles)
        if not all(number is None or math.isfinite(number) for number in numbers):
            raise PeerError(f"illuminator {name[:40]} has values that are not finite")


def _doubles(name: str, data: bytes, count: int | None = None) -> np.ndarray:
    if len(data) % 8 or (count is not None and len(data) != 8 * count):
        due = f"{count} doubles, {8 * count} bytes" if count is not None else "a multiple of 8 bytes"
        raise PeerError(f"{name} has {len(data)} bytes; expected {due}")
    values = np.frombuffer(data, "<f8")
    if not np.isfinite(values).all():
        where = int(np.flatnonzero(~np.isfinite(values))[0])
        raise PeerError(f"{name}: number {where} is {values[where]}; all must be finite")
    return values


def _vectors(name: str, data: bytes, elements: int) -> np.ndarray:
    vectors = _doubles(name, data, AXES * elements).reshape(elements, AXES)
    if np.abs(vectors).max() > LONGEST_M:
        raise PeerError(f"{name} reaches {np.abs(vectors).max():g} m; positions are in m, at most {LONGEST_M:g}")
    return vectors


def _orientations(data: bytes | None, elements: int) -> np.ndarray | None:
    if data is None:
        return None
    vectors = _vectors("detector_orientation", data, elements)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not lengths.all():
        raise PeerError(
            f"detector_orientation of element {int(np.flatnonzero(lengths == 0)[0])} has no direction: (0, 0, 0)"
        )
    return np.asarray(vectors / lengths)


def _gains(data: bytes | None, elements: int) -> np.ndarray | None:
    if data is None:
        return None
    gains = _doubles("element_dependent_gain", data, elements)
    if (gains <= 0).any():
        raise PeerError(f"element_dependent_gain of element {int(np.flatnonzero(gains <= 0)[0])} is not above 0")
    return gains


# --- to bytes ----------------------------------------------------------------------------------------------------------------


def header_message(header: PhotoacousticHeader) -> Header:
    """The wire's header of one of the engine; what the engine does not know is taken from `details`."""
    details: dict[str, Any] = dict(header.details)
    acquisition: dict[str, Any] = {"uuid": header.stream, **details.get("acquisition", {})}
    acquisition |= {
        "data_type": header.data_type,
        "sizes": (header.elements, header.samples),
        "ad_sampling_rate": header.sampling_rate_hz,
        "acquisition_wavelengths": header.wavelengths_m,
        "speed_of_sound": header.speed_of_sound,
        "measurements_per_image": header.averages,
        "element_dependent_gain": _bytes(header.element_gain),
    }
    device: dict[str, Any] = dict(details.get("device", {}))
    detectors = device.get("detectors", {}) | {
        "detector_position": _bytes(header.positions_m),
        "detector_orientation": _bytes(header.orientations),
    }
    general = {"unique_identifier": "unknown", **device.get("general", {}), "num_detectors": header.elements}
    general["num_illuminators"] = len(device.get("illuminators", {}))
    extra: dict[str, Any] = dict(details.get("x_scanside", {}))
    extra |= {"t0_samples": header.t0_samples, "adc_offset": header.adc_offset, "dead_elements": header.dead}
    extra |= {"pixels": header.pixels, "field_of_view": header.field_of_view_m}
    fields = {"type": "header", "schema": SCHEMA, "stream": header.stream, "acquisition": acquisition}
    fields |= {"device": {**device, "general": general, "detectors": detectors}, "x_scanside": extra}
    try:
        return msgspec.convert(fields, Header)
    except msgspec.ValidationError as error:
        raise PeerError(f"PAT1 header: {error}") from None


def _bytes(array: np.ndarray | None) -> bytes | None:
    return None if array is None else np.ascontiguousarray(array, "<f8").tobytes()


def _encode(head: _Map) -> bytes:
    return MAGIC + pack_map(msgspec.to_builtins(head, builtin_types=(bytes,)))


def encode_header(header: PhotoacousticHeader) -> bytes:
    """The head frame of a header. Raises PeerError or LimitExceeded where a receiver would."""
    message = header_message(header)
    header_from_message(message)
    return _encode(message)


def encode_frame(frame: PhotoacousticFrame, *, checksum: bool = False, host_ns: int = 0) -> list[bytes | memoryview]:
    """Head and samples of a frame; the samples are not copied where they are contiguous, little-endian 16-bit integers."""
    samples = np.ascontiguousarray(frame.samples, frame.samples.dtype.newbyteorder("<"))
    raw = samples.data.cast("B")
    head = Frame(
        seq=frame.seq,
        shot=frame.shot,
        bytes=raw.nbytes,
        det_first=frame.first_element,
        det_count=len(samples),
        wavelength_index=frame.wavelength,
        measurement_timestamps=frame.timestamp_s,
        host_ns=host_ns,
        pulse_energy=frame.pulse_energy_joule,
        temperature_control=frame.temperature_kelvin,
        measurement_spatial_poses=frame.pose,
        crc32c=crc32c.crc32c(raw) if checksum else None,
        flags=frame.flags,
    )
    return [_encode(head), raw]


def encode_end(last: int, frames: int) -> bytes:
    """The head frame that ends a stream; `last` is the last `seq`, -1 when there was none."""
    return _encode(End(seq_last=last, frames_sent=frames))
