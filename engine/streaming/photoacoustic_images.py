"""From a beamformed plane to the image that travels: geometry from the field of view, provenance in the attributes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..headers import IMAGE_HEADER, ImageType, PixelType
from ..messages import Image

__all__ = ["IMAGES", "SERIES", "PlaneImages"]

IMAGES = 1
SERIES = {"pressure": IMAGES, "oxyhaemoglobin": 11, "deoxyhaemoglobin": 12, "saturation": 13}
"""Series number by what the pixels are."""
_NUMBERS = 65535
"""Image numbers and counters have 16 bits; both start again."""
_NEXT_SERIES = 100
_TICKS = 400
"""ISMRMRD time stamps count 2.5 ms."""


class PlaneImages:
    """Makes and numbers the images of one stream, float32 as they are, negative pressures included.

    view_m: start and end along x1, start and end along x2, in m.
    """

    def __init__(self, system: str, view_m: tuple[float, float, float, float]) -> None:
        self._system = system
        x0, x1, y0, y1 = view_m
        self._size_mm = (1e3 * (x1 - x0), 1e3 * (y1 - y0), 0.0)
        self._center_mm = (500 * (x0 + x1), 500 * (y0 + y1), 0.0)
        self._numbers: dict[int, int] = {}

    def make(
        self,
        pixels: np.ndarray,
        what: str,
        *,
        shot: int,
        wavelength: int,
        timestamp_s: float,
        meta: Mapping[str, str],
    ) -> Image:
        """Image of `pixels` (y, x); `what` is a key of `SERIES`, `wavelength` an index."""
        header = np.zeros((), dtype=IMAGE_HEADER)
        header["version"] = 1
        header["data_type"] = PixelType.FLOAT32
        header["matrix_size"] = (pixels.shape[1], pixels.shape[0], 1)
        header["field_of_view"] = self._size_mm
        header["position"] = self._center_mm
        header["read_dir"], header["phase_dir"], header["slice_dir"] = np.eye(3)
        header["channels"] = 1
        header["image_type"] = ImageType.REAL
        header["repetition"] = shot % (_NUMBERS + 1)
        header["contrast"] = wavelength
        header["acquisition_time_stamp"] = int(timestamp_s * _TICKS) % (1 << 32)
        series = SERIES[what]
        before = self._numbers.get(series, 0)
        self._numbers[series] = before + 1
        header["image_index"] = before % _NUMBERS + 1
        header["image_series_index"] = series + before // _NUMBERS * _NEXT_SERIES
        attributes = {
            "DataRole": ["Image"],
            "ImageProcessingHistory": ["SCANSIDE", self._system],
            "ImageComment": [what],
        }
        data = np.array(pixels, dtype=np.float32)[None, None]  # a copy: the beamformer uses its memory again
        return Image(header=header, pixels=data, meta=attributes | {name: [value] for name, value in meta.items()})
