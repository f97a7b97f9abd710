"""What kind a readout is, and whether a frame is done: by flag, coverage, change, count or the end of the scan."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator

import numpy as np

from ..config import TriggerConfig
from ..headers import AcquisitionFlag as Flag
from ..headers import has_flag
from ..messages import FrameKey, TriggerReason

__all__ = ["ReadoutKind", "TriggerPolicy", "kinds", "runs"]


class ReadoutKind(enum.IntEnum):
    """What a readout is for."""

    IMAGING = 0
    CALIBRATION = 1
    NOISE = 2
    OTHER = 3
    """Navigators, phase correction, feedback, dummies: recognized, counted, not reconstructed."""


_OTHER = (
    Flag.IS_NAVIGATION_DATA,
    Flag.IS_PHASECORR_DATA,
    Flag.IS_HPFEEDBACK_DATA,
    Flag.IS_DUMMYSCAN_DATA,
    Flag.IS_RTFEEDBACK_DATA,
    Flag.IS_SURFACECOILCORRECTIONSCAN_DATA,
    Flag.IS_PHASE_STABILIZATION_REFERENCE,
    Flag.IS_PHASE_STABILIZATION,
)
_ENDS = (Flag.LAST_IN_SLICE, Flag.LAST_IN_REPETITION, Flag.LAST_IN_MEASUREMENT)
_COUNTERS = ("repetition", "slice", "contrast", "phase", "set")
_COUNTER = 1 << 16
"""Counters have 16 bits; a long real-time scan starts again from 0."""


def kinds(flags: np.ndarray) -> np.ndarray:
    """Kind of each readout from its flags, int8 (n,). Calibration that also images is imaging."""
    kind = np.zeros(len(flags), dtype=np.int8)
    if not flags.any():
        return kind
    calibration = has_flag(flags, Flag.IS_PARALLEL_CALIBRATION)
    imaging = has_flag(flags, Flag.IS_PARALLEL_CALIBRATION_AND_IMAGING)
    kind[calibration & ~np.asarray(imaging)] = ReadoutKind.CALIBRATION
    kind[has_flag(flags, *_OTHER)] = ReadoutKind.OTHER
    kind[has_flag(flags, Flag.IS_NOISE_MEASUREMENT)] = ReadoutKind.NOISE
    return kind


def runs(headers: np.ndarray) -> Iterator[tuple[slice, ReadoutKind]]:
    """Split a batch into runs of readouts of one kind and one frame; a run ends after a flag that may end its frame."""
    if not len(headers):
        return
    flags = headers["flags"]
    kind = kinds(flags)
    if len(headers) == 1:
        yield slice(0, 1), ReadoutKind(int(kind[0]))
        return
    idx = headers["idx"]
    columns = np.stack([kind, headers["encoding_space_ref"], *(idx[name] for name in _COUNTERS)])
    breaks = (columns[:, 1:] != columns[:, :-1]).any(axis=0) | has_flag(flags[:-1], *_ENDS)
    edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(headers)]
    for start, stop in itertools.pairwise(edges):
        yield slice(start, stop), ReadoutKind(int(kind[start]))


class TriggerPolicy:
    """Decides which frames a run of readouts ends. `averages` is the number the header announces."""

    def __init__(self, config: TriggerConfig, averages: int) -> None:
        self.config = config
        self.averages = averages

    def changed(self, key: FrameKey, opened: list[FrameKey]) -> list[FrameKey]:
        """Open frames that a readout of `key` shows to be over: earlier repetitions of the same slice."""
        if not self.config.change:
            return []
        return sorted(
            k
            for k in opened
            if k.encoding == key.encoding
            and k.slice == key.slice
            and 0 < (key.repetition - k.repetition) % _COUNTER < _COUNTER // 2
        )

    def flagged(self, last: np.ndarray, key: FrameKey, opened: list[FrameKey]) -> list[FrameKey]:
        """Open frames that the flags of the last readout of a run end."""
        flags = int(last["flags"])
        if not self.config.flags or not has_flag(flags, *_ENDS):
            return []
        if has_flag(flags, Flag.LAST_IN_MEASUREMENT):
            return sorted(opened)
        if int(last["idx"]["average"]) + 1 < self.averages:  # converters repeat LAST_IN_SLICE for each average
            return []
        if has_flag(flags, Flag.LAST_IN_REPETITION):
            return sorted(k for k in opened if k.repetition == key.repetition)
        return [key] if key in opened else []

    def counted(self, readouts: int, *, covered: bool) -> TriggerReason | None:
        """Reason to end the frame of `key` now, by number of readouts or by coverage."""
        if self.config.acquisitions and readouts >= self.config.acquisitions:
            return "count"
        return "coverage" if covered and self.config.coverage else None
