"""Stored photoacoustic scans: IPASC as its own reference reads and judges it, iThera's files, plain numbers with a geometry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np
import pytest
from scanside.adapters import photoacoustic as pat
from scanside.adapters.files.ipasc import IpascWriter, read_ipasc, write_ipasc
from scanside.adapters.files.msot import read_msot
from scanside.adapters.files.photoacoustic import open_recording
from scanside.engine.errors import (
    ConfigError,
    DeliveryError,
    LimitExceeded,
    PeerError,
    ScansideError,
    StreamError,
    TruncatedMessage,
)
from scanside.engine.messages import PhotoacousticFrame, PhotoacousticHeader
from scanside.engine.simulation.photoacoustic import ring

ELEMENTS, SAMPLES = 12, 20


def doubles(*values: float) -> bytes:
    return np.array(values, "<f8").tobytes()


def header(**changes: Any) -> PhotoacousticHeader:
    values: dict[str, Any] = {
        "stream": "00112233445566778899aabbccddeeff",
        "elements": ELEMENTS,
        "samples": SAMPLES,
        "positions_m": ring(ELEMENTS, 0.04),
        "sampling_rate_hz": 4e7,
        "wavelengths_m": (7e-7, 8.5e-7),
    }
    return PhotoacousticHeader(**(values | changes))


COMPLETE = {
    "acquisition": {
        "overall_gain": 2.0,
        "time_gain_compensation": doubles(*range(SAMPLES)),
        "frequency_domain_filter": doubles(1e5, 1.0, 8e6, 1.0),
        "acoustic_coupling_agent": "water",
        "scanning_method": "handheld",
        "photoacoustic_imaging_device_reference": "device 1",
        "regions_of_interest": {"liver": doubles(0, 0, 0, 1e-3, 1e-3, 1e-3)},
    },
    "device": {
        "general": {"unique_identifier": "ring-12", "field_of_view": (-0.01, 0.01, -0.01, 0.01, 0.0, 0.0)},
        "detectors": {
            "detector_geometry_type": "CUBOID",
            "detector_geometry": doubles(1e-3, 5e-3, 1e-4),
            "frequency_response": doubles(1e6, 0.5, 5e6, 1.0),
            "angular_response": doubles(0.0, 1.0, 0.3, 0.5),
        },
        "illuminators": {
            "fibre": {
                "illuminator_position": doubles(0, 0, 0.03),
                "illuminator_orientation": doubles(0, 0, -1),
                "illuminator_geometry": doubles(1e-3),
                "illuminator_geometry_type": "CIRCULAR",
                "wavelength_range": doubles(6.6e-7, 9.8e-7, 1e-9),
                "beam_energy_profile": doubles(7e-7, 0.05, 8e-7, 0.06),
                "beam_stability_profile": doubles(7e-7, 0.01, 8e-7, 0.02),
                "beam_intensity_profile": doubles(0, 1, 1e-3, 0.5),
                "intensity_profile_distance": 0.02,
                "pulse_width": 7e-9,
                "beam_divergence_angles": 0.2,
            }
        },
    },
}


def frames(count: int, rng: np.random.Generator, wavelengths: int = 2, **changes: Any) -> list[PhotoacousticFrame]:
    made = []
    for number in range(count):
        samples = rng.integers(-3000, 3000, (ELEMENTS, SAMPLES)).astype("<i2")
        pose = tuple(float(v) for v in rng.normal(size=12))
        values: dict[str, Any] = {"pulse_energy_joule": 0.01 + number, "temperature_kelvin": 310.0, "pose": pose}
        values |= {"timestamp_s": number / 25, "wavelength": number % wavelengths}
        made.append(PhotoacousticFrame(seq=number, shot=number, samples=samples, **(values | changes)))
    return made


def assert_same(got: PhotoacousticFrame, sent: PhotoacousticFrame) -> None:
    for name in PhotoacousticFrame.__struct_fields__:
        if name == "samples":
            assert np.array_equal(got.samples, sent.samples)
            assert got.samples.dtype == sent.samples.dtype
        elif name != "received":
            assert getattr(got, name) == getattr(sent, name), name


# --- IPASC -------------------------------------------------------------------------------------------------------------------


def test_what_is_recorded_is_read_again(tmp_path: Path, rng: np.random.Generator) -> None:
    gains = rng.uniform(0.5, 2, ELEMENTS)
    sent = header(
        details=COMPLETE,
        speed_of_sound=1512.0,
        element_gain=gains,
        t0_samples=-3.5,
        adc_offset=4.0,
        dead=(2, 7),
        pixels=(64, 32),
        field_of_view_m=(-0.01, 0.01, -0.02, 0.02),
        averages=4,
        orientations=-ring(ELEMENTS, 1.0),
    )
    shots = frames(6, rng)
    assert write_ipasc(tmp_path / "scan.hdf5", sent, shots) == 6
    with open_recording(tmp_path / "scan.hdf5") as recording:
        assert len(recording) == 6
        for got, shot in zip(recording.frames(), shots, strict=True):
            assert_same(got, shot)
        for name in PhotoacousticHeader.__struct_fields__:
            got_back, due = getattr(recording.header, name), getattr(sent, name)
            if name != "details":
                assert np.all(np.isclose(got_back, due) if isinstance(due, np.ndarray) else got_back == due), name
        again = pat.header_message(recording.header)
    before = pat.header_message(sent)
    assert again.acquisition == before.acquisition
    assert (again.device.general, again.device.illuminators) == (before.device.general, before.device.illuminators)
    rest = {"detector_orientation": None}  # normalized anew each time, which moves the last bit
    assert msgspec.structs.replace(again.device.detectors, **rest) == msgspec.structs.replace(
        before.device.detectors, **rest
    )


def test_gaps_parts_and_late_frames_lie_in_their_cells(tmp_path: Path, rng: np.random.Generator) -> None:
    whole = frames(8, rng)
    with IpascWriter(tmp_path / "scan.hdf5", header(adc_offset=5.0)) as writer:
        for number in (0, 1, 3, 2, 6):
            shot = whole[number]
            for first in (0, 4):
                rows = slice(first, first + 4 if first == 0 else ELEMENTS)
                part = msgspec.structs.replace(
                    shot, samples=shot.samples[rows], first_element=first, seq=2 * number + (first > 0)
                )
                writer.add(part)
    with read_ipasc(tmp_path / "scan.hdf5") as recording:
        got = {frame.shot: frame for frame in recording.frames()}
    assert sorted(got) == [0, 1, 2, 3, 6]
    for number, frame in got.items():
        assert np.array_equal(frame.samples, whole[number].samples)
        assert (frame.wavelength, frame.timestamp_s) == (number % 2, number / 25)
    with h5py.File(tmp_path / "scan.hdf5") as file:
        data, seq = file["binary_time_series_data"], file["x_scanside/seq"][()]
        empty = np.flatnonzero(seq < 0)
        assert len(empty) == data.shape[2] * data.shape[3] - 5
        for cell in empty:
            assert (data[:, :, cell % 2, cell // 2] == 5).all()


def test_a_recording_does_not_overwrite_another(tmp_path: Path) -> None:
    write_ipasc(tmp_path / "scan.hdf5", header(), [])
    with pytest.raises(DeliveryError, match=r"scan\.hdf5"):
        IpascWriter(tmp_path / "scan.hdf5", header())


@pytest.fixture
def pacfish() -> Any:
    return pytest.importorskip("pacfish", reason="pacfish, the reference of the IPASC format, is not installed")


def test_a_recording_is_complete_and_consistent_for_the_reference(
    tmp_path: Path, rng: np.random.Generator, pacfish: Any
) -> None:
    sent = header(
        details=COMPLETE, speed_of_sound=1512.0, element_gain=np.ones(ELEMENTS), orientations=-ring(ELEMENTS, 1.0)
    )
    shots = frames(6, rng)
    write_ipasc(tmp_path / "scan.hdf5", sent, shots)
    loaded = pacfish.load_data(str(tmp_path / "scan.hdf5"))
    assert pacfish.CompletenessChecker().check_acquisition_meta_data(loaded.meta_data_acquisition)
    assert pacfish.CompletenessChecker().check_device_meta_data(loaded.meta_data_device)
    assert pacfish.ConsistencyChecker().check_acquisition_meta_data(loaded.meta_data_acquisition)
    assert pacfish.ConsistencyChecker().check_device_meta_data(loaded.meta_data_device)
    assert np.array_equal(loaded.binary_time_series_data[:, :, 1, 2], shots[5].samples)
    assert loaded.get_sampling_rate() == 4e7
    assert np.allclose(sorted(map(tuple, loaded.get_detector_position())), sorted(map(tuple, sent.positions_m)))


def test_a_bare_recording_has_every_mandatory_tag_of_the_reference(
    tmp_path: Path, rng: np.random.Generator, pacfish: Any
) -> None:
    write_ipasc(
        tmp_path / "scan.hdf5", header(), frames(2, rng, pulse_energy_joule=None, temperature_kelvin=None, pose=None)
    )
    loaded = pacfish.load_data(str(tmp_path / "scan.hdf5"))
    for tag in pacfish.MetadataAcquisitionTags.TAGS:
        value = loaded.meta_data_acquisition.get(tag.tag)
        assert not tag.mandatory or (value is not None and tag.evaluate_value_range(value)), tag.tag
    general = loaded.meta_data_device["general"]
    assert general["field_of_view"].shape == (6,)
    assert len(loaded.meta_data_device["detectors"]) == ELEMENTS


def test_a_file_that_the_reference_wrote_is_read(tmp_path: Path, rng: np.random.Generator, pacfish: Any) -> None:
    signals = rng.normal(size=(ELEMENTS, SAMPLES, 2, 3))
    acquisition = {
        "uuid": "measurement 1",
        "encoding": "raw",
        "compression": "raw",
        "data_type": "double",
        "dimensionality": "time",
        "sizes": np.array(signals.shape),
        "ad_sampling_rate": 2e7,
        "acquisition_wavelengths": np.array([7e-7, 8.5e-7]),
        "speed_of_sound": 1480.0,
    }
    creator = pacfish.DeviceMetaDataCreator()
    creator.set_general_information(uuid="theirs", fov=np.array([0, 0.01, 0, 0.01, 0, 0.01]))
    positions = ring(ELEMENTS, 0.03)
    for position in positions:
        element = pacfish.DetectionElementCreator()
        element.set_detector_position(position)
        element.set_detector_orientation(-position / 0.03)
        creator.add_detection_element(element.get_dictionary())
    data = pacfish.PAData(signals, acquisition, creator.finalize_device_meta_data())
    pacfish.write_data(str(tmp_path / "theirs.hdf5"), data)
    with read_ipasc(tmp_path / "theirs.hdf5") as recording:
        assert recording.header.sampling_rate_hz == 2e7
        assert recording.header.speed_of_sound == 1480.0
        assert np.allclose(recording.header.positions_m, positions)
        shots = list(recording.frames())
    assert [(shot.seq, shot.wavelength) for shot in shots] == [(n, n % 2) for n in range(6)]
    step = np.abs(signals).max() / 32000
    for shot in shots:
        original = signals[:, :, shot.seq % 2, shot.seq // 2]
        assert np.abs(shot.samples * step - original).max() <= 0.51 * step


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda file: file.__delitem__("binary_time_series_data"), "binary_time_series_data"),
        (lambda file: file.__delitem__("meta_data/ad_sampling_rate"), "ad_sampling_rate"),
        (lambda file: file.__delitem__("meta_data_device/detectors/detection_element_3"), "11 detection elements"),
        (lambda file: file["meta_data/ad_sampling_rate"].__setitem__((), 0.0), "ad_sampling_rate is 0.0"),
        (lambda file: file.__delitem__("meta_data"), "meta_data"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, rng: np.random.Generator, damage: Any, says: str) -> None:
    write_ipasc(tmp_path / "scan.hdf5", header(), frames(2, rng))
    with h5py.File(tmp_path / "scan.hdf5", "r+") as file:
        damage(file)
    with pytest.raises(StreamError, match=says):
        read_ipasc(tmp_path / "scan.hdf5")


# --- iThera ------------------------------------------------------------------------------------------------------------------


def msot(folder: Path, samples: np.ndarray, **changes: str) -> Path:
    """A scan as ViewMSOT lays it out: (frames, wavelengths, projections, samples) uint16."""
    rounds, wavelengths, projections, length = samples.shape
    places = ring(projections, 0.0405)
    values = {
        "RECORDED-LENGTH": f"<RECORDED-LENGTH>{length}</RECORDED-LENGTH>",
        "SAMPLING-FREQUENCY": "<SAMPLING-FREQUENCY>40</SAMPLING-FREQUENCY>",
        "WAVELENGTHS": "<WAVELENGTHS>"
        + "".join(f"<WAVELENGTH>{700 + 50 * n}</WAVELENGTH>" for n in range(wavelengths))
        + "</WAVELENGTHS>",
        "PROJECTIONS": "".join(
            "<PROJECTION>" + "".join(f"<VALUE>{value!r}</VALUE>" for value in place.tolist()) + "</PROJECTION>"
            for place in places
        ),
        "FRAMES": "".join(
            f'<DataModelScanFrame><Frame timestamp="{10_000_000 + 400_000 * n}" ultraSound-frame-offset="0">'
            f"<TEMPERATURE>34.5</TEMPERATURE><LASER-ENERGY>{20 + n}</LASER-ENERGY><REPETITION>0</REPETITION></Frame>"
            "</DataModelScanFrame>"
            for n in range(rounds * wavelengths + int(changes.pop("extra_frames", "0")))
        ),
    } | changes
    text = (
        '<?xml version="1.0" encoding="utf-8"?><DataModelMsotProject xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">'
        f"<ScanNode><Name>Scan_1</Name></ScanNode><HARDWARE-DESC>{values['SAMPLING-FREQUENCY']}"
        f"<FRAME-DESC><EQUAL>{values['PROJECTIONS']}</EQUAL></FRAME-DESC></HARDWARE-DESC><MEASUREMENT-DESC>"
        f"{values['RECORDED-LENGTH']}{values['WAVELENGTHS']}</MEASUREMENT-DESC><ScanFrames>{values['FRAMES']}</ScanFrames>"
        "</DataModelMsotProject>"
    )
    folder.mkdir(exist_ok=True)
    (folder / "Scan_1.msot").write_text(text, "utf-8")
    (folder / "Scan_1.bin").write_bytes(samples.astype("<u2").tobytes())
    return folder


@pytest.fixture
def msot_samples(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(30000, 35000, (3, 2, ELEMENTS, SAMPLES)).astype(np.uint16)


def test_an_msot_scan_is_read_from_its_file_or_its_folder(tmp_path: Path, msot_samples: np.ndarray) -> None:
    folder = msot(tmp_path / "Scan_1", msot_samples, extra_frames="1")
    for place in (folder, folder / "Scan_1.msot"):
        with open_recording(place) as recording:
            assert (recording.header.elements, recording.header.samples) == (ELEMENTS, SAMPLES)
            assert recording.header.sampling_rate_hz == 40e6
            assert recording.header.wavelengths_m == pytest.approx((7e-7, 7.5e-7))
            assert np.allclose(recording.header.positions_m, ring(ELEMENTS, 0.0405))
            shots = list(recording.frames())
    assert len(shots) == 6
    assert np.array_equal(shots[3].samples, msot_samples[1, 1])
    assert [shot.timestamp_s for shot in shots] == pytest.approx([0.04 * n for n in range(6)])
    assert shots[2].pulse_energy_joule == pytest.approx(0.022)
    assert shots[2].temperature_kelvin == pytest.approx(307.65)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"SAMPLING-FREQUENCY": ""}, PeerError, "SAMPLING-FREQUENCY is missing"),
        (
            {"SAMPLING-FREQUENCY": "<SAMPLING-FREQUENCY>fast</SAMPLING-FREQUENCY>"},
            PeerError,
            "'fast', which is no number",
        ),
        ({"SAMPLING-FREQUENCY": "<SAMPLING-FREQUENCY>0</SAMPLING-FREQUENCY>"}, PeerError, "ad_sampling_rate is 0"),
        ({"WAVELENGTHS": ""}, PeerError, "WAVELENGTH is missing"),
        ({"PROJECTIONS": "<PROJECTION><VALUE>1</VALUE></PROJECTION>"}, PeerError, "3 VALUE each"),
        ({"RECORDED-LENGTH": "<RECORDED-LENGTH>99999</RECORDED-LENGTH>"}, LimitExceeded, r"limits\.samples"),
        (
            {"RECORDED-LENGTH": "<RECORDED-LENGTH>2030</RECORDED-LENGTH>"},
            TruncatedMessage,
            r"Scan_1\.bin has 2880 bytes",
        ),
        ({"FRAMES": ""}, PeerError, "there is no whole round"),
    ],
)
def test_msot_scans_that_cannot_be_used_are_refused_by_name(
    tmp_path: Path, msot_samples: np.ndarray, changes: dict[str, str], error: type[ScansideError], says: str
) -> None:
    with pytest.raises(error, match=says):
        read_msot(msot(tmp_path / "Scan_1", msot_samples, **changes))


def test_an_msot_file_without_samples_is_refused(tmp_path: Path, msot_samples: np.ndarray) -> None:
    folder = msot(tmp_path / "Scan_1", msot_samples)
    (folder / "Scan_1.bin").unlink()
    with pytest.raises(ConfigError, match=r"Scan_1\.bin is missing"):
        read_msot(folder)


# --- plain numbers -----------------------------------------------------------------------------------------------------------

RING = "sampling_rate_hz = 50e6\nspeed_of_sound = 1490\n[ring]\nradius_m = 0.04\n"


def test_plain_numbers_with_a_geometry_are_a_recording(tmp_path: Path, rng: np.random.Generator) -> None:
    signals = rng.normal(size=(ELEMENTS, SAMPLES)).astype(np.float32)
    np.savez(tmp_path / "scan.npz", sinogram=signals)
    (tmp_path / "scan.toml").write_text("first_sample = 3\nlast_sample = 15\n" + RING)
    with open_recording(tmp_path / "scan.npz") as recording:
        (shot,) = recording.frames()
        assert recording.header.speed_of_sound == 1490
        angles = np.arange(ELEMENTS) * 2 * np.pi / ELEMENTS
        assert np.allclose(recording.header.positions_m[:, 0], 0.04 * np.cos(angles))
    step = np.abs(signals).max() / 32000
    assert np.abs(shot.samples * step - signals)[:, 3:15].max() <= 0.51 * step
    assert not shot.samples[:, :3].any()
    assert not shot.samples[:, 15:].any()


def test_integers_and_many_frames_stay_as_they_are(tmp_path: Path, rng: np.random.Generator) -> None:
    signals = rng.integers(0, 60000, (4, ELEMENTS, SAMPLES)).astype(np.uint16)
    np.save(tmp_path / "scan.npy", signals)
    np.save(tmp_path / "places.npy", ring(ELEMENTS, 0.03).T)
    (tmp_path / "array.toml").write_text('sampling_rate_hz = 4e7\npositions = "places.npy"\nadc_offset = 30000\n')
    with open_recording(tmp_path / "scan.npy", tmp_path / "array.toml") as recording:
        shots = list(recording.frames())
        assert np.allclose(recording.header.positions_m, ring(ELEMENTS, 0.03))
    assert all(np.array_equal(shot.samples, signal) for shot, signal in zip(shots, signals, strict=True))


@pytest.mark.parametrize(
    ("geometry", "says"),
    [
        (None, r"give --geometry FILE, or put scan\.toml beside it"),
        ("sampling_rate_hz = 5e7", r"give either \[ring\] or positions"),
        (RING + "diameter = 3", "unknown field"),
        ("sampling_rate_hz = 0\n[ring]\nradius_m=1", "not a geometry"),
        ("not toml", "not a geometry"),
        ('sampling_rate_hz = 5e7\npositions = "scan.npz"', r"positions have shape"),
    ],
)
def test_geometries_that_cannot_be_used_are_refused(tmp_path: Path, geometry: str | None, says: str) -> None:
    np.savez(tmp_path / "scan.npz", sinogram=np.zeros((ELEMENTS, SAMPLES)))
    if geometry is not None:
        (tmp_path / "scan.toml").write_text(geometry)
    with pytest.raises(ConfigError, match=says):
        open_recording(tmp_path / "scan.npz")


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "scan.toml").write_text(RING)
    with pytest.raises(ConfigError, match="not a file of plain arrays"):
        open_recording(tmp_path / "scan.npy")


@pytest.mark.parametrize("name", ["absent.hdf5", "scan.txt"])
def test_unknown_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "scan.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"no such file|unknown kind of file"):
        open_recording(tmp_path / name)


def test_the_measured_spheres_can_be_replayed(tmp_path: Path, real_data: Any) -> None:
    (tmp_path / "g.toml").write_text("sampling_rate_hz = 50e6\n[ring]\nradius_m = 0.0438\n")
    with open_recording(real_data("pat/three_spheres_512x2000.npz"), tmp_path / "g.toml") as recording:
        (shot,) = recording.frames()
    assert shot.samples.shape == (512, 2000)
    assert np.abs(shot.samples).max() == 32000
