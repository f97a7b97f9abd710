"""Layouts of the three fixed-size headers of MRD version 1, as numpy structured dtypes.

The engine works on these records in place: a batch of acquisitions is one strided view on the received bytes, so no header
is ever read attribute by attribute. Acquisition and image headers are packed to two bytes, the waveform header has natural
alignment (ismrmrd/ismrmrd.h of ISMRMRD 1.15).
"""

from __future__ import annotations

import enum

import numpy as np

__all__ = [
    "ACQUISITION_HEADER",
    "IMAGE_HEADER",
    "PIXEL_TYPES",
    "WAVEFORM_HEADER",
    "AcquisitionFlag",
    "ImageType",
    "PixelType",
    "has_flag",
]

ENCODING_COUNTERS = np.dtype(
    [
        ("kspace_encode_step_1", "<u2"),
        ("kspace_encode_step_2", "<u2"),
        ("average", "<u2"),
        ("slice", "<u2"),
        ("contrast", "<u2"),
        ("phase", "<u2"),
        ("repetition", "<u2"),
        ("set", "<u2"),
        ("segment", "<u2"),
        ("user", "<u2", (8,)),
    ]
)

ACQUISITION_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("flags", "<u8"),
        ("measurement_uid", "<u4"),
        ("scan_counter", "<u4"),
        ("acquisition_time_stamp", "<u4"),
        ("physiology_time_stamp", "<u4", (3,)),
        ("number_of_samples", "<u2"),
        ("available_channels", "<u2"),
        ("active_channels", "<u2"),
        ("channel_mask", "<u8", (16,)),
        ("discard_pre", "<u2"),
        ("discard_post", "<u2"),
        ("center_sample", "<u2"),
        ("encoding_space_ref", "<u2"),
        ("trajectory_dimensions", "<u2"),
        ("sample_time_us", "<f4"),
        ("position", "<f4", (3,)),
        ("read_dir", "<f4", (3,)),
        ("phase_dir", "<f4", (3,)),
        ("slice_dir", "<f4", (3,)),
        ("patient_table_position", "<f4", (3,)),
        ("idx", ENCODING_COUNTERS),
        ("user_int", "<i4", (8,)),
        ("user_float", "<f4", (8,)),
    ]
)

IMAGE_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("data_type", "<u2"),
        ("flags", "<u8"),
        ("measurement_uid", "<u4"),
        ("matrix_size", "<u2", (3,)),
        ("field_of_view", "<f4", (3,)),
        ("channels", "<u2"),
        ("position", "<f4", (3,)),
        ("read_dir", "<f4", (3,)),
        ("phase_dir", "<f4", (3,)),
        ("slice_dir", "<f4", (3,)),
        ("patient_table_position", "<f4", (3,)),
        ("average", "<u2"),
        ("slice", "<u2"),
        ("contrast", "<u2"),
        ("phase", "<u2"),
        ("repetition", "<u2"),
        ("set", "<u2"),
        ("acquisition_time_stamp", "<u4"),
        ("physiology_time_stamp", "<u4", (3,)),
        ("image_type", "<u2"),
        ("image_index", "<u2"),
        ("image_series_index", "<u2"),
        ("user_int", "<i4", (8,)),
        ("user_float", "<f4", (8,)),
        ("attribute_string_len", "<u4"),
    ]
)

WAVEFORM_HEADER = np.dtype(
    {
        "names": [
            "version",
            "flags",
            "measurement_uid",
            "scan_counter",
            "time_stamp",
            "number_of_samples",
            "channels",
            "sample_time_us",
            "waveform_id",
        ],
        "formats": ["<u2", "<u8", "<u4", "<u4", "<u4", "<u2", "<u2", "<f4", "<u2"],
        "offsets": [0, 8, 16, 20, 24, 28, 30, 32, 36],
        "itemsize": 40,
    }
)

for _dtype, _size in ((ACQUISITION_HEADER, 340), (IMAGE_HEADER, 198), (WAVEFORM_HEADER, 40)):
    if _dtype.itemsize != _size:  # pragma: no cover - a numpy that packs differently would corrupt every scan
        raise ImportError(f"header layout has {_dtype.itemsize} bytes where the wire has {_size}")


class AcquisitionFlag(enum.IntEnum):
    """Flag numbers of an acquisition; flag n is bit n - 1 of `flags` (ISMRMRD 1.15)."""

    FIRST_IN_ENCODE_STEP1 = 1
    LAST_IN_ENCODE_STEP1 = 2
    FIRST_IN_ENCODE_STEP2 = 3
    LAST_IN_ENCODE_STEP2 = 4
    FIRST_IN_AVERAGE = 5
    LAST_IN_AVERAGE = 6
    FIRST_IN_SLICE = 7
    LAST_IN_SLICE = 8
    FIRST_IN_CONTRAST = 9
    LAST_IN_CONTRAST = 10
    FIRST_IN_PHASE = 11
    LAST_IN_PHASE = 12
    FIRST_IN_REPETITION = 13
    LAST_IN_REPETITION = 14
    FIRST_IN_SET = 15
    LAST_IN_SET = 16
    FIRST_IN_SEGMENT = 17
    LAST_IN_SEGMENT = 18
    IS_NOISE_MEASUREMENT = 19
    IS_PARALLEL_CALIBRATION = 20
    IS_PARALLEL_CALIBRATION_AND_IMAGING = 21
    IS_REVERSE = 22
    IS_NAVIGATION_DATA = 23
    IS_PHASECORR_DATA = 24
    LAST_IN_MEASUREMENT = 25
    IS_HPFEEDBACK_DATA = 26
    IS_DUMMYSCAN_DATA = 27
    IS_RTFEEDBACK_DATA = 28
    IS_SURFACECOILCORRECTIONSCAN_DATA = 29
    IS_PHASE_STABILIZATION_REFERENCE = 30
    IS_PHASE_STABILIZATION = 31
    COMPRESSION1 = 53
    COMPRESSION2 = 54

    @property
    def bit(self) -> int:
        """The flag as a bit mask."""
        return 1 << (self.value - 1)


class ImageType(enum.IntEnum):
    """Kind of pixel value in an image header."""

    MAGNITUDE = 1
    PHASE = 2
    REAL = 3
    IMAG = 4
    COMPLEX = 5
    RGB = 6


class PixelType(enum.IntEnum):
    """Storage type of an image's pixels."""

    UINT16 = 1
    INT16 = 2
    UINT32 = 3
    INT32 = 4
    FLOAT32 = 5
    FLOAT64 = 6
    COMPLEX64 = 7
    COMPLEX128 = 8


PIXEL_TYPES: dict[int, np.dtype[np.generic]] = {
    PixelType.UINT16: np.dtype("<u2"),
    PixelType.INT16: np.dtype("<i2"),
    PixelType.UINT32: np.dtype("<u4"),
    PixelType.INT32: np.dtype("<i4"),
    PixelType.FLOAT32: np.dtype("<f4"),
    PixelType.FLOAT64: np.dtype("<f8"),
    PixelType.COMPLEX64: np.dtype("<c8"),
    PixelType.COMPLEX128: np.dtype("<c16"),
}


def has_flag(flags: np.ndarray | int, *wanted: AcquisitionFlag) -> np.ndarray | bool:
    """Whether any of `wanted` is set, for one flag word or an array of them."""
    mask = 0
    for flag in wanted:
        mask |= flag.bit
    if isinstance(flags, np.ndarray):
        found: np.ndarray = np.bitwise_and(flags, np.uint64(mask)) != 0
        return found
    return bool(int(flags) & mask)
