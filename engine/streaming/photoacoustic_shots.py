"""From frames to shots: what is missing, what came twice, and the parts of one laser shot put together."""

from __future__ import annotations

from bisect import bisect_left

import msgspec
import numpy as np

from ..messages import PhotoacousticFrame, PhotoacousticHeader

__all__ = ["FLAG_CLIPPED", "FLAG_LOST", "FLAG_TRIGGER", "FrameOrder", "Shot", "ShotAssembler", "Verdict"]

FLAG_LOST, FLAG_CLIPPED, FLAG_TRIGGER = 1, 2, 4
"""Bits of `PhotoacousticFrame.flags`."""
GAPS = 1024
"""Gaps that are remembered; what belongs to an older one counts as a duplicate when it comes after all."""


class Verdict(msgspec.Struct, frozen=True):
    """What a frame's number says. gap: first and last frame now known to be missing, or None."""

    usable: bool
    late: bool = False
    duplicate: bool = False
    gap: tuple[int, int] | None = None


class FrameOrder:
    """Holds the frames of a stream to their numbers. The first frame that comes sets the start.

    next: number that is due, None before the first frame. missing: frames that have not come so far.
    """

    def __init__(self) -> None:
        self.next: int | None = None
        self.missing = 0
        self._gaps: list[tuple[int, int]] = []

    def take(self, frame: PhotoacousticFrame) -> Verdict:
        """Judge the next frame. A damaged one is as good as missing."""
        due = frame.seq if self.next is None else self.next
        if frame.seq < due:
            return self._behind(frame)
        last = frame.seq if not frame.intact else frame.seq - 1
        gap = (due, last) if last >= due else None
        if gap is not None:
            self._lose(*gap)
        self.next = frame.seq + 1
        return Verdict(usable=frame.intact, gap=gap)

    def end(self, last: int) -> tuple[int, int] | None:
        """The sender says which frame was its last: what is missing at the end."""
        due = 0 if self.next is None else self.next
        if last < due:
            return None
        self._lose(due, last)
        self.next = last + 1
        return due, last

    def _lose(self, first: int, last: int) -> None:
        self.missing += last - first + 1
        self._gaps.append((first, last))
        del self._gaps[:-GAPS]

    def _behind(self, frame: PhotoacousticFrame) -> Verdict:
        place = bisect_left(self._gaps, (frame.seq + 1,)) - 1
        if place < 0 or not self._gaps[place][0] <= frame.seq <= self._gaps[place][1]:
            return Verdict(usable=False, duplicate=True)
        if not frame.intact:
            return Verdict(usable=False, late=True)
        first, last = self._gaps[place]
        self._gaps[place : place + 1] = [(a, b) for a, b in ((first, frame.seq - 1), (frame.seq + 1, last)) if a <= b]
        self.missing -= 1
        return Verdict(usable=True, late=True)


class Shot(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What there is of one laser shot.

    samples: (elements, samples) as they came; rows of `absent` hold what an element at rest reads. received: monotonic time in s
    of the last part.
    """

    number: int
    wavelength: int
    samples: np.ndarray
    absent: np.ndarray | None = None
    """Boolean (elements,): elements that no part had; None when there are all."""
    received: float
    frames: int = 1
    flags: int = 0
    pulse_energy_joule: float | None = None
    timestamp_s: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether all elements are there."""
        return self.absent is None


class ShotAssembler:
    """Puts the parts of a shot together. Frames with all elements are passed on as they are, without a copy."""

    def __init__(self, header: PhotoacousticHeader) -> None:
        self._elements = header.elements
        self._rest = header.adc_offset
        self._shape = (header.elements, header.samples)
        self._parts: np.ndarray | None = None
        self._covered = np.zeros(header.elements, dtype=bool)
        self._first: PhotoacousticFrame | None = None
        self._frames = self._flags = 0
        self._received = 0.0

    def belongs(self, frame: PhotoacousticFrame) -> bool:
        """Whether a frame is a part of the shot that is open."""
        return self._first is not None and self._first.shot == frame.shot

    def add(self, frame: PhotoacousticFrame) -> list[Shot]:
        """Take a frame; returns the shots that it ends, oldest first."""
        ended = [] if self._first is None or self.belongs(frame) else self.finish()
        if self._first is None and len(frame.samples) == self._elements:
            return [*ended, _whole(frame)]
        self._put(frame)
        if self._covered.all():
            ended += self.finish()
        return ended

    def _put(self, frame: PhotoacousticFrame) -> None:
        if self._first is None:
            self._parts = np.full(self._shape, round(self._rest), dtype=frame.samples.dtype)
            self._first = frame
        assert self._parts is not None  # noqa: S101 - made with the first part
        rows = slice(frame.first_element, frame.first_element + len(frame.samples))
        self._parts[rows] = frame.samples
        self._covered[rows] = True
        self._frames += 1
        self._flags |= frame.flags
        self._received = max(self._received, frame.received)

    def finish(self) -> list[Shot]:
        """Give up the shot that is open, if there is one."""
        first, parts = self._first, self._parts
        if first is None or parts is None:
            return []
        shot = Shot(
            number=first.shot,
            wavelength=first.wavelength,
            samples=parts,
            absent=None if self._covered.all() else ~self._covered,
            received=self._received,
            frames=self._frames,
            flags=self._flags,
            pulse_energy_joule=first.pulse_energy_joule,
            timestamp_s=first.timestamp_s,
        )
        self._first = self._parts = None
        self._covered = np.zeros(self._elements, dtype=bool)
        self._frames = self._flags = 0
        self._received = 0.0
        return [shot]


def _whole(frame: PhotoacousticFrame) -> Shot:
    return Shot(
        number=frame.shot,
        wavelength=frame.wavelength,
        samples=frame.samples,
        received=frame.received,
        flags=frame.flags,
        pulse_energy_joule=frame.pulse_energy_joule,
        timestamp_s=frame.timestamp_s,
    )
