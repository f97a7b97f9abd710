"""The framer: any pieces in, the same messages out; nothing hostile gets further than its length field."""

from __future__ import annotations

import itertools
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.adapters import mrd
from scanside.adapters import mrd_composite as composite
from scanside.adapters.mrd import Frame, Framer, MessageId
from scanside.engine.errors import LimitExceeded, PeerError, StreamError, TruncatedMessage
from scanside.engine.headers import ACQUISITION_HEADER, IMAGE_HEADER, WAVEFORM_HEADER
from scanside.engine.limits import Limits
from scanside.engine.messages import AcquisitionBatch, Image, WaveformRecord

SMALL = Limits(
    message_bytes=1 << 16,
    acquisition_bytes=1 << 16,
    config_bytes=1 << 12,
    header_bytes=1 << 12,
    text_bytes=1 << 12,
    attribute_bytes=1 << 12,
)


def acquisition(samples: int = 3, channels: int = 1, dimensions: int = 0, line: int = 0, bits: int = 0) -> bytes:
    rng = np.random.default_rng((samples, channels, dimensions, line))
    headers = np.zeros(1, ACQUISITION_HEADER)
    headers["idx"]["kspace_encode_step_1"] = line
    values = rng.normal(size=(2, 1, channels, samples)).astype(np.float32)
    batch = AcquisitionBatch(
        headers=headers,
        samples=(values[0] + 1j * values[1]).astype(np.complex64),
        trajectory=rng.normal(size=(1, samples, dimensions)).astype(np.float32) if dimensions else None,
    )
    return mrd.encode_compressed(batch, bits) if bits else mrd.encode_acquisitions(batch)


def acquisition_start(samples: int, channels: int, dimensions: int = 0, flags: int = 0) -> bytes:
    header = np.zeros((), ACQUISITION_HEADER)
    for name, value in (
        ("number_of_samples", samples),
        ("active_channels", channels),
        ("trajectory_dimensions", dimensions),
        ("flags", flags),
    ):
        header[name] = value
    return struct.pack("<H", 1008) + header.tobytes()


def image_start(data_type: int, matrix: tuple[int, int, int], channels: int, attributes: int) -> bytes:
    header = np.zeros((), IMAGE_HEADER)
    header["data_type"], header["matrix_size"], header["channels"] = data_type, matrix, channels
    return struct.pack("<H", 1022) + header.tobytes() + struct.pack("<Q", attributes)


def image(kind: str = "<u2") -> bytes:
    pixels = np.arange(6).reshape(1, 1, 2, 3).astype(kind)
    return b"".join(
        mrd.encode_image(Image(header=np.zeros((), IMAGE_HEADER), pixels=pixels, meta={"DataRole": ["Image"]}))
    )


def waveform() -> bytes:
    samples = np.arange(6, dtype=np.uint32).reshape(2, 3)
    return mrd.encode_waveform(WaveformRecord(header=np.zeros((), WAVEFORM_HEADER), samples=samples))


def recon_data() -> bytes:
    buffered = composite.Buffered(
        samples=np.ones((2, 2, 1, 1, 1, 1, 1), np.complex64),
        headers=np.zeros((2, 1, 1, 1, 1), ACQUISITION_HEADER),
        sampling=np.zeros((), composite.SAMPLING),
        density=np.ones((2, 2, 1, 1, 1, 1), np.float32),
    )
    return b"".join(composite.encode_recon_data([composite.ReconBit(buffered, buffered), composite.ReconBit(buffered)]))


def image_array() -> bytes:
    wave = WaveformRecord(header=np.zeros((), WAVEFORM_HEADER), samples=np.zeros((0, 0), np.uint32))
    item = composite.ImageArray(
        images=np.ones((2, 2, 1, 1, 1, 1, 1), np.complex64),
        headers=np.zeros((1, 1, 1), IMAGE_HEADER),
        meta=(b"<ismrmrdMeta/>", b""),
        waveforms=(wave, wave),
        acquisition_headers=np.zeros((2, 1, 1, 1, 1), ACQUISITION_HEADER),
    )
    return b"".join(composite.encode_image_array(item))


def bucket() -> bytes:
    headers = np.zeros(2, ACQUISITION_HEADER)
    headers["number_of_samples"], headers["active_channels"] = (2, 3), 1
    part = composite.BucketPart(
        headers=headers,
        trajectory=np.zeros(0, np.float32),
        samples=np.ones(5, np.complex64),
        statistics=({name: np.arange(2, dtype=np.uint16) for name in composite.STATISTICS},),
    )
    return b"".join(composite.encode_bucket(composite.Bucket(part, part)))


SAMPLES = {
    "acquisition": acquisition(),
    "next line": acquisition(line=1),
    "other shape": acquisition(2, 2, line=2),
    "trajectory": acquisition(2, 1, 3),
    "compressed": acquisition(5, 2, bits=7),
    "compressed with trajectory": acquisition(5, 2, 2, bits=16),
    "config file": mrd.encode_config_file("default.xml"),
    "config text": mrd.encode_config_text("<configuration/>"),
    "header": mrd.encode_header(b"<ismrmrdHeader/>\0"),
    "text": mrd.encode_text("INFO  scan begins"),
    "empty text": mrd.encode_text(""),
    "query": mrd.encode_query(mrd.Query(7, "gadgetron::info")),
    "response": mrd.encode_response(mrd.Response(7, "scanside")),
    "error": mrd.encode_error("no coil maps"),
    "dicom": b"".join(mrd.encode_dicom(mrd.Dicom(memoryview(b"DICM"), "a.dcm", {"k": ["v"]}))),
    "dependency": mrd.encode_dependency({"status": ["success"]}),
    "image": image(),
    "complex image": image("<c16"),
    "waveform": waveform(),
    "recon data": recon_data(),
    "image array": image_array(),
    "bucket": bucket(),
    "close": mrd.encode_close(),
}
messages_of_any_kind = st.lists(st.sampled_from(list(SAMPLES.values())), min_size=1, max_size=12)


def receive(framer: Framer, data: bytes, *, direct: bool) -> list[Frame]:
    """Hand `data` over by `feed`, or through the framer's own memory as a socket would."""
    if not direct:
        return framer.feed(data)
    frames = []
    while data:
        room = framer.buffer()
        count = min(len(room), len(data))
        room[:count] = data[:count]
        frames += framer.advance(count)
        data = data[count:]
    return frames


def parts(frames: list[Frame]) -> list[tuple[int, bytes, int]]:
    return [(one.id, bytes(one.view), one.offset) for frame in frames for one in frame.split()]


def expected(messages: list[bytes]) -> list[tuple[int, bytes, int]]:
    starts = itertools.accumulate(map(len, messages), initial=0)
    return [(struct.unpack_from("<H", each)[0], each, start) for each, start in zip(messages, starts, strict=False)]


@given(
    messages=messages_of_any_kind,
    pieces=st.lists(st.integers(1, 900), min_size=1, max_size=20),
    slab=st.sampled_from([1, 64, 512, 4096, 1 << 20]),
    direct=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_pieces_do_not_matter(messages: list[bytes], pieces: list[int], slab: int, direct: bool) -> None:
    stream = b"".join(messages)
    framer, frames, at = Framer(slab_bytes=slab), [], 0
    for size in itertools.cycle(pieces):
        if at >= len(stream):
            break
        frames += receive(framer, stream[at : at + size], direct=direct)
        at += size
    framer.finish()
    # Compared after the last piece: what was handed out early must still be whole.
    assert parts(frames) == expected(messages)
    assert framer.offset == len(stream)


@pytest.mark.parametrize("direct", [False, True])
def test_every_split_of_a_stream_with_every_kind(direct: bool) -> None:
    messages = list(SAMPLES.values())
    stream, wanted = b"".join(messages), expected(messages)
    for cut in range(len(stream) + 1):
        framer = Framer(slab_bytes=1 << 14)
        frames = receive(framer, stream[:cut], direct=direct) + receive(framer, stream[cut:], direct=direct)
        framer.finish()
        assert parts(frames) == wanted, cut


@pytest.mark.parametrize("direct", [False, True])
def test_byte_by_byte(direct: bool) -> None:
    messages = list(SAMPLES.values())
    framer = Framer(slab_bytes=256)
    frames = [frame for byte in b"".join(messages) for frame in receive(framer, bytes([byte]), direct=direct)]
    assert parts(frames) == expected(messages)


@given(
    runs=st.lists(
        st.tuples(
            st.sampled_from([(3, 1, 0, 0), (2, 1, 0, 0), (1, 2, 0, 0), (3, 1, 1, 0), (3, 1, 0, 9)]), st.integers(1, 300)
        ),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=40, deadline=None)
def test_runs_are_as_long_as_possible(runs: list[tuple[tuple[int, int, int, int], int]]) -> None:
    shapes = [shape for shape, count in runs for _ in range(count)]
    stream = b"".join(acquisition(*shape[:3], bits=shape[3]) for shape in shapes)
    counts = [frame.count for frame in Framer().feed(stream)]
    # A compressed acquisition has a length of its own, so each is a frame.
    wanted = [[1] * n if shape[3] else [n] for shape, n in ((s, len(list(g))) for s, g in itertools.groupby(shapes))]
    assert counts == list(itertools.chain.from_iterable(wanted))


def test_neighbour_of_equal_size_and_other_shape_ends_a_run() -> None:
    same, other = acquisition(4, 2, 0), acquisition(2, 4, 0)
    assert len(same) == len(other)
    assert [frame.count for frame in Framer().feed(same * 40 + other * 3 + same)] == [40, 3, 1]


def test_feed_is_zero_copy() -> None:
    stream = b"".join(acquisition(8, 2, line=line) for line in range(100))
    (frame,) = Framer().feed(stream)
    batch = mrd.acquisitions(frame, 0.0)
    base = np.frombuffer(stream, np.uint8)
    assert frame.count == 100
    assert np.shares_memory(batch.samples, base)
    assert np.shares_memory(batch.headers, base)
    assert batch.headers["idx"]["kspace_encode_step_1"].tolist() == list(range(100))
    assert not batch.samples.flags.writeable
    assert not batch.headers.flags.writeable


def test_received_bytes_are_not_copied_within_a_slab() -> None:
    framer = Framer()
    room = framer.buffer()
    stream = acquisition() * 5
    room[: len(stream)] = stream
    (frame,) = framer.advance(len(stream))
    assert np.shares_memory(np.frombuffer(frame.view, np.uint8), np.frombuffer(room, np.uint8))


def test_compressed_neighbour_of_equal_size_and_shape_ends_a_run() -> None:
    plain, packed = acquisition(3, 1), acquisition(3, 1, bits=9)
    assert len(plain) == len(packed)
    for count in (1, 2, 17, 40):
        frames = Framer().feed(plain * count + packed + plain)
        assert [frame.count for frame in frames] == [count, 1, 1]


def test_what_was_received_cannot_be_changed_through_a_frame() -> None:
    framer = Framer()
    for frame in receive(framer, acquisition() + mrd.encode_text("x"), direct=True):
        assert frame.view.readonly


def test_a_large_message_gets_its_memory_at_once() -> None:
    message = acquisition(5000, 4)
    framer = Framer(slab_bytes=1024)
    assert receive(framer, message[:400], direct=True) == []
    assert len(framer.buffer()) >= len(message) - 400


def test_feed_keeps_what_stands_before_an_error_in_a_later_slab() -> None:
    lead = mrd.encode_text("first")
    framer = Framer(slab_bytes=8)  # room for one byte of the broken message behind the acquisition
    framer.feed(lead[:1])
    frames = framer.feed(lead[1:] + acquisition() + struct.pack("<H", 999))
    assert [frame.id for frame in frames] == [MessageId.TEXT, MessageId.ACQUISITION]
    with pytest.raises(PeerError, match="999"):
        framer.finish()


def test_message_larger_than_a_slab() -> None:
    message = acquisition(5000, 4)
    framer = Framer(slab_bytes=1024)
    assert parts(receive(framer, message * 2, direct=True)) == expected([message] * 2)


@pytest.mark.parametrize("name", list(SAMPLES))
def test_every_truncation_is_told(name: str) -> None:
    lead, message = mrd.encode_text("before"), SAMPLES[name]
    for length in range(1, len(message)):
        framer = Framer()
        assert len(framer.feed(lead + message[:length])) == 1
        with pytest.raises(TruncatedMessage) as caught:
            framer.finish()
        assert caught.value.offset == len(lead)


REFUSED = {
    "unknown id": (struct.pack("<H", 999), PeerError, "message id 999 is unknown"),
    "http": (b"GET / HTTP/1.1\r\n", PeerError, "is unknown"),
    "deprecated image": (struct.pack("<H", 1010), PeerError, "deprecated"),
    "cloud job": (struct.pack("<H", 1013), PeerError, "cloud job"),
    "ndarray": (struct.pack("<H", 1030), PeerError, "NDARRAY"),
    "bundle": (struct.pack("<H", 1051), PeerError, "BUNDLE"),
    "config text": (struct.pack("<HI", 2, 0xFFFFFFFF), LimitExceeded, "limits.config_bytes"),
    "header": (struct.pack("<HI", 3, 0xFFFFFFFF), LimitExceeded, "limits.header_bytes"),
    "text": (struct.pack("<HI", 5, 0xFFFFFFFF), LimitExceeded, "limits.text_bytes"),
    "query": (struct.pack("<H3Q", 6, 0, 1, 2**64 - 1), LimitExceeded, "limits.text_bytes"),
    "query reserved": (struct.pack("<HQ", 6, 5), PeerError, "reserved field of a query is 5"),
    "response": (struct.pack("<H2Q", 7, 0, 2**64 - 1), LimitExceeded, "limits.text_bytes"),
    "error": (struct.pack("<HQ", 8, 2**64 - 1), LimitExceeded, "limits.text_bytes"),
    "dicom": (struct.pack("<HI", 1018, 0xFFFFFFFF), LimitExceeded, "limits.message_bytes"),
    "dicom name": (struct.pack("<HIQ", 1018, 0, 2**63), LimitExceeded, "limits.config_bytes"),
    "dicom attributes": (struct.pack("<HIQQ", 1018, 0, 0, 2**63), LimitExceeded, "limits.attribute_bytes"),
    "dependency": (struct.pack("<HQ", 1019, 2**40), LimitExceeded, "limits.attribute_bytes"),
    "attributes": (image_start(1, (1, 1, 1), 1, 2**64 - 1), LimitExceeded, "limits.attribute_bytes"),
    "matrix": (image_start(8, (65535, 65535, 65535), 65535, 0), LimitExceeded, "limits.message_bytes"),
    "data type": (image_start(9, (1, 1, 1), 1, 0), PeerError, "data_type 9"),
    "empty image": (image_start(1, (1, 0, 1), 1, 0), PeerError, "matrix_size"),
    "acquisition": (acquisition_start(65535, 65535), LimitExceeded, "limits.channels"),
    "long acquisition": (acquisition_start(65535, 1024), LimitExceeded, "limits.acquisition_bytes"),
    "trajectory": (acquisition_start(1, 1, 65535), LimitExceeded, "limits.trajectory_dimensions"),
    "no samples": (acquisition_start(0, 1), PeerError, "0 samples of 1 active channels"),
    "no channels": (acquisition_start(1, 0), PeerError, "1 samples of 0 active channels"),
    "compressed": (acquisition_start(1, 1, flags=1 << 53) + b"\xff" * 4, LimitExceeded, "limits.acquisition_bytes"),
    "compressed header": (acquisition_start(0, 1, flags=1 << 53), PeerError, "0 samples"),
    "waveform": (struct.pack("<H28xHH8x", 1026, 65535, 65535), LimitExceeded, "limits.message_bytes"),
    "buffers": (struct.pack("<HQ", 1023, 2**64 - 1), LimitExceeded, "limits."),
    "axes": (struct.pack("<HQQ", 1023, 1, 17), PeerError, "17 axes"),
    "axis": (struct.pack("<HQ3Q", 1024, 2, 2**32, 2**32, 0)[:26], LimitExceeded, "limits.message_bytes"),
    "axis of an empty array": (struct.pack("<H3Q", 1024, 2, 2**62, 0), LimitExceeded, "limits.message_bytes"),
    "presence": (struct.pack("<HQQB", 1023, 1, 0, 2), PeerError, "presence flag is 2"),
    "attribute texts": (struct.pack("<H3Q", 1024, 0, 0, 2**64 - 1), LimitExceeded, "limits.message_bytes"),
    "bucket": (struct.pack("<H13Q", 1050, 0, *[2**64 - 1] * 12), LimitExceeded, "limits.message_bytes"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_from_the_length_field(name: str) -> None:
    data, kind, words = REFUSED[name]
    framer = Framer(slab_bytes=1 << 16)
    tracemalloc.start()
    try:
        with pytest.raises(kind) as caught:
            framer.feed(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 19
    finally:
        tracemalloc.stop()
    assert words in str(caught.value)
    assert caught.value.offset == 0
    with pytest.raises(kind):
        framer.buffer()


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 9])
def test_messages_before_a_broken_one_are_delivered(direct: bool, cut: int) -> None:
    lead = mrd.encode_text("first") + acquisition()
    framer = Framer()
    frames = receive(framer, lead[:cut], direct=direct)
    frames += receive(framer, lead[cut:] + struct.pack("<H", 999), direct=direct)
    assert [frame.id for frame in frames] == [MessageId.TEXT, MessageId.ACQUISITION]
    assert isinstance(framer.failure, PeerError)
    for call in (framer.buffer, framer.finish, lambda: framer.feed(b""), lambda: framer.advance(0)):
        with pytest.raises(PeerError) as caught:
            call()
        assert caught.value.offset == len(lead)


def test_advance_beyond_the_buffer() -> None:
    framer = Framer(slab_bytes=64)
    with pytest.raises(ValueError, match="advance by 65"):
        framer.advance(65)


def decode_all(frames: list[Frame]) -> None:
    decoders = {
        MessageId.ACQUISITION: lambda frame: mrd.acquisitions(frame, 0.0),
        MessageId.IMAGE: mrd.image,
        MessageId.WAVEFORM: mrd.waveform,
        MessageId.QUERY: mrd.query,
        MessageId.RESPONSE: mrd.response,
        MessageId.ERROR: mrd.error,
        MessageId.DICOM: mrd.dicom,
        MessageId.DEPENDENCY: mrd.dependency,
        MessageId.RECON_DATA: composite.recon_data,
        MessageId.IMAGE_ARRAY: composite.image_array,
        MessageId.BUCKET: composite.bucket,
        MessageId.CLOSE: lambda frame: None,
    }
    for frame in frames:
        try:
            item = decoders.get(frame.id, mrd.text)(frame)
        except StreamError as error:
            assert error.offset is not None
            continue
        if isinstance(item, composite.Bucket):
            list(item.imaging.batches(0.0))


def survive(data: bytes, pieces: int) -> None:
    """Only stream errors come out, and memory stays within what the limits allow."""
    framer = Framer(SMALL, slab_bytes=1 << 12)
    tracemalloc.start()
    try:
        for at in range(0, len(data), pieces):
            decode_all(receive(framer, data[at : at + pieces], direct=True))
        framer.finish()
    except StreamError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 19


@given(
    data=st.binary(max_size=600), ident=st.sampled_from([int(each) for each in MessageId]), pieces=st.integers(1, 200)
)
@settings(max_examples=200, deadline=None)
def test_random_bytes(data: bytes, ident: int, pieces: int) -> None:
    survive(struct.pack("<H", ident) + data, pieces)


@given(
    messages=messages_of_any_kind,
    changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=8),
    pieces=st.integers(1, 5000),
)
@settings(max_examples=250, deadline=None)
def test_mutated_streams(messages: list[bytes], changes: list[tuple[int, int]], pieces: int) -> None:
    stream = bytearray(b"".join(messages))
    for position, value in changes:
        stream[position % len(stream)] = value
    survive(bytes(stream), pieces)
