"""Photoacoustic signals of small spheres in closed form, and a live scan made of them: vessels, discs, something that moves.

A sphere of radius a that is heated at once sends out p(r, t) = p0 (r - ct) / (2r) where |r - ct| <= a and nothing else (Diebold,
Sun and Khan 1991; Wang, "Photoacoustic imaging and spectroscopy", 2009, chapter 1). It owes nothing to a grid, so that
reconstructing it is no inverse crime.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..messages import PhotoacousticFrame, PhotoacousticHeader
from ..streaming.photoacoustic_unmixing import absorption_per_metre

__all__ = ["LiveScan", "Spheres", "band_limited", "ring", "sphere_signals", "vessel_tree"]

Floats = NDArray[np.float64]
_FULL_SCALE = 24000
"""Counts of the strongest signal: a quarter of the range stays free."""
_CENTER_HZ, _BANDWIDTH = 2.5e6, 130.0
_PULSE_HZ, _PULSATION = 1.2, 0.25
_NEEDLE_RADIUS, _NEEDLE_PERIOD_S = 0.6e-3, 4.0
_OXYGEN = {"arteries": 0.97, "veins": 0.70}


class Spheres(msgspec.Struct, frozen=True, eq=False):
    """centers: (n, 3) in m; radii: (n,) in m; pressures: (n,) just after the laser pulse."""

    centers: Floats
    radii: Floats
    pressures: Floats

    def __len__(self) -> int:
        return len(self.radii)

    def picture(self, pixels: tuple[int, int], view_m: tuple[float, float, float, float]) -> Floats:
        """Initial pressure in the plane x3 = 0: (y, x), the pressures of overlapping spheres added."""
        (nx, ny), (x0, x1, y0, y1) = pixels, view_m
        x = x0 + (np.arange(nx) + 0.5) * (x1 - x0) / nx
        y = y0 + (np.arange(ny) + 0.5) * (y1 - y0) / ny
        image = np.zeros((ny, nx))
        for center, radius, pressure in zip(self.centers, self.radii, self.pressures, strict=True):
            inside = (x - center[0]) ** 2 + (y[:, None] - center[1]) ** 2 + center[2] ** 2 <= radius**2
            image[inside] += pressure
        return image


def ring(elements: int, radius_m: float, span_degrees: float = 360.0) -> Floats:
    """Positions (elements, 3) of elements on a circle in the plane x3 = 0, its opening downwards."""
    whole = span_degrees >= 360
    angles = np.radians(np.linspace(-span_degrees / 2, span_degrees / 2, elements, endpoint=not whole) + 90)
    return radius_m * np.stack([np.cos(angles), np.sin(angles), np.zeros(elements)], axis=1)


def sphere_signals(
    positions_m: Floats,
    spheres: Spheres,
    samples: int,
    sampling_rate_hz: float,
    *,
    speed_of_sound: float = 1500.0,
    t0_samples: float = 0.0,
) -> Floats:
    """Pressure at each element, each sample the mean over its interval: float64 (elements, samples)."""
    step = speed_of_sound / sampling_rate_hz
    signals = np.zeros((len(positions_m), samples))
    rows = np.arange(len(positions_m))[:, None]
    for center, radius, pressure in zip(spheres.centers, spheres.radii, spheres.pressures, strict=True):
        distance = np.linalg.norm(positions_m - center, axis=1)[:, None]
        first = np.floor((distance - radius) / step - t0_samples - 0.5).astype(np.int64)
        numbers = first + np.arange(int(np.ceil(2 * radius / step)) + 3)
        edges = (numbers[:, :1] - 0.5 + np.arange(numbers.shape[1] + 1) + t0_samples) * step
        reached = np.clip(edges, distance - radius, distance + radius) - distance
        means = -pressure / (4 * distance) * np.diff(reached**2, axis=1) / step
        inside = (numbers >= 0) & (numbers < samples)
        signals[np.broadcast_to(rows, numbers.shape)[inside], numbers[inside]] += means[inside]
    return signals


def band_limited(signals: Floats, sampling_rate_hz: float, center_hz: float, bandwidth_percent: float) -> Floats:
    """Signals (..., samples) as a transducer hears them: a Gaussian response without delay, as k-Wave has it.

    bandwidth_percent: full width at half maximum, relative to the center frequency.
    """
    frequencies = np.fft.rfftfreq(signals.shape[-1], 1 / sampling_rate_hz)
    variance = (bandwidth_percent / 100 * center_hz / (2 * np.sqrt(2 * np.log(2)))) ** 2
    response = np.exp(-((frequencies - center_hz) ** 2) / (2 * variance))
    return np.fft.irfft(np.fft.rfft(signals, axis=-1) * response, n=signals.shape[-1], axis=-1)


def vessel_tree(
    rng: np.random.Generator,
    root_m: Sequence[float],
    towards_m: Sequence[float],
    *,
    radius_m: float = 0.5e-3,
    levels: int = 5,
) -> Spheres:
    """A vessel that winds and forks, in the plane x3 = 0, as spheres half a radius apart.

    The radii of the two branches of a fork obey Murray's law: the cubes add up to that of the parent.
    """
    start, end = np.asarray(root_m, np.float64), np.asarray(towards_m, np.float64)
    heading = float(np.arctan2(*(end - start)[::-1]))
    pieces = list(_branch(rng, start, heading, float(np.linalg.norm(end - start)), radius_m, levels))
    centers = np.concatenate([np.column_stack([points, np.zeros(len(points))]) for points, _ in pieces])
    radii = np.concatenate([np.full(len(points), radius) for points, radius in pieces])
    return Spheres(centers, radii, np.ones(len(radii)))


def _branch(
    rng: np.random.Generator, start: Floats, heading: float, length: float, radius: float, levels: int
) -> Iterator[tuple[Floats, float]]:
    count = max(2, round(2 * length / radius))
    headings = heading + np.cumsum(rng.normal(0, 0.05, count))
    points = start + np.cumsum(radius / 2 * np.stack([np.cos(headings), np.sin(headings)], axis=1), axis=0)
    yield points, radius
    if levels > 1:
        share = rng.uniform(0.35, 0.65)
        for sign, part in ((1, share), (-1, 1 - share)):
            turned = headings[-1] + sign * rng.uniform(0.3, 0.7)
            yield from _branch(rng, points[-1], turned, 0.7 * length, radius * part ** (1 / 3), levels - 1)


class LiveScan:
    """A simulated photoacoustic scan of a ring array: arteries that pulsate, veins, two discs, and a tip that circles.

    header: as a device would send it; picture: initial pressure (y, x) of what does not move, at the first wavelength.
    noise: standard deviation, relative to the strongest signal. Frames carry the wavelengths in turn.
    """

    def __init__(
        self,
        *,
        elements: int = 256,
        samples: int = 2030,
        rate_hz: float = 25.0,
        wavelengths_m: tuple[float, ...] = (800e-9,),
        noise: float = 0.01,
        radius_m: float = 40e-3,
        span_degrees: float = 360.0,
        sampling_rate_hz: float = 40e6,
        speed_of_sound: float = 1500.0,
        seed: int = 7,
    ) -> None:
        self._rng = np.random.default_rng(seed)
        self._rate, self._noise, self._speed = rate_hz, noise, speed_of_sound
        half = 12.5e-3
        self.header = PhotoacousticHeader(
            stream=self._rng.bytes(16).hex(),
            elements=elements,
            samples=samples,
            positions_m=ring(elements, radius_m, span_degrees),
            sampling_rate_hz=sampling_rate_hz,
            wavelengths_m=wavelengths_m,
            speed_of_sound=speed_of_sound,
            field_of_view_m=(-half, half, -half, half),
            details={"device": {"general": {"unique_identifier": "scanside-simulation"}}},
        )
        self.parts = {
            "arteries": vessel_tree(self._rng, (-11e-3, -6e-3), (-5e-3, -3e-3)),
            "veins": vessel_tree(self._rng, (10e-3, 9e-3), (5e-3, 4e-3), radius_m=0.6e-3, levels=4),
            "discs": Spheres(np.array([[6e-3, -6e-3, 0], [-6e-3, 7e-3, 0]]), np.array([2e-3, 1.5e-3]), np.full(2, 0.5)),
        }
        self._signals = {name: self._heard(spheres) for name, spheres in self.parts.items()}
        self._strengths = self._spectra(wavelengths_m)
        strongest = max(float(np.abs(self._clean(index, 0.0)).max()) for index in range(len(wavelengths_m)))
        self._counts = _FULL_SCALE / strongest
        pixels = (256, 256)
        view = (-half, half, -half, half)
        self.picture = sum(self._strengths[name][0] * part.picture(pixels, view) for name, part in self.parts.items())

    def _heard(self, spheres: Spheres) -> Floats:
        header = self.header
        signals = sphere_signals(
            header.positions_m, spheres, header.samples, header.sampling_rate_hz, speed_of_sound=self._speed
        )
        return band_limited(signals, header.sampling_rate_hz, _CENTER_HZ, _BANDWIDTH)

    def _spectra(self, wavelengths_m: tuple[float, ...]) -> dict[str, Floats]:
        """Strength of each part at each wavelength: blood by its oxygen, everything else alike at all."""
        spectra = absorption_per_metre(wavelengths_m)
        blood = {name: oxygen * spectra[:, 0] + (1 - oxygen) * spectra[:, 1] for name, oxygen in _OXYGEN.items()}
        scale = max(float(values.max()) for values in blood.values())
        alike = np.ones(len(wavelengths_m))
        return {**{name: values / scale for name, values in blood.items()}, "discs": alike, "tip": alike}

    def _clean(self, wavelength: int, when_s: float) -> Floats:
        beat = 1 + _PULSATION * np.sin(2 * np.pi * _PULSE_HZ * when_s)
        angle = 2 * np.pi * when_s / _NEEDLE_PERIOD_S
        tip = Spheres(9e-3 * np.array([[np.cos(angle), np.sin(angle), 0]]), np.array([_NEEDLE_RADIUS]), np.ones(1))
        strength = {name: values[wavelength] for name, values in self._strengths.items()}
        signals = strength["tip"] * self._heard(tip) + strength["arteries"] * beat * self._signals["arteries"]
        return np.asarray(
            signals + strength["veins"] * self._signals["veins"] + strength["discs"] * self._signals["discs"]
        )

    def frame(self, number: int) -> PhotoacousticFrame:
        """The frame of one shot, int16 with noise."""
        wavelength, when = number % len(self.header.wavelengths_m), number / self._rate
        signals = self._clean(wavelength, when) * self._counts
        if self._noise:
            signals += self._noise * _FULL_SCALE * self._rng.standard_normal(signals.shape, dtype=np.float32)
        samples = np.clip(np.rint(signals), -32768, 32767).astype(np.int16)
        return PhotoacousticFrame(seq=number, shot=number, samples=samples, wavelength=wavelength, timestamp_s=when)
