"""How close an image is to its reference: PSNR, SSIM, HFEN and NRMSE, all on the magnitude.

Images are compared as they are. Bring both to max|x| = 1 with `unit_scale` first, as the literature does, unless both are
on one scale already.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
from scipy.ndimage import convolve
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

__all__ = ["Scores", "evaluate", "hfen", "nrmse", "psnr", "ssim", "unit_scale"]

_LOG_SIZE, _LOG_SIGMA = 15, 1.5
_SSIM_WINDOW = 7


class Scores(msgspec.Struct, frozen=True):
    """The four figures of one image."""

    psnr: float
    """dB, data range 1; higher is better."""
    ssim: float
    """1 for equal images."""
    hfen: float
    """Error of edges and fine detail; 0 for equal images."""
    nrmse: float
    """Relative error of the magnitude; 0 for equal images."""


def evaluate(reference: np.ndarray, image: np.ndarray) -> Scores:
    """All four figures of a picture (rows, columns) with data range 1, both images as they are.

    Raises ValueError as the single figures do.
    """
    return Scores(psnr(reference, image), ssim(reference, image), hfen(reference, image), nrmse(reference, image))


def unit_scale(image: np.ndarray) -> np.ndarray:
    """|x| / max|x|, float64. Raises ValueError when the image is zero throughout or has numbers that are not finite."""
    magnitude = _magnitude(image, "image")
    top = magnitude.max(initial=0.0)
    if top == 0.0:
        raise ValueError("image is zero throughout, so it has no scale")
    return np.asarray(magnitude / top)


def psnr(reference: np.ndarray, image: np.ndarray, data_range: float = 1.0) -> float:
    """Peak signal-to-noise ratio 10 log10(data_range^2 / mean squared error) in dB; inf for equal images.

    Raises ValueError for different shapes, numbers that are not finite, or a data range that is not above 0.
    """
    reference, image = _pair(reference, image)
    _check_range(data_range)
    if np.array_equal(reference, image):
        return math.inf
    return float(peak_signal_noise_ratio(reference, image, data_range=data_range))  # type: ignore[no-untyped-call]


def ssim(reference: np.ndarray, image: np.ndarray, data_range: float = 1.0) -> float:
    """Mean structural similarity with a uniform window of 7 x 7 (Wang et al., IEEE TIP 13, 2004); 1 for equal images.

    Raises ValueError as `psnr` does, and for images that are not two-dimensional or smaller than the window.
    """
    reference, image = _pair(reference, image)
    _check_range(data_range)
    if reference.ndim != 2 or min(reference.shape) < _SSIM_WINDOW:
        raise ValueError(f"images have shape {reference.shape}, SSIM needs two axes of at least {_SSIM_WINDOW} pixels")
    score = structural_similarity(reference, image, data_range=data_range, win_size=_SSIM_WINDOW)  # type: ignore[no-untyped-call]
    return float(score)


def hfen(reference: np.ndarray, image: np.ndarray) -> float:
    """High-frequency error norm: Frobenius norm of the difference after a Laplacian of Gaussian.

    15 x 15 kernel, sigma 1.5 pixels, zeros beyond the edge (Ravishankar and Bresler, IEEE TMI 30, 2011). Not divided by the
    norm of the reference, as in the publications on generative priors; on images with max|x| = 1. Raises ValueError for
    different shapes, numbers that are not finite, or images that are not two-dimensional.
    """
    reference, image = _pair(reference, image)
    if reference.ndim != 2:
        raise ValueError(f"images have shape {reference.shape}, HFEN needs two axes")
    return float(np.linalg.norm(convolve(image - reference, _laplacian_of_gaussian(), mode="constant")))


def nrmse(reference: np.ndarray, image: np.ndarray, *, fit_scale: bool = False) -> float:
    """Norm of the difference of the magnitudes over the norm of the reference; 0 for equal images.

    fit_scale: multiply the image by the factor that makes this least, so that a wrong overall scale costs nothing (at most 1
    then). Raises ValueError for different shapes, numbers that are not finite, or a reference that is zero throughout.
    """
    reference, image = _pair(reference, image)
    norm = float(np.linalg.norm(reference))
    if norm == 0.0:
        raise ValueError("reference is zero throughout, so no error is relative to it")
    energy = float(np.vdot(image, image))
    if fit_scale and energy > 0.0:
        image = image * (float(np.vdot(image, reference)) / energy)
    return float(np.linalg.norm(image - reference)) / norm


def _pair(reference: np.ndarray, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if np.shape(reference) != np.shape(image):
        raise ValueError(
            f"reference has shape {np.shape(reference)}, image has shape {np.shape(image)}; they must agree"
        )
    return _magnitude(reference, "reference"), _magnitude(image, "image")


def _magnitude(image: np.ndarray, name: str) -> np.ndarray:
    magnitude: np.ndarray = np.abs(np.asarray(image)).astype(np.float64)
    if magnitude.size == 0:
        raise ValueError(f"{name} is empty")
    bad = int(np.count_nonzero(~np.isfinite(magnitude)))
    if bad:
        raise ValueError(f"{name} has {bad} pixels that are not finite")
    return magnitude


def _check_range(data_range: float) -> None:
    if not data_range > 0:
        raise ValueError(f"data_range is {data_range}, it must be above 0")


def _laplacian_of_gaussian() -> np.ndarray:
    """The kernel of MATLAB's fspecial('log', 15, 1.5): Gaussian of sum 1, and the whole of sum 0."""
    axis = np.arange(_LOG_SIZE) - _LOG_SIZE // 2
    square = np.add.outer(axis**2, axis**2)
    gauss = np.exp(-square / (2 * _LOG_SIGMA**2))
    kernel: np.ndarray = gauss / gauss.sum() * (square - 2 * _LOG_SIGMA**2) / _LOG_SIGMA**4
    return np.asarray(kernel - kernel.mean())
