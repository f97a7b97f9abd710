"""From a closed frame to an image: which plain reconstruction fits what was measured, and the coil maps it needs."""

from __future__ import annotations

__all__ = ["CartesianReconstructor", "Reconstruction"]
