"""Operators of Cartesian imaging: centered Fourier transform, sampling, coil sensitivities, and the three fused.

Images are [..., z, y, x]; coil images and k-space [..., coil, z, y, x]. K-space is centered: frequency 0 lies at index
N // 2, as does position 0 in the image. Nothing is rolled at run time: with c = N // 2,

    (centered DFT of x)[k] = exp(2 pi i c (k - c) / N) DFT(x[n] exp(2 pi i c n / N))[k],

which for even N is a change of signs and holds for odd N too. The phases are folded into maps and masks.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable, Sequence

import torch
from scanside.kernels import sense
from scanside.kernels.kspace_step import KspaceStep
from scanside.kernels.sense_device import DeviceLines, DevicePlanes
from torch import Tensor

from .linear import Identity, LinearOperator

__all__ = ["CartesianSense", "CoilSensitivity", "Fourier", "Sampling", "innermost"]

Shape = tuple[int, ...]
Kernel = sense.Lines | sense.Planes | DeviceLines | DevicePlanes


class Fourier(LinearOperator):
    """Centered orthonormal discrete Fourier transform along `axes`; unitary.

    shape: of the argument, all axes but batch. axes: counted from the end, such as (-2, -1).
    dtype, device: of what it is applied to.
    """

    def __init__(
        self,
        shape: Sequence[int],
        axes: Sequence[int] = (-2, -1),
        *,
        dtype: torch.dtype = torch.complex64,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(shape, shape)
        self._axes = _transformed(self.domain, axes)
        self._before, self._after = _phases(self.domain, self._axes, dtype, torch.device(device))

    @property
    def gram(self) -> LinearOperator:
        """The identity."""
        return Identity(self.domain)

    def _forward(self, x: Tensor) -> Tensor:
        return _orthonormal(x * self._before, self._axes).mul_(self._after)

    def _backward(self, y: Tensor) -> Tensor:
        return _orthonormal(y * self._after.conj(), self._axes, inverse=True).mul_(self._before.conj())

    def step(self, data: Tensor, mask: Tensor) -> KspaceStep:
        """The step of data consistency coil by coil: x to F^H k, with k = F x and k + share (data - k) where the mask is.

        data: centered k-space (coil, z, y, x), 0 where the mask is not; mask: broadcasts against (z, y, x). Both are shifted
        here, once: a plain transform has frequency k at index k modulo N, so that nothing is left to do on the side of the image.
        Axes that the mask does not vary on are transformed here as well, for a step leaves them as they are.
        """
        mask = mask.reshape((1,) * (len(self.domain) - mask.ndim) + tuple(mask.shape))
        varying = tuple(axis for axis in self._axes if _varies(mask, axis))
        others = tuple(axis for axis in self._axes if axis not in varying)
        for axis in others:
            mask = mask.narrow(axis, 0, 1)
        data = Fourier(self.domain, others, dtype=data.dtype, device=data.device).H(data)
        _, after = _phases(self.domain, varying, data.dtype, data.device)
        data = data * (after.conj() / math.sqrt(_points(self.domain, varying)))
        back = [-(self.domain[axis] // 2) for axis in varying]
        return (
            KspaceStep(data.roll(back, varying), mask.roll(back, varying), varying)
            if varying
            else KspaceStep(data, mask, ())
        )


class Sampling(LinearOperator):
    """Multiplication by a mask or by real or complex weights; what is not sampled becomes 0.

    mask: broadcasts against `shape`, boolean, real or complex.
    """

    def __init__(self, mask: Tensor, shape: Sequence[int]) -> None:
        super().__init__(shape, shape)
        _broadcasts(mask, self.domain, "mask")
        self._mask = mask

    @property
    def gram(self) -> LinearOperator:
        """Sampling by |mask|^2."""
        return self if self._mask.dtype == torch.bool else Sampling(_power(self._mask), self.domain)

    def _forward(self, x: Tensor) -> Tensor:
        return x * self._mask

    def _backward(self, y: Tensor) -> Tensor:
        return y * self._mask.conj()


class CoilSensitivity(LinearOperator):
    """An image to the images that the coils see: maps * x, from [z, y, x] to [coil, z, y, x].

    maps: complex, shape (coil, z, y, x).
    """

    def __init__(self, maps: Tensor) -> None:
        super().__init__(maps.shape[1:], maps.shape)
        self._maps, self._conjugate = maps, maps.conj().resolve_conj()

    @property
    def gram(self) -> LinearOperator:
        """Multiplication by sum |maps|^2 over the coils."""
        return Sampling(_power(self._maps).sum(0), self.domain)

    def _forward(self, x: Tensor) -> Tensor:
        return self._maps * x.unsqueeze(-len(self.range))

    def _backward(self, y: Tensor) -> Tensor:
        return _combined(self._conjugate, y.unbind(-4))


class CartesianSense(LinearOperator):
    """Sampling @ Fourier @ CoilSensitivity in one: an image [z, y, x] to centered k-space [coil, z, y, x].

    maps: complex, shape (coil, z, y, x). mask: boolean or weights, broadcasts against (z, y, x); 0 is not sampled.
    axes: those that are k-space in the data, such as (-2,) where the readout has been transformed on arrival.
    Adjoint and gram leave out what was not sampled, whatever the data hold there. Results may be laid out in memory with
    the transformed axes innermost; call `contiguous` on what leaves torch as bytes.
    """

    def __init__(self, maps: Tensor, mask: Tensor, axes: Sequence[int] = (-2, -1)) -> None:
        if maps.ndim != 4 or not maps.is_complex():
            raise ValueError(f"maps is {maps.dtype} of shape {tuple(maps.shape)}, needed: complex, (coil, z, y, x)")
        super().__init__(maps.shape[1:], maps.shape)
        self._axes = _transformed(self.domain, axes)
        before, self._after = _phases(self.domain, self._axes, maps.dtype, maps.device)
        # The scale of the orthonormal transform goes into the maps as well: its own pass is saved.
        self._maps = innermost(maps * (before / math.sqrt(_points(self.domain, self._axes))), self._axes)
        self._conjugate = self._maps.conj().resolve_conj()
        self._prepared = _Prepared(self._maps)
        self._sample(mask)

    def with_mask(self, mask: Tensor) -> CartesianSense:
        """The same operator for another mask; the maps are shared, so this costs next to nothing while lines arrive."""
        other = copy.copy(self)
        other._sample(mask)
        return other

    @property
    def mask(self) -> Tensor:
        """What is sampled; broadcasts against `domain`."""
        return self._mask

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes that are k-space; those of length 1 are left out."""
        return self._axes

    @property
    def gram_bound(self) -> Tensor:
        """At least the largest eigenvalue of the gram: max |mask|^2 times max of sum |maps|^2; a real tensor, no axes."""
        scale = _points(self.domain, self._axes)
        return _power(self._maps).sum(0).amax() * scale * _power(self._weights).amax()

    @property
    def gram(self) -> LinearOperator:
        """maps^H F^H |mask|^2 F maps, with transforms only along the axes that the mask varies on."""
        return self._gram

    def descend(self, x: Tensor, of_data: Tensor, share: float) -> Tensor:
        """x + share A^H (y - A x), of_data being A^H y, (z, y, x): in one pass where the kernels can."""
        return self._gram.descend(x, of_data, share)

    def _sample(self, mask: Tensor) -> None:
        _broadcasts(mask, self.domain, "mask")
        self._mask = mask.to(self._maps.device)
        self._weights = self._after * self._mask
        self._gram = _SenseGram(self._prepared, self._conjugate, self._mask, self._axes)
        self._kernel_weights: Tensor | None = None

    def _kernel(self, x: Tensor) -> Kernel | None:
        """The compiled form of this operator, if there is one for such an argument."""
        kernel = self._prepared.kernel(x, self._axes, self._weights)
        if kernel is not None and self._kernel_weights is None:
            self._kernel_weights = kernel.complex_weights(self._weights)
        return kernel

    def _forward(self, x: Tensor) -> Tensor:
        kernel = self._kernel(x)
        if kernel is not None and self._kernel_weights is not None:
            return kernel.forward(self._kernel_weights, x)
        return torch.stack([_fft(sees * x, self._axes).mul_(self._weights) for sees in self._maps], dim=-4)

    def _backward(self, y: Tensor) -> Tensor:
        kernel = self._kernel(y)
        if kernel is not None and self._kernel_weights is not None:
            return kernel.adjoint(self._kernel_weights, y)
        weights = self._weights.conj().resolve_conj()
        coils = (_ifft(weights * kspace, self._axes) for kspace in y.unbind(-4))
        return _combined(self._conjugate, coils)


class _Prepared:
    """Maps in the layouts of the compiled kernels, made when first asked for; operators that differ in their mask share them.

    maps: with the phases of the image side and the scale 1/sqrt(N) of all axes in them.
    """

    def __init__(self, maps: Tensor) -> None:
        self.maps = maps
        self._made: dict[tuple[int, ...], Kernel | None] = {}

    def kernel(self, x: Tensor, axes: tuple[int, ...], weights: Tensor) -> Kernel | None:
        """What transforms along `axes` with such weights; None where that is left to torch."""
        if x.dtype != torch.complex64 or x.device != self.maps.device or self.maps.dtype != torch.complex64:
            return None
        if axes not in self._made:
            self._made[axes] = self._make(axes)
        kernel = self._made[axes]
        # Columns of lines share their weights; a plane may have them of every slice.
        return None if len(axes) == 1 and weights.numel() != self.maps.shape[axes[0]] else kernel

    def _make(self, axes: tuple[int, ...]) -> Kernel | None:
        if axes == (-2, -1):
            return sense.planes(self.maps)
        return sense.lines(self.maps, axes[0]) if len(axes) == 1 else None


class _SenseGram(LinearOperator):
    """maps^H F^H |mask|^2 F maps: the phases of the k-space side cancel, and so does F along axes of a constant mask."""

    def __init__(self, prepared: _Prepared, conjugate: Tensor, mask: Tensor, axes: tuple[int, ...]) -> None:
        maps, self._prepared = prepared.maps, prepared
        super().__init__(maps.shape[1:], maps.shape[1:])
        weights = _power(mask.to(torch.promote_types(mask.dtype, maps.real.dtype)))
        self._axes = tuple(axis for axis in axes if _varies(weights, axis))
        left_out = set(axes) - set(self._axes)
        for axis in left_out:
            weights = weights.narrow(axis, 0, 1) if -axis <= weights.ndim else weights
        self._maps, self._conjugate = innermost(maps, self._axes), innermost(conjugate, self._axes)
        self._real_weights = weights * _points(self.domain, tuple(left_out))
        # Complex, for a real factor would be converted anew for every coil.
        self._weights = self._real_weights.to(maps.dtype)

    @property
    def H(self) -> LinearOperator:  # noqa: N802
        """Itself."""
        return self

    @property
    def independent(self) -> tuple[int, ...]:
        """The axes without a transform: with a mask of lines all columns, with one of planes all slices."""
        return tuple(axis for axis in range(-len(self.domain), 0) if axis not in self._axes)

    def solve(
        self, right_side: Tensor, *, iterations: int, regularization: float, initial: Tensor | None = None
    ) -> Tensor | None:
        """All iterations in the cache of the processor; None without a kernel, or where torch records gradients."""
        kernel = self._kernel(right_side)
        recorded = right_side.requires_grad or (initial is not None and initial.requires_grad)
        if kernel is None or (recorded and torch.is_grad_enabled()):
            return None
        return kernel.solve(self._kernel_weights, right_side, iterations, regularization, initial)

    def descend(self, x: Tensor, of_data: Tensor, share: float) -> Tensor:
        """x + share (of_data - gram x)."""
        kernel = self._kernel(x)
        if kernel is None or of_data.dtype != x.dtype:
            return x + share * (of_data - self(x))
        return kernel.descend(self._kernel_weights, x, of_data, share)

    def _kernel(self, x: Tensor) -> Kernel | None:
        return self._prepared.kernel(x, self._axes, self._real_weights)

    @functools.cached_property
    def _kernel_weights(self) -> Tensor:
        kernel = self._kernel(self._maps)
        return kernel.real_weights(self._real_weights) if kernel is not None else self._real_weights

    def _forward(self, x: Tensor) -> Tensor:
        kernel = self._kernel(x)
        if kernel is not None:
            return kernel.gram(self._kernel_weights, x)
        if self._maps.device.type == "cpu":
            # One coil at a time stays in the cache: half the time of all at once.
            coils = (_ifft(_fft(sees * x, self._axes).mul_(self._weights), self._axes) for sees in self._maps)
            return _combined(self._conjugate, coils)
        kspace = _fft(self._maps * x.unsqueeze(-4), self._axes).mul_(self._weights)
        return (self._conjugate * _ifft(kspace, self._axes)).sum(-4)

    def _backward(self, y: Tensor) -> Tensor:
        return self._forward(y)


def innermost(x: Tensor, axes: Sequence[int]) -> Tensor:
    """The same tensor with `axes`, counted from the end, innermost in memory, where transforms run fastest."""
    order = [axis for axis in range(-x.ndim, 0) if axis not in axes] + list(axes)
    back = sorted(range(x.ndim), key=lambda place: order[place])
    return x.permute(order).contiguous().permute(back)


def _combined(conjugate: Tensor, images: Iterable[Tensor]) -> Tensor:
    """Sum over coils of conjugate * images, one coil after the other."""
    total: Tensor | None = None
    for sees, image in zip(conjugate, images, strict=True):
        total = sees * image if total is None else total.addcmul_(sees, image)
    if total is None:
        raise ValueError("maps hold no coil")
    return total


def _orthonormal(x: Tensor, axes: tuple[int, ...], *, inverse: bool = False) -> Tensor:
    transform = torch.fft.ifftn if inverse else torch.fft.fftn
    result: Tensor = transform(x, dim=axes, norm="ortho") if axes else x
    return result


def _fft(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return torch.fft.fftn(x, dim=axes) if axes else x


def _ifft(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The adjoint of `_fft`, without the 1/N of the inverse."""
    return torch.fft.ifftn(x, dim=axes, norm="forward") if axes else x


def _power(x: Tensor) -> Tensor:
    """|x|^2 without the square root that abs() takes."""
    return x.real.square() + x.imag.square() if x.is_complex() else x * x


def _transformed(shape: Shape, axes: Sequence[int]) -> tuple[int, ...]:
    """The axes worth a transform: sorted, those of length 1 left out. Raises ValueError for one that is not there."""
    for axis in axes:
        if not -len(shape) <= axis < 0:
            raise ValueError(f"axes is {tuple(axes)}, each must lie from {-len(shape)} to -1 for shape {shape}")
    if len(set(axes)) != len(axes):
        raise ValueError(f"axes is {tuple(axes)}, each may stand once")
    return tuple(axis for axis in sorted(axes) if shape[axis] > 1)


def _phases(shape: Shape, axes: Sequence[int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factors before and after the plain transform that make it centered; each broadcasts against `shape`."""
    before = torch.ones((1,) * len(shape), dtype=torch.complex128)
    after = before.clone()
    for axis in axes:
        size = shape[axis]
        column = (size,) + (1,) * (-axis - 1)
        index, center = torch.arange(size), size // 2
        before = before * _turn(center * index, size).reshape(column)
        after = after * _turn(center * (index - center), size).reshape(column)
    return before.to(device, dtype), after.to(device, dtype)


def _turn(numerator: Tensor, size: int) -> Tensor:
    """exp(2 pi i numerator / size) of integers, reduced first so that large products lose no digits."""
    angle = (numerator % size).double() * (2 * math.pi / size)
    return torch.polar(torch.ones_like(angle), angle)


def _points(shape: Shape, axes: Sequence[int]) -> int:
    return math.prod(shape[axis] for axis in axes)


def _varies(weights: Tensor, axis: int) -> bool:
    if -axis > weights.ndim or weights.shape[axis] == 1:
        return False
    return not bool((weights == weights.narrow(axis, 0, 1)).all())


def _broadcasts(mask: Tensor, shape: Shape, name: str) -> None:
    try:
        fits = mask.expand(shape).shape == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, it must broadcast against {shape}")
