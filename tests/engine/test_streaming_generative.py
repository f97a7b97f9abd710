"""Frames through a learned prior, from readouts to images: provenance, previews, deadline, and what happens without."""

from __future__ import annotations

import hashlib
from importlib import resources

import numpy as np
import pytest
import torch
from scanside.engine.config import SystemConfig, read_config
from scanside.engine.messages import EndOfScan, Event, FrameStats, Image
from scanside.engine.priors import weights
from scanside.engine.priors.storage import load_weights
from scanside.engine.priors.through_loop import simulated_maps
from scanside.engine.samplers.consistency import Measurement
from scanside.engine.samplers.loop import make_program, run_to_end
from scanside.engine.simulation.scan import SimulatedScan, simulate_scan
from scanside.engine.streaming import generative
from scanside.engine.streaming.generative import PriorSolver
from scanside.engine.streaming.session import DEVIATIONS, IMAGES, ORIGINALS, PREVIEWS, Session

SYSTEM = """
[reconstruction]
method = "prior"
{reconstruction}
[output]
{output}
[sampler]
levels = 3
[runtime]
runtime = "torch"
precision = "float32"
[[stages]]
prior = {{ weights = "{weights}" }}
"""


def system(*, reconstruction: str = "", output: str = "", weights: str = "mri_online") -> SystemConfig:
    text = SYSTEM.format(reconstruction=reconstruction, output=output, weights=weights)
    return read_config(text, name="mri/test", source="test.toml")


@pytest.fixture(scope="module")
def scan() -> SimulatedScan:
    return simulate_scan(matrix=64, coils=4, acceleration=2, calibration_lines=16)


def events(scan: SimulatedScan, config: SystemConfig) -> list[Event]:
    session = Session(config)
    found = list(session.feed(scan.header))
    for batch in scan.readouts(16):
        found += session.feed(batch)
    return found + list(session.feed(EndOfScan()))


def images(found: list[Event], series: int) -> list[Image]:
    return [e for e in found if isinstance(e, Image) and int(e.header["image_series_index"]) == series]


def only(found: list[Event], series: int) -> Image:
    (image,) = images(found, series)
    return image


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCANSIDE_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_a_generative_image_says_how_it_was_made(scan: SimulatedScan) -> None:
    image = only(events(scan, system()), IMAGES)
    stored = resources.files(weights).joinpath("mri_online.safetensors").read_bytes()
    meta = image.meta
    assert meta["scanside_method"] == ["prior"]
    assert meta["scanside_generative"] == ["1"]
    assert meta["scanside_system"] == ["mri/test"]
    assert meta["scanside_network_evaluations"] == ["3"]
    assert meta["scanside_steps"] == ["3", "3"]
    assert meta["scanside_weights"] == [f"mri_online {hashlib.sha256(stored).hexdigest()}"]
    assert meta["scanside_runtime"][:2] == ["torch", "float32"]
    assert 0 < float(meta["scanside_residual"][0]) < 0.2
    assert "scanside_deadline" not in meta
    assert np.isfinite(image.pixels).all()


def test_the_estimates_agree_with_the_data_and_resemble_the_truth(scan: SimulatedScan) -> None:
    found = events(scan, system(output="previews = true"))
    previews, image = images(found, PREVIEWS), only(found, IMAGES)
    assert len(previews) == 2
    truth = np.abs(scan.reference).reshape(image.pixels.shape)
    for shown in (*previews, image):
        like = float((shown.pixels * truth).sum() / np.sqrt((shown.pixels**2).sum() * (truth**2).sum()))
        assert like > 0.97


def test_a_generative_image_travels_with_its_plain_counterpart_on_request(scan: SimulatedScan) -> None:
    found = events(scan, system(output="send_original = true"))
    assert only(found, ORIGINALS).meta["scanside_method"] == ["sense"]
    assert "scanside_generative" not in only(found, ORIGINALS).meta


def test_samples_give_a_mean_and_a_standard_deviation(scan: SimulatedScan) -> None:
    found = events(scan, system(output="posterior_samples = 4"))
    image, deviation = only(found, IMAGES), only(found, DEVIATIONS)
    assert image.meta["scanside_samples"] == ["4"]
    assert deviation.pixels.shape == image.pixels.shape
    assert 0 < float(deviation.pixels.mean()) < float(image.pixels.mean())
    assert image.meta["scanside_network_evaluations"] == [str(3 + 4 * 3)]


def test_samples_side_by_side_are_those_one_by_one() -> None:
    """Of data consistency and network alike: no member of the batch sees another."""
    maps = simulated_maps(4, (32, 32), torch.Generator().manual_seed(0))
    mask = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(1)) < 0.4
    measured = Measurement(
        data=torch.randn(4, 1, 32, 32, dtype=torch.complex64) * mask, mask=mask, maps=maps, noise=0.1
    )
    config, denoiser = system(), load_weights("mri_online")[0]
    program = make_program(config.stages, config.sampler, lambda _: denoiser, measured)
    starts = torch.randn(3, 1, 32, 32, dtype=torch.complex64)
    together = run_to_end(program, starts).image
    alone = torch.stack([run_to_end(program, start).image for start in starts])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


def test_a_volume_goes_through_a_few_planes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = simulated_maps(3, (32, 32), torch.Generator().manual_seed(0)).expand(3, 12, 32, 32)
    mask = torch.rand(32, 32, generator=torch.Generator().manual_seed(1)) < 0.4
    measured = Measurement(data=torch.randn(3, 12, 32, 32, dtype=torch.complex64) * mask, mask=mask, maps=maps)
    plain = torch.randn(12, 32, 32, dtype=torch.complex64)
    found = []
    for together in (12, 5):
        monkeypatch.setattr(generative, "TOGETHER", together)
        *_, last = PriorSolver(system(), (12, 32, 32), 3).solve(measured, plain)
        found.append(last.image)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_samples_are_left_out_where_they_would_come_too_late(scan: SimulatedScan) -> None:
    found = events(scan, system(output="posterior_samples = 64", reconstruction="deadline_ms = 100"))
    assert only(found, IMAGES).meta["scanside_samples"] == ["1"]
    assert not images(found, DEVIATIONS)


def test_at_the_deadline_the_best_so_far_goes_out_and_says_so(scan: SimulatedScan) -> None:
    found = events(scan, system(reconstruction="deadline_ms = 0.001"))
    meta = only(found, IMAGES).meta
    assert meta["scanside_steps"] == ["1", "3"]
    assert meta["scanside_deadline"] == ["missed"]
    assert meta["scanside_reason"] == ["deadline"]
    assert [e.outcome for e in found if isinstance(e, FrameStats)] == ["degraded"]


def test_in_time_says_so(scan: SimulatedScan) -> None:
    meta = only(events(scan, system(reconstruction="deadline_ms = 600000")), IMAGES).meta
    assert meta["scanside_deadline"] == ["met"]
    assert meta["scanside_outcome"] == ["complete"]


def test_without_weights_the_plain_image_goes_out_marked(scan: SimulatedScan) -> None:
    found = events(scan, system(weights="nowhere"))
    meta = only(found, IMAGES).meta
    assert meta["scanside_reason"] == ["no_weights"]
    assert "unknown weights 'nowhere'" in meta["scanside_prior_unavailable"][0]
    assert "scanside_generative" not in meta


def test_a_fully_sampled_scan_needs_no_prior() -> None:
    full = simulate_scan(matrix=64, coils=4, acceleration=1)
    meta = only(events(full, system()), IMAGES).meta
    assert meta["scanside_method"] == ["root_sum_of_squares"]
    assert meta["scanside_outcome"] == ["complete"]


def test_without_calibration_lines_the_image_is_zero_filled_and_marked() -> None:
    bare = simulate_scan(matrix=64, coils=4, acceleration=2, calibration_lines=0)
    meta = only(events(bare, system()), IMAGES).meta
    assert (meta["scanside_method"], meta["scanside_reason"]) == (["zero_filled"], ["no_calibration"])


def test_a_warm_start_begins_at_the_last_frame() -> None:
    twice = simulate_scan(matrix=64, coils=4, acceleration=2, calibration_lines=16, repetitions=2)
    cold, warm = (
        images(events(twice, system(reconstruction=f"warm_start = {word}")), IMAGES) for word in ("false", "true")
    )
    assert np.array_equal(cold[0].pixels, warm[0].pixels)
    assert not np.array_equal(cold[1].pixels, warm[1].pixels)
