"""What a real scan has that no model knows: views of unequal strength, a probe off its circle, motion, hum, echoes, a tilt.

A probe that turns round the object on a stage hears its near side better than the far one, does not keep its radius to a fraction
of a sample, and takes minutes, in which things move. Sizes are drawn; a seed fixes them.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["Flaws", "random_flaws"]

Floats = NDArray[np.float64]


class Flaws(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """Deviations from the model of a ring, for each of its elements.

    delays: (element,) in samples. strengths: (element, samples), factors. common: (samples,), heard by all elements, and
    echo: strength and delay in samples of an echo, both relative to the strongest signal. tilt: of the plane of the scene, slopes
    along x and y.
    """

    delays: Floats
    strengths: Floats
    common: Floats
    echo: tuple[float, int]
    tilt: tuple[float, float]

    def tilted(self, centers: Floats) -> Floats:
        """Centers (n, 3) in m, out of the plane of the ring."""
        return np.column_stack([centers[:, :2], centers[:, 2] + centers[:, :2] @ np.array(self.tilt)])

    def applied(self, signals: Floats) -> Floats:
        """Signals (element, samples) as they are heard."""
        length = 2 * signals.shape[1]
        turn = np.exp(-2j * np.pi * np.fft.rfftfreq(length) * self.delays[:, None])
        moved = np.fft.irfft(np.fft.rfft(signals, length) * turn, length)[:, : signals.shape[1]] * self.strengths
        strength, late = self.echo
        moved[:, late:] += strength * moved[:, : moved.shape[1] - late]
        return np.asarray(moved + float(np.abs(moved).max()) * self.common)


def random_flaws(rng: np.random.Generator, elements: int, samples: int) -> Flaws:
    """Flaws of random size, from hardly any to those of a scan that one would repeat."""
    size = rng.random()
    turns, times = 2 * np.pi * np.arange(elements) / elements, np.linspace(-1, 1, samples)
    return Flaws(
        delays=size * _delays(rng, turns),
        strengths=np.exp(size * _strengths(rng, turns, times)),
        common=size * 0.03 * rng.random() * _smooth_noise(rng, samples),
        echo=(size * rng.normal(0, 0.05), int(rng.integers(samples // 20, samples // 3))),
        tilt=(size * rng.normal(0, 0.05), size * rng.normal(0, 0.05)),
    )


def _delays(rng: np.random.Generator, turns: Floats) -> Floats:
    """A circle off its middle and out of round, jitter, and something that slips and jumps back where the circle closes."""
    found = sum(rng.normal(0, 1.0 / k) * np.cos(k * turns + rng.uniform(0, 2 * np.pi)) for k in (1, 2, 3))
    found = found + rng.normal(0, 0.15 * rng.random(), len(turns))
    if rng.random() < 0.5:
        begin, over = rng.uniform(0, 2 * np.pi), rng.uniform(0.02, 0.5)
        since = np.mod(turns - begin, 2 * np.pi)
        held = rng.uniform(over, 2 * np.pi)
        found = found + rng.normal(0, 6.0) * np.clip(since / over, 0, 1) * (since < held)
    return np.asarray(found)


def _strengths(rng: np.random.Generator, turns: Floats, times: Floats) -> Floats:
    """Logarithm of the strengths: of each view, over time for all (attenuation, focus of the probe), and over both."""
    views = sum(rng.normal(0, 0.3 / k) * np.cos(k * turns + rng.uniform(0, 2 * np.pi)) for k in (1, 2, 3, 4))
    each = rng.normal(0, 0.1 * rng.random(), len(turns))
    fall = -rng.uniform(0, 2.5) * times - rng.uniform(0, 2) * (times - rng.uniform(-0.3, 0.3)) ** 2
    both = np.zeros((len(turns), len(times)))
    for _ in range(4):
        wave = np.cos(rng.integers(1, 4) * turns + rng.uniform(0, 2 * np.pi))
        both += rng.normal(0, 0.4) * wave[:, None] * np.cos(rng.uniform(1, 8) * times + rng.uniform(0, 2 * np.pi))
    return np.asarray((views + each)[:, None] + fall + both)


def _smooth_noise(rng: np.random.Generator, samples: int) -> Floats:
    """Noise of the lower half of the spectrum, its standard deviation 1."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    spectrum *= np.exp(-((np.arange(len(spectrum)) / (len(spectrum) * rng.uniform(0.1, 0.4))) ** 2))
    spectrum[0] = 0
    noise = np.fft.irfft(spectrum, samples)
    return np.asarray(noise / max(float(noise.std()), math.ulp(1.0)))
