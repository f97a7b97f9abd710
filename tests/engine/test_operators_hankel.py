"""Hankel matrices of k-space, and their low-rank projection in image space, against explicit float64 mathematics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.engine.operators import Fourier, Hankel, adjoint_mismatch
from scanside.engine.operators.hankel import coil_matrices, correlation_gram, image_low_rank, leading_subspace
from scanside.engine.simulation.coils import coil_maps
from scanside.engine.simulation.phantom import shepp_logan
from scanside.kernels.coil_matrix import apply

shapes = st.tuples(st.integers(1, 3), st.integers(4, 9), st.integers(4, 9))


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))


def windows_by_hand(k, size):
    rows = []
    for y in range(k.shape[1] - size + 1):
        for x in range(k.shape[2] - size + 1):
            rows.append(k[:, y : y + size, x : x + size].reshape(-1))
    return torch.stack(rows)


def wrapped(k, size):
    """K-space continued periodically, so that a window starts at every sample."""
    k = torch.cat([k, k[:, : size - 1]], 1)
    return torch.cat([k, k[:, :, : size - 1]], 2)


@given(shape=shapes, size=st.integers(1, 4))
def test_rows_are_the_windows(shape, size):
    k = random(*shape)
    assert torch.equal(Hankel(shape, size)(k), windows_by_hand(k, size))


@given(shape=shapes, size=st.integers(1, 4), batch=st.sampled_from([(), (2,)]))
def test_adjoint(shape, size, batch):
    assert adjoint_mismatch(Hankel(shape, size), dtype=torch.complex128, batch=batch) < 1e-12


@given(shape=shapes, size=st.integers(1, 4))
def test_the_mean_of_overlaps_undoes_the_matrix(shape, size):
    k, H = random(2, *shape), Hankel(shape, size)
    assert float((H.average(H(k)) - k).abs().max()) < 1e-12


def test_the_mean_of_overlaps_is_the_nearest_kspace():
    H, rows = Hankel((2, 6, 7), 3), random(20, 18)
    residual = rows - H(H.average(rows))
    assert float(H.H(residual).abs().max()) < 1e-12


@settings(max_examples=20)
@given(shape=st.tuples(st.integers(1, 3), st.integers(8, 13), st.integers(8, 13)), size=st.integers(1, 4))
def test_correlations_are_the_gram_matrix_of_wrapped_windows(shape, size):
    k = random(*shape)
    H = windows_by_hand(wrapped(k, size), size)
    images = Fourier(shape, dtype=torch.complex128).H(k)
    gram = correlation_gram(images, size)
    assert float((gram - H.mH @ H).abs().max()) < 1e-10 * float(gram.abs().max())


@settings(max_examples=20)
@given(height=st.integers(16, 21), width=st.integers(16, 21), size=st.integers(2, 4), seed=st.integers(0, 99))
def test_pixelwise_matrices_equal_the_explicit_projection(height, width, size, seed):
    """For any subspace: window rows times V V^H, overlaps averaged, away from the border of k-space."""
    coils = 3
    k, H = random(coils, height, width, seed=seed), Hankel((coils, height, width), size)
    subspace = torch.linalg.svd(random(60, coils * size**2, seed=seed + 1))[2].mH[:, :7]
    explicit = H.average(H(k) @ subspace @ subspace.mH)
    images = Fourier(k.shape, dtype=torch.complex128).H(k)
    pixelwise = apply(coil_matrices(subspace, coils, (height, width)).to(k.dtype), images)
    difference = (Fourier(k.shape, dtype=torch.complex128)(pixelwise) - explicit)[:, size:-size, size:-size]
    assert float(difference.norm() / explicit.norm()) < 2e-7  # the matrices are in single precision


@pytest.fixture(scope="module")
def coil_images():
    maps = torch.from_numpy(coil_maps(4).image((48, 48)))
    return maps * torch.from_numpy(shepp_logan().image((48, 48)))


def test_a_step_equals_the_singular_value_decomposition_of_the_wrapped_matrix(coil_images):
    size, rank = 5, 30
    k = Fourier(coil_images.shape, dtype=torch.complex128)(coil_images)
    longer = wrapped(k, size)
    H = windows_by_hand(longer, size)
    left, values, right = torch.linalg.svd(H, full_matrices=False)
    truncated = left[:, :rank] * values[:rank] @ right[:rank]
    total = torch.zeros_like(k)
    for place, row in enumerate(truncated.reshape(48, 48, 4, size, size).flatten(0, 1)):
        y, x = place // 48, place % 48
        rows, columns = (y + torch.arange(size)) % 48, (x + torch.arange(size)) % 48
        total[:, rows[:, None], columns[None]] += row
    expected = Fourier(k.shape, dtype=torch.complex128).H(total / size**2)
    result = image_low_rank(coil_images, size, rank)
    assert float((result - expected).norm() / expected.norm()) < 1e-6


def test_noise_goes_and_the_image_stays(coil_images):
    noise = 0.05 * random(*coil_images.shape, seed=3)
    after = image_low_rank(coil_images + noise, 6, 40)
    before, left = float(noise.norm()), float((after - coil_images).norm())
    assert left < 0.7 * before


def test_full_rank_changes_nothing(coil_images):
    after = image_low_rank(coil_images, 4, 4 * 16)
    assert float((after - coil_images).norm() / coil_images.norm()) < 1e-6


def test_the_subspace_is_orthonormal_and_the_leading_one():
    H = random(40, 12)
    V = leading_subspace(H.mH @ H, 5)
    values = torch.linalg.svdvals(H)
    assert float((V.mH @ V - torch.eye(5)).abs().max()) < 1e-12
    assert float((H @ V).norm()) == pytest.approx(float(values[:5].norm()), rel=1e-10)


@pytest.mark.parametrize("rank", [0, 13])
def test_the_rank_fits(rank):
    with pytest.raises(ValueError, match=f"rank is {rank}, it must lie between 1 and the size 12"):
        leading_subspace(torch.eye(12), rank)


@pytest.mark.parametrize("window", [0, 7])
def test_the_window_fits(window):
    with pytest.raises(ValueError, match=f"window is {window}"):
        Hankel((2, 6, 8), window)
    with pytest.raises(ValueError, match=f"window is {window}"):
        correlation_gram(random(2, 6, 8), window)


def test_the_subspace_has_the_rows_of_a_window():
    with pytest.raises(ValueError, match="subspace has 10 rows"):
        coil_matrices(random(10, 2), 2, (16, 16))
