"""Pictures of reconstructions above their error maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["save_panel"]

MAGNIFIED = 5
"""Errors are shown this many times brighter than the image."""


def save_panel(path: Path, reference: np.ndarray, images: dict[str, np.ndarray]) -> None:
    """A row of images under their names above the row of magnified errors; the reference comes first."""
    shown = {"reference": reference, **images}
    above = np.hstack([_gray(image) for image in shown.values()])
    below = np.hstack([_gray(np.abs(image - reference) * MAGNIFIED) for image in shown.values()])
    picture = Image.fromarray(np.vstack([above, below]) // 8 * 8)  # 32 shades, for a small file
    draw = ImageDraw.Draw(picture)
    for place, name in enumerate(shown):
        draw.text((place * reference.shape[1] + 4, 3), name, fill=255)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)


def _gray(image: np.ndarray) -> np.ndarray:
    return (255 * np.clip(image, 0, 1)).astype(np.uint8)
