"""From a closed non-Cartesian frame to an image."""

from __future__ import annotations

from ..config import SystemConfig
from ..messages import EncodingSpace
from .lanes import ClosedFrame, GatheringLane
from .results import Reconstruction

__all__ = ["GatheredReconstructor"]


class GatheredReconstructor:
    def __init__(self, config: SystemConfig, space: EncodingSpace) -> None:
        self.config, self.space = config, space
