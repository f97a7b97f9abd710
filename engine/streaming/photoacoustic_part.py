"""All that belongs to one header of a photoacoustic stream: how its shots are put together, averaged, imaged and unmixed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec
import numpy as np

from ..config import SystemConfig
from ..errors import ConfigError
from ..messages import Image, Outcome, PhotoacousticHeader, TriggerReason
from .photoacoustic_images import PlaneImages
from .photoacoustic_reconstruction import Averager, ShotReconstructor
from .photoacoustic_shots import FLAG_CLIPPED, FLAG_TRIGGER, Shot, ShotAssembler
from .photoacoustic_unmixing import CHROMOPHORES, Concentrations, Unmixer

__all__ = ["Ready", "StreamPart"]

_RAILS = {"int16": (-32768, 32767), "uint16": (0, 65535)}
"""Ends of the range of a converter: a sample there was cut off."""


class Ready(msgspec.Struct, frozen=True, eq=False):
    """Samples that shall become an image. shot: the last that went into them; averaged: of how many they are the mean."""

    shot: Shot
    samples: np.ndarray
    averaged: int
    wanted: int
    trigger: TriggerReason
    clipped: bool = False
    flags: int = 0


class StreamPart:
    """The state behind one header. Raises ConfigError, PeerError or LimitExceeded for what cannot be reconstructed.

    averages: shots per image; latest: the last whole shot; refused: why there is no unmixing, empty where there is or where none
    was asked for.
    """

    def __init__(self, config: SystemConfig, header: PhotoacousticHeader, threads: int) -> None:
        size = header.elements * header.samples * (8 + 4 * len(header.wavelengths_m))
        config.limits.check("session_bytes", size, what="memory for the shots of this stream")
        self.header = header
        self.reconstructor = ShotReconstructor(config, header, threads=threads)
        self.assembler = ShotAssembler(header)
        self.averages = config.photoacoustic.averages or header.averages
        self.latest: Shot | None = None
        self.refused = ""
        self._images = PlaneImages(config.name, self.reconstructor.view)
        self._averagers = [Averager(header) for _ in header.wavelengths_m]
        self._energies: list[float | None] = [None for _ in header.wavelengths_m]
        self._planes: list[np.ndarray | None] = [None for _ in header.wavelengths_m]
        self._rails = _RAILS[header.data_type]
        self._uninspected = True
        self._unmixer: Unmixer | None = None
        if config.photoacoustic.unmix and len(set(header.wavelengths_m)) >= len(CHROMOPHORES):
            try:
                self._unmixer = Unmixer(header.wavelengths_m)
            except ConfigError as error:
                self.refused = str(error)

    def waits_for_inspection(self, shot: Shot) -> bool:
        """Whether this is the first whole shot with a signal; keeps it as the latest in any case."""
        if shot.complete:
            self.latest = shot
        if not (self._uninspected and shot.complete) or not np.ptp(shot.samples):
            return False
        self._uninspected = False
        return True

    # From shots to samples of an image

    def prepare(self, shot: Shot, trigger: TriggerReason) -> Ready | None:
        """What is to be imaged now that a shot is there; None while an average still lacks shots.

        A shot that lacks elements never enters an average; it is imaged by itself.
        """
        low, high = self._rails
        clipped = bool(shot.flags & FLAG_CLIPPED) or int(shot.samples.max()) == high or int(shot.samples.min()) == low
        averager = self._averagers[shot.wavelength]
        samples = averager.scaled(shot.samples, self._energy_factor(shot))
        if self.averages <= 1 or not shot.complete:
            return Ready(shot, samples, 1, 1, trigger, clipped, shot.flags)
        averager.add(samples, shot, clipped=clipped)
        return self._mean(averager, "count") if averager.count >= self.averages else None

    def averages_so_far(self, trigger: TriggerReason) -> Iterator[Ready]:
        """The means of what has come, where something has; their sums begin anew."""
        for averager in self._averagers:
            if averager.count:
                yield self._mean(averager, trigger)

    def _mean(self, averager: Averager, trigger: TriggerReason) -> Ready:
        count, shot, clipped, flags = averager.count, averager.shot, averager.clipped, averager.flags
        return Ready(shot, averager.take(), count, self.averages, trigger, clipped, flags)

    def _energy_factor(self, shot: Shot) -> float:
        """Energy of the first pulse of this wavelength over that of this one."""
        if shot.pulse_energy_joule is None:
            return 1.0
        first = self._energies[shot.wavelength]
        if first is None:
            self._energies[shot.wavelength] = first = shot.pulse_energy_joule
        return first / shot.pulse_energy_joule

    # From planes to images

    def judge(self, ready: Ready) -> tuple[Outcome, str]:
        """Outcome and the fixed word for why it is not `complete`."""
        if ready.clipped:
            return "degraded", "clipped"
        if ready.flags & FLAG_TRIGGER:
            return "degraded", "trigger_error"
        if not ready.shot.complete:
            return "incomplete", "elements_missing"
        if ready.averaged < ready.wanted:
            return "incomplete", "shots_missing"
        prior = self.reconstructor.prior
        if prior is not None and (prior.refused or prior.late):
            return "degraded", "no_prior" if prior.refused else "deadline"
        return "complete", ""

    def provenance(self, ready: Ready, outcome: Outcome, reason: str) -> dict[str, str]:
        """How an image was made, by attribute."""
        made, shot = self.reconstructor, ready.shot
        silent = made.dead if shot.absent is None else made.dead | shot.absent
        meta = {
            "scanside_method": made.method,
            "scanside_outcome": outcome,
            "scanside_speed_of_sound": f"{made.speed_of_sound:.6g}",
            "scanside_delay_samples": f"{made.delay_samples:.6g}",
            "scanside_band_hz": "none" if made.band_hz is None else "{:g} {:g}".format(*made.band_hz),
            "scanside_wavelength_nm": f"{self.header.wavelengths_m[shot.wavelength] * 1e9:.6g}",
            "scanside_shot": str(shot.number),
            "scanside_averaged": str(ready.averaged),
            "scanside_elements": str(len(silent) - int(silent.sum())),
            "scanside_elements_left_out": str(int(silent.sum())),
            "SequenceDescriptionAdditional": made.method,
        }
        if made.prior is not None:
            meta |= made.prior.attributes()
        return meta | ({"scanside_reason": reason} if reason else {})

    def picture(self, ready: Ready, plane: np.ndarray, what: str, meta: Mapping[str, str]) -> Image:
        """The image that travels; see `PlaneImages.make`."""
        shot = ready.shot
        return self._images.make(
            plane, what, shot=shot.number, wavelength=shot.wavelength, timestamp_s=shot.timestamp_s, meta=meta
        )

    # Wavelengths

    def forget_planes(self) -> None:
        """Begin a new round of wavelengths."""
        self._planes = [None for _ in self._planes]

    def unmixed(self, wavelength: int, plane: np.ndarray) -> Concentrations | None:
        """Keep the plane of a wavelength, which must not change; concentrations once a round is complete."""
        if self._unmixer is None:
            return None
        self._planes[wavelength] = plane
        planes = [found for found in self._planes if found is not None]
        if len(planes) < len(self._planes):
            return None
        self.forget_planes()
        return self._unmixer.unmix(planes)
