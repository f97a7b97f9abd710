"""ISMRMRD files against the reference library and tools, and pictures against what they should show."""

from __future__ import annotations

import shutil
import subprocess

import h5py
import ismrmrd
import ismrmrd.xsd
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from scanside.adapters.files.ismrmrd import header_xml, open_scan, write_images, write_scan
from scanside.adapters.files.png import Panel, comparison_figure, robust_window, write_png
from scanside.adapters.mrd_header import parse_header
from scanside.engine.errors import ConfigError, DeliveryError, StreamError, TruncatedMessage
from scanside.engine.headers import ACQUISITION_HEADER, IMAGE_HEADER, PIXEL_TYPES, ImageType
from scanside.engine.limits import DEFAULT_LIMITS
from scanside.engine.messages import AcquisitionBatch, EncodingLimit, EncodingSpace, Image, ScanHeader
from scanside.engine.simulation import simulate_scan


@pytest.fixture(scope="module")
def scan():
    return simulate_scan(16, 3, 2, 4, repetitions=2, noise_readouts=1)


@pytest.fixture
def scan_path(tmp_path, scan):
    path = tmp_path / "scan.h5"
    write_scan(path, scan.header, scan.batches)
    return path


def image(rng, kind, shape=(1, 1, 6, 5), series=0, meta=None):
    header = np.zeros((), IMAGE_HEADER)
    header["version"], header["data_type"], header["channels"] = 1, kind, shape[0]
    header["matrix_size"], header["image_series_index"] = shape[:0:-1], series
    header["image_type"] = ImageType.COMPLEX if PIXEL_TYPES[kind].kind == "c" else ImageType.MAGNITUDE
    pixels = (100 * rng.random(shape)).astype(PIXEL_TYPES[kind])
    return Image(header=header, pixels=pixels + 1j * pixels if pixels.dtype.kind == "c" else pixels, meta=meta or {})


def same_readouts(batches, others):
    batches, others = list(batches), list(others)
    for field in ("headers", "samples"):
        flat, other = ([row for batch in side for row in getattr(batch, field)] for side in (batches, others))
        assert len(flat) == len(other)
        assert all(np.array_equal(a, b) for a, b in zip(flat, other, strict=True))


def test_a_scan_comes_back(scan, scan_path):
    with open_scan(scan_path) as file:
        assert len(file) == len(scan)
        batches = list(file.batches())
        header = parse_header(file.xml, DEFAULT_LIMITS)
    assert msgspec.structs.replace(header, xml=b"") == scan.header
    same_readouts(batches, scan.batches)
    assert all(batch.trajectory is None for batch in batches)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_batches_have_at_most_the_size(scan, scan_path, size):
    with open_scan(scan_path) as file:
        batches = list(file.batches(size))
    assert max(map(len, batches)) == min(size, len(scan))
    same_readouts(batches, scan.batches)


def test_the_header_goes_out_as_received(tmp_path, scan):
    xml = "<?xml version='1.0'?><ismrmrdHeader><!-- Größe --></ismrmrdHeader>".encode()
    for number, end in enumerate((b"", b"\0", b"\0rest")):
        write_scan(tmp_path / f"{number}.h5", msgspec.structs.replace(scan.header, xml=xml + end), scan.batches)
        with open_scan(tmp_path / f"{number}.h5") as file:
            assert file.xml == xml


def test_what_was_read_outlives_the_file(scan, scan_path):
    with open_scan(scan_path) as file:
        first = next(file.batches(1))
    np.testing.assert_array_equal(first.samples, scan.batches[0].samples)


def test_trajectories_come_back(tmp_path):
    scan = simulate_scan(16, 2, 1, 0, trajectory="radial", noise_readouts=1)
    write_scan(tmp_path / "radial.h5", scan.header, scan.batches)
    with open_scan(tmp_path / "radial.h5") as file:
        noise, spokes = file.batches()
        assert parse_header(file.xml, DEFAULT_LIMITS).encodings[0].trajectory_dimensions == 2
    assert noise.trajectory is None
    np.testing.assert_array_equal(spokes.trajectory, scan.batches[1].trajectory)


def test_progress_ends_at_the_whole(tmp_path):
    scan = simulate_scan(8, 1, 1, 0, repetitions=40, noise_readouts=0)
    write_scan(tmp_path / "long.h5", scan.header, scan.batches)
    seen = []
    with open_scan(tmp_path / "long.h5") as file:
        same_readouts(file.batches(progress=lambda done, whole: seen.append((done, whole))), scan.batches)
    assert seen == [(256, 320), (320, 320)]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=6
    )
)
def test_readouts_of_any_shapes(tmp_path_factory, shapes):
    rng = np.random.default_rng(1)
    batches = []
    for count, channels, samples, dimensions in shapes:
        headers = np.zeros(count, ACQUISITION_HEADER)
        headers["active_channels"], headers["number_of_samples"] = channels, samples
        headers["trajectory_dimensions"] = dimensions
        points = rng.standard_normal((count, channels, samples, 2), np.float32).view(np.complex64)[..., 0]
        path = rng.standard_normal((count, samples, dimensions), np.float32) if dimensions else None
        batches.append(AcquisitionBatch(headers=headers, samples=points, trajectory=path))
    target = tmp_path_factory.mktemp("shapes") / "scan.h5"
    write_scan(target, ScanHeader(encodings=()), batches)
    with open_scan(target) as file:
        found = list(file.batches())
    same_readouts(found, batches)
    paths = [
        row for batch in batches for row in (batch.trajectory if batch.trajectory is not None else [None] * len(batch))
    ]
    back = [
        row for batch in found for row in (batch.trajectory if batch.trajectory is not None else [None] * len(batch))
    ]
    assert all((a is None and b is None) or np.array_equal(a, b) for a, b in zip(paths, back, strict=True))


def test_the_library_reads_our_scans(scan, scan_path):
    with ismrmrd.Dataset(scan_path, "dataset", mode="r") as data:
        assert data.number_of_acquisitions() == len(scan)
        ismrmrd.xsd.CreateFromDocument(data.read_xml_header())
        readout = data.read_acquisition(3)
    np.testing.assert_array_equal(readout.data, scan.batches[1].samples[2])
    assert readout.scan_counter == 4
    assert bytes(readout.getHead()) == scan.batches[1].headers[2].tobytes()


def test_we_read_scans_of_the_library(tmp_path, rng):
    with ismrmrd.Dataset(tmp_path / "theirs.h5", "dataset") as data:
        data.write_xml_header(b"<ismrmrdHeader/>")
        for number in range(3):
            readout = ismrmrd.Acquisition()
            readout.resize(8, 2, trajectory_dimensions=2)
            readout.data[:] = rng.standard_normal((2, 8)) + number * 1j
            readout.traj[:] = number
            readout.scan_counter = number
            data.append_acquisition(readout)
        wave = ismrmrd.Waveform.from_array(np.arange(10, dtype=np.uint32).reshape(2, 5), waveform_id=2)
        data.append_waveform(wave)
        last = readout.data.copy()
    with open_scan(tmp_path / "theirs.h5") as file:
        (batch,) = file.batches()
        (waveform,) = file.waveforms()
        assert file.xml == b"<ismrmrdHeader/>"
    np.testing.assert_array_equal(batch.headers["scan_counter"], range(3))
    np.testing.assert_array_equal(batch.samples[2], last)
    assert (batch.trajectory[2] == 2).all()
    assert waveform.header["waveform_id"] == 2
    np.testing.assert_array_equal(waveform.samples, np.arange(10).reshape(2, 5))


@pytest.mark.parametrize("kind", PIXEL_TYPES)
def test_images_of_every_type(tmp_path, rng, kind):
    meta = {"DataRole": ["Image"], "ImageRowDir": ["1.0", "0.0", "0.0"], "ImageComments": ["Größe < 3 & ok"]}
    images = [image(rng, kind, (2, 3, 4, 5), meta=meta) for _ in range(3)]
    path = tmp_path / "images.h5"
    assert write_images(path, images, xml=b"<ismrmrdHeader/>") == 3
    with open_scan(path) as file:
        found = list(file.images())
        assert file.xml == b"<ismrmrdHeader/>"
        assert len(file) == 0
    assert [item.meta for item in found] == [meta] * 3
    for ours, back in zip(images, found, strict=True):
        assert back.pixels.dtype == PIXEL_TYPES[kind]
        np.testing.assert_array_equal(back.pixels, ours.pixels)
        assert back.kind == ours.kind
    with ismrmrd.Dataset(path, "dataset", mode="r") as data:
        theirs = data.read_image("image_0", 1)
        attributes = ismrmrd.Meta.deserialize(theirs.attribute_string)
    np.testing.assert_array_equal(theirs.data, images[1].pixels)
    assert attributes["ImageRowDir"] == meta["ImageRowDir"]
    assert attributes["ImageComments"] == meta["ImageComments"][0]


def test_text_is_declared_as_the_c_library_reads_it(tmp_path, rng):
    write_images(tmp_path / "images.h5", [image(rng, 5, meta={"a": ["ü"]})], xml=b"<ismrmrdHeader/>")
    with h5py.File(tmp_path / "images.h5") as file:
        for name in ("xml", "image_0/attributes"):
            kind = h5py.check_string_dtype(file["dataset"][name].dtype)
            assert (kind.encoding, kind.length) == ("ascii", None)


def test_images_that_differ_in_size_are_kept(tmp_path, rng):
    shapes = [(1, 1, 4, 4), (1, 1, 6, 6), (1, 1, 4, 4)]
    images = [image(rng, 5, shape, series=2) for shape in shapes] + [image(rng, 1, (1, 1, 4, 4), series=2)]
    assert write_images(tmp_path / "images.h5", images) == 4
    with h5py.File(tmp_path / "images.h5") as file:
        assert {name: len(series["header"]) for name, series in file["dataset"].items()} == {
            "image_2": 2,
            "image_2_2": 1,
            "image_2_3": 1,
        }


def test_images_are_on_the_disk_when_the_stream_breaks(tmp_path, rng):
    def stream():
        yield image(rng, 5)
        raise ConnectionResetError

    with pytest.raises(DeliveryError, match=r"images\.h5 cannot be written"):
        write_images(tmp_path / "images.h5", stream())
    with open_scan(tmp_path / "images.h5") as file:
        assert len(list(file.images())) == 1


def test_pixels_of_another_type_are_refused(tmp_path, rng):
    odd = image(rng, 5)
    odd = msgspec.structs.replace(odd, pixels=odd.pixels.astype(np.float16))
    with pytest.raises(DeliveryError, match="pixels are float16, ISMRMRD has"):
        write_images(tmp_path / "images.h5", [odd])


def test_groups_share_a_file_and_are_not_overwritten(tmp_path, rng):
    path = tmp_path / "images.h5"
    write_images(path, [image(rng, 5)], "first")
    write_images(path, [image(rng, 5)] * 2, "second")
    with pytest.raises(ConfigError, match="already has a group 'first'"):
        write_images(path, [image(rng, 5)], "first")
    with open_scan(path, "/second/") as file:
        assert len(list(file.images())) == 2


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.h5 is not there"):
        open_scan(tmp_path / "none.h5")
    with pytest.raises(ConfigError, match="is a folder"):
        open_scan(tmp_path)
    with pytest.raises(DeliveryError, match="cannot be written"):
        write_images(tmp_path / "no" / "images.h5", [])


def test_missing_group_lists_the_groups(scan_path):
    for name in ("other", "/", ""):
        with pytest.raises(ConfigError, match=r"has no group .*; its groups are: 'dataset'"):
            open_scan(scan_path, name)


def test_other_files_are_told_apart(tmp_path, scan_path):
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(StreamError, match="not an HDF5 file"):
        open_scan(tmp_path / "text.h5")
    whole = scan_path.read_bytes()
    (tmp_path / "half.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TruncatedMessage, match="ends early"):
        open_scan(tmp_path / "half.h5")


@pytest.mark.parametrize(
    ("lost", "message"),
    [(("xml",), "has no header dataset/xml"), (("xml", "data"), "neither readouts nor images"), (("data",), "neither")],
)
def test_parts_that_are_missing(scan_path, lost, message):
    with h5py.File(scan_path, "r+") as file:
        for name in lost:
            del file["dataset"][name]
    with pytest.raises(StreamError, match=message):
        open_scan(scan_path)


def test_data_of_another_format(tmp_path):
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        file["dataset/data"] = np.zeros(4)
        file["dataset/xml"] = "<ismrmrdHeader/>"
    with pytest.raises(StreamError, match="no fields 'head' and 'data'"):
        open_scan(tmp_path / "plain.h5")


def test_no_readouts(tmp_path, scan):
    assert write_scan(tmp_path / "empty.h5", scan.header, []) == 0
    with open_scan(tmp_path / "empty.h5") as file, pytest.raises(StreamError, match="has no readouts"):
        next(file.batches())


def test_a_readout_of_the_wrong_length_is_named(scan_path):
    with h5py.File(scan_path, "r+") as file:
        row = file["dataset/data"][4]
        row["head"]["number_of_samples"] = 31
        file["dataset/data"][4] = row
    with open_scan(scan_path) as file, pytest.raises(StreamError, match=r"readout 4 of .* has 192 numbers .* says 186"):
        list(file.batches())


def test_a_file_serves_many_readers(scan_path):
    with open_scan(scan_path) as one, open_scan(scan_path) as two:
        same_readouts(one.batches(), two.batches())


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("C",)), min_size=1).filter(
    lambda text: text == text.strip()
)
LIMIT = st.builds(EncodingLimit, st.just(0), st.integers(0, 100), st.integers(0, 100))
ENCODING = st.builds(
    EncodingSpace,
    encoded_matrix=st.tuples(*[st.integers(1, 512)] * 3),
    encoded_fov_mm=st.tuples(*[st.floats(1, 500)] * 3),
    recon_matrix=st.tuples(*[st.integers(1, 512)] * 3),
    recon_fov_mm=st.tuples(*[st.floats(1, 500)] * 3),
    trajectory=st.sampled_from(["cartesian", "epi", "radial", "goldenangle", "spiral", "other"]),
    limits=st.dictionaries(st.sampled_from(["kspace_encode_step_1", "kspace_encode_step_2", "slice", "user_3"]), LIMIT),
    acceleration=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    calibration=st.sampled_from(["none", "embedded", "interleaved", "separate", "external", "other"]),
    trajectory_dimensions=st.none() | st.integers(1, 4),
)
HEADER = st.builds(
    ScanHeader,
    encodings=st.lists(ENCODING, min_size=1, max_size=2).map(tuple),
    channels=st.none() | st.integers(1, 128),
    relative_receiver_noise_bandwidth=st.floats(0.1, 1.0),
    field_strength_tesla=st.none() | st.floats(0.05, 11.7),
    measurement_id=st.none() | NAMES,
    dependencies=st.dictionaries(NAMES, NAMES, max_size=2),
    parameters=st.dictionaries(
        NAMES, NAMES | st.sampled_from(["12", "-3", "007", "1.5", "1e5", "1.50", "nan"]), max_size=3
    ),
)


@settings(max_examples=25, deadline=None)
@given(HEADER)
def test_any_header_comes_back(header):
    xml = header_xml(header)
    assert msgspec.structs.replace(parse_header(xml, DEFAULT_LIMITS), xml=b"") == header
    ismrmrd.xsd.CreateFromDocument(xml)


def test_text_that_xml_cannot_hold(scan):
    with pytest.raises(ValueError, match="cannot stand in XML"):
        header_xml(msgspec.structs.replace(scan.header, measurement_id="a\x01b"))


@pytest.mark.peer
def test_the_tools_reconstruct_our_scans(tmp_path):
    program = shutil.which("ismrmrd_recon_cartesian_2d")
    if program is None:
        pytest.skip("ismrmrd_recon_cartesian_2d (ismrmrd-tools) is not installed")
    scan = simulate_scan(64, 4, 1, 0, noise=0.0, noise_readouts=0)
    path = tmp_path / "scan.h5"
    write_scan(path, scan.header, scan.batches)
    subprocess.run([program, path], check=True, capture_output=True, timeout=60)
    with open_scan(path) as file:
        (theirs,) = file.images()
    truth, picture = np.abs(scan.reference[0, 0]), np.abs(theirs.pixels[0, 0])
    picture = picture * np.vdot(picture, truth) / np.vdot(picture, picture)
    assert np.linalg.norm(picture - truth) < 0.02 * np.linalg.norm(truth)


@pytest.mark.peer
def test_we_read_scans_of_the_tools(tmp_path):
    program = shutil.which("ismrmrd_generate_cartesian_shepp_logan")
    if program is None:
        pytest.skip("ismrmrd_generate_cartesian_shepp_logan (ismrmrd-tools) is not installed")
    options = ["-m", "32", "-c", "3", "-r", "2", "-a", "2", "-w", "8", "-C", "-k"]
    path = tmp_path / "theirs.h5"
    subprocess.run([program, *options, "-o", path], check=True, capture_output=True, timeout=60)
    with open_scan(path) as file:
        parse_header(file.xml, DEFAULT_LIMITS)
        rows = [(batch, number) for batch in file.batches(10) for number in range(len(batch))]
    with ismrmrd.Dataset(path, "dataset", mode="r") as data:
        assert len(rows) == data.number_of_acquisitions()
        for place, (batch, number) in enumerate(rows):
            readout = data.read_acquisition(place)
            np.testing.assert_array_equal(batch.samples[number], readout.data)
            if readout.trajectory_dimensions:
                np.testing.assert_array_equal(batch.trajectory[number], readout.traj)
        assert any(batch.trajectory is not None for batch, _ in rows)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "readouts", "shape"),
    [("invivo_brain_3T_16ch", 128, (16, 128)), ("skyra_bottles_14ch_R3", 69, (14, 384))],
)
def test_scanner_data(real_data, name, readouts, shape):
    with open_scan(real_data(f"mri/raw/{name}.h5")) as file:
        parse_header(file.xml, DEFAULT_LIMITS)
        batches = list(file.batches())
    assert sum(map(len, batches)) == readouts
    assert {batch.samples.shape[1:] for batch in batches} == {shape}


def test_a_png_shows_the_window(tmp_path):
    ramp = np.linspace(0, 2, 30).reshape(5, 6) * 1j
    ramp[0, 0] = np.nan
    write_png(tmp_path / "ramp.png", ramp, (0.5, 1.5))
    gray = imread(tmp_path / "ramp.png")
    assert gray.shape == (5, 6)
    wanted = np.clip(np.abs(ramp) - 0.5, 0, 1)
    wanted[0, 0] = 0
    np.testing.assert_allclose(gray, wanted, atol=0.5 / 255 + 1e-6)


def test_the_window_forgives_a_few_bright_pixels(rng):
    picture = rng.random((64, 64))
    picture[0, :4] = 1e6
    low, high = robust_window(picture)
    assert low == 0
    assert 0.9 < high < 1.1
    assert robust_window(np.zeros((4, 4))) == (0.0, 1.0)
    assert robust_window(np.full((4, 4), np.nan)) == (0.0, 1.0)
    sparse = np.zeros((64, 64))
    sparse[3, 3] = 7
    assert robust_window(sparse) == (0.0, 7.0)


@pytest.mark.parametrize("window", [(1.0, 1.0), (2.0, 1.0), (0.0, np.nan)])
def test_a_window_must_ascend(tmp_path, window):
    with pytest.raises(ValueError, match="two finite ascending values"):
        write_png(tmp_path / "x.png", np.ones((4, 4)), window)


def test_a_picture_has_two_axes(tmp_path):
    with pytest.raises(ValueError, match=r"image has shape \(2, 4, 4\)"):
        write_png(tmp_path / "x.png", np.ones((2, 4, 4)))


def test_the_comparison_shows_what_differs(tmp_path, rng):
    truth = rng.random((40, 32))
    wrong = truth.copy()
    wrong[:20] += 0.5
    path = tmp_path / "comparison.png"
    comparison_figure(path, Panel("Reference", truth), [Panel("Same", truth, "inf dB"), Panel("Wrong", wrong, "3 dB")])
    page = imread(path)[..., :3]
    height, width, _ = page.shape
    assert width > height > 300
    bright = page.max(axis=-1)
    lower = bright[int(0.60 * height) : int(0.97 * height)]
    same, other = lower[:, int(0.37 * width) : int(0.63 * width)], lower[:, int(0.70 * width) : int(0.97 * width)]
    assert same.max() < 0.1
    half = len(other) // 2
    assert np.median(other[: half - 20]) > 0.9
    assert np.median(other[half + 20 :]) < 0.1


def test_a_comparison_needs_panels_that_fit(tmp_path):
    reference = Panel("Reference", np.ones((8, 8)))
    with pytest.raises(ValueError, match="panels is empty"):
        comparison_figure(tmp_path / "x.png", reference, [])
    with pytest.raises(ValueError, match=r"panel 'Other' has shape \(4, 4\), the reference has \(8, 8\)"):
        comparison_figure(tmp_path / "x.png", reference, [Panel("Other", np.ones((4, 4)))])
    with pytest.raises(ValueError, match="error_gain is 0"):
        comparison_figure(tmp_path / "x.png", reference, [reference], error_gain=0)
