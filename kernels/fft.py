"""Batched complex Fourier transforms of lengths 2^a 3^b 5^c up to 1024, along any axis."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from . import device, native

__all__ = ["LONGEST", "apply", "fft", "launches", "roots", "threads_for", "transformable"]

LONGEST = 1024
_A, _N = native.ADDRESS, native.LENGTH
_native = native.Function("scs_fft", _A, _A, _N, _N, _N, native.INTEGER, native.FLOAT, native.INTEGER)
_SHARED_NUMBERS = 4096
"""Complex numbers that a block keeps in shared memory: 32 KiB."""


def transformable(length: int, longest: int = LONGEST) -> bool:
    """Whether the kernels transform this length, on a device up to 1024; `longest` is another limit."""
    rest = length
    for prime in (2, 3, 5):
        while rest > 1 and rest % prime == 0:
            rest //= prime
    return rest == 1 and length <= longest


def apply(x: Tensor, axis: int, sign: int = -1, factor: float = 1.0) -> Tensor:
    """factor times sum over n of x[n] exp(sign 2 pi i k n / N) along `axis`; the function beneath the operator `fft`.

    x: complex. Other lengths, dtypes and devices than the kernels have go to torch.fft. Raises ValueError for a sign that is
    not 1 or -1 and an axis that is not there.
    """
    _check(x, axis, sign)
    axis %= x.ndim
    if x.numel() == 0:
        return x.clone()
    if x.dtype == torch.complex64 and transformable(x.shape[axis]):
        given = x.resolve_conj().contiguous()
        if x.device.type == "cpu" and native.available():
            return _transformed(given, axis, sign, factor)
        if x.device.type == "cuda" and device.installed():
            result = torch.empty_like(given)
            device.launch(*launches(given, result, roots(x.shape[axis], x.device), axis, sign, factor))
            return result
    return _torch(x, axis, sign, factor)


@torch.library.custom_op("scanside::fft", mutates_args=())
def fft(x: Tensor, axis: int, sign: int = -1, factor: float = 1.0) -> Tensor:
    """As `apply`, as an operator that torch differentiates and compiles."""
    return apply(x, axis, sign, factor)


@fft.register_fake
def _(x: Tensor, axis: int, sign: int = -1, factor: float = 1.0) -> Tensor:  # noqa: ARG001
    _check(x, axis, sign)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401, ARG001 - as torch calls it
    ctx.settings = inputs[1:]


def _backward(ctx: Any, up: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """The adjoint has the other sign."""
    axis, sign, factor = ctx.settings
    return fft(up, axis, -sign, factor), None, None, None


fft.register_autograd(_backward, setup_context=_keep)


@functools.lru_cache(maxsize=64)
def roots(length: int, where: torch.device | None = None) -> Tensor:
    """exp(-2 pi i k / length) for k below length: complex64, as the CUDA kernels take them."""
    angle = torch.arange(length, dtype=torch.float64) * (-2 * math.pi / length)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64).to(where or "cpu")


def launches(
    x: Tensor, result: Tensor, turns: Tensor, axis: int, sign: int = -1, factor: float = 1.0
) -> list[device.Launch]:
    """What runs on a CUDA device for contiguous arguments; turns: `roots` of the length."""
    length, inner = x.shape[axis], math.prod(x.shape[axis + 1 :])
    columns = x.numel() // length
    # A power of two: neighbors in memory, and no more than there are.
    together = 1 << max(0, min(_SHARED_NUMBERS // length, 8, columns).bit_length() - 1)
    macros = (("SCS_N", length), ("SCS_SIGN", sign), ("SCS_COLUMNS", together), ("SCS_ROWS", int(inner == 1)))
    grid, block = (-(-columns // together), 1, 1), (threads_for(length * together), 1, 1)
    arguments = (x, result, turns, columns, inner, factor)
    return [device.Launch("fft.cu", "scs_fft", grid, block, arguments, macros, 8 * length * together)]


def threads_for(numbers: int) -> int:
    """Threads of a block that transforms so many complex numbers: about 8 each, a power of two from 32 to 256."""
    return int(min(256, max(32, 1 << (max(1, numbers // 8) - 1).bit_length())))


def _transformed(x: Tensor, axis: int, sign: int, factor: float) -> Tensor:
    result = torch.empty_like(x)
    outer, inner = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])
    _native(x.data_ptr(), result.data_ptr(), outer, x.shape[axis], inner, sign, factor, native.threads())
    return result


def _torch(x: Tensor, axis: int, sign: int, factor: float) -> Tensor:
    transformed = torch.fft.fft(x, dim=axis) if sign < 0 else torch.fft.ifft(x, dim=axis, norm="forward")
    result: Tensor = transformed * factor
    return result.contiguous()


def _check(x: Tensor, axis: int, sign: int) -> None:
    if not x.is_complex():
        raise ValueError(f"x is {x.dtype}, needed is a complex dtype")
    if sign not in (1, -1):
        raise ValueError(f"sign is {sign}, allowed are -1 (forward) and 1 (back)")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis is {axis}, x has {x.ndim} axes")
