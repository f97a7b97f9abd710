"""Receive coils round the object: fields of wire loops, written as trigonometric polynomials.

A profile that is a sum of a few plane waves, s(r) = sum over m of c_m exp(2 pi i m r / P), multiplies any object to a
sum of shifted copies of its k-space. So the k-space that each coil sees stays in closed form (after Guerquin-Kern et
al., IEEE TMI 31, 2012). The period P is two fields of view: the waves need not close at the edge of the picture.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .phantom import Phantom

__all__ = ["PERIOD", "TrigonometricMaps", "coil_kspace", "coil_maps", "object_phase"]

PERIOD = 2
"""Period of the plane waves in fields of view."""

_ORDER = 3
"""Highest wave number of a coil profile: follows the field of the wires within 2 %."""
_CHUNK = 2048
"""Points of k-space at a time, so that all their shifted copies stay in the cache."""
_SEGMENTS = 48
"""Straight pieces of a wire loop."""
_RADIUS, _ELLIPTICITY = 0.85, 1.15
"""Half axis along x of the cylinder that carries the loops, in fields of view, and y over x."""


@dataclasses.dataclass(frozen=True)
class TrigonometricMaps:
    """Complex functions of position, each a trigonometric polynomial.

    coefficients: complex128, shape (functions, 2M+1, 2M+1), wave numbers -M...M along y and x, waves exp(2 pi i m
    r/PERIOD).
    """

    coefficients: np.ndarray

    @property
    def order(self) -> int:
        """Highest wave number M."""
        return int(self.coefficients.shape[-1]) // 2

    def __call__(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Values on the grid of the positions y (rows) and x (columns); shape (functions, len(y), len(x))."""
        return np.asarray(_waves(y, self.order) @ self.coefficients @ _waves(x, self.order).T)

    def image(self, matrix: tuple[int, int]) -> np.ndarray:
        """Values at the pixel centers of a (rows, columns) grid that fills the field of view."""
        rows, columns = matrix
        return self((np.arange(columns) - columns // 2) / columns, (np.arange(rows) - rows // 2) / rows)

    def times(self, other: TrigonometricMaps) -> TrigonometricMaps:
        """Products with the one function of `other`: coefficients convolve."""
        order = self.order + other.order
        product = np.zeros((len(self.coefficients), 2 * order + 1, 2 * order + 1), np.complex128)
        side = 2 * self.order + 1
        for (b, a), value in np.ndenumerate(other.coefficients[0]):
            product[:, b : b + side, a : a + side] += value * self.coefficients
        return TrigonometricMaps(product)


def coil_kspace(phantom: Phantom, maps: TrigonometricMaps, kx: np.ndarray, ky: np.ndarray) -> np.ndarray:
    """Exact k-space of `phantom` times each of `maps`, at frequencies in cycles per field of view.

    kx and ky of equal shape are points; the answer has shape (functions, *points). For points on a lattice of step
    1/PERIOD the shifted copies fall on one another, and each lattice point is computed once.
    """
    ix, iy = np.rint(kx * PERIOD).astype(np.intp), np.rint(ky * PERIOD).astype(np.intp)
    if np.array_equal(ix, kx * PERIOD) and np.array_equal(iy, ky * PERIOD):
        return _lattice_kspace(phantom, maps, ix, iy)
    return _scattered_kspace(phantom, maps, kx, ky)


def coil_maps(coils: int) -> TrigonometricMaps:
    """Sensitivities of `coils` wire loops on an elliptic cylinder, in one ring (up to 8) or in staggered rings of 8.

    The receive field of a loop is Bx - i By by the law of Biot and Savart, fitted over the field of view. The root of
    the sum of squares has mean 1 in the middle, within 0.45 fields of view. Raises ValueError for less than one coil.
    """
    if coils < 1:
        raise ValueError(f"coils is {coils}, at least 1 is needed")
    x, y = _field_of_view()
    fields = np.stack([_loop_field(loop, x, y) for loop in _loops(coils)])
    fields /= np.sqrt((np.abs(fields) ** 2).sum(axis=0))[np.hypot(x, y) <= 0.45].mean()
    return _fit(fields, x, y, _ORDER)


def object_phase(radians: float) -> TrigonometricMaps:
    """exp(i phi) with a smooth phase phi of about `radians` from edge to edge, as one trigonometric polynomial.

    The polynomial, not phi, defines the phase: its modulus is 1 within 1 % inside the object.
    """
    x, y = _field_of_view()
    phi = radians * (0.5 * x - 0.35 * y + 1.1 * x * y + 0.6 * (x**2 + y**2))
    return _fit(np.exp(1j * phi)[None], x, y, 2)


def _lattice_kspace(phantom: Phantom, maps: TrigonometricMaps, ix: np.ndarray, iy: np.ndarray) -> np.ndarray:
    left, top = int(ix.min()) - maps.order, int(iy.min()) - maps.order
    axis_x = np.arange(left, int(ix.max()) + maps.order + 1) / PERIOD
    axis_y = np.arange(top, int(iy.max()) + maps.order + 1) / PERIOD
    lattice = phantom.kspace(axis_x[None, :], axis_y[:, None])
    total = np.zeros((len(maps.coefficients), *ix.shape), np.complex128)
    for b, a in np.ndindex(*maps.coefficients.shape[1:]):
        shifted = lattice[iy - (b - maps.order) - top, ix - (a - maps.order) - left]
        total += np.multiply.outer(maps.coefficients[:, b, a], shifted)
    return total


def _scattered_kspace(phantom: Phantom, maps: TrigonometricMaps, kx: np.ndarray, ky: np.ndarray) -> np.ndarray:
    """Shift by shift; the center of an ellipse gives each shift a constant factor, which goes into the coefficients."""
    total = np.zeros((len(maps.coefficients), kx.size), np.complex128)
    waves = np.arange(-maps.order, maps.order + 1) / PERIOD
    for start in range(0, kx.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        px, py = kx.ravel()[part], ky.ravel()[part]
        for ellipse in phantom.ellipses:
            factors = maps.coefficients * ellipse.place(-waves[None, :], -waves[:, None])
            sizes = ellipse.size(px - waves[None, :, None], py - waves[:, None, None]).reshape(waves.size**2, -1)
            total[:, part] += (factors.reshape(len(factors), -1) @ sizes) * ellipse.place(px, py)
    return total.reshape(-1, *kx.shape)


def _waves(r: np.ndarray, order: int) -> np.ndarray:
    return np.asarray(np.exp(2j * np.pi / PERIOD * np.multiply.outer(r, np.arange(-order, order + 1))))


def _field_of_view() -> tuple[np.ndarray, np.ndarray]:
    """Points that fill the field of view."""
    axis = np.linspace(-0.5, 0.5, 33)
    x, y = np.meshgrid(axis, axis)
    return x.ravel(), y.ravel()


def _fit(values: np.ndarray, x: np.ndarray, y: np.ndarray, order: int) -> TrigonometricMaps:
    """Least squares; small singular values are cut, for they would only make coefficients large without need."""
    waves = np.einsum("pb,pa->pba", _waves(y, order), _waves(x, order)).reshape(len(x), -1)
    coefficients, *_ = np.linalg.lstsq(waves, values.T, rcond=1e-4)
    return TrigonometricMaps(coefficients.T.reshape(len(values), 2 * order + 1, 2 * order + 1))


def _loops(coils: int) -> list[np.ndarray]:
    """Corner points of each loop, shape (segments + 1, 3), in fields of view."""
    rings = -(-coils // 8)
    loops = []
    for ring, members in enumerate(np.array_split(np.arange(coils), rings)):
        height = 0.4 * (ring - (rings - 1) / 2)
        half_width = 0.75 * np.pi * _RADIUS / max(len(members), 4)
        for place in range(len(members)):
            angle = 2 * np.pi * (place + 0.5 * (ring % 2) + 0.25) / len(members)
            loops.append(_loop(angle, height, half_width))
    return loops


def _loop(angle: float, height: float, radius: float) -> np.ndarray:
    """A circle that faces the axis."""
    center = np.array([_RADIUS * np.cos(angle), _ELLIPTICITY * _RADIUS * np.sin(angle), height])
    along = np.array([-np.sin(angle), np.cos(angle), 0.0])
    turn = np.linspace(0, 2 * np.pi, _SEGMENTS + 1)[:, None]
    return np.asarray(center + radius * (np.cos(turn) * along + np.sin(turn) * np.array([0.0, 0.0, 1.0])))


def _loop_field(loop: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bx - i By in the plane z = 0 of unit current: the sum of dl x d / |d|^3 over the pieces, d from wire to point."""
    wire, middle = np.diff(loop, axis=0), (loop[1:] + loop[:-1]) / 2
    dx, dy = x[:, None] - middle[:, 0], y[:, None] - middle[:, 1]
    dz = np.broadcast_to(-middle[:, 2], dx.shape)
    weight = (dx**2 + dy**2 + dz**2) ** -1.5
    bx = ((wire[:, 1] * dz - wire[:, 2] * dy) * weight).sum(axis=1)
    by = ((wire[:, 2] * dx - wire[:, 0] * dz) * weight).sum(axis=1)
    return np.asarray(bx - 1j * by)
