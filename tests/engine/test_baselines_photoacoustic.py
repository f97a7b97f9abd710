"""Beamforming: sources are found where they are, live images are those made at leisure, and bad input is named."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.engine.baselines.photoacoustic import (
    METHODS,
    LiveBeamformer,
    band_pass,
    band_response,
    delay_and_sum,
    universal_back_projection,
)
from scanside.engine.operators.photoacoustic_geometry import DetectorArray, PixelGrid, TimeAxis, ring_positions

RATE, SPEED, SAMPLES, RADIUS = 40e6, 1500.0, 900, 0.012
VIEW = (-0.004, 0.004, -0.004, 0.004)
BAND = (0.5e6, 8e6)


def pulses(positions, source, speed=SPEED, delay=0.0, samples=SAMPLES):
    """What elements record of a point: a bipolar pulse of 5 samples' width, its zero crossing at the arrival."""
    arrival = np.linalg.norm(positions - source, axis=1)[:, None] * RATE / speed - delay
    lag = np.arange(samples) - arrival
    return (-lag * np.exp(-((lag / 3) ** 2))).astype(np.float32)


def beamformer(positions, method="das", **settings):
    return LiveBeamformer(
        positions, None, RATE, pixels=(40, 50), field_of_view_m=VIEW, method=method, threads=1, **settings
    )


def offline(signals, method, elements=slice(None), weights=None, **time):
    array = DetectorArray.at(RING[elements], weights=None if weights is None else weights[elements])
    grid, axis = PixelGrid.over((40, 50), VIEW), TimeAxis(RATE, signals.shape[-1], **time)
    function = delay_and_sum if method == "das" else universal_back_projection
    return function(torch.as_tensor(signals), array, grid, axis).numpy()


def assert_same(a, b, tolerance=2e-5):
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


RING = ring_positions(48, RADIUS)


@given(
    x=st.floats(-0.0035, 0.0035),
    y=st.floats(-0.0035, 0.0035),
    elements=st.integers(16, 64),
    speed=st.floats(1400, 1600),
    delay=st.floats(-30, 30),
)
@settings(max_examples=25)
def test_a_point_is_found_where_it_is(x, y, elements, speed, delay):
    ring = ring_positions(elements, RADIUS)
    live = beamformer(ring, speed_of_sound=speed, t0_samples=delay)
    arrival = np.linalg.norm(ring - [x, y, 0], axis=1)[:, None] * RATE / speed - delay
    image = live.image(np.exp(-(((np.arange(SAMPLES) - arrival) / 6) ** 2)).astype(np.float32))
    row, column = np.unravel_index(image.argmax(), image.shape)
    assert abs(live.grid.y[row] - y) <= 0.0002
    assert abs(live.grid.x[column] - x) <= 0.00016


@pytest.mark.parametrize("view", ["sphere", "half"])
def test_back_projection_of_a_ball_is_the_ball(view):
    """The pressure of a ball of radius a is known, an N; elements on a sphere, or half of one, show it with brightness 1."""
    rng, a, center = np.random.default_rng(0), 0.0015, np.array([0.0004, -0.0006, 0.0003])
    directions = rng.normal(size=(6000, 3))
    positions = RADIUS * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    if view == "half":
        positions = positions[positions[:, 0] > 0]
    distance = np.linalg.norm(positions - center, axis=1)[:, None]
    path = np.arange(SAMPLES) * SPEED / RATE
    signals = np.where(np.abs(path - distance) < a, (distance - path) / (2 * distance), 0).astype(np.float32)
    grid = PixelGrid.over((1, 33, 33), (-0.0024, 0.0024, -0.0024, 0.0024, 0.00025, 0.00035))
    smooth = band_pass(torch.from_numpy(signals), (0, 8e6), RATE)
    array, axis = DetectorArray.at(positions), TimeAxis(RATE, SAMPLES, SPEED)
    image = universal_back_projection(smooth, array, grid, axis, dimensions=3).numpy().squeeze()
    y, x = np.meshgrid(grid.y, grid.x, indexing="ij")
    from_center = np.sqrt((x - center[0]) ** 2 + (y - center[1]) ** 2)
    assert abs(image[from_center < 0.3 * a].mean() - 1) < 0.03
    if view == "sphere":
        assert abs(image[from_center < 0.8 * a].mean() - 1) < 0.03
        assert abs(image[from_center > 1.3 * a].mean()) < 0.03


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("band", [None, BAND])
def test_live_and_offline_agree(method, band, rng):
    signals = rng.normal(size=(48, SAMPLES)).astype(np.float32)
    weights = rng.uniform(0.5, 2, 48)
    weights[7] = 0
    live = beamformer(RING, method, band_hz=band, weights=weights, speed_of_sound=1480, t0_samples=4.5)
    filtered = band_pass(torch.from_numpy(signals), band, RATE) if band else signals
    assert_same(live.image(signals), offline(filtered, method, weights=weights, speed_of_sound=1480, delay=4.5))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("band", [None, BAND])
@pytest.mark.parametrize(("dtype", "offset"), [(np.int16, 0), (np.int16, -37), (np.uint16, 32768)])
def test_whole_numbers_give_the_same_image(method, band, dtype, offset, rng):
    whole = (rng.normal(size=(48, SAMPLES)) * 3000 + offset).astype(dtype)
    whole.flags.writeable = False  # as it comes from a socket
    live = beamformer(RING, method, band_hz=band, adc_offset=offset)
    first = live.image(whole).copy()
    assert_same(live.image(whole.astype(np.float32)), first)
    plain = beamformer(RING, method, band_hz=band)
    assert_same(plain.image(whole.astype(np.float32) - offset), first)


@pytest.mark.parametrize("method", METHODS)
def test_speed_and_delay_change_between_frames(method):
    live = beamformer(RING, method)
    signals = pulses(RING, np.array([0.001, 0.002, 0]), speed=1540, delay=12)
    for speed, delay in ((1540.0, 12.0), (1500.0, 12.0), (1500.0, 0.0), (1540.0, 12.0)):
        live.set_speed_of_sound(speed)
        live.set_delay(delay)
        assert_same(live.image(signals), offline(signals, method, speed_of_sound=speed, delay=delay))
    assert live.time == TimeAxis(RATE, SAMPLES, 1540.0, 12.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("band", [None, BAND])
def test_a_part_of_the_array(method, band, rng):
    signals = rng.normal(size=(48, SAMPLES)).astype(np.float32)
    live = beamformer(RING, method, band_hz=band)
    filtered = band_pass(torch.from_numpy(signals), band, RATE) if band else torch.from_numpy(signals)
    for first, count in ((0, 16), (40, 8), (16, 1)):
        part = slice(first, first + count)
        assert_same(live.image(signals[part], first, count), offline(filtered[part], method, part))
    assert_same(live.image(signals), offline(filtered, method))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("band", [None, BAND])
def test_dead_elements_are_never_read(method, band, rng):
    signals = rng.normal(size=(48, SAMPLES)).astype(np.float32)
    signals[[3, 20]] = np.nan
    image = beamformer(RING, method, band_hz=band, dead=(3, 20)).image(signals)
    alive = np.delete(np.arange(48), [3, 20])
    filtered = band_pass(torch.from_numpy(signals[alive]), band, RATE) if band else signals[alive]
    assert_same(image, offline(filtered, method, alive))


@pytest.mark.parametrize("method", METHODS)
def test_an_array_without_a_living_element_gives_nothing(method):
    live = beamformer(RING, method, dead=range(48))
    assert not live.image(np.ones((48, SAMPLES), np.float32)).any()


def test_frames_may_change_in_length_and_share_one_image():
    live = beamformer(RING)
    long, short = pulses(RING, np.zeros(3)), pulses(RING, np.zeros(3), samples=500)
    first = live.image(long)
    kept = first.copy()
    assert live.image(short) is not None
    assert_same(first, offline(short, "das"))
    assert live.image(long) is first
    assert_same(first, kept, 1e-7)


# --- the filter --------------------------------------------------------------------------------------------------------------


@given(
    low=st.sampled_from([0.0, 0.2e6, 1e6]),
    high=st.sampled_from([3e6, 8e6, 20e6, 30e6]),
    frequency=st.floats(0.05e6, 19e6),
)
@settings(max_examples=30)
def test_a_tone_comes_through_as_the_response_says_and_in_phase(low, high, frequency):
    time = np.arange(4000) / RATE
    tone = torch.from_numpy(np.cos(2 * np.pi * frequency * time))
    ratio = band_response((low, high), RATE, 40000)[round(frequency / RATE * 40000)]
    passed = band_pass(tone, (low, high), RATE)
    middle = slice(1500, 2500)
    assert float((passed[middle] - ratio * tone[middle]).abs().max()) < 0.02


def test_half_of_the_amplitude_is_left_at_the_edges():
    response = band_response((1e6, 8e6), RATE, 40000)
    assert response[[1000, 8000]] == pytest.approx([0.5, 0.5], abs=1e-3)
    assert response[0] == 0 and response[4000] == pytest.approx(1, abs=1e-2)
    assert (band_response((0, 30e6), RATE, 100) == 1).all()


# --- bad input ---------------------------------------------------------------------------------------------------------------


def test_bad_geometry_is_named():
    broken = RING.copy()
    broken[5, 1] = math.nan
    with pytest.raises(ValueError, match=r"positions_m\[5\] is .*nan.* finite numbers are needed"):
        beamformer(broken)
    with pytest.raises(ValueError, match=r"positions_m has shape \(48, 2\), needed is \(element, 3\)"):
        beamformer(RING[:, :2])
    with pytest.raises(ValueError, match=r"positions_m has shape \(0, 3\)"):
        beamformer(RING[:0])
    with pytest.raises(ValueError, match=r"orientations has shape \(47, 3\), needed is \(48, 3\)"):
        DetectorArray.at(RING, RING[1:])
    with pytest.raises(ValueError, match=r"orientations\[2\] is 0 long"):
        DetectorArray.at(RING, np.where(np.arange(48)[:, None] == 2, 0, RING))
    with pytest.raises(ValueError, match="dead names element 48, the array has 0 to 47"):
        beamformer(RING, dead=(48,))
    with pytest.raises(ValueError, match=r"weights\[1\] is -1"):
        beamformer(RING, weights=np.where(np.arange(48) == 1, -1.0, 1.0))
    with pytest.raises(ValueError, match=r"weights has shape \(3,\)"):
        beamformer(RING, weights=np.ones(3))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_bad_numbers_are_named(value):
    with pytest.raises(ValueError, match=r"speed_of_sound is .* m/s"):
        beamformer(RING, speed_of_sound=value)
    with pytest.raises(ValueError, match=r"sampling_rate_hz is .* Hz"):
        LiveBeamformer(RING, None, value, pixels=(8, 8), field_of_view_m=VIEW)
    live = beamformer(RING)
    with pytest.raises(ValueError, match=r"speed_of_sound is .* m/s"):
        live.set_speed_of_sound(value)
    assert live.time.speed_of_sound == SPEED


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="method is 'dass', allowed are das, ubp"):
        beamformer(RING, "dass")
    with pytest.raises(ValueError, match="delay is nan"):
        beamformer(RING).set_delay(math.nan)
    for band in ((5e6, 1e6), (-1, 1e6), (21e6, 30e6)):
        with pytest.raises(ValueError, match="band_hz is"):
            beamformer(RING, band_hz=band)
    with pytest.raises(ValueError, match="field_of_view_m along y is 0"):
        LiveBeamformer(RING, None, RATE, pixels=(8, 8), field_of_view_m=(0, 1, 0, 0))
    with pytest.raises(ValueError, match="pixels along x is 0"):
        LiveBeamformer(RING, None, RATE, pixels=(8, 0), field_of_view_m=VIEW)
    with pytest.raises(ValueError, match="2 numbers and 4, or 3 and 6"):
        PixelGrid.over((8, 8), (0, 1, 0))


def test_bad_frames_are_named():
    live = beamformer(RING)
    good = np.zeros((48, SAMPLES), np.int16)
    with pytest.raises(ValueError, match=r"frame has shape \(47, 900\), needed is \(48, samples\)"):
        live.image(good[1:])
    with pytest.raises(ValueError, match=r"frame has shape \(48, 0\)"):
        live.image(good[:, :0])
    for dtype in (np.float64, ">i2", np.int32):
        with pytest.raises(ValueError, match=r"frame is .*; needed: int16, uint16 or float32"):
            live.image(good.astype(dtype))
    for first, count in ((-1, 3), (40, 9), (0, 0)):
        with pytest.raises(ValueError, match=f"det_first {first} and det_count {count} leave the array"):
            live.image(good[:3], first, count)
    with pytest.raises(ValueError, match=r"signals has shape \(48, 10\), its last axes must be \(48, 900\)"):
        delay_and_sum(torch.zeros(48, 10), live.array, live.grid, TimeAxis(RATE, 900))


# --- measured ----------------------------------------------------------------------------------------------------------------


@pytest.mark.real_data
def test_three_measured_spheres(real_data):
    signals = np.load(real_data("pat/three_spheres_512x2000.npz"))["sinogram"]
    reference = np.load(real_data("pat/three_spheres_das_reference_256_32mm.npy"))
    edge = 0.016 * 256 / 255  # the reference has pixel centers at the ends of its 32 mm
    ring = ring_positions(512, 1460 * 1500 / 50e6)
    settings = {"pixels": (256, 256), "field_of_view_m": (-edge, edge, -edge, edge), "band_hz": (0.15e6, 3.5e6)}
    live = LiveBeamformer(ring, None, 50e6, threads=1, **settings)
    image = live.image(signals).copy()
    assert np.corrcoef(image.ravel(), reference.ravel())[0, 1] >= 0.999
    quantized = live.image((signals * 32767).astype(np.int16)) / 32767
    assert np.abs(quantized - image).max() <= 1e-3 * np.abs(image).max()
