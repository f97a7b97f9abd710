"""Composite messages: captured streams come back byte for byte, and bodies that contradict themselves are refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scanside.adapters import mrd
from scanside.adapters import mrd_composite as composite
from scanside.adapters.mrd import Frame, Framer, MessageId
from scanside.adapters.mrd_meta import meta_to_xml
from scanside.engine.errors import PeerError
from scanside.engine.headers import ACQUISITION_HEADER, IMAGE_HEADER, WAVEFORM_HEADER
from scanside.engine.messages import AcquisitionBatch, WaveformRecord

STREAMS = ("bucket", "buffer", "imarr", "img", "pd")


def one(buffers: list[bytes | memoryview]) -> Frame:
    framer = Framer()
    (frame,) = framer.feed(b"".join(buffers))
    framer.finish()
    return frame


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return np.asfortranarray((rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64))


def records(rng: np.random.Generator, dtype: np.dtype, *shape: int) -> np.ndarray:
    raw = rng.integers(0, 256, int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
    return np.frombuffer(raw.tobytes(), dtype).reshape(shape, order="F")


def again(frame: Frame) -> bytes:
    """The message decoded and encoded anew."""
    if frame.id == MessageId.RECON_DATA:
        return b"".join(composite.encode_recon_data(composite.recon_data(frame)))
    if frame.id == MessageId.IMAGE_ARRAY:
        return b"".join(composite.encode_image_array(composite.image_array(frame)))
    if frame.id == MessageId.BUCKET:
        return b"".join(composite.encode_bucket(composite.bucket(frame)))
    if frame.id == MessageId.IMAGE:
        return b"".join(mrd.encode_image(mrd.image(frame)))
    encode = {MessageId.CONFIG_TEXT: mrd.encode_config_text, MessageId.HEADER: mrd.encode_header}
    return encode[MessageId(frame.id)](mrd.text(frame)) if frame.id in encode else mrd.encode_close()


@pytest.mark.real_data
@pytest.mark.parametrize("name", [*(f"dump_{stream}.bin" for stream in STREAMS), "dumpw_bucket.bin"])
def test_captured_streams_byte_for_byte(real_data: Callable[[str], Path], name: str) -> None:
    stream = real_data(f"mrd_streams/{name}").read_bytes()
    framer = Framer()
    frames = framer.feed(stream)
    framer.finish()
    assert len(frames) >= 4
    assert b"".join(again(frame) for frame in frames) == stream


@pytest.mark.real_data
def test_captured_bucket_and_buffer_hold_the_same_scan(real_data: Callable[[str], Path]) -> None:
    def first(name: str, ident: MessageId) -> Frame:
        frames = Framer().feed(real_data(f"mrd_streams/{name}").read_bytes())
        return next(frame for frame in frames if frame.id == ident)

    bucket = composite.bucket(first("dump_bucket.bin", MessageId.BUCKET))
    (batch,) = bucket.imaging.batches(1.5)
    (bit,) = composite.recon_data(first("dump_buffer.bin", MessageId.RECON_DATA))
    assert (batch.samples.shape, batch.trajectory, batch.received) == ((64, 4, 64), None, 1.5)
    assert bit.data.samples.shape == (64, 64, 1, 4, 1, 1, 1)
    lines = batch.headers["idx"]["kspace_encode_step_1"]
    space = bit.data.samples[:, :, 0, :, 0, 0, 0]
    assert np.array_equal(space[:, lines].transpose(1, 2, 0), batch.samples)
    assert bucket.imaging.statistics[0]["kspace_encode_step_1"].tolist() == list(range(64))
    assert bit.data.sampling["recon_matrix"].tolist() == [64, 64, 1]
    assert bit.data.sampling["limits"]["center"].tolist() == [32, 32, 0]


@pytest.mark.real_data
def test_captured_waveforms(real_data: Callable[[str], Path]) -> None:
    frames = Framer().feed(real_data("mrd_streams/dumpw_bucket.bin").read_bytes())
    waves = [wave for frame in frames if frame.id == MessageId.BUCKET for wave in composite.bucket(frame).waveforms]
    assert len(waves) == 6
    assert all(wave.samples.shape == (wave.header["channels"], wave.header["number_of_samples"]) for wave in waves)


def buffered(rng: np.random.Generator, *, extras: bool) -> composite.Buffered:
    return composite.Buffered(
        samples=noise(rng, 6, 5, 2, 3, 1, 2, 1),
        headers=records(rng, ACQUISITION_HEADER, 5, 2, 1, 2, 1),
        sampling=records(rng, composite.SAMPLING, 1)[0],
        trajectory=np.asfortranarray(rng.normal(size=(2, 6, 5, 2, 1, 2, 1)).astype(np.float32)) if extras else None,
        density=np.asfortranarray(rng.normal(size=(6, 5, 2, 1, 2, 1)).astype(np.float32)) if extras else None,
    )


def test_recon_data(rng: np.random.Generator) -> None:
    full, plain = buffered(rng, extras=True), buffered(rng, extras=False)
    buffers = composite.encode_recon_data([composite.ReconBit(full, plain), composite.ReconBit(plain)])
    frame = one(buffers)
    first, second = composite.recon_data(frame)
    assert np.array_equal(first.data.samples, full.samples)
    assert np.array_equal(first.data.trajectory, full.trajectory)
    assert np.array_equal(first.data.density, full.density)
    assert first.data.headers.tobytes(order="F") == full.headers.tobytes(order="F")
    assert first.data.sampling.tobytes() == full.sampling.tobytes()
    assert np.array_equal(first.reference.samples, plain.samples)
    assert (second.reference, second.data.trajectory, second.data.density) == (None, None, None)
    assert np.shares_memory(first.data.samples, np.frombuffer(frame.view, np.uint8))
    assert again(frame) == bytes(frame.view)


def test_arrays_in_c_order_are_written_in_fortran_order(rng: np.random.Generator) -> None:
    item = buffered(rng, extras=False)
    wire = b"".join(composite.encode_recon_data([composite.ReconBit(item)]))
    assert wire[74:].startswith(item.samples.tobytes(order="F"))
    copied = composite.Buffered(
        samples=np.ascontiguousarray(item.samples), headers=np.ascontiguousarray(item.headers), sampling=item.sampling
    )
    assert b"".join(composite.encode_recon_data([composite.ReconBit(copied)])) == wire


@pytest.mark.parametrize("extras", [False, True])
def test_image_array(rng: np.random.Generator, extras: bool) -> None:
    header = np.zeros((), WAVEFORM_HEADER)
    header["channels"], header["number_of_samples"] = 2, 3
    wave = WaveformRecord(header=header, samples=np.arange(6, dtype=np.uint32).reshape(2, 3))
    item = composite.ImageArray(
        images=noise(rng, 4, 3, 2, 1, 2, 1, 1),
        headers=records(rng, IMAGE_HEADER, 2, 1, 1),
        meta=(meta_to_xml({"a": ["b"]}), b"") if extras else (),
        waveforms=(wave, wave) if extras else None,
        acquisition_headers=records(rng, ACQUISITION_HEADER, 3, 2, 2, 1, 1) if extras else None,
    )
    frame = one(composite.encode_image_array(item))
    back = composite.image_array(frame)
    assert np.array_equal(back.images, item.images)
    assert back.headers.tobytes(order="F") == item.headers.tobytes(order="F")
    assert back.meta == item.meta
    assert again(frame) == bytes(frame.view)
    if extras:
        assert [each.samples.tolist() for each in back.waveforms] == [wave.samples.tolist()] * 2
        assert back.acquisition_headers.shape == (3, 2, 2, 1, 1)
    else:
        assert (back.waveforms, back.acquisition_headers) == (None, None)


def part(rng: np.random.Generator, shapes: list[tuple[int, int, int]]) -> composite.BucketPart:
    """A part with one acquisition per (samples, channels, trajectory dimensions)."""
    headers = np.zeros(len(shapes), ACQUISITION_HEADER)
    for name, column in zip(
        ("number_of_samples", "active_channels", "trajectory_dimensions"), zip(*shapes, strict=True), strict=False
    ):
        headers[name] = column
    return composite.BucketPart(
        headers=headers,
        trajectory=rng.normal(size=sum(s * d for s, _, d in shapes)).astype(np.float32),
        samples=noise(rng, sum(s * c for s, c, _ in shapes)),
        statistics=tuple(
            {name: np.arange(index + 1, dtype=np.uint16) for name in composite.STATISTICS} for index in range(2)
        ),
    )


def test_bucket_of_many_shapes(rng: np.random.Generator) -> None:
    shapes = [(4, 2, 0), (4, 2, 0), (6, 2, 2), (4, 2, 0), (4, 3, 1)]
    imaging, calibration = part(rng, shapes), part(rng, [])
    frame = one(composite.encode_bucket(composite.Bucket(imaging, calibration)))
    back = composite.bucket(frame)
    assert again(frame) == bytes(frame.view)
    batches = list(back.imaging.batches(0.0))
    assert [batch.samples.shape for batch in batches] == [(2, 2, 4), (1, 2, 6), (1, 2, 4), (1, 3, 4)]
    assert [None if b.trajectory is None else b.trajectory.shape for b in batches] == [None, (1, 6, 2), None, (1, 4, 1)]
    assert np.array_equal(np.concatenate([batch.samples.ravel() for batch in batches]), imaging.samples)
    assert np.array_equal(
        np.concatenate([batches[1].trajectory.ravel(), batches[3].trajectory.ravel()]), imaging.trajectory
    )
    assert list(back.calibration.batches(0.0)) == []
    # What stands in a bucket is what stands in acquisition messages.
    resent = b"".join(mrd.encode_acquisitions(batch) for batch in batches)
    assert [frame.count for frame in Framer().feed(resent)] == [2, 1, 1, 1]
    assert all(isinstance(batch, AcquisitionBatch) for batch in batches)


@pytest.mark.parametrize(
    ("field", "change", "words"),
    [
        (0, 1, "items of 340 bytes"),
        (2, 8, "items of 8 bytes"),
        (3, 4, "items of 4 bytes"),
        (8, 2, "statistics end at byte"),
        (9, -2, "statistics end at byte"),
        (12, 4, "waveforms have"),
        (10, 1, "items of 40 bytes"),
    ],
)
def test_bucket_whose_table_lies(rng: np.random.Generator, field: int, change: int, words: str) -> None:
    header = np.zeros((), WAVEFORM_HEADER)
    header["channels"], header["number_of_samples"] = 1, 2
    wave = WaveformRecord(header=header, samples=np.ones((1, 2), np.uint32))
    item = composite.Bucket(part(rng, [(4, 1, 1)]), part(rng, [(2, 1, 1)]), (wave,))
    wire = bytearray(b"".join(composite.encode_bucket(item)))
    at = 2 + 8 * field
    struct.pack_into("<Q", wire, at, struct.unpack_from("<Q", wire, at)[0] + change)
    wire += b"\0" * max(change, 0)
    frame = Framer().feed(bytes(wire))[0]
    with pytest.raises(PeerError, match=words) as caught:
        composite.bucket(frame)
    assert caught.value.offset == 0


def test_wrong_message_is_named() -> None:
    frame = one([mrd.encode_text("x")])
    for decode in (composite.recon_data, composite.image_array, composite.bucket):
        with pytest.raises(PeerError, match="message 5 stands where"):
            decode(frame)
