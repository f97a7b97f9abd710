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
_BITS = frozenset(str(n) for n in range(1, 17))
_NUMBERS = 65535
"""Image numbers of one series; the header has 16 bits for them."""
_NEXT_SERIES = 100
_HEADROOM = 1.25
"""Brightest pixel of the first image uses 1/1.25 of the integer range, so that later, brighter ones are not clipped."""


class ImageMaker:
    """Makes the images of one session; numbers them and keeps one gray scale per series for as long as the pixels fit.

    `fire`: the receiver is a FIRE or OpenRecon console, which expects integers of BitsStored bits. An image too bright for
    the scale of its series is not cut off: the scale is lowered from there on, and `scanside_scale` says what it is.
    """

    def __init__(self, header: ScanHeader, output: OutputConfig, system: str, *, fire: bool) -> None:
        self._output = output
        self._system = system
        self._integer = output.pixels == "uint16" or (output.pixels == "auto" and fire)
        bits = header.parameters.get("BitsStored", "").strip()
        self._maximum = 2 ** (int(bits) if bits in _BITS else 12) - 1
        self._scales: dict[int, float] = {}
        self._numbers: dict[int, int] = {}

    def make(
        self, array: np.ndarray, readout: np.ndarray, space: EncodingSpace, *, series: int, meta: dict[str, list[str]]
    ) -> Image:
        """Image of `array` (z, y, x), complex or non-negative, with the geometry of header record `readout`."""
        pixels, kind, scale = self._pixels(array, series)
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
        before = self._numbers.get(series, 0)
        self._numbers[series] = before + 1
        header["image_index"] = before % _NUMBERS + 1
        header["image_series_index"] = series + before // _NUMBERS * _NEXT_SERIES
        return Image(header=header, pixels=pixels[None], meta=self._attributes(scale, readout, meta))

    def _pixels(self, array: np.ndarray, series: int) -> tuple[np.ndarray, ImageType, float | None]:
        """Pixels, what they are, and for integers the factor they were multiplied with."""
        if self._output.image == "complex":
            return np.ascontiguousarray(array, dtype=PIXEL_TYPES[PixelType.COMPLEX64]), ImageType.COMPLEX, None
        magnitude = np.abs(array) if np.iscomplexobj(array) else array
        if not self._integer:
            return np.ascontiguousarray(magnitude, dtype=PIXEL_TYPES[PixelType.FLOAT32]), ImageType.MAGNITUDE, None
        scale = self._scale(float(magnitude.max(initial=0.0)), series)
        scaled = np.clip(np.rint(magnitude.astype(np.float64) * scale), 0, self._maximum)
        return scaled.astype(PIXEL_TYPES[PixelType.UINT16]), ImageType.MAGNITUDE, scale

    def _scale(self, peak: float, series: int) -> float:
        if peak <= 0:
            return self._scales.get(series, 1.0)
        scale = self._scales.get(series)
        if scale is None or peak * scale > self._maximum:
            self._scales[series] = scale = self._maximum / (peak * _HEADROOM)
        return scale

    def _attributes(self, scale: float | None, readout: np.ndarray, meta: dict[str, list[str]]) -> dict[str, list[str]]:
        attributes = {
            "DataRole": ["Image"],
            "ImageProcessingHistory": ["SCANSIDE", self._system],
            "Keep_image_geometry": ["1"],
            "ImageRowDir": [f"{v:.18f}" for v in readout["read_dir"].tolist()],
            "ImageColumnDir": [f"{v:.18f}" for v in readout["phase_dir"].tolist()],
        }
        if scale is not None:
            attributes["scanside_scale"] = [f"{scale:.9g}"]
            attributes["WindowCenter"] = [str((self._maximum + 1) // 2)]
            attributes["WindowWidth"] = [str(self._maximum + 1)]
        return attributes | meta
