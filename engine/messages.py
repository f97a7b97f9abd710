"""What flows into and out of a session: immutable records whose arrays are views on the received bytes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
import numpy as np

from .headers import ImageType

__all__ = [
    "AcquisitionBatch",
    "Adjustment",
    "EncodingLimit",
    "EncodingSpace",
    "EndOfScan",
    "EndOfStream",
    "Event",
    "FrameKey",
    "FrameStats",
    "Image",
    "Message",
    "MissingFrames",
    "Note",
    "Parameters",
    "PhotoacousticEvent",
    "PhotoacousticFrame",
    "PhotoacousticHeader",
    "PhotoacousticMessage",
    "ScanHeader",
    "WaveformRecord",
]

Trajectory = Literal["cartesian", "epi", "radial", "goldenangle", "spiral", "other"]
CalibrationMode = Literal["none", "embedded", "interleaved", "separate", "external", "other"]
Level = Literal["debug", "info", "warning", "error"]


class EncodingLimit(msgspec.Struct, frozen=True):
    """Range of one encoding counter, inclusive, and the number that the k-space centre has."""

    minimum: int = 0
    maximum: int = 0
    center: int = 0

    @property
    def count(self) -> int:
        """How many values the counter takes."""
        return self.maximum - self.minimum + 1


class EncodingSpace(msgspec.Struct, frozen=True, kw_only=True):
    """One `<encoding>` of a header. Tuples are ordered (x, y, z): readout, encoding step 1, encoding step 2."""

    encoded_matrix: tuple[int, int, int]
    encoded_fov_mm: tuple[float, float, float]
    recon_matrix: tuple[int, int, int]
    recon_fov_mm: tuple[float, float, float]
    trajectory: Trajectory = "cartesian"
    limits: dict[str, EncodingLimit] = {}
    """By counter name as in `ACQUISITION_HEADER["idx"]`: kspace_encode_step_1, kspace_encode_step_2, slice, ..."""
    acceleration: tuple[int, int] = (1, 1)
    """Declared undersampling of encoding steps 1 and 2."""
    calibration: CalibrationMode = "none"
    trajectory_dimensions: int | None = None
    """From `trajectoryDescription` where given; a 3 without it is kx, ky, density when the matrix is flat (protocol.md 0.11)."""


class ScanHeader(msgspec.Struct, frozen=True, kw_only=True):
    """Header of a scan, parsed and checked against the limits; `xml` are the bytes as received."""

    encodings: tuple[EncodingSpace, ...]
    channels: int | None = None
    relative_receiver_noise_bandwidth: float = 0.79
    """Fraction of the receiver bandwidth that passes the filter; Siemens systems have 0.79."""
    field_strength_tesla: float | None = None
    measurement_id: str | None = None
    dependencies: dict[str, str] = {}
    """Measurement id of each dependency by its type, e.g. {"Noise": "..."}."""
    parameters: dict[str, str] = {}
    """All user parameters (long, double, string, base64) of the header, as text."""
    xml: bytes = b""


class AcquisitionBatch(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One or more consecutive readouts of equal shape.

    headers: ACQUISITION_HEADER records, shape (n,), read-only strided view.
    samples: complex64, shape (n, channels, samples), view that need not be aligned.
    trajectory: float32, shape (n, samples, dimensions), or None.
    received: monotonic time in s at which the last byte was read from the socket.
    """

    headers: np.ndarray
    samples: np.ndarray
    trajectory: np.ndarray | None = None
    received: float = msgspec.field(default_factory=time.monotonic)

    def __len__(self) -> int:
        return len(self.headers)


class WaveformRecord(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One waveform (ECG, pulse, respiration, ...).

    header: one WAVEFORM_HEADER record; samples: uint32, shape (channels, samples).
    """

    header: np.ndarray
    samples: np.ndarray


class Parameters(msgspec.Struct, frozen=True):
    """Settings that came with the scan, e.g. the sliders of an OpenRecon card; strings or native JSON values."""

    values: dict[str, str | int | float | bool]


class EndOfScan(msgspec.Struct, frozen=True):
    """No more data follows. `complete` is false when the peer went away instead of closing."""

    complete: bool = True


class PhotoacousticHeader(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Header of a photoacoustic stream, checked against the limits.

    positions_m: float64 (elements, 3). orientations: unit vectors (elements, 3), or None: towards the center. element_gain:
    (elements,) or None. details: everything as it came, by the names of IPASC, for recordings.
    """

    stream: str
    """32 hexadecimal digits."""
    elements: int
    samples: int
    """Per element."""
    data_type: Literal["int16", "uint16"] = "int16"
    positions_m: np.ndarray
    orientations: np.ndarray | None = None
    sampling_rate_hz: float
    wavelengths_m: tuple[float, ...]
    speed_of_sound: float | None = None
    """In m/s; None where the sender does not know."""
    averages: int = 1
    """Shots to be averaged for one image."""
    element_gain: np.ndarray | None = None
    t0_samples: float = 0.0
    """Time of the first sample after the laser pulse, in samples."""
    adc_offset: float = 0.0
    """Reading of an element at rest."""
    dead: tuple[int, ...] = ()
    pixels: tuple[int, int] | None = None
    """Wish for the image: along x1, along x2."""
    field_of_view_m: tuple[float, float, float, float] | None = None
    """Wish: start and end along x1, start and end along x2."""
    details: Mapping[str, Any] = {}


class PhotoacousticFrame(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One frame: all elements of a laser shot, or consecutive ones of them.

    samples: (elements of this frame, samples), int16 or uint16, view on the received bytes.
    """

    seq: int
    """Counts the frames of a stream."""
    shot: int
    samples: np.ndarray
    first_element: int = 0
    wavelength: int = 0
    """Index into the header's wavelengths."""
    timestamp_s: float = 0.0
    """Clock of the device."""
    pulse_energy_joule: float | None = None
    temperature_kelvin: float | None = None
    pose: tuple[float, ...] | None = None
    """3 rows of 4: where the device was."""
    flags: int = 0
    """1: the device has lost data before this frame; 2: samples are clipped; 4: trigger error."""
    intact: bool = True
    """False where the checksum does not fit."""
    received: float = msgspec.field(default_factory=time.monotonic)
    """Monotonic time in s at which the last byte was read from the socket."""


class EndOfStream(msgspec.Struct, frozen=True):
    """The sender's own count: number of its last frame, -1 without any, and how many it sent."""

    last: int
    frames: int


class Adjustment(msgspec.Struct, frozen=True):
    """Values by name that a running session shall use from now on."""

    values: dict[str, str | int | float | bool]


class MissingFrames(msgspec.Struct, frozen=True):
    """Frames of a photoacoustic stream, first and last included, that did not arrive intact."""

    first: int
    last: int


class Image(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """An image with its geometry and how it was made.

    header: one IMAGE_HEADER record, shape ().
    pixels: shape (channels, z, y, x), one of PIXEL_TYPES.
    meta: attributes, a list of values per name (ISMRMRD meta).
    """

    header: np.ndarray
    pixels: np.ndarray
    meta: dict[str, list[str]] = {}

    @property
    def kind(self) -> ImageType:
        """Magnitude, phase, ... of this image."""
        return ImageType(int(self.header["image_type"]) or ImageType.MAGNITUDE)


class FrameKey(msgspec.Struct, frozen=True, order=True, forbid_unknown_fields=True):
    """Which frame a readout belongs to. Averages are combined, segments belong together."""

    encoding: int = 0
    repetition: int = 0
    slice: int = 0
    contrast: int = 0
    phase: int = 0
    set: int = 0


Outcome = Literal["complete", "incomplete", "degraded", "failed"]
TriggerReason = Literal["flag", "coverage", "change", "count", "close"]


class FrameStats(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one frame cost and how it ended; the only thing that metrics and logs see of a frame.

    Times are in s of the monotonic clock. No patient, scan or file name ever stands here.
    """

    pipeline: str
    outcome: Outcome
    trigger: TriggerReason
    key: FrameKey = FrameKey()
    received: float = 0.0
    """When the last readout that the frame needed was read from the socket."""
    stages: dict[str, float] = {}
    """Duration in s by stage name."""
    readouts: int = 0
    missing: int = 0
    duplicates: int = 0
    outside: int = 0
    """Lines with counters outside the encoded matrix, which were left out."""
    acceleration: float = 1.0
    """Net acceleration: points of the matrix over points measured."""
    reason: str = ""
    """Fixed word that says why the outcome is not `complete`."""


class Note(msgspec.Struct, frozen=True):
    """A sentence for the operator's console."""

    level: Level
    text: str


Message = ScanHeader | AcquisitionBatch | WaveformRecord | Parameters | Image | EndOfScan
Event = Image | FrameStats | Note | AcquisitionBatch | WaveformRecord
PhotoacousticMessage = PhotoacousticHeader | PhotoacousticFrame | EndOfStream | Adjustment | EndOfScan
PhotoacousticEvent = Image | FrameStats | Note | MissingFrames
