"""Random photoacoustic scenes for training and tests: vessel trees, discs, tissue, and what rings of detectors hear of them.

Everything is made of heated spheres, whose sound is known in closed form (`photoacoustic.sphere_signals`), so that no grid or
forward operator that a reconstruction uses is in the data. A seed fixes a scene, its detectors and its noise.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
from numpy.typing import NDArray

from .photoacoustic import Spheres, ring, sphere_signals, vessel_tree
from .photoacoustic_flaws import Flaws

__all__ = ["Recorded", "Ring", "random_ring", "random_scene", "record", "spectrum_band"]

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
_OVERSAMPLED = 2
"""Sound is computed at this many times the sampling rate and then brought down through the band."""
_TREES, _DISCS, _TISSUE, _GRAINS = (0, 3), (0, 5), 0.6, (0, 60)
_LARGEST_SPHERES = 900
"""Pieces of a scene; more branches are left out."""


class Ring(msgspec.Struct, frozen=True, kw_only=True):
    """A full ring of detectors and how it hears: lengths in m, frequencies in Hz.

    view_m: side of the field of view. phase: of the transducer, in radians, against one that shows a heated ball as bright.
    edges_hz, falls_hz: where the spectrum begins and ends, and over what widths.
    """

    radius_m: float
    elements: int
    samples: int
    sampling_rate_hz: float
    first_sample: float
    view_m: float
    speed_of_sound: float
    edges_hz: tuple[float, float]
    falls_hz: tuple[float, float]
    phase: float = 0.0

    @property
    def positions_m(self) -> Floats:
        """(elements, 3), counter-clockwise."""
        return ring(self.elements, self.radius_m)


class Recorded(msgspec.Struct, frozen=True, eq=False):
    """signals: float32 (elements, samples), noise-free, strongest value 1; ring: who heard them; scene: what was heard."""

    signals: Singles
    ring: Ring
    scene: Spheres


def random_ring(rng: np.random.Generator, *, elements: int = 512, view_m: float = 0.032, samples: int = 256) -> Ring:
    """A ring whose radius, speed of sound, band and phase are drawn; times are those at which its field of view is heard.

    The samples cover the field of view and its corners; their rate is about 2.9 times the upper end of the band.
    """
    radius = view_m * rng.uniform(1.15, 1.6)
    speed = rng.uniform(1440, 1580)
    path = 1.06 * math.sqrt(2) * view_m
    rate = samples * speed / path
    top = rate / 2.857
    low, high = top * rng.uniform(0.03, 0.12), top * rng.uniform(0.6, 1.0)
    return Ring(
        radius_m=radius,
        elements=elements,
        samples=samples,
        sampling_rate_hz=rate,
        first_sample=(radius - path / 2) / speed * rate,
        view_m=view_m,
        speed_of_sound=speed,
        edges_hz=(low, high),
        falls_hz=(0.4 * low, high * rng.uniform(0.08, 0.3)),
        phase=rng.uniform(-0.45, 0.45),
    )


def random_scene(rng: np.random.Generator, view_m: float) -> Spheres:
    """Vessel trees, discs, the outline of a piece of tissue and grains in it, inside a square of side `view_m` around 0."""
    half = view_m / 2
    parts = [_disc(rng, half) for _ in range(int(rng.integers(*_DISCS, endpoint=True)))]
    if rng.random() < _TISSUE:
        parts.append(_outline(rng, half))
    grains = int(rng.integers(*_GRAINS, endpoint=True))
    if grains:
        parts.append(_grains(rng, half, grains))
    parts += [_tree(rng, half) for _ in range(int(rng.integers(*_TREES, endpoint=True)))]
    if not parts:
        return random_scene(rng, view_m)
    joined = [np.concatenate([getattr(p, name) for p in parts]) for name in ("centers", "radii", "pressures")]
    centers, radii, pressures = (values[:_LARGEST_SPHERES] for values in joined)
    inside = np.hypot(centers[:, 0], centers[:, 1]) + radii < 0.98 * math.sqrt(2) * half
    return Spheres(centers[inside], radii[inside], pressures[inside])


def record(rng: np.random.Generator, heard_by: Ring, scene: Spheres, flaws: Flaws | None = None) -> Recorded:
    """What a ring hears of a scene, without noise; strength varies smoothly with the view, as in attenuating tissue."""
    if flaws is not None:
        scene = msgspec.structs.replace(scene, centers=flaws.tilted(scene.centers))
    finer = _OVERSAMPLED * heard_by.sampling_rate_hz
    sound = sphere_signals(
        heard_by.positions_m,
        scene,
        _OVERSAMPLED * heard_by.samples,
        finer,
        speed_of_sound=heard_by.speed_of_sound,
        t0_samples=_OVERSAMPLED * heard_by.first_sample,
    )
    turns = 2 * np.pi * np.arange(heard_by.elements) / heard_by.elements
    waves = [rng.normal(0, 0.08 / k) * np.cos(k * turns + rng.uniform(0, 2 * np.pi)) for k in (1, 2, 3)]
    signals = _heard(sound, heard_by, finer) * np.exp(sum(waves))[:, None]
    if flaws is not None:
        signals = flaws.applied(signals)
    return Recorded((signals / max(float(np.abs(signals).max()), 1e-30)).astype(np.float32), heard_by, scene)


def spectrum_band(frequencies: Floats, edges_hz: tuple[float, float], falls_hz: tuple[float, float]) -> Floats:
    """A pass band with Gaussian edges: 1 between the edges, falling to exp(-1/2) over the widths outside them."""
    below, above = np.minimum(frequencies - edges_hz[0], 0), np.maximum(frequencies - edges_hz[1], 0)
    return np.asarray(np.exp(-((below / falls_hz[0]) ** 2) / 2 - (above / falls_hz[1]) ** 2 / 2))


def _heard(sound: Floats, by: Ring, rate: float) -> Floats:
    """Through the band and the phase of the transducer, and down to its sampling rate."""
    count = sound.shape[1]
    padded = 2 * count
    frequencies: Floats = np.fft.rfftfreq(padded, 1 / rate).astype(np.float64)
    response = spectrum_band(frequencies, by.edges_hz, by.falls_hz) * np.exp(1j * (by.phase - np.pi / 2))
    response[0] = 0
    spectrum = np.fft.rfft(sound, padded, axis=1) * response
    kept = spectrum[:, : padded // _OVERSAMPLED // 2 + 1]
    return np.asarray(np.fft.irfft(kept, padded // _OVERSAMPLED, axis=1)[:, : by.samples] / _OVERSAMPLED)


def _inside(rng: np.random.Generator, half: float) -> Floats:
    """A place (x, y) in the circle inside the field of view."""
    angle, distance = rng.uniform(0, 2 * np.pi), half * math.sqrt(rng.random())
    return distance * np.array([np.cos(angle), np.sin(angle)])


def _tree(rng: np.random.Generator, half: float) -> Spheres:
    root = _inside(rng, 1.1 * half)
    towards = root + 0.5 * half * (_inside(rng, half) - root) / half
    radius = half * rng.uniform(0.008, 0.035)
    tree = vessel_tree(rng, root.tolist(), towards.tolist(), radius_m=radius, levels=int(rng.integers(2, 5)))
    depth = rng.normal(0, 0.5 * radius, len(tree))  # vessels leave the plane a little
    centers = np.column_stack([tree.centers[:, :2], depth])
    return Spheres(centers, tree.radii, np.full(len(tree), rng.uniform(0.3, 1.0)))


def _disc(rng: np.random.Generator, half: float) -> Spheres:
    radius = half * math.exp(rng.uniform(math.log(0.02), math.log(0.2)))
    x, y = _inside(rng, 0.85 * half)
    count = 1 if rng.random() < 0.7 else 2  # some are shells
    radii = radius * np.array([1.0, rng.uniform(0.4, 0.9)])[:count]
    strength = rng.uniform(0.15, 1.0) * np.array([1.0, -rng.uniform(0.3, 0.9)])[:count]
    return Spheres(np.tile([x, y, 0.0], (count, 1)), radii, strength)


def _outline(rng: np.random.Generator, half: float) -> Spheres:
    """A closed weak line between a circle and a square, as the skin of tissue or the edge of a gel."""
    size, aspect, power = half * rng.uniform(0.4, 0.85), rng.uniform(0.7, 1.0), rng.uniform(2, 8)
    turn, middle = rng.uniform(0, 2 * np.pi), _inside(rng, 0.2 * half)
    radius = half * rng.uniform(0.006, 0.02)
    angles = np.linspace(0, 2 * np.pi, max(40, round(2 * np.pi * size / (1.5 * radius)) // 2), endpoint=False)
    reach = size / (np.abs(np.cos(angles)) ** power + np.abs(np.sin(angles)) ** power) ** (1 / power)
    x, y = reach * np.cos(angles), aspect * reach * np.sin(angles)
    c, s = np.cos(turn), np.sin(turn)
    points = np.column_stack([c * x - s * y + middle[0], s * x + c * y + middle[1], np.zeros_like(x)])
    strength = rng.uniform(0.05, 0.4) * (1 + 0.5 * np.cos(angles + rng.uniform(0, 2 * np.pi)))
    return Spheres(points, np.full(len(points), radius), strength)


def _grains(rng: np.random.Generator, half: float, count: int) -> Spheres:
    places = np.array([[*_inside(rng, 0.9 * half), 0.0] for _ in range(count)])
    radii = half * np.exp(rng.uniform(math.log(0.008), math.log(0.05), count))
    return Spheres(places, radii, rng.uniform(-0.1, 0.2, count))
