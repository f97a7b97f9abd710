"""The step of data consistency coil by coil: F^H [(1 - t) F x / N + t data] with t = share sampled, fused.

With share 1 sampled frequencies become the data and nothing else (hard replacement); with less they come that much closer
(1 / (1 + weight) is the proximal step). F is a plain transform, without scale or shift: whoever prepares data and mask folds
scale and phases of a centered transform into them. Transforms along y or z alone take one pass over memory, those along y and x
three; others are left to torch.fft.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import device, native, sense_device
from .fft import transformable
from .sense_operators import plain

__all__ = ["NATURAL", "PACKED", "KspaceStep", "apply", "kspace_step", "launches"]

_A, _N, _I, _F = native.ADDRESS, native.LENGTH, native.INTEGER, native.FLOAT
_lines = native.Function("scs_lines_step", _A, _A, _N, _A, _A, _F, _F, *[_N] * 5, _I)
_planes = native.Function("scs_planes_step", _A, _A, _N, _A, _A, _F, _F, *[_N] * 5, _I)
_pack = native.Function("scs_step_pack", _A, _A, *[_N] * 3, _I, _I)
_PLANES = (-2, -1)
NATURAL, PACKED = "natural", "packed"
"""Layouts of data and mask."""


class KspaceStep:
    """The step for one set of data, made ready for the kernels; x then moves in one call.

    data: complex, (coil, z, y, x), such that F^H data are the images of the coils; 0 where nothing was sampled. sampled: real or
    boolean, 1 where there are data and 0 elsewhere, broadcasts against (z, y, x). axes: of F, counted from the end; may be none.
    Both in the order of plain transforms. Raises ValueError for what does not fit.
    """

    def __init__(self, data: Tensor, sampled: Tensor, axes: Sequence[int]) -> None:
        if data.ndim != 4 or not data.is_complex():
            raise ValueError(f"data is {data.dtype} of shape {tuple(data.shape)}, needed: complex, (coil, z, y, x)")
        self._axes = sorted(axes)
        self._data, self._layout = plain(data), NATURAL
        self._kind = (tuple(data.shape), data.dtype, data.device)
        sampled = sampled.to(data.device, data.real.dtype)
        sampled = sampled.reshape((1,) * (3 - sampled.ndim) + tuple(sampled.shape))
        _check(self._data, sampled, self._data, self._axes)
        self._sampled = _spread(sampled, data.shape, self._axes)
        if _form(self._data, self._sampled, self._axes) == "planes" and data.device.type == "cpu":
            self._sampled, self._data = _packed(self._sampled, data.shape), _packed(self._data, data.shape)
            self._layout = PACKED

    def __call__(self, x: Tensor, share: float = 1.0) -> Tensor:
        """x, (*batch, coil, z, y, x), after the step; gradients are with respect to x.

        Raises ValueError for another shape, dtype or device than those of the data.
        """
        if (tuple(x.shape[-4:]), x.dtype, x.device) != self._kind:
            shape, dtype, where = self._kind
            raise ValueError(
                f"x is {x.dtype} of shape {tuple(x.shape)} on {x.device}, needed: {dtype}, (*batch, {shape}), {where}"
            )
        if x.requires_grad and torch.is_grad_enabled():
            result: Tensor = kspace_step(x, self._sampled, self._data, self._axes, share, self._layout)
            return result
        return apply(x, self._sampled, self._data, self._axes, share, self._layout)


def apply(
    x: Tensor, sampled: Tensor, data: Tensor | None, axes: Sequence[int], share: float, layout: str = NATURAL
) -> Tensor:
    """The function beneath the operator `kspace_step`.

    x: complex, (*batch, coil, z, y, x). sampled: real, (z or 1, y or 1, x or 1). data: (coil, z, y, x), or None for the part that
    is linear in x. layout: of sampled and data, NATURAL, or PACKED as the compiled kernels for planes have them. Raises
    ValueError for shapes or dtypes that do not fit.
    """
    x = plain(x)
    if layout == PACKED:
        return _native_planes(x, sampled, data, share)
    _check(x, sampled, data, axes)
    sampled, form = _spread(sampled, x.shape, axes), _form(x, sampled, axes)
    if form is not None and x.device.type == "cuda":
        result = torch.empty_like(x)
        device.launch(*launches(x, sampled, data, result, axes, share))
        return result
    if form == "lines":
        return _native_lines(x, sampled, data, axes[0], share)
    if form == "planes":
        packed_data = None if data is None else _packed(data, x.shape)
        return _native_planes(x, _packed(sampled, x.shape), packed_data, share)
    return _torch(x, sampled, data, axes, share)


@torch.library.custom_op("scanside::kspace_step", mutates_args=())
def kspace_step(
    x: Tensor, sampled: Tensor, data: Tensor | None, axes: Sequence[int], share: float, layout: str = NATURAL
) -> Tensor:
    """As `apply`, as an operator that torch differentiates with respect to x and compiles."""
    return apply(x, sampled, data, axes, share, layout)


@kspace_step.register_fake
def _(
    x: Tensor,
    sampled: Tensor,  # noqa: ARG001
    data: Tensor | None,  # noqa: ARG001
    axes: Sequence[int],  # noqa: ARG001
    share: float,  # noqa: ARG001
    layout: str = NATURAL,  # noqa: ARG001
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401, ARG001 - as torch calls it
    _, sampled, _, *ctx.rest = inputs
    ctx.save_for_backward(sampled)


def _backward(ctx: Any, up: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """The linear part is its own adjoint."""
    return kspace_step(up, ctx.saved_tensors[0], None, *ctx.rest), None, None, None, None, None


kspace_step.register_autograd(_backward, setup_context=_keep)


def launches(
    x: Tensor, sampled: Tensor, data: Tensor | None, result: Tensor, axes: Sequence[int], share: float
) -> list[device.Launch]:
    """What runs on a CUDA device for contiguous arguments, in their natural layout."""
    settings = (float(share), 1 / _points(x, axes))
    if len(axes) == 1:
        return sense_device.lines_step(x, sampled, data, result, axes[0], settings)
    return sense_device.planes_step(x, sampled, data, result, settings)


def _native_lines(x: Tensor, sampled: Tensor, data: Tensor | None, axis: int, share: float) -> Tensor:
    result, (coils, *shape) = torch.empty_like(x), x.shape[-4:]
    place = axis + 3
    sizes = (coils, math.prod(shape[:place]), shape[place], math.prod(shape[place + 1 :]))
    known, given = sampled.numel() // shape[place], 0 if data is None else data.data_ptr()
    addresses = (x.data_ptr(), sampled.data_ptr(), known, given, result.data_ptr())
    _lines(*addresses, share, 1 / shape[place], _batch(x), *sizes, native.threads())
    return result


def _native_planes(x: Tensor, sampled: Tensor, data: Tensor | None, share: float) -> Tensor:
    result, sizes = torch.empty_like(x), x.shape[-4:]
    given = 0 if data is None else data.data_ptr()
    addresses = (x.data_ptr(), sampled.data_ptr(), len(sampled), given, result.data_ptr())
    _planes(*addresses, share, 1 / _points(x, _PLANES), _batch(x), *sizes, native.threads())
    return result


def _torch(x: Tensor, sampled: Tensor, data: Tensor | None, axes: Sequence[int], share: float) -> Tensor:
    taken, along = share * sampled, tuple(axes)
    kspace = (torch.fft.fftn(x, dim=along) if along else x) * ((1 - taken) / _points(x, axes))
    if data is not None:
        kspace = torch.addcmul(kspace, taken.to(x.dtype), data)
    result: Tensor = torch.fft.ifftn(kspace, dim=along, norm="forward") if along else kspace
    return result.contiguous()


def _form(x: Tensor, sampled: Tensor, axes: Sequence[int]) -> str | None:
    """Which kernel does it: that of `lines`, of `planes`, or none."""
    there = device.installed() if x.device.type == "cuda" else x.device.type == "cpu" and native.available()
    if x.dtype != torch.complex64 or x.numel() == 0 or not there:
        return None
    if not all(transformable(x.shape[axis]) for axis in axes):
        return None
    if tuple(axes) == _PLANES:
        return "planes"
    if len(axes) != 1 or axes[0] == -1:
        return None
    return "lines" if math.prod(sampled.shape[axes[0] + 4 :]) == 1 else None  # columns share their mask


def _spread(sampled: Tensor, shape: Sequence[int], axes: Sequence[int]) -> Tensor:
    """The mask with all of its numbers along `axes`, contiguous."""
    sizes = [shape[axis] if axis in axes else sampled.shape[axis] for axis in (-3, -2, -1)]
    return sampled.expand(sizes).contiguous()


def _packed(numbers: Tensor, shape: Sequence[int]) -> Tensor:
    """Planes (..., y, x) in the layout of the kernels, (planes, floats)."""
    library = native.library()
    if library is None:
        raise RuntimeError("no compiled kernels; what was packed for them cannot be used")
    planes, is_complex = math.prod(numbers.shape[:-2]), int(numbers.is_complex())
    packed = torch.empty(planes, library.count("scs_step_floats", *shape[-2:], is_complex), dtype=torch.float32)
    _pack(numbers.data_ptr(), packed.data_ptr(), planes, *shape[-2:], is_complex, native.threads())
    return packed


def _batch(x: Tensor) -> int:
    return math.prod(x.shape[:-4])


def _points(x: Tensor, axes: Sequence[int]) -> int:
    return math.prod(x.shape[axis] for axis in axes)


def _check(x: Tensor, sampled: Tensor, data: Tensor | None, axes: Sequence[int]) -> None:
    shape = tuple(x.shape[-4:])
    if x.ndim < 4 or not x.is_complex() or (data is not None and (data.shape != shape or data.dtype != x.dtype)):
        held = "" if data is None else f", data {data.dtype} of shape {tuple(data.shape)}"
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}{held}; needed: complex, (*batch, coil, z, y, x), and data "
            "(coil, z, y, x) of the same dtype"
        )
    if sampled.ndim != 3 or any(n not in (1, m) for n, m in zip(sampled.shape, shape[1:], strict=True)):
        raise ValueError(f"sampled has shape {tuple(sampled.shape)}, it must broadcast against {shape[1:]}")
    if list(axes) != sorted(set(axes)) or not set(axes) <= {-3, -2, -1}:
        raise ValueError(f"axes is {list(axes)}, needed: some of -3, -2, -1 in this order")
