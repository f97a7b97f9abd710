"""Photoacoustic time of flight: delay-and-sum and universal back-projection of signals, and the scatter that is their adjoint.

Lengths are in samples: metres times sampling rate over speed of sound. Elements are a table (element, 7): position x, y, z,
inward normal x, y, z, and a weight, 0 for a dead element. A point at distance d from an element reads its row at
d - delay by linear interpolation, zeros lying around the row. Points form a grid along z, y and x; an image in the plane has
one z. The weighting says what an element counts for at a point: see `WEIGHTINGS`. Compiled for the processor, both directions
take times of flight of evenly spaced points from polynomials where these are wrong by at most 1e-4 samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import device, native
from .fft import transformable

__all__ = [
    "COLUMNS",
    "PLAIN",
    "PLANE",
    "SPACE",
    "WEIGHTINGS",
    "Table",
    "gather",
    "gather_into",
    "gather_launches",
    "pat_gather",
    "pat_scatter",
    "prepare",
    "prepared",
    "scatter",
    "scatter_launches",
    "start_of",
]

PLAIN, PLANE, SPACE = 0, 1, 2
WEIGHTINGS = {"plain": PLAIN, "plane": PLANE, "space": SPACE}
"""plain: the element's weight w. plane: w n.(r - s)/|r - s|^2, w an arc length. space: w n.(r - s)/|r - s|^3, w an area."""
COLUMNS = 7
_KINDS = {torch.float32: 0, torch.int16: 1, torch.uint16: 2}
_TINY = 1e-6
_AROUND = 3
"""Zeros around a prepared row: one before, two after."""
_BLOCK = (8, 4, 8)
"""Points along x and y, and groups of elements: a warp's points lie close together and read the same lines of memory."""
_THREADS = 256
_MOST_SHARED = 96 << 10
"""Bytes that every device since sm_80 gives one block."""
_LONGEST = 1 << 17
"""Rows that the compiled band-pass takes, padded."""
_FURTHEST = 1 << 23
"""Samples by which the kernels move a row."""

_ADDRESS, _LENGTH, _INTEGER, _FLOAT = native.ADDRESS, native.LENGTH, native.INTEGER, native.FLOAT
_GRID = (_ADDRESS, _ADDRESS, _ADDRESS, _LENGTH, _LENGTH, _LENGTH, _LENGTH, _FLOAT, _INTEGER)
_prepare = native.Function(
    *("scs_pat_prepare", _ADDRESS, _INTEGER, _LENGTH, _LENGTH, _LENGTH, _LENGTH, _ADDRESS, _FLOAT, _FLOAT, _INTEGER),
    *(_LENGTH, _ADDRESS, _ADDRESS, _INTEGER),
)
_gather = native.Function("scs_pat_gather", _ADDRESS, _LENGTH, _LENGTH, _LENGTH, _ADDRESS, *_GRID, _ADDRESS, _INTEGER)
_scatter = native.Function("scs_pat_scatter", _ADDRESS, _LENGTH, _LENGTH, _LENGTH, _ADDRESS, *_GRID, _ADDRESS, _INTEGER)


@dataclass(frozen=True, eq=False)
class Table:
    """Elements and grid as the kernels read them: float32, elements (element, 10), x, y and z each (2, points).

    A length is the sum of two numbers, as one of float32 does not have the digits: of elements the columns 0 to 2 and 7 to 9, of
    an axis the rows. Column 6 has the weights.
    """

    elements: Tensor
    x: Tensor
    y: Tensor
    z: Tensor

    @classmethod
    def of(cls, elements: Tensor, x: Tensor, y: Tensor, z: Tensor, where: torch.device | str | None = None) -> Table:
        """From a table (element, 7) and axes of any real dtype. Raises ValueError for other shapes."""
        _check_geometry(elements, x, y, z)
        high, low = _split(elements)
        axes = (torch.stack(_split(axis)) for axis in (x, y, z))
        return cls(*(part.to(where).contiguous() for part in (torch.cat([high, low[:, :3]], 1), *axes)))

    def part(self, first: int, count: int) -> Table:
        """The same grid seen by `count` of the elements, from number `first` on; shares memory."""
        return Table(self.elements[first : first + count], self.x, self.y, self.z)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image: (z, y, x)."""
        return self.z.shape[1], self.y.shape[1], self.x.shape[1]


def prepared(rows: int, samples: int, where: torch.device | str | None = None) -> Tensor:
    """Memory for `prepare`: float32, (rows, samples + 3)."""
    return torch.empty(rows, samples + _AROUND, device=where)


def prepare(
    signals: Tensor,
    table: Table,
    rows: Tensor,
    *,
    offset: float = 0.0,
    delay: float = 0.0,
    derivative: bool = False,
    response: Tensor | None = None,
    length: int = 0,
    threads: int | None = None,
) -> None:
    """Write (signals - offset) times the weight of the element, with zeros around each row, into `rows`.

    signals: float32, int16 or uint16, (*batch, element, samples), numbers of a row side by side and rows equally far
    apart. rows: from `prepared`, one for each row of `signals`. derivative: instead of p take 2 p - 2 t dp/dt, t being
    `delay` at the first sample (universal back-projection; Xu, Wang, Phys Rev E 71, 016706, 2005), by central differences.
    response: of a band-pass that comes before it, one real number, over `length`, for each frequency of a row padded to that
    length, which a ramp leads back to its start so that its ends meet. Rows of weight 0 are not read.
    """
    samples = signals.shape[-1]
    if _native(signals) and (response is None or transformable(length, _LONGEST)):
        kind, sizes = _KINDS[signals.dtype], (len(rows), signals.stride(-2), len(table.elements), samples)
        settings = (table.elements.data_ptr(), offset, delay, int(derivative))
        band = (0, 0) if response is None else (length, response.data_ptr())
        _prepare(signals.data_ptr(), kind, *sizes, *settings, *band, rows.data_ptr(), threads or native.threads())
        return
    weight = table.elements[:, 6:7]
    values = (signals.to(rows.dtype) - offset) * weight
    values = torch.where(weight == 0, 0, values)  # what a dead element holds may be no number
    if response is not None:
        values = _filtered(values, response, length)
    if derivative:
        values = 2 * values - 2 * _rise(values) * (torch.arange(samples, device=rows.device) + delay)
    rows.zero_()
    rows[:, 1:-2] = values.reshape(len(rows), samples)


def gather_into(
    rows: Tensor, table: Table, image: Tensor, *, delay: float, weighting: int, threads: int | None = None
) -> None:
    """Sum over the elements what each point reads in prepared rows, float32, (batch * element, samples + 3).

    image: float32, (*batch, z, y, x), contiguous. With compiled kernels neither this nor `prepare` allocates anything.
    """
    if _native(rows):
        sizes = (image.numel() // math.prod(table.shape), len(table.elements), rows.shape[-1] - _AROUND)
        settings = (*_grid(table), *start_of(delay), weighting)
        _gather(rows.data_ptr(), *sizes, *settings, image.data_ptr(), threads or native.threads())
    elif _cuda(rows):
        device.launch(*gather_launches(rows, table, image, delay=delay, weighting=weighting))
    else:
        elements = table.elements[:, :COLUMNS].double()
        elements[:, :3] += table.elements[:, COLUMNS:]
        elements[:, 6] = 1  # the weights are in the rows
        signals = rows[:, 1:-2].reshape(-1, len(elements), rows.shape[-1] - _AROUND)
        x, y, z = (axis.double().sum(0) for axis in (table.x, table.y, table.z))
        image.copy_(_torch_gather(signals, elements, x, y, z, delay, weighting).reshape(image.shape))


def gather(
    signals: Tensor, elements: Tensor, x: Tensor, y: Tensor, z: Tensor, delay: float = 0.0, weighting: int = PLAIN
) -> Tensor:
    """Delay-and-sum: an image (*batch, z, y, x) of signals (*batch, element, samples).

    signals: float32, float64, int16 or uint16; whole numbers give a float32 image. elements: real, (element, 7). x, y, z:
    real, each along one axis. delay: in samples, of the first sample. Raises ValueError for shapes that do not fit. The
    function beneath the operator `pat_gather`.
    """
    _check_geometry(elements, x, y, z)
    _check(signals, 2, "signals", (len(elements), None))
    _check_weighting(weighting)
    dtype = signals.dtype if signals.is_floating_point() else torch.float32
    if signals.dtype not in _KINDS or not (_native(signals) or _cuda(signals)) or not signals.numel():
        return _torch_gather(signals.to(dtype), elements, x, y, z, delay, weighting)
    table = Table.of(elements, x, y, z, signals.device)
    rows = prepared(signals.shape[:-1].numel(), signals.shape[-1], signals.device)
    prepare(signals.contiguous(), table, rows)
    image = torch.empty(*signals.shape[:-2], *table.shape, device=signals.device)
    gather_into(rows, table, image, delay=delay, weighting=weighting)
    return image


def scatter(
    image: Tensor,
    elements: Tensor,
    x: Tensor,
    y: Tensor,
    z: Tensor,
    samples: int,
    delay: float = 0.0,
    weighting: int = PLAIN,
) -> Tensor:
    """The exact adjoint of `gather`: signals (*batch, element, samples) of an image (*batch, z, y, x), float32 or float64.

    Each point adds its value to the two samples that it would read, by the same parts.
    """
    _check_geometry(elements, x, y, z)
    _check(image, 3, "image", (len(z), len(y), len(x)))
    _check_weighting(weighting)
    if samples < 1:
        raise ValueError(f"samples is {samples}, at least 1 is needed")
    if image.dtype != torch.float32 or not (_native(image) or _cuda(image)) or not image.numel():
        return _torch_scatter(image, elements, x, y, z, samples, delay, weighting)
    table, image = Table.of(elements, x, y, z, image.device), image.contiguous()
    shape = (*image.shape[:-3], len(elements), samples)
    if not _native(image):
        rows = torch.zeros(shape, device=image.device)
        device.launch(*scatter_launches(image, table, rows, delay=delay, weighting=weighting))
        return rows
    rows = torch.empty(shape)
    sizes = (rows.shape[:-2].numel(), len(elements), samples)
    settings = (*_grid(table), *start_of(delay), weighting)
    _scatter(image.data_ptr(), *sizes, *settings, rows.data_ptr(), native.threads())
    return rows


@torch.library.custom_op("scanside::pat_gather", mutates_args=())
def pat_gather(
    signals: Tensor, elements: Tensor, x: Tensor, y: Tensor, z: Tensor, delay: float, weighting: int
) -> Tensor:
    """As `gather`, as an operator that torch differentiates by the signals, and compiles."""
    return gather(signals, elements, x, y, z, delay, weighting)


@torch.library.custom_op("scanside::pat_scatter", mutates_args=())
def pat_scatter(
    image: Tensor, elements: Tensor, x: Tensor, y: Tensor, z: Tensor, samples: int, delay: float, weighting: int
) -> Tensor:
    """As `scatter`, as an operator that torch differentiates by the image, and compiles."""
    return scatter(image, elements, x, y, z, samples, delay, weighting)


@pat_gather.register_fake
def _(
    signals: Tensor,
    elements: Tensor,  # noqa: ARG001
    x: Tensor,
    y: Tensor,
    z: Tensor,
    delay: float,  # noqa: ARG001
    weighting: int,  # noqa: ARG001
) -> Tensor:
    dtype = signals.dtype if signals.is_floating_point() else torch.float32
    return signals.new_empty((*signals.shape[:-2], len(z), len(y), len(x)), dtype=dtype)


@pat_scatter.register_fake
def _(
    image: Tensor,
    elements: Tensor,
    x: Tensor,  # noqa: ARG001
    y: Tensor,  # noqa: ARG001
    z: Tensor,  # noqa: ARG001
    samples: int,
    delay: float,  # noqa: ARG001
    weighting: int,  # noqa: ARG001
) -> Tensor:
    return image.new_empty((*image.shape[:-3], len(elements), samples))


def _keep_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401, ARG001 - as torch calls it
    signals, *geometry, ctx.delay, ctx.weighting = inputs
    ctx.samples = signals.shape[-1]
    ctx.save_for_backward(*geometry)


def _keep_scatter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401, ARG001
    _, *geometry, _, ctx.delay, ctx.weighting = inputs
    ctx.save_for_backward(*geometry)


def _gather_gradient(ctx: Any, up: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    return pat_scatter(up, *ctx.saved_tensors, ctx.samples, ctx.delay, ctx.weighting), *(None,) * 6


def _scatter_gradient(ctx: Any, up: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    return pat_gather(up, *ctx.saved_tensors, ctx.delay, ctx.weighting), *(None,) * 7


pat_gather.register_autograd(_gather_gradient, setup_context=_keep_gather)
pat_scatter.register_autograd(_scatter_gradient, setup_context=_keep_scatter)


def gather_launches(rows: Tensor, table: Table, image: Tensor, *, delay: float, weighting: int) -> list[device.Launch]:
    """What `gather_into` runs on a CUDA device."""
    nz, ny, nx = table.shape
    grid = (-(-nx // _BLOCK[0]), -(-ny // _BLOCK[1]), nz * (image.numel() // (nz * ny * nx)))
    sizes = (len(table.elements), rows.shape[-1] - _AROUND, nx, ny, nz, *start_of(delay))
    arguments = (rows, table.elements, table.x, table.y, table.z, image, *sizes)
    macros = (("SCS_WEIGHTING", weighting),)
    return [device.Launch("photoacoustic.cu", "scs_pat_gather", grid, _BLOCK, arguments, macros)]


def scatter_launches(image: Tensor, table: Table, rows: Tensor, *, delay: float, weighting: int) -> list[device.Launch]:
    """What `scatter` runs on a CUDA device, `rows` being 0: a row stays in shared memory until it is whole, if it fits."""
    samples = rows.shape[-1]
    shared = 4 * (samples + 2)
    fits = shared <= _MOST_SHARED
    grid = (len(table.elements), rows.shape[:-2].numel(), 1)
    nz, ny, nx = table.shape
    arguments = (image, table.elements, table.x, table.y, table.z, rows, samples, nx, ny, nz, *start_of(delay))
    macros = (("SCS_WEIGHTING", weighting), ("SCS_SHARED", int(fits)))
    bytes_ = shared if fits else 0
    return [device.Launch("photoacoustic.cu", "scs_pat_scatter", grid, (_THREADS, 1, 1), arguments, macros, bytes_)]


def _torch_gather(
    signals: Tensor, elements: Tensor, x: Tensor, y: Tensor, z: Tensor, delay: float, weighting: int
) -> Tensor:
    """The same without kernels, element by element."""
    rows = torch.nn.functional.pad(signals, (1, 2))
    image = signals.new_zeros(*signals.shape[:-2], len(z), len(y), len(x))
    for i, element in enumerate(elements):
        if element[6] != 0:
            k, part, weight = _torch_reach(element, x, y, z, delay, weighting, rows)
            row = rows[..., i, :]
            image += weight * (row[..., k] * (1 - part) + row[..., k + 1] * part)
    return image


def _torch_scatter(
    image: Tensor, elements: Tensor, x: Tensor, y: Tensor, z: Tensor, samples: int, delay: float, weighting: int
) -> Tensor:
    rows = image.new_zeros(*image.shape[:-3], len(elements), samples + _AROUND)
    for i, element in enumerate(elements):
        k, part, weight = _torch_reach(element, x, y, z, delay, weighting, rows)
        value = image * weight
        rows[..., i, :].index_add_(-1, k.flatten(), (value * (1 - part)).flatten(-3))
        rows[..., i, :].index_add_(-1, k.flatten() + 1, (value * part).flatten(-3))
    return rows[..., 1:-2].contiguous()


def _torch_reach(
    element: Tensor, x: Tensor, y: Tensor, z: Tensor, delay: float, weighting: int, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Index of the sample before the arrival at each point, the part of the way to the next one, the weight, both as `rows`.

    In double precision until then: between steep samples the rounding of a path of 100 of them is seen.
    """
    element, x, y, z = (values.to(rows.device, torch.float64) for values in (element, x, y, z))
    dz, dy, dx = (axis - place for axis, place in zip((z, y, x), element[:3].flip(0), strict=True))
    dz, dy = dz[:, None, None], dy[:, None]
    squared = dx**2 + dy**2 + dz**2
    at = (squared.sqrt() + (1 - delay)).clamp(0, rows.shape[-1] - 2)
    k, weight = at.long(), element[6].expand(squared.shape)
    if weighting != PLAIN:
        ahead = (dx * element[3] + dy * element[4] + dz * element[5]).clamp_min(0)
        weight = weight * ahead / squared.clamp_min(_TINY) ** (1 if weighting == PLANE else 1.5)
    return k, (at - k).to(rows.dtype), weight.to(rows.dtype)


def _rise(values: Tensor) -> Tensor:
    """Derivative by the sample: central differences, one-sided at the ends."""
    return torch.gradient(values, dim=-1)[0] if values.shape[-1] > 1 else torch.zeros_like(values)


def _native(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in _KINDS and native.available()


def _cuda(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.dtype in _KINDS and device.installed()


def _grid(table: Table) -> tuple[int, ...]:
    """Elements and axes as the C functions take them."""
    axes = (table.x, table.y, table.z)
    return (table.elements.data_ptr(), *(axis.data_ptr() for axis in axes), *(axis.shape[1] for axis in axes))


def start_of(delay: float) -> tuple[int, float]:
    """What is whole in 1 - delay, and the rest: kernels move the row by the one and add the other to distances."""
    start = 1 - delay
    whole = math.floor(min(max(start, -_FURTHEST), _FURTHEST))
    return whole, start - whole


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two of float32 whose sum has twice the digits."""
    high = x.to(torch.float32)
    return high, (x.double() - high).to(torch.float32)


def _filtered(values: Tensor, response: Tensor, length: int) -> Tensor:
    samples = values.shape[-1]
    ramp = torch.linspace(0, 1, length - samples + 2, dtype=values.dtype, device=values.device)[1:-1]
    longer = torch.cat([values, torch.lerp(values[..., -1:], values[..., :1], ramp)], -1)
    filtered: Tensor = torch.fft.irfft(torch.fft.rfft(longer) * response, n=length, norm="forward")
    return filtered[..., :samples]


def _check(tensor: Tensor, axes: int, name: str, shape: tuple[int | None, ...]) -> None:
    found = tuple(tensor.shape[max(tensor.ndim - axes, 0) :])
    if len(found) != axes or any(want not in (None, have) for want, have in zip(shape, found, strict=True)):
        needed = ", ".join("samples" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, its last axes must be ({needed})")
    if tensor.is_complex():
        raise ValueError(f"{name} is {tensor.dtype}, real numbers are needed")


def _check_geometry(elements: Tensor, x: Tensor, y: Tensor, z: Tensor) -> None:
    if elements.ndim != 2 or elements.shape[1] != COLUMNS or not len(elements):
        raise ValueError(f"elements has shape {tuple(elements.shape)}, needed is (element, {COLUMNS}), at least one")
    for name, axis in (("x", x), ("y", y), ("z", z)):
        if axis.ndim != 1 or not len(axis):
            raise ValueError(f"{name} has shape {tuple(axis.shape)}, needed is one axis of at least one point")


def _check_weighting(weighting: int) -> None:
    if weighting not in WEIGHTINGS.values():
        raise ValueError(f"weighting is {weighting}, known are {WEIGHTINGS}")
