"""A Hermitian coil x coil matrix for every pixel, applied to coil images: the low-rank step of SAKE and its like."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import device, native

__all__ = ["apply", "coil_matrix", "launches", "triangle"]

_native = native.Function(
    "scs_coil_matrix",
    native.ADDRESS,
    native.ADDRESS,
    native.ADDRESS,
    native.LENGTH,
    native.INTEGER,
    native.LENGTH,
    native.INTEGER,
)
_MOST_COILS = 128
_BLOCK = 128


def triangle(coils: int) -> tuple[Tensor, Tensor]:
    """Row and column, each (coils (coils + 1) / 2,), of the numbers in the order in which the upper triangle is kept."""
    rows, columns = torch.triu_indices(coils, coils)
    return rows, columns


def apply(matrix: Tensor, x: Tensor) -> Tensor:
    """M x at every pixel: shape (*batch, coil, *pixels), as x.

    matrix: complex, (coil (coil + 1) / 2, *pixels), the upper triangle of M row by row (`triangle`). x: the same dtype.
    Raises ValueError for shapes or dtypes that do not fit. The function beneath the operator `coil_matrix`.
    """
    _check(matrix, x)
    matrix, x = matrix.resolve_conj().contiguous(), x.resolve_conj().contiguous()
    single = x.dtype == torch.complex64 and x.numel() > 0
    if single and x.device.type == "cuda" and device.installed():
        result = torch.empty_like(x)
        device.launch(*launches(matrix, x, result))
        return result
    if single and x.device.type == "cpu" and native.available() and _coils(matrix, x) <= _MOST_COILS:
        return _applied(matrix, x)
    return _torch(matrix, x)


@torch.library.custom_op("scanside::coil_matrix", mutates_args=())
def coil_matrix(matrix: Tensor, x: Tensor) -> Tensor:
    """As `apply`, as an operator that torch differentiates and compiles."""
    return apply(matrix, x)


@coil_matrix.register_fake
def _(matrix: Tensor, x: Tensor) -> Tensor:
    _check(matrix, x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_inputs(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _gradients(ctx: torch.autograd.function.FunctionCtx, up: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """M is its own adjoint. Entry (c, d) acts as itself on x_d and as its conjugate on x_c."""
    matrix, x = ctx.saved_tensors  # type: ignore[attr-defined]
    for_matrix = None
    if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
        rows, columns = (index.to(x.device) for index in triangle(_coils(matrix, x)))
        up_c, x_c = (t.reshape(-1, *t.shape[-matrix.ndim :]) for t in (up, x))
        direct = up_c[:, rows] * x_c[:, columns].conj()
        mirrored = (up_c[:, columns] * x_c[:, rows].conj()).conj()
        diagonal = (rows == columns).reshape(-1, *(1,) * (matrix.ndim - 1))
        for_matrix = torch.where(diagonal, direct.real.to(direct.dtype), direct + mirrored).sum(0)
    for_x = coil_matrix(matrix, up) if ctx.needs_input_grad[1] else None  # type: ignore[attr-defined]
    return for_matrix, for_x


coil_matrix.register_autograd(_gradients, setup_context=_keep_inputs)


def launches(matrix: Tensor, x: Tensor, result: Tensor) -> list[device.Launch]:
    """What runs on a CUDA device for contiguous arguments."""
    pixels, coils = math.prod(matrix.shape[1:]), _coils(matrix, x)
    batch = x.numel() // (coils * pixels)
    grid = (-(-pixels // _BLOCK), batch, 1)
    macros = (("SCS_COILS", coils),)
    arguments = (matrix, x, result, pixels)
    return [device.Launch("coil_matrix.cu", "scs_coil_matrix", grid, (_BLOCK, 1, 1), arguments, macros)]


def _applied(matrix: Tensor, x: Tensor) -> Tensor:
    result = torch.empty_like(x)
    pixels, coils = math.prod(matrix.shape[1:]), _coils(matrix, x)
    addresses = (matrix.data_ptr(), x.data_ptr(), result.data_ptr())
    _native(*addresses, x.numel() // (coils * pixels), coils, pixels, native.threads())
    return result


def _torch(matrix: Tensor, x: Tensor) -> Tensor:
    """The same without kernels, row by row of the triangle.

    No lazy conjugate inside an operator: compiled graphs call it below the dispatch key that would resolve it.
    """
    coils = _coils(matrix, x)
    images, result, first = x.movedim(-matrix.ndim, 0), torch.zeros_like(x), 0
    rows = result.movedim(-matrix.ndim, 0)
    for c in range(coils):
        rows[c] += matrix[first].real * images[c]
        for d in range(c + 1, coils):
            entry = matrix[first + d - c]
            rows[c] += entry * images[d]
            rows[d] += torch.conj_physical(entry) * images[c]
        first += coils - c
    return result


def _coils(matrix: Tensor, x: Tensor) -> int:
    return int(x.shape[-matrix.ndim])


def _check(matrix: Tensor, x: Tensor) -> None:
    pixels = tuple(matrix.shape[1:])
    fits = matrix.ndim >= 2 and x.ndim >= matrix.ndim and tuple(x.shape[x.ndim - len(pixels) :]) == pixels
    coils = _coils(matrix, x) if fits else 0
    if not fits or matrix.shape[0] != coils * (coils + 1) // 2:
        raise ValueError(
            f"matrix has shape {tuple(matrix.shape)}, x {tuple(x.shape)}; needed: (coil (coil + 1) / 2, *pixels) "
            "and (*batch, coil, *pixels)"
        )
    if matrix.dtype != x.dtype or not x.is_complex():
        raise ValueError(f"matrix is {matrix.dtype}, x is {x.dtype}; needed: the same complex dtype")
