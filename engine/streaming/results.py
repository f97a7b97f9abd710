"""What a reconstruction hands to the session: the image, how it was made, and what it lacked."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import torch

from ..messages import Outcome

__all__ = ["Reconstruction", "StageClock", "threads"]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use `count` processor threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Reconstruction(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """An image and its provenance.

    image: (z, y, x), complex or non-negative real, on the reconstructed matrix. `reason` is a fixed word that says why the
    image is not what the configuration promises, empty where it is.
    """

    image: torch.Tensor
    method: str
    reason: str = ""
    missing: int = 0
    duplicates: int = 0
    outside: int = 0
    acceleration: float = 1.0
    stages: dict[str, float] = {}
    provenance: dict[str, list[str]] = {}
    """Further attributes, of generative images."""
    deviation: torch.Tensor | None = None
    """Standard deviation over the samples of a generative image, (z, y, x)."""
    preview: bool = False
    """Whether a better image of the same frame follows."""

    @property
    def finite(self) -> bool:
        """Whether no pixel is NaN or infinite: the sum of all would be too."""
        return bool(
            torch.isfinite(torch.view_as_real(self.image).sum() if self.image.is_complex() else self.image.sum())
        )

    @property
    def outcome(self) -> Outcome:
        """Complete, incomplete (lines are missing or did not fit) or degraded (a simpler method had to do)."""
        if self.reason:
            return "degraded"
        return "incomplete" if self.missing or self.outside else "complete"

    def attributes(self) -> dict[str, list[str]]:
        """The provenance as image attributes."""
        attributes: dict[str, list[str]] = {
            "scanside_method": [self.method],
            "scanside_outcome": [self.outcome],
            "scanside_net_acceleration": [f"{self.acceleration:.4g}"],
            "scanside_missing_lines": [str(self.missing)],
            "scanside_duplicate_lines": [str(self.duplicates)],
            "scanside_outside_lines": [str(self.outside)],
        }
        if self.reason:
            attributes["scanside_reason"] = [self.reason]
        return attributes | self.provenance


class StageClock:
    """Durations of the stages of one reconstruction, in s of the monotonic clock."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what runs inside and add it to the stage `name`."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.monotonic() - begun
