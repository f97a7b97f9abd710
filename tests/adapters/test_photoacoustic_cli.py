"""Photoacoustics from the command line: send, record, tune and demo against a real server with a worker process."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image as PillowImage
from scanside.adapters.cli import app
from scanside.adapters.commands.photoacoustic import paced
from scanside.adapters.files.ismrmrd import open_scan
from scanside.adapters.files.photoacoustic import open_recording
from scanside.adapters.photoacoustic_demo import PhotoacousticDemo, run_photoacoustic_demo, thumbnail
from scanside.adapters.server import ServeOptions, Server
from scanside.engine.messages import PhotoacousticFrame
from scanside.engine.simulation.photoacoustic import Spheres, ring, sphere_signals
from typer.testing import CliRunner, Result

ELEMENTS, SAMPLES, FRAMES = 32, 400, 6
GEOMETRY = """
sampling_rate_hz = 10e6
field_of_view_m = [-0.01, 0.01, -0.01, 0.01]
pixels = [48, 48]
[ring]
radius_m = 0.02
first_degrees = -90
"""


def call(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recordings")


@pytest.fixture(scope="module")
def server(recordings: Path) -> Iterator[Server]:
    options = ServeOptions(
        port=0, metrics_port=0, threads=1, bus="tcp://127.0.0.1:*", record=recordings, drain_seconds=2.0
    )
    with Server(options) as running:
        yield running


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sphere at (3, -2) mm, as an .npz file of frames with its geometry beside it."""
    folder = tmp_path_factory.mktemp("scans")
    spheres = Spheres(np.array([[3e-3, -2e-3, 0.0]]), np.array([1e-3]), np.ones(1))
    signals = sphere_signals(ring(ELEMENTS, 0.02), spheres, SAMPLES, 10e6)
    np.savez(folder / "scan.npz", sinogram=np.repeat(signals[None], FRAMES, axis=0))
    (folder / "scan.toml").write_text(GEOMETRY)
    return folder / "scan.npz"


def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def value(server: Server, name: str, **labels: str) -> float:
    return server.metrics.registry.get_sample_value(name, labels) or 0.0


def test_a_stored_scan_is_sent_imaged_written_and_recorded(
    server: Server, scan: Path, recordings: Path, tmp_path: Path
) -> None:
    before = value(server, "scanside_frames_total", pipeline="pat/ubp", outcome="complete")
    words = ("--bus", server.bus, "--rate", 200, "-c", "pat/ubp", "-o", tmp_path / "out.h5", "--png", tmp_path / "png")
    result = call("send", "--pat", scan, *words)
    assert result.exit_code == 0, result.output
    assert re.search(rf"sent +{FRAMES} frames", result.stdout)
    assert re.search(r"latency +p50 [\d.]+ ms", result.stdout)
    with open_scan(tmp_path / "out.h5") as file:
        images = list(file.images())
    assert len(images) == FRAMES
    row, column = np.unravel_index(np.argmax(images[0].pixels[0, 0]), (48, 48))
    assert (column + 0.5) * 20 / 48 - 10 == pytest.approx(3, abs=0.6)
    assert (row + 0.5) * 20 / 48 - 10 == pytest.approx(-2, abs=0.6)
    assert len(list((tmp_path / "png").glob("*.png"))) == FRAMES
    until(lambda: value(server, "scanside_frames_total", pipeline="pat/ubp", outcome="complete") == before + FRAMES)
    newest = max(recordings.glob("*.hdf5"))
    with open_recording(newest) as recorded, open_recording(scan) as original:
        for got, sent in zip(recorded.frames(), original.frames(), strict=True):
            assert np.array_equal(got.samples, sent.samples)
    again = call("send", "--pat", newest, "--bus", server.bus, "--rate", 0, "--loops", 2)
    assert re.search(rf"images +{2 * FRAMES}:", again.stdout), again.output


@pytest.mark.parametrize("config", ["pat/online", "pat/sinogram"])
def test_a_stored_scan_goes_through_a_learned_prior(server: Server, scan: Path, tmp_path: Path, config: str) -> None:
    result = call("send", "--pat", scan, "--bus", server.bus, "--rate", 0, "-c", config, "-o", tmp_path / "out.h5")
    assert result.exit_code == 0, result.output
    with open_scan(tmp_path / "out.h5") as file:
        images = list(file.images())
    assert len(images) == FRAMES
    assert images[0].meta["scanside_method"] == ["prior"]
    assert images[0].meta["scanside_system"] == [config]
    assert images[0].meta["scanside_weights"][0].startswith("pat_")
    pixels = images[0].pixels[0, 0]
    assert np.isfinite(pixels).all()
    assert pixels.any()


def test_a_photoacoustic_prior_is_trained_without_data_and_taken_up_again(tmp_path: Path) -> None:
    small = ["train", "pat/online", "-o", tmp_path, "-P", "training.scenes=2", "-P", "network.widths=8,16"]
    small += ["-P", "training.batch=1", "-P", "sampler.levels=2"]
    assert call(*small, "-P", "training.steps=2").exit_code == 0
    first = (tmp_path / "prior.safetensors").read_bytes()
    again = call(*small, "-P", "training.steps=4")
    assert "going on at step 2" in again.output
    assert (tmp_path / "prior.safetensors").read_bytes() != first
    refused = call("train", "pat/online", "--data", tmp_path, "-o", tmp_path / "x")
    assert refused.exit_code != 0
    assert "leave --data out" in str(refused.output) + str(refused.exception)


def test_metrics_count_photoacoustic_streams(server: Server, scan: Path) -> None:
    opened = value(server, "scanside_sessions_total", outcome="complete")
    size = value(server, "scanside_bytes_received_total", adapter="photoacoustic")
    assert call("send", "--pat", scan, "--bus", server.bus, "--rate", 0).exit_code == 0
    until(lambda: value(server, "scanside_sessions_total", outcome="complete") == opened + 1)
    assert (
        value(server, "scanside_bytes_received_total", adapter="photoacoustic")
        >= size + FRAMES * ELEMENTS * SAMPLES * 2
    )
    assert value(server, "scanside_sessions_active") == 0
    assert value(server, "scanside_images_delivered_total", sink="bus") >= FRAMES
    assert value(server, "scanside_frame_latency_seconds_count", pipeline="pat/das") >= FRAMES


def test_a_running_stream_is_tuned(server: Server, scan: Path) -> None:
    done: list[Result] = []
    sending = threading.Thread(
        target=lambda: done.append(call("send", "--pat", scan, "--bus", server.bus, "--rate", 20, "--loops", 12))
    )
    sending.start()
    try:
        until(lambda: value(server, "scanside_sessions_active") == 1)
        told = call("tune", "--bus", server.bus, "--speed-of-sound", 1520, "--autofocus", "delay")
        assert told.exit_code == 0, told.output
        assert "passed on to 1 stream" in told.stdout
    finally:
        sending.join()
    assert "speed of sound is 1520 m/s" in done[0].stderr
    assert done[0].exit_code == 0


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("tune",), 2, "nothing to change"),
        (("tune", "--averages", 2), 1, "no photoacoustic stream"),
        (("tune", "--speed-of-sound", 10), 2, "300"),
    ],
)
def test_tuning_that_cannot_work_is_told(server: Server, words: tuple[object, ...], code: int, says: str) -> None:
    result = call(words[0], "--bus", server.bus, *words[1:])
    assert result.exit_code == code
    assert says in result.output


def test_sending_without_a_server_ends_with_what_to_do(scan: Path) -> None:
    result = call("send", "--pat", scan, "--bus", "tcp://127.0.0.1:1", "--timeout", 300)
    assert result.exit_code == 1
    assert "is `scanside serve` running?" in result.stderr


@pytest.mark.parametrize(
    ("words", "says"), [(("--pat", "no.npz"), "no such file"), (("--pat", __file__), "unknown kind of file")]
)
def test_files_that_cannot_be_sent_are_told(words: tuple[str, ...], says: str) -> None:
    result = call("send", *words)
    assert result.exit_code == 2
    assert says in result.stderr


def test_frames_are_paced_by_an_absolute_schedule() -> None:
    frame = PhotoacousticFrame(seq=0, shot=0, samples=np.zeros((1, 1), np.int16))
    begun, times = time.monotonic(), []
    for number, _ in enumerate(paced(iter([frame] * 5), 50)):
        times.append(time.monotonic() - begun)
        time.sleep(0.01 if number < 4 else 0)
    assert all(time_s >= number / 50 for number, time_s in enumerate(times))
    assert len(list(paced(iter([frame] * 5), 0))) == 5


def test_the_demo_shows_a_simulated_scan(tmp_path: Path) -> None:
    options = PhotoacousticDemo(out=tmp_path / "out", frames=6, rate=50, elements=48, samples=1400)
    assert run_photoacoustic_demo(options) == 0
    with h5py.File(tmp_path / "out" / "images.h5") as file:
        assert {"image_1", "image_11", "image_12", "image_13"} <= set(file["dataset"]) | {
            name.replace("images", "image") for name in file["dataset"]
        }
    page = np.asarray(PillowImage.open(tmp_path / "out" / "photoacoustic.png").convert("L"))
    assert all(panel.std() > 15 for panel in np.array_split(page, 3, axis=1))
    assert np.asarray(PillowImage.open(tmp_path / "out" / "last.png")).std() > 5


def test_the_demo_shows_a_recorded_scan(scan: Path, tmp_path: Path) -> None:
    result = call("demo", "--pat", "--file", scan, "--out", tmp_path, "--frames", 10, "--rate", 100)
    assert result.exit_code == 0, result.output
    assert re.search(r"images +10\b", result.stdout)
    assert re.search(r"on time +\d+ of 10", result.stdout)


def test_the_picture_in_the_terminal_has_the_bright_spot_where_it_is() -> None:
    image = np.zeros((64, 64), np.float32)
    image[40:44, 8:12] = 1
    image[10:14, 50:54] = -5
    text = thumbnail(image, columns=32)
    assert [len(line) for line in text.plain.splitlines()] == [32] * 16
    bright = [
        (span.start // 33, span.start % 33)
        for span in text.spans
        if span.style.color.triplet.red > 128  # type: ignore[union-attr]
    ]
    assert bright == [(10, 4), (10, 5)]
