"""Multi-coil data consistency in the cache: A^H A, A, A^H and whole conjugate gradient solutions of Cartesian SENSE.

A = weights F maps with plain transforms F, without scale: whoever prepares maps and weights folds the scale and the phases of
a centered transform into them. Two forms: `Lines` transforms along one axis, whose columns are independent of each other and
are solved as such; `Planes` transforms along y and x, slice by slice. Both hold maps in the layout of the compiled kernels,
so they exist only where those do: ask `lines` and `planes`, which answer None otherwise. For tensors on a CUDA device they answer
with the same interface from `sense_device`.

`descend` is the step of data consistency in k-space over all coils at once, k + share (data - k) where there are data: the data
come in as the image A^H y, so that it reads one image more than a gram and not the k-space of every coil. Coil by coil, without
maps, it is `kspace_step`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import device, native
from .fft import transformable
from .sense_device import DeviceLines, DevicePlanes
from .sense_operators import OPERATORS, plain, run

__all__ = ["Lines", "Planes", "lines", "planes"]

_A, _N, _I, _F = native.ADDRESS, native.LENGTH, native.INTEGER, native.FLOAT
_lines_pack = native.Function("scs_lines_pack", _A, _A, *[_N] * 4, _I)
_lines_solve = native.Function("scs_lines_solve", *[_A] * 4, _F, _I, _I, *[_N] * 5, _I)
_planes_pack = native.Function("scs_planes_pack", _A, _A, *[_N] * 4, _I)
_planes_pack_weights = native.Function("scs_planes_pack_weights", _A, _A, *[_N] * 3, _I)
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

    form: str
    packed: Tensor
    sizes: list[int]

    def __init__(self, maps: Tensor) -> None:
        self.coils, self.shape = maps.shape[0], tuple(maps.shape[1:])

    def gram(self, weights: Tensor, x: Tensor) -> Tensor:
        """maps^H F^H weights F maps x, weights real."""
        return self._apply("gram", weights, x)

    def descend(self, weights: Tensor, x: Tensor, of_data: Tensor, share: float) -> Tensor:
        """x + share (of_data - gram x), of_data being A^H y, (z, y, x): the step in k-space where sum |maps|^2 is 1."""
        if _recorded(x):
            return x + share * (of_data - self.gram(weights, x))
        step = plain(of_data), float(share)
        return run(f"{self.form}_gram", self.packed, weights, x, self.coils, self.sizes, step)

    def forward(self, weights: Tensor, x: Tensor) -> Tensor:
        """weights F maps x, weights complex."""
        return self._apply("forward", weights, x)

    def adjoint(self, weights: Tensor, kspace: Tensor) -> Tensor:
        """maps^H F^H conj(weights) kspace."""
        return self._apply("adjoint", weights, kspace)

    def _apply(self, kind: str, weights: Tensor, given: Tensor) -> Tensor:
        name = f"{self.form}_{kind}"
        if _recorded(given):
            return OPERATORS[name](self.packed, weights, given, self.coils, self.sizes)
        return run(name, self.packed, weights, given, self.coils, self.sizes)

    def _batch(self, x: Tensor) -> int:
        return math.prod(x.shape[:-3])


class Lines(_Prepared):
    """Maps packed for transforms along one axis. Weights vary along that axis only."""

    form = "lines"

    def __init__(self, maps: Tensor, axis: int) -> None:
        super().__init__(maps)
        place = axis + 3
        self.sizes = [math.prod(self.shape[:place]), self.shape[place], math.prod(self.shape[place + 1 :])]
        maps = plain(maps)
        self.packed = _packed("scs_lines_floats", self.coils, *self.sizes)
        _lines_pack(maps.data_ptr(), self.packed.data_ptr(), self.coils, *self.sizes, native.threads())

    def real_weights(self, weights: Tensor) -> Tensor:
        """Weights of a gram, (n,) real."""
        return weights.reshape(self.sizes[1]).to(torch.float32).contiguous()

    def complex_weights(self, weights: Tensor) -> Tensor:
        """Weights of A, (n,) complex."""
        return plain(weights.reshape(self.sizes[1]).to(torch.complex64))

    def solve(
        self, weights: Tensor, right_side: Tensor, iterations: int, regularization: float, initial: Tensor | None
    ) -> Tensor:
        """x after conjugate gradients for (gram + regularization) x = right_side, column by column."""
        right_side, x = _start(right_side, initial)
        addresses = (self.packed.data_ptr(), weights.data_ptr(), right_side.data_ptr(), x.data_ptr())
        settings = (regularization, iterations, int(initial is None))
        sizes = (self._batch(x), self.coils, *self.sizes)
        _lines_solve(*addresses, *settings, *sizes, native.threads())
        return x


class Planes(_Prepared):
    """Maps packed for transforms along y and x. Weights are the same for all slices or one set for each."""

    form = "planes"

    def __init__(self, maps: Tensor) -> None:
        super().__init__(maps)
        self.sizes, maps = list(self.shape), plain(maps)
        self.packed = _packed("scs_planes_floats", self.coils, *self.sizes)
        _planes_pack(maps.data_ptr(), self.packed.data_ptr(), self.coils, *self.sizes, native.threads())

    def real_weights(self, weights: Tensor) -> Tensor:
        """Weights of a gram, real, broadcasting against (z, y, x), in the layout of the kernels: (z or 1, floats)."""
        return self._pack(weights.to(torch.float32), is_complex=False)

    def complex_weights(self, weights: Tensor) -> Tensor:
        """Weights of A, complex, likewise."""
        return self._pack(weights.to(torch.complex64), is_complex=True)

    def solve(
        self, weights: Tensor, right_side: Tensor, iterations: int, regularization: float, initial: Tensor | None
    ) -> Tensor:
        """x after conjugate gradients for (gram + regularization) x = right_side, slice by slice."""
        right_side, x = _start(right_side, initial)
        addresses = (self.packed.data_ptr(), weights.data_ptr(), len(weights), right_side.data_ptr(), x.data_ptr())
        settings = (regularization, iterations, int(initial is None))
        sizes = (self._batch(x), self.coils, *self.sizes)
        _planes_solve(*addresses, *settings, *sizes, native.threads())
        return x

    def _pack(self, weights: Tensor, *, is_complex: bool) -> Tensor:
        slices = weights.shape[-3] if weights.ndim > 2 else 1
        weights = plain(weights.expand(slices, *self.shape[1:]))
        packed = _packed("scs_planes_weight_floats", slices, *self.shape[1:], int(is_complex)).reshape(slices, -1)
        _planes_pack_weights(weights.data_ptr(), packed.data_ptr(), slices, *self.shape[1:], int(is_complex))
        return packed


def _recorded(x: Tensor) -> bool:
    """Whether torch records what is done to x; else the operators' bookkeeping is saved."""
    return x.requires_grad and torch.is_grad_enabled()


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


def _start(right_side: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """The right side as the kernels take it, and the array that holds the start and then the result."""
    right_side = plain(right_side)
    x = torch.empty_like(right_side) if initial is None else initial.expand_as(right_side).clone().resolve_conj()
    return right_side, x.contiguous()
