"""The frames of one encoding space that are being filled, and when each is done."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
import torch

from ..config import SystemConfig
from ..errors import PeerError
from ..headers import AcquisitionFlag as Flag
from ..limits import Limits
from ..messages import EncodingSpace, FrameKey, TriggerReason
from ..preparation.compression import CoilCompression
from .frames import CartesianFrame, GatheredFrame
from .layout import CartesianLayout, frame_key
from .readout import ReadoutTransform
from .triggers import TriggerPolicy

__all__ = ["CartesianLane", "ClosedFrame", "GatheringLane", "Run"]

_CALIBRATES = np.uint64(Flag.IS_PARALLEL_CALIBRATION_AND_IMAGING.bit)

POOL = 4
"""Finished frames kept for reuse."""


class Run(msgspec.Struct, frozen=True, eq=False):
    """Consecutive readouts of one kind and one frame.

    headers: (n,); samples: complex64 (n, channels, samples); trajectory: float32 (n, samples, dimensions) or None.
    """

    headers: np.ndarray
    samples: np.ndarray
    trajectory: np.ndarray | None
    received: float

    def part(self, start: int, stop: int) -> Run:
        """Readouts start..stop of this run."""
        trajectory = None if self.trajectory is None else self.trajectory[start:stop]
        return Run(self.headers[start:stop], self.samples[start:stop], trajectory, self.received)

    def where(self, wanted: np.ndarray) -> Run:
        """The readouts for which `wanted`, boolean (n,), holds."""
        trajectory = None if self.trajectory is None else self.trajectory[wanted]
        return Run(self.headers[wanted], self.samples[wanted], trajectory, self.received)


class ClosedFrame(msgspec.Struct, frozen=True, eq=False):
    """A frame that is done, and why."""

    key: FrameKey
    frame: CartesianFrame | GatheredFrame
    reason: TriggerReason


class CartesianLane:
    """Frames of a Cartesian encoding space.

    `matrix` mixes coils on arrival (prewhitening), complex64 (coils out, coils in), or None.
    """

    def __init__(
        self,
        config: SystemConfig,
        limits: Limits,
        space: EncodingSpace,
        first: np.ndarray,
        matrix: torch.Tensor | None = None,
    ) -> None:
        self.space = space
        self.channels = int(first["active_channels"])
        crop = config.preparation.remove_oversampling
        self.layout = CartesianLayout.of(space, first, limits, crop=crop)
        self.coils = self.channels if matrix is None else int(matrix.shape[0])
        self.compression: CoilCompression | None = None
        """Virtual coils, once they are known; see `compress`."""
        self.transform = ReadoutTransform(self.layout, self.channels, matrix)
        self.began = False
        """Whether an imaging readout has come."""
        self.opened: dict[FrameKey, CartesianFrame] = {}
        self.calibrations: dict[FrameKey, tuple[FrameKey, CartesianFrame]] = {}
        self._announced = self.layout.announced()
        self._covering = bool(self._announced.any())
        self._trigger = TriggerPolicy(config.trigger, self.layout.averages)
        self._limits = limits
        self._last: dict[FrameKey, CartesianFrame] = {}
        self._pool: list[CartesianFrame] = []

    def imaging(self, run: Run) -> Iterator[ClosedFrame]:
        """Put the readouts of a run in place; yield the frames that this ends."""
        self._check(run)
        self.began = True
        key = frame_key(run.headers[0])
        places = self.layout.places(run.headers)
        for start, stop in self._cuts(key, run, places):
            part = run.part(start, stop)
            yield from self._close(self._trigger.changed(key, list(self.opened)), "change")
            frame = self._frame(key, part)
            self._fill(frame, part, places[start:stop])
            if bool((part.headers["flags"] & _CALIBRATES).any()):
                self._calibrate(key, part.where(part.headers["flags"] & _CALIBRATES != 0))
            reason = self._trigger.counted(frame.readouts, covered=self._covered(frame))
            yield from self._close([key] if reason else [], reason or "flag")
            yield from self._close(self._trigger.flagged(part.headers[-1], key, list(self.opened)), "flag")

    def calibration(self, run: Run) -> Iterator[ClosedFrame]:
        """Keep the calibration readouts of a run; yield the frames that they show to be over.

        Those of a later repetition take the place of earlier ones, which the frames of that repetition may still need.
        """
        self._check(run)
        key = frame_key(run.headers[0])
        yield from self._close(self._trigger.changed(key, list(self.opened)), "change")
        self._calibrate(key, run)

    def _calibrate(self, key: FrameKey, run: Run) -> None:
        place = msgspec.structs.replace(key, repetition=0)
        owner, frame = self.calibrations.get(place, (key, None))
        if frame is None:
            frame = self._new()
        elif owner != key:
            frame.clear()
        self.calibrations[place] = (key, frame)
        self._fill(frame, run, self.layout.places(run.headers))

    def calibration_of(self, key: FrameKey) -> tuple[FrameKey, CartesianFrame] | None:
        """Calibration lines for a frame, and the frame that they were measured with: its own, or others of its slice."""
        own = self.calibrations.get(msgspec.structs.replace(key, repetition=0))
        if own is not None:
            return own
        return next((held for place, held in self.calibrations.items() if place.slice == key.slice), None)

    def compress(self, compression: CoilCompression) -> None:
        """From now on keep virtual coils only, and convert what there is."""
        matrix = compression.matrix
        self.compression = compression
        self.transform.matrix = matrix if self.transform.matrix is None else matrix @ self.transform.matrix
        self.coils = len(matrix)
        held = [frame for _, frame in self.calibrations.values()]
        for frame in (*self.opened.values(), *self._last.values(), *held):
            frame.compress(matrix)
        self._pool.clear()

    def flagged(self, last: np.ndarray) -> Iterator[ClosedFrame]:
        """End the frames that the flags of a readout end which is itself not reconstructed, such as a navigator."""
        yield from self._close(self._trigger.flagged(last, frame_key(last), list(self.opened)), "flag")

    def finish(self) -> Iterator[ClosedFrame]:
        """End every frame that is still open, in the order of their counters."""
        yield from self._close(sorted(self.opened), "close")

    def release(self, closed: ClosedFrame) -> None:
        """Take a closed frame back once its image is made. It is kept for late lines, then reused.

        After a count there are no late lines: the next readout begins the next frame.
        """
        if not isinstance(closed.frame, CartesianFrame):  # pragma: no cover - a lane closes only its own frames
            raise TypeError(type(closed.frame).__name__)
        if closed.reason == "count":
            self._recycle(closed.frame)
            return
        self._last[closed.key] = closed.frame
        while len(self._last) > POOL:
            oldest = next(iter(self._last))
            self._recycle(self._last.pop(oldest))

    def fits(self, run: Run) -> bool:
        """Whether readouts have the channels and samples of this lane."""
        return run.samples.shape[1:] == (self.channels, self.layout.samples)

    def _check(self, run: Run) -> None:
        channels, samples = run.samples.shape[1:]
        if not self.fits(run):
            raise PeerError(
                f"acquisition has {channels} channels x {samples} samples, "
                f"this scan began with {self.channels} x {self.layout.samples}"
            )

    def _cuts(self, key: FrameKey, run: Run, flat: np.ndarray) -> Iterator[tuple[int, int]]:
        """Split a run where its frame may end within: after the last announced line, and where lines come again."""
        total = len(run.headers)
        inside = flat[flat >= 0]
        frame = self.opened.get(key)
        again = len(np.unique(inside)) < len(inside)
        if frame is not None:
            again |= bool((frame.counts.reshape(-1)[inside] >= frame.averages).any())
        more = bool((run.headers["idx"]["average"] >= self.layout.averages).any())
        if total > 1 and (again or more or self._trigger.config.acquisitions):
            yield from ((index, index + 1) for index in range(total))
            return
        end = self._covering_line(frame, flat) if total > 1 else total
        yield 0, end
        if end < total:
            yield end, total

    def _covering_line(self, frame: CartesianFrame | None, flat: np.ndarray) -> int:
        """How many lines of a run, each new to the frame, are needed until nothing announced is missing; at most all."""
        if frame is None:
            needed = self._announced * self.layout.averages
        else:
            needed = self._announced * np.maximum(frame.averages - frame.counts, 0)
        useful = (flat >= 0) & (needed.reshape(-1)[flat] > 0)
        total = int(needed.sum())
        if not total or int(useful.sum()) < total:
            return len(flat)
        return int(np.flatnonzero(useful)[-1]) + 1

    def _frame(self, key: FrameKey, run: Run) -> CartesianFrame:
        frame = self.opened.get(key)
        if frame is not None:
            return frame
        last = self._last.pop(key, None)
        if last is not None and self._late(last, run.headers[:1]):
            self.opened[key] = last
            return last
        if last is not None:
            self._recycle(last)
        self._limits.check("frames_open", len(self.opened) + 1, what="number of frames being filled at once")
        frame = self._pool.pop() if self._pool else self._new()
        self.opened[key] = frame
        return frame

    def _late(self, frame: CartesianFrame, header: np.ndarray) -> bool:
        """Whether a readout for a frame already closed is a line that it lacks, not the beginning of the next one."""
        flat = self.layout.places(header)
        return bool((flat >= 0).all()) and not frame.counts.reshape(-1)[flat].any()

    def _new(self) -> CartesianFrame:
        frames = len(self.opened) + len(self.calibrations) + len(self._last) + 1
        size = 8 * self.coils * self.layout.depth * self.layout.height * self.layout.width
        self._limits.check("session_bytes", 2 * frames * size, what="memory for the frames of this session")
        return CartesianFrame(self.layout, self.coils)

    def _fill(self, frame: CartesianFrame, run: Run, places: np.ndarray) -> None:
        if frame.room(places) and self.transform.place(run.samples, run.headers, places, frame.lines):
            frame.note(run.headers, places, run.received)
            return
        for part, lines in self.transform.lines(run.samples, run.headers):
            frame.add(lines, run.headers[part], places[part], run.received)

    def _covered(self, frame: CartesianFrame) -> bool:
        return (
            self._covering
            and frame.readouts >= self._announced.sum()
            and bool((frame.counts[self._announced] >= frame.averages).all())
        )

    def _close(self, keys: list[FrameKey], reason: TriggerReason) -> Iterator[ClosedFrame]:
        for key in keys:
            frame = self.opened.pop(key, None)
            if frame is not None and frame.header is not None:
                yield ClosedFrame(key, frame, reason)
            elif frame is not None:
                self._recycle(frame)

    def _recycle(self, frame: CartesianFrame) -> None:
        if len(self._pool) < POOL:
            frame.clear()
            self._pool.append(frame)


class GatheringLane:
    """Frames of a non-Cartesian encoding space: readouts are prewhitened and kept with their trajectory."""

    def __init__(
        self,
        config: SystemConfig,
        limits: Limits,
        space: EncodingSpace,
        first: np.ndarray,
        matrix: torch.Tensor | None = None,
    ) -> None:
        self.space = space
        self.channels, self.samples = int(first["active_channels"]), int(first["number_of_samples"])
        self.dimensions = int(first["trajectory_dimensions"])
        self.coils = self.channels if matrix is None else int(matrix.shape[0])
        self.began = False
        """Whether an imaging readout has come."""
        self.opened: dict[FrameKey, GatheredFrame] = {}
        self.announced = self._count("kspace_encode_step_1") * self._count("kspace_encode_step_2")
        averages = self._count("average")
        self._readouts = max(1, self.announced) * averages
        self._matrix = matrix
        self._trigger = TriggerPolicy(config.trigger, averages)
        self._limits = limits
        self._pool: list[GatheredFrame] = []

    def _count(self, counter: str) -> int:
        limit = self.space.limits.get(counter)
        return limit.count if limit else 1

    def imaging(self, run: Run) -> Iterator[ClosedFrame]:
        """Keep the readouts of a run; yield the frames that this ends."""
        self._check(run)
        self.began = True
        key = frame_key(run.headers[0])
        for index in range(len(run.headers)):
            part = run.part(index, index + 1)
            yield from self._close(self._trigger.changed(key, list(self.opened)), "change")
            frame = self.opened.get(key) or self._new(key)
            self._fill(frame, part)
            covered = self.announced > 1 and frame.readouts >= self._readouts
            reason = self._trigger.counted(frame.readouts, covered=covered)
            yield from self._close([key] if reason else [], reason or "flag")
            yield from self._close(self._trigger.flagged(part.headers[-1], key, list(self.opened)), "flag")

    def flagged(self, last: np.ndarray) -> Iterator[ClosedFrame]:
        """End the frames that the flags of a readout end which is itself not reconstructed, such as a navigator."""
        yield from self._close(self._trigger.flagged(last, frame_key(last), list(self.opened)), "flag")

    def finish(self) -> Iterator[ClosedFrame]:
        """End every frame that is still open, in the order of their counters."""
        yield from self._close(sorted(self.opened), "close")

    def release(self, closed: ClosedFrame) -> None:
        """Take a closed frame back once its image is made."""
        if isinstance(closed.frame, GatheredFrame) and len(self._pool) < POOL:
            closed.frame.clear()
            self._pool.append(closed.frame)

    def fits(self, run: Run) -> bool:
        """Whether readouts have the channels, samples and trajectory dimensions of this lane."""
        return self._shape(run) == (self.channels, self.samples, self.dimensions)

    @staticmethod
    def _shape(run: Run) -> tuple[int, ...]:
        return (*run.samples.shape[1:], 0 if run.trajectory is None else run.trajectory.shape[2])

    def _check(self, run: Run) -> None:
        if not self.fits(run):
            raise PeerError(
                f"acquisition has channels x samples x trajectory dimensions {self._shape(run)}, "
                f"this scan began with {(self.channels, self.samples, self.dimensions)}"
            )

    def _new(self, key: FrameKey) -> GatheredFrame:
        self._limits.check("frames_open", len(self.opened) + 1, what="number of frames being filled at once")
        self._check_size(self._readouts, len(self.opened) + 1)
        frame = self._pool.pop() if self._pool else None
        self.opened[key] = frame or GatheredFrame(self.coils, self._readouts, self.samples, self.dimensions)
        return self.opened[key]

    def _check_size(self, readouts: int, frames: int) -> None:
        size = readouts * self.samples * (8 * self.coils + 4 * self.dimensions)
        self._limits.check("frame_bytes", size, what="k-space of one frame")
        self._limits.check("session_bytes", frames * size, what="memory for the frames of this session")

    def _fill(self, frame: GatheredFrame, run: Run) -> None:
        if frame.readouts + len(run.headers) > len(frame.headers):
            self._check_size(2 * len(frame.headers), len(self.opened))
        samples = torch.from_numpy(np.array(run.samples, dtype=np.complex64, order="C"))
        if self._matrix is not None:
            samples = torch.matmul(self._matrix, samples)
        frame.add(samples, run.trajectory, run.headers, run.received)

    def _close(self, keys: list[FrameKey], reason: TriggerReason) -> Iterator[ClosedFrame]:
        for key in keys:
            frame = self.opened.pop(key, None)
            if frame is not None and frame.readouts:
                yield ClosedFrame(key, frame, reason)
