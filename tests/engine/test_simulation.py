"""Simulated k-space against independent transforms, and scans against the truth they come with."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.engine.headers import AcquisitionFlag, has_flag
from scanside.engine.simulation import shepp_logan, simulate_scan
from scanside.engine.simulation.coils import coil_kspace, coil_maps, object_phase
from scanside.engine.simulation.phantom import Ellipse, Phantom, beating_heart
from scanside.engine.simulation.sampling import cartesian_lines, golden_spokes, spiral_arms
from skimage.data import shepp_logan_phantom

AXES = (-2, -1)


def centered_inverse(kspace):
    image = np.fft.ifft2(np.fft.ifftshift(kspace, axes=AXES), axes=AXES, norm="ortho")
    return np.fft.fftshift(image, axes=AXES)


def centered_forward(image):
    return np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(image, axes=AXES), axes=AXES, norm="forward"), axes=AXES)


def grid(size):
    k = np.arange(size) - size // 2.0
    return np.meshgrid(k, k)


def test_kspace_is_the_transform_of_the_image():
    kx, ky = grid(32)
    fine = centered_forward(shepp_logan().image((1024, 1024), subdivisions=2))
    middle = slice(512 - 16, 512 + 16)
    np.testing.assert_allclose(shepp_logan().kspace(kx, ky), fine[middle, middle], atol=3e-5)


def test_kspace_at_the_center_is_the_area():
    zero = np.zeros(1)
    area = Phantom((Ellipse(2.0, (0.1, -0.2), (0.2, 0.05), 0.7),)).kspace(zero, zero)
    np.testing.assert_allclose(area, 2.0 * math.pi * 0.2 * 0.05, rtol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    st.floats(-0.15, 0.15), st.floats(-0.15, 0.15), st.floats(0.05, 0.3), st.floats(0.05, 0.3),
    st.floats(-3.0, 3.0), st.floats(-6.0, 6.0), st.floats(-6.0, 6.0),
)  # fmt: skip
def test_kspace_of_any_ellipse_at_any_point(x, y, a, b, angle, kx, ky):
    phantom = Phantom((Ellipse(1.0, (x, y), (a, b), angle),))
    size = 512
    axis = (np.arange(size) - size // 2) / size
    image = phantom.image((size, size), subdivisions=2)
    summed = np.exp(-2j * np.pi * ky * axis) @ image @ np.exp(-2j * np.pi * kx * axis) / size**2
    exact = phantom.kspace(np.array([kx]), np.array([ky]))[0]
    assert abs(exact - summed) < 2e-4


def test_the_inverse_transform_has_the_overshoot_of_gibbs():
    disk = Phantom((Ellipse(1.0, (0.0, 0.0), (0.3, 0.3)),))
    kx, ky = grid(128)
    image = centered_inverse(disk.kspace(kx, ky) * 128).real
    assert 1.04 < image.max() < 1.15
    assert abs(image[64, 64] - 1) < 0.02


@pytest.mark.parametrize(("contrast", "top"), [("modified", 1.0), ("classic", 2.0)])
def test_contrasts(contrast, top):
    image = shepp_logan(contrast=contrast).image((64, 64))
    assert image.max() == pytest.approx(top)
    assert image.min() > -1e-12


def test_unknown_contrast_names_the_known():
    with pytest.raises(ValueError, match=r"contrast is 'bright', allowed are \['classic', 'modified'\]"):
        shepp_logan(contrast="bright")


def test_the_head_is_the_one_that_others_have():
    axis = np.linspace(-0.5, 0.5, 400)  # their pixels reach from edge to edge
    ours = shepp_logan().density(axis[None, :], axis[:, None])
    different = np.abs(ours - shepp_logan_phantom()) > 0.02
    assert different.mean() < 0.01


def test_moving_turns_and_scales():
    head = shepp_logan()
    image = head.moved(rotation=math.pi / 2).image((65, 65))  # the odd grid is symmetric about its center
    np.testing.assert_allclose(image, np.rot90(head.image((65, 65)), -1), atol=1e-6)
    zero = np.zeros(1)
    assert head.moved(scale=0.5).kspace(zero, zero)[0] == pytest.approx(head.kspace(zero, zero)[0] / 4)


def test_a_heart_beats_in_a_chest_that_stands_still():
    """Periodic, with less blood halfway, and only the heart and the aorta change; k-space is that of the image."""
    frames = np.stack([beating_heart(phase).image((64, 64)) for phase in (0.0, 0.25, 0.5, 0.75, 1.0)])
    assert np.allclose(frames[0], frames[4])
    assert frames.min() > -0.01
    assert frames.max() < 1.2
    moving = frames.std(axis=0) > 1e-9
    assert 0.02 < moving.mean() < 0.12
    assert not moving[:20].any()
    assert frames[2].sum() < frames[0].sum()
    kx, ky = grid(64)
    exact = centered_inverse(beating_heart(0.25).kspace(kx, ky)).real * 64
    assert np.linalg.norm(exact - frames[1]) < 0.15 * np.linalg.norm(frames[1])


def test_coil_kspace_is_the_transform_of_map_times_object():
    maps = coil_maps(4).times(object_phase(2.0))
    kx, ky = grid(24)
    size = 768
    images = shepp_logan().image((size, size), subdivisions=2) * maps.image((size, size))
    middle = slice(size // 2 - 12, size // 2 + 12)
    exact = coil_kspace(shepp_logan(), maps, kx, ky)
    np.testing.assert_allclose(exact, centered_forward(images)[:, middle, middle], atol=4e-5)


def test_lattice_and_scattered_points_agree(rng):
    maps = coil_maps(3).times(object_phase(2.0))
    kx, ky = rng.integers(-40, 40, (2, 50)) / 2
    near = coil_kspace(shepp_logan(), maps, kx + 1e-9, ky - 1e-9)
    np.testing.assert_allclose(near, coil_kspace(shepp_logan(), maps, kx, ky), atol=1e-8)


def test_products_of_maps():
    maps, phase = coil_maps(3), object_phase(2.0)
    np.testing.assert_allclose(maps.times(phase).image((20, 22)), maps.image((20, 22)) * phase.image((20, 22)))


@pytest.mark.parametrize("coils", [1, 4, 8, 20, 32])
def test_coils_surround_the_object_and_differ(coils):
    images = coil_maps(coils).image((48, 48))
    assert images.shape == (coils, 48, 48)
    y, x = np.mgrid[:48, :48] / 48 - 0.5
    head = np.hypot(x / 0.345, y / 0.46) <= 1
    together = np.sqrt((np.abs(images) ** 2).sum(axis=0))[head]
    assert together.min() > 0.1
    flat = images[:, head]
    values = np.linalg.svd(flat / np.linalg.norm(flat, axis=1, keepdims=True), compute_uv=False)
    assert np.count_nonzero(values > 0.02) >= min(coils, 8)


def test_the_phase_is_a_phase():
    y, x = np.mgrid[:48, :48] / 48 - 0.5
    phase = object_phase(2.0).image((48, 48))[0]
    head = np.hypot(x / 0.345, y / 0.46) <= 1
    assert np.abs(np.abs(phase[head]) - 1).max() < 0.012
    assert np.ptp(np.angle(phase[head])) > 0.7


@settings(max_examples=100, deadline=None)
@given(
    st.integers(4, 64).map(lambda half: 2 * half),
    st.integers(1, 8),
    st.integers(0, 24),
    st.floats(0.51, 1.0),
    st.booleans(),
)
def test_lines_of_any_scan(matrix, acceleration, calibration, partial, first):
    calibration = min(calibration, matrix)
    lines = cartesian_lines(matrix, acceleration, calibration, partial, calibration_first=first)
    assert len(set(lines.line)) == len(lines.line)
    assert matrix // 2 in lines.line
    assert lines.first <= lines.line.min()
    assert lines.line.max() < matrix
    assert (lines.imaging | lines.calibration).all()
    assert lines.calibration.sum() == (calibration if acceleration > 1 else 0)
    assert set(np.diff(np.sort(lines.line[lines.imaging]))) <= {acceleration}
    if first:
        assert (np.diff(lines.calibration.astype(int)) <= 0).all()
    else:
        assert (np.diff(lines.line) > 0).all()


def test_spokes_go_on_by_the_golden_angle():
    spokes = golden_spokes(0, 5, 16)
    np.testing.assert_array_equal(golden_spokes(3, 2, 16), spokes[3:])
    assert (spokes[:, 8] == 0).all()
    directions = np.unwrap(2 * np.arctan2(spokes[:, -1, 1], spokes[:, -1, 0])) / 2
    np.testing.assert_allclose(np.diff(directions) % math.pi, math.radians(111.246), atol=1e-4)


def test_spiral_arms_meet_the_sampling_theorem():
    arm = spiral_arms(0, 1, 4, 64, 2)[0].astype(float) * 64
    radius = np.linalg.norm(arm, axis=1)
    assert 31.5 < radius.max() <= 32.001
    assert np.linalg.norm(np.diff(arm, axis=0), axis=1)[1:].max() < 0.75  # at most 3/4 of the step for a field of view


def test_a_full_scan_gives_its_reference():
    scan = simulate_scan(64, 6, 1, 0, oversampling=1, noise=0.0, noise_readouts=0)
    (batch,) = scan.batches
    np.testing.assert_array_equal(batch.headers["idx"]["kspace_encode_step_1"], np.arange(64))
    images = centered_inverse(batch.samples.swapaxes(0, 1))
    unit = scan.maps / np.sqrt((np.abs(scan.maps) ** 2).sum(axis=0))
    np.testing.assert_allclose((unit.conj() * images).sum(axis=0), scan.reference[0, 0], atol=1e-5)
    assert np.abs(scan.reference).max() == pytest.approx(1.0)
    root = np.sqrt((np.abs(images) ** 2).sum(axis=0))
    assert np.linalg.norm(root - np.abs(scan.reference[0, 0])) < 0.02 * np.linalg.norm(root)


def test_oversampling_adds_points_between():
    settings = {"noise": 0.0, "noise_readouts": 0}
    once, twice = (simulate_scan(32, 3, 1, 0, oversampling=n, **settings) for n in (1, 2))
    np.testing.assert_allclose(twice.batches[0].samples[..., ::2], once.batches[0].samples, atol=1e-5)
    assert twice.header.encodings[0].encoded_matrix == (64, 32, 1)
    assert twice.header.encodings[0].encoded_fov_mm[0] == 2 * twice.header.encodings[0].recon_fov_mm[0]
    assert twice.batches[0].headers["center_sample"][0] == 32


@pytest.mark.parametrize("trajectory", ["radial", "spiral"])
def test_free_trajectories_sample_the_same_object(trajectory):
    scan = simulate_scan(32, 2, 1, 0, trajectory=trajectory, noise=0.0, noise_readouts=0, oversampling=1)
    (batch,) = scan.batches
    assert batch.trajectory is not None
    assert batch.trajectory.shape == (*batch.samples.shape[::2], 2)
    coil_images = scan.maps * scan.reference[0, 0] / np.sqrt((np.abs(scan.maps) ** 2).sum(axis=0))
    axis = np.arange(32) - 16
    readout = 1
    k = batch.trajectory[readout].astype(float)
    inner = np.linalg.norm(k, axis=1) < 0.2  # a pixel grid cannot follow the edges of ellipses further out
    wave_y, wave_x = (np.exp(-2j * np.pi * np.outer(k[:, axis_of], axis)) for axis_of in (1, 0))
    summed = np.einsum("ky,cyx,kx->ck", wave_y, coil_images, wave_x, optimize=True) / 32
    error = np.linalg.norm((summed - batch.samples[readout])[:, inner])
    assert error < 0.03 * np.linalg.norm(batch.samples[readout][:, inner])


def test_noise_has_its_covariance():
    scan = simulate_scan(64, 4, 4, 8, noise=0.3, noise_readouts=200)
    noise = scan.batches[0]
    assert has_flag(noise.headers["flags"], AcquisitionFlag.IS_NOISE_MEASUREMENT).all()
    flat = noise.samples.swapaxes(0, 1).reshape(4, -1)
    measured = flat @ flat.conj().T / flat.shape[1]
    np.testing.assert_allclose(measured, scan.noise_covariance, atol=0.003)
    assert np.trace(scan.noise_covariance).real / 4 == pytest.approx(0.09)
    clean = simulate_scan(64, 4, 4, 8, noise=0.0, noise_readouts=0)
    rest = (scan.batches[1].samples - clean.batches[0].samples).swapaxes(0, 1).reshape(4, -1)
    np.testing.assert_allclose(rest @ rest.conj().T / rest.shape[1], scan.noise_covariance, atol=0.02)


def test_headers_of_an_accelerated_scan():
    scan = simulate_scan(32, 2, 4, 8, repetitions=2, slices=3, partial_fourier=0.75, noise_readouts=2)
    headers = np.concatenate([batch.headers for batch in scan.batches])
    assert len(scan) == len(headers)
    np.testing.assert_array_equal(headers["scan_counter"], np.arange(len(headers)) + 1)
    assert (np.diff(headers["acquisition_time_stamp"].astype(int)) == 2).all()
    space = scan.header.encodings[0]
    limit = space.limits["kspace_encode_step_1"]
    assert (limit.minimum, limit.maximum, limit.center) == (0, 23, 8)
    assert (space.acceleration, space.calibration) == ((4, 1), "embedded")
    frame = scan.batches[1].headers
    steps = frame["idx"]["kspace_encode_step_1"].astype(int)
    both = has_flag(frame["flags"], AcquisitionFlag.IS_PARALLEL_CALIBRATION_AND_IMAGING)
    only = has_flag(frame["flags"], AcquisitionFlag.IS_PARALLEL_CALIBRATION)
    assert sorted(steps[both | only]) == list(range(4, 12))
    assert ((steps[both] - limit.center) % 4 == 0).all()
    assert ((steps[only] - limit.center) % 4 != 0).all()


def test_first_and_last_readouts_are_marked():
    scan = simulate_scan(16, 2, 2, 4, repetitions=2, slices=2)
    headers = np.concatenate([batch.headers for batch in scan.batches])
    for flag, count in (
        (AcquisitionFlag.FIRST_IN_SLICE, 4),
        (AcquisitionFlag.LAST_IN_SLICE, 4),
        (AcquisitionFlag.FIRST_IN_REPETITION, 2),
        (AcquisitionFlag.LAST_IN_REPETITION, 2),
        (AcquisitionFlag.LAST_IN_MEASUREMENT, 1),
    ):
        assert has_flag(headers["flags"], flag).sum() == count
    assert has_flag(headers["flags"][-1], AcquisitionFlag.LAST_IN_MEASUREMENT)
    order = [(int(b.headers["idx"]["repetition"][0]), int(b.headers["idx"]["slice"][0])) for b in scan.batches[1:]]
    assert order == [(0, 0), (0, 1), (1, 0), (1, 1)]
    heights = {float(b.headers["position"][0, 2]) for b in scan.batches[1:]}
    assert heights == {-3.0, 3.0}


def test_readouts_one_by_one_are_the_same_scan():
    scan = simulate_scan(16, 2, 2, 4, trajectory="radial")
    pieces = list(scan.readouts(3))
    assert max(len(piece) for piece in pieces) == 3
    np.testing.assert_array_equal(
        np.concatenate([piece.samples for piece in pieces]), np.concatenate([batch.samples for batch in scan.batches])
    )
    assert pieces[0].trajectory is None
    assert pieces[-1].trajectory is not None


def test_motion_moves_the_truth_and_the_data():
    still, moving = (simulate_scan(32, 2, 1, 0, repetitions=3, motion_degrees=d) for d in (0.0, 10.0))
    np.testing.assert_array_equal(still.reference[0], still.reference[2])
    assert np.linalg.norm(moving.reference[2] - moving.reference[0]) > 0.05 * np.linalg.norm(moving.reference[0])
    assert moving.reference.shape == (3, 1, 32, 32)


def test_the_seed_decides():
    one, same, other = (simulate_scan(8, 1, 1, 0, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one.batches[1].samples, same.batches[1].samples)
    assert not np.array_equal(one.batches[1].samples, other.batches[1].samples)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"matrix": 6}, "matrix is 6, allowed is 8 to 4096"),
        ({"matrix": 33}, "matrix is 33, an even number"),
        ({"coils": 0}, "coils is 0"),
        ({"acceleration": 0}, "acceleration is 0"),
        ({"calibration_lines": -1}, "calibration_lines is -1"),
        ({"repetitions": 0}, "repetitions is 0"),
        ({"slices": 0}, "slices is 0"),
        ({"oversampling": 3}, "oversampling is 3"),
        ({"noise": -0.1}, "noise is -0.1"),
        ({"noise_readouts": -1}, "noise_readouts is -1"),
        ({"partial_fourier": 0.5}, "partial_fourier is 0.5, allowed is above 0.5"),
        ({"partial_fourier": 0.8, "trajectory": "radial"}, "partial_fourier is 0.8, a radial scan has 1"),
        ({"trajectory": "epi"}, "trajectory is 'epi', allowed are"),
        ({"order": "random"}, "order is 'random', allowed are"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        simulate_scan(**{"matrix": 16, "coils": 2, "calibration_lines": 4, **settings})
