"""Messages against PyPI `ismrmrd`, an independent implementation of the same wire format, in both directions."""

from __future__ import annotations

import io
import struct

import ismrmrd
import numpy as np
import pytest
from ismrmrd.serialization import ConfigFile, ConfigText, ProtocolDeserializer, ProtocolSerializer
from scanside.adapters import mrd
from scanside.adapters.mrd import Frame, Framer, MessageId
from scanside.engine.errors import ConfigError, PeerError
from scanside.engine.headers import ACQUISITION_HEADER, IMAGE_HEADER, PIXEL_TYPES, WAVEFORM_HEADER, AcquisitionFlag
from scanside.engine.messages import AcquisitionBatch, Image, WaveformRecord

META = {"DataRole": ["Image"], "ImageRowDir": ["1.0", "0.0", "0.0"], "ImageComments": ["T2 <fast> & größer"]}


def serialize(*items: object) -> bytes:
    stream = io.BytesIO()
    writer = ProtocolSerializer(stream)
    for item in items:
        writer.serialize(item)
    writer.close()
    return stream.getvalue()


def deserialize(*buffers: bytes | memoryview) -> list[object]:
    return list(ProtocolDeserializer(io.BytesIO(b"".join([*buffers, mrd.encode_close()]))).deserialize())


def one(*buffers: bytes | memoryview) -> Frame:
    framer = Framer()
    (frame,) = framer.feed(b"".join(buffers))
    framer.finish()
    return frame


def complex_noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)


def random_records(rng: np.random.Generator, dtype: np.dtype, count: int) -> np.ndarray:
    """Headers in which every byte counts."""
    return np.frombuffer(rng.integers(0, 256, count * dtype.itemsize, dtype=np.uint8).tobytes(), dtype).copy()


def batch_of(rng: np.random.Generator, count: int, channels: int, samples: int, dimensions: int) -> AcquisitionBatch:
    headers = random_records(rng, ACQUISITION_HEADER, count)
    headers["flags"] &= np.uint64((1 << 40) - 1)
    trajectory = rng.normal(size=(count, samples, dimensions)).astype(np.float32) if dimensions else None
    return AcquisitionBatch(
        headers=headers, samples=complex_noise(rng, count, channels, samples), trajectory=trajectory
    )


@pytest.mark.parametrize("dimensions", [0, 2, 3])
def test_acquisitions_from_ismrmrd(rng: np.random.Generator, dimensions: int) -> None:
    theirs = []
    for line in range(20):
        trajectory = rng.normal(size=(7, dimensions)).astype(np.float32)
        item = ismrmrd.Acquisition.from_array(
            complex_noise(rng, 3, 7), trajectory, scan_counter=line, sample_time_us=2.5
        )
        item.idx.kspace_encode_step_1 = line
        item.idx.user[7] = 9
        item.setFlag(ismrmrd.ACQ_LAST_IN_SLICE)
        item.position[:] = (1.0, 2.0, 3.0)
        theirs.append(item)
    run, close = Framer().feed(serialize(*theirs))
    batch = mrd.acquisitions(run, 12.5)
    assert (run.count, close.id, batch.received) == (20, MessageId.CLOSE, 12.5)
    assert np.array_equal(batch.samples, [each.data for each in theirs])
    assert np.array_equal(batch.headers["idx"]["kspace_encode_step_1"], np.arange(20))
    assert np.array_equal(batch.headers["scan_counter"], np.arange(20))
    assert np.all(batch.headers["flags"] == AcquisitionFlag.LAST_IN_SLICE.bit)
    assert np.all(batch.headers["idx"]["user"] == [0, 0, 0, 0, 0, 0, 0, 9])
    assert np.all(batch.headers["position"] == [1, 2, 3])
    assert np.all(batch.headers["sample_time_us"] == 2.5)
    if dimensions:
        assert np.array_equal(batch.trajectory, [each.traj for each in theirs])
    else:
        assert batch.trajectory is None


@pytest.mark.parametrize("dimensions", [0, 2])
def test_acquisitions_to_ismrmrd(rng: np.random.Generator, dimensions: int) -> None:
    batch = batch_of(rng, 5, 2, 6, dimensions)
    theirs = deserialize(mrd.encode_acquisitions(batch))
    ours = mrd.acquisitions(one(mrd.encode_acquisitions(batch)), 0.0).headers
    assert np.array_equal([each.data for each in theirs], batch.samples)
    assert [bytes(each.getHead()) for each in theirs] == [header.tobytes() for header in ours]
    if dimensions:
        assert np.array_equal([each.traj for each in theirs], batch.trajectory)


def test_acquisition_headers_survive(rng: np.random.Generator) -> None:
    batch = batch_of(rng, 4, 3, 5, 1)
    back = mrd.acquisitions(one(mrd.encode_acquisitions(batch)), 0.0)
    wanted = batch.headers.copy()
    wanted["active_channels"], wanted["number_of_samples"], wanted["trajectory_dimensions"] = 3, 5, 1
    assert back.headers.tobytes() == wanted.tobytes()
    assert np.array_equal(back.trajectory, batch.trajectory)


@pytest.mark.parametrize("kind", [code for code in PIXEL_TYPES if code != 4])
def test_images_both_ways(rng: np.random.Generator, kind: int) -> None:
    pixels = (rng.normal(size=(2, 3, 4, 5)) * 100 + 200).astype(PIXEL_TYPES[kind])
    header = random_records(rng, IMAGE_HEADER, 1)[0]
    theirs = deserialize(*mrd.encode_image(Image(header=header, pixels=pixels, meta=META)))[0]
    assert np.array_equal(theirs.data, pixels)
    assert theirs.data_type == kind
    assert theirs.matrix_size == (5, 4, 3)
    assert dict(theirs.meta) == {name: value if len(value) > 1 else value[0] for name, value in META.items()}
    frame, _ = Framer().feed(serialize(theirs))
    ours = mrd.image(frame)
    assert np.array_equal(ours.pixels, pixels)
    assert ours.meta == META
    wanted = header.copy()
    wanted["channels"], wanted["matrix_size"], wanted["data_type"] = 2, (5, 4, 3), kind
    wanted["attribute_string_len"] = ours.header["attribute_string_len"]
    assert ours.header.tobytes() == wanted.tobytes()
    assert np.shares_memory(ours.pixels, np.frombuffer(frame.view, np.uint8))


@pytest.mark.parametrize("kind", PIXEL_TYPES)
@pytest.mark.parametrize("meta", [{}, META])
def test_images_of_every_type(kind: int, meta: dict[str, list[str]]) -> None:
    pixels = np.arange(24).reshape(1, 2, 3, 4).astype(PIXEL_TYPES[kind])
    item = Image(header=np.zeros((), IMAGE_HEADER), pixels=pixels, meta=meta)
    buffers = mrd.encode_image(item)
    back = mrd.image(one(*buffers))
    assert np.array_equal(back.pixels, pixels)
    assert back.pixels.dtype == pixels.dtype
    assert back.meta == meta
    assert np.shares_memory(np.frombuffer(buffers[-1], np.uint8), pixels)


def test_image_with_counted_nul_and_foreign_byte_order() -> None:
    pixels = np.arange(4, dtype=">f4").reshape(1, 1, 2, 2)[..., ::-1]
    head, attributes, data = mrd.encode_image(
        Image(header=np.zeros((), IMAGE_HEADER), pixels=pixels, meta={"a": ["b"]})
    )
    head = head[:-8] + struct.pack("<Q", len(attributes) + 1)
    back = mrd.image(one(head, attributes, b"\0", data))
    assert back.meta == {"a": ["b"]}
    assert np.array_equal(back.pixels, pixels)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.zeros((2, 2), np.float32), "shape"),
        (np.zeros((1, 1, 0, 2), np.float32), "shape"),
        (np.zeros((1, 1, 1, 65536), np.uint16), "65535"),
        (np.zeros((1, 1, 2, 2), np.int64), "type int64"),
    ],
)
def test_images_that_no_header_can_say(pixels: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mrd.encode_image(Image(header=np.zeros((), IMAGE_HEADER), pixels=pixels))


def test_waveforms_both_ways(rng: np.random.Generator) -> None:
    samples = rng.integers(0, 2**32, (3, 11), dtype=np.uint32)
    theirs = ismrmrd.Waveform.from_array(samples, waveform_id=1, time_stamp=77, sample_time_us=2500.0, scan_counter=4)
    frame, _ = Framer().feed(serialize(theirs))
    ours = mrd.waveform(frame)
    assert np.array_equal(ours.samples, samples)
    assert [ours.header[name].item() for name in ("waveform_id", "time_stamp", "sample_time_us", "scan_counter")] == [
        1,
        77,
        2500.0,
        4,
    ]
    back = deserialize(mrd.encode_waveform(ours))[0]
    assert back == theirs


def test_texts_both_ways() -> None:
    stream = serialize(ConfigFile("default.xml"), ConfigText("<configuration/>"), "Grüße")
    assert [mrd.text(frame) for frame in Framer().feed(stream)[:3]] == ["default.xml", "<configuration/>", "Grüße"]
    buffers = (
        mrd.encode_config_file("default.xml"),
        mrd.encode_config_text("<configuration/>"),
        mrd.encode_text("Grüße"),
    )
    assert b"".join([*buffers, mrd.encode_close()]) == stream


def test_text_ends_at_its_first_nul() -> None:
    assert mrd.text(one(struct.pack("<HI", 5, 6), b"ab\0\xff\xffc")) == "ab"
    assert mrd.text(one(struct.pack("<H", 1), b"simplefft\0\xfe".ljust(1024, b"\xff"))) == "simplefft"
    header = one(mrd.encode_header(b"<ismrmrdHeader/>\0"))
    assert mrd.text(header) == "<ismrmrdHeader/>"
    assert mrd.content(header) == b"<ismrmrdHeader/>\0"


@pytest.mark.parametrize("encode", [mrd.encode_config_text, mrd.encode_header])
def test_text_that_is_no_utf8(encode: object) -> None:
    framer = Framer()
    _, frame = framer.feed(mrd.encode_text("x") + encode(b"ab\xff"))
    with pytest.raises(PeerError, match="not UTF-8") as caught:
        mrd.text(frame)
    assert caught.value.offset == 7


def test_query_response_error_dependency_dicom() -> None:
    assert mrd.query(one(mrd.encode_query(mrd.Query(2**64 - 1, "gadgetron::info")))) == mrd.Query(
        2**64 - 1, "gadgetron::info"
    )
    assert mrd.response(one(mrd.encode_response(mrd.Response(3, "ü")))) == mrd.Response(3, "ü")
    assert mrd.error(one(mrd.encode_error("no coil maps"))) == "no coil maps"
    assert mrd.dependency(one(mrd.encode_dependency(META))) == META
    data = memoryview(b"\0" * 128 + b"DICM")
    back = mrd.dicom(one(*mrd.encode_dicom(mrd.Dicom(data, "ß.dcm", META))))
    assert (bytes(back.data), back.name, back.meta) == (bytes(data), "ß.dcm", META)


def test_wrong_message_is_named() -> None:
    frame = one(mrd.encode_text("x"))
    for decode in (lambda f: mrd.acquisitions(f, 0.0), mrd.image, mrd.waveform, mrd.query, mrd.response, mrd.error):
        with pytest.raises(PeerError, match=r"message 5 \(TEXT\) stands where"):
            decode(frame)


@pytest.mark.parametrize("name", ["x" * 1024, "a\0b"])
def test_config_names_that_do_not_fit(name: str) -> None:
    with pytest.raises(ConfigError, match="1023"):
        mrd.encode_config_file(name)
    assert mrd.text(one(mrd.encode_config_file("x" * 1023))) == "x" * 1023


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_compressed_acquisitions(rng: np.random.Generator, bits: int) -> None:
    batch = batch_of(rng, 3, 4, 33, 2)
    wire = mrd.encode_compressed(batch, bits)
    for frame, header, samples in zip(Framer().feed(wire), batch.headers, batch.samples, strict=True):
        back = mrd.acquisitions(frame, 0.0)
        half_step = np.abs(samples.view(np.float32)).max() / (2**bits - 2)
        assert np.abs((back.samples[0] - samples).view(np.float32)).max() <= half_step * (1 + 1e-5)
        assert back.headers["flags"][0] == header["flags"]
        assert back.headers["idx"][0] == header["idx"]
    assert np.array_equal(back.trajectory, batch.trajectory[2:])


def test_zfp_is_refused(rng: np.random.Generator) -> None:
    wire = bytearray(mrd.encode_compressed(batch_of(rng, 1, 1, 4, 0), 8))
    flags = struct.unpack_from("<Q", wire, 4)[0] ^ AcquisitionFlag.COMPRESSION2.bit | AcquisitionFlag.COMPRESSION1.bit
    struct.pack_into("<Q", wire, 4, flags)
    with pytest.raises(PeerError, match="ZFP-compressed acquisitions are not supported"):
        mrd.acquisitions(one(wire), 0.0)


@pytest.mark.parametrize(
    ("headers", "samples", "trajectory"),
    [(2, (3, 1, 4), None), (3, (3, 0, 4), None), (3, (3, 1, 4), (3, 5, 2)), (1, (1, 1, 65536), None)],
)
def test_batches_that_do_not_agree(headers: int, samples: tuple[int, ...], trajectory: tuple[int, ...] | None) -> None:
    batch = AcquisitionBatch(
        headers=np.zeros(headers, ACQUISITION_HEADER),
        samples=np.zeros(samples, np.complex64),
        trajectory=None if trajectory is None else np.zeros(trajectory, np.float32),
    )
    with pytest.raises(ValueError, match=r"agree|do not fit"):
        mrd.encode_acquisitions(batch)


def test_waveform_without_samples() -> None:
    record = WaveformRecord(header=np.zeros((), WAVEFORM_HEADER), samples=np.zeros((2, 0), np.uint32))
    assert mrd.waveform(one(mrd.encode_waveform(record))).samples.shape == (2, 0)
