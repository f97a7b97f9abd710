"""Photoacoustic streams over real sockets: from the device's sender through broker and worker to images, and what goes wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import numpy as np
import pytest
from scanside.adapters import PhotoacousticSender, mrd
from scanside.adapters import photoacoustic as pat
from scanside.adapters.bus import Broker, Producer, Subscriber
from scanside.adapters.envelope import Note, Result, Stats
from scanside.adapters.files.photoacoustic import open_recording
from scanside.adapters.mrd_framing import Framer
from scanside.adapters.photoacoustic_sender import ArrivedImage
from scanside.adapters.worker import Worker
from scanside.engine.config import ConfigStore
from scanside.engine.errors import DeadlineMissed, EngineError, PeerError, ScansideError
from scanside.engine.evaluation import nrmse
from scanside.engine.messages import Image, PhotoacousticFrame, PhotoacousticHeader
from scanside.engine.simulation.photoacoustic import Spheres, ring, sphere_signals
from scanside.engine.streaming.photoacoustic import PhotoacousticSession

STORE = ConfigStore()
ELEMENTS, SAMPLES = 32, 400
SPHERE = Spheres(np.array([[3e-3, -2e-3, 0.0]]), np.array([1e-3]), np.ones(1))
SIGNALS = sphere_signals(ring(ELEMENTS, 0.02), SPHERE, SAMPLES, 10e6)
SHOT = np.rint(SIGNALS / np.abs(SIGNALS).max() * 20000).astype("<i2")


def header(**changes: Any) -> PhotoacousticHeader:
    values: dict[str, Any] = {
        "stream": "00112233445566778899aabbccddeeff",
        "elements": ELEMENTS,
        "samples": SAMPLES,
        "positions_m": ring(ELEMENTS, 0.02),
        "sampling_rate_hz": 10e6,
        "wavelengths_m": (8e-7,),
        "pixels": (32, 32),
        "field_of_view_m": (-0.01, 0.01, -0.01, 0.01),
    }
    return PhotoacousticHeader(**(values | changes))


class Crew:
    """A broker with workers in threads of this process, which can be taken away."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.record: Path | None = None
        self._members: list[tuple[Worker, threading.Thread]] = []

    def hire(self) -> Worker:
        worker = Worker(self.broker.endpoint, STORE, name="test", record=self.record)
        thread = threading.Thread(target=worker.run)
        thread.start()
        self._members.append((worker, thread))
        return worker

    def stop(self, worker: Worker) -> None:
        """End a worker without telling anybody."""
        worker.stop()
        next(thread for member, thread in self._members if member is worker).join()

    def dismiss(self, worker: Worker) -> None:
        """Let a worker vanish as if its process had ended."""
        self.stop(worker)
        self.broker.worker_lost(worker.port.identity)

    def close(self) -> None:
        for worker, thread in self._members:
            worker.stop()
            thread.join()


@pytest.fixture
def crew() -> Iterator[Crew]:
    with Broker() as broker:
        made = Crew(broker)
        yield made
        made.close()


@pytest.fixture
def endpoint(crew: Crew) -> str:
    crew.hire()
    return crew.broker.endpoint


class Screen:
    """Collects images."""

    def __init__(self) -> None:
        self.arrived: list[ArrivedImage] = []

    def __call__(self, image: ArrivedImage) -> None:
        self.arrived.append(image)

    @property
    def shots(self) -> list[int]:
        return [int(item.image.meta["scanside_shot"][0]) for item in self.arrived]

    def wait(self, count: int) -> None:
        until(lambda: len(self.arrived) >= count)


def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def in_memory(*shots: np.ndarray) -> list[Image]:
    session = PhotoacousticSession(STORE.get("pat/ubp"))
    (first,) = pat.decode([memoryview(pat.encode_header(header()))], 0.0, None)
    assert isinstance(first, PhotoacousticHeader)
    list(session.feed(first))
    made: list[Image] = []
    for number, shot in enumerate(shots):
        parts = [memoryview(bytes(part)) for part in pat.encode_frame(frame(number, samples=shot))]
        for message in pat.decode(parts, 0.0, first):
            made += [event for event in session.feed(message) if isinstance(event, Image)]
    return made


def frame(number: int, **changes: Any) -> PhotoacousticFrame:
    return PhotoacousticFrame(**({"seq": number, "shot": number, "samples": SHOT} | changes))


def test_a_device_gets_the_images_of_its_shots_in_order(endpoint: str) -> None:
    screen = Screen()
    shots = [SHOT, -SHOT, SHOT // 2]
    with PhotoacousticSender(endpoint, header(), config="pat/ubp", on_image=screen, checksum=True) as sender:
        for number, shot in enumerate(shots):
            sender.send(shot, timestamp_s=number / 25)
    assert screen.shots == [0, 1, 2]
    for item, expected in zip(screen.arrived, in_memory(*shots), strict=True):
        assert np.array_equal(item.image.pixels, expected.pixels)
        assert item.latency is not None
        assert 0 < item.latency < 60
    assert (sender.frames_sent, sender.reconnections, sender.sent_again) == (3, 0, 0)


def test_the_array_of_the_caller_may_change_after_it_was_sent(endpoint: str) -> None:
    screen = Screen()
    buffer = SHOT.copy()
    with PhotoacousticSender(endpoint, header(), config="pat/ubp", on_image=screen) as sender:
        for sign in (1, -1, 1):
            buffer[...] = sign * SHOT
            sender.send(buffer)
            buffer[...] = 0
    for item, expected in zip(screen.arrived, in_memory(SHOT, -SHOT, SHOT), strict=True):
        assert np.array_equal(item.image.pixels, expected.pixels)


def test_more_frames_than_there_is_credit_for_all_become_images(endpoint: str) -> None:
    screen = Screen()
    with PhotoacousticSender(endpoint, header(), on_image=screen) as sender:
        for _ in range(600):
            sender.send(SHOT)
    assert screen.shots == list(range(600))


def test_viewers_see_images_statistics_and_notes(endpoint: str, crew: Crew) -> None:
    viewer = Subscriber(crew.broker.viewers, ["image.", "stats", "note"])
    try:
        screen, seen = Screen(), []
        with PhotoacousticSender(endpoint, header(), on_image=screen) as sender:
            deadline = time.monotonic() + 20
            while len({type(item.envelope) for item in seen}) < 3:
                assert time.monotonic() < deadline
                sender.send(SHOT)
                sender.adjust(averages=1)
                seen += viewer.poll(0.05)
        assert {type(item.envelope) for item in seen} == {Result, Stats, Note}
        stats = next(item.envelope.stats for item in seen if isinstance(item.envelope, Stats))
        assert (stats.pipeline, stats.outcome) == ("pat/das", "complete")
    finally:
        viewer.close()


def test_another_program_adjusts_all_streams(endpoint: str) -> None:
    screen, operator = Screen(), Producer(endpoint)
    try:
        operator.adjust({"speed_of_sound": 1520.0}, everyone=True)
        assert operator.wait_adjusted(20) == 0
        with PhotoacousticSender(endpoint, header(), on_image=screen) as sender:
            sender.send(SHOT)
            screen.wait(1)
            operator.adjust({"speed_of_sound": "1520", "autofocus": "delay"}, everyone=True)
            assert operator.wait_adjusted(20) == 1
            until(lambda: any("autofocus" in note for note in sender.notes))
            sender.send(SHOT)
        assert [item.image.meta["scanside_speed_of_sound"][0] for item in screen.arrived] == ["1500", "1520"]
        assert any("speed of sound is 1520 m/s" in note for note in sender.notes)
    finally:
        operator.close()


# --- loss --------------------------------------------------------------------------------------------------------------------


def test_a_stream_survives_the_loss_of_its_worker(crew: Crew) -> None:
    first, screen = crew.hire(), Screen()
    with PhotoacousticSender(crew.broker.endpoint, header(), on_image=screen) as sender:
        for _ in range(10):
            sender.send(SHOT)
        screen.wait(10)
        crew.dismiss(first)
        crew.hire()
        for _ in range(10):
            sender.send(SHOT)
    assert screen.shots == list(range(20))
    assert sender.reconnections == 1
    assert all(item.image.meta["scanside_frames_missing"] == ["0"] for item in screen.arrived)


def test_frames_that_were_under_way_are_sent_again(crew: Crew) -> None:
    """The worker takes the session and vanishes before it has used anything; the broker finds out when it wants to deliver."""
    first, screen = crew.hire(), Screen()
    with PhotoacousticSender(crew.broker.endpoint, header(), on_image=screen) as sender:
        sender.send(SHOT)
        until(lambda: sender.unused == 0)
        crew.hire()
        crew.stop(first)
        for _ in range(8):
            sender.send(SHOT)
    assert screen.shots == list(range(9))
    assert sender.reconnections == 1


def test_without_a_worker_in_time_the_sender_says_so(crew: Crew) -> None:
    with pytest.raises(DeadlineMissed), PhotoacousticSender(crew.broker.endpoint, header(), patience=0.3):
        pass


def test_a_damaged_frame_is_asked_for_and_sent_again(endpoint: str) -> None:
    producer = Producer(endpoint)
    try:
        producer.open("pat/das", adapter="pat")
        producer.send([pat.encode_header(header())])
        head, samples = pat.encode_frame(frame(0), checksum=True)
        broken = bytearray(samples)
        broken[5] ^= 1
        producer.send([head, bytes(broken)])
        until(lambda: bool(producer.asked_again))
        assert producer.asked_again.popleft() == (0, 0)
        producer.send([head, bytes(samples)])
        producer.end()
        assert len(images(producer)) == 0  # its shot is past; it is for the recording
    finally:
        producer.close()


def test_the_sender_answers_when_the_server_asks_again(endpoint: str) -> None:
    screen = Screen()
    with PhotoacousticSender(endpoint, header(), on_image=screen) as sender:
        for _ in range(3):
            sender.send(SHOT)
        screen.wait(3)
        sender._producer.asked_again.append((1, 2))
        sender.send(SHOT)
        assert sender.sent_again == 2
    assert screen.shots == [0, 1, 2, 3]


def images(producer: Producer) -> list[Image]:
    data = b"".join(bytes(part) for _, payload in producer.results(20) for part in payload)
    frames = [single for frame in Framer().feed(data) for single in frame.split()]
    return [mrd.image(found) for found in frames if found.id == mrd.MessageId.IMAGE]


# --- recordings --------------------------------------------------------------------------------------------------------------


def test_a_stream_is_recorded_with_its_gap(crew: Crew, tmp_path: Path, rng: np.random.Generator) -> None:
    crew.record = tmp_path / "recordings"
    crew.hire()
    shots = {n: rng.integers(-900, 900, SHOT.shape).astype("<i2") for n in (0, 1, 4)}
    with PhotoacousticSender(crew.broker.endpoint, header()) as sender:
        for number, shot in shots.items():
            sender.send_frame(frame(number, samples=shot, timestamp_s=number / 25))
    (path,) = crew.record.iterdir()
    assert any(f"3 frames recorded in {path.name}" in note for note in sender.notes)
    with open_recording(path) as recording:
        assert recording.header.stream == header().stream
        assert np.allclose(recording.header.positions_m, header().positions_m)
        got = list(recording.frames())
    assert [shot.seq for shot in got] == [0, 1, 4]
    assert all(np.array_equal(shot.samples, shots[shot.seq]) for shot in got)


def test_a_folder_that_cannot_be_written_costs_the_recording_and_not_the_images(crew: Crew, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    crew.record = tmp_path / "file" / "recordings"
    crew.hire()
    screen = Screen()
    with PhotoacousticSender(crew.broker.endpoint, header(), on_image=screen) as sender:
        sender.send(SHOT)
        sender.send(SHOT)
    assert screen.shots == [0, 1]
    assert any("broke off" in note for note in sender.notes)


# --- what is wrong costs only its own session --------------------------------------------------------------------------------


def raw_header(**changes: Any) -> bytes:
    fields = msgpack.unpackb(pat.encode_header(header())[4:])
    for path, value in changes.items():
        table, key = path.split("__")
        (fields["device"][table] if table == "detectors" else fields[table])[key] = value
    return b"PAT1" + msgpack.packb(fields)


def wide() -> list[bytes]:
    head, samples = pat.encode_frame(frame(1, samples=np.zeros((2 * ELEMENTS, SAMPLES), "<i2")))
    return [head, bytes(samples)]


GOOD = [bytes(part) for part in (pat.encode_header(header()), *pat.encode_frame(frame(0)))]
BAD: dict[str, tuple[Callable[[], list[bytes]], str]] = {
    "geometry of another length": (
        lambda: [raw_header(detectors__detector_position=bytes(48))],
        "detector_position has 48 bytes",
    ),
    "NaN position": (
        lambda: [raw_header(detectors__detector_position=np.full((ELEMENTS, 3), np.nan).tobytes())],
        "number 0 is nan",
    ),
    "sampling rate 0": (lambda: [raw_header(acquisition__ad_sampling_rate=0.0)], "ad_sampling_rate is 0"),
    "too many elements": (lambda: [raw_header(acquisition__sizes=[5000, 5000])], "limits.channels"),
    "no header": (lambda: GOOD[1:], "send the header first"),
    "element count changes": (lambda: [*GOOD, *wide()], "the header says 32"),
    "no samples": (lambda: GOOD[:2], "without its samples"),
    "MRI on a photoacoustic stream": (lambda: [b"\x03\x00" + bytes(100)], "head of a message"),
}


@pytest.mark.parametrize(("make", "says"), BAD.values(), ids=BAD.keys())
def test_a_bad_stream_costs_only_itself(
    endpoint: str, scan_bytes: Callable[..., Any], make: Callable[[], list[bytes]], says: str
) -> None:
    scan, mri, bad, screen = scan_bytes(), Producer(endpoint), Producer(endpoint), Screen()
    try:
        mri.open("default")
        mri.send([mrd.encode_header(scan.xml), *scan.messages[:16]])
        with PhotoacousticSender(endpoint, header(), on_image=screen) as healthy:
            healthy.send(SHOT)
            bad.open("pat/das", adapter="pat")
            bad.send(make())
            bad.end()
            with pytest.raises(ScansideError, match=says.replace(".", r"\.")):
                list(bad.results(20))
            healthy.send(SHOT)
        mri.send(list(scan.messages[16:]))
        mri.end()
        assert screen.shots == [0, 1]
        (image,) = images(mri)
        assert nrmse(scan.reference, image.pixels[0, 0], fit_scale=True) < 0.05
    finally:
        mri.close()
        bad.close()


def flat(*elements: int) -> np.ndarray:
    """A shot in which these elements do not change."""
    samples = SHOT.copy()
    samples[list(elements)] = 1234
    return samples


def cut_off() -> np.ndarray:
    """A shot with a sample at the end of the range of the converter."""
    samples = SHOT.copy()
    samples[3, 7] = 32767
    return samples


FLAWED: dict[str, tuple[dict[str, Any], list[PhotoacousticFrame], list[dict[str, str]], str]] = {
    "gap": (
        {},
        [frame(0), frame(3)],
        [{"frames_missing": "0"}, {"frames_missing": "2", "outcome": "complete"}],
        "frames 1 to 2 are missing",
    ),
    "gap in an average": (
        {"averages": 2},
        [frame(0), frame(2), frame(3)],
        [{"averaged": "1", "outcome": "incomplete", "reason": "shots_missing"}, {"averaged": "2"}],
        "nothing is put together across the gap",
    ),
    "duplicate": ({}, [frame(0), frame(0), frame(1)], [{"shot": "0"}, {"shot": "1"}], "frame 0 came again"),
    "clipped": ({}, [frame(0, samples=cut_off())], [{"outcome": "degraded", "reason": "clipped"}], "clipped"),
    "clipped, by its flag": ({}, [frame(0, flags=2)], [{"outcome": "degraded", "reason": "clipped"}], "clipped"),
    "no dead element": ({}, [frame(0)], [{"elements_left_out": "0", "outcome": "complete"}], ""),
    "dead elements": ({"dead": (5, 6)}, [frame(0)], [{"elements_left_out": "2", "outcome": "complete"}], ""),
    "silent elements": ({}, [frame(0, samples=flat(1, 2))], [{"elements_left_out": "2"}], "2 elements do not change"),
    "all but one dead": ({"dead": tuple(range(1, ELEMENTS))}, [frame(0)], [{"elements": "1"}], ""),
    "all dead": ({"dead": tuple(range(ELEMENTS))}, [frame(0), frame(1)], [], "all elements are dead"),
    "all silent": ({}, [frame(0, samples=np.zeros_like(SHOT))], [{"elements_left_out": "0"}], ""),
}


@pytest.mark.parametrize(("changes", "frames", "expected", "says"), FLAWED.values(), ids=FLAWED.keys())
def test_what_a_stream_lacks_is_marked_and_costs_nobody_else_anything(
    endpoint: str,
    changes: dict[str, Any],
    frames: list[PhotoacousticFrame],
    expected: list[dict[str, str]],
    says: str,
) -> None:
    screen, flawed = Screen(), Screen()
    with PhotoacousticSender(endpoint, header(), on_image=screen) as healthy:
        healthy.send(SHOT)
        with PhotoacousticSender(endpoint, header(stream="1" * 32, **changes), on_image=flawed) as sender:
            for one in frames:
                sender.send_frame(one)
        healthy.send(SHOT)
    for item, wanted in zip(flawed.arrived, expected, strict=True):
        assert {key: item.image.meta.get(f"scanside_{key}", [""])[0] for key in wanted} == wanted
    assert says in "\n".join(sender.notes)
    assert screen.shots == [0, 1]
    assert all(item.image.meta["scanside_outcome"] == ["complete"] for item in screen.arrived)


def test_shots_of_a_dead_array_are_counted_as_failed(endpoint: str, crew: Crew) -> None:
    viewer, seen = Subscriber(crew.broker.viewers, ["stats"]), []
    try:
        with PhotoacousticSender(endpoint, header(dead=tuple(range(ELEMENTS)))) as sender:
            deadline = time.monotonic() + 20
            while not seen:
                assert time.monotonic() < deadline
                sender.send(SHOT)
                seen += viewer.poll(0.05)
        assert (seen[0].envelope.stats.outcome, seen[0].envelope.stats.reason) == ("failed", "dead_elements")
    finally:
        viewer.close()


def test_what_had_arrived_before_an_error_is_imaged(endpoint: str) -> None:
    producer = Producer(endpoint)
    try:
        producer.open("pat/das", adapter="pat")
        producer.send([*GOOD, *wide()])
        producer.end()
        kinds: list[int] = []
        with pytest.raises(PeerError, match="the header says 32"):
            for _, payload in producer.results(20):
                kinds += [found.id for found in Framer().feed(b"".join(bytes(part) for part in payload))]
        assert kinds == [int(mrd.MessageId.IMAGE)]
    finally:
        producer.close()


@pytest.mark.parametrize(("config", "adapter"), [("default", "pat"), ("pat/das", "mrd")])
def test_configurations_are_for_one_kind_of_data(endpoint: str, config: str, adapter: Any) -> None:
    producer = Producer(endpoint)
    try:
        with pytest.raises(EngineError, match=r"for MRI|for photoacoustic"):
            producer.open(config, adapter=adapter, timeout=20)
    finally:
        producer.close()


@pytest.mark.parametrize(
    "samples",
    [SHOT[:, :-1], SHOT.astype(np.float32), SHOT.astype(np.uint16), SHOT[0], np.zeros((ELEMENTS + 1, SAMPLES), "<i2")],
)
def test_samples_that_do_not_fit_are_not_sent(endpoint: str, samples: np.ndarray) -> None:
    screen = Screen()
    with PhotoacousticSender(endpoint, header(), on_image=screen) as sender:
        with pytest.raises(PeerError, match="the header says int16"):
            sender.send(samples)
        sender.send(SHOT)
    assert screen.shots == [0]


def test_a_header_that_cannot_be_is_not_even_connected() -> None:
    with pytest.raises(PeerError, match="ad_sampling_rate"):
        PhotoacousticSender("ipc:///nowhere", header(sampling_rate_hz=0.0))


def test_a_device_that_breaks_off_leaves_images_of_what_it_sent(endpoint: str) -> None:
    screen = Screen()

    class Unplugged(Exception):
        pass

    with pytest.raises(Unplugged), PhotoacousticSender(endpoint, header(), on_image=screen) as sender:
        sender.send(SHOT)
        raise Unplugged
    assert screen.shots == [0]
    assert any("cut off" in note for note in sender.notes)


def test_parts_of_a_shot_are_sent_one_by_one(endpoint: str) -> None:
    screen = Screen()
    with PhotoacousticSender(endpoint, header(), config="pat/ubp", on_image=screen) as sender:
        for first in range(0, ELEMENTS, 8):
            sender.send(SHOT[first : first + 8], first_element=first, shot=0)
    (item,) = screen.arrived
    assert np.array_equal(item.image.pixels, in_memory(SHOT)[0].pixels)
    assert msgspec.structs.asdict(item)["latency"] is not None
