"""One scan on the inside of a worker, without sockets: messages in, messages out."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.adapters import mrd
from scanside.adapters.files.ismrmrd_xml import header_xml
from scanside.adapters.grammar import Dialect, Role
from scanside.adapters.mrd_composite import Bucket, BucketPart, encode_bucket, encode_recon_data
from scanside.adapters.mrd_framing import Framer
from scanside.adapters.scan import Reply, Scan
from scanside.engine.config import ConfigStore
from scanside.engine.headers import IMAGE_HEADER, AcquisitionFlag
from scanside.engine.messages import AcquisitionBatch, Image
from scanside.engine.preparation.noise import NoiseModel
from scanside.engine.simulation.scan import simulate_scan
from scanside.engine.streaming.session import NoiseStore

STORE = ConfigStore()
SIMULATED = simulate_scan(16, 2, 1, 8, noise_readouts=0)
HEADER = mrd.encode_header(header_xml(SIMULATED.header))
LINES = b"".join(mrd.encode_acquisitions(batch) for batch in SIMULATED.readouts(1))


class Played:
    """What a scan gave back."""

    def __init__(self, replies: Iterable[Reply]) -> None:
        self.replies = list(replies)
        data = b"".join(bytes(part) for reply in self.replies for part in reply.buffers)
        self.frames = [single for frame in Framer().feed(data) for single in frame.split()]

    @property
    def ids(self) -> list[int]:
        return [frame.id for frame in self.frames]

    @property
    def texts(self) -> list[str]:
        return [mrd.text(frame) for frame in self.frames if frame.id == mrd.MessageId.TEXT]

    @property
    def failures(self) -> list[str]:
        return [reply.failed for reply in self.replies if reply.failed]

    @property
    def images(self) -> list[Image]:
        return [mrd.image(frame) for frame in self.frames if frame.id == mrd.MessageId.IMAGE]


def scan(config: str = "default", noise: NoiseStore | None = None, **settings: object) -> Scan:
    """A fresh scan."""
    return Scan(STORE.get(config), STORE, {} if noise is None else noise, **settings)


def play(subject: Scan, *messages: bytes, complete: bool = True) -> Played:
    """Feed messages and end the scan."""
    frames = Framer().feed(b"".join(messages))
    return Played([*subject.take(frames, 1.0), *subject.end(complete=complete)])


def test_a_scan_gives_an_image_its_numbers_and_its_statistics() -> None:
    played = play(scan(), HEADER, LINES)
    (image,) = [reply for reply in played.replies if reply.image]
    assert (image.series, image.image) == (1, 1)
    assert [reply.stats.outcome for reply in played.replies if reply.stats is not None] == ["complete"]
    assert played.ids == [1022]


def test_a_scan_without_an_image_says_what_it_received() -> None:
    noise = bytearray(LINES[: len(LINES) // 16])
    struct.pack_into("<Q", noise, 4, AcquisitionFlag.IS_NOISE_MEASUREMENT.bit)
    played = play(scan(), HEADER, bytes(noise))
    assert any("no image" in text and "1 noise" in text for text in played.texts)


def test_an_error_ends_the_scan_after_the_images_of_what_came_before() -> None:
    played = play(scan(), HEADER, LINES[: len(LINES) // 2], HEADER, LINES)
    assert played.failures == ["protocol"]
    assert len(played.images) == 1
    assert played.replies[-1].failed


@pytest.mark.parametrize("text", ["[", '{"parameters": 5}', "[" * 20_000])
def test_parameters_that_are_wrong_do_not_cost_the_scan(text: str) -> None:
    played = play(scan(), HEADER, mrd.encode_text(text), LINES)
    assert not played.failures
    assert len(played.images) == 1
    assert any("parameters" in said for said in played.texts)


def test_parameters_choose_another_configuration_before_data() -> None:
    text = mrd.encode_text('{"parameters": {"config": "default", "customconfig": "grappa"}}')
    (image,) = play(scan(), HEADER, text, LINES).images
    assert image.meta["ImageProcessingHistory"] == ["SCANSIDE", "mri/grappa"]
    (late,) = play(scan(), HEADER, LINES[: len(LINES) // 2], text, LINES[len(LINES) // 2 :]).images
    assert late.meta["ImageProcessingHistory"] == ["SCANSIDE", "mri/online"]


def test_without_a_header_images_pass_and_readouts_do_not() -> None:
    image = Image(header=np.zeros((), IMAGE_HEADER), pixels=np.ones((1, 1, 2, 2), np.int16))
    dummy = mrd.encode_header("Dummy XML header")
    played = play(scan(dialect=Dialect.FIRE), dummy, b"".join(mrd.encode_image(image)))
    assert played.images[0].pixels.dtype == np.int16
    assert not played.failures
    assert play(scan(), dummy, LINES).failures == ["protocol"]


def test_the_noise_of_an_earlier_scan_answers_a_dependency() -> None:
    readouts = np.random.default_rng(1).standard_normal((4, 3, 256, 2)).astype(np.float32).view(np.complex64)[..., 0]
    noise = {"scan_1": NoiseModel.from_readouts(readouts, 5.0)}
    for ident, status in (("scan_1", "success"), ("scan_2", "failed"), ("", "failed")):
        played = play(scan(noise=noise, role=Role.NOISE, noise_id=ident))
        assert played.ids == [1019]
        assert mrd.dependency(played.frames[0])["status"] == [status]


@pytest.mark.parametrize("role", [Role.EXTERNAL, Role.NOISE])
@settings(max_examples=25, deadline=None)
@given(pieces=st.lists(st.sampled_from([HEADER, LINES[: len(LINES) // 4], mrd.encode_text("{}")]), max_size=4))
def test_no_text_goes_where_it_would_end_the_session(role: Role, pieces: list[bytes]) -> None:
    played = play(scan(role=role), *pieces, complete=False)
    assert mrd.MessageId.TEXT not in played.ids


def _bucket(batch: AcquisitionBatch, calibration: AcquisitionBatch) -> bytes:
    imaging, reference = (
        BucketPart(
            headers=np.ascontiguousarray(part.headers),
            trajectory=np.zeros(0, np.float32),
            samples=np.ascontiguousarray(part.samples).reshape(-1),
        )
        for part in (batch, calibration)
    )
    return b"".join(bytes(part) for part in encode_bucket(Bucket(imaging, reference)))


def test_a_bucket_of_a_chain_gives_the_image_of_its_readouts() -> None:
    (batch,) = SIMULATED.readouts(16)
    headers = batch.headers.copy()
    headers["flags"] |= np.uint64(AcquisitionFlag.IS_PARALLEL_CALIBRATION_AND_IMAGING.bit)
    both = AcquisitionBatch(headers=headers, samples=batch.samples, received=1.0)
    (direct,) = play(scan(role=Role.EXTERNAL), HEADER, LINES).images
    for calibration in (batch, both):
        empty = AcquisitionBatch(headers=headers[:0], samples=batch.samples[:0], received=1.0)
        part = empty if calibration is batch else both
        (image,) = play(scan(role=Role.EXTERNAL), HEADER, _bucket(batch, part)).images
        assert np.allclose(image.pixels, direct.pixels, rtol=1e-5, atol=1e-7)
    assert play(scan(), HEADER, _bucket(batch, both)).failures == ["protocol"], "a scanner has no buckets"


@pytest.mark.parametrize("role", list(Role))
def test_buffers_are_refused_with_the_way_out(role: Role) -> None:
    """In no role, and also where other composite messages are taken."""
    empty = b"".join(encode_recon_data([]))
    failed = [reply for reply in scan(role=role).take(Framer().feed(HEADER + empty), 1.0) if reply.failed]
    assert [reply.failed for reply in failed] == ["protocol"]
    assert "before that gadget" in failed[0].text
