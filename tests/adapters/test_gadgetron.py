"""Scanners against a running server, over real sockets: who may say what when, and how every session ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from shutil import which
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scanside.adapters import mrd
from scanside.adapters.files.ismrmrd import open_scan
from scanside.adapters.gadgetron import listen
from scanside.adapters.server import Server
from scanside.engine.evaluation import nrmse
from scanside.engine.headers import IMAGE_HEADER, WAVEFORM_HEADER
from scanside.engine.messages import Image, WaveformRecord

Connect = Callable[..., Any]
Scans = Callable[..., Any]
CLOSE = mrd.encode_close()
CONFIG = mrd.encode_config_file("default")
TEXT, IMAGE, DEPENDENCY, ERROR = 5, 1022, 1019, 8
NOISE_CHAIN = (
    '<?xml version="1.0"?><gadgetronStreamConfiguration xmlns="http://gadgetron.sf.net/gadgetron"><gadget><name>N</name>'
    "<classname>NoiseSummaryGadget</classname><property><name>noise_file</name>"
    "<value>GadgetronNoiseCovarianceMatrix_{}</value></property></gadget></gadgetronStreamConfiguration>"
)


def picture(image: Image) -> np.ndarray:
    """The only slice of the only channel."""
    return np.asarray(image.pixels[0, 0])


def refused(wire: Any) -> bool:
    """Told in words, closed in order, and nothing else."""
    return bool(wire.texts) and set(wire.ids) == {TEXT, 4} and wire.closed_properly


def metric(server: Server, name: str) -> float:
    """Value of one series, such as `scanside_sessions_total{outcome="complete"}`; 0 where it does not exist yet."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == name), 0.0)


def soon(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether something comes true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# --- a scan ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "acceleration", "limit"), [("default", 1, 0.02), ("sense", 2, 0.05)])
def test_a_scan_comes_back_as_an_image(
    connect: Connect, scan_bytes: Scans, config: str, acceleration: int, limit: float
) -> None:
    scan = scan_bytes(64, 8, acceleration)
    wire = connect().send(scan.session(config)).finish()
    assert wire.closed_properly
    (image,) = wire.images
    inside = scan.reference > 0.05
    assert nrmse(scan.reference * inside, picture(image) * inside, fit_scale=True) < limit
    assert image.meta["DataRole"] == ["Image"]
    assert len(image.meta["ImageRowDir"]) == 3


def test_images_are_numbered_and_arrive_before_the_scan_ends(connect: Connect, scan_bytes: Scans) -> None:
    scan = scan_bytes(32, 4, 1, 3)
    wire = connect().send(CONFIG, mrd.encode_header(scan.xml), *scan.messages[:32])
    wire.until(lambda: bool(wire.images))
    assert not wire.ended
    wire.send(*scan.messages[32:], CLOSE).finish()
    assert [(int(i.header["image_series_index"]), int(i.header["image_index"])) for i in wire.images] == [
        (1, 1),
        (1, 2),
        (1, 3),
    ]
    assert [int(i.header["repetition"]) for i in wire.images] == [0, 1, 2]
    assert wire.closed_properly


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 20_000), min_size=1, max_size=6))
def test_how_the_bytes_are_cut_makes_no_difference(connect: Connect, scan_bytes: Scans, cuts: list[int]) -> None:
    scan = scan_bytes()
    data = scan.session("default")
    edges = sorted({0, *(cut % len(data) for cut in cuts), len(data)})
    wire = connect()
    for first, last in pairwise(edges):
        wire.send(data[first:last])
        time.sleep(0.002)
    (image,) = wire.finish().images
    (whole,) = connect().send(data).finish().images
    assert nrmse(picture(whole), picture(image)) < 1e-5


def test_many_scans_at_once_get_their_own_images(connect: Connect, scan_bytes: Scans) -> None:
    scans = [scan_bytes(size, 4) for size in (16, 24, 32, 40)]
    wires = [(scan, connect().send(scan.session("default"))) for scan in scans * 3]
    for scan, wire in wires:
        (image,) = wire.finish().images
        assert picture(image).shape == scan.reference.shape
        assert nrmse(scan.reference, picture(image), fit_scale=True) < 0.05


# --- reactions -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stimulus", "ids"),
    [
        (CLOSE, [4]),
        (mrd.encode_query(mrd.Query(9, "gadgetron::info")) + CLOSE, [7, 4]),
        (mrd.encode_query(mrd.Query(9, "no::such")) + CLOSE, [7, 4]),
        (CONFIG + CLOSE, [4]),
        (CONFIG + mrd.encode_query(mrd.Query(9, "scanside::health")) + CLOSE, [7, 4]),
        (mrd.encode_config_file("null") + mrd.encode_header("anything") + CLOSE, [4]),
        (mrd.encode_config_file("gtquery.xml") + CLOSE, [DEPENDENCY, 4]),
        (mrd.encode_config_text(NOISE_CHAIN.format("unknown")) + CLOSE, [DEPENDENCY, 4]),
    ],
)
def test_short_sessions_end_with_close(connect: Connect, stimulus: bytes, ids: list[int]) -> None:
    wire = connect().send(stimulus).finish()
    assert wire.ids == ids
    assert wire.closed_properly


ZERO = struct.pack("<H", 1008) + bytes(340)


@pytest.mark.parametrize(
    ("stimulus", "says"),
    [
        (mrd.encode_header("<ismrmrdHeader/>") + CLOSE, "before config"),
        (struct.pack("<H", 999) + bytes(64), "999"),
        (CONFIG + struct.pack("<H", 999) + bytes(64) + CLOSE, "999"),
        (mrd.encode_config_file("nonsense.xml") + CLOSE, "default"),
        (mrd.encode_config_text("not XML") + CLOSE, "configuration text"),
        (struct.pack("<HQQQ", 6, 5, 1, 0) + CLOSE, "reserved"),
        (CONFIG + CONFIG + CLOSE, "second"),
        (CONFIG + mrd.encode_header("<ismrmrdHeader/>") + CLOSE, "encoding"),
        (CONFIG + mrd.encode_header("<x/>") + ZERO + CLOSE, "samples"),
        (struct.pack("<HI", 3, 0xFFFFFFFF), "limit"),
        (b"GET / HTTP/1.1\r\n\r\n", "17735"),
        (mrd.encode_error("we are not Gadgetron") + CLOSE, "client"),
    ],
)
def test_mistakes_are_told_in_words(connect: Connect, stimulus: bytes, says: str) -> None:
    wire = connect().send(stimulus).half_close().finish()
    assert refused(wire)
    assert says in " ".join(wire.texts)


def test_garbage_costs_no_time(connect: Connect) -> None:
    begun = time.monotonic()
    assert refused(connect().send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").finish())
    assert time.monotonic() - begun < 1.5, "shorter than the drain time, though the peer keeps its side open"


def test_a_port_probe_is_no_session(server: Server, connect: Connect) -> None:
    before = metric(server, "scanside_sessions_active")
    wire = connect().half_close().finish()
    assert wire.ended
    assert metric(server, "scanside_sessions_active") == before


@pytest.mark.parametrize("sent", [b"", CONFIG[:100], CONFIG])
def test_a_handshake_that_takes_too_long_is_ended(connect: Connect, sent: bytes) -> None:
    begun = time.monotonic()
    wire = connect().send(sent).finish()
    assert refused(wire)
    assert "header" in wire.texts[0]
    assert 0.9 < time.monotonic() - begun < 1.9, "1 s for the handshake, and no drain time after it"


def test_after_a_failure_everything_the_client_sends_is_taken(connect: Connect, scan_bytes: Scans) -> None:
    scan = scan_bytes(64, 8)
    wire = connect().send(mrd.encode_config_file("nonsense"), mrd.encode_header(scan.xml))
    for _ in range(20):
        wire.send(*scan.messages)  # a reset would raise here
    assert refused(wire.send(CLOSE).finish())


def test_data_after_close_is_ignored(connect: Connect, scan_bytes: Scans) -> None:
    scan = scan_bytes()
    wire = connect().send(scan.session("default"), b"\xff" * 100).finish()
    assert len(wire.images) == 1
    assert not wire.texts
    assert wire.closed_properly


@pytest.mark.parametrize(
    "trouble",
    [struct.pack("<H", 999), struct.pack("<HI", 3, 0xFFFFFFFF), mrd.encode_header("<again/>")],
    ids=["unknown id", "length", "second header"],
)
def test_what_came_before_a_mistake_is_reconstructed(connect: Connect, scan_bytes: Scans, trouble: bytes) -> None:
    scan = scan_bytes(32, 4, 1, 2)
    wire = connect().send(CONFIG, mrd.encode_header(scan.xml), *scan.messages[:60], trouble).half_close().finish()
    assert wire.closed_properly
    assert len(wire.images) == 2, "the complete frame, and the one that the mistake cut off"
    assert wire.ids[-2:] == [TEXT, 4]


def test_a_scan_that_breaks_off_is_reconstructed_as_far_as_it_came(connect: Connect, scan_bytes: Scans) -> None:
    scan = scan_bytes()
    wire = connect().send(CONFIG, mrd.encode_header(scan.xml), *scan.messages[:30], scan.messages[30][:50])
    wire.half_close().finish()
    assert len(wire.images) == 1
    assert wire.closed_properly


def test_parameters_that_are_wrong_are_told_and_do_not_end_the_scan(connect: Connect, scan_bytes: Scans) -> None:
    scan = scan_bytes()
    for text in ("[1, 2]", "[" * 50_000, '{"parameters": 5}', '{"parameters": {"a": ' + "9" * 9999 + "}}"):
        wire = (
            connect().send(CONFIG, mrd.encode_header(scan.xml), mrd.encode_text(text), *scan.messages, CLOSE).finish()
        )
        assert len(wire.images) == 1
        assert wire.closed_properly
        assert any("parameters" in said for said in wire.texts)


# --- dialects ------------------------------------------------------------------------------------------------------------------


def test_openrecon_gets_integers_and_prefixes(connect: Connect, scan_bytes: Scans) -> None:
    scan = scan_bytes(64, 8, 2)
    parameters = '{"version": "1.1.0", "parameters": {"config": "sense", "customconfig": "", "sendOriginal": "True"}}'
    start = mrd.encode_config_file("openrecon") + mrd.encode_header(scan.xml) + mrd.encode_text(parameters)
    wire = connect().send(start, *scan.messages, CLOSE).finish()
    assert wire.closed_properly
    assert [int(image.header["image_series_index"]) for image in wire.images] == [1, 2], "the image and the original"
    assert all(image.pixels.dtype == np.uint16 for image in wire.images)
    assert all(image.meta["ImageProcessingHistory"] == ["SCANSIDE", "mri/sense"] for image in wire.images)
    assert all(image.meta["Keep_image_geometry"] == ["1"] for image in wire.images)
    assert not any(text.startswith("[") for text in wire.texts)


def test_a_custom_configuration_wins_and_an_unknown_one_is_refused(connect: Connect, scan_bytes: Scans) -> None:
    scan = scan_bytes(64, 8, 2)
    start = mrd.encode_config_file("openrecon") + mrd.encode_header(scan.xml)
    chosen = mrd.encode_text('{"parameters": {"config": "sense", "customconfig": "grappa"}}')
    (image,) = connect().send(start, chosen, *scan.messages, CLOSE).finish().images
    assert image.meta["ImageProcessingHistory"] == ["SCANSIDE", "mri/grappa"]
    unknown = mrd.encode_text('{"parameters": {"config": "../../etc/passwd"}}')
    wire = connect().send(start, unknown, *scan.messages, CLOSE).finish()
    assert refused(wire)
    assert any(text.startswith("ERR unknown configuration") for text in wire.texts)


def test_images_pass_through_with_their_attributes(connect: Connect) -> None:
    header = np.zeros((), IMAGE_HEADER)
    header["image_series_index"], header["image_index"], header["version"] = 3, 1, 1
    pixels = np.arange(6, dtype=np.int16).reshape(1, 1, 2, 3)
    image = Image(header=header, pixels=pixels, meta={"IceMiniHead": ["QUJD"], "Keep_image_geometry": ["1"]})
    start = mrd.encode_config_file("openrecon") + mrd.encode_header("Dummy XML header")
    wire = connect().send(start, b"".join(mrd.encode_image(image)), CLOSE).finish()
    (back,) = wire.images
    assert np.array_equal(back.pixels, pixels)
    assert back.pixels.dtype == np.int16
    assert back.meta == image.meta
    assert wire.closed_properly


@pytest.fixture
def external(connect: Connect, scan_bytes: Scans) -> Callable[..., Any]:
    """A Gadgetron that has us as a node of its chain."""

    def start(properties: str = "") -> Any:
        text = f'<?xml version="1.0"?>\n<configuration>{properties}</configuration>'
        return connect().send(mrd.encode_config_text(text), mrd.encode_header(scan_bytes().xml))

    return start


def test_a_gadgetron_chain_gets_images_and_no_text(external: Callable[..., Any], scan_bytes: Scans) -> None:
    header = np.zeros((), WAVEFORM_HEADER)
    header["number_of_samples"], header["channels"] = 2, 1
    waveform = mrd.encode_waveform(WaveformRecord(header=header, samples=np.array([[1, 2]], np.uint32)))
    lines = scan_bytes().messages[:20]  # too few, which a scanner would be told
    wire = external().send(waveform, *lines, CLOSE).finish()
    assert wire.ids == [1026, IMAGE, 4]
    assert wire.closed_properly
    assert bytes(wire.frames[0].view) == waveform, "what we have no use for goes on to the next node"


def test_a_gadgetron_chain_gets_no_16_bit_signed_images(external: Callable[..., Any]) -> None:
    image = Image(header=np.zeros((), IMAGE_HEADER), pixels=np.full((1, 1, 2, 2), -7, np.int16))
    (back,) = external().send(b"".join(mrd.encode_image(image)), CLOSE).finish().images
    assert back.pixels.dtype == np.int32
    assert (back.pixels == -7).all()


@pytest.mark.parametrize("trouble", [struct.pack("<H", 999) + bytes(10), mrd.encode_header("<again/>") + CLOSE])
def test_a_gadgetron_chain_hears_of_errors_by_message_8(external: Callable[..., Any], trouble: bytes) -> None:
    wire = external().send(trouble).half_close().finish()
    assert wire.ids == [ERROR, 4]
    assert mrd.error(wire.frames[0])


@pytest.mark.real_data
def test_a_gadgetron_chain_may_send_buckets(connect: Connect, real_data: Callable[[str], Path]) -> None:
    stream = real_data("mrd_streams/dump_bucket.bin").read_bytes()
    wire = connect().send(stream).half_close().finish()
    assert set(wire.ids) == {IMAGE, 4}
    assert len(wire.images) == 2
    assert wire.closed_properly


# --- noise ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.parametrize("coils", [4])
def test_the_noise_of_one_scan_serves_the_next(connect: Connect, tmp_path: Path, coils: int) -> None:
    program = which("ismrmrd_generate_cartesian_shepp_logan")
    if program is None:
        pytest.skip("ismrmrd_generate_cartesian_shepp_logan is not installed")
    path = tmp_path / "scan.h5"
    words = [program, "-m", "32", "-c", str(coils), "-C", "-o", str(path)]
    subprocess.run(words, check=True, capture_output=True, timeout=20)
    with open_scan(path) as stored:
        xml, lines = stored.xml, [mrd.encode_acquisitions(batch) for batch in stored.batches()]
    ident = f"noise-{time.monotonic_ns()}"
    named = xml.replace(
        b"<encoding>",
        f"<measurementInformation><measurementID>{ident}</measurementID><patientPosition>HFS</patientPosition>"
        "</measurementInformation><encoding>".encode(),
        1,
    )
    question = mrd.encode_config_text(NOISE_CHAIN.format(ident)) + CLOSE
    assert mrd.dependency(connect().send(question).finish().frames[0])["status"] == ["failed"]
    assert connect().send(CONFIG, mrd.encode_header(named), *lines, CLOSE).finish().closed_properly
    answer = mrd.dependency(connect().send(question).finish().frames[0])
    assert answer["status"] == ["success"]
    assert answer["channels"] == [str(coils)]
    assert 0 < float(answer["min_sigma"][0]) <= float(answer["mean_sigma"][0]) <= float(answer["max_sigma"][0])


# --- clients that misbehave ------------------------------------------------------------------------------------------------


def test_a_client_that_does_not_read_slows_only_itself(server: Server, connect: Connect, scan_bytes: Scans) -> None:
    scan = scan_bytes(64, 2, 1)
    lazy = connect(receive_bytes=4096)
    lazy.socket.settimeout(0.2)
    sent = 0
    lazy.socket.sendall(CONFIG + mrd.encode_header(scan.xml))
    image = Image(header=np.zeros((), IMAGE_HEADER), pixels=np.zeros((1, 1, 512, 512), np.float32))
    echoed = b"".join(mrd.encode_image(image))
    with contextlib.suppress(TimeoutError):
        for _ in range(200):  # 200 MiB of images that come straight back
            lazy.socket.sendall(echoed)
            sent += len(echoed)
    assert 0 < sent < 150 << 20, "the server must stop reading"
    assert len(connect().send(scan.session("default")).finish().images) == 1
    with contextlib.suppress(TimeoutError):
        lazy.until(lambda: len(lazy.images) >= 3)
    assert len(lazy.images) >= 3, "what waited arrives once the client reads"


def test_clients_that_vanish_leave_nothing_behind(server: Server, connect: Connect, scan_bytes: Scans) -> None:
    scan = scan_bytes()
    assert soon(lambda: metric(server, "scanside_sessions_active") == 0)
    before = metric(server, 'scanside_sessions_total{outcome="incomplete"}')
    for number in range(20):
        wire = connect().send(CONFIG, mrd.encode_header(scan.xml), *scan.messages[: number + 1])
        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, as of a crash
        time.sleep(0.002)
        wire.close()
    assert soon(lambda: metric(server, "scanside_sessions_active") == 0)
    gone = metric(server, 'scanside_sessions_total{outcome="incomplete"}') - before
    assert 0 < gone <= 20  # a reset may overtake the configuration
    assert len(connect().send(scan.session("default")).finish().images) == 1


def test_a_thousand_short_sessions_leave_no_descriptor(server: Server) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    started = metric(server, 'scanside_sessions_total{outcome="complete"}')
    before = descriptors()
    for number in range(1000):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            if number % 2:
                client.sendall(CONFIG + CLOSE)
                assert client.recv(16) == CLOSE
    assert soon(lambda: descriptors() <= before + 2)
    assert soon(lambda: metric(server, "scanside_sessions_active") == 0)
    assert metric(server, 'scanside_sessions_total{outcome="complete"}') == started + 500


def test_counters_move_with_a_scan(server: Server, connect: Connect, scan_bytes: Scans) -> None:
    names = (
        'scanside_bytes_received_total{adapter="mrd"}',
        'scanside_acquisitions_received_total{adapter="mrd"}',
        'scanside_images_delivered_total{sink="mrd"}',
        'scanside_frames_total{outcome="complete",pipeline="mri/cartesian"}',
        'scanside_frame_latency_seconds_count{pipeline="mri/cartesian"}',
        'scanside_messages_rejected_total{reason="config"}',
    )
    scan = scan_bytes(32, 4, 1, 3)
    before = [metric(server, name) for name in names]
    connect().send(scan.session("cartesian")).finish()
    connect().send(mrd.encode_config_file("nonsense"), CLOSE).finish()
    sent = len(scan.session("cartesian")) + 1026 + 2
    assert soon(lambda: metric(server, names[-1]) > before[-1])
    assert [metric(server, name) - was for name, was in zip(names, before, strict=True)] == [sent, 96, 3, 3, 3, 1]
    assert metric(server, 'scanside_queue_depth{queue="gateway"}') == 0
    assert metric(server, 'scanside_queue_depth{queue="bus"}') == 0


# --- other people's clients ------------------------------------------------------------------------------------------------


@pytest.mark.real_data
def test_the_ismrmrd_package_gets_an_in_vivo_image(server: Server, real_data: Callable[[str], Path]) -> None:
    ismrmrd = pytest.importorskip("ismrmrd")
    from ismrmrd.serialization import ConfigFile, ProtocolDeserializer, ProtocolSerializer

    path = real_data("mri/raw/invivo_brain_3T_16ch.h5")
    received: list[object] = []
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
        reader, writer = client.makefile("rb"), client.makefile("wb")
        thread = threading.Thread(target=lambda: received.extend(ProtocolDeserializer(reader).deserialize()))
        thread.start()
        serializer = ProtocolSerializer(writer)
        serializer.serialize(ConfigFile("sense"))
        with h5py.File(path, locking=False) as file:
            xml, data = file["dataset/xml"][0], file["dataset/data"][:]
        serializer.serialize(ismrmrd.xsd.CreateFromDocument(xml))
        for row in data:
            acquisition = ismrmrd.Acquisition(row["head"].tobytes())
            acquisition.data[:] = row["data"].view(np.complex64).reshape(acquisition.data.shape)
            serializer.serialize(acquisition)
        serializer.close()
        writer.flush()
        thread.join(60)
        reader.close()
        writer.close()
    (image,) = [item for item in received if isinstance(item, ismrmrd.Image)]
    reference = _root_sum_of_squares(path)
    found = np.abs(image.data[0, 0])
    brain = (
        reference > 0.1 * reference.max()
    )  # SENSE has nothing where there is no signal, the root sum of squares has noise
    assert found.shape == reference.shape
    assert nrmse(reference * brain, found * brain, fit_scale=True) <= 0.02


def _root_sum_of_squares(path: Path) -> np.ndarray:
    """Fully sampled reference, in double precision, by nothing but numpy."""
    with open_scan(path) as stored:
        batches = list(stored.batches())
    headers = np.concatenate([batch.headers for batch in batches])
    samples = np.concatenate([batch.samples for batch in batches]).astype(np.complex128)
    kspace = np.zeros((samples.shape[1], len(headers), samples.shape[2]), complex)
    kspace[:, headers["idx"]["kspace_encode_step_1"]] = samples.transpose(1, 0, 2)
    images = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace, axes=(1, 2))), axes=(1, 2))
    return np.asarray(np.sqrt((np.abs(images) ** 2).sum(axis=0)))


@pytest.mark.peer
@pytest.mark.parametrize("words", [[], ["-k"], ["-C"]], ids=["plain", "trajectory", "noise readout"])
def test_scans_of_the_debian_tools_give_the_images_of_the_debian_tools(
    connect: Connect, tmp_path: Path, words: list[str]
) -> None:
    generate, reconstruct = which("ismrmrd_generate_cartesian_shepp_logan"), which("ismrmrd_recon_cartesian_2d")
    if generate is None or reconstruct is None:
        pytest.skip("ismrmrd_generate_cartesian_shepp_logan and ismrmrd_recon_cartesian_2d are not installed")
    path = tmp_path / "scan.h5"
    subprocess.run(
        [generate, "-m", "64", "-c", "8", "-o", str(path), *words], check=True, capture_output=True, timeout=20
    )
    with open_scan(path) as stored:
        xml, lines = stored.xml, [mrd.encode_acquisitions(batch) for batch in stored.batches()]
    plain = mrd.encode_config_text(
        "<configuration><stream/><property name='preparation.prewhiten' value='false'/></configuration>"
    )
    wire = connect().send(plain, mrd.encode_header(xml), *lines, CLOSE).finish()
    assert wire.closed_properly
    (image,) = wire.images
    subprocess.run([reconstruct, str(path)], check=True, capture_output=True, timeout=20)
    with h5py.File(path, locking=False) as file:
        theirs = np.squeeze(file["dataset/cpp/data"][:])
    assert nrmse(theirs, picture(image), fit_scale=True) < 1e-4


# --- listening ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["", "::"])
def test_an_unspecified_host_listens_for_both_families(host: str) -> None:
    with listen(host, 0) as listening:
        port = listening.getsockname()[1]
        for address in ("127.0.0.1", "::1"):
            with socket.create_connection((address, port), timeout=5):
                accepted, _ = listening.accept()
                assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= 256 << 10
                accepted.close()


def test_an_image_of_256_kib_goes_out_in_one_piece() -> None:
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            accepted.setblocking(False)
            assert accepted.send(bytes(256 << 10)) == 256 << 10


def test_connections_have_no_delay_and_notice_vanished_hosts(server: Server, connect: Connect) -> None:
    wire = connect()
    gateway = server._gateway
    assert gateway is not None
    assert soon(lambda: bool(gateway.connections))
    loop = server._loop
    assert loop is not None

    async def options() -> list[int]:
        (connection,) = gateway.connections
        assert connection._transport is not None
        sock = connection._transport.get_extra_info("socket")
        return [
            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            int(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60),
        ]

    assert asyncio.run_coroutine_threadsafe(options(), loop).result(5) == [1, 1, 1]
    wire.send(CLOSE).finish()
