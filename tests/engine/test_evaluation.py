"""Image scores against their definitions, and what they do at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scanside.engine.evaluation import Scores, evaluate, hfen, nrmse, psnr, ssim, unit_scale
from scipy.ndimage import gaussian_laplace

FIGURES = (psnr, ssim, hfen, nrmse)


def picture(rng, shape=(24, 20)):
    image = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    return image / np.abs(image).max()


def test_equal_images(rng):
    x = picture(rng)
    assert evaluate(x, x.copy()) == Scores(psnr=math.inf, ssim=1.0, hfen=0.0, nrmse=0.0)


def test_only_the_magnitude_counts(rng):
    x = picture(rng)
    turned = x * np.exp(1j * rng.uniform(0, 2 * np.pi, x.shape))
    scores = evaluate(x, turned)
    assert scores.nrmse < 1e-12
    assert scores.psnr > 200


def test_psnr_is_its_definition(rng):
    x, y = picture(rng), picture(rng)
    error = np.mean((np.abs(x) - np.abs(y)) ** 2)
    assert psnr(x, y) == pytest.approx(-10 * math.log10(error))
    assert psnr(x, y, 255.0) == pytest.approx(psnr(x, y) + 20 * math.log10(255))


def test_hfen_ignores_smooth_errors_and_sees_edges():
    y, x = np.mgrid[:64, :64] / 64
    truth = np.exp(-8 * ((x - 0.5) ** 2 + (y - 0.5) ** 2))
    smooth = truth + 0.1 * np.exp(-40 * ((x - 0.5) ** 2 + (y - 0.5) ** 2))
    edge = truth + 0.1 * (np.hypot(x - 0.5, y - 0.5) < 0.12)
    assert hfen(truth, smooth) < 0.3 * hfen(truth, edge)


def test_hfen_agrees_with_the_continuous_operator(rng):
    x, y = np.zeros((40, 40)), np.zeros((40, 40))
    y[20, 20] = 1.0
    sampled = np.linalg.norm(gaussian_laplace(y, 1.5, truncate=7 / 1.5))
    assert hfen(x, y) == pytest.approx(sampled, rel=0.03)


def test_hfen_of_a_constant_error_is_only_at_the_border():
    flat = np.ones((40, 40))
    whole = hfen(np.zeros((40, 40)), flat)
    wide = hfen(np.zeros((80, 80)), np.pad(flat, 20, mode="edge"))
    assert wide**2 == pytest.approx(2 * whole**2, rel=0.15)  # grows with the border, not with the area


@given(st.floats(1e-3, 1e3))
def test_a_wrong_scale_costs_nothing_where_it_is_fitted(factor):
    x = picture(np.random.default_rng(3))
    assert nrmse(x, factor * x, fit_scale=True) < 1e-12
    assert nrmse(x, factor * x) == pytest.approx(abs(factor - 1), abs=1e-12)


def test_fitting_the_scale_is_the_best_scale(rng):
    x, y = picture(rng), picture(rng)
    best = nrmse(x, y, fit_scale=True)
    assert all(best <= nrmse(x, scale * y) + 1e-12 for scale in np.linspace(0.1, 3, 60))


def test_a_zero_image_is_all_error(rng):
    x = picture(rng)
    assert nrmse(x, np.zeros_like(x), fit_scale=True) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="reference is zero throughout"):
        nrmse(np.zeros_like(x), x)


@pytest.mark.parametrize("figure", FIGURES)
def test_shapes_must_agree(figure):
    with pytest.raises(ValueError, match=r"reference has shape \(8, 9\), image has shape \(9, 8\)"):
        figure(np.ones((8, 9)), np.ones((9, 8)))


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_must_be_finite(figure, bad):
    x = np.ones((9, 9))
    y = x.copy()
    y[4, 4] = bad
    with pytest.raises(ValueError, match="image has 1 pixels that are not finite"):
        figure(x, y)


@pytest.mark.parametrize("figure", FIGURES)
def test_images_must_not_be_empty(figure):
    with pytest.raises(ValueError, match="reference is empty"):
        figure(np.ones((0, 4)), np.ones((0, 4)))


def test_ssim_needs_room_for_its_window():
    with pytest.raises(ValueError, match=r"shape \(6, 30\), SSIM needs two axes of at least 7"):
        ssim(np.ones((6, 30)), np.ones((6, 30)))


@pytest.mark.parametrize("data_range", [0.0, -1.0, math.nan])
def test_the_data_range_is_positive(data_range):
    with pytest.raises(ValueError, match="data_range"):
        psnr(np.ones((8, 8)), np.ones((8, 8)), data_range)


def test_unit_scale(rng):
    x = 37 * picture(rng)
    assert unit_scale(x).max() == 1.0
    np.testing.assert_allclose(unit_scale(x) * np.abs(x).max(), np.abs(x), rtol=1e-12)
    with pytest.raises(ValueError, match="zero throughout"):
        unit_scale(np.zeros((3, 3)))
