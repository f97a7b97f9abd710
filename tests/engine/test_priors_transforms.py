"""Domains of priors: ways there, ways back, adjoints, against explicit float64 mathematics."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given
from hypothesis import strategies as st
from scanside.engine.config_priors import TransformConfig
from scanside.engine.errors import ConfigError
from scanside.engine.operators import adjoint_mismatch
from scanside.engine.priors.domains import filtered_prior, hankel_prior, image_prior
from scanside.engine.priors.transforms import (
    ANALYSES,
    HankelMatrix,
    Kspace,
    Transform,
    UndecimatedHaar,
    haar_merge,
    haar_split,
    kspace_weights,
    window_mask,
)

shapes = st.tuples(st.integers(2, 13), st.integers(2, 13))
configs = st.builds(
    TransformConfig,
    kind=st.sampled_from(sorted(ANALYSES)),
    copies=st.integers(1, 3),
    split=st.booleans(),
    weight_scale=st.floats(0.02, 2),
    weight_power=st.sampled_from([0.0, 0.5, 0.6]),
    window=st.integers(0, 6),
    window_shape=st.sampled_from(["square", "disc"]),
    hankel_window=st.integers(2, 9),
    hankel_stride=st.integers(1, 5),
)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))


def centered_dft(size):
    index = torch.arange(size, dtype=torch.float64) - size // 2
    return torch.exp(-2j * torch.pi * torch.outer(index, index) / size)


@given(config=configs, shape=shapes, batch=st.sampled_from([(), (3,), (2, 1, 2)]))
def test_there_and_back(config, shape, batch):
    transform, image = Transform(config, shape), random(*batch, *shape)
    channels = transform.forward(image)
    assert channels.shape[1] == transform.channels
    assert not channels.is_complex()
    back = transform.inverse(channels, image)
    assert back.shape == image.shape
    assert float((back - image).abs().max()) < 1e-9


@given(config=configs, shape=shapes)
def test_adjoint(config, shape):
    analysis = Transform(config, shape).analysis
    assert adjoint_mismatch(analysis, dtype=torch.complex128, batch=(2,)) < 1e-12


@given(shape=shapes, window=st.integers(1, 6))
def test_what_is_not_seen_comes_from_before(shape, window):
    """An image that differs inside the window only has the same channels; the way back keeps its own window."""
    config = TransformConfig(kind="kspace", window=window, weight_power=0.5)
    transform, image = Transform(config, shape), random(*shape)
    unseen = Kspace(shape, config).weights == 0
    spectrum = random(*shape, seed=1) * unseen
    other = image + centered_dft(shape[0]).conj() @ spectrum @ centered_dft(shape[1]).conj() / (shape[0] * shape[1])
    channels = transform.forward(image)
    assert float((channels - transform.forward(other)).abs().max()) < 1e-9
    assert float((transform.inverse(channels, other) - other).abs().max()) < 1e-9
    assert float((transform.inverse(channels, image) - image).abs().max()) < 1e-9


@given(shape=shapes)
def test_weighted_kspace_is_the_weight_times_the_plain_transform(shape):
    image, config = random(*shape), TransformConfig(kind="kspace", weight_scale=0.3, weight_power=0.6)
    kspace = centered_dft(shape[0]) @ image @ centered_dft(shape[1])
    expected = kspace_weights(shape, 0.3, 0.6) * kspace
    assert float((Kspace(shape, config)(image)[0] - expected).abs().max()) < 1e-9 * float(expected.abs().max() + 1)


def test_the_weight_is_the_published_formula():
    weights = kspace_weights((256, 128), 0.022, 0.5)
    assert weights[128, 64] == 0
    assert float(weights[0, 64]) == pytest.approx(0.022 * 0.5)
    assert float(weights[128, 65]) == pytest.approx(0.022 / 128)
    assert float(kspace_weights((256, 128), 0.08, 0.6)[129, 65]) == pytest.approx(
        (0.08**2 * (1 / 256**2 + 1 / 128**2)) ** 0.6
    )


def test_the_scale_of_the_weight_is_a_factor():
    assert torch.allclose(kspace_weights((16, 12), 0.2, 0.5), kspace_weights((16, 12), 0.05, 0.5) * 4)


def test_the_window_of_51_points_is_the_published_one():
    mask = window_mask((256, 256), 51)
    rows = mask.any(1).nonzero().flatten()
    assert (int(rows[0]), int(rows[-1]), int(mask.sum())) == (103, 153, 51 * 51)


def test_a_disc_has_its_area_and_lies_in_its_square():
    disc = window_mask((64, 64), 40, "disc")
    assert int(disc.sum()) == pytest.approx(np.pi * 20**2, rel=0.02)
    assert not bool((disc & ~window_mask((64, 64), 41)).any())


@given(shape=shapes, window=st.integers(2, 5), stride=st.integers(1, 5))
def test_the_hankel_matrix_by_its_definition(shape, window, stride):
    """Row by row the windows of weighted k-space, on each `stride`-th line and on the last."""
    config = TransformConfig(kind="hankel", weight_power=0.5, hankel_window=window, hankel_stride=stride)
    analysis, image, size = HankelMatrix(shape, config), random(*shape), min(window, *shape)
    k = Kspace(shape, config)(image)[0]
    last = shape[0] - size
    lines = [y for y in range(last + 1) if y % min(stride, size) == 0 or y == last]
    rows = [k[y : y + size, x : x + size].flatten() for y in lines for x in range(shape[1] - size + 1)]
    assert torch.equal(analysis(image)[0], torch.stack(rows))
    assert len(rows) == len(lines) * analysis.line


@given(shape=shapes, window=st.integers(2, 5), stride=st.integers(1, 5))
def test_the_way_back_from_a_hankel_matrix_is_least_squares(shape, window, stride):
    """Of any matrix, the k-space whose own matrix is nearest to it: the residual is orthogonal to all of them."""
    analysis = HankelMatrix(shape, TransformConfig(kind="hankel", hankel_window=window, hankel_stride=stride))
    rows = random(*analysis.range)
    residual = rows - analysis(analysis.inverse(rows, torch.zeros(shape, dtype=rows.dtype)))
    assert float(analysis.H(residual).abs().max()) < 1e-9 * float(rows.abs().max()) * shape[0] * shape[1]


def test_inside_a_sample_stands_in_window_times_window_entries():
    spectrum = torch.zeros(32, 32, dtype=torch.complex128)
    spectrum[16:20, 12:20] = random(4, 8)
    image = torch.fft.fftshift(torch.fft.ifft2(torch.fft.ifftshift(spectrum)))
    for stride in (1, 2, 4):
        matrix = HankelMatrix((32, 32), TransformConfig(kind="hankel", hankel_window=8, hankel_stride=stride))(image)
        energy = float(matrix.abs().square().sum() / spectrum.abs().square().sum())
        assert energy == pytest.approx(64 / stride)


def test_a_prior_of_hankel_matrices_is_given_lines_of_windows():
    """A network that shifts along the line takes nothing from the next one, whatever the number of lines and images."""
    transform = Transform(TransformConfig(kind="hankel", hankel_window=3), (21, 11))
    u = torch.randn(2, *transform.forward(random(21, 11)).shape[1:])
    prior = hankel_prior(lambda x, sigma: x.roll(1, -2) * sigma.reshape(-1, 1, 1, 1), transform.analysis)
    lines = u.reshape(2, 2, 19, 9, 9)
    expected = lines.roll(1, -2).reshape(u.shape) * torch.tensor([2.0, 3.0]).reshape(2, 1, 1, 1)
    torch.testing.assert_close(prior(u, torch.tensor([2.0, 3.0])), expected)


@given(shape=shapes)
def test_undecimated_haar_by_its_definition(shape):
    """Full convolution of the reflected image with the published filters."""
    image = random(*shape)
    low, high = np.array([1, 1]) / np.sqrt(2), np.array([-1, 1]) / np.sqrt(2)
    padded = np.pad(image.numpy(), 1, mode="symmetric")
    bands = []
    for along_y in (low, high):
        for along_x in (low, high):
            rows = np.apply_along_axis(np.convolve, 0, padded, along_y, mode="valid")
            bands.append(np.apply_along_axis(np.convolve, 1, rows, along_x, mode="valid"))
    np.testing.assert_allclose(UndecimatedHaar(shape)(image).numpy(), np.stack(bands), atol=1e-12)


@given(shape=shapes)
def test_undecimated_haar_has_four_times_the_energy(shape):
    image = torch.nn.functional.pad(random(*shape), (1, 1, 1, 1))
    energy = float(UndecimatedHaar(image.shape)(image).abs().square().sum())
    assert energy == pytest.approx(4 * float(image.abs().square().sum()))


@given(height=st.integers(1, 6), width=st.integers(1, 6))
def test_haar_bands_are_those_of_pywavelets(height, width):
    plane = random(2 * height, 2 * width)
    low, (along_y, along_x, both) = pywt.dwt2(plane.numpy(), "haar")
    np.testing.assert_allclose(haar_split(plane).numpy(), np.stack([low, along_x, along_y, both]), atol=1e-12)


@given(shape=shapes)
def test_haar_bands_keep_the_energy(shape):
    plane = random(*shape)
    bands = haar_split(plane)
    assert float(bands.norm()) == pytest.approx(float(plane.norm()))
    assert float((haar_merge(bands, shape) - plane).abs().max()) < 1e-12


def test_the_mean_of_the_copies_comes_back():
    transform, image = Transform(TransformConfig(copies=3), (4, 5)), random(4, 5)
    channels = transform.forward(image)
    assert channels.shape == (1, 6, 4, 5)
    channels[:, :2] += 3.0
    assert torch.allclose(transform.inverse(channels, image), image + 1 + 1j)


def test_real_and_imaginary_part_as_batch():
    transform, image = Transform(TransformConfig(copies=3, split=True), (4, 5)), random(2, 4, 5)
    channels = transform.forward(image)
    assert channels.shape == (4, 3, 4, 5)
    assert torch.equal(channels[:2, 0], image.real)
    assert torch.equal(channels[2:, 2], image.imag)


def real_matrix(function, shape):
    """A real-linear function of complex images (y, x) as a matrix on stacked real and imaginary parts."""
    size = shape[0] * shape[1]
    columns = []
    for part in (1.0, 1j):
        for place in range(size):
            unit = torch.zeros(size, dtype=torch.complex128)
            unit[place] = part
            columns.append(function(unit.reshape(shape)).flatten())
    return torch.stack(columns, 1)


@pytest.mark.parametrize("kind", ["image", "kspace", "kspace_haar"])
@pytest.mark.parametrize(("copies", "split"), [(1, False), (3, False), (3, True)])
def test_a_prior_of_images_is_the_prior_of_every_domain_that_keeps_lengths(kind, copies, split):
    """Gaussian images, for which both posterior means are known: that in the domain, by its covariance, is T times that of
    the image at the lesser noise level."""
    shape, sigma = (4, 4), 0.7
    transform = Transform(TransformConfig(kind=kind, copies=copies, split=split), shape)
    root = torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    covariance = root @ root.T

    def denoise(x, level):
        wiener = covariance @ torch.linalg.inv(covariance + float(level[0]) ** 2 * torch.eye(32))
        return (x.flatten(1) @ wiener.T).reshape(x.shape)

    T = real_matrix(lambda image: transform.forward(image), shape)
    scale = float(T[:, 0].norm())  # noise as strong as before, relative to the domain
    total = T @ covariance @ T.T
    u = torch.randn(len(T), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    expected = total @ torch.linalg.solve(total + (sigma * scale) ** 2 * torch.eye(len(T)), u)
    channels = u.reshape(transform.forward(random(*shape)).shape)
    found = image_prior(denoise, transform)(channels, torch.full((len(channels),), sigma * scale, dtype=torch.float64))
    assert float((found.flatten() - expected).abs().max()) < 1e-9 * float(expected.abs().max())


def test_haar_bands_take_half_of_the_noise_level():
    levels = []
    transform = Transform(TransformConfig(kind="haar"), (6, 6))
    image_prior(lambda x, sigma: levels.append(float(sigma[0])) or x, transform)(torch.zeros(1, 8, 7, 7), torch.ones(1))
    assert levels == [0.5]


@pytest.mark.parametrize(
    "config", [TransformConfig(kind="kspace", window=2), TransformConfig(kind="kspace", weight_power=0.5)]
)
def test_weighted_or_cut_kspace_needs_its_own_network(config):
    with pytest.raises(ConfigError, match="needs a network that was trained on it"):
        image_prior(lambda x, sigma: x, Transform(config, (8, 8)))


@pytest.mark.parametrize("kind", ["kspace", "kspace_haar"])
@pytest.mark.parametrize(("power", "window", "copies"), [(0.5, 0, 1), (0.5, 0, 3), (0.6, 2, 1), (0.0, 2, 2)])
def test_a_prior_of_filtered_images_is_the_prior_of_weighted_kspace(kind, power, window, copies):
    """Gaussian images again: the posterior mean in weighted k-space, of any c, from that of the filtered image with c = 1."""
    shape, sigma = (4, 4), 0.05
    config = TransformConfig(kind=kind, copies=copies, weight_scale=0.3, weight_power=power, window=window)
    transform = Transform(config, shape)
    home = Transform(TransformConfig(kind="filtered", weight_power=power, window=window), shape)
    root = torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    filtered = real_matrix(lambda image: home.forward(image), shape)
    known = filtered @ root @ root.T @ filtered.T

    def denoise(x, level):
        wiener = known @ torch.linalg.inv(known + float(level[0]) ** 2 * torch.eye(32))
        return (x.flatten(1) @ wiener.T).reshape(x.shape)

    T = real_matrix(lambda image: transform.forward(image), shape)
    total = T @ root @ root.T @ T.T
    u = torch.randn(len(T), dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    expected = total @ torch.linalg.solve(total + sigma**2 * torch.eye(len(T)), u)
    channels = u.reshape(transform.forward(random(*shape)).shape)
    found = filtered_prior(denoise, transform)(channels, torch.full((len(channels),), sigma, dtype=torch.float64))
    assert float((found.flatten() - expected).abs().max()) < 1e-8 * float(expected.abs().max())


def test_a_prior_of_filtered_images_serves_kspace_only():
    with pytest.raises(ConfigError, match="'kspace' or 'kspace_haar'"):
        filtered_prior(lambda x, sigma: x, Transform(TransformConfig(kind="haar"), (8, 8)))
