"""Pictures: one image as an 8-bit PNG, and a labelled comparison of reconstructions with their error maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image as PillowImage

__all__ = ["Panel", "comparison_figure", "panel_figure", "robust_window", "write_png"]

Window = tuple[float, float]

_BACKGROUND, _TEXT, _FAINT = "#0d1117", "#f0f3f6", "#9da7b3"
_ERROR_MAP = "inferno"
_SIDE, _GAP, _MARGIN = 2.2, 0.05, 0.08
"""Sides of a panel, gaps and margins in inches."""
_TITLE, _CAPTION = 0.30, 0.28
"""Heights of a title and of a caption line in inches."""
_LEGEND, _BAR = 0.30, 0.13
"""Distance of the color bar from the error maps, and its width, in inches."""
_DPI = 160


class Panel(msgspec.Struct, frozen=True, eq=False):
    """One picture of a comparison.

    image: real or complex, shape (rows, columns); its magnitude is shown. caption: a line beneath, e.g. "34.1 dB, 9 ms".
    window, colors: of a panel that is not compared with others; `robust_window` and gray without.
    """

    title: str
    image: np.ndarray
    caption: str = ""
    window: Window | None = None
    colors: str = "gray"


def robust_window(image: np.ndarray) -> Window:
    """Gray levels from 0 to the 99.8th percentile of |image|, so that a few bright pixels do not darken the rest.

    Numbers that are not finite are left out. An image without any has the window (0, 1).
    """
    magnitude = np.abs(image)
    finite = magnitude[np.isfinite(magnitude)]
    high = float(np.percentile(finite, 99.8)) if finite.size else 0.0
    high = high or float(finite.max(initial=0.0))
    return 0.0, high or 1.0


def write_png(path: str | Path, image: np.ndarray, window: Window | None = None) -> None:
    """Write |image| as a PNG of 8 bits gray; shape (rows, columns).

    window: values that become black and white, `robust_window` without. Numbers that are not finite become black. Raises
    ValueError for another shape or a window that is not ascending, OSError when the file cannot be written.
    """
    magnitude = _picture(image, "image")
    low, high = _ascending(robust_window(magnitude) if window is None else window)
    levels = np.clip((magnitude - low) / (high - low), 0.0, 1.0) * 255
    gray = np.where(np.isfinite(levels), levels, 0.0).round().astype(np.uint8)
    PillowImage.fromarray(gray).save(path, format="PNG")


def comparison_figure(
    path: str | Path,
    reference: Panel,
    panels: Sequence[Panel],
    *,
    error_gain: float = 5.0,
    window: Window | None = None,
) -> None:
    """Write a picture with the reference and the panels in one row, and beneath each panel its magnified error.

    All images have the gray window of the reference (`robust_window`, or `window`), all error maps the same color scale,
    from 0 to white divided by `error_gain`; the color bar under the reference has it in percent of white. The error is
    | |image| - |reference| |. Raises ValueError when there is no panel, shapes differ, or a window or gain is unusable;
    OSError when the file cannot be written.
    """
    if not panels:
        raise ValueError("panels is empty, a comparison needs at least one")
    if not error_gain > 0:
        raise ValueError(f"error_gain is {error_gain}, it must be above 0")
    truth = _picture(reference.image, f"reference {reference.title!r}")
    images = [_like(panel, truth) for panel in panels]
    low, high = _ascending(robust_window(truth) if window is None else window)
    gray = Normalize(low, high, clip=True)
    page = _Page(len(panels) + 1, truth.shape[0] / truth.shape[1])
    page.show(0, 0, truth, gray, "gray", reference)
    errors = Normalize(0.0, high / error_gain, clip=True)
    for column, (panel, image) in enumerate(zip(panels, images, strict=True), start=1):
        page.show(0, column, image, gray, "gray", panel)
        page.show(1, column, np.abs(image - truth), errors, _ERROR_MAP)
    page.legend(error_gain)
    page.save(path)


def panel_figure(path: str | Path, panels: Sequence[Panel]) -> None:
    """Write a picture with panels of one shape in a row, each with its own window and colors.

    Raises ValueError when there is no panel, shapes differ, or a window is unusable; OSError when the file cannot be written.
    """
    if not panels:
        raise ValueError("panels is empty, a picture needs at least one")
    first = _picture(panels[0].image, f"panel {panels[0].title!r}")
    page = _Page(len(panels), first.shape[0] / first.shape[1], rows=1)
    for column, panel in enumerate(panels):
        image = _like(panel, first)
        window = _ascending(robust_window(image) if panel.window is None else panel.window)
        page.show(0, column, image, Normalize(*window, clip=True), panel.colors, panel)
    page.save(path)


class _Page:
    """Places panels on a dark page; lengths in inches from the top left."""

    def __init__(self, columns: int, aspect: float, rows: int = 2) -> None:
        self.height_of_panel = _SIDE * aspect
        self.width = 2 * _MARGIN + columns * _SIDE + (columns - 1) * _GAP
        self.height = 2 * _MARGIN + _TITLE + _CAPTION + rows * self.height_of_panel
        self.figure = Figure(figsize=(self.width, self.height), facecolor=_BACKGROUND)

    def show(
        self, row: int, column: int, image: np.ndarray, norm: Normalize, colors: str, panel: Panel | None = None
    ) -> None:
        """One picture; `panel` has the words above and beneath it."""
        left = _MARGIN + column * (_SIDE + _GAP)
        top = _MARGIN + _TITLE + row * (self.height_of_panel + _CAPTION)
        axes = self.figure.add_axes(self._box(left, top, _SIDE, self.height_of_panel))
        axes.imshow(image, cmap=colors, norm=norm, interpolation="antialiased", aspect="auto")
        axes.set_axis_off()
        if panel is not None:
            center = left + _SIDE / 2
            self._write(center, top - _TITLE / 2, panel.title, size=11, weight="bold", color=_TEXT)
            self._write(center, top + self.height_of_panel + _CAPTION / 2, panel.caption, size=9.5, color=_FAINT)

    def legend(self, gain: float) -> None:
        """The color scale of the error maps, in the free place under the reference."""
        top = _MARGIN + _TITLE + self.height_of_panel + _CAPTION
        left = _MARGIN + _SIDE - _LEGEND
        axes = self.figure.add_axes(self._box(left, top, _BAR, self.height_of_panel))
        axes.imshow(np.linspace(1, 0, 256)[:, None], cmap=_ERROR_MAP, aspect="auto", extent=(0, 1, 0, 1))
        axes.set_axis_off()
        for share, align in ((0.0, "bottom"), (0.5, "center"), (1.0, "top")):
            y = top + (1 - share) * self.height_of_panel
            self._write(left - 0.08, y, f"{100 * share / gain:.3g} %", size=8.5, color=_FAINT, ha="right", va=align)
        words = f"|error|\n\N{MULTIPLICATION SIGN} {gain:g}"
        self._write(left - 0.75, top + self.height_of_panel / 2, words, size=11, color=_TEXT)

    def save(self, path: str | Path) -> None:
        """Draw the page and write it as PNG."""
        self.figure.set_dpi(_DPI)
        FigureCanvasAgg(self.figure).print_png(str(path))  # type: ignore[no-untyped-call]

    def _box(self, left: float, top: float, width: float, height: float) -> tuple[float, float, float, float]:
        """The same rectangle in the figure's own units, from the bottom left."""
        bottom = self.height - top - height
        return left / self.width, bottom / self.height, width / self.width, height / self.height

    def _write(self, x: float, y: float, words: str, **style: str | float) -> None:
        style = {"ha": "center", "va": "center", **style}
        self.figure.text(x / self.width, 1 - y / self.height, words, **style)  # type: ignore[arg-type]


def _picture(image: np.ndarray, name: str) -> np.ndarray:
    if image.ndim != 2 or not image.size:
        raise ValueError(f"{name} has shape {image.shape}, a picture has (rows, columns)")
    return np.asarray(np.abs(image))


def _like(panel: Panel, truth: np.ndarray) -> np.ndarray:
    image = _picture(panel.image, f"panel {panel.title!r}")
    if image.shape != truth.shape:
        raise ValueError(
            f"panel {panel.title!r} has shape {image.shape}, the reference has {truth.shape}; they must agree"
        )
    return image


def _ascending(window: Window) -> Window:
    low, high = window
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"window is {window}, two finite ascending values are needed")
    return low, high
