"""PAT1 as bytes: the document holds for the code, what goes in comes out, what is wrong is refused before it costs memory."""

from __future__ import annotations

import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scanside.adapters import photoacoustic as pat
from scanside.engine.errors import LimitExceeded, PeerError, StreamError
from scanside.engine.limits import Limits
from scanside.engine.messages import EndOfStream, PhotoacousticFrame, PhotoacousticHeader

PAGE = Path(__file__).parents[2].joinpath("docs", "wire.md").read_text("utf-8")
STREAM = "00112233445566778899aabbccddeeff"


def example(name: str) -> memoryview:
    dump = re.search(rf"`PAT1 {name}`:\n\n```hex\n([0-9a-f\s]+)```", PAGE)
    assert dump is not None, f"docs/wire.md has no example of a PAT1 {name}"
    return memoryview(bytes.fromhex(dump[1]))


def header(**changes: Any) -> PhotoacousticHeader:
    angles = np.arange(4) * np.pi / 2
    values: dict[str, Any] = {
        "stream": STREAM,
        "elements": 4,
        "samples": 8,
        "positions_m": 0.04 * np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1),
        "sampling_rate_hz": 4e7,
        "wavelengths_m": (8e-7,),
    }
    return PhotoacousticHeader(**(values | changes))


def frame(**changes: Any) -> PhotoacousticFrame:
    return PhotoacousticFrame(**({"seq": 0, "shot": 0, "samples": np.ones((4, 8), "<i2")} | changes))


def views(*parts: bytes | memoryview) -> list[memoryview]:
    return [memoryview(bytes(part)) for part in parts]


def decoded(*parts: bytes | memoryview, **options: Any) -> list[Any]:
    return list(pat.decode(views(*parts), 1.0, options.pop("header", None), **options))


# --- the document ------------------------------------------------------------------------------------------------------------


def test_the_documented_stream_is_what_the_code_reads_and_writes() -> None:
    parts = [example(name) for name in ("header", "frame", "samples", "end")]
    head, shot, end = pat.decode(parts, 1.0, None)
    assert isinstance(head, PhotoacousticHeader)
    assert isinstance(shot, PhotoacousticFrame)
    assert head.positions_m.tolist() == [[0.04, 0, 0], [-0.04, 0, 0]]
    assert (head.sampling_rate_hz, head.speed_of_sound, head.t0_samples) == (4e7, 1500.0, 2.0)
    assert head.wavelengths_m == (7e-7, 8.5e-7)
    assert (shot.seq, shot.shot, shot.wavelength, shot.timestamp_s, shot.intact) == (7, 7, 1, 0.28, True)
    assert shot.samples.tolist() == [[0, 100, -100, 0], [1, 2, 3, -32768]]
    assert end == EndOfStream(last=7, frames=8)
    assert pat.encode_header(head) == parts[0]
    assert pat.encode_frame(shot, checksum=True) == parts[1:3]
    assert pat.encode_end(7, 8) == parts[3]


def test_the_documented_head_can_be_made_without_this_package() -> None:
    """What a program in another language does: the magic and a msgpack map."""
    fields = {"type": "end", "seq_last": 7, "frames_sent": 8}
    assert b"PAT1" + msgpack.packb(fields) == example("end")
    position = struct.pack("<6d", 0.04, 0, 0, -0.04, 0, 0)
    assert position in bytes(example("header"))


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("PAT1 header", pat.Header),
        ("PAT1 acquisition", pat.Acquisition),
        ("PAT1 device.general", pat.General),
        ("PAT1 device.detectors", pat.Detectors),
        ("PAT1 device.illuminators", pat.Illuminator),
        ("PAT1 x_scanside", pat.Extra),
        ("PAT1 frame", pat.Frame),
        ("PAT1 end", pat.End),
    ],
)
def test_the_documented_fields_are_those_of_the_structs(title: str, kind: type[msgspec.Struct]) -> None:
    section = re.search(rf"\n###+ {re.escape(title)}\n(.*?)(?=\n##)", PAGE, re.DOTALL)
    assert section is not None
    documented = re.findall(r"^\| `(\w+)` \|", section[1], re.MULTILINE)
    tag = ["type"] if kind.__struct_config__.tag else []
    assert sorted(documented) == sorted([*tag, *kind.__struct_fields__])


# --- what goes in comes out --------------------------------------------------------------------------------------------------

finite = st.floats(-1e3, 1e3)
positive = st.floats(1e-12, 1e12)


@st.composite
def headers(draw: st.DrawFn) -> PhotoacousticHeader:
    elements, samples = draw(st.integers(1, 12)), draw(st.integers(1, 30))
    vectors = arrays.arrays(np.float64, (elements, 3), elements=st.floats(-1, 1))
    directions = st.none() | vectors.filter(lambda v: bool((np.linalg.norm(v, axis=1) > 1e-6).all()))
    gains = st.none() | arrays.arrays(np.float64, elements, elements=st.floats(1e-3, 1e3))
    x0, y0 = draw(finite), draw(finite)
    return header(
        elements=elements,
        samples=samples,
        data_type=draw(st.sampled_from(["int16", "uint16"])),
        positions_m=draw(vectors),
        orientations=draw(directions),
        sampling_rate_hz=draw(positive),
        wavelengths_m=tuple(draw(st.lists(positive, min_size=1, max_size=5))),
        speed_of_sound=draw(st.none() | st.floats(300, 10000)),
        averages=draw(st.integers(1, 100)),
        element_gain=draw(gains),
        t0_samples=draw(finite),
        adc_offset=draw(finite),
        dead=tuple(sorted(draw(st.sets(st.integers(0, elements - 1))))),
        pixels=draw(st.none() | st.tuples(st.integers(1, 4096), st.integers(1, 4096))),
        field_of_view_m=draw(st.none() | st.just((x0, x0 + 1, y0, y0 + 2))),
    )


def alike(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return bool(np.allclose(a, b, rtol=1e-12, atol=0))
    return a == b


@given(headers())
def test_headers_survive_the_wire(sent: PhotoacousticHeader) -> None:
    (got,) = decoded(pat.encode_header(sent))
    for name in PhotoacousticHeader.__struct_fields__:
        if name == "orientations" and sent.orientations is not None:
            unit = sent.orientations / np.linalg.norm(sent.orientations, axis=1, keepdims=True)
            assert np.allclose(got.orientations, unit)
        elif name != "details":
            assert alike(getattr(got, name), getattr(sent, name)), name


@given(
    arrays.arrays(st.sampled_from([np.dtype("<i2"), np.dtype("<u2")]), st.tuples(st.integers(1, 4), st.just(8))),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**63 - 1),
    st.floats(0, 1e9),
    st.none() | positive,
    st.integers(0, 7),
    st.booleans(),
    st.data(),
)
def test_frames_survive_the_wire(
    samples: np.ndarray,
    seq: int,
    shot: int,
    timestamp: float,
    energy: float | None,
    flags: int,
    checksum: bool,
    data: st.DataObject,
) -> None:
    first = data.draw(st.integers(0, 4 - len(samples)))
    pose = data.draw(st.none() | st.tuples(*[finite] * 12))
    sent = frame(seq=seq, shot=shot, samples=samples, first_element=first, timestamp_s=timestamp)
    sent = msgspec.structs.replace(sent, pulse_energy_joule=energy, flags=flags, pose=pose)
    kind = "int16" if samples.dtype == "<i2" else "uint16"
    (got,) = decoded(*pat.encode_frame(sent, checksum=checksum), header=header(data_type=kind))
    assert np.array_equal(got.samples, samples)
    for name in ("seq", "shot", "first_element", "timestamp_s", "pulse_energy_joule", "flags", "pose", "intact"):
        assert getattr(got, name) == getattr(sent, name), name


def test_samples_are_views_on_what_was_received() -> None:
    head, samples = pat.encode_frame(frame())
    raw = bytearray(samples)
    (got,) = pat.decode([memoryview(head), memoryview(raw)], 1.0, header())
    raw[0:2] = b"\x07\x00"
    assert got.samples[0, 0] == 7


@given(st.integers(0, 63), st.integers(1, 255))
def test_a_changed_byte_is_noticed_by_the_checksum(place: int, change: int) -> None:
    head, samples = pat.encode_frame(frame(), checksum=True)
    raw = bytearray(samples)
    raw[place] ^= change
    (got,) = pat.decode([memoryview(head), memoryview(raw)], 1.0, header())
    assert not got.intact


def test_big_endian_samples_are_turned_round() -> None:
    (got,) = decoded(*pat.encode_frame(frame(samples=np.full((4, 8), 258, ">i2"))), header=header())
    assert (got.samples == 258).all()


# --- what is refused ---------------------------------------------------------------------------------------------------------


def fields(**changes: Any) -> dict[str, Any]:
    """The documented header as a map, with values replaced by dotted path; None takes a field away."""
    values: dict[str, Any] = msgpack.unpackb(bytes(example("header"))[4:])
    for path, value in changes.items():
        *tables, key = path.split("__")
        table = values
        for name in tables:
            table = table.setdefault(name, {})
        table[key] = value
    return values


def raw(values: dict[str, Any]) -> bytes:
    return b"PAT1" + msgpack.packb(values)


NAN = float("nan")
WRONG_HEADERS: dict[str, tuple[dict[str, Any], str]] = {
    "geometry of another length": (
        {"device__detectors__detector_position": bytes(24)},
        r"detector_position has 24 bytes; expected 6 doubles, 48 bytes",
    ),
    "NaN position": (
        {"device__detectors__detector_position": struct.pack("<6d", 0, 0, 0, NAN, 0, 0)},
        r"detector_position: number 3 is nan",
    ),
    "positions in mm": (
        {"device__detectors__detector_position": struct.pack("<6d", 400, 0, 0, -400, 0, 0)},
        r"detector_position reaches 400 m; positions are in m",
    ),
    "orientation without direction": (
        {"device__detectors__detector_orientation": struct.pack("<6d", 1, 0, 0, 0, 0, 0)},
        r"detector_orientation of element 1 has no direction",
    ),
    "sampling rate 0": ({"acquisition__ad_sampling_rate": 0.0}, r"ad_sampling_rate is 0.0; it must be above 0"),
    "sampling rate NaN": ({"acquisition__ad_sampling_rate": NAN}, r"ad_sampling_rate is nan"),
    "no wavelength": ({"acquisition__acquisition_wavelengths": []}, r"acquisition_wavelengths"),
    "wavelength 0": ({"acquisition__acquisition_wavelengths": [7e-7, 0.0]}, r"acquisition_wavelengths\[1\] is 0.0"),
    "speed of light": ({"acquisition__speed_of_sound": 3e8}, r"speed_of_sound is 3e\+08|speed_of_sound is 300000000.0"),
    "another number of detectors": ({"device__general__num_detectors": 3}, r"num_detectors is 3, sizes says 2"),
    "dead element outside": ({"x_scanside__dead_elements": [2]}, r"dead_elements has 2, the array has elements 0 to 1"),
    "infinite delay": ({"x_scanside__t0_samples": float("inf")}, r"must be finite"),
    "field of view backwards": ({"x_scanside__field_of_view": [1.0, 0.0, 0.0, 1.0]}, r"starts must lie before ends"),
    "compressed": ({"acquisition__compression": "zstd"}, r"compression"),
    "float samples": ({"acquisition__data_type": "float32"}, r"data_type"),
    "unknown field": ({"acquisition__gain": 1.0}, r"unknown field `gain`"),
    "unknown type": ({"type": "pickle"}, r"unknown type pickle"),
    "another schema": ({"schema": "PAT2.0"}, r"schema"),
    "stream is a path": ({"stream": "../../etc/passwd"}, r"stream"),
}


@pytest.mark.parametrize(("changes", "says"), WRONG_HEADERS.values(), ids=WRONG_HEADERS.keys())
def test_wrong_headers_are_refused_by_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(PeerError, match=says):
        decoded(raw(fields(**changes)))


@pytest.mark.parametrize(
    ("sizes", "limit"),
    [([100_000, 4], "limits.channels"), ([2, 100_000], "limits.samples"), ([1024, 65_535], "limits.acquisition_bytes")],
)
def test_sizes_are_checked_before_anything_is_allocated(sizes: list[int], limit: str) -> None:
    data = raw(fields(acquisition__sizes=sizes, device__general__num_detectors=sizes[0]))
    tracemalloc.start()
    with pytest.raises(LimitExceeded, match=re.escape(limit)):
        decoded(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_header_over_its_limit_is_not_unpacked() -> None:
    with pytest.raises(LimitExceeded, match="photoacoustic_header_bytes"):
        decoded(pat.encode_header(header()), limits=Limits(photoacoustic_header_bytes=100))


def changed(**changes: Any) -> bytes:
    """The documented frame with values replaced."""
    return raw(msgpack.unpackb(bytes(example("frame"))[4:]) | changes)


WRONG_FRAMES: dict[str, tuple[Callable[[], list[bytes]], str]] = {
    "more elements than the header": (lambda: [changed(det_count=3, bytes=24), bytes(24)], "the header says 2"),
    "elements behind the last": (lambda: [changed(det_first=1), bytes(16)], "elements 1 to 2, the header says 2"),
    "fewer bytes than announced": (lambda: [changed(), bytes(14)], "announces 16 bytes and has 14"),
    "announced bytes wrong": (lambda: [changed(bytes=32), bytes(32)], "are 16"),
    "no samples": (lambda: [changed()], "without its samples"),
    "wavelength without number": (lambda: [changed(wavelength_index=2), bytes(16)], "wavelength_index 2"),
    "energy 0": (lambda: [changed(pulse_energy=0.0), bytes(16)], "pulse_energy is 0.0"),
    "time NaN": (lambda: [changed(measurement_timestamps=NAN), bytes(16)], "finite"),
    "negative count": (lambda: [changed(seq=-1), bytes(16)], "seq"),
    "pose of 3 numbers": (lambda: [changed(measurement_spatial_poses=[0.0] * 3), bytes(16)], "spatial_poses"),
    "unknown flag": (lambda: [changed(flags=8), bytes(16)], "flags"),
    "unknown field": (lambda: [changed(x=1), bytes(16)], "unknown field `x`"),
    "long head": (lambda: [changed(x="y" * 5000), bytes(16)], "the limit is 4096"),
}


@pytest.mark.parametrize(("make", "says"), WRONG_FRAMES.values(), ids=WRONG_FRAMES.keys())
def test_wrong_frames_are_refused_by_name(make: Callable[[], list[bytes]], says: str) -> None:
    with pytest.raises(PeerError, match=says):
        decoded(example("header"), *make())


def test_a_frame_before_the_header_is_refused() -> None:
    with pytest.raises(PeerError, match="send the header first"):
        decoded(*pat.encode_frame(frame()))


READ_OR_REFUSED = (PhotoacousticHeader, PhotoacousticFrame, EndOfStream, StreamError)


def attempted(*parts: bytes) -> list[object]:
    try:
        return decoded(*parts)
    except StreamError as error:
        return [error]


@given(st.binary(max_size=300) | st.binary(max_size=300).map(lambda data: b"PAT1" + data))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    assert all(isinstance(item, READ_OR_REFUSED) for item in attempted(data, data))


@given(st.integers(4, 400), st.integers(0, 255))
def test_a_damaged_header_is_read_or_refused(place: int, value: int) -> None:
    data = bytearray(example("header"))
    data[place % len(data)] = value
    assert all(isinstance(item, READ_OR_REFUSED) for item in attempted(bytes(data)))


@pytest.mark.parametrize(
    "bomb", [b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\x81\xa1v" * 500, b"\xc9\xff\xff\xff\xff\x01"]
)
def test_bombs_cost_no_memory(bomb: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(PeerError):
        decoded(b"PAT1" + bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_what_cannot_be_received_is_not_sent() -> None:
    with pytest.raises(PeerError, match="ad_sampling_rate"):
        pat.encode_header(header(sampling_rate_hz=0.0))
    with pytest.raises(PeerError, match="detector_position"):
        pat.encode_header(header(positions_m=np.zeros((3, 3))))
