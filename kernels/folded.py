"""Groups of pixels that fold onto each other under every-R-th-line sampling, solved exactly for any regularization.

A^H A of such sampling is one Hermitian R x R matrix V diag(values) V^H per group, so (A^H A + ridge)^-1 is a product by V^H, a
division and a product by V, in one pass over memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import device, native

__all__ = ["launches", "solve"]

_A, _N = native.ADDRESS, native.LENGTH
_native = native.Function("scs_folded_solve", _A, _A, _A, _A, native.FLOAT, *[_N] * 6, native.INTEGER)
_MOST = 16
_BLOCK = 128


def solve(vectors: Tensor, values: Tensor, right: Tensor, ridge: float, acceleration: tuple[int, int]) -> Tensor:
    """(V diag(values + ridge) V^H)^-1 right for every group; shape (*batch, z, y, x) as `right`, complex64.

    acceleration: (Ry, Rz), R = Ry Rz; pixel k = (kz, ky) of a group lies kz z / Rz and ky y / Ry on. vectors: complex64,
    (R, R, groups), column j of a group its j-th eigenvector. values: float32, (R, groups). Groups are in the order
    (z / Rz, y / Ry, x). Raises ValueError for shapes that do not fit.
    """
    ry, rz = acceleration
    _check(vectors, values, right, ry, rz)
    right = right.resolve_conj().contiguous()
    if right.device.type == "cpu" and native.available() and rz * ry <= _MOST:
        result = torch.empty_like(right)
        addresses = (vectors.data_ptr(), values.data_ptr(), right.data_ptr(), result.data_ptr())
        sizes = (right.numel() // max(1, math.prod(right.shape[-3:])), rz, ry, *right.shape[-3:])
        _native(*addresses, ridge, *sizes, native.threads())
        return result
    if right.device.type == "cuda" and device.installed():
        result = torch.empty_like(right)
        device.launch(*launches(vectors, values, right, result, ridge, acceleration))
        return result
    return _torch(vectors, values, right, ridge, ry, rz)


def launches(
    vectors: Tensor, values: Tensor, right: Tensor, result: Tensor, ridge: float, acceleration: tuple[int, int]
) -> list[device.Launch]:
    """What runs on a CUDA device for contiguous arguments."""
    ry, rz = acceleration
    groups, run = values.shape[-1], right.shape[-2] // ry * right.shape[-1]
    grid = (-(-groups // _BLOCK), right.numel() // (groups * rz * ry), 1)
    arguments = (vectors, values, right, result, float(ridge), groups, run)
    macros = (("SCS_RZ", rz), ("SCS_RY", ry))
    return [device.Launch("folded.cu", "scs_folded_solve", grid, (_BLOCK, 1, 1), arguments, macros)]


def _torch(vectors: Tensor, values: Tensor, right: Tensor, ridge: float, ry: int, rz: int) -> Tensor:
    z, y, x = right.shape[-3:]
    groups = right.reshape(-1, rz, z // rz, ry, y // ry, x).movedim(3, 2).reshape(-1, rz * ry, values.shape[-1])
    turned = torch.einsum("kjg,bkg->bjg", vectors.conj(), groups) / (values + ridge)
    solved = torch.einsum("kjg,bjg->bkg", vectors, turned)
    return solved.reshape(-1, rz, ry, z // rz, y // ry, x).movedim(2, 3).reshape(right.shape)


def _check(vectors: Tensor, values: Tensor, right: Tensor, ry: int, rz: int) -> None:
    z, y, x = right.shape[-3:]
    groups = (z // rz) * (y // ry) * x
    size = rz * ry
    fits = z % rz == 0 and y % ry == 0
    if not fits or tuple(vectors.shape) != (size, size, groups) or tuple(values.shape) != (size, groups):
        raise ValueError(
            f"vectors has shape {tuple(vectors.shape)}, values {tuple(values.shape)}, right {tuple(right.shape)}; needed for "
            f"acceleration ({ry}, {rz}): {(size, size, groups)}, {(size, groups)}, sizes that it divides"
        )
    if vectors.dtype != torch.complex64 or values.dtype != torch.float32 or right.dtype != torch.complex64:
        raise ValueError(
            f"vectors is {vectors.dtype}, values {values.dtype}, right {right.dtype}; needed: complex64, float32, complex64"
        )
