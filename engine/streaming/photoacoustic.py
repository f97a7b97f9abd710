"""A photoacoustic stream, from its header to its last image, without a socket: `feed` a message, get the events it causes."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from ..config import SystemConfig, Value
from ..errors import ConfigError, PeerError
from ..messages import (
    Adjustment,
    EndOfScan,
    EndOfStream,
    FrameKey,
    FrameStats,
    Image,
    Level,
    MissingFrames,
    Note,
    Outcome,
    PhotoacousticEvent,
    PhotoacousticFrame,
    PhotoacousticHeader,
    PhotoacousticMessage,
    TriggerReason,
)
from .photoacoustic_part import Ready, StreamPart
from .photoacoustic_reconstruction import AllDead, Focus
from .photoacoustic_shots import FLAG_LOST, FrameOrder, Shot
from .results import StageClock

__all__ = ["PhotoacousticSession"]

_COUNTER = 0xFFFF
_SPEEDS = (300.0, 10000.0)
_DELAYS = (-65535.0, 65535.0)
_AVERAGES = (1, 4096)
_FOCUS: dict[str, Focus] = {"delay": "delay", "speed_of_sound": "speed_of_sound"}
_NOTES = 8
"""Notes of one kind before the session falls silent about it; the counts go on."""


class PhotoacousticSession:
    """A photoacoustic measurement being reconstructed while it arrives. `threads`: of the processor, for one image.

    counts: frames, missing, damaged, duplicates, late, incomplete, degraded, images and failed, so far.
    """

    def __init__(self, config: SystemConfig, *, threads: int = 1) -> None:
        if config.kind != "pat":
            raise ConfigError(f'{config.name} is for MRI; choose a configuration with kind = "pat", such as pat/das')
        self.config = config
        self.counts: Counter[str] = Counter()
        self._threads = threads
        self._part: StreamPart | None = None
        self._order = FrameOrder()
        self._unseen = 0
        self._repeated = 0
        self._told: Counter[str] = Counter()
        self._ended = False

    @property
    def header(self) -> PhotoacousticHeader | None:
        """The header in force."""
        return None if self._part is None else self._part.header

    def feed(self, message: PhotoacousticMessage) -> Iterator[PhotoacousticEvent]:
        """Take one message and yield what follows from it: images, statistics, notes, frames to be asked for again.

        Raises `StreamError` for what cannot be used; the session can be ended with `EndOfScan` after that.
        """
        if self._ended:
            raise PeerError("data after the end of the stream")
        if isinstance(message, PhotoacousticFrame):
            yield from self._frame(message)
        elif isinstance(message, PhotoacousticHeader):
            yield from self._start(message)
        elif isinstance(message, Adjustment):
            yield from self._adjust(message.values)
        elif isinstance(message, EndOfStream):
            yield from self._count_off(message)
        elif isinstance(message, EndOfScan):
            yield from self._end(message)

    def _start(self, header: PhotoacousticHeader) -> Iterator[PhotoacousticEvent]:
        if self._part is not None:
            if header.details == self._part.header.details:
                return
            yield from self._flush(self._part, "change")
            yield Note("info", f"a new header: {header.elements} elements of {header.samples} samples from here on")
        self._part = part = StreamPart(self.config, header, self._threads)
        if part.refused:
            yield Note("warning", f"no unmixing: {part.refused}")
        prior = part.reconstructor.prior
        if prior is not None and prior.refused:
            yield Note("warning", f"plain images in place of the learned prior: {prior.refused}")
        if part.reconstructor.dead.all():
            yield Note("error", "the header says that all elements are dead; there will be no images")

    # Frames

    def _frame(self, frame: PhotoacousticFrame) -> Iterator[PhotoacousticEvent]:
        part = self._require(frame)
        self.counts["frames"] += 1
        if not frame.intact:
            self.counts["damaged"] += 1
            yield from self._say("damaged", "warning", f"frame {frame.seq} is damaged (crc32c) and left out")
        verdict = self._order.take(frame)
        self.counts["missing"] = self._order.missing
        if verdict.gap is not None:
            yield from self._gap(part, *verdict.gap)
        elif verdict.usable and not verdict.late and frame.flags & FLAG_LOST:
            yield from self._lost_by_device(part, frame)
        if verdict.duplicate:
            self.counts["duplicates"] += 1
            self._repeated += 1
            yield from self._say("duplicates", "info", f"frame {frame.seq} came again and is left out")
        self.counts["late"] += verdict.late
        if verdict.usable and (not verdict.late or part.assembler.belongs(frame)):
            for shot in part.assembler.add(frame):
                yield from self._shot(part, shot, "coverage" if shot.complete else "change")

    def _require(self, frame: PhotoacousticFrame) -> StreamPart:
        part = self._part
        if part is None:
            raise PeerError("frame before the header of the stream")
        (rows, samples), header = frame.samples.shape, part.header
        if samples != header.samples or frame.first_element + rows > header.elements:
            raise PeerError(
                f"frame {frame.seq} has {rows} elements of {samples} samples from element {frame.first_element} on; the header "
                f"says {header.elements} of {header.samples}; send a new header first"
            )
        if not 0 <= frame.wavelength < len(header.wavelengths_m):
            raise PeerError(f"frame {frame.seq} has wavelength {frame.wavelength} of {len(header.wavelengths_m)}")
        return part

    def _gap(self, part: StreamPart, first: int, last: int) -> Iterator[PhotoacousticEvent]:
        self._unseen += last - first + 1
        yield MissingFrames(first, last)
        which = f"frame {first} is" if first == last else f"frames {first} to {last} are"
        yield from self._say("missing", "warning", f"{which} missing; nothing is put together across the gap")
        yield from self._break(part, "change")

    def _lost_by_device(self, part: StreamPart, frame: PhotoacousticFrame) -> Iterator[PhotoacousticEvent]:
        self.counts["lost_by_device"] += 1
        yield from self._say("lost", "warning", f"the device lost data before frame {frame.seq}")
        if not part.assembler.belongs(frame):
            yield from self._break(part, "change")

    def _break(self, part: StreamPart, trigger: TriggerReason) -> Iterator[PhotoacousticEvent]:
        """End the averages, and forget the wavelengths so far: what follows does not belong to them."""
        for ready in part.averages_so_far(trigger):
            yield from self._image(part, ready)
        part.forget_planes()

    # Shots

    def _shot(self, part: StreamPart, shot: Shot, trigger: TriggerReason) -> Iterator[PhotoacousticEvent]:
        yield from self._inspect(part, shot)
        ready = part.prepare(shot, trigger)
        if ready is not None:
            yield from self._image(part, ready)

    def _inspect(self, part: StreamPart, shot: Shot) -> Iterator[PhotoacousticEvent]:
        """Look at the first whole shot: are there elements without a signal, and is the focus to be found?"""
        if not part.waits_for_inspection(shot):
            return
        fresh = part.reconstructor.find_dead(shot.samples)
        if len(fresh):
            shown = ", ".join(map(str, fresh[:16])) + (", ..." if len(fresh) > 16 else "")
            yield Note("warning", f"{len(fresh)} elements do not change and are left out: {shown}")
        if self.config.photoacoustic.autofocus != "off":
            yield from self._focus(part, self.config.photoacoustic.autofocus)

    def _image(self, part: StreamPart, ready: Ready) -> Iterator[PhotoacousticEvent]:
        shot, clock = ready.shot, StageClock()
        clock.stages["wait"] = max(0.0, time.monotonic() - shot.received)
        try:
            with clock.stage("beamform"):
                plane = part.reconstructor.image(ready.samples, shot.absent, received=shot.received)
        except AllDead:
            yield from self._failed(ready, clock, "dead_elements", "no element has a signal")
            return
        if not np.isfinite(plane).all():
            yield from self._failed(ready, clock, "not_finite", "the samples have no finite image")
            return
        outcome, reason = part.judge(ready)
        meta = part.provenance(ready, outcome, reason) | {
            "scanside_frames_missing": str(self._unseen),
            "scanside_deadline_met": str(int(self._on_time(shot))),
        }
        image = part.picture(ready, plane, "pressure", meta)
        self.counts["images"] += 1
        self.counts[outcome] += 1
        yield image
        yield self._stats(ready, clock, outcome, reason)
        if reason:
            yield from self._say(
                reason, "warning", f"image of shot {shot.number} is {outcome}: {reason.replace('_', ' ')}"
            )
        yield from self._unmix(part, ready, image, meta)

    def _on_time(self, shot: Shot) -> bool:
        return time.monotonic() - shot.received <= self.config.photoacoustic.frame_deadline_s

    def _unmix(
        self, part: StreamPart, ready: Ready, image: Image, meta: Mapping[str, str]
    ) -> Iterator[PhotoacousticEvent]:
        found = part.unmixed(ready.shot.wavelength, image.pixels[0, 0])
        if found is None:
            return
        for what in ("oxy", "deoxy", "saturation"):
            series = "saturation" if what == "saturation" else f"{what}haemoglobin"
            yield part.picture(ready, getattr(found, what), series, dict(meta))

    def _failed(self, ready: Ready, clock: StageClock, reason: str, why: str) -> Iterator[PhotoacousticEvent]:
        self.counts["failed"] += 1
        yield self._stats(ready, clock, "failed", reason)
        yield from self._say(reason, "error", f"no image of shot {ready.shot.number}: {why}")

    def _stats(self, ready: Ready, clock: StageClock, outcome: Outcome, reason: str) -> FrameStats:
        stats = FrameStats(
            pipeline=self.config.name,
            outcome=outcome,
            trigger=ready.trigger,
            key=FrameKey(repetition=ready.shot.number & _COUNTER, contrast=ready.shot.wavelength),
            received=ready.shot.received,
            stages=clock.stages,
            readouts=ready.shot.frames,
            missing=self._unseen,
            duplicates=self._repeated,
            reason=reason,
        )
        self._unseen = self._repeated = 0
        return stats

    # What the operator changes

    def _adjust(self, values: Mapping[str, Value]) -> Iterator[PhotoacousticEvent]:
        part = self._part
        if part is None:
            yield Note("error", "nothing can be adjusted before the header of the stream")
            return
        for name, value in values.items():
            try:
                yield from self._set(part, name, value)
            except ConfigError as error:
                yield Note("error", str(error))

    def _set(self, part: StreamPart, name: str, value: Value) -> Iterator[PhotoacousticEvent]:
        if name == "speed_of_sound":
            part.reconstructor.set_speed_of_sound(_number(name, value, *_SPEEDS, "m/s"))
            yield Note("info", f"speed of sound is {part.reconstructor.speed_of_sound:g} m/s")
        elif name == "delay_samples":
            part.reconstructor.set_delay(_number(name, value, *_DELAYS, "samples"))
            yield Note("info", f"delay is {part.reconstructor.delay_samples:g} samples")
        elif name == "averages":
            yield from self._break(part, "change")
            part.averages = int(_number(name, value, *_AVERAGES, "shots"))
            yield Note("info", f"averages of {part.averages} shots")
        elif name == "autofocus":
            yield from self._focus(part, str(value))
        else:
            known = "speed_of_sound, delay_samples, averages, autofocus"
            raise ConfigError(f"{name[:40]!r} cannot be adjusted in a running stream; known: {known}")

    def _focus(self, part: StreamPart, parameter: str) -> Iterator[PhotoacousticEvent]:
        chosen = _FOCUS.get(parameter)
        if chosen is None:
            raise ConfigError(f"autofocus = {parameter[:40]!r}: allowed: {', '.join(_FOCUS)}")
        shot = part.latest
        if shot is None:
            raise ConfigError("there is no whole shot yet on which to focus; try again in a moment")
        if part.reconstructor.dead.all():
            raise ConfigError("all elements are dead; there is nothing on which to focus")
        yield Note("info", str(part.reconstructor.autofocus(shot.samples, chosen)))

    # The end

    def _count_off(self, end: EndOfStream) -> Iterator[PhotoacousticEvent]:
        gap = self._order.end(end.last)
        self.counts["missing"] = self._order.missing
        if gap is not None and self._part is not None:
            yield from self._gap(self._part, *gap)

    def _flush(self, part: StreamPart, trigger: TriggerReason) -> Iterator[PhotoacousticEvent]:
        for shot in part.assembler.finish():
            yield from self._shot(part, shot, trigger)
        yield from self._break(part, trigger)

    def _end(self, message: EndOfScan) -> Iterator[PhotoacousticEvent]:
        if self._part is not None:
            yield from self._flush(self._part, "close")
        self._ended = True
        lost = {name: self.counts[name] for name in ("missing", "damaged", "duplicates", "failed") if self.counts[name]}
        if lost:
            told = ", ".join(f"{count} {name}" for name, count in lost.items())
            yield Note("warning", f"{self.counts['frames']} frames came, {self.counts['images']} images went; {told}")
        if not message.complete:
            yield Note("warning", "the stream was cut off; what had arrived was reconstructed")

    def _say(self, kind: str, level: Level, text: str) -> Iterator[PhotoacousticEvent]:
        self._told[kind] += 1
        if self._told[kind] <= _NOTES:
            more = "; further ones are counted, not told" if self._told[kind] == _NOTES else ""
            yield Note(level, text + more)


def _number(name: str, value: Value, low: float, high: float, unit: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        raise ConfigError(f"{name} = {str(value)[:40]!r}: expected {low:g} to {high:g} {unit}")
    return number
