"""Transforms, windows, and the way to the reconstructed matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.engine.preparation.filters import (
    central,
    filter_kspace,
    readout_crop,
    resample,
    resize_image,
    to_image,
    to_kspace,
    tukey,
)


@settings(deadline=None)
@given(sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)), seed=st.integers(0, 2**32 - 1))
def test_transform_is_the_centered_sum(sizes, seed):
    image = torch.from_numpy(np.random.default_rng(seed).standard_normal((*sizes, 2)) @ [1, 1j])
    expected = image
    for axis, n in enumerate(sizes):
        index = torch.arange(n, dtype=torch.float64) - n // 2
        matrix = torch.exp(-2j * torch.pi * (index[:, None] * index / n)) / n**0.5
        expected = torch.tensordot(matrix, expected, dims=([1], [axis])).movedim(0, axis)
    kspace = to_kspace(image, (0, 1, 2))
    torch.testing.assert_close(kspace, expected)
    torch.testing.assert_close(to_image(kspace, (0, 1, 2)), image)


def test_windows():
    np.testing.assert_allclose(tukey(9, 0), 1)
    np.testing.assert_allclose(tukey(8, 1), 0.5 * (1 + np.cos(np.pi * np.abs(np.arange(8) - 4) / 4)), atol=1e-15)
    window = tukey(64, 0.5)
    assert window[32] == 1
    assert (window[16:48] == 1).all()
    assert window[0] == 0
    assert tukey(16, 0, extent=3).nonzero().flatten().tolist() == [5, 6, 7, 8, 9, 10, 11]
    with pytest.raises(ValueError, match="taper is 2"):
        tukey(8, 2)


def test_filter_keeps_the_center_and_takes_off_the_edge():
    kspace = torch.ones(2, 3, 16, 12, dtype=torch.complex64)
    filtered = filter_kspace(kspace, 1.0)
    assert filtered.dtype == kspace.dtype
    expected = tukey(16, 1.0)[:, None] * tukey(12, 1.0)
    torch.testing.assert_close(filtered[0, 0].real, expected.to(torch.float32))
    torch.testing.assert_close(filter_kspace(kspace, 1.0, (2,))[0, 0, :, 0].real, tukey(16, 1.0).to(torch.float32))


@settings(deadline=None)
@given(size=st.integers(1, 60), wanted=st.integers(1, 60))
def test_central_keeps_the_center(size, wanted):
    part = central(size, wanted)
    length = part.stop - part.start
    assert length == min(size, wanted)
    assert part.start + length // 2 == size // 2


def test_readout_oversampling():
    assert readout_crop(384, 560.0, 280.0) == slice(96, 288)
    assert readout_crop(256, 300.0, 300.0) == slice(0, 256)


@settings(deadline=None)
@given(small=st.integers(3, 20), large=st.integers(20, 50))
def test_band_limited_signals_survive_resampling(small, large):
    half = (small - 1) // 2
    coefficients = np.random.default_rng(small).standard_normal((2 * half + 1, 2)) @ [1, 1j]

    def sampled(n: int) -> torch.Tensor:
        position = (np.arange(n) - n // 2) / n
        waves = np.exp(2j * np.pi * position[:, None] * np.arange(-half, half + 1))
        return torch.from_numpy(waves @ coefficients)

    torch.testing.assert_close(resample(sampled(small), 0, large), sampled(large))
    torch.testing.assert_close(resample(sampled(large), 0, small), sampled(small))


def test_resize_crops_the_field_of_view_and_interpolates():
    """A Gaussian keeps its place in millimeters and its height."""
    encoded, fov = (128, 72, 1), (512.0, 288.0, 5.0)

    def gaussian(matrix: tuple[int, int, int], fov_mm: tuple[float, float, float]) -> torch.Tensor:
        x, y = ((torch.arange(n) - n // 2) * (f / n) for n, f in zip(matrix[:2], fov_mm[:2], strict=True))
        return torch.exp(-((x - 20) ** 2 + (y[:, None] + 30) ** 2) / (2 * 16.0**2))[None].to(torch.complex128)

    recon, recon_fov = (96, 100, 1), (256.0, 300.0, 5.0)
    found = resize_image(gaussian(encoded, fov), encoded, fov, recon, recon_fov)
    assert found.shape == (1, 100, 96)
    torch.testing.assert_close(found, gaussian(recon, recon_fov), atol=1e-3, rtol=0)


def test_resize_of_an_image_whose_oversampling_is_gone():
    image = torch.randn(2, 1, 144, 192, dtype=torch.complex64)
    fovs = (560.0, 210.0, 8.0), (280.0, 210.0, 8.0)
    assert torch.equal(resize_image(image, (384, 144, 1), fovs[0], (192, 144, 1), fovs[1]), image)
