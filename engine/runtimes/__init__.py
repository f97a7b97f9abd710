"""Runtimes: what a network is run with. `select` takes the best that works here and keeps torch to fall back on.

selection = select(denoiser, Shape(1, 2, 256, 256), cache=ArtefactCache())
image = selection.denoiser(x, sigma)
"""

from __future__ import annotations

from ..config_runtime import RuntimeConfig
from .base import Availability, LoadOptions, Precision, Runtime, Shape
from .cache import ArtefactCache
from .guarded import GuardedDenoiser, RuntimeStatus
from .selection import RUNTIMES, Selection, Trial, select

__all__ = [
    "RUNTIMES",
    "ArtefactCache",
    "Availability",
    "GuardedDenoiser",
    "LoadOptions",
    "Precision",
    "Runtime",
    "RuntimeConfig",
    "RuntimeStatus",
    "Selection",
    "Shape",
    "Trial",
    "select",
]
