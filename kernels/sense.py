"""Multi-coil data consistency in the cache: A^H A, A, A^H and whole conjugate gradient solutions of Cartesian SENSE.

A = weights F maps with plain transforms F, without scale: whoever prepares maps and weights folds the scale and the phases of
a centered transform into them. Two forms: `Lines` transforms along one axis, whose columns are independent of each other and
are solved as such; `Planes` transforms along y and x, slice by slice. Both hold maps in the layout of the compiled kernels,
so they exist only where those do: ask `lines` and `planes`, which answer None otherwise. For tensors on a CUDA device they answer
with the same interface from `sense_device`.

The step of data consistency in k-space, k + w (data - k) with w = 1 where there are data for a hard replacement and less for a
soft one, is (A^H A with weights 1 - w) x plus the image A^H(w data), which does not change: it costs a gram, no pass of its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import device, native
from .fft import transformable
from .sense_device import DeviceLines, DevicePlanes

__all__ = ["Lines", "Planes", "lines", "lines_gram", "planes", "planes_gram"]

_A, _N, _I, _F = native.ADDRESS, native.LENGTH, native.INTEGER, native.FLOAT
_lines_pack = native.Function("scs_lines_pack", _A, _A, *[_N] * 4, _I)
_lines_gram = native.Function("scs_lines_gram", *[_A] * 4, *[_N] * 5, _I)
_lines_forward = native.Function("scs_lines_forward", *[_A] * 4, *[_N] * 5, _I)
_lines_adjoint = native.Function("scs_lines_adjoint", *[_A] * 4, *[_N] * 5, _I)
_lines_solve = native.Function("scs_lines_solve", *[_A] * 4, _F, _I, _I, *[_N] * 5, _I)
_planes_pack = native.Function("scs_planes_pack", _A, _A, *[_N] * 4, _I)
_planes_pack_weights = native.Function("scs_planes_pack_weights", _A, _A, *[_N] * 3, _I)
_planes_gram = native.Function("scs_planes_gram", _A, _A, _N, _A, _A, *[_N] * 5, _I)
_planes_forward = native.Function("scs_planes_forward", _A, _A, _N, _A, _A, *[_N] * 5, _I)
_planes_adjoint = native.Function("scs_planes_adjoint", _A, _A, _N, _A, _A, *[_N] * 5, _I)
_planes_solve = native.Function("scs_planes_solve", _A, _A, _N, _A, _A, _F, _I, _I, *[_N] * 5, _I)


def lines(maps: Tensor, axis: int) -> Lines | DeviceLines | None:
    """Maps (coil, z, y, x) made ready for transforms along `axis`, -2 or -3; None where the kernels cannot do that."""
    if axis not in (-2, -3) or not transformable(maps.shape[axis]) or not _usable(maps):
        return None
    return Lines(maps, axis) if maps.device.type == "cpu" else DeviceLines(maps, axis)


def planes(maps: Tensor) -> Planes | DevicePlanes | None:
    """Maps (coil, z, y, x) made ready for transforms along y and x; None where the kernels cannot do that."""
    if not transformable(maps.shape[-1]) or not transformable(maps.shape[-2]) or not _usable(maps):
        return None
    return Planes(maps) if maps.device.type == "cpu" else DevicePlanes(maps)


class _Prepared:
    """What both forms share: packed maps, and how arguments are taken.

    weights, where a method asks for them: what `real_weights` or `complex_weights` made. Images are complex64,
    (*batch, z, y, x), k-space (*batch, coil, z, y, x), both on the CPU.
    """

    packed: Tensor
    coils: int
    shape: tuple[int, ...]

    def __init__(self, maps: Tensor) -> None:
        self.coils, self.shape = maps.shape[0], tuple(maps.shape[1:])

    def _batch(self, x: Tensor, axes: int) -> int:
        return math.prod(x.shape[: x.ndim - axes])

    def _like_image(self, kspace: Tensor) -> Tensor:
        return kspace.new_empty((*kspace.shape[:-4], *self.shape))

    def _like_kspace(self, x: Tensor) -> Tensor:
        return x.new_empty((*x.shape[:-3], self.coils, *self.shape))


class Lines(_Prepared):
    """Maps packed for transforms along one axis. Weights vary along that axis only."""

    def __init__(self, maps: Tensor, axis: int) -> None:
        super().__init__(maps)
        place = axis + 3
        self.sizes = [math.prod(self.shape[:place]), self.shape[place], math.prod(self.shape[place + 1 :])]
        maps = _plain(maps)
        self.packed = _packed("scs_lines_floats", self.coils, *self.sizes)
        _lines_pack(maps.data_ptr(), self.packed.data_ptr(), self.coils, *self.sizes, native.threads())

    def real_weights(self, weights: Tensor) -> Tensor:
        """Weights of a gram, (n,) real."""
        return weights.reshape(self.sizes[1]).to(torch.float32).contiguous()

    def complex_weights(self, weights: Tensor) -> Tensor:
        """Weights of A, (n,) complex."""
        return _plain(weights.reshape(self.sizes[1]).to(torch.complex64))

    def gram(self, weights: Tensor, x: Tensor) -> Tensor:
        """maps^H F^H weights F maps x, weights real."""
        if x.requires_grad and torch.is_grad_enabled():
            result: Tensor = lines_gram(self.packed, weights, x, self.coils, self.sizes)
            return result
        return _lines_gram_of(self.packed, weights, x, self.coils, self.sizes)

    def forward(self, weights: Tensor, x: Tensor) -> Tensor:
        """weights F maps x, weights complex."""
        x = _plain(x)
        return self._run(_lines_forward, weights, x, self._like_kspace(x), self._batch(x, 3))

    def adjoint(self, weights: Tensor, kspace: Tensor) -> Tensor:
        """maps^H F^H conj(weights) kspace."""
        kspace = _plain(kspace)
        return self._run(_lines_adjoint, weights, kspace, self._like_image(kspace), self._batch(kspace, 4))

    def solve(
        self, weights: Tensor, right_side: Tensor, iterations: int, regularization: float, initial: Tensor | None
    ) -> Tensor:
        """x after conjugate gradients for (gram + regularization) x = right_side, column by column."""
        right_side, x = _start(right_side, initial)
        addresses = (self.packed.data_ptr(), weights.data_ptr(), right_side.data_ptr(), x.data_ptr())
        settings = (regularization, iterations, int(initial is None))
        sizes = (self._batch(x, 3), self.coils, *self.sizes)
        _lines_solve(*addresses, *settings, *sizes, native.threads())
        return x

    def _run(self, function: native.Function, weights: Tensor, given: Tensor, result: Tensor, batch: int) -> Tensor:
        addresses = (self.packed.data_ptr(), weights.data_ptr(), given.data_ptr(), result.data_ptr())
        function(*addresses, batch, self.coils, *self.sizes, native.threads())
        return result


class Planes(_Prepared):
    """Maps packed for transforms along y and x. Weights are the same for all slices or one set for each."""

    def __init__(self, maps: Tensor) -> None:
        super().__init__(maps)
        maps = _plain(maps)
        self.packed = _packed("scs_planes_floats", self.coils, *self.shape)
        _planes_pack(maps.data_ptr(), self.packed.data_ptr(), self.coils, *self.shape, native.threads())

    def real_weights(self, weights: Tensor) -> Tensor:
        """Weights of a gram, real, broadcasting against (z, y, x), in the layout of the kernels: (z or 1, floats)."""
        return self._pack(weights.to(torch.float32), is_complex=False)

    def complex_weights(self, weights: Tensor) -> Tensor:
        """Weights of A, complex, likewise."""
        return self._pack(weights.to(torch.complex64), is_complex=True)

    def gram(self, weights: Tensor, x: Tensor) -> Tensor:
        """maps^H F^H weights F maps x, weights real."""
        if x.requires_grad and torch.is_grad_enabled():
            result: Tensor = planes_gram(self.packed, weights, x, self.coils)
            return result
        return _planes_gram_of(self.packed, weights, x, self.coils)

    def forward(self, weights: Tensor, x: Tensor) -> Tensor:
        """weights F maps x, weights complex."""
        x = _plain(x)
        return self._run(_planes_forward, weights, x, self._like_kspace(x), self._batch(x, 3))

    def adjoint(self, weights: Tensor, kspace: Tensor) -> Tensor:
        """maps^H F^H conj(weights) kspace."""
        kspace = _plain(kspace)
        return self._run(_planes_adjoint, weights, kspace, self._like_image(kspace), self._batch(kspace, 4))

    def solve(
        self, weights: Tensor, right_side: Tensor, iterations: int, regularization: float, initial: Tensor | None
    ) -> Tensor:
        """x after conjugate gradients for (gram + regularization) x = right_side, slice by slice."""
        right_side, x = _start(right_side, initial)
        addresses = (self.packed.data_ptr(), weights.data_ptr(), len(weights), right_side.data_ptr(), x.data_ptr())
        settings = (regularization, iterations, int(initial is None))
        sizes = (self._batch(x, 3), self.coils, *self.shape)
        _planes_solve(*addresses, *settings, *sizes, native.threads())
        return x

    def _run(self, function: native.Function, weights: Tensor, given: Tensor, result: Tensor, batch: int) -> Tensor:
        addresses = (self.packed.data_ptr(), weights.data_ptr(), len(weights), given.data_ptr(), result.data_ptr())
        function(*addresses, batch, self.coils, *self.shape, native.threads())
        return result

    def _pack(self, weights: Tensor, *, is_complex: bool) -> Tensor:
        slices = weights.shape[-3] if weights.ndim > 2 else 1
        weights = _plain(weights.expand(slices, *self.shape[1:]))
        packed = _packed("scs_planes_weight_floats", slices, *self.shape[1:], int(is_complex)).reshape(slices, -1)
        _planes_pack_weights(weights.data_ptr(), packed.data_ptr(), slices, *self.shape[1:], int(is_complex))
        return packed


@torch.library.custom_op("scanside::lines_gram", mutates_args=())
def lines_gram(packed: Tensor, weights: Tensor, x: Tensor, coils: int, sizes: list[int]) -> Tensor:
    """`Lines.gram` as an operator that torch differentiates with respect to x. sizes: (outer, n, inner)."""
    return _lines_gram_of(packed, weights, x, coils, sizes)


@lines_gram.register_fake
def _(packed: Tensor, weights: Tensor, x: Tensor, coils: int, sizes: list[int]) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("scanside::planes_gram", mutates_args=())
def planes_gram(packed: Tensor, weights: Tensor, x: Tensor, coils: int) -> Tensor:
    """`Planes.gram` as an operator that torch differentiates with respect to x."""
    return _planes_gram_of(packed, weights, x, coils)


@planes_gram.register_fake
def _(packed: Tensor, weights: Tensor, x: Tensor, coils: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401, ARG001 - as torch calls it
    packed, weights, _, *ctx.rest = inputs
    ctx.save_for_backward(packed, weights)


def _lines_backward(ctx: Any, up: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """The gram is its own adjoint."""
    return None, None, lines_gram(*ctx.saved_tensors, up, *ctx.rest), None, None


def _planes_backward(ctx: Any, up: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    return None, None, planes_gram(*ctx.saved_tensors, up, *ctx.rest), None


lines_gram.register_autograd(_lines_backward, setup_context=_keep)
planes_gram.register_autograd(_planes_backward, setup_context=_keep)


def _lines_gram_of(packed: Tensor, weights: Tensor, x: Tensor, coils: int, sizes: list[int]) -> Tensor:
    x = _plain(x)
    result = torch.empty_like(x)
    addresses = (packed.data_ptr(), weights.data_ptr(), x.data_ptr(), result.data_ptr())
    _lines_gram(*addresses, x.numel() // max(1, math.prod(sizes)), coils, *sizes, native.threads())
    return result


def _planes_gram_of(packed: Tensor, weights: Tensor, x: Tensor, coils: int) -> Tensor:
    x = _plain(x)
    result, shape = torch.empty_like(x), x.shape[-3:]
    addresses = (packed.data_ptr(), weights.data_ptr(), len(weights), x.data_ptr(), result.data_ptr())
    _planes_gram(*addresses, x.numel() // max(1, shape.numel()), coils, *shape, native.threads())
    return result


def _usable(maps: Tensor) -> bool:
    """Whether compiled kernels take these maps; gradients with respect to maps are left to torch."""
    right = maps.dtype == torch.complex64 and not maps.requires_grad and maps.numel() > 0
    if maps.device.type == "cuda":
        return right and device.installed()
    return right and maps.device.type == "cpu" and native.available()


def _packed(function: str, *sizes: int) -> Tensor:
    """Memory for an array in the layout of the kernels."""
    found = native.library()
    if found is None:
        raise RuntimeError("no compiled kernels; ask `lines` or `planes`, which answer None then")
    return torch.empty(found.count(function, *sizes), dtype=torch.float32)


def _plain(x: Tensor) -> Tensor:
    return x.resolve_conj().resolve_neg().contiguous()


def _start(right_side: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """The right side as the kernels take it, and the array that holds the start and then the result."""
    right_side = _plain(right_side)
    x = torch.empty_like(right_side) if initial is None else initial.expand_as(right_side).clone().resolve_conj()
    return right_side, x.contiguous()
