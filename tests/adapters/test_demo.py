"""The demo, small, through a real server and real sockets."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage
from scanside.adapters.cli import app
from scanside.adapters.files.ismrmrd import open_scan, write_scan
from scanside.engine.simulation.scan import simulate_scan
from typer.testing import CliRunner, Result

FRAMES, SIDE = 2, 64


def demo(out: Path, *words: object) -> Result:
    return CliRunner().invoke(app, ["demo", "--out", str(out), "--tr-ms", "0.5", *map(str, words)])


def pictures(folder: Path) -> list[np.ndarray]:
    return [np.asarray(PillowImage.open(path).convert("L")) for path in sorted(folder.glob("series*.png"))]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("demo") / "results"
    words = ("--matrix", SIDE, "--coils", 8, "--acceleration", 4, "--frames", FRAMES)
    return out, demo(out, *words)


def test_the_demo_writes_images_and_pictures(simulated: tuple[Path, Result]) -> None:
    out, result = simulated
    assert result.exit_code == 0, result.output
    with open_scan(out / "images.h5") as file:
        images = list(file.images())
    assert [image.pixels.shape for image in images] == [(1, 1, SIDE, SIDE)] * FRAMES
    assert [int(image.header["repetition"]) for image in images] == list(range(FRAMES))
    assert [picture.shape for picture in pictures(out)] == [(SIDE, SIDE)] * FRAMES
    assert all(picture.std() > 10 for picture in pictures(out))


def test_the_comparison_is_a_picture_with_something_in_every_panel(simulated: tuple[Path, Result]) -> None:
    page = np.asarray(PillowImage.open(simulated[0] / "comparison.png").convert("L"))
    height, width = page.shape
    assert min(height, width) > 400
    upper = page[: height // 2]
    for panel in np.array_split(upper, 3, axis=1):
        assert panel.std() > 10


def test_the_reconstruction_is_better_than_the_zero_filled_image(simulated: tuple[Path, Result]) -> None:
    out, result = simulated
    found = re.search(r"PSNR +([\d.]+) dB +([\d.]+) dB", result.stdout)
    assert found
    zero_filled, sense = map(float, found.groups())
    assert sense > zero_filled + 3
    assert sense > 20
    assert re.search(r"latency +p50 [\d.]+ ms, p95", result.stdout)
    assert re.search(rf"on time +\d of {FRAMES}", result.stdout)
    assert re.search(r"net acceleration +[12]\.\d\d with calibration lines", result.stdout)
    assert str(out / "comparison.png") in result.stdout


def test_the_figures_are_those_of_the_images(simulated: tuple[Path, Result]) -> None:
    """PSNR of the table, computed anew from the file that the demo wrote."""
    out, result = simulated
    scan = simulate_scan(SIDE, 8, 4, 24, repetitions=FRAMES, noise=0.005, noise_readouts=4, motion_degrees=6.0)
    scores = []
    with open_scan(out / "images.h5") as file:
        for image in file.images():
            truth, picture = (
                np.abs(scan.reference[int(image.header["repetition"]), 0]),
                image.pixels[0, 0].astype(float),
            )
            picture *= np.vdot(picture, truth) / np.vdot(picture, picture)
            scores.append(-10 * np.log10(np.mean((picture - truth) ** 2)))
    found = re.search(r"PSNR +[\d.]+ dB +[\d.]+ dB +([\d.]+) dB", result.stdout)  # plain, L1-ESPIRiT, online
    assert found
    assert float(found[1]) == pytest.approx(np.mean(scores), abs=0.06)


def test_a_file_is_streamed_without_a_reference(tmp_path: Path) -> None:
    scan = simulate_scan(48, 4, 2, 16, repetitions=FRAMES)
    path = tmp_path / "scan.h5"
    write_scan(path, scan.header, scan.batches)
    result = demo(tmp_path / "out", "--file", path, "--config", "mri/grappa")
    assert result.exit_code == 0, result.output
    assert "PSNR" not in result.stdout
    assert len(pictures(tmp_path / "out")) == FRAMES
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--matrix", "33"], "even number"),
        (["--config", "nonsense"], "unknown configuration"),
        (["--file", "no.h5"], "no.h5"),
    ],
)
def test_settings_that_cannot_work_are_told(tmp_path: Path, words: list[str], text: str) -> None:
    result = demo(tmp_path / "out", *words)
    assert result.exit_code == 2
    assert text in result.stderr
