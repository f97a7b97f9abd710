"""Autofocus: the delay or the speed of sound at which what a shot shows is drawn together most."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Search", "concentration", "find_focus"]

Search = tuple[float, float, float]
"""Reach to both sides, coarse step and fine step."""


def concentration(image: NDArray[np.float32]) -> float:
    """How much of the positive pressure lies in few pixels: n sum(p^2) / sum(p)^2 over max(image, 0), at least 1; 0 for none.

    Out of focus a point becomes a ring, which has the same sum over more pixels. Unlike the energy of the image it does not
    change when all signals are scaled.
    """
    positive = np.maximum(image, 0, dtype=np.float64).ravel()
    total = float(positive.sum())
    return float(positive @ positive) * positive.size / total**2 if total > 0 else 0.0


def find_focus(sharpness: Callable[[float], float], start: float, search: Search) -> tuple[float, float]:
    """Value with the greatest sharpness around `start`, and that sharpness over the one at `start`.

    A coarse sweep over the whole reach, a fine one around its best, and the vertex of the parabola through the three best. The
    peak may be no narrower than the coarse step.
    """
    reach, coarse, fine = search
    before = sharpness(start)
    best, _ = _sweep(sharpness, start + np.arange(-reach, reach + coarse / 2, coarse))
    values = best + np.arange(-coarse, coarse + fine / 2, fine)
    best, scores = _sweep(sharpness, values)
    place = int(np.argmax(scores))
    if 0 < place < len(values) - 1:
        left, middle, right = scores[place - 1 : place + 2]
        curvature = left - 2 * middle + right
        best += fine * 0.5 * (left - right) / curvature if curvature < 0 else 0.0
    return best, sharpness(best) / before if before > 0 else np.inf


def _sweep(sharpness: Callable[[float], float], values: NDArray[np.float64]) -> tuple[float, list[float]]:
    scores = [sharpness(float(value)) for value in values]
    return float(values[int(np.argmax(scores))]), scores
