"""Delay-and-sum in the plane, and its adjoint, of a ring round a square grid: one time of flight for up to eight elements.

What turns and mirrors the square takes an element to up to seven others, which see the points alike from another side. Lengths,
tables and axes as in `photoacoustic`; the sums are those of `gather` and `scatter` with the weighting `plain`, in another order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.spatial import cKDTree
from torch import Tensor

from . import native
from .photoacoustic import COLUMNS, Table, start_of

__all__ = ["SIDES", "Turned"]

SIDES = 8
"""Ways to turn and mirror a square."""
_TURNS = tuple((swap, flip_x, flip_y) for swap in (False, True) for flip_x in (False, True) for flip_y in (False, True))
_NEAR = 1e-4
"""Samples by which an element may miss its place: what linear interpolation makes of that is near the rounding of float32."""
_WORTH = 3.0
"""Elements of a group, on average, below which the plain kernels are faster."""
_TOGETHER = 4
"""The number of groups is a multiple of it."""

_ADDRESS, _LENGTH, _INTEGER, _FLOAT = native.ADDRESS, native.LENGTH, native.INTEGER, native.FLOAT
_ARGUMENTS = (_ADDRESS, _LENGTH, _LENGTH, *(_ADDRESS,) * 4, _LENGTH, _LENGTH, _LENGTH, _FLOAT, _ADDRESS, _INTEGER)
_gather = native.Function("scs_pat_turned_gather", *_ARGUMENTS)
_scatter = native.Function("scs_pat_turned_scatter", *_ARGUMENTS)


@dataclass(frozen=True, eq=False)
class Turned:
    """Elements in groups. table: the first of each group, and the grid. places: int64 (groups * 8,), the row of the element on
    each side, and one past the last row where there is none. weights: float32 (groups * 8, 1) of these, 0 where there is none.
    back: int64 (elements,), where among the places an element is.
    """

    table: Table
    places: Tensor
    weights: Tensor
    back: Tensor

    @classmethod
    def of(cls, elements: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Turned | None:
        """From a table (element, 7) and axes; None where there is no such symmetry, or no compiled kernel to make use of it."""
        if not native.available() or elements.shape[1] != COLUMNS or not _square(x, y, z) or not len(elements):
            return None
        if float((elements[:, 2] - elements[0, 2]).abs().max()) > _NEAR:
            return None
        groups = _groups(elements)
        if len(elements) < _WORTH * len(groups):
            return None
        groups += [[len(elements)] * SIDES] * (-len(groups) % _TOGETHER)
        places = torch.tensor(groups).flatten()
        back = torch.empty(len(elements) + 1, dtype=torch.int64)
        back[places] = torch.arange(len(places))
        first = elements[[min(group[0], len(elements) - 1) for group in groups]]
        weights = torch.cat([elements[:, 6], elements.new_zeros(1)])[places, None].to(torch.float32)
        return cls(Table.of(first, x, y, z), places, weights, back[:-1])

    def gather(self, signals: Tensor, delay: float) -> Tensor:
        """The image (y, x) of signals (element, samples), float32."""
        count, samples = len(self.places) // SIDES, signals.shape[-1]
        chosen = torch.cat([signals, signals.new_zeros(1, samples)])[self.places] * self.weights
        rows = signals.new_zeros(count, samples + 3, SIDES)
        rows[:, 1:-2] = chosen.reshape(count, SIDES, samples).mT
        ny, nx = self.table.shape[1:]
        sides = signals.new_empty(ny, nx, SIDES)
        _gather(rows.data_ptr(), count, samples, *self._grid(delay), sides.data_ptr(), native.threads())
        planes = sides.permute(2, 0, 1).contiguous()
        image = planes[0].clone()
        for plane, turn in zip(planes[1:], _TURNS[1:], strict=True):
            image += _flipped(plane.mT if turn[0] else plane, turn)
        return image

    def scatter(self, image: Tensor, samples: int, delay: float) -> Tensor:
        """The adjoint of `gather`: signals (element, samples) of an image (y, x)."""
        count = len(self.places) // SIDES
        planes = [_flipped(image, turn).mT if turn[0] else _flipped(image, turn) for turn in _TURNS]
        sides = torch.stack(planes, -1)
        rows = image.new_empty(count, samples, SIDES)
        _scatter(sides.data_ptr(), count, samples, *self._grid(delay), rows.data_ptr(), native.threads())
        return (rows.mT.reshape(-1, samples) * self.weights)[self.back]

    def _grid(self, delay: float) -> tuple[float, ...]:
        table = self.table
        axes = (table.x.data_ptr(), table.y.data_ptr(), table.z.data_ptr())
        return table.elements.data_ptr(), *axes, table.x.shape[1], table.y.shape[1], *start_of(delay)


def _flipped(plane: Tensor, turn: tuple[bool, bool, bool]) -> Tensor:
    axes = [axis for axis, flip in ((-1, turn[1]), (-2, turn[2])) if flip]
    return plane.flip(axes) if axes else plane


def _square(x: Tensor, y: Tensor, z: Tensor) -> bool:
    """Whether the grid is a square in a plane, with the origin in its middle."""
    if len(z) != 1 or len(x) != len(y):
        return False
    return float((x - y).abs().max()) <= _NEAR and float((x + x.flip(0)).abs().max()) <= _NEAR


def _groups(elements: Tensor) -> list[list[int]]:
    """Numbers of the elements that an element is taken to by each turn, the number of elements for none or one named before."""
    places, none = elements[:, :2].double(), len(elements)
    tree, found = cKDTree(places.numpy()), []
    for swap, flip_x, flip_y in _TURNS:
        there = places.flip(1) if swap else places
        signs = torch.tensor([-1.0 if flip_x else 1.0, -1.0 if flip_y else 1.0], dtype=torch.float64)
        found.append(tree.query((there * signs).numpy(), distance_upper_bound=_NEAR)[1])
    groups, seen = [], set()
    outwards = places[:, 0].abs()  # from the furthest along x no two points of a line have the same distance
    for element in torch.argsort(outwards, descending=True).tolist():
        if element in seen:
            continue
        group = []
        for side in found:
            fresh = int(side[element]) not in seen
            group.append(int(side[element]) if fresh else none)
            seen.add(group[-1])
        groups.append(group)
        seen.discard(none)
    return groups
