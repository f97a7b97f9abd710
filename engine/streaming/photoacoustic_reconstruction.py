"""The reconstruction of a shot that a configuration chooses, with what can be changed while the stream runs."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..baselines.photoacoustic import LiveBeamformer
from ..config import SystemConfig
from ..errors import ConfigError, NoImage, PeerError
from ..messages import PhotoacousticHeader
from .photoacoustic_focus import Search, find_focus
from .photoacoustic_prior import PriorShots
from .photoacoustic_shots import Shot

__all__ = ["DEFAULT_SPEED", "AllDead", "Averager", "Focus", "ShotReconstructor", "Tuning", "View", "enclosed_view"]

DEFAULT_SPEED = 1500.0
"""Speed of sound in m/s in water at 26 degrees Celsius, where neither stream nor configuration says another."""
_INNER = 0.45
"""Half of a side of the field of view, as a fraction of the radius of the array: the corners stay well inside."""
_DELAY_SEARCH: Search = (24.0, 4.0, 1.0)
"""In samples."""
_SPEED_SEARCH: Search = (0.03, 0.002, 0.0005)
"""As fractions: at 1500 samples from the array one step is 3 samples, and 0.75."""
_FOCUS_PIXELS = 256
"""Along a side of an image that is judged by its sharpness, at most, unless the images of the stream have more."""
_PATTERNS = 8
"""Sets of silent elements for which a beamformer is kept."""

Focus = Literal["delay", "speed_of_sound"]
View = tuple[float, float, float, float]
"""Start and end along x1, start and end along x2, in m."""


class AllDead(Exception):
    """No element has a signal."""


def enclosed_view(positions_m: NDArray[np.float64]) -> View:
    """A square field of view around the center of the circle on which the elements lie, seen along x3.

    The circle is the least-squares one (Kasa 1976). Raises ConfigError where the elements lie on a line or on one spot.
    """
    x, y = positions_m[:, 0], positions_m[:, 1]
    middle = np.array([x.mean(), y.mean()])
    size = float(np.hypot(x - middle[0], y - middle[1]).max(initial=0.0))
    columns = np.stack([(x - middle[0]) / (size or 1), (y - middle[1]) / (size or 1), np.ones_like(x)], axis=1)
    found, _, rank, _ = np.linalg.lstsq(columns, (columns[:, :2] ** 2).sum(axis=1), rcond=1e-6)
    if rank < columns.shape[1]:
        raise ConfigError(
            "the detector elements enclose nothing in the plane of x1 and x2; give the field of view: field_of_view in the "
            "header of the stream, or photoacoustic.field_of_view_m"
        )
    center = found[:2] / 2
    radius = float(np.sqrt(found[2] + center @ center)) * size
    (x0, y0), half = middle + center * size, _INNER * radius
    return float(x0 - half), float(x0 + half), float(y0 - half), float(y0 + half)


class ShotReconstructor:
    """Makes the images of one stream. Raises ConfigError or PeerError for what no image can be made of.

    view: the field of view; pixels: along x1 and x2; dead: elements that are left out of every shot. prior: what makes the images
    of a system with a learned prior, None for the others.
    """

    def __init__(self, config: SystemConfig, header: PhotoacousticHeader, *, threads: int = 1) -> None:
        settings = config.photoacoustic
        wishes = settings.follow_wishes
        self.pixels = (wishes and header.pixels) or settings.image_pixels
        for pixels in self.pixels:
            config.limits.check("matrix", pixels, what="pixels of a photoacoustic image")
        given = settings.field_of_view_m if any(settings.field_of_view_m) else None
        self.view: View = (wishes and header.field_of_view_m) or given or enclosed_view(header.positions_m)
        self.method: str = settings.beamformer
        self.speed_of_sound = settings.speed_of_sound or header.speed_of_sound or DEFAULT_SPEED
        self.delay_samples = header.t0_samples + settings.delay_samples
        self.band_hz = settings.band_hz if any(settings.band_hz) else None
        self.dead = np.zeros(header.elements, dtype=bool)
        self.dead[list(header.dead)] = True
        self._header, self._threads = header, threads
        self._beamformers: OrderedDict[bytes, LiveBeamformer] = OrderedDict()
        learned = config.reconstruction.method == "prior"
        self.prior = PriorShots(config, header, self.pixels, self.view) if learned else None
        if not self.dead.all():
            self._beamformer(self.dead)

    def image(
        self,
        samples: NDArray[np.generic],
        absent: NDArray[np.bool_] | None = None,
        *,
        received: float | None = None,
    ) -> NDArray[np.float32]:
        """Image (y, x) of one shot (elements, samples); overwritten by the next call.

        absent: elements without data in this shot. received: monotonic time at which a deadline begins. Raises AllDead when no
        element is left.
        """
        silent = self.dead if absent is None else self.dead | absent
        if silent.all():
            raise AllDead
        if self.prior is not None:
            image = self.prior.image(samples, silent, self.speed_of_sound, self.delay_samples, received)
            if image is not None:
                return image
        return self._beamformer(silent).image(samples)

    def _beamformer(self, silent: NDArray[np.bool_]) -> LiveBeamformer:
        key = silent.tobytes()
        found = self._beamformers.get(key)
        if found is None:
            found = self._beamformers[key] = self._build(silent, self.pixels)
            if len(self._beamformers) > _PATTERNS:
                self._beamformers.popitem(last=False)
        self._beamformers.move_to_end(key)
        return found

    def _build(self, silent: NDArray[np.bool_], pixels: tuple[int, int]) -> LiveBeamformer:
        header = self._header
        try:
            return LiveBeamformer(
                header.positions_m,
                header.orientations,
                header.sampling_rate_hz,
                pixels=(pixels[1], pixels[0]),
                field_of_view_m=self.view,
                method=self.method,
                speed_of_sound=self.speed_of_sound,
                t0_samples=self.delay_samples,
                band_hz=self.band_hz,
                dead=np.flatnonzero(silent).tolist(),
                adc_offset=header.adc_offset,
                threads=self._threads,
            )
        except ValueError as error:
            raise PeerError(f"no image can be made of this stream: {error}") from None

    def set_speed_of_sound(self, value: float) -> None:
        """Use another speed of sound, in m/s, from now on."""
        self.speed_of_sound = value
        for beamformer in self._beamformers.values():
            beamformer.set_speed_of_sound(value)

    def set_delay(self, samples: float) -> None:
        """Use another time of the first sample, in samples, from now on."""
        self.delay_samples = samples
        for beamformer in self._beamformers.values():
            beamformer.set_delay(samples)

    def find_dead(self, samples: NDArray[np.generic]) -> NDArray[np.int64]:
        """Leave out elements whose samples do not change in this shot, and return those not known before.

        When that would be all of them the laser or the whole array is silent, and nothing is concluded.
        """
        flat = np.asarray((samples == samples[:, :1]).all(axis=1))
        fresh = flat & ~self.dead
        if (flat | self.dead).all() or not fresh.any():
            return np.array([], dtype=np.int64)
        self.dead |= flat
        return np.flatnonzero(fresh)

    def autofocus(self, samples: NDArray[np.generic], parameter: Focus) -> Tuning:
        """Search the sharpest image of a shot over one parameter and keep what is found.

        It looks 24 samples to both sides of the delay, or 3 % of the speed of sound; repeat it for more. It takes as long as
        about 40 images. They are those of the configured beamformer, which must suit the pulses: delay-and-sum those that are
        bright at their arrival, universal back-projection the pressure of heated bodies, which changes its sign there. Raises
        AllDead.
        """
        if self.dead.all():
            raise AllDead
        delay = parameter == "delay"
        before = self.delay_samples if delay else self.speed_of_sound
        reach, coarse, fine = _DELAY_SEARCH if delay else _SPEED_SEARCH
        unit = 1.0 if delay else before

        def pictures(pixels: tuple[int, int]) -> Callable[[float], NDArray[np.float32]]:
            beamformer = self._build(self.dead, pixels)
            change = beamformer.set_delay if delay else beamformer.set_speed_of_sound

            def picture(value: float) -> NDArray[np.float32]:
                change(value)
                return beamformer.image(samples)

            return picture

        search = (reach * unit, coarse * unit, fine * unit)
        after, gain = find_focus(pictures(self.pixels), pictures(self._fine_pixels()), before, search)
        (self.set_delay if delay else self.set_speed_of_sound)(after)
        return Tuning(parameter, before, after, gain)

    def _fine_pixels(self) -> tuple[int, int]:
        """Pixels along x1 and x2: a quarter of the shortest wavelength wide, as many as asked or `_FOCUS_PIXELS` at most."""
        rate = self._header.sampling_rate_hz
        shortest = self.speed_of_sound / min(self.band_hz[1] if self.band_hz else rate, rate / 2)
        x0, x1, y0, y1 = self.view
        wanted = [math.ceil(abs(side) / (shortest / 4)) for side in (x1 - x0, y1 - y0)]
        across, down = (max(n, min(most, _FOCUS_PIXELS)) for n, most in zip(self.pixels, wanted, strict=True))
        return across, down


class Averager:
    """Sums shots of one wavelength until there are enough; values keep the offset of the converter.

    shot: the last one in the sum; clipped, flags: of any of them. Scaled samples are (samples - rest) * factor + rest.
    """

    def __init__(self, header: PhotoacousticHeader) -> None:
        self._rest = np.float32(header.adc_offset)
        self._gain = None if header.element_gain is None else header.element_gain.astype(np.float32)[:, None]
        self._sum = np.zeros((0, 0), dtype=np.float32)
        self._shot: Shot | None = None
        self.count = self.flags = 0
        self.clipped = False

    @property
    def shot(self) -> Shot:
        """The last shot in the sum."""
        if self._shot is None:
            raise NoImage("an average of no shots")
        return self._shot

    def scaled(self, samples: NDArray[np.generic], factor: float) -> NDArray[np.generic]:
        """Samples divided by the gains of their elements and multiplied by `factor`; as they came when there is nothing to do."""
        if self._gain is None and factor == 1.0:
            return samples
        values = samples.astype(np.float32) - self._rest
        values *= np.float32(factor)
        if self._gain is not None:
            values /= self._gain
        values += self._rest
        return values

    def add(self, samples: NDArray[np.generic], shot: Shot, *, clipped: bool) -> None:
        """Add a shot to the sum."""
        if self.count == 0:
            self._sum = samples.astype(np.float32)
            self.flags, self.clipped = 0, False
        else:
            np.add(self._sum, samples, out=self._sum, casting="unsafe")
        self._shot = shot
        self.count += 1
        self.flags |= shot.flags
        self.clipped |= clipped

    def take(self) -> NDArray[np.float32]:
        """The mean, after which the next sum begins."""
        self._sum /= np.float32(self.count)
        self.count = 0
        return self._sum


class Tuning(msgspec.Struct, frozen=True):
    """What an autofocus found. gain: sharpness over that before."""

    parameter: str
    before: float
    after: float
    gain: float

    def __str__(self) -> str:
        name, unit = ("delay", "samples") if self.parameter == "delay" else ("speed of sound", "m/s")
        return f"autofocus: {name} {self.before:.6g} to {self.after:.6g} {unit}, image {self.gain:.3g} times as sharp"
