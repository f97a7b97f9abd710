"""From a reconstructed array to the image that travels: geometry from the central readout, attributes, pixel type."""

from __future__ import annotations

import numpy as np

from ..config import OutputConfig
from ..headers import IMAGE_HEADER, PIXEL_TYPES, ImageType, PixelType
from ..messages import EncodingSpace, Image, ScanHeader

__all__ = ["ImageMaker"]

_COPIED = (
    "measurement_uid",
    "position",
    "read_dir",
    "phase_dir",
    "slice_dir",
    "patient_table_position",
    "acquisition_time_stamp",
    "physiology_time_stamp",
    "user_int",
    "user_float",
)
_COUNTERS = ("average", "slice", "contrast", "phase", "repetition", "set")
_HEADROOM = 1.25
"""Brightest pixel of the first image uses 1/1.25 of the integer range, so that later, brighter ones are not clipped."""


class ImageMaker:
    """Makes the images of one session; numbers them and keeps one gray scale per series.

    `fire`: the receiver is a FIRE or OpenRecon console, which expects integers of BitsStored bits.
    """

    def __init__(self, header: ScanHeader, output: OutputConfig, system: str, *, fire: bool) -> None:
        self._output = output
        self._system = system
        self._integer = output.pixels == "uint16" or (output.pixels == "auto" and fire)
        bits = header.parameters.get("BitsStored", "12")
        self._maximum = 2 ** (int(bits) if bits.isdigit() and 1 <= int(bits) <= 16 else 12) - 1
        self._scales: dict[int, float] = {}
        self._numbers: dict[int, int] = {}

    def make(
        self, array: np.ndarray, readout: np.ndarray, space: EncodingSpace, *, series: int, meta: dict[str, list[str]]
    ) -> Image:
        """Image of `array` (z, y, x), complex or non-negative, with the geometry of header record `readout`."""
        pixels, kind = self._pixels(array, series)
        header = np.zeros((), dtype=IMAGE_HEADER)
        for name in _COPIED:
            header[name] = readout[name]
        for name in _COUNTERS:
            header[name] = readout["idx"][name]
        header["version"] = 1
        header["data_type"] = next(t for t, dtype in PIXEL_TYPES.items() if dtype == pixels.dtype)
        header["matrix_size"] = array.shape[::-1]
        header["field_of_view"] = space.recon_fov_mm
        header["channels"] = 1
        header["image_type"] = kind
        self._numbers[series] = self._numbers.get(series, 0) + 1
        header["image_index"] = self._numbers[series] & 0xFFFF
        header["image_series_index"] = series
        return Image(header=header, pixels=pixels[None], meta=self._attributes(pixels, readout, meta))

    def _pixels(self, array: np.ndarray, series: int) -> tuple[np.ndarray, ImageType]:
        if self._output.image == "complex":
            return np.ascontiguousarray(array, dtype=PIXEL_TYPES[PixelType.COMPLEX64]), ImageType.COMPLEX
        magnitude = np.abs(array) if np.iscomplexobj(array) else array
        if not self._integer:
            return np.ascontiguousarray(magnitude, dtype=PIXEL_TYPES[PixelType.FLOAT32]), ImageType.MAGNITUDE
        peak = float(magnitude.max(initial=0.0))
        scale = self._scales.setdefault(series, self._maximum / (peak * _HEADROOM) if peak > 0 else 1.0)
        scaled = np.clip(np.rint(magnitude * scale), 0, self._maximum)
        return scaled.astype(PIXEL_TYPES[PixelType.UINT16]), ImageType.MAGNITUDE

    def _attributes(self, pixels: np.ndarray, readout: np.ndarray, meta: dict[str, list[str]]) -> dict[str, list[str]]:
        attributes = {
            "DataRole": ["Image"],
            "ImageProcessingHistory": ["SCANSIDE", self._system],
            "Keep_image_geometry": ["1"],
            "ImageRowDir": [f"{v:.18f}" for v in readout["read_dir"].tolist()],
            "ImageColumnDir": [f"{v:.18f}" for v in readout["phase_dir"].tolist()],
        }
        if pixels.dtype == np.uint16:
            attributes["WindowCenter"] = [str((self._maximum + 1) // 2)]
            attributes["WindowWidth"] = [str(self._maximum + 1)]
        return attributes | meta
