"""Learned photoacoustic systems: their operator and data consistency by algebra, their training and what they improve on."""

from __future__ import annotations

import math
import time
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.engine.config import ConfigStore, SystemConfig, with_overrides
from scanside.engine.config_priors import (
    DataConfig,
    NetworkConfig,
    PriorConfig,
    SamplerConfig,
    StageConfig,
    TrainingConfig,
)
from scanside.engine.errors import ConfigError
from scanside.engine.messages import EndOfScan, Image, Note, PhotoacousticFrame, PhotoacousticHeader
from scanside.engine.operators.linear import adjoint_mismatch
from scanside.engine.operators.photoacoustic_geometry import DetectorArray, PixelGrid, TimeAxis, ring_positions
from scanside.engine.operators.photoacoustic_views import BeamformedOperator, completed, full_ring, ring_density
from scanside.engine.priors.denoiser import Denoiser
from scanside.engine.priors.photoacoustic_training import PhotoacousticTrainer, ring_geometry, simulate
from scanside.engine.samplers.photoacoustic import (
    CompletedConsistency,
    ModelConsistency,
    SpectralConsistency,
    padded,
    photoacoustic_program,
    transducer_response,
    wiener,
)
from scanside.engine.simulation.photoacoustic_flaws import Flaws
from scanside.engine.simulation.photoacoustic_scenes import Recorded
from scanside.engine.streaming.photoacoustic import PhotoacousticSession
from scanside.engine.streaming.photoacoustic_prior import PriorBeamformer, PriorShots

HELD_OUT = 977
"""Seed of scenes that nothing was trained on."""


def part_of(scene: Recorded, measured: np.ndarray, pixels: int = 128) -> BeamformedOperator:
    _, grid, time = ring_geometry(scene, pixels)
    return BeamformedOperator(DetectorArray.at(scene.ring.positions_m[measured]), grid, time)


@pytest.fixture(scope="module")
def scenes() -> list[Recorded]:
    return list(simulate(3, HELD_OUT, "image"))


# --- the operator ------------------------------------------------------------------------------------------------------------


@given(elements=st.integers(2, 20), ny=st.integers(2, 16), nx=st.integers(2, 16), delay=st.floats(-10, 30))
@settings(max_examples=20)
def test_the_model_and_its_way_back_have_exact_adjoints(elements: int, ny: int, nx: int, delay: float) -> None:
    array = DetectorArray.at(ring_positions(elements, 0.004))
    grid, time = PixelGrid.over((ny, nx), (-0.002, 0.002, -0.002, 0.002)), TimeAxis(20e6, 160, 1500.0, delay)
    operator = BeamformedOperator(array, grid, time)
    assert adjoint_mismatch(operator, dtype=torch.float32) <= 1e-6
    y, x = torch.randn(elements, 160, dtype=torch.float64), torch.randn(ny, nx, dtype=torch.float64)
    left, right = float((operator.back(y) * x).sum()), float((y * operator.back_transposed(x)).sum())
    assert math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-12)


def test_delay_and_sum_of_the_model_is_the_image(scenes: list[Recorded]) -> None:
    for scene in scenes:
        full = part_of(scene, np.arange(scene.ring.elements))
        image = full.back(torch.from_numpy(scene.signals))
        again = full.back(full(image))
        assert float((again - image).norm() / image.norm()) < 0.1
        assert float((again * image).sum() / image.square().sum()) == pytest.approx(1, abs=0.03)


def test_scenes_are_fixed_by_their_seed_and_are_heard_in_the_band(scenes: list[Recorded]) -> None:
    again = list(simulate(3, HELD_OUT, "image"))
    other = next(simulate(1, HELD_OUT + 1, "image"))
    for a, b in zip(scenes, again, strict=True):
        assert np.array_equal(a.signals, b.signals)
        assert np.abs(a.signals).max() == pytest.approx(1)
        power = np.square(np.abs(np.fft.rfft(a.signals, axis=1))).sum(0)
        above = np.fft.rfftfreq(a.ring.samples, 1 / a.ring.sampling_rate_hz) > 1.45 * a.ring.edges_hz[1]
        assert power[above].sum() < 0.05 * power.sum()
    assert not np.array_equal(other.signals, scenes[0].signals)


def test_flaws_are_what_no_image_explains() -> None:
    """What is left of the signals when the image of the whole ring has said what it can."""
    unexplained = []
    for flawed in (0.0, 1.0):
        left = []
        for scene in simulate(4, 31, "image", flawed=flawed):
            full, signals = part_of(scene, np.arange(scene.ring.elements)), torch.from_numpy(scene.signals)
            left.append(float((full(full.back(signals)) - signals).norm() / signals.norm()))
        unexplained.append(np.mean(left))
    assert unexplained[1] > 1.2 * unexplained[0]


def test_flaws_delay_and_weigh_what_is_heard() -> None:
    pulse = np.zeros((3, 64))
    pulse[:, 20:24] = [0.5, 1, 1, 0.5]
    strengths = np.repeat([[1.0], [2.0], [0.5]], 64, axis=1)
    hum = np.sin(np.arange(64))
    flaws = Flaws(
        delays=np.array([0.0, 3, -2]), strengths=strengths, common=np.zeros(64), echo=(0.25, 30), tilt=(0.1, 0)
    )
    heard = flaws.applied(pulse)
    assert np.allclose(heard[1, 23:27], 2 * pulse[0, 20:24])
    assert np.allclose(heard[2, 18:22], 0.5 * pulse[0, 20:24])
    assert np.allclose(heard[0, 50:54], 0.25 * pulse[0, 20:24])
    common = msgspec.structs.replace(flaws, common=hum, echo=(0.0, 1)).applied(np.zeros((3, 64)) + pulse)
    assert np.allclose(common[0] - pulse[0], 2 * hum)
    assert np.allclose(flaws.tilted(np.array([[0.01, 0.02, 0.0]])), [[0.01, 0.02, 0.001]])


# --- rows of a ring ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cubic", [False, True])
@given(every=st.sampled_from([2, 4, 8]), first=st.integers(0, 7), cycles=st.integers(0, 2))
@settings(max_examples=20)
def test_slow_changes_round_the_ring_are_interpolated(cubic: bool, every: int, first: int, cycles: int) -> None:
    angles = 2 * np.pi * torch.arange(256, dtype=torch.float64) / 256
    signals = torch.cos(cycles * angles)[:, None].expand(256, 3)
    measured = torch.zeros(256, dtype=torch.bool)
    measured[first % every :: every] = True
    found = completed(signals * measured[:, None], measured, cubic=cubic)
    assert torch.equal(found[measured].float(), signals[measured].float())
    assert float((found - signals).abs().max()) < (1e-3 if cubic else 0.02)


def test_nothing_is_interpolated_over_a_wide_gap() -> None:
    measured = torch.arange(256) < 100
    found = completed(torch.ones(256, 2) * measured[:, None], measured)
    assert torch.equal(found[:, 0], measured.float())


@given(
    every=st.integers(1, 8),
    arc=st.integers(60, 360),
    turn=st.floats(0, 6.2),
    x=st.floats(-0.01, 0.01),
    flip=st.booleans(),
)
@settings(max_examples=40)
def test_elements_find_their_rows_in_the_full_ring(every: int, arc: int, turn: float, x: float, flip: bool) -> None:
    whole = ring_positions(360, 0.04, first=turn) + np.array([x, 0.002, 0.001])
    chosen = whole[: max(arc, 3 * every)][::every]
    if 360 % every:
        chosen = whole[: max(arc, 3 * every) // 2 or 1][::every]
    chosen = chosen[::-1] if flip else chosen
    if len(chosen) < 3:
        return
    ring, rows = full_ring(chosen, 384)
    assert len(ring) >= 384
    assert np.abs(ring[rows] - chosen).max() < 1e-3
    assert len(set(rows.tolist())) == len(chosen)


def test_arrays_that_are_no_ring_are_refused() -> None:
    line = np.stack([np.linspace(0, 0.1, 64), np.zeros(64), np.zeros(64)], axis=1)
    uneven = ring_positions(64, 0.04)[np.random.default_rng(0).permutation(64)[:40]]
    bowl = ring_positions(64, 0.04) + [[0, 0, 0.01 * (n % 2)] for n in range(64)]
    for positions in (line, bowl, uneven + np.random.default_rng(1).normal(0, 3e-3, (40, 3))):
        with pytest.raises(ConfigError, match="use pat/das or pat/ubp"):
            full_ring(positions, 384)


def test_real_images_have_no_phase_to_turn() -> None:
    stages = [StageConfig(prior=PriorConfig(turn=45.0))]
    with pytest.raises(ConfigError, match=r"prior\.turn = 45"):
        photoacoustic_program(stages, SamplerConfig(), {"": lambda u, _: u}, lambda _: None)


# --- data consistency --------------------------------------------------------------------------------------------------------


def test_model_consistency_brings_the_image_to_the_data(scenes: list[Recorded]) -> None:
    scene = scenes[0]
    measured = torch.zeros(scene.ring.elements, dtype=torch.bool)
    measured[::5] = True
    full, part = part_of(scene, np.arange(scene.ring.elements)), part_of(scene, measured.numpy())
    truth = full.back(torch.from_numpy(scene.signals))
    heard, before = part(truth), 0.5 * truth
    config = DataConfig(iterations=8, floor=0.01)
    after = ModelConsistency(part, heard, config, ring=ring_density(measured))(before, 0.15)
    assert float((part(after) - heard).norm()) < 0.2 * float((part(before) - heard).norm())
    kept = ModelConsistency(part, heard, msgspec.structs.replace(config, floor=1e4), ring=64)(before, 0.15)
    assert torch.allclose(kept, before, atol=1e-6 * float(before.abs().max()))


@pytest.fixture(scope="module")
def completing(scenes: list[Recorded]) -> tuple[BeamformedOperator, BeamformedOperator, torch.Tensor]:
    """Every fifth element of a ring."""
    measured = torch.zeros(scenes[0].ring.elements, dtype=torch.bool)
    measured[::5] = True
    full = part_of(scenes[0], np.arange(scenes[0].ring.elements), 64)
    return full, full.part(measured.numpy()), measured


def consistency_of(
    parts: tuple[BeamformedOperator, BeamformedOperator, torch.Tensor], signals: torch.Tensor, **settings: float
) -> CompletedConsistency:
    full, part, measured = parts
    config = DataConfig(kind="complete", **settings)
    return CompletedConsistency(full, part, full.back(completed(signals, measured)), measured, config)


def test_an_image_that_explains_the_data_is_left_as_it_is(
    completing: tuple[BeamformedOperator, BeamformedOperator, torch.Tensor], scenes: list[Recorded]
) -> None:
    full, part, measured = completing
    truth = full.back(torch.from_numpy(scenes[0].signals))
    heard = torch.zeros(full.range)
    heard[measured] = part(truth)
    after = consistency_of(completing, heard, floor=0.0)(truth, 0.15)
    assert float((after - truth).abs().max()) < 1e-5 * float(truth.abs().max())


def test_what_no_image_explains_is_beamformed_with_its_neighbours(
    completing: tuple[BeamformedOperator, BeamformedOperator, torch.Tensor], scenes: list[Recorded]
) -> None:
    """From nothing, one step is the delay-and-sum of interpolated rows; a weight takes its share of it."""
    full, _, measured = completing
    signals = torch.from_numpy(scenes[0].signals) * torch.linspace(0, 2, len(measured))[:, None]
    start = full.back(completed(signals, measured))
    nothing = torch.zeros_like(start)
    assert torch.allclose(consistency_of(completing, signals, floor=0.0)(nothing, 0.1), start)
    assert torch.allclose(consistency_of(completing, signals, floor=0.1)(nothing, 0.1), 0.5 * start)


def test_completing_has_its_own_derivative(
    completing: tuple[BeamformedOperator, BeamformedOperator, torch.Tensor],
) -> None:
    full, _, _ = completing
    data = consistency_of(completing, torch.zeros(full.range), floor=0.05)
    state, direction, weights = (torch.randn(full.domain) for _ in range(3))
    state.requires_grad_()
    (data(state, 0.1) * weights).sum().backward()
    forward = (data(direction, 0.1) * weights).sum()
    assert state.grad is not None
    assert float((state.grad * direction).sum()) == pytest.approx(float(forward), rel=1e-4, abs=1e-2)


def test_spectral_consistency_is_the_closed_form_per_frequency() -> None:
    rng = torch.Generator().manual_seed(0)
    z, y = (torch.randn(4, 64, generator=rng, dtype=torch.float64) for _ in range(2))
    response = transducer_response(64, 0.1, 66).double()
    measured = torch.tensor([True, False, True, True])
    found = SpectralConsistency(y, measured, response, 0.2)(z, 0.5)
    weight = (0.2 / 0.5) ** 2
    spectra = [torch.fft.rfft(v, padded(64)) for v in (y, z)]
    expected = torch.fft.irfft((response * spectra[0] + weight * spectra[1]) / (response**2 + weight), padded(64))[
        :, :64
    ]
    assert torch.allclose(found[measured], expected[measured], atol=1e-10)
    assert torch.equal(found[1], z[1])


def test_wiener_restores_what_was_heard_well() -> None:
    time = torch.arange(256, dtype=torch.float64)
    clean = torch.exp(-(((time - 128) / 20) ** 2)) * torch.cos(2 * torch.pi * 0.1 * time)
    response = transducer_response(256, 0.1, 66).double()
    heard = torch.fft.irfft(torch.fft.rfft(clean, 512) * response, 512)[:256]
    assert float((wiener(heard, response, 1e-3) - clean).norm() / clean.norm()) < 0.05


# --- training ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["proximal", "complete", "replace", "deconvolve"])
def test_a_short_training_learns_to_improve_on_its_start(kind: str) -> None:
    domain = {"proximal": "image", "complete": "image", "replace": "signals", "deconvolve": "spectrum"}[kind]
    conditions = 0 if domain == "image" else 2
    stages = [msgspec.convert({"data": {"kind": kind, "iterations": 1, "floor": 0.05}}, StageConfig)]
    network = NetworkConfig(channels=1, conditions=conditions, widths=(16, 32), blocks=1)
    config = TrainingConfig(
        steps=150,
        batch=2,
        crop=64,
        learning_rate=2e-3,
        rise=5,
        denoising_share=0.0,
        average=0.9,
        decay=0.5,
        precision="float32",
    )
    torch.manual_seed(0)
    denoiser = Denoiser.of_size(network).train()
    trainer = PhotoacousticTrainer(
        denoiser, list(simulate(2, 5, domain)), config, stages, SamplerConfig(levels=2, sigma=(0.15, 0.03))
    )

    def error() -> float:
        with torch.no_grad():
            return float(np.mean([float(trainer.loss(torch.Generator().manual_seed(n))) for n in range(5000, 5008)]))

    before = error()
    for _ in range(150):
        trainer.step()
    assert error() < 0.97 * before


# --- shipped systems ---------------------------------------------------------------------------------------------------------


def reconstructed(config: SystemConfig, scene: Recorded, measured: np.ndarray) -> tuple[float, float]:
    """Errors, relative to the image of the full ring, of the start and of the result; noise is 3 % of the strongest signal."""
    ring, half = scene.ring, scene.ring.view_m / 2
    view = (-half, half, -half, half)
    rng = np.random.default_rng(3)
    noisy = scene.signals + 0.01 * rng.standard_normal(scene.signals.shape, dtype=np.float32)
    beamformer = PriorBeamformer(
        config,
        ring.positions_m[measured],
        ring.sampling_rate_hz,
        pixels=(128, 128),
        field_of_view_m=view,
        speed_of_sound=ring.speed_of_sound,
        t0_samples=ring.first_sample,
    )
    reference = part_of(scene, np.arange(ring.elements)).back(torch.from_numpy(scene.signals)).numpy()
    frame = noisy[measured]
    found = [beamformer.start(frame), beamformer.image(frame)]
    return tuple(float(np.linalg.norm(image - reference) / np.linalg.norm(reference)) for image in found)  # type: ignore[return-value]


def system(name: str, **changes: Any) -> SystemConfig:
    """Without a band-pass: the simulated band is at frequencies of its own."""
    overrides = {"photoacoustic.band_hz": "0,0"} | {key.replace("__", "."): value for key, value in changes.items()}
    return with_overrides(ConfigStore().get(name), overrides, source="test")


SPARSE = np.arange(0, 320, 10)
ARC = np.arange(0, 150)


@pytest.mark.parametrize(
    ("name", "views"),
    [
        ("pat/online", SPARSE),
        ("pat/online", ARC),
        ("pat/sparse", SPARSE),
        ("pat/limited", ARC),
        ("pat/mdae", SPARSE),
        ("pat/sinogram", SPARSE),
        ("pat/multi_model", ARC),
    ],
)
def test_systems_improve_on_their_start_on_scenes_that_were_held_out(
    name: str, views: np.ndarray, scenes: list[Recorded]
) -> None:
    errors = np.array([reconstructed(system(name), scene, views) for scene in scenes])
    assert errors[:, 1].mean() < errors[:, 0].mean()


# --- live --------------------------------------------------------------------------------------------------------------------


def ring_header(positions: np.ndarray, scene: Recorded) -> PhotoacousticHeader:
    half = scene.ring.view_m / 2
    return PhotoacousticHeader(
        stream="0" * 32,
        elements=len(positions),
        samples=scene.ring.samples,
        positions_m=positions,
        sampling_rate_hz=scene.ring.sampling_rate_hz,
        wavelengths_m=(800e-9,),
        speed_of_sound=scene.ring.speed_of_sound,
        t0_samples=scene.ring.first_sample,
        field_of_view_m=(-half, half, -half, half),
        pixels=(64, 64),
    )


def events(config: SystemConfig, positions: np.ndarray, scene: Recorded, signals: np.ndarray) -> list[Any]:
    session, header = PhotoacousticSession(config), ring_header(positions, scene)
    frame = PhotoacousticFrame(seq=0, shot=0, samples=np.rint(signals * 20000).astype(np.int16))
    return [event for message in (header, frame, EndOfScan()) for event in session.feed(message)]


def test_a_stream_gets_images_of_the_prior_that_say_so(scenes: list[Recorded]) -> None:
    scene = scenes[0]
    made = events(system("pat/online"), scene.ring.positions_m[SPARSE], scene, scene.signals[SPARSE])
    (image,) = [event for event in made if isinstance(event, Image)]
    assert image.meta["scanside_method"] == ["prior"]
    assert image.meta["scanside_generative"] == ["1"]
    assert image.meta["scanside_network_evaluations"] == ["3"]
    assert image.meta["scanside_weights"][0].startswith("pat_image ")
    assert image.meta["scanside_outcome"] == ["complete"]


def test_a_shot_that_cannot_be_done_by_the_deadline_gets_its_plain_image_marked(scenes: list[Recorded]) -> None:
    scene, told = scenes[0], {}
    for name, deadline in (("plain", 0.01), ("learned", 1e6)):
        config = system("pat/online", reconstruction__deadline_ms=deadline)
        made = events(config, scene.ring.positions_m[SPARSE], scene, scene.signals[SPARSE])
        (told[name],) = [event for event in made if isinstance(event, Image)]
    late, kept = told["plain"].meta, told["learned"].meta
    assert (late["scanside_method"], late["scanside_deadline"]) == (["das"], ["missed"])
    assert (late["scanside_outcome"], late["scanside_reason"]) == (["degraded"], ["deadline"])
    assert "scanside_generative" not in late
    assert (kept["scanside_method"], kept["scanside_deadline"]) == (["prior"], ["met"])
    plain = events(system("pat/das"), scene.ring.positions_m[SPARSE], scene, scene.signals[SPARSE])
    (expected,) = [event for event in plain if isinstance(event, Image)]
    assert np.array_equal(told["plain"].pixels, expected.pixels)


def test_a_loop_that_was_too_slow_once_is_tried_again(scenes: list[Recorded]) -> None:
    scene, config = scenes[0], system("pat/online", reconstruction__deadline_ms=1e6)
    header, half = ring_header(scene.ring.positions_m[SPARSE], scene), scene.ring.view_m / 2
    shots = PriorShots(config, header, (32, 32), (-half, half, -half, half))
    silent, speed, delay = np.zeros(header.elements, bool), scene.ring.speed_of_sound, scene.ring.first_sample
    shots._expected = 1e5
    passed_over = 0
    while shots.image(scene.signals[SPARSE], silent, speed, delay, time.monotonic()) is None:
        assert shots.late
        passed_over += 1
    assert 10 < passed_over < 100
    assert not shots.late


def test_a_loop_that_is_always_too_slow_is_tried_ever_more_seldom(scenes: list[Recorded]) -> None:
    scene, config = scenes[0], system("pat/online", reconstruction__deadline_ms=0.5)
    header, half = ring_header(scene.ring.positions_m[SPARSE], scene), scene.ring.view_m / 2
    shots = PriorShots(config, header, (32, 32), (-half, half, -half, half))
    silent, speed, delay = np.zeros(header.elements, bool), scene.ring.speed_of_sound, scene.ring.first_sample
    tries: list[int] = []
    for number in range(100_000):
        before = shots._expected
        assert shots.image(scene.signals[SPARSE], silent, speed, delay, time.monotonic()) is None
        if shots._expected > before:
            tries.append(number)
        if len(tries) == 5:
            break
    first, *_, last = np.diff(tries)
    assert last > 2 * first


def test_an_array_that_is_no_ring_gets_plain_images_marked(scenes: list[Recorded]) -> None:
    scene = scenes[0]
    positions = np.random.default_rng(2).normal(0, 0.02, (32, 3)) + np.array([0.05, 0, 0])
    made = events(system("pat/online"), positions, scene, scene.signals[SPARSE])
    (image,) = [event for event in made if isinstance(event, Image)]
    assert image.meta["scanside_method"] == ["das"]
    assert image.meta["scanside_reason"] == ["no_prior"]
    assert any("use pat/das" in event.text for event in made if isinstance(event, Note))
