"""The scan client against a peer made of the codec, over real sockets."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scanside.adapters import mrd
from scanside.adapters.client import Dependency, ScanClient, config_text
from scanside.adapters.grammar import Begin, Grammar, Role
from scanside.adapters.mrd import Framer, MessageId
from scanside.engine.config import ConfigStore
from scanside.engine.errors import DeliveryError, PeerError, TruncatedMessage
from scanside.engine.headers import ACQUISITION_HEADER, IMAGE_HEADER, WAVEFORM_HEADER, AcquisitionFlag
from scanside.engine.messages import AcquisitionBatch, Image, WaveformRecord

Play = Callable[["Peer"], None]


class Peer:
    """A server for one connection that does what the test says."""

    def __init__(self, play: Play) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._play = play
        self.frames: list[mrd.Frame] = []
        self._framer = Framer()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            self.connection = connection
            try:
                self._play(self)
            except BaseException as error:  # noqa: BLE001 - shown by `stop`
                self.failure = error

    def read_until(self, wanted: Callable[[mrd.Frame], bool]) -> None:
        """Receive until a frame is wanted; all are kept, one by one."""
        while True:
            nbytes = self.connection.recv_into(self._framer.buffer())
            if not nbytes:
                return
            new = [single for frame in self._framer.advance(nbytes) for single in frame.split()]
            self.frames += new
            if any(map(wanted, new)):
                return

    def read_id(self, ident: int) -> None:
        self.read_until(lambda frame: frame.id == ident)

    def send(self, *buffers: bytes | memoryview) -> None:
        for buffer in buffers:
            self.connection.sendall(buffer)

    def stop(self) -> None:
        self._thread.join(20)
        self._listener.close()
        assert not self._thread.is_alive()
        if self.failure is not None:
            raise self.failure


@contextlib.contextmanager
def session(play: Play, **settings: object) -> Iterator[tuple[ScanClient, Peer]]:
    peer = Peer(play)
    try:
        with ScanClient(port=peer.port, **settings) as client:
            yield client, peer
    finally:
        peer.stop()


def batch(rng: np.random.Generator, count: int = 5, *, repetition: int = 0, flags: int = 0) -> AcquisitionBatch:
    headers = np.zeros(count, ACQUISITION_HEADER)
    headers["version"] = 1
    headers["flags"] = flags
    headers["number_of_samples"], headers["active_channels"] = 32, 3
    headers["idx"]["kspace_encode_step_1"] = np.arange(count)
    headers["idx"]["repetition"] = repetition
    samples = rng.standard_normal((count, 3, 32, 2)).astype("<f4").view("<c8")[..., 0]
    return AcquisitionBatch(headers=headers, samples=samples)


def image(repetition: int = 0, value: float = 1.0) -> Image:
    header = np.zeros((), IMAGE_HEADER)
    header["version"], header["image_type"], header["repetition"] = 1, 1, repetition
    return Image(header=header, pixels=np.full((1, 1, 4, 6), value, "<f4"), meta={"made_by": ["a test"]})


def answer_close(peer: Peer) -> None:
    peer.read_id(MessageId.CLOSE)
    peer.send(mrd.encode_close())


def drain(client: ScanClient) -> list[object]:
    return [arrival.item for arrival in client.arrivals()]


def test_everything_arrives_in_order_and_unchanged(rng: np.random.Generator) -> None:
    sent = batch(rng)
    wave = WaveformRecord(header=np.zeros((), WAVEFORM_HEADER), samples=np.arange(12, dtype="<u4").reshape(2, 6))
    with session(answer_close) as (client, peer):
        client.configure("mri/sense")
        client.header(b"<xml/>")
        client.parameters({"iterations": 3})
        client.waveform(wave)
        client.acquisitions(sent)
        client.image(image())
        client.end_scan()
        client.end_scan()
        assert drain(client) == []
        assert client.closed
        assert client.readouts == len(sent)
    wire = [mrd.encode_config_file("mri/sense"), mrd.encode_header(b"<xml/>")]
    wire += [mrd.encode_text('{"parameters": {"iterations": 3}}'), mrd.encode_waveform(wave)]
    wire += [mrd.encode_acquisitions(sent), b"".join(mrd.encode_image(image())), mrd.encode_close()]
    assert client.bytes_sent == len(b"".join(wire))
    (back,) = (mrd.waveform(frame) for frame in peer.frames if frame.id == MessageId.WAVEFORM)
    assert np.array_equal(back.samples, wave.samples)
    del wire[3]  # padding in its header may differ
    got = [frame.view for frame in peer.frames if frame.id != MessageId.WAVEFORM]
    assert b"".join(got) == b"".join(wire)


@pytest.mark.parametrize("bits", [10, 16])
def test_compressed_readouts_are_within_half_a_step(rng: np.random.Generator, bits: int) -> None:
    sent = batch(rng)
    with session(answer_close, bits=bits) as (client, peer):
        client.acquisitions(sent)
        client.end_scan()
        drain(client)
    frames = [frame for frame in peer.frames if frame.id == MessageId.ACQUISITION]
    got = np.concatenate([mrd.acquisitions(frame, 0.0).samples for frame in frames])
    top = np.abs(sent.samples.view("<f4")).max(axis=(1, 2), keepdims=True)
    assert got.shape == sent.samples.shape
    assert (np.abs(got.view("<f4") - sent.samples.view("<f4")) <= top / (2**bits - 2) * 1.001).all()
    assert sum(len(frame.view) for frame in frames) < len(mrd.encode_acquisitions(sent))


def test_everything_a_server_may_say_is_handed_over_in_its_order(rng: np.random.Generator) -> None:
    readouts = batch(rng, 2)

    def play(peer: Peer) -> None:
        peer.read_id(MessageId.CLOSE)
        peer.send(mrd.encode_text("hello"), *mrd.encode_image(image(value=2.0)))
        peer.send(mrd.encode_dependency({"status": ["success"]}), mrd.encode_acquisitions(readouts))
        peer.send(*mrd.encode_dicom(mrd.Dicom(memoryview(b"DICM"), "a.dcm")), mrd.encode_close())

    with session(play) as (client, _):
        client.end_scan()
        text, picture, dependency, back, dicom = drain(client)
    assert text == "hello"
    assert isinstance(picture, Image)
    assert picture.meta == {"made_by": ["a test"]}
    assert (picture.pixels == 2.0).all()
    assert dependency == Dependency({"status": ["success"]})
    assert isinstance(back, AcquisitionBatch)
    assert np.array_equal(back.samples, readouts.samples)
    assert isinstance(dicom, mrd.Dicom)
    assert (dicom.name, bytes(dicom.data)) == ("a.dcm", b"DICM")


@pytest.mark.parametrize("interval", [0.0, 0.001])
def test_latency_counts_from_the_last_readout_of_the_image_s_own_frame(
    rng: np.random.Generator, interval: float
) -> None:
    def play(peer: Peer) -> None:
        peer.read_until(lambda frame: frame.id == MessageId.ACQUISITION and len(peer.frames) >= 5)
        peer.send(*mrd.encode_image(image(repetition=0)), *mrd.encode_image(image(repetition=7)))
        answer_close(peer)

    with session(play) as (client, _):
        client.acquisitions(batch(rng), interval)
        arrivals = client.arrivals()
        first, second = next(arrivals), next(arrivals)
        noise = batch(rng, repetition=7, flags=AcquisitionFlag.IS_NOISE_MEASUREMENT.bit)
        client.acquisitions(noise)
        client.end_scan()
        assert list(arrivals) == []
    assert first.latency is not None
    assert 0 < first.latency <= first.at
    assert second.latency is None  # of repetition 7 nothing had been sent


def test_noise_readouts_belong_to_no_image(rng: np.random.Generator) -> None:
    def play(peer: Peer) -> None:
        peer.read_id(MessageId.CLOSE)
        peer.send(*mrd.encode_image(image()), mrd.encode_close())

    with session(play) as (client, _):
        client.acquisitions(batch(rng, flags=AcquisitionFlag.IS_NOISE_MEASUREMENT.bit))
        client.end_scan()
        (arrival,) = client.arrivals()
    assert arrival.latency is None


def test_paced_readouts_never_go_out_early(rng: np.random.Generator) -> None:
    with session(answer_close) as (client, _):
        begun = time.monotonic()
        client.acquisitions(batch(rng, 4), interval=0.01)
        client.acquisitions(batch(rng, 4), interval=0.01)
        # A lower bound alone, which a slow machine cannot break: one schedule runs through both batches.
        assert time.monotonic() - begun >= 7 * 0.01
        client.end_scan()
        drain(client)


def test_a_callback_takes_everything(rng: np.random.Generator) -> None:
    got: list[object] = []

    def play(peer: Peer) -> None:
        peer.read_id(MessageId.CLOSE)
        peer.send(mrd.encode_text("one"), *mrd.encode_image(image()), mrd.encode_close())

    with session(play, on_arrival=lambda arrival: got.append(arrival.item)) as (client, _):
        client.end_scan()
        assert drain(client) == []
    assert got[0] == "one"
    assert isinstance(got[1], Image)


def test_queries_get_the_answer_of_their_number() -> None:
    def play(peer: Peer) -> None:
        for _ in range(2):
            peer.read_id(MessageId.QUERY)
            asked = mrd.query(peer.frames[-1])
            stray = mrd.Response(asked.correlation + 1000, "not for you")
            peer.send(
                mrd.encode_response(stray), mrd.encode_response(mrd.Response(asked.correlation, asked.text.upper()))
            )
        answer_close(peer)

    with session(play) as (client, _):
        assert client.query("gadgetron::version") == "GADGETRON::VERSION"
        assert client.query("again") == "AGAIN"
        client.end_scan()
        drain(client)
        with pytest.raises(PeerError, match="ended the session"):
            client.query("too late")


def test_an_end_without_close_is_told_apart() -> None:
    with session(lambda peer: peer.read_id(MessageId.CLOSE)) as (client, _):
        client.end_scan()
        assert drain(client) == []
        assert not client.closed


def test_an_end_inside_a_message_is_an_error() -> None:
    def play(peer: Peer) -> None:
        peer.read_id(MessageId.CLOSE)
        peer.send(mrd.encode_text("hello")[:-2])

    with session(play) as (client, _):
        client.end_scan()
        with pytest.raises(TruncatedMessage, match="TEXT"):
            drain(client)


@pytest.mark.parametrize("message", [mrd.encode_config_file("x"), mrd.encode_query(mrd.Query(1, "x"))])
def test_what_a_server_may_not_say_is_an_error(message: bytes) -> None:
    def play(peer: Peer) -> None:
        peer.read_id(MessageId.CLOSE)
        peer.send(message)

    with session(play) as (client, _):
        client.end_scan()
        with pytest.raises(PeerError, match="no place"):
            drain(client)


def test_a_refused_scan_stops_sending_and_repeats_the_server_s_words(rng: np.random.Generator) -> None:
    def play(peer: Peer) -> None:
        peer.read_id(MessageId.CONFIG_FILE)
        peer.send(mrd.encode_text("no such configuration"), mrd.encode_close())
        peer.read_id(-1)

    def send_for_ever(client: ScanClient) -> None:
        while True:
            client.acquisitions(batch(rng))

    with session(play) as (client, _):
        client.configure("nonsense")
        with pytest.raises(PeerError, match="no such configuration"):
            send_for_ever(client)


def test_a_server_that_breaks_the_connection_is_an_error(rng: np.random.Generator) -> None:
    def play(peer: Peer) -> None:
        peer.read_id(MessageId.CONFIG_FILE)
        peer.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # RST

    def send_for_ever(client: ScanClient) -> None:
        while True:
            client.acquisitions(batch(rng))

    with session(play) as (client, _):
        client.configure("x")
        with pytest.raises(PeerError, match="ended the session"):
            send_for_ever(client)


def test_a_silent_server_is_not_waited_for_for_ever() -> None:
    done = threading.Event()
    with session(lambda _: done.wait(20), timeout=0.1) as (client, _):
        with pytest.raises(DeliveryError, match=r"silent for 0\.1 s"):
            drain(client)
        with pytest.raises(DeliveryError, match="an answer to 'x'"):
            client.query("x")
        done.set()


def test_a_server_that_takes_nothing_is_not_waited_for_for_ever(rng: np.random.Generator) -> None:
    done = threading.Event()

    def send_for_ever(client: ScanClient) -> None:
        while True:
            client.acquisitions(batch(rng, 500))

    with session(lambda _: done.wait(20), timeout=0.2) as (client, _):
        with pytest.raises(DeliveryError, match="took no data"):
            send_for_ever(client)
        done.set()


def test_no_server_is_an_error_that_says_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    client = ScanClient(port=port)
    with pytest.raises(DeliveryError, match=f"scanside serve -p {port}"):
        client.connect()
    with pytest.raises(DeliveryError, match="not connected"):
        client.configure("x")
    client.hang_up()


METHODS, KINDS = st.sampled_from(["sense", "grappa", "zero_filled"]), st.sampled_from(["magnitude", "complex"])


@given(st.fixed_dictionaries({}, optional={"reconstruction.method": METHODS, "output.image": KINDS}))
def test_servers_understand_the_configuration_text(overrides: dict[str, str]) -> None:
    grammar = Grammar(ConfigStore(), str)
    frames = Framer().feed(mrd.encode_config_text(config_text("mri/grappa", overrides)))
    assert grammar.react(frames[0]) == [Begin("mri/grappa", overrides, Role.SCAN)]


def test_the_configuration_text_escapes_what_xml_reserves() -> None:
    grammar = Grammar(ConfigStore(), str)
    (action,) = grammar.react(Framer().feed(mrd.encode_config_text(config_text("a<b&c", {})))[0])
    assert "'a<b&c'" in str(action)
