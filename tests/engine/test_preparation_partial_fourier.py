"""Homodyne and POCS on a phantom with a smooth phase and on scanner data, against zero filling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.engine.preparation.filters import to_image, to_kspace
from scanside.engine.preparation.partial_fourier import SampledRange, homodyne, partial_axes, pocs, sampled_range


def phantom(nz: int, ny: int, nx: int) -> torch.Tensor:
    z, y, x = np.meshgrid(*((np.arange(n) - n // 2) * 2 / n for n in (nz, ny, nx)), indexing="ij")
    inside = (x / 0.7) ** 2 + (y / 0.8) ** 2 + (z / 0.8) ** 2 < 1
    detail = 1 + 0.5 * (np.abs(x - 0.3 * y) < 0.06) - 0.4 * ((x + 0.3) ** 2 + (y - 0.2) ** 2 < 0.05)
    return torch.from_numpy(inside * detail * np.exp(1j * (1.2 * np.cos(1.7 * x) + 0.9 * y + 0.4 * x * y + 0.5 * z)))


def cut(image: torch.Tensor, ranges: dict[int, SampledRange]) -> torch.Tensor:
    """The image with everything outside of the ranges missing from k-space."""
    kspace = to_kspace(image, (-3, -2, -1))
    for axis, rows in ranges.items():
        kspace.narrow(axis, 0, rows.start).zero_()
        kspace.narrow(axis, rows.stop, rows.size - rows.stop).zero_()
    return to_image(kspace, (-3, -2, -1))


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(found - truth) / torch.linalg.vector_norm(truth)).item()


CASES = {
    "lower rows": ((1, 96, 80), {-2: SampledRange(96, 0, 60)}),
    "upper rows": ((1, 96, 80), {-2: SampledRange(96, 36, 96)}),
    "odd size": ((1, 97, 80), {-2: SampledRange(97, 36, 97)}),
    "asymmetric echo": ((1, 96, 80), {-1: SampledRange(80, 28, 80)}),
    "volume, z": ((40, 32, 32), {-3: SampledRange(40, 0, 26)}),
}


@pytest.mark.parametrize("method", [homodyne, pocs])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_beats_zero_filling(case, method, dtype):
    shape, ranges = CASES[case]
    truth = phantom(*shape).to(dtype)
    measured = cut(truth, ranges)
    restored = method(measured, ranges)
    assert restored.dtype == dtype
    assert error(restored, truth) < 0.5 * error(measured, truth)
    assert error(restored.abs(), truth.abs()) < 0.6 * error(measured.abs(), truth.abs())


@pytest.mark.parametrize("method", [homodyne, pocs])
def test_two_axes(method):
    ranges = {-2: SampledRange(96, 24, 96), -1: SampledRange(80, 0, 60)}
    truth = phantom(1, 96, 80)
    measured = cut(truth, ranges)
    assert error(method(measured, ranges), truth) < 0.75 * error(measured, truth)


@pytest.mark.parametrize("method", [homodyne, pocs])
@settings(deadline=None)
@given(size=st.integers(24, 65), left_out=st.integers(1, 8), upper=st.booleans())
def test_a_real_image_of_one_sign_is_restored_exactly(method, size, left_out, upper):
    """Homodyne: up to rounding, for any cut; POCS comes closer with every step."""
    generator = np.random.default_rng(size)
    truth = torch.from_numpy(4 + generator.uniform(0, 1, (1, size, 5))) + 0j
    rows = SampledRange(size, 0, size - left_out) if upper else SampledRange(size, left_out, size)
    if rows.size % 2 == 0:
        truth = truth - _highest_frequency(truth)
    measured = cut(truth, {-2: rows})
    restored = method(measured, {-2: rows})
    if method is homodyne:
        torch.testing.assert_close(restored, truth)
    else:
        assert error(restored, truth) < 0.3 * error(measured, truth) + 1e-12


def _highest_frequency(image: torch.Tensor) -> torch.Tensor:
    """The component along y that has no mirror image."""
    kspace = to_kspace(image, (-2,))
    kspace[:, 1:] = 0
    return to_image(kspace, (-2,))


def test_pocs_keeps_measured_rows():
    ranges = {-2: SampledRange(96, 36, 96)}
    measured = cut(phantom(1, 96, 80), ranges)
    before, after = (to_kspace(image, (-2,)) for image in (measured, pocs(measured, ranges)))
    torch.testing.assert_close(after[:, 44:], before[:, 44:])
    assert after[:, :36].abs().max() > 0


def test_range_of_an_undersampled_partial_scan():
    rows = torch.zeros(128, dtype=torch.bool)
    rows[40:128:3] = True
    found = sampled_range(rows)
    assert (found.start, found.stop, found.below, found.above, found.half_width) == (40, 128, 24, 63, 24)
    assert found.fraction == pytest.approx(88 / 127)
    assert found.is_partial


def test_symmetric_and_nearly_complete_ranges_are_not_partial():
    assert not SampledRange(128, 0, 128).is_partial
    assert not SampledRange(128, 0, 126).is_partial
    assert not SampledRange(144, 18, 124).is_partial  # low phase resolution, padded with zeros at both ends


def test_partial_axes_of_a_mask():
    mask = torch.zeros(16, 32, 24, dtype=torch.bool)
    mask[:, 10:, :20] = True
    assert partial_axes(mask) == {-2: SampledRange(32, 10, 32), -1: SampledRange(24, 0, 20)}
    assert partial_axes(mask[:1, :, 0]) == {-2: SampledRange(32, 10, 32)}
    assert partial_axes(torch.ones(1, 32, dtype=torch.bool)) == {}


def test_nothing_partial_changes_nothing():
    image = phantom(1, 32, 32)
    assert homodyne(image, {}) is image


def test_a_range_without_the_center_is_refused():
    with pytest.raises(ValueError, match="center at 16"):
        SampledRange(32, 17, 32)
    with pytest.raises(ValueError, match="none of 8 rows"):
        sampled_range(torch.zeros(8, dtype=torch.bool))


@pytest.mark.real_data
@pytest.mark.parametrize("method", [homodyne, pocs])
def test_missing_rows_of_brain_images_resemble_the_true_ones(real_data, method):
    brain = torch.from_numpy(np.load(real_data("mri/siat_dev.npz"))["image"][:3])[:, None]
    ranges = {-2: SampledRange(256, 96, 256)}
    restored, true = (to_kspace(image, (-2,))[..., :96, :] for image in (method(cut(brain, ranges), ranges), brain))
    correlation = (restored.conj() * true).sum().real / (restored.norm() * true.norm())
    assert correlation > 0.6
