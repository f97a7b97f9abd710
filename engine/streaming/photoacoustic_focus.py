"""Autofocus: the delay or the speed of sound at which what a shot shows is drawn together most."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Search", "find_focus", "sharpness"]

Search = tuple[float, float, float]
"""Reach to both sides, coarse step and fine step."""


def sharpness(image: NDArray[np.float32]) -> float:
    """n sum(p^2) / sum(p)^2 over p = max(image, 0), times the fourth root of the energy sum(image^2); 0 for no image.

    Out of focus a point becomes a ring, which has the same sum over more pixels. But far from the focus parts of signals that
    miss each other can make a few bright spots that are more concentrated than the picture, and noise moves the peak; energy is
    greatest where what the elements heard agrees, with a broader peak. Only images of the same signals compare.
    """
    values = image.ravel().astype(np.float64)
    positive = np.maximum(values, 0)
    total = float(positive.sum())
    return float(positive @ positive) * positive.size / total**2 * float(values @ values) ** 0.25 if total > 0 else 0.0


def find_focus(image: Callable[[float], NDArray[np.float32]], start: float, search: Search) -> tuple[float, float]:
    """Value with the sharpest image around `start`, and its sharpness over that at `start`.

    A coarse sweep over the whole reach, a fine one around its best, and the vertex of the parabola through the three best. The
    peak may be no narrower than the coarse step.
    """
    reach, coarse, fine = search
    before = sharpness(image(start))
    best, _ = _sweep(image, start + np.arange(-reach, reach + coarse / 2, coarse))
    values = best + np.arange(-coarse, coarse + fine / 2, fine)
    best, scores = _sweep(image, values)
    place = int(np.argmax(scores))
    if 0 < place < len(values) - 1:
        left, middle, right = scores[place - 1 : place + 2]
        curvature = left - 2 * middle + right
        best += fine * 0.5 * (left - right) / curvature if curvature < 0 else 0.0
    return best, sharpness(image(best)) / before if before > 0 else np.inf


def _sweep(image: Callable[[float], NDArray[np.float32]], values: NDArray[np.float64]) -> tuple[float, list[float]]:
    scores = [sharpness(image(float(value))) for value in values]
    return float(values[int(np.argmax(scores))]), scores
