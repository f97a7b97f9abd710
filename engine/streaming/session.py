"""One scan, from its header to its last image, without a socket: `feed` a message, get the events it causes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, MutableMapping

import msgspec
import numpy as np
import torch

from ..config import SystemConfig, Value, parameter_overrides, with_overrides
from ..errors import ConfigError, NoImage, PeerError, ScansideError, StreamError
from ..messages import (
    AcquisitionBatch,
    EndOfScan,
    Event,
    FrameStats,
    Image,
    Message,
    Note,
    Parameters,
    ScanHeader,
    WaveformRecord,
)
from ..preparation.noise import NoiseModel
from .gathered import GatheredReconstructor
from .images import ImageMaker
from .lanes import CartesianLane, ClosedFrame, GatheringLane, Run
from .layout import encoding_of, frame_key, is_cartesian
from .reconstruction import CartesianReconstructor
from .results import Reconstruction, threads
from .triggers import ReadoutKind, runs

__all__ = ["NoiseStore", "Session"]

NoiseStore = MutableMapping[str, NoiseModel]
"""Noise measurements by measurement id, shared by sessions."""

IMAGES, ORIGINALS, DEVIATIONS, PREVIEWS = 1, 2, 3, 4
"""Series numbers: what the system made, its plain counterpart, standard deviation over samples, and early estimates."""

_Lane = CartesianLane | GatheringLane
_Reconstructor = CartesianReconstructor | GatheredReconstructor


class Session:
    """A scan being reconstructed while it arrives.

    `fire`: the other side is a FIRE or OpenRecon console. `noise`: noise measurements of earlier scans, to which this one's
    is added. `solver_threads`: processor
    threads of iterative reconstructions; what is done per readout is too small for more than one.
    """

    def __init__(
        self,
        config: SystemConfig,
        *,
        fire: bool = False,
        noise: NoiseStore | None = None,
        solver_threads: int = 1,
    ) -> None:
        self.config = config
        self.header: ScanHeader | None = None
        self.counts: Counter[str] = Counter()
        """Readouts by kind, and what was left out by reason."""
        self._fire = fire
        self._store: NoiseStore = {} if noise is None else noise
        self._noise: NoiseModel | None = None
        self._threads = solver_threads
        self._lanes: dict[int, tuple[_Lane, _Reconstructor]] = {}
        self._images: ImageMaker | None = None
        self._ended = False

    def feed(self, message: Message) -> Iterator[Event]:
        """Take one message and yield what follows from it: images, statistics, notes.

        Raises `StreamError` for what cannot be used; the session can be ended with `EndOfScan` after that.
        """
        if self._ended:
            raise PeerError("data after the end of the scan")
        if isinstance(message, AcquisitionBatch):
            yield from self._acquisitions(message)
        elif isinstance(message, ScanHeader):
            self._start(message)
        elif isinstance(message, Parameters):
            yield from self._parameters(message.values)
        elif isinstance(message, Image):
            self.counts["images"] += 1
            yield message
        elif isinstance(message, WaveformRecord):
            self.counts["waveforms"] += 1
        elif isinstance(message, EndOfScan):
            yield from self._end(message)

    def _start(self, header: ScanHeader) -> None:
        if self.header is not None:
            raise PeerError("second header in one session; a session is one scan")
        self.header = header
        self._images = ImageMaker(header, self.config.output, self.config.name, fire=self._fire)
        wanted = header.dependencies.get("Noise")
        if wanted and self.config.preparation.prewhiten:
            self._noise = self._store.get(wanted)

    def _parameters(self, values: dict[str, Value]) -> Iterator[Event]:
        if self._lanes:
            yield Note("warning", "parameters came after the first readout and are ignored")
            return
        known, unknown = parameter_overrides(values)
        try:
            self.config = with_overrides(self.config, known, source="parameters")
        except ConfigError as error:
            yield Note("error", str(error))
            return
        if self.header is not None:
            self._images = ImageMaker(self.header, self.config.output, self.config.name, fire=self._fire)
        if unknown:
            yield Note("info", f"parameters without meaning for {self.config.name}: {', '.join(sorted(unknown))[:500]}")
        if known:
            yield Note("info", "parameters in effect: " + ", ".join(f"{k} = {v}" for k, v in sorted(known.items())))

    def _acquisitions(self, batch: AcquisitionBatch) -> Iterator[Event]:
        if self.header is None:
            raise PeerError("acquisition before the header of the scan")
        if self.config.reconstruction.method == "none":
            self.counts["imaging"] += len(batch)
            return
        for part, kind in runs(batch.headers):
            self.counts[kind.name.lower()] += part.stop - part.start
            trajectory = None if batch.trajectory is None else batch.trajectory[part]
            run = Run(batch.headers[part], batch.samples[part], trajectory, batch.received)
            if kind is ReadoutKind.NOISE:
                yield from self._add_noise(run)
            elif kind is not ReadoutKind.OTHER or int(run.headers[0]["encoding_space_ref"]) in self._lanes:
                yield from self._measured(run, kind)

    def _add_noise(self, run: Run) -> Iterator[Event]:
        dwell = float(run.headers[0]["sample_time_us"])
        try:
            if self._noise is None or self.counts["noise"] == len(run.headers):
                self._noise = NoiseModel.from_readouts(run.samples, dwell)
            else:
                self._noise = self._noise.accumulate(run.samples, dwell)
        except StreamError as error:
            self.counts["rejected"] += len(run.headers)
            yield Note("warning", f"noise readout left out: {error}")

    def _measured(self, run: Run, kind: ReadoutKind) -> Iterator[Event]:
        try:
            lane, reconstructor = self._lane(run, kind)
            for closed in self._ended_by(run, kind, lane):
                yield from self._finish(lane, reconstructor, closed)
            if isinstance(reconstructor, CartesianReconstructor):
                reconstructor.look_ahead(frame_key(run.headers[0]))
        except PeerError as error:
            # a readout that does not fit is left out and counted: the rest of the scan is still worth an image
            if not self.counts["rejected"]:
                yield Note("warning", f"readout left out: {error}")
            self.counts["rejected"] += len(run.headers)

    @staticmethod
    def _ended_by(run: Run, kind: ReadoutKind, lane: _Lane) -> Iterator[ClosedFrame]:
        if kind is ReadoutKind.OTHER:
            return lane.flagged(run.headers[-1])
        if kind is ReadoutKind.CALIBRATION and isinstance(lane, CartesianLane):
            return lane.calibration(run)
        return lane.imaging(run)

    def _lane(self, run: Run, kind: ReadoutKind) -> tuple[_Lane, _Reconstructor]:
        header = self.header
        if header is None:
            raise PeerError("acquisition before the header of the scan")
        index = encoding_of(header, run.headers[0])
        found = self._lanes.get(index)
        # the shape of the imaging readouts counts: calibration of another shape, measured before them, is of no use
        if found is None or (kind is ReadoutKind.IMAGING and not found[0].began and not found[0].fits(run)):
            found = self._open_lane(header, index, run)
            self._lanes[index] = found
        return found

    def _open_lane(self, header: ScanHeader, index: int, run: Run) -> tuple[_Lane, _Reconstructor]:
        space, first, limits = header.encodings[index], run.headers[0], self.config.limits
        matrix = self._whitening(header, first)
        if matrix is None and header.dependencies.get("Noise") and self.config.preparation.prewhiten:
            self.counts["noise_unknown"] += 1
        if is_cartesian(space):
            lane = CartesianLane(self.config, limits, space, first, matrix)
            return lane, CartesianReconstructor(self.config, lane)
        return GatheringLane(self.config, limits, space, first, matrix), GatheredReconstructor(self.config, space)

    def _whitening(self, header: ScanHeader, first: np.ndarray) -> torch.Tensor | None:
        noise = self._noise
        if noise is None or not self.config.preparation.prewhiten:
            return None
        if noise.channels != int(first["active_channels"]):
            self.counts["noise_mismatch"] += 1
            return None
        return noise.whitening(float(first["sample_time_us"]), header.relative_receiver_noise_bandwidth)

    def _finish(self, lane: _Lane, reconstructor: _Reconstructor, closed: ClosedFrame) -> Iterator[Event]:
        begun = time.monotonic()
        try:
            for result in self._results(reconstructor, closed):
                if result.preview:
                    yield self._image(lane, closed, result, PREVIEWS)
        except NoImage as error:
            yield self._stats(closed, None, begun, failed=error.reason)
            yield Note("error", f"no image for {closed.key}: {error}")
            lane.release(closed)
            return
        except (ScansideError, RuntimeError, ValueError, MemoryError) as error:
            yield Note(
                "error", f"{self.config.name} failed ({type(error).__name__}: {error}); sending the zero-filled image"
            )
            result = reconstructor.fallback(closed)
        yield from self._deliver(lane, closed, result, begun)
        if self.config.output.send_original and result.method != "zero_filled":
            yield self._image(lane, closed, reconstructor.original(closed), ORIGINALS)
        lane.release(closed)

    def _results(self, reconstructor: _Reconstructor, closed: ClosedFrame) -> Iterator[Reconstruction]:
        """Previews and the image of a frame, each made with the threads that this takes."""
        estimates = reconstructor.estimates(closed)
        while True:
            with threads(self._threads if reconstructor.heavy else 1):
                result = next(estimates, None)
            if result is None:
                return
            yield result

    def _deliver(self, lane: _Lane, closed: ClosedFrame, result: Reconstruction, begun: float) -> Iterator[Event]:
        if not result.finite:
            yield self._stats(closed, result, begun, failed="not_finite")
            yield Note("error", f"no image for {closed.key}: the data held no finite values")
            return
        image = self._image(lane, closed, result, IMAGES)
        stats = self._stats(closed, result, begun)
        yield image
        if result.deviation is not None:
            yield self._image(lane, closed, msgspec.structs.replace(result, image=result.deviation), DEVIATIONS)
        yield stats
        if result.reason:
            yield Note("warning", f"image of {closed.key} is {result.outcome}: {result.reason.replace('_', ' ')}")

    def _image(self, lane: _Lane, closed: ClosedFrame, result: Reconstruction, series: int) -> Image:
        readout = closed.frame.header
        if self._images is None or readout is None:
            raise PeerError("image before the header of the scan")
        meta = result.attributes() | {
            "scanside_trigger": [closed.reason],
            "SequenceDescriptionAdditional": [result.method],
        }
        return self._images.make(result.image.numpy(), readout, lane.space, series=series, meta=meta)

    def _stats(self, closed: ClosedFrame, result: Reconstruction | None, begun: float, failed: str = "") -> FrameStats:
        stats = FrameStats(
            pipeline=self.config.name,
            outcome="failed",
            trigger=closed.reason,
            key=closed.key,
            received=closed.frame.received,
            stages={"close": time.monotonic() - begun},
            readouts=closed.frame.readouts,
            reason=failed,
        )
        if result is None:
            return stats
        return msgspec.structs.replace(
            stats,
            outcome="failed" if failed else result.outcome,
            stages={**result.stages, **stats.stages},
            missing=result.missing,
            duplicates=result.duplicates,
            outside=result.outside,
            acceleration=result.acceleration,
            reason=failed or result.reason,
        )

    def _end(self, message: EndOfScan) -> Iterator[Event]:
        for lane, reconstructor in list(self._lanes.values()):
            for closed in lane.finish():
                yield from self._finish(lane, reconstructor, closed)
        self._ended = True
        if self._noise is not None and self.header is not None and self.header.measurement_id and self.counts["noise"]:
            self._store[self.header.measurement_id] = self._noise
        if self.counts["noise_mismatch"]:
            yield Note("warning", "the noise was measured with another number of channels; not prewhitened")
        if self.counts["noise_unknown"]:
            yield Note("warning", "the noise measurement that this scan depends on has not been seen; not prewhitened")
        if self.counts["rejected"]:
            yield Note("warning", f"{self.counts['rejected']} readouts did not fit this scan and were left out")
        if not message.complete:
            yield Note("warning", "the scan was cut off; what had arrived was reconstructed")
