"""The photoacoustic forward model: exact adjoints, solutions of the wave equation that are known, and k-Wave."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.engine.baselines.photoacoustic_iterative import model_based, total_variation_photoacoustic
from scanside.engine.operators.linear import adjoint_mismatch
from scanside.engine.operators.photoacoustic import (
    BlackmanSmoothing,
    PhotoacousticOperator,
    TimeMatrix,
    TimeOfFlight,
)
from scanside.engine.operators.photoacoustic_geometry import DetectorArray, PixelGrid, TimeAxis, ring_positions
from scanside.engine.operators.wave import gaussian_response, time_matrix

RATE, SPEED = 20e6, 1500.0


def scene(elements=12, pixels=(14, 16), samples=160, delay=0.0, radius=0.004):
    view = (-0.002, 0.002) * len(pixels)
    return (
        DetectorArray.at(ring_positions(elements, radius)),
        PixelGrid.over(pixels, view),
        TimeAxis(RATE, samples, SPEED, delay),
    )


def assert_same(a, b, tolerance):
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


# --- algebra -----------------------------------------------------------------------------------------------------------------


@given(
    elements=st.integers(2, 20),
    pixels=st.one_of(st.tuples(*(st.integers(2, 16),) * 2), st.tuples(*(st.integers(2, 8),) * 3)),
    delay=st.floats(-10, 30),
    weighting=st.sampled_from(["plain", "plane", "space"]),
)
@settings(max_examples=25)
def test_collection_and_delay_and_sum_are_adjoint(elements, pixels, delay, weighting):
    operator = TimeOfFlight(*scene(elements, pixels, 160, delay), weighting=weighting)
    assert adjoint_mismatch(operator, dtype=torch.float32) <= 1e-6
    assert adjoint_mismatch(operator, dtype=torch.float64, batch=(2, 1)) <= 1e-14


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("heard", [False, True])
def test_the_forward_model_and_its_adjoint(dimensions, smooth, heard):
    response = gaussian_response(2.25e6, 66, RATE) if heard else None
    settings = {"dimensions": dimensions, "smooth": smooth, "response": response}
    array, grid, time = scene(pixels=(16, 16))
    operator = PhotoacousticOperator(array, grid, time, **settings)
    assert operator.domain == (16, 16) and operator.range == (12, 160)
    assert adjoint_mismatch(operator, dtype=torch.float32) <= 1e-6
    exact = PhotoacousticOperator(array, grid, time, dtype=torch.float64, **settings)
    assert adjoint_mismatch(exact, dtype=torch.float64, batch=(2,)) <= 1e-14
    x = torch.randn(2, 16, 16, dtype=torch.float64)
    assert_same(exact.gram(x), exact.H(exact(x)), 1e-12)


def test_a_matrix_in_time():
    matrix = torch.randn(9, 5, dtype=torch.float64)
    operator = TimeMatrix(matrix, 3)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    assert_same(operator(x), torch.einsum("kl,bnl->bnk", matrix, x), 1e-14)
    assert adjoint_mismatch(operator, dtype=torch.float64) <= 1e-14
    assert_same(operator.gram(x), operator.H(operator(x)), 1e-13)


def test_dead_elements_record_nothing_and_weights_do_not_count():
    _, grid, time = scene(pixels=(16, 16))
    array = DetectorArray.at(ring_positions(12, 0.004), weights=np.arange(12.0))
    signals = PhotoacousticOperator(array, grid, time)(torch.rand(16, 16))
    assert not signals[0].any()
    plain = PhotoacousticOperator(scene()[0], grid, time)(torch.rand(16, 16))
    assert float(signals[1:].abs().amax(1).std()) < 3 * float(plain.abs().amax(1).std())


@pytest.mark.parametrize("shape", [(17, 20), (6, 9, 8)])
def test_smoothing_is_the_window(shape):
    image = torch.randn(*shape, dtype=torch.float64)
    padded = np.pad(image.numpy(), 8)
    rho = np.linalg.norm(np.meshgrid(*(2 * np.fft.fftfreq(n) for n in padded.shape), indexing="ij"), axis=0)
    window = np.where(rho <= 1, 0.42 + 0.5 * np.cos(np.pi * rho) + 0.08 * np.cos(2 * np.pi * rho), 0)
    expected = np.fft.ifftn(np.fft.fftn(padded) * window).real[tuple(slice(8, n - 8) for n in padded.shape)]
    operator = BlackmanSmoothing(shape)
    assert_same(operator(image), torch.from_numpy(expected), 1e-13)
    assert adjoint_mismatch(operator, dtype=torch.float64) <= 1e-14


# --- the wave equation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [2, 3])
def test_even_pressure_stays_as_it_is(dimensions):
    """Where the pressure is 1 as far as sound has come from, it stays 1: circles and spheres of pixels around the element."""
    time, pixel = TimeAxis(RATE, 300, SPEED), 1e-4
    matrix = time_matrix(time, pixel, pixel**dimensions, dimensions=dimensions)
    step = SPEED / RATE
    radius = np.arange(300) * step
    surface = 2 * np.pi * radius if dimensions == 2 else 4 * np.pi * radius**2
    pressure = matrix @ (surface * step / pixel**dimensions)
    assert pressure[30:250] == pytest.approx(np.ones(220), abs=2e-3)


def test_a_ball_sends_out_an_n():
    """p = (d - ct) / 2d while |d - ct| < a (Wang, Wu, Biomedical Optics, 2007, chapter 12), smoothed by the pixels."""
    a, pixel, time = 0.0012, 1e-4, TimeAxis(RATE, 200, SPEED)
    grid = PixelGrid.over((32, 32, 32), (-0.0016, 0.0016) * 3)
    position = np.array([[0.006, 0.002, -0.001]])
    z, y, x = np.meshgrid(grid.z, grid.y, grid.x, indexing="ij")
    points = np.stack(np.meshgrid(*(np.linspace(-0.4, 0.4, 5),) * 3)).reshape(3, -1) * pixel
    ball = np.mean([(x + i) ** 2 + (y + j) ** 2 + (z + k) ** 2 < a**2 for i, j, k in points.T], axis=0)
    operator = PhotoacousticOperator(DetectorArray.at(position), grid, time, dimensions=3, dtype=torch.float64)
    found = operator(torch.from_numpy(ball)).numpy()[0]
    distance = np.linalg.norm(position)
    fine = np.linspace(-2.5, 2.5, 101)  # the N seen through a pixel's width
    path = (np.arange(200)[:, None] + fine / 2.5 * pixel / 2 * RATE / SPEED) * SPEED / RATE
    expected = np.where(np.abs(path - distance) < a, (distance - path) / (2 * distance), 0).mean(1)
    assert np.linalg.norm(found - expected) <= 0.1 * np.linalg.norm(expected)
    assert found.max() == pytest.approx(expected.max(), rel=0.1)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_delay_takes_the_start_of_the_recording_away(dimensions):
    whole = time_matrix(TimeAxis(RATE, 140, SPEED), 1e-4, 1e-8, dimensions=dimensions)
    late = time_matrix(TimeAxis(RATE, 100, SPEED, 40.0), 1e-4, 1e-8, dimensions=dimensions)
    assert np.abs(late[1:, 12:] - whole[41:, 52:]).max() <= 1e-9 * np.abs(whole).max()


def test_a_transducer_is_a_gaussian_of_frequency():
    response = gaussian_response(2.25e6, 66, RATE)
    assert len(response) % 2 == 1
    assert response == pytest.approx(response[::-1])
    frequencies = np.fft.rfftfreq(4000, 1 / RATE)
    spectrum = np.abs(np.fft.rfft(response, 4000))
    half = 0.66 * 2.25e6 / 2
    for frequency, level in ((2.25e6, 1.0), (2.25e6 - half, 0.5), (2.25e6 + half, 0.5)):
        assert np.interp(frequency, frequencies, spectrum) == pytest.approx(level, abs=0.01)


def test_bad_models_are_named():
    time = TimeAxis(RATE, 50)
    with pytest.raises(ValueError, match="dimensions is 4"):
        time_matrix(time, 1e-4, 1e-8, dimensions=4)
    with pytest.raises(ValueError, match="pixel_m is 0"):
        time_matrix(time, 0.0, 1e-8, dimensions=2)
    with pytest.raises(ValueError, match=r"response has shape \(4,\); an odd number"):
        time_matrix(time, 1e-4, 1e-8, dimensions=2, response=np.ones(4))
    with pytest.raises(ValueError, match="bandwidth_percent is 0"):
        gaussian_response(2e6, 0, RATE)
    array, _, axis = scene()
    with pytest.raises(ValueError, match="the forward model needs square ones"):
        PhotoacousticOperator(array, PixelGrid.over((10, 20), (-0.001, 0.001, -0.001, 0.001)), axis)
    with pytest.raises(ValueError, match="of one pixel the size is not known"):
        PhotoacousticOperator(array, PixelGrid.over((1, 1), (-0.001, 0.001, -0.001, 0.001)), axis)
    with pytest.raises(ValueError, match=r"argument has shape \(9, 16\)"):
        PhotoacousticOperator(*scene(pixels=(16, 16)))(torch.zeros(9, 16))


# --- iterative reconstruction ------------------------------------------------------------------------------------------------


def discs(n):
    y, x = np.meshgrid(*(np.linspace(-1, 1, n),) * 2, indexing="ij")
    image = 1.0 * (np.hypot(x - 0.3, y + 0.2) < 0.3) + 0.6 * (np.hypot(x + 0.4, y - 0.3) < 0.2)
    return torch.from_numpy(image.astype(np.float32))


def distance(a, b):
    return float((a - b).norm() / b.norm())


def test_least_squares_finds_the_image():
    operator = PhotoacousticOperator(*scene(64, (32, 32), 200), dimensions=2)
    truth = discs(32)
    found = model_based(operator, operator(truth), iterations=40, regularization=1e-4)
    assert distance(found, truth) < 0.1
    assert distance(operator(found), operator(truth)) < 0.02


def test_total_variation_beats_least_squares_where_few_elements_hear_noise():
    operator = PhotoacousticOperator(*scene(12, (32, 32), 200), dimensions=2)
    truth = discs(32)
    clean = operator(truth)
    data = clean + 0.1 * clean.std() * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    plain = [distance(model_based(operator, data, iterations=30, regularization=r), truth) for r in (1e-3, 1e-2, 1e-1)]
    assert distance(total_variation_photoacoustic(operator, data, iterations=200), truth) < 0.7 * min(plain)
    louder = total_variation_photoacoustic(operator, 1000 * data, iterations=20)
    assert_same(louder / 1000, total_variation_photoacoustic(operator, data, iterations=20), 1e-4)


# --- k-Wave ------------------------------------------------------------------------------------------------------------------

CELL, KWAVE = 0.05 / 440, TimeAxis(44e6, 2075, 1500.0)


def kwave_scene(elements):
    """Elements at the nearest nodes of a ring, in MATLAB's order, and the whole grid; k-Wave's x is the row of an image."""
    angles = 2 * np.pi * np.arange(elements) / elements
    nodes = np.round(-0.0216 * np.stack([np.sin(angles), np.cos(angles)]) / CELL).astype(int)
    row, column = nodes[:, np.lexsort((nodes[0], nodes[1]))]
    axis = (np.arange(440) - 220) * CELL
    positions = np.stack([column, row, 0 * row], 1) * CELL
    return DetectorArray.at(positions), PixelGrid(axis, axis, np.zeros(1)), KWAVE


def mismatch(found, expected):
    return float(np.linalg.norm(found.numpy() - expected) / np.linalg.norm(expected))


@pytest.mark.real_data
def test_kwave_with_8_elements(real_data):
    data = np.load(real_data("pat/kwave_8det.npz"))
    operator = PhotoacousticOperator(*kwave_scene(8), dimensions=2)
    assert mismatch(operator(torch.from_numpy(data["p0"])), data["sensor_data"]) <= 0.02


@pytest.mark.real_data
def test_kwave_with_64_transducers(real_data):
    from PIL import Image

    data = np.load(real_data("pat/kwave_64det.npz"))["proj"]
    picture = np.asarray(Image.open(real_data("pat/kwave_64det_image.png"))) / 255
    image = torch.from_numpy(np.pad(picture, 92).astype(np.float32))
    response = gaussian_response(2.25e6, 66, KWAVE.sampling_rate_hz)
    operator = PhotoacousticOperator(*kwave_scene(64), dimensions=2, response=response, smooth=True)
    assert mismatch(operator(image), data) <= 0.03
    assert adjoint_mismatch(operator, dtype=torch.float32) <= 1e-6
    assert math.isclose(float(np.vdot(operator(image).numpy(), data) / np.vdot(data, data)), 1, rel_tol=0.03)
