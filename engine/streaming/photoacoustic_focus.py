"""Autofocus: the delay or the speed of sound at which what a shot shows is drawn together most."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Search", "agreement", "find_focus", "sharpness"]

Search = tuple[float, float, float]
"""Reach to both sides, coarse step and fine step."""
Picture = Callable[[float], NDArray[np.float32]]
"""The image for a value of the parameter."""
_BESIDE = 2
"""Fine steps to each side of the best, through whose sharpness the parabola goes."""


def agreement(image: NDArray[np.float32]) -> float:
    """Energy of the positive pressure, the sum of p^2 over p = max(image, 0): greatest where what the elements heard agrees.

    Only images of the same signals compare. A pressure that is negative is one whose pulses meet half a period away.
    """
    positive = np.maximum(image.ravel(), 0, dtype=np.float64)
    return float(positive @ positive)


def sharpness(image: NDArray[np.float32]) -> float:
    """n sum(p^2) / sum(p)^2 over p = max(image, 0), times the eighth root of the energy sum(image^2); 0 for no image.

    Out of focus a point becomes a ring, which has the same sum over more pixels; the energy, which has a broader peak, keeps
    noise and streaks from moving that. p^2 has twice the bandwidth of the image, so that pixels must be no wider than a quarter
    of the shortest wavelength: wider ones shift the peak. Only images of the same signals compare.
    """
    values = image.ravel().astype(np.float64)
    positive = np.maximum(values, 0)
    total = float(positive.sum())
    return float(positive @ positive) * positive.size / total**2 * float(values @ values) ** 0.125 if total > 0 else 0.0


def find_focus(coarse: Picture, fine: Picture, start: float, search: Search) -> tuple[float, float]:
    """Value with the sharpest image around `start`, and its sharpness over that at `start`.

    A coarse sweep over the whole reach for the greatest agreement, which has a broad peak and is low where parts of signals that
    miss each other make a few bright spots. Around its best a fine one for the greatest sharpness, whose peak is narrower, and
    the vertex of the parabola through the best and those beside it. fine: as `coarse`, of the pixels that `sharpness` needs.
    """
    reach, step, small = search
    values = start + np.arange(-reach, reach + step / 2, step)
    middle = float(values[int(np.argmax([agreement(coarse(float(value))) for value in values]))])
    before = sharpness(fine(start))
    values = middle + np.arange(-step, step + small / 2, small)
    best = _vertex(values, np.array([sharpness(fine(float(value))) for value in values]))
    return best, sharpness(fine(best)) / before if before > 0 else np.inf


def _vertex(values: NDArray[np.float64], scores: NDArray[np.float64]) -> float:
    place = int(np.argmax(scores))
    near = slice(max(place - _BESIDE, 0), place + _BESIDE + 1)
    if not 0 < place < len(values) - 1:
        return float(values[place])
    curvature, slope, _ = np.polyfit(values[near] - values[place], scores[near], 2)
    reached = values[near] if curvature < 0 else values[[place]]
    return float(np.clip(values[place] - slope / (2 * curvature or 1), reached[0], reached[-1]))
