"""The header parser: agrees with ismrmrd on real files, names what is wrong, refuses what is hostile at once."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import h5py
import ismrmrd
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.adapters.mrd_header import parse_header
from scanside.engine.errors import LimitExceeded, PeerError, StreamError
from scanside.engine.limits import DEFAULT_LIMITS, Limits
from scanside.engine.messages import EncodingLimit

SPACE = (
    "<{0}><matrixSize><x>{1}</x><y>128</y><z>1</z></matrixSize>"
    "<fieldOfView_mm><x>{2}</x><y>256</y><z>5.5</z></fieldOfView_mm></{0}>"
)
REST = """
<encodingLimits>
 <kspace_encoding_step_0><minimum>0</minimum><maximum>255</maximum><center>128</center></kspace_encoding_step_0>
 <kspace_encoding_step_1><minimum>2</minimum><maximum>120</maximum><center>64</center></kspace_encoding_step_1>
 <slice><maximum>4</maximum></slice><user_3><minimum>1</minimum><maximum>1</maximum><center>1</center></user_3>
</encodingLimits>
<trajectory>radial</trajectory>
<trajectoryDescription><identifier>golden</identifier>
 <userParameterLong><name>trajectory_dimensions</name><value>3</value></userParameterLong></trajectoryDescription>
<parallelImaging><accelerationFactor><kspace_encoding_step_1>3</kspace_encoding_step_1>
 <kspace_encoding_step_2>0</kspace_encoding_step_2></accelerationFactor><calibrationMode>embedded</calibrationMode>
</parallelImaging>
"""
ENCODING = "<encoding>" + SPACE.format("encodedSpace", 256, 512.25) + SPACE.format("reconSpace", 128, 256) + REST
ENCODING += "</encoding>"
FRONT = """<?xml version="1.0" encoding="UTF-8"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">
<version>999</version>
<studyInformation><studyID>not ours</studyID></studyInformation>
<measurementInformation><measurementID>d_1_2_3</measurementID>
 <measurementDependency><dependencyType>Noise</dependencyType><measurementID>d_1_2_1</measurementID></measurementDependency>
 <measurementDependency><dependencyType>SenMap</dependencyType><measurementID>d_1_2_2</measurementID></measurementDependency>
</measurementInformation>
<acquisitionSystemInformation><systemFieldStrength_T>2.89</systemFieldStrength_T>
 <relativeReceiverNoiseBandwidth>0.5</relativeReceiverNoiseBandwidth><receiverChannels>16</receiverChannels>
 <vendorExtension><anything/></vendorExtension></acquisitionSystemInformation>
"""
BACK = """<userParameters>
<userParameterLong><name>BitsStored</name><value>16</value></userParameterLong>
<userParameterDouble><name>Slope</name><value>1.5e-3</value></userParameterDouble>
<userParameterString><name>Comment</name><value>gr\u00f6\u00dfer</value></userParameterString>
<userParameterBase64><name>Blob</name><value>AAEC</value></userParameterBase64>
</userParameters></ismrmrdHeader>"""
HEADER = (FRONT + ENCODING + BACK).encode()


def changed(old: str, new: str) -> bytes:
    assert old.encode() in HEADER
    return HEADER.replace(old.encode(), new.encode(), 1)


def test_every_field() -> None:
    header = parse_header(HEADER, DEFAULT_LIMITS)
    (space,) = header.encodings
    assert space.encoded_matrix == (256, 128, 1)
    assert space.encoded_fov_mm == (512.25, 256.0, 5.5)
    assert space.recon_matrix == (128, 128, 1)
    assert space.recon_fov_mm == (256.0, 256.0, 5.5)
    assert space.trajectory == "radial"
    assert space.limits == {
        "kspace_encode_step_0": EncodingLimit(0, 255, 128),
        "kspace_encode_step_1": EncodingLimit(2, 120, 64),
        "slice": EncodingLimit(0, 4, 0),
        "user_3": EncodingLimit(1, 1, 1),
    }
    assert (space.acceleration, space.calibration, space.trajectory_dimensions) == ((3, 1), "embedded", 3)
    assert (header.channels, header.field_strength_tesla, header.measurement_id) == (16, 2.89, "d_1_2_3")
    assert header.relative_receiver_noise_bandwidth == 0.5
    assert header.dependencies == {"Noise": "d_1_2_1", "SenMap": "d_1_2_2"}
    assert header.parameters == {"BitsStored": "16", "Slope": "1.5e-3", "Comment": "größer", "Blob": "AAEC"}
    assert header.xml == HEADER


def test_bare_minimum() -> None:
    spaces = SPACE.format("encodedSpace", 8, 9) + SPACE.format("reconSpace", 8, 9)
    header = parse_header(f"<ismrmrdHeader><encoding>{spaces}</encoding></ismrmrdHeader>".encode(), DEFAULT_LIMITS)
    (space,) = header.encodings
    assert (space.trajectory, space.limits, space.acceleration, space.calibration) == ("cartesian", {}, (1, 1), "none")
    assert (header.channels, header.relative_receiver_noise_bandwidth, header.parameters) == (None, 0.79, {})


@pytest.mark.parametrize("tail", [b"\0", b"\0\xff\xfegarbage", b"\n\n"])
def test_what_clients_leave_behind_the_header(tail: bytes) -> None:
    assert parse_header(HEADER + tail, DEFAULT_LIMITS).encodings == parse_header(HEADER, DEFAULT_LIMITS).encodings


def test_byte_order_mark_and_declared_ascii() -> None:
    assert parse_header(b"\xef\xbb\xbf" + HEADER, DEFAULT_LIMITS).channels == 16
    assert (
        parse_header(changed('encoding="UTF-8"', 'encoding="ascii"'), DEFAULT_LIMITS).parameters["Comment"] == "größer"
    )


X = "encoding[0].encodedSpace.matrixSize.x"
FOV = "encoding[0].encodedSpace.fieldOfView_mm.x"
STEP = "encoding[0].encodingLimits.kspace_encoding_step_1"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("<x>256</x><y>128", "<x>0</x><y>128", f"{X} is 0, allowed are 1 to 4096"),
        ("<x>256</x><y>128", "<x>-3</x><y>128", f"{X} is -3"),
        ("<x>256</x><y>128", "<x>1000000</x><y>128", f"{X} is 1000000, the limit is 4096"),
        ("<x>256</x><y>128", "<x>12.5</x><y>128", f"{X} is '12.5', expected an integer"),
        ("<x>256</x><y>128", "<x>1_0</x><y>128", f"{X} is '1_0'"),
        ("<x>256</x><y>128", "<x>" + "9" * 5000 + "</x><y>128", f"{X} is '9999"),
        ("<x>256</x><y>128", "<x/><y>128", f"{X} is missing"),
        ("512.25", "nan", f"{FOV} is 'nan', expected a finite number"),
        ("512.25", "inf", f"{FOV} is 'inf'"),
        ("512.25", "1e999", f"{FOV} is '1e999'"),
        ("512.25", "0", f"{FOV} is 0.0 mm"),
        ("512.25", "-1", f"{FOV} is -1.0 mm"),
        ("<maximum>120<", "<maximum>65536<", f"{STEP}.maximum is 65536, allowed are 0 to 65535"),
        ("<maximum>120<", "<maximum>-1<", f"{STEP}.maximum is -1"),
        ("<maximum>120<", "<maximum>1<", f"{STEP}.minimum is 2, above its maximum 1"),
        ("<maximum>120<", "<maximum>many<", f"{STEP}.maximum is 'many'"),
        ("step_1>3<", "step_1>-3<", "accelerationFactor.kspace_encoding_step_1 is -3"),
        ("Channels>16<", "Channels>70000<", "receiverChannels is 70000, the limit is 1024"),
        ("_T>2.89<", "_T>high<", "systemFieldStrength_T is 'high'"),
        ("<value>3</value>", "<value>99</value>", "trajectory_dimensions is 99, the limit is 4"),
        ("ismrmrdHeader xmlns", "other xmlns", "not well-formed"),
        ("</encoding>", "</encoding><encoding/>", "encoding[1].encodedSpace.matrixSize.x is missing"),
        (ENCODING, "", "no encoding"),
        (ENCODING, ENCODING * 17, "number of encodings in the header is 17, the limit is 16"),
    ],
)
def test_errors_name_the_field(old: str, new: str, words: str) -> None:
    with pytest.raises(StreamError) as caught:
        parse_header(changed(old, new), DEFAULT_LIMITS)
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["Dummy XML header", "", "<html/>"])
def test_headers_that_are_none(text: str) -> None:
    with pytest.raises(PeerError, match="header"):
        parse_header(text.encode(), DEFAULT_LIMITS)


def test_unknown_words_become_other() -> None:
    xml = changed("radial", "rosette").replace(b"embedded", b"telepathic")
    (space,) = parse_header(xml, DEFAULT_LIMITS).encodings
    assert (space.trajectory, space.calibration) == ("other", "other")


BOMB = "<!DOCTYPE b [<!ENTITY a0 'ha'>" + "".join(f"<!ENTITY a{n} '{f'&a{n - 1};' * 10}'>" for n in range(1, 10)) + "]>"
HOSTILE = {
    "entity bomb": changed("<ismrmrdHeader", BOMB + "<ismrmrdHeader").replace(b"not ours", b"&a9;"),
    "external entity": changed(
        "<ismrmrdHeader", "<!DOCTYPE b [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><ismrmrdHeader"
    ).replace(b"not ours", b"&x;"),
    "parameter entity": changed(
        "<ismrmrdHeader", "<!DOCTYPE b [<!ENTITY % x SYSTEM 'http://127.0.0.1/'> %x;]><ismrmrdHeader"
    ),
    "external document type": changed("<ismrmrdHeader", "<!DOCTYPE b SYSTEM 'http://127.0.0.1/b.dtd'><ismrmrdHeader"),
    "undeclared entity": changed("not ours", "&nbsp;"),
    "utf-16": HEADER.decode().encode("utf-16"),
    "utf-16 without mark": HEADER.decode().encode("utf-16-le"),
    "nul": changed("not ours", "not\0ours"),
    "invalid utf-8": HEADER.replace(b"not ours", b"\xc3\x28"),
    "overlong utf-8": HEADER.replace(b"not ours", b"\xc0\xaf"),
    "escape character": changed("not ours", "\x1b[2J"),
    "depth": b"<ismrmrdHeader>" + b"<a>" * 100_000,
    "many attributes": b"<ismrmrdHeader " + b" ".join(b"a%d='%d'" % (n, n) for n in range(1000)),
    "size": b"<ismrmrdHeader>" + b" " * (65 << 20),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_documents(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises((PeerError, LimitExceeded)):
            parse_header(HOSTILE[name], DEFAULT_LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def test_entity_bomb_is_never_expanded() -> None:
    # Expanded, the text would have 2 GB; this asks for a factor of ten thousand less work than that.
    start = time.process_time()
    with pytest.raises(PeerError, match="document type or entities"):
        parse_header(HOSTILE["entity bomb"], DEFAULT_LIMITS)
    assert time.process_time() - start < 0.5


def test_result_does_not_depend_on_lxml(tmp_path: Path) -> None:
    """With a module named lxml in sight that must not be touched, and ismrmrd never imported."""
    (tmp_path / "lxml.py").write_text("raise RuntimeError('lxml was imported')")
    (tmp_path / "header.xml").write_bytes(HEADER)
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from pathlib import Path\n"
        "from scanside.adapters.mrd_header import parse_header\n"
        "from scanside.engine.limits import DEFAULT_LIMITS\n"
        f"header = parse_header(Path({str(tmp_path / 'header.xml')!r}).read_bytes(), DEFAULT_LIMITS)\n"
        "assert header.channels == 16 and 'lxml' not in sys.modules and 'ismrmrd' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@given(
    changes=st.lists(st.tuples(st.integers(0, len(HEADER) - 1), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.integers(0, len(HEADER)) | st.none(),
)
@settings(max_examples=300, deadline=None)
def test_mutated_headers(changes: list[tuple[int, int]], cut: int | None) -> None:
    xml = bytearray(HEADER)
    for position, value in changes:
        xml[position] = value
    limits = Limits(matrix=300)
    try:
        header = parse_header(bytes(xml[:cut]), limits)
    except StreamError:
        return
    assert all(1 <= size <= 300 for space in header.encodings for size in space.encoded_matrix + space.recon_matrix)


def against_ismrmrd(xml: bytes) -> None:
    """Compare with the schema classes of PyPI ismrmrd."""
    ours, theirs = parse_header(xml, DEFAULT_LIMITS), ismrmrd.xsd.CreateFromDocument(xml)
    for space, encoding in zip(ours.encodings, theirs.encoding, strict=True):
        for mine, part in (
            (space.encoded_matrix, encoding.encodedSpace.matrixSize),
            (space.encoded_fov_mm, encoding.encodedSpace.fieldOfView_mm),
            (space.recon_matrix, encoding.reconSpace.matrixSize),
            (space.recon_fov_mm, encoding.reconSpace.fieldOfView_mm),
        ):
            assert mine == (part.x, part.y, part.z)
        limits = {
            name.replace("encoding_step", "encode_step"): EncodingLimit(each.minimum, each.maximum, each.center)
            for name, each in vars(encoding.encodingLimits).items()
            if each is not None
        }
        assert space.limits == limits
        assert space.trajectory == encoding.trajectory.value
        if encoding.parallelImaging is not None:
            factor = encoding.parallelImaging.accelerationFactor
            assert space.acceleration == (factor.kspace_encoding_step_1, factor.kspace_encoding_step_2)
    system = theirs.acquisitionSystemInformation
    if system is not None:
        assert ours.channels == system.receiverChannels
        assert ours.field_strength_tesla == system.systemFieldStrength_T
    if theirs.measurementInformation is not None:
        needed = theirs.measurementInformation.measurementDependency
        assert ours.dependencies == {each.dependencyType: each.measurementID for each in needed}


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["invivo_brain_3T_16ch.h5", "skyra_bottles_14ch_R3.h5"])
def test_scanner_files(real_data: Callable[[str], Path], name: str) -> None:
    with h5py.File(real_data(f"mri/raw/{name}")) as file:
        xml = file["dataset/xml"][0]
    against_ismrmrd(xml if isinstance(xml, bytes) else xml.encode())


def test_header_of_the_tests_agrees_with_ismrmrd() -> None:
    strict = changed(" <vendorExtension><anything/></vendorExtension>", "").replace(b"step_2>0<", b"step_2>1<")
    conditions = (
        b"<experimentalConditions><H1resonanceFrequency_Hz>1</H1resonanceFrequency_Hz></experimentalConditions>"
    )
    strict = strict.replace(b"</measurementID>\n", b"</measurementID><patientPosition>HFS</patientPosition>\n", 1)
    against_ismrmrd(strict.replace(b"<encoding>", conditions + b"<encoding>"))


def test_header_is_immutable() -> None:
    header = parse_header(HEADER, DEFAULT_LIMITS)
    with pytest.raises(AttributeError):
        header.channels = 3  # type: ignore[misc]
    assert msgspec.structs.replace(header, channels=3).channels == 3
