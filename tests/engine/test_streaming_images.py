"""Images that travel: geometry, numbers, gray scale, attributes."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.engine.config import OutputConfig
from scanside.engine.headers import ACQUISITION_HEADER, ImageType, PixelType
from scanside.engine.messages import EncodingSpace, Image, ScanHeader
from scanside.engine.streaming.images import ImageMaker

SPACE = EncodingSpace(
    encoded_matrix=(8, 6, 1),
    encoded_fov_mm=(400.0, 200.0, 6.0),
    recon_matrix=(4, 6, 1),
    recon_fov_mm=(200.0, 210.0, 5.5),
)


def maker(fire: bool = False, bits: str | None = None, **output: str) -> ImageMaker:
    parameters = {} if bits is None else {"BitsStored": bits}
    return ImageMaker(
        ScanHeader(encodings=(SPACE,), parameters=parameters), OutputConfig(**output), "mri/test", fire=fire
    )


def readout(rng: np.random.Generator | None = None) -> np.ndarray:
    record = np.zeros((), ACQUISITION_HEADER)
    rng = rng or np.random.default_rng(1)
    for name in ("position", "read_dir", "phase_dir", "slice_dir", "patient_table_position", "user_float"):
        record[name] = rng.standard_normal(record[name].shape)
    for number, name in enumerate(("average", "slice", "contrast", "phase", "repetition", "set"), 11):
        record["idx"][name] = number
    record["physiology_time_stamp"], record["user_int"] = (5, 6, 7), np.arange(8)
    record["measurement_uid"], record["acquisition_time_stamp"] = 4_000_000_000, 14_400_321
    return record


def make(images: ImageMaker, array: np.ndarray, series: int = 1) -> Image:
    return images.make(array, readout(), SPACE, series=series, meta={"scanside_method": ["sense"]})


def pixels(peak: float = 1.0) -> np.ndarray:
    return np.linspace(0, peak, 24, dtype=np.float32).reshape(1, 6, 4)


def test_geometry_counters_and_times_are_those_of_the_readout() -> None:
    image, record = make(maker(), pixels()), readout()
    for name in ("position", "read_dir", "phase_dir", "slice_dir", "patient_table_position", "acquisition_time_stamp"):
        np.testing.assert_array_equal(image.header[name], record[name], err_msg=name)
    for name in ("measurement_uid", "physiology_time_stamp", "user_int", "user_float"):
        np.testing.assert_array_equal(image.header[name], record[name], err_msg=name)
    for number, name in enumerate(("average", "slice", "contrast", "phase", "repetition", "set"), 11):
        assert image.header[name] == number
    assert image.header["matrix_size"].tolist() == [4, 6, 1]
    assert image.header["field_of_view"].tolist() == [200, 210, 5.5]
    assert (image.header["version"], image.header["channels"], image.pixels.shape) == (1, 1, (1, 1, 6, 4))


def test_attributes_that_every_image_has() -> None:
    meta = make(maker(), pixels()).meta
    assert meta["DataRole"] == ["Image"]
    assert meta["ImageProcessingHistory"] == ["SCANSIDE", "mri/test"]
    assert meta["Keep_image_geometry"] == ["1"]
    assert meta["scanside_method"] == ["sense"]
    for name, field in (("ImageRowDir", "read_dir"), ("ImageColumnDir", "phase_dir")):
        assert all(re.fullmatch(r"-?\d+\.\d{18}", text) for text in meta[name])
        np.testing.assert_array_equal(np.float32([float(text) for text in meta[name]]), readout()[field])


def test_window_and_scale_stand_only_on_integers() -> None:
    integer = {"WindowCenter", "WindowWidth", "scanside_scale"}
    assert not integer & set(make(maker(), pixels()).meta)
    assert not integer & set(make(maker(image="complex"), pixels()).meta)
    meta = make(maker(fire=True), pixels()).meta
    assert (meta["WindowCenter"], meta["WindowWidth"]) == (["2048"], ["4096"])


@pytest.mark.parametrize(
    ("fire", "output", "stored", "kind"),
    [
        (False, {}, PixelType.FLOAT32, ImageType.MAGNITUDE),
        (True, {}, PixelType.UINT16, ImageType.MAGNITUDE),
        (True, {"pixels": "float32"}, PixelType.FLOAT32, ImageType.MAGNITUDE),
        (False, {"pixels": "uint16"}, PixelType.UINT16, ImageType.MAGNITUDE),
        (True, {"image": "complex"}, PixelType.COMPLEX64, ImageType.COMPLEX),
    ],
)
def test_pixel_types(fire: bool, output: dict[str, str], stored: PixelType, kind: ImageType) -> None:
    array = pixels() * np.exp(1j * pixels())
    image = make(maker(fire, **output), array)
    assert (image.header["data_type"], image.kind) == (stored, kind)
    expected = array if kind is ImageType.COMPLEX else np.abs(array)
    scale = float(image.meta.get("scanside_scale", ["1"])[0])
    np.testing.assert_allclose(image.pixels[0] / scale, expected, atol=0.5 / scale if scale != 1 else 1e-6)
    assert image.pixels.flags.c_contiguous


def test_images_are_numbered_within_their_series() -> None:
    images = maker()
    numbers = [
        (int(i.header["image_series_index"]), int(i.header["image_index"]))
        for i in (make(images, pixels(), s) for s in (1, 2, 1, 1, 2))
    ]
    assert numbers == [(1, 1), (2, 1), (1, 2), (1, 3), (2, 2)]


def test_numbers_stay_unique_beyond_what_the_header_holds() -> None:
    images = maker()
    tiny = np.zeros((1, 1, 1), np.float32)
    record = readout()
    seen = set()
    for _ in range(65540):
        header = images.make(tiny, record, SPACE, series=1, meta={}).header
        seen.add((int(header["image_series_index"]), int(header["image_index"])))
    assert len(seen) == 65540
    assert all(number >= 1 for _, number in seen)


@pytest.mark.parametrize(
    ("bits", "maximum"),
    [
        (None, 4095),
        ("12", 4095),
        ("16", 65535),
        ("8", 255),
        ("0", 4095),
        ("17", 4095),
        ("x", 4095),
        ("²", 4095),
        ("1" * 5000, 4095),
    ],
)
def test_bits_stored(bits: str | None, maximum: int) -> None:
    image = make(maker(fire=True, bits=bits), pixels(1e-7))
    assert image.pixels.max() == round(maximum / 1.25)
    assert image.meta["WindowWidth"] == [str(maximum + 1)]


def test_one_scale_for_a_series_until_an_image_is_too_bright() -> None:
    images = maker(fire=True)
    scales = [float(make(images, pixels(peak)).meta["scanside_scale"][0]) for peak in (1.0, 0.3, 1.2, 5.0, 1.0)]
    assert scales[0] == scales[1] == scales[2]
    assert scales[3] == pytest.approx(scales[0] / 5)
    assert scales[4] == scales[3]
    other = make(images, pixels(1.0), series=2)
    assert float(other.meta["scanside_scale"][0]) == scales[0]


def test_a_black_first_image_sets_no_scale() -> None:
    images = maker(fire=True)
    assert make(images, pixels(0.0)).pixels.max() == 0
    assert make(images, pixels(1e-9)).pixels.max() == round(4095 / 1.25)
    assert make(images, pixels(0.0)).pixels.max() == 0


@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=6), st.integers(1, 16))
@settings(max_examples=100, deadline=None)
def test_integers_are_rounded_never_cut_off(peaks: list[float], bits: int) -> None:
    images = maker(fire=True, bits=str(bits))
    for peak in peaks:
        array = np.full((1, 2, 2), peak, np.float32)
        image = make(images, array)
        scale = float(image.meta["scanside_scale"][0])
        assert image.pixels.max() <= 2**bits - 1
        expected = peak * scale
        assert abs(float(image.pixels[0, 0, 0, 0]) - expected) <= 0.501 + 1e-6 * expected


def test_the_image_owns_its_header() -> None:
    record = readout()
    image = maker().make(pixels(), record, SPACE, series=1, meta={})
    record["position"] = 0
    assert image.header["position"].any()
