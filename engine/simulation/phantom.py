"""The Shepp-Logan head and others as ellipses: images on any grid, and k-space in closed form at any point.

Positions r are in units of the field of view: (0, 0) is its center, x runs along the readout, y along the phase
encoding (down the picture), and the field reaches from -0.5 to 0.5. Spatial frequencies k are in cycles per field of
view, so that k-space on a Cartesian grid has integer k. The forward transform is the integral of f(r) exp(-2 pi i k
r) over r.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np
from scipy.special import j1

__all__ = ["Ellipse", "Phantom", "beating_heart", "random_phantom", "shepp_logan"]

Contrast = Literal["modified", "classic"]


@dataclasses.dataclass(frozen=True)
class Ellipse:
    """A filled ellipse.

    value: added inside. center: (x, y), axes: half lengths (along x, along y before the turn), all in fields of view.
    angle: turn in rad, from x towards y.
    """

    value: float
    center: tuple[float, float]
    axes: tuple[float, float]
    angle: float = 0.0

    def size(self, kx: np.ndarray, ky: np.ndarray) -> np.ndarray:
        """Fourier transform of the ellipse moved to the origin, float64, at frequencies that broadcast.

        value a b J1(2 pi q)/q with q = |(a ku, b kv)| and k turned into the axes (Van de Walle et al., IEEE TMI 19,
        2000).
        """
        a, b = self.axes
        ku, kv = _turned(a * kx, a * ky, self.angle)[0], _turned(b * kx, b * ky, self.angle)[1]
        return np.asarray(self.value * a * b * _jinc(np.sqrt(ku**2 + kv**2)))

    def place(self, kx: np.ndarray | float, ky: np.ndarray | float) -> np.ndarray:
        """Factor exp(-2 pi i k c) of the center c, at frequencies that broadcast."""
        return np.asarray(np.exp(-2j * np.pi * kx * self.center[0]) * np.exp(-2j * np.pi * ky * self.center[1]))


@dataclasses.dataclass(frozen=True)
class Phantom:
    """A sum of ellipses."""

    ellipses: tuple[Ellipse, ...]

    def density(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Value at the points (x, y), which broadcast against each other; positions in fields of view."""
        total = np.zeros(np.broadcast_shapes(x.shape, y.shape))
        for ellipse in self.ellipses:
            u, v = _turned(x - ellipse.center[0], y - ellipse.center[1], ellipse.angle)
            total += ellipse.value * ((u / ellipse.axes[0]) ** 2 + (v / ellipse.axes[1]) ** 2 <= 1.0)
        return total

    def image(self, matrix: tuple[int, int], *, subdivisions: int = 8) -> np.ndarray:
        """Mean value over each pixel of a (rows, columns) grid that fills the field of view; shape `matrix`.

        Pixel n of N covers positions (n - N/2 - 1/2)/N to (n - N/2 + 1/2)/N, as the discrete Fourier transform has
        it. `subdivisions`: points per pixel and axis that the mean is taken over.
        """
        rows, columns = matrix
        y = _pixel_points(rows, subdivisions)[:, None]
        x = _pixel_points(columns, subdivisions)[None, :]
        fine = self.density(x, y)
        return np.asarray(fine.reshape(rows, subdivisions, columns, subdivisions).mean(axis=(1, 3)))

    def kspace(self, kx: np.ndarray, ky: np.ndarray) -> np.ndarray:
        """Exact Fourier transform at the frequencies (kx, ky), cycles per field of view, which broadcast.

        The sum of the transforms of the ellipses, see `Ellipse.kspace`.
        """
        total = np.zeros(np.broadcast_shapes(kx.shape, ky.shape), np.complex128)
        for ellipse in self.ellipses:
            total += ellipse.size(kx, ky) * ellipse.place(kx, ky)
        return total

    def moved(self, *, rotation: float = 0.0, scale: float = 1.0) -> Phantom:
        """The phantom scaled and turned about the center of the field of view; `rotation` in rad, x towards y."""
        return Phantom(tuple(_moved(ellipse, rotation, scale) for ellipse in self.ellipses))


def shepp_logan(*, contrast: Contrast = "modified") -> Phantom:
    """The Shepp-Logan head, 0.69 x 0.92 fields of view, nose up in the picture.

    contrast: "modified" is Toft's (PhD thesis, DTU 1996; values from 0 to 1), "classic" is that of Shepp and Logan
    (IEEE TNS 21, 1974; skull 2, brain about 1). Raises ValueError for any other.
    """
    if contrast not in _VALUES:
        raise ValueError(f"contrast is {contrast!r}, allowed are {sorted(_VALUES)}")
    ellipses = []
    for value, (a, b, x, y, degrees) in zip(_VALUES[contrast], _SHAPES, strict=True):
        # The table has y up and lengths in half fields of view; pictures have y down.
        ellipses.append(Ellipse(value, (x / 2, -y / 2), (a / 2, b / 2), -math.radians(degrees)))
    return Phantom(tuple(ellipses))


def random_phantom(generator: np.random.Generator) -> Phantom:
    """An object with sharp edges that no two scans share: a shell of its own brightness, filled, with 3 to 12 inclusions.

    Values lie from 0 to about 1 but where inclusions overlap. To train on: what is in a field of view need not be anatomy.
    """
    draw = generator.uniform
    axes = (draw(0.2, 0.44), draw(0.2, 0.44))
    center, angle = (draw(-0.05, 0.05), draw(-0.05, 0.05)), draw(0, math.pi)
    shell, filling, thickness = draw(0.1, 1.0), draw(0.1, 1.0), draw(0.005, 0.06)
    inner = (axes[0] - thickness, axes[1] - thickness)
    ellipses = [Ellipse(shell, center, axes, angle), Ellipse(filling - shell, center, inner, angle)]
    for _ in range(generator.integers(3, 13)):
        place, turn = draw(0, 0.7), draw(0, 2 * math.pi)
        u, v = np.array([place * inner[0] * math.cos(turn)]), np.array([place * inner[1] * math.sin(turn)])
        x, y = _turned(u, v, -angle)
        size = (draw(0.01, 0.12), draw(0.01, 0.12))
        value = float(draw(-filling, 0.4)) if draw() < 0.5 else float(draw(-0.15, 0.15))
        ellipses.append(Ellipse(value, (center[0] + float(x[0]), center[1] + float(y[0])), size, draw(0, math.pi)))
    return Phantom(tuple(ellipses))


def beating_heart(phase: float) -> Phantom:
    """A chest in cross-section at `phase` of the heart beat, periodic in 1: 0 is filled, 1/2 contracted.

    Both ventricles and the aorta change in size, the ventricle's wall thickens, the heart turns and moves a little; all else
    stands still. Values lie from 0 to about 1. For dynamic imaging, where motion is to be told from fold-over.
    """
    squeeze = (1 - math.cos(2 * math.pi * phase)) / 2
    pool, outer, flow = (
        0.085 * (1 - 0.4 * squeeze),
        0.115 - 0.012 * squeeze,
        0.5 - 0.5 * math.cos(2 * math.pi * (phase - 0.15)),
    )
    x, y, turn = 0.06 + 0.008 * squeeze, -0.03 - 0.012 * squeeze, 0.5 + 0.15 * squeeze
    moving = (
        Ellipse(0.55, (x - 0.14, y + 0.01), (0.10 - 0.03 * squeeze, 0.055 - 0.012 * squeeze), turn + 0.9),
        Ellipse(0.15, (x, y), (outer, outer * 0.92), turn),
        Ellipse(0.50, (x, y), (pool, pool * 0.88), turn),
        Ellipse(-0.35, (x + 0.4 * pool, y + 0.3 * pool), (0.016, 0.013), turn),
        Ellipse(-0.35, (x - 0.2 * pool, y - 0.5 * pool), (0.014, 0.012), turn),
        Ellipse(0.45, (0.05, 0.2), (0.028 + 0.005 * flow, 0.028 + 0.005 * flow)),
    )
    return Phantom((*(Ellipse(value, center, axes, angle) for value, center, axes, angle in _CHEST), *moving))


_CHEST = (
    (0.75, (0.0, 0.0), (0.46, 0.36), 0.0),
    (-0.45, (0.0, 0.0), (0.43, 0.33), 0.0),
    (-0.22, (-0.24, 0.02), (0.14, 0.23), 0.15),
    (-0.22, (0.25, 0.02), (0.13, 0.22), -0.15),
    (0.20, (0.0, 0.26), (0.05, 0.045), 0.0),
    (-0.25, (0.0, 0.262), (0.018, 0.018), 0.0),
    (0.25, (-0.28, -0.08), (0.010, 0.008), 0.3),
    (0.25, (0.30, 0.10), (0.008, 0.011), 0.0),
    (0.20, (-0.2, 0.14), (0.007, 0.007), 0.0),
    (0.30, (0.36, 0.16), (0.012, 0.03), 0.6),
    (0.30, (-0.37, -0.14), (0.012, 0.03), 0.6),
)
"""Value, center, axes and turn of what stands still in `beating_heart`: fat, muscle, lungs and their vessels, spine, ribs."""
_SHAPES = (
    (0.69, 0.92, 0.0, 0.0, 0.0),
    (0.6624, 0.874, 0.0, -0.0184, 0.0),
    (0.11, 0.31, 0.22, 0.0, -18.0),
    (0.16, 0.41, -0.22, 0.0, 18.0),
    (0.21, 0.25, 0.0, 0.35, 0.0),
    (0.046, 0.046, 0.0, 0.1, 0.0),
    (0.046, 0.046, 0.0, -0.1, 0.0),
    (0.046, 0.023, -0.08, -0.605, 0.0),
    (0.023, 0.023, 0.0, -0.606, 0.0),
    (0.023, 0.046, 0.06, -0.605, 0.0),
)
_VALUES = {
    "modified": (1.0, -0.8, -0.2, -0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1),
    "classic": (2.0, -0.98, -0.02, -0.02, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01),
}


def _turned(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Components along the axes of an ellipse that is turned by `angle`."""
    c, s = math.cos(angle), math.sin(angle)
    return c * x + s * y, c * y - s * x


def _jinc(q: np.ndarray) -> np.ndarray:
    """J1(2 pi q)/q with its limit pi at 0."""
    safe = np.maximum(q, 1e-9)  # J1(x) = x/2 there to all digits
    return np.asarray(j1(2 * np.pi * safe) / safe)


def _pixel_points(pixels: int, subdivisions: int) -> np.ndarray:
    fine = (np.arange(pixels * subdivisions) + 0.5) / subdivisions - 0.5
    return (fine - pixels // 2) / pixels


def _moved(ellipse: Ellipse, rotation: float, scale: float) -> Ellipse:
    c, s = scale * math.cos(rotation), scale * math.sin(rotation)
    x, y = ellipse.center
    axes = (ellipse.axes[0] * scale, ellipse.axes[1] * scale)
    return Ellipse(ellipse.value, (c * x - s * y, s * x + c * y), axes, ellipse.angle + rotation)
